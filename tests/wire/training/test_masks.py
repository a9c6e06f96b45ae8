"""Which masks go to a server whose contract names none beside advantages."""

from __future__ import annotations

import numpy as np
import tinker

from fireworks_training import rl_datum, supervised_datum
from fireworks_training._wire.training.datums import capture, without_idle_weights


def row(**weights: list[float]) -> dict[str, np.ndarray]:
    datum = rl_datum([1, 2], [3, 4], logprobs=[-1.0, -1.0], advantages=1.0)
    arrays = {name: tensor.to_numpy() for name, tensor in datum.loss_fn_inputs.items()}
    return arrays | {name: np.asarray(values, np.float32) for name, values in weights.items()}


def test_weights_go_only_where_a_sum_needs_them() -> None:
    rest = {"target_tokens", "logprobs", "advantages"}
    assert without_idle_weights(row(), "ppo").keys() == rest
    halved = row(weights=[0.0, 0.5, 1.0])
    assert without_idle_weights(halved, "ppo") == halved
    silenced = row(weights=[0.0, 0.0, 1.0])
    assert without_idle_weights(silenced, "ppo") == silenced
    assert without_idle_weights(row(), "dro").keys() == {*rest, "weights"}
    sent = without_idle_weights(row(), "gspo")
    assert sent.keys() == {*rest, "sequence_ratio_mask"}
    assert sent["sequence_ratio_mask"].tolist() == [0.0, 1.0, 1.0]
    supervised = supervised_datum([1, 2], [0, 1])
    arrays = {name: tensor.to_numpy() for name, tensor in supervised.loss_fn_inputs.items()}
    assert without_idle_weights(arrays, "cross_entropy") == arrays


def test_a_plain_forward_counts_by_any_name_of_the_mask() -> None:
    datum = supervised_datum([1, 2, 3], [0, 0, 1])
    for name in ("weights", "loss_mask", "mask"):
        inputs = {"target_tokens": datum.loss_fn_inputs["target_tokens"]}
        mask = tinker.TensorData.from_numpy(np.array([0, 1]))
        named = tinker.Datum(model_input=datum.model_input, loss_fn_inputs={**inputs, name: mask})
        weights = capture(named).targets(0)["weights"]
        assert weights.dtype == np.float32
        assert weights.tolist() == [0.0, 1.0]
    bare = tinker.Datum(model_input=datum.model_input, loss_fn_inputs=inputs)
    assert capture(bare).targets(0)["weights"].tolist() == [1.0, 1.0]
