"""The training client's operations against the platform, in both dialects."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np
import pytest
import tinker
import torch

from fireworks_training import InvalidArgument, NotSupported, RequestFailed
from fireworks_training._async.training.model import RemoteModel
from tests.conftest import RunningPlatform
from tests.end_to_end.support import (
    ADAM,
    curved_loss,
    datums,
    part,
    relative,
    saved_state,
    service_on,
)


async def trained(platform: RunningPlatform, dialect: str, **options: Any) -> tuple[Any, ...]:
    """Three steps in one dialect: losses, and the state at the end."""
    async with service_on(platform, dialect=dialect, **options) as service:
        client = await service.create_training_client()
        assert client.dialect == dialect
        losses = []
        for step in range(2):
            built_in = client.forward_backward(datums(3, seed=step), "cross_entropy")
            client.optim_step(ADAM)
            losses.append((await built_in).metrics["loss:sum"])
        custom = client.forward_backward_custom(datums(3, seed=9), curved_loss)
        await client.optim_step(ADAM)
        losses.append((await custom).metrics["loss:sum"])
        await client.save_state("end")
        assert service.trainer_job_id is not None
        return losses, saved_state(platform, service.trainer_job_id, "end")


@pytest.mark.extension("wire")
async def test_both_dialects_train_the_same_model(platform: RunningPlatform) -> None:
    """Where a trainer lists no dialects, JSON is the one, and the other is refused at once."""
    if platform.as_cloud:
        with pytest.raises(NotSupported, match="leave dialect out"):
            await trained(platform, "protobuf")
        return
    (in_json, json_state), (in_protobuf, protobuf_state) = [
        await trained(platform, dialect, snapshot_dtype="float32")
        for dialect in ("json", "protobuf")
    ]
    assert np.allclose(in_json, in_protobuf, rtol=1e-6)
    for kind in ("master", "exp_avg"):
        assert relative(part(json_state, kind), part(protobuf_state, kind)) < 1e-6


@pytest.mark.extension("retrieve_futures")
async def test_results_come_in_batch_polls(
    platform: RunningPlatform, caplog: pytest.LogCaptureFixture
) -> None:
    """In one poll for all where that is offered, else in one for each."""
    async with service_on(platform) as service:
        client = await service.create_training_client()
        futures = [client.forward(datums(1, seed=n)) for n in range(20)]
        outputs = [(await future).loss_fn_outputs for future in futures]
        large = await client.forward(datums(64, seed=1))  # more than comes with a completion
        batch = client._model.queue._requests._batch
        if platform.as_cloud:
            assert batch is None
        else:
            assert batch is not None
            assert batch._cursor >= 20
    assert len(large.loss_fn_outputs) == 64
    assert all(np.isfinite(one[0]["logprobs"].to_numpy()).all() for one in outputs)
    assert not [record for record in caplog.records if "one by one" in record.getMessage()]


async def test_losses_over_embeddings_have_the_gradients_of_the_trainers_own(
    platform: RunningPlatform,
) -> None:
    """InfoNCE, written here over similarities and over embeddings, against the trainer's."""
    data, queries, temperature = datums(6, seed=3), 3, 0.5

    def info_nce(similarity: torch.Tensor) -> torch.Tensor:
        scores = similarity[:queries, queries:] / temperature
        labels = torch.arange(queries)
        entropy = torch.nn.functional.cross_entropy
        return (entropy(scores, labels) + entropy(scores.T, labels)) / 2

    def over_rows(_: Any, rows: list[torch.Tensor]) -> Any:
        return info_nce(torch.stack(rows)), {}

    def over_embeddings(_: Any, embeddings: list[torch.Tensor]) -> Any:
        unit = torch.nn.functional.normalize(torch.stack(embeddings), dim=-1)
        return info_nce(unit @ unit.T), {}

    async with service_on(platform, snapshot_dtype="float32") as service:
        client = await service.create_training_client()
        await client.save_state("begin")
        ways: dict[str, Any] = {
            "own": lambda: client.forward_backward_contrastive(
                data, num_queries=queries, temperature=temperature, pooling="mean"
            ),
            "rows": lambda: client.forward_backward_custom(
                data, over_rows, output="cos_similarity_matrix"
            ),
            "embeddings": lambda: client.forward_backward_custom(
                data, over_embeddings, output="embedding"
            ),
        }
        moments, losses = {}, {}
        assert service.trainer_job_id is not None
        for name, way in ways.items():
            await client.load_state_with_optimizer("begin")
            result = way()
            await client.optim_step(ADAM)
            await client.save_state(f"{name}-end")
            losses[name] = (await result).metrics["loss:sum"]
            end = saved_state(platform, service.trainer_job_id, f"{name}-end")
            moments[name] = part(end, "exp_avg")
    assert losses["rows"] == pytest.approx(losses["embeddings"], rel=1e-4)
    assert relative(moments["rows"], moments["embeddings"]) < 1e-3
    # The trainer's own loss may be a sum where this one is a mean: the direction is the same.
    flat = {
        name: torch.cat([t.flatten() for _, t in sorted(moment.items())])
        for name, moment in moments.items()
    }
    cosine = torch.nn.functional.cosine_similarity(flat["own"], flat["rows"], dim=0)
    assert float(cosine) > 0.999


@pytest.mark.as_cloud
async def test_a_forward_that_is_there_spares_one(platform: RunningPlatform) -> None:
    async with service_on(platform) as service:
        client = await service.create_training_client()
        data = datums(3)
        forward = await client.forward(data)
        given = client.forward_backward_custom(data, curved_loss, precomputed_forward=forward)
        first = (await client.optim_step(ADAM)).metrics["grad_norm"]
        await given
        await client.save_state("moved")
        assert first > 0


@pytest.mark.as_cloud
@pytest.mark.extension("error_class")
async def test_a_client_begins_at_a_saved_state(
    platform: RunningPlatform, caplog: pytest.LogCaptureFixture
) -> None:
    async with service_on(platform) as service:
        client = await service.create_training_client()
        await client.save_state("kept")
        await client.forward_backward(datums(2), "cross_entropy")
        await client.optim_step(ADAM)
        # A state is overwritten only when that is asked for.
        with pytest.raises(RequestFailed, match="overwrite=True") as refusal:
            await client.save_state("kept")
        assert refusal.value.error_class == (None if platform.as_cloud else "StateExists")
        path = (await client.save_state("kept", overwrite=True)).path
        wanted = (await client.forward(datums(2))).loss_fn_outputs[0]["logprobs"].to_numpy()
        with pytest.raises(InvalidArgument, match="load_state"):
            await service.create_training_client_from_state(path)
        job = service.trainer_job_id
        reference = client.resolve_checkpoint_path("kept", job)
        async with service_on(platform) as other:
            with pytest.raises(RequestFailed):
                await other.create_training_client_from_state("no-such-state")
            again = await other.create_training_client_from_state_with_optimizer(reference)
            got = (await again.forward(datums(2))).loss_fn_outputs[0]["logprobs"].to_numpy()
            assert np.allclose(got, wanted, atol=1e-6)
            assert await other.create_training_client() is again


@pytest.mark.as_cloud
@pytest.mark.extension("error_class")
async def test_two_clients_on_one_model_do_not_mix(platform: RunningPlatform) -> None:
    """A second line on the same model meets a place that is taken, and ends; the first goes on.

    Where a 409 does not say what it is of, it may be a passing state: the second one asks again.
    """
    async with service_on(platform) as service:
        client = await service.create_training_client()
        await client.forward(datums(1))
        model = client._model
        second = RemoteModel(model.session, model.capabilities, model.config, owner=model.owner)
        ghost = type(client)(second, client._publisher)
        outcome = ghost.forward(datums(1, seed=5))
        if not platform.as_cloud:
            with pytest.raises(Exception, match="second client"):
                await outcome
        await second.close(drain=False)
        await asyncio.gather(
            client.forward_backward(datums(1), "cross_entropy"),
            client.optim_step(tinker.AdamParams(learning_rate=1e-4)),
        )
