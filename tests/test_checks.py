"""Numbers as callers have them, of Python, numpy and torch; what is none is refused by name."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch

from fireworks_training._checks import integer, number
from fireworks_training.errors import InvalidArgument

WHOLE = [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3)]
REAL = [3.0, np.float32(3), np.float64(3), np.array(3.0), torch.tensor(3.0)]
REAL += [torch.tensor(3.0, dtype=torch.bfloat16), torch.tensor(3.0, requires_grad=True)]
NEITHER = [True, np.bool_(True), torch.tensor(True), "3", b"3", None, [3], [3, 4], {}]
NEITHER += [np.array([3, 4]), torch.tensor([3, 4])]


@pytest.mark.parametrize("value", WHOLE, ids=repr)
def test_integers(value: Any) -> None:
    found = integer("n", value, 1, 5)
    assert found == 3
    assert type(found) is int
    with pytest.raises(InvalidArgument, match="n must be between 4 and 5, got 3"):
        integer("n", value, 4, 5)


@pytest.mark.parametrize("value", [*WHOLE, *REAL], ids=repr)
def test_numbers(value: Any) -> None:
    found = number("x", value, 0)
    assert found == 3.0
    assert type(found) is float
    with pytest.raises(InvalidArgument, match="x must be at least 4"):
        number("x", value, 4)


@pytest.mark.parametrize("value", NEITHER, ids=repr)
def test_what_is_neither(value: Any) -> None:
    with pytest.raises(InvalidArgument, match="x must be a number, got"):
        number("x", value, 0)
    with pytest.raises(InvalidArgument, match="n must be an integer, got"):
        integer("n", value, 0)


@pytest.mark.parametrize("value", REAL, ids=repr)
def test_a_float_is_no_integer(value: Any) -> None:
    with pytest.raises(InvalidArgument, match="must be an integer"):
        integer("n", value, 0)


@pytest.mark.parametrize("kind", [float, np.float32, torch.tensor])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_out_of_range(kind: Any, value: float) -> None:
    with pytest.raises(InvalidArgument, match="x must be"):
        number("x", kind(value), -math.inf)
    with pytest.raises(InvalidArgument, match="x must be"):
        number("x", 10**400, 0)
