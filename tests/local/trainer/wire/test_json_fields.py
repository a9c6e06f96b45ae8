"""Checks of fields accept what is in range and refuse the rest, with the exception asked for."""

from __future__ import annotations

import pytest

from fireworks_training.local.trainer.queue.operations import OperationFailed
from fireworks_training.local.trainer.wire.json_fields import Malformed, count, identifier, whole

FIELD = "field must be"


@pytest.mark.parametrize(
    ("value", "least", "most", "message"),
    [
        (0, 1, 9, "a whole number from 1 to 9"),
        (10, 1, 9, "a whole number from 1 to 9"),
        (True, 0, 9, "a whole number from 0 to 9"),
        (2.0, 0, 9, "a whole number from 0 to 9"),
        ("2", 0, 9, "a whole number from 0 to 9"),
        (None, 0, 9, "a whole number from 0 to 9"),
    ],
)
def test_a_whole_number_out_of_range_or_of_another_kind_is_refused(
    value: object, least: int, most: int, message: str
) -> None:
    with pytest.raises(OperationFailed, match=f"{FIELD} {message}$"):
        whole({"field": value}, "field", least=least, most=most)


def test_a_whole_number_in_range_is_read_and_null_is_the_default() -> None:
    assert [whole({"field": n}, "field", least=1, most=9) for n in (1, 9)] == [1, 9]
    assert whole({"field": (1 << 63) - 1}, "field") == (1 << 63) - 1
    assert whole({"field": None}, "field", 7, least=8) == 7
    assert whole({"field": 8}, "field", 7) == 8


def test_a_field_that_names_the_place_is_refused_as_malformed() -> None:
    with pytest.raises(Malformed, match=f"{FIELD} a whole number from 0$"):
        whole({"field": 1 << 63}, "field", refusal=Malformed)
    with pytest.raises(Malformed, match=f"{FIELD} a string$"):
        identifier({"field": 5}, "field")
    assert identifier({"field": ""}, "field") == ""


def test_a_count_may_be_a_float_without_a_fraction() -> None:
    assert count({"field": 3.0}, "field", 0, 9) == 3
    assert count({}, "field", 2, 9) == 2
    for wrong in (3.5, 10, -1):
        with pytest.raises(OperationFailed, match=f"{FIELD} a whole number from 0 to 9$"):
            count({"field": wrong}, "field", 0, 9)
