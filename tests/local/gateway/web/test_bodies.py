"""Bodies and their fields: what is taken, and the 400 for the rest, which never shows a value."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from fireworks_training.local.gateway.web.bodies import (
    int_field,
    invalid_body,
    object_field,
    optional_text,
    parse_object,
    required_text,
    text_field,
)
from fireworks_training.local.gateway.web.problems import HttpProblem

BODY: dict[str, object] = {
    "n": 3,
    "flag": True,
    "text": "abc",
    "empty": "",
    "nothing": None,
    "object": {"a": 1},
    "list": [1],
}


def test_fields_that_fit_are_returned() -> None:
    assert parse_object(b'{"a": 1}') == {"a": 1}
    assert int_field(BODY, "n", 3, 3) == 3
    assert [int_field(BODY, name, 1, 2, default=7) for name in ("nothing", "absent")] == [7, 7]
    assert text_field(BODY, "text", most=3) == "abc"
    assert [text_field(BODY, name, "x") for name in ("nothing", "absent")] == ["x", "x"]
    assert [optional_text(BODY, name) for name in ("empty", "nothing")] == ["", None]
    assert required_text(BODY, "nothing", "text") == "abc"
    assert object_field(BODY, "object") == {"a": 1}
    assert object_field(BODY, "absent") == {}


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "not JSON": (lambda: parse_object(b"{"), "the body is not JSON"),
    "a number that JSON does not have": (
        lambda: parse_object(b'{"a": NaN}'),
        "the body is not JSON",
    ),
    "a list": (lambda: parse_object(b"[]"), "the body is not a JSON object"),
    "above": (lambda: int_field(BODY, "n", 0, 2), "n must be an integer from 0 to 2"),
    "below": (lambda: int_field(BODY, "n", 4, 9), "n must be an integer from 4 to 9"),
    "a bool": (lambda: int_field(BODY, "flag", 0, 2), "flag must be an integer from 0 to 2"),
    "no integer": (lambda: int_field(BODY, "text", 0, 2, 1), "text must be an integer"),
    "a required integer": (lambda: int_field(BODY, "nothing", 0, 2), "nothing must be an integer"),
    "no string": (lambda: text_field(BODY, "n"), "n must be a string"),
    "a long string": (lambda: optional_text(BODY, "text", 2), "text is over 2 characters"),
    "an empty string": (
        lambda: required_text(BODY, "empty", "text"),
        "empty must be a non-empty string",
    ),
    "a required string": (
        lambda: required_text(BODY, "absent", "nothing"),
        "absent must be a non-empty string",
    ),
    "no object": (lambda: object_field(BODY, "list"), "list must be an object"),
}


@pytest.mark.parametrize(("check", "message"), REFUSED.values(), ids=REFUSED)
def test_a_field_that_does_not_fit_is_a_400(check: Callable[[], Any], message: str) -> None:
    with pytest.raises(HttpProblem) as caught:
        check()
    assert caught.value.status == 400
    assert caught.value.message.startswith(message)


class Inner(BaseModel):
    model_config = ConfigDict(extra="forbid")

    number: int


class Outer(BaseModel):
    inner: Inner


@pytest.mark.parametrize("inner", [{"number": "secret"}, {"number": 1, "number2": "secret"}])
def test_a_model_names_the_field_and_not_its_value(inner: dict[str, object]) -> None:
    with pytest.raises(ValidationError) as caught:
        Outer.model_validate({"inner": inner})
    problem = invalid_body(caught.value)
    assert problem.status == 400
    assert "field: 'inner.number" in problem.message
    assert "secret" not in problem.message
