"""Training on a server that has the Tinker API and no control plane."""

from __future__ import annotations

import numpy as np
import pytest
import tinker

from fireworks_training import (
    AsyncFiretitanServiceClient,
    FiretitanServiceClient,
    InvalidArgument,
    NotSupported,
    RequestFailed,
)
from tests.conftest import RunningPlatform
from tests.end_to_end.support import model_folder, service_on
from tests.tinker_server import tinker_server

ADAM = tinker.AdamParams(learning_rate=1e-2)
TOKENS = [5, 17, 9, 33, 21, 8]


def datum() -> tinker.Datum:
    targets = tinker.TensorData.from_numpy(np.array(TOKENS[1:]))
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(TOKENS[:-1]),
        loss_fn_inputs={
            "target_tokens": targets,
            "weights": tinker.TensorData.from_numpy(np.ones(len(TOKENS) - 1, np.float32)),
        },
    )


async def test_a_tinker_server_trains_saves_and_resumes(platform: RunningPlatform) -> None:
    """Two steps, the same as on a provisioned trainer; then a state in another model."""
    async with service_on(platform, lora_rank=8, seed=3, create_deployment=False) as provisioned:
        client = await provisioned.create_training_client()
        wanted = []
        for _ in range(2):
            wanted.append((await client.forward_backward([datum()], "cross_entropy")).metrics)
            await client.optim_step(ADAM)
    async with tinker_server(platform) as (url, counts):
        service = AsyncFiretitanServiceClient.from_tinker_server(
            platform.model, base_url=url, api_key=platform.api_key, max_lora_rank=8, seed=3
        )
        async with service:
            client = await service.create_training_client(lora_rank=8)
            for metrics in wanted:
                passed = client.forward_backward([datum()], "cross_entropy")
                await client.optim_step(ADAM)
                assert (await passed).metrics["loss:sum"] == pytest.approx(metrics["loss:sum"])
            assert (await client.get_info())["lora_rank"] == 8
            state = (await client.save_state("bare-one")).path
            saved = await client.save_weights_for_sampler("bare-two")
            assert saved.path
            trained = (await client.forward([datum()], "cross_entropy")).metrics["loss:sum"]
            again = await service.create_training_client_from_state_with_optimizer(
                state, lora_rank=8
            )
            loaded = (await again.forward([datum()], "cross_entropy")).metrics["loss:sum"]
            assert loaded == pytest.approx(trained)
            await again.unload_model()
            assert (await service.get_server_capabilities())["supported_models"]
        assert service.trainer_job_id is None
    assert not [name for name in counts if name.startswith("refused")], counts
    assert counts["forward_backward"] == 4  # a forward goes there too


async def test_what_needs_a_control_plane_is_refused_in_words(platform: RunningPlatform) -> None:
    async with tinker_server(platform) as (url, counts):
        service = AsyncFiretitanServiceClient.from_tinker_server(
            platform.model, base_url=url, api_key=platform.api_key, lora_rank=4
        )
        async with service:
            client = await service.create_training_client()
            with pytest.raises(InvalidArgument, match="deployment"):
                await service.create_deployment_sampler()
            with pytest.raises(InvalidArgument, match="deployment"):
                await client.weight_sync()
            for call in (
                service.create_base_training_client(),
                service.create_reference_client(),
                service.list_checkpoints("j1"),
                service.promote_checkpoint("c", "m"),
                service.create_deployment_sampler_for_model("m"),
            ):
                with pytest.raises(NotSupported, match="control plane"):
                    await call
            with pytest.raises(NotSupported, match="checkpoint_type"):
                client.save_weights_for_sampler("x", checkpoint_type="delta")
            # The negative control: such a server refuses what it does not know.
            with pytest.raises(RequestFailed, match="grad_accumulation"):
                await client.optim_step(ADAM, grad_accumulation_normalization="num_sequences")
    assert [name for name in counts if name.startswith("refused")] == ["refused optim_step"]


def test_where_the_server_is_comes_from_tinkers_environment(
    platform: RunningPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("TINKER_BASE_URL", raising=False)
    monkeypatch.delenv("TINKER_API_KEY", raising=False)
    make = FiretitanServiceClient.from_tinker_server
    with pytest.raises(InvalidArgument, match="TINKER_BASE_URL"):
        make(platform.model)
    with pytest.raises(InvalidArgument, match="TINKER_API_KEY"):
        make(platform.model, base_url=platform.base_url)
    with pytest.raises(InvalidArgument, match="adapters"):
        make(platform.model, base_url=platform.base_url, api_key="k", lora_rank=0)
    monkeypatch.setenv("TINKER_BASE_URL", platform.base_url)
    monkeypatch.setenv("TINKER_API_KEY", platform.api_key)
    folder = str(model_folder())
    with make(platform.model, lora_rank=4, tokenizer_model=folder) as service:
        client = service.create_training_client()
        passed = client.forward_backward([datum()], "cross_entropy").result()
        assert passed.metrics["loss:sum"] > 0
        assert service.get_tokenizer().vocab_size
