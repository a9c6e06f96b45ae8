"""Requests in JSON: accepted, or refused by the name of the field, without quoting tokens."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import orjson
import pytest

from fireworks_training._core.operations import Role
from fireworks_training.local.model.losses import LOSSES
from fireworks_training.local.model.optimizer import AdamSettings
from fireworks_training.local.trainer.queue.line import Failure
from fireworks_training.local.trainer.queue.operations import (
    Answer,
    LoadState,
    Operation,
    OperationFailed,
    OptimStep,
    Pass,
    PassOutputs,
    SaveSnapshot,
    SaveState,
    Submission,
)
from fireworks_training.local.trainer.wire import datums, json_codec
from fireworks_training.local.trainer.wire.datums import ModelLimits
from tests.local.trainer.trainer_driver import datum, tensor

FULL = ModelLimits(vocab_size=64, context_length=8, lora=False)
LORA = ModelLimits(vocab_size=64, context_length=8, lora=True)
RL = {"logprobs": [-1.0, -2.0], "advantages": [0.5, -0.5]}


def submitted(kind: str, fields: dict[str, Any], limits: ModelLimits = FULL) -> Submission:
    body = {"model_id": "m", "seq_id": 3, **fields}
    return json_codec.submission(kind, json.dumps(body).encode(), lambda _: limits)


def decoded(kind: str, fields: dict[str, Any], limits: ModelLimits = FULL) -> Operation:
    operation = submitted(kind, fields, limits).operation
    assert not isinstance(operation, OperationFailed), operation
    return operation


def refused(kind: str, fields: dict[str, Any], limits: ModelLimits = FULL) -> str:
    operation = submitted(kind, fields, limits).operation
    assert isinstance(operation, OperationFailed), operation
    return str(operation)


def passes(*data: Any, loss: str = "cross_entropy", **fields: Any) -> dict[str, Any]:
    return {"forward_backward_input": {"data": list(data), "loss_fn": loss, **fields}}


def test_a_pass() -> None:
    body = passes(
        datum([1, 2], [2, 3], **RL), loss="ppo", loss_fn_config={"clip_low_threshold": 0.5}
    )
    submission = submitted("forward_backward", {**body, "comms": "v2", "type": "forward_backward"})
    assert (submission.model_id, submission.seq_id, submission.role) == ("m", 3, Role.GRADIENT)
    operation = submission.operation
    assert isinstance(operation, Pass)
    assert operation.backward
    assert operation.config == {"clip_low_threshold": 0.5, "clip_high_threshold": 1.2}
    (entry,) = operation.data
    assert entry.tokens.tolist() == [1, 2]
    assert {name: a.dtype.name for name, a in entry.inputs.items()} == {
        "target_tokens": "int64",
        "logprobs": "float32",
        "advantages": "float32",
        "weights": "float32",
    }
    assert entry.inputs["weights"].tolist() == [1.0, 1.0]


def test_chunks_are_one_sequence() -> None:
    entry = datum([1], [2, 3])
    entry["model_input"]["chunks"].append({"type": "encoded_text", "tokens": [2]})
    operation = decoded("forward_backward", passes(entry))
    assert isinstance(operation, Pass)
    assert operation.data[0].tokens.tolist() == [1, 2]


def changed(**changes: Any) -> dict[str, Any]:
    entry = datum([1, 2], [2, 3], weights=[1.0, 1.0])
    for path, value in changes.items():
        if path in entry:
            entry[path] = value
        else:
            entry["loss_fn_inputs"][path] = value
    return entry


@pytest.mark.parametrize(
    ("entry", "words"),
    [
        (datum([], []), "1 to 8"),
        (datum([1] * 9, [1] * 9), "9 tokens"),
        (datum([1, 64], [2, 3]), "tokens has ids outside the model's vocabulary of 64"),
        (datum([1, -1], [2, 3]), "vocabulary"),
        (datum([1, 2], [2, 64]), "target_tokens has ids outside"),
        (datum([1, 2], [2]), "target_tokens has 1 entries"),
        (datum([1, 2], [2, 3], weights=[1.0]), "weights has 1 entries"),
        (datum([1, 2], [2, 3], weights=[1.0, float("nan")]), "weights has entries that are not"),
        (datum([1, 2], [2, 3], weights=[1.0, float("inf")]), "weights has entries that are not"),
        (datum([1, 2], [2, 3], weights=[1.0, 1e39]), "weights has entries that are not finite"),
        (changed(weights={"data": [1.0, None], "dtype": "float32"}), "null stands for NaN"),
        (changed(weights={"data": [1.0, "x"], "dtype": "float32"}), "flat list"),
        (changed(weights={"data": [[1.0], [1.0]], "dtype": "float32"}), "flat list"),
        (changed(weights={"data": [[1.0], 1.0], "dtype": "float32"}), "flat list"),
        (changed(weights={"data": [True, False], "dtype": "float32"}), "flat list"),
        (changed(weights=tensor([1, 1], "int32")), "dtype float32 or int64"),
        (changed(weights=tensor([0.5, 1], "int64")), "weights must hold integers"),
        (changed(weights={**tensor([1.0, 1.0]), "shape": [2, 1]}), "shape [2, 1]"),
        (changed(weights={**tensor([1.0, 1.0]), "sparse_col_indices": [0]}), "sparse_crow_indices"),
        (changed(weights=[1.0, 1.0]), "weights must be a tensor"),
        (changed(target_tokens=tensor([2.0, 3.0])), "dtype int64"),
        (changed(target_tokens={"data": [2.5, 3], "dtype": "int64"}), "integers"),
        (changed(target_tokens={"data": [2, 1 << 70], "dtype": "int64"}), "target_tokens"),
        (changed(target_tokens=None), "needs loss_fn_inputs target_tokens"),
        (changed(weihgts=tensor([1.0, 1.0])), "did you mean 'weights'"),
        (changed(loss_mask=tensor([1.0, 0.0])), "weights and loss_mask contradict each other"),
        (changed(mask=tensor([0, 1], "int64")), "weights and mask contradict each other"),
        (changed(model_input={}), "chunks"),
        (changed(model_input={"chunks": [{"type": "image", "data": ""}]}), "text only"),
        (changed(model_input={"chunks": [{"type": "encoded_text"}]}), "list of tokens"),
        (changed(model_input={"chunks": [], "routing_matrices": []}), "routing_matrices"),
        (changed(loss_fn_inputs=None), "loss_fn_inputs"),
        ({}, "model_input"),
        (7, "model_input"),
    ],
)
def test_datums_that_are_refused(entry: Any, words: str) -> None:
    message = refused("forward_backward", passes(datum([1], [2]), entry))
    assert message.startswith("datum 1: ")
    assert words in message


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        (passes(datum([1], [2]), loss="dpo"), "there are cross_entropy, importance_sampling, ppo"),
        (passes(datum([1], [2]), loss_fn_config={"clip": 1}), "takes no settings"),
        (passes(datum([1], [2]), loss="ppo"), "needs loss_fn_inputs logprobs, advantages"),
        (
            passes(loss="ppo", loss_fn_config={"clip": 1}),
            "takes clip_low_threshold, clip_high_threshold",
        ),
        (passes(loss="ppo", loss_fn_config={"clip_low_threshold": "a"}), "finite number"),
        (passes(loss="ppo", loss_fn_config={"clip_low_threshold": 3}), "must not be above"),
        (passes(loss="ppo", loss_fn_config=[1]), "object"),
        (passes(), "1 to 1024"),
        (passes(*[datum([1], [2])] * 1025), "1 to 1024"),
        (passes(datum([1], [2]), top_k=5), "does not know 'top_k'"),
        ({**passes(datum([1], [2])), "lr": 1}, "does not know 'lr'"),
        ({}, "forward_backward_input"),
        ({"forward_backward_input": {"data": [], "loss_fn": ""}}, "loss_fn"),
    ],
)
def test_passes_that_are_refused(fields: dict[str, Any], words: str) -> None:
    assert words in refused("forward_backward", fields)


def weights_of(loss: str, **inputs: Any) -> list[float]:
    operation = decoded("forward_backward", passes(datum([1, 2], [2, 3], **inputs), loss=loss))
    assert isinstance(operation, Pass)
    assert operation.data[0].inputs.keys() == {"target_tokens", "weights", *LOSSES[loss].required}
    assert operation.data[0].inputs["weights"].dtype == np.float32
    return operation.data[0].inputs["weights"].tolist()


RL_LOSSES = [name for name in LOSSES if "advantages" in LOSSES[name].required]


@pytest.mark.parametrize("loss", LOSSES)
def test_a_mask_has_three_names_and_two_dtypes(loss: str) -> None:
    for name in ("weights", "loss_mask", "mask"):
        for dtype in ("float32", "int64"):
            entry = datum([1, 2], [2, 3], **RL)
            entry["loss_fn_inputs"][name] = tensor([0, 1], dtype)
            operation = decoded("forward_backward", passes(entry, loss=loss))
            assert isinstance(operation, Pass)
            assert operation.data[0].inputs["weights"].tolist() == [0.0, 1.0]
    both = {"weights": [0.0, 0.5], "loss_mask": [0.0, 1.0]}  # they agree on what counts
    assert weights_of(loss, **RL, **both) == [0.0, 0.5]


@pytest.mark.parametrize("loss", RL_LOSSES)
def test_without_a_mask_the_row_says_what_was_sampled(loss: str) -> None:
    def row(logprobs: list[float], advantages: list[float]) -> list[float]:
        return weights_of(loss, logprobs=logprobs, advantages=advantages)

    assert row([0.0, -1.0], [0.0, 2.0]) == [0.0, 1.0]
    assert row([0.0, -1.0], [0.0, 0.0]) == [0.0, 1.0]  # advantage 0 was sampled all the same
    assert row([0.0, 0.0], [0.0, 2.0]) == [0.0, 1.0]  # a probability of 1, too
    nothing = datum([1, 2], [2, 3], logprobs=[0.0, 0.0], advantages=[0.0, 0.0])
    message = refused("forward_backward", passes(nothing, loss=loss))
    assert "no weights" in message
    assert "advantages nor logprobs" in message
    assert weights_of(loss, **RL, weights=[0.0, 0.0]) == [0.0, 0.0]  # said: it is taken


def test_cross_entropy_without_a_mask_counts_every_token() -> None:
    assert weights_of("cross_entropy") == [1.0, 1.0]
    assert weights_of("cross_entropy", logprobs=[0.0, -1.0], advantages=[0.0, 1.0]) == [1.0, 1.0]


def test_gspo_takes_the_mask_of_its_ratio_by_tinker_s_name() -> None:
    assert weights_of("gspo", **RL, sequence_ratio_mask=[0.0, 1.0]) == [0.0, 1.0]
    assert weights_of("ppo", **RL, sequence_ratio_mask=[0.0, 1.0]) == [1.0, 1.0]
    entry = datum([1, 2], [2, 3], **RL, weights=[1.0, 0.0], sequence_ratio_mask=[0.0, 1.0])
    words = "weights and sequence_ratio_mask contradict"
    assert words in refused("forward_backward", passes(entry, loss="gspo"))


def test_what_a_loss_does_not_use_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    datums.note_once.cache_clear()
    for _ in range(2):
        weights_of("cross_entropy", **RL, values=[0.0, 1.0])
        weights_of("ppo", **RL)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == len(set(said)) == 4
    for name in ("advantages", "logprobs", "values"):
        assert f"loss 'cross_entropy' does not use '{name}': it is ignored" in said
    assert any(text.startswith("a row without weights") for text in said)


def test_settings_of_other_trainers() -> None:
    entry = datum([1, 2], [2, 3], **RL)
    sent = passes(entry, loss="importance_sampling", loss_fn_config={"ratio_log_cap": 20.0})
    operation = decoded("forward_backward", sent)
    assert isinstance(operation, Pass)
    assert operation.config == {"ratio_log_cap": 20.0}
    sent = passes(entry, loss="importance_sampling", loss_fn_config={"ratio_log_cap": -1.0})
    assert "ratio_log_cap must be at least 0" in refused("forward_backward", sent)
    unknown = refused("forward_backward", passes(entry, loss="stable_reinforce"))
    assert "not public: pass loss_fn='importance_sampling'" in unknown


def test_refusals_quote_no_tokens() -> None:
    message = refused("forward_backward", passes(datum([1, 987654], [2, 3])))
    assert "987654" not in message


def test_an_optim_step() -> None:
    body = {
        "adam_params": {"type": "adam", "learning_rate": 0.1, "grad_clip_norm": None},
        "grad_accumulation_normalization": "num_loss_tokens",
        "type": "optim_step",
    }
    wanted = OptimStep(AdamSettings(learning_rate=0.1), "num_loss_tokens")
    assert decoded("optim_step", body) == wanted
    default = OptimStep(AdamSettings(1e-4, 0.9, 0.95, 1e-12, 0.0, 0.0), "none")
    assert decoded("optim_step", {"adam_params": {}}) == default


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({}, "adam_params"),
        ({"adam_params": {"lr": 1}}, "learning_rate"),
        ({"adam_params": {"learning_rate": -1}}, "learning_rate is -1"),
        ({"adam_params": {"learning_rate": 1e38}}, "learning_rate is 1e+38"),
        ({"adam_params": {"learning_rate": float("nan")}}, "finite number"),
        ({"adam_params": {"learning_rate": True}}, "finite number"),
        ({"adam_params": {"beta1": 1}}, "below 1"),
        ({"adam_params": {"beta2": 1.5}}, "beta2"),
        ({"adam_params": {"eps": 0}}, "eps"),
        ({"adam_params": {"weight_decay": -0.1}}, "weight_decay"),
        ({"adam_params": {"emit_grad_norm_metrics": "detailed"}}, "not yet supported"),
        ({"adam_params": {}, "grad_accumulation_normalization": "mean"}, "num_sequences"),
        ({"optimizer_params": {"type": "dimuon"}}, "optimizer_params"),
    ],
)
def test_optim_steps_that_are_refused(fields: dict[str, Any], words: str) -> None:
    assert words in refused("optim_step", fields)


def test_saves_and_loads() -> None:
    assert decoded("save_weights", {"path": "a"}) == SaveState("a")
    kept = decoded("save_weights", {"path": "a", "overwrite": False, "ttl_seconds": 60})
    assert kept == SaveState("a", overwrite=False, ttl_seconds=60)
    load = {"path": "step-1", "optimizer": True}
    assert decoded("load_weights", load) == LoadState("step-1", None, True)
    load = {"path": "cross_job://job/step-1", "optimizer": False}
    assert decoded("load_weights", load) == LoadState("step-1", "job", False)
    for kind in ("base", "delta"):
        body = {"path": "s", "checkpoint_type": kind}
        assert decoded("save_weights_for_sampler", body) == SaveSnapshot("s", kind)


@pytest.mark.parametrize(
    ("kind", "fields", "words"),
    [
        ("save_weights", {"path": "../x"}, "name a state"),
        ("save_weights", {}, "path"),
        ("save_weights", {"path": "a", "ttl_seconds": 0}, "ttl_seconds"),
        ("load_weights", {"path": "a", "weights_access_token": "x"}, "weights_access_token"),
        ("load_weights", {"path": "a", "optimizer": 1}, "true or false"),
        ("save_weights_for_sampler", {"path": "a/b"}, "name a snapshot"),
        ("save_weights_for_sampler", {"path": "a", "checkpoint_type": "full"}, "base, delta"),
        ("save_weights_for_sampler", {"path": "a", "export_precision": "bf16"}, "merged_base"),
        ("save_weights_for_sampler", {"sampling_session_seq_id": 0}, "sampling_session_seq_id"),
        ("discard_gradients", {"path": "a"}, "does not know"),
    ],
)
def test_others_that_are_refused(kind: str, fields: dict[str, Any], words: str) -> None:
    assert words in refused(kind, fields)


def test_merged_base_is_for_adapters_and_refused_in_words_that_fit() -> None:
    body = {"path": "a", "checkpoint_type": "merged_base"}
    assert "for LoRA" in refused("save_weights_for_sampler", body, FULL)
    fp8 = {**body, "export_precision": "fp8_block128"}
    assert "source or bf16" in refused("save_weights_for_sampler", fp8, LORA)
    for precision in (None, "source", "bf16"):
        fields = {**body, "export_precision": precision}
        saved = decoded("save_weights_for_sampler", fields, LORA)
        assert saved == SaveSnapshot("a", "merged_base")


def test_the_digest_is_of_content() -> None:
    def digest(kind: str, raw: bytes) -> bytes:
        return json_codec.submission(kind, raw, lambda _: FULL).digest

    one = digest("save_weights", b'{"model_id":"m","seq_id":1,"path":"a"}')
    assert one == digest("save_weights", b'{ "path": "a", "seq_id": 1, "model_id": "m"}')
    assert one != digest("save_weights", b'{"model_id":"m","seq_id":1,"path":"b"}')
    assert one != digest("save_weights_for_sampler", b'{"model_id":"m","seq_id":1,"path":"a"}')
    digest("save_weights", b'{"model_id":"m","seq_id":1,"path":%d}' % (1 << 80))


def test_every_loss_is_in_reach() -> None:
    for name, loss in LOSSES.items():
        inputs = {key: [0.5, 0.5] for key in loss.inputs if key != "target_tokens"}
        assert decoded("forward_backward", passes(datum([1, 2], [2, 3], **inputs), loss=name))


def test_results() -> None:
    outputs = [
        {"logprobs": np.array([-0.1, -2.0], np.float32)},
        {"logprobs": np.zeros((0, 2), np.float32), "top_k_indices": np.array([[7, 1]])},
    ]
    encoded = json_codec.JSON.encode(PassOutputs(outputs, {"loss:sum": 1.5}))
    assert encoded.content_type == "application/json"
    assert b"-0.1," in encoded.body, "printed at float32 precision"
    assert orjson.loads(encoded.body) == {
        "loss_fn_output_type": "ArrayRecord",
        "loss_fn_outputs": [
            {"logprobs": {"data": [-0.1, -2.0], "dtype": "float32", "shape": [2]}},
            {
                "logprobs": {"data": [], "dtype": "float32", "shape": [0, 2]},
                "top_k_indices": {"data": [7, 1], "dtype": "int64", "shape": [1, 2]},
            },
        ],
        "metrics": {"loss:sum": 1.5},
    }
    assert orjson.loads(json_codec.JSON.encode(Answer({"path": "a"})).body) == {"path": "a"}


def test_failures() -> None:
    cause = Failure("too large", "user", "NonFinite")
    failure = Failure("not applied", "user", "PrecedingOperationFailed", cause, 7)
    assert orjson.loads(json_codec.encode_failure(failure, "r").body) == {
        "error": "not applied",
        "category": "user",
        "error_class": "PrecedingOperationFailed",
        "request_id": "r",
        "cause": {
            "error": "too large",
            "category": "user",
            "error_class": "NonFinite",
            "seq_id": 7,
        },
    }
    assert "cause" not in orjson.loads(json_codec.encode_failure(cause, "r").body)
