from __future__ import annotations

import numpy as np
import pytest

from fireworks_training import InvalidDatum, rl_datum, supervised_datum


def test_supervised_shifts_by_one() -> None:
    datum = supervised_datum([5, 6, 7, 8], [0, 0, 1, 2])
    assert datum.model_input.to_ints() == [5, 6, 7]
    assert datum.loss_fn_inputs["target_tokens"].tolist() == [6, 7, 8]
    assert datum.loss_fn_inputs["weights"].tolist() == [0, 1, 2]


def test_rl_puts_arrays_on_the_completion() -> None:
    datum = rl_datum([1, 2, 3], [4, 5], logprobs=[-0.5, -1.0], advantages=2.0, mask=True)
    assert datum.model_input.to_ints() == [1, 2, 3, 4]
    assert datum.loss_fn_inputs["target_tokens"].tolist() == [2, 3, 4, 5]
    assert datum.loss_fn_inputs["logprobs"].tolist() == [0, 0, -0.5, -1.0]
    assert datum.loss_fn_inputs["advantages"].tolist() == [0, 0, 2, 2]
    assert datum.loss_fn_inputs["weights"].tolist() == [0, 0, 1, 1]
    assert datum.loss_fn_inputs["logprobs"].to_numpy().dtype == np.float32


def test_lengths_are_checked() -> None:
    with pytest.raises(InvalidDatum, match="'weights' has 1 entries for 2 tokens"):
        supervised_datum([1, 2], [1])
    with pytest.raises(InvalidDatum, match="needs two"):
        supervised_datum([1], [1])
    with pytest.raises(InvalidDatum, match="'logprobs'"):
        rl_datum([1], [2, 3], logprobs=[0.0], advantages=1)
    with pytest.raises(InvalidDatum, match="'advantages'"):
        rl_datum([1], [2, 3], logprobs=[0.0, 0.0], advantages=[1.0])
    with pytest.raises(InvalidDatum, match="prompt is empty"):
        rl_datum([], [2], logprobs=[0.0], advantages=1)
