"""Tensors in Fireworks JSON: the shortcut for masks writes what formatting writes."""

from __future__ import annotations

from typing import Any

import numpy as np
import orjson
import pytest

from fireworks_training._wire.training.json_passes import encode_tensor

GENERATOR = np.random.default_rng(0)


def formatted(array: Any) -> bytes:
    """The text of an array as orjson formats it, number by number."""
    flat = np.ascontiguousarray(array).reshape(-1)
    return orjson.dumps(
        {"data": flat, "dtype": "float32", "shape": array.shape}, option=orjson.OPT_SERIALIZE_NUMPY
    )


@pytest.mark.parametrize("length", [0, 1, 255, 256, 1000])
def test_a_mask_is_written_as_it_is_formatted(length: int) -> None:
    for mask in (
        np.ones(length, np.float32),
        (GENERATOR.random(length) > 0.5).astype(np.float32),
        (GENERATOR.random((length, 2)) > 0.5).astype(np.float32),
    ):
        assert orjson.dumps(encode_tensor(mask), option=orjson.OPT_SERIALIZE_NUMPY) == formatted(
            mask
        )


@pytest.mark.parametrize("value", [0.5, -1.0, 2.0, 1e-30, np.nextafter(np.float32(1), 2)])
@pytest.mark.parametrize("place", [0, 500, 999])
def test_one_other_value_makes_it_no_mask(value: float, place: int) -> None:
    array = np.ones(1000, np.float32)
    array[place] = value
    text = orjson.dumps(encode_tensor(array), option=orjson.OPT_SERIALIZE_NUMPY)
    assert text == formatted(array)
    assert np.float32(orjson.loads(text)["data"][place]) == np.float32(value)


def test_whole_numbers_stay_whole() -> None:
    text = orjson.dumps(encode_tensor(np.ones(300, np.int64)), option=orjson.OPT_SERIALIZE_NUMPY)
    assert orjson.loads(text) == {"data": [1] * 300, "dtype": "int64", "shape": [300]}
    assert b"1.0" not in text
