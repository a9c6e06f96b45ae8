"""Outputs beside one logprob a token: several targets, top-k, embeddings, projections, contrast."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from fireworks_training.local.model.model import load_model, round_parameters_
from fireworks_training.local.trainer.run.embeddings import info_nce
from fireworks_training.local.trainer.wire import datums, json_datums
from tests.local.trainer.trainer_driver import ADAM, VOCAB, Starter, datum, some_data, tensor

TOKENS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8]]


def values(output: dict[str, Any]) -> np.ndarray[Any, Any]:
    return np.array(output["data"]).reshape(output["shape"])


def request(
    key: str, data: list[dict[str, Any]], loss: str = "cross_entropy", **config: Any
) -> dict[str, Any]:
    return {key: {"data": data, "loss_fn": loss, "loss_fn_config": config}}


def plain(tokens: list[int], **inputs: dict[str, Any]) -> dict[str, Any]:
    chunk = {"type": "encoded_text", "tokens": tokens}
    return {"model_input": {"chunks": [chunk]}, "loss_fn_inputs": inputs}


async def embeddings(trainer: Any, pooling: str = "mean") -> np.ndarray[Any, Any]:
    data = [plain(tokens) for tokens in TOKENS]
    answer = await trainer.ok(
        "forward", **request("forward_input", data, output="embedding", pooling=pooling)
    )
    return np.stack([values(output["embedding"]) for output in answer["loss_fn_outputs"]])


# -- several targets a token, top-k --------------------------------------------------------------


async def test_many_targets_are_many_datums_with_one(start: Starter) -> None:
    tokens, targets = [1, 2, 3], [[4, 5], [6, 7], [8, 9]]
    weights = [[0.5, 1.0], [0.0, 2.0], [1.0, 0.25]]
    flat = [value for row in targets for value in row]
    many = plain(
        tokens,
        target_tokens={**tensor(flat, "int64"), "shape": [3, 2]},
        weights={**tensor([w for row in weights for w in row]), "shape": [3, 2]},
    )
    singles = [
        datum(tokens, [row[k] for row in targets], weights=[row[k] for row in weights])
        for k in range(2)
    ]
    steps = []
    for data in ([many], singles):
        trainer = await start()
        answer = await trainer.ok("forward_backward", **request("forward_backward_input", data))
        step = await trainer.ok("optim_step", adam_params=ADAM)
        steps.append((answer, step["metrics"]["grad_norm"]))
    (got, norm), (wanted, wanted_norm) = steps
    assert got["loss_fn_outputs"][0]["logprobs"]["shape"] == [3, 2]
    columns = np.stack([values(o["logprobs"]) for o in wanted["loss_fn_outputs"]], axis=1)
    np.testing.assert_allclose(values(got["loss_fn_outputs"][0]["logprobs"]), columns, atol=1e-5)
    assert got["metrics"]["loss:sum"] == pytest.approx(wanted["metrics"]["loss:sum"], rel=1e-5)
    assert norm == pytest.approx(wanted_norm, rel=1e-5)


async def test_sparse_targets_are_dense_ones_with_zeros(start: Starter) -> None:
    trainer = await start()
    dense = plain(
        [1, 2],
        target_tokens={**tensor([4, 5, 6, 0], "int64"), "shape": [2, 2]},
        weights={**tensor([0.5, 1.0, 2.0, 0.0]), "shape": [2, 2]},
    )
    cells = {"shape": [2, 2], "sparse_crow_indices": [0, 2, 3], "sparse_col_indices": [0, 1, 0]}
    sparse = plain(
        [1, 2],
        target_tokens={**tensor([4, 5, 6], "int64"), **cells},
        weights={**tensor([0.5, 1.0, 2.0]), **cells},
    )
    first = await trainer.ok("forward", **request("forward_input", [dense]))
    second = await trainer.ok("forward", **request("forward_input", [sparse]))
    assert first == second


async def test_sparse_tensors_are_bounded_all_together(
    start: Starter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A few bytes name as many cells as they like; the third datum is not written out any more."""
    trainer = await start()
    monkeypatch.setattr(datums, "MAX_TARGETS", 100)
    decoded: list[int] = []
    decode = json_datums.decode_tensor

    def counted(value: object, name: str) -> Any:
        decoded.append(1)
        return decode(value, name)

    monkeypatch.setattr(json_datums, "decode_tensor", counted)
    cells = {"shape": [2, 30], "sparse_crow_indices": [0, 1, 1], "sparse_col_indices": [0]}
    wide = plain(
        [1, 2],
        target_tokens={**tensor([4], "int64"), **cells},
        weights={**tensor([0.5]), **cells},
    )
    status, answer = await trainer.send("forward", **request("forward_input", [wide] * 5))
    assert status == 400
    assert "may have 100 targets" in answer["error"]
    assert len(decoded) == 4


@pytest.mark.parametrize(
    "cells",
    [
        {"sparse_crow_indices": [0, 2], "sparse_col_indices": [0, 1, 0]},
        {"sparse_crow_indices": [0, 3, 2], "sparse_col_indices": [0, 1, 0]},
        {"sparse_crow_indices": [0, 2, 3], "sparse_col_indices": [0, 2, 0]},
        {"sparse_crow_indices": [0, 2, 3], "sparse_col_indices": [0, 1]},
        {"sparse_crow_indices": [0, 2, 3], "sparse_col_indices": [0, 1, 0], "shape": [1 << 30, 9]},
    ],
)
async def test_sparse_tensors_that_do_not_fit_are_refused(
    start: Starter, cells: dict[str, Any]
) -> None:
    trainer = await start()
    targets = {**tensor([4, 5, 6], "int64"), "shape": [2, 2], **cells}
    status, answer = await trainer.send(
        "forward", **request("forward_input", [plain([1, 2], target_tokens=targets)])
    )
    assert status == 400
    assert "target_tokens is sparse" in answer["error"]


async def test_other_losses_take_one_target_a_token(start: Starter) -> None:
    trainer = await start()
    shaped = {name: {**tensor([1.0, 1.0]), "shape": [1, 2]} for name in ("logprobs", "advantages")}
    targets = {**tensor([4, 5], "int64"), "shape": [1, 2]}
    body = request("forward_input", [plain([1], target_tokens=targets, **shaped)], "ppo")
    status, answer = await trainer.send("forward", **body)
    assert status == 400
    assert "one target a token" in answer["error"]


async def test_top_k_is_the_head_of_the_log_softmax(start: Starter) -> None:
    trainer = await start()
    data = some_data()
    answer = await trainer.ok("forward", **request("forward_input", data, top_k=VOCAB))
    for given, output in zip(data, answer["loss_fn_outputs"], strict=True):
        logprobs, ids = values(output["top_k_logprobs"]), values(output["top_k_indices"])
        assert (np.diff(logprobs) <= 0).all()
        np.testing.assert_allclose(np.exp(logprobs).sum(-1), 1.0, atol=1e-5)
        targets = np.array(given["loss_fn_inputs"]["target_tokens"]["data"])
        places = (ids == targets[:, None]).argmax(-1)
        found = logprobs[np.arange(len(targets)), places]
        np.testing.assert_allclose(found, values(output["logprobs"]), atol=1e-5)
    status, _ = await trainer.send(
        "forward_backward", **request("forward_backward_input", data, top_k=2)
    )
    assert status == 400


# -- hidden states -------------------------------------------------------------------------------


@pytest.mark.parametrize("pooling", ["mean", "last"])
async def test_embeddings_are_pooled_hidden_states(
    start: Starter, model_path: Any, pooling: str
) -> None:
    got = await embeddings(await start(), pooling)
    model = load_model(model_path)
    round_parameters_(model, "bfloat16")
    for tokens, embedding in zip(TOKENS, got, strict=True):
        with torch.no_grad():
            hidden = model.base_model(input_ids=torch.tensor([tokens])).last_hidden_state[0]
        wanted = hidden.mean(0) if pooling == "mean" else hidden[-1]
        np.testing.assert_allclose(embedding, wanted.numpy(), atol=1e-5)


async def test_the_gradient_of_embeddings_moves_them_as_asked(start: Starter) -> None:
    """A step along the gradient of sum(E * G) lowers that sum."""
    trainer = await start(snapshot_dtype="float32")
    before = await embeddings(trainer)
    wanted = np.random.default_rng(0).normal(size=before.shape)
    data = [
        plain(tokens, embedding_grads=tensor(row.tolist()))
        for tokens, row in zip(TOKENS, wanted, strict=True)
    ]
    answer = await trainer.ok(
        "forward_backward", **request("forward_backward_input", data, output="embedding")
    )
    assert answer["metrics"]["loss:sum"] == pytest.approx((before * wanted).sum(), rel=1e-4)
    await trainer.ok("optim_step", adam_params={**ADAM, "learning_rate": 1e-3})
    assert ((await embeddings(trainer)) * wanted).sum() < (before * wanted).sum()


async def test_cosines_and_their_gradient(start: Starter) -> None:
    trainer = await start(snapshot_dtype="float32")
    unit = await embeddings(trainer)
    unit /= np.linalg.norm(unit, axis=-1, keepdims=True)

    async def cosines() -> np.ndarray[Any, Any]:
        answer = await trainer.ok(
            "forward",
            **request("forward_input", [plain(t) for t in TOKENS], output="cos_similarity_matrix"),
        )
        return np.stack([values(o["embedding"]) for o in answer["loss_fn_outputs"]])

    before = await cosines()
    np.testing.assert_allclose(before, unit @ unit.T, atol=1e-5)
    push = np.ones((3, 3)) - np.eye(3)
    data = [
        plain(tokens, embedding_grads=tensor(row.tolist()))
        for tokens, row in zip(TOKENS, push, strict=True)
    ]
    body = request("forward_backward_input", data, output="cos_similarity_matrix")
    await trainer.ok("forward_backward", **body)
    await trainer.ok("optim_step", adam_params={**ADAM, "learning_rate": 1e-3})
    assert ((await cosines()) * push).sum() < (before * push).sum()


async def test_a_projection_head_is_trained_saved_and_not_served(start: Starter) -> None:
    trainer = await start(create={"projection_head_dim": 2})
    data = [plain(tokens) for tokens in TOKENS]
    forward = request("forward_input", data, output="projection")
    answer = await trainer.ok("forward", **forward)
    before = [values(output["projection"]) for output in answer["loss_fn_outputs"]]
    assert [row.shape for row in before] == [(5, 2), (3, 2), (4, 2)]
    pushed = [
        plain(tokens, projection_grads={**tensor([1.0] * row.size), "shape": list(row.shape)})
        for tokens, row in zip(TOKENS, before, strict=True)
    ]
    body = request("forward_backward_input", pushed, output="projection")
    await trainer.ok("forward_backward", **body)
    await trainer.ok("save_weights", path="s")
    await trainer.ok("optim_step", adam_params=ADAM)
    answer = await trainer.ok("forward", **forward)
    after = [values(output["projection"]) for output in answer["loss_fn_outputs"]]
    assert sum(row.sum() for row in after) < sum(row.sum() for row in before)
    assert "snapshot" in await trainer.ok("save_weights_for_sampler", path="x")
    await trainer.ok("load_weights", path="s", optimizer=False)
    assert (await trainer.ok("forward", **forward))["loss_fn_outputs"] is not None


async def test_a_model_without_a_head_refuses_projections(start: Starter) -> None:
    trainer = await start()
    body = request("forward_input", [plain([1])], output="projection")
    status, answer = await trainer.send("forward", **body)
    assert status == 400
    assert "projection_head_dim" in answer["error"]


async def test_a_contrastive_pass_pulls_pairs_together(start: Starter) -> None:
    trainer = await start(snapshot_dtype="float32")
    data = [plain([i, i + 1, i + 2]) for i in range(0, 25, 5)]
    config = {"num_queries": 2, "num_extra_negatives": 1, "temperature": 1.0}
    body = request("forward_backward_input", data, output="contrastive_loss", **config)
    losses = []
    for _ in range(3):
        answer = await trainer.ok("forward_backward", **body)
        assert answer["loss_fn_outputs"] == [{}] * 5
        assert answer["metrics"]["loss"] == answer["metrics"]["loss:sum"]
        losses.append(answer["metrics"]["loss"])
        await trainer.ok("optim_step", adam_params={**ADAM, "learning_rate": 1e-3})
    assert losses[2] < losses[1] < losses[0]
    status, answer = await trainer.send(
        "forward_backward",
        **request("forward_backward_input", data[:4], **{**config, "output": "contrastive_loss"}),
    )
    assert status == 400
    assert "2 * num_queries" in answer["error"]


def test_info_nce_is_a_loop_over_pairs() -> None:
    generator = torch.Generator().manual_seed(0)
    unit = torch.nn.functional.normalize(
        torch.randn(7, 4, generator=generator, dtype=torch.float64), dim=-1
    )
    cosines = (unit[:3] @ unit[3:].T / 0.2).tolist()
    total = 0.0
    for i in range(3):
        row = [np.exp(cosines[i][j]) for j in range(4)]
        column = [np.exp(cosines[j][i]) for j in range(3)]
        total -= np.log(row[i] / sum(row)) + np.log(column[i] / sum(column))
    assert info_nce(unit, 3, 0.2).item() == pytest.approx(total / 6, rel=1e-12)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"output": "logits"}, "output must be one of"),
        ({"output": "embedding", "pooling": "max"}, "pooling mean or last"),
        ({"output": "embedding", "temperature": 1.0}, "takes output, pooling"),
        ({"output": "contrastive_loss", "num_queries": 1}, "forward_backward only"),
    ],
)
async def test_what_is_refused(start: Starter, config: dict[str, Any], words: str) -> None:
    trainer = await start()
    status, answer = await trainer.send(
        "forward", **request("forward_input", [plain([1]), plain([2])], **config)
    )
    assert status == 400
    assert words in answer["error"]
