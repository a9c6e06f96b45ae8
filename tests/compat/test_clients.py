"""Service and training client by the official SDK's spellings: what its users call, and get."""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
from tinker.lib.retry_handler import RetryConfig

import fireworks_training
from fireworks_training import compat
from fireworks_training.compat import (
    AdamParams,
    Datum,
    DeploymentManager,
    FiretitanServiceClient,
    FiretitanTrainingClient,
    GradAccNormalization,
    GradNormMetricsMode,
    ModelInput,
    SamplingParams,
    TensorData,
    TrainerJobManager,
    WeightSyncer,
    types,
)
from fireworks_training.errors import InvalidArgument, NotSupported, RequestFailed
from tests.conftest import RunningPlatform
from tests.interop.record import Exchange, passing
from tests.tinker_server import tinker_server


def datum() -> Datum:
    return Datum(
        model_input=ModelInput.from_ints([5, 6, 7, 8]),
        loss_fn_inputs={
            "target_tokens": TensorData(data=[6, 7, 8, 9], dtype="int64", shape=[4]),
            "weights": TensorData(data=[1.0] * 4, dtype="float32", shape=[4]),
        },
    )


def service_of(
    platform: RunningPlatform, package: ModuleType = compat, **options: Any
) -> FiretitanServiceClient:
    made: FiretitanServiceClient = package.FiretitanServiceClient.from_firetitan_config(
        base_url=options.pop("base_url", platform.base_url),
        api_key=platform.api_key,
        base_model=platform.model,
        training_shape_id=platform.training_shape,
        cleanup_deployment_on_close="delete",
        cleanup_trainer_on_close=True,
        **options,
    )
    return made


SDKS = pytest.mark.parametrize("package", [fireworks_training, compat], ids=["core", "compat"])


@pytest.fixture(scope="module")
def service(platform: RunningPlatform) -> Iterator[FiretitanServiceClient]:
    with service_of(platform, deployment_id="compat-clients") as made:
        yield made


@pytest.fixture
def client(service: FiretitanServiceClient) -> FiretitanTrainingClient:
    return service.create_training_client()


def test_a_step_and_a_state_by_the_async_names(client: FiretitanTrainingClient) -> None:
    async def step() -> float:
        passed = await client.forward_backward_async([datum()], "cross_entropy")
        stepped = await client.optim_step_async(
            AdamParams(learning_rate=1e-3),
            GradAccNormalization.NUM_LOSS_TOKENS,
            GradNormMetricsMode.BASIC,
        )
        saved = await client.save_state_async("compat-state")
        await stepped
        assert (await saved).path.endswith("compat-state")
        await (await client.load_state_with_optimizer_async("compat-state"))
        await (await client.load_state_async("compat-state"))
        return float((await passed).metrics["loss:sum"])

    assert asyncio.run(step()) > 0
    assert "compat-state" in client.list_checkpoints()
    assert client.resolve_checkpoint_path(checkpoint_name="s", source_job_id="j") == (
        "cross_job://j/s"
    )


def test_what_the_trainer_says_comes_in_tinkers_types(
    service: FiretitanServiceClient, client: FiretitanTrainingClient
) -> None:
    info = asyncio.run(client.get_info_async())
    assert isinstance(info, types.GetInfoResponse)
    assert info.model_id == client.model_id
    capabilities = asyncio.run(service.get_server_capabilities_async())
    assert isinstance(capabilities, types.GetServerCapabilitiesResponse)
    assert client.get_tokenizer() is service.get_tokenizer()


def test_the_managed_names(
    service: FiretitanServiceClient, client: FiretitanTrainingClient
) -> None:
    assert client.session_id
    assert service.managed_deployment_id == "compat-clients"
    assert service.managed_trainer_job_id == service.trainer_job_id
    assert service.managed_training_profile == service.training_profile
    assert service.managed_accelerator_type == "CPU"
    assert service.managed_accelerator_count == 1
    assert service.managed_deployment_shape == service.deployment_shape
    assert service.managed_max_context_length == service.max_context_length


def test_what_is_not_supported_is_refused(
    service: FiretitanServiceClient, client: FiretitanTrainingClient
) -> None:
    with pytest.raises(NotSupported, match="projection"):
        service.create_training_client(projection_head_dim=8)
    with pytest.raises(NotSupported, match="kaiming"):
        service.create_lora_training_client(init_method="nora")
    with pytest.raises(NotSupported, match="metadata"):
        client.save_weights_for_sampler_ext("s", metadata={"a": 1})
    with pytest.raises(InvalidArgument, match="loss_type_input='x'"):
        asyncio.run(client.forward_backward_custom_async([datum()], len, loss_type_input="x"))


def test_a_save_with_a_timeout_is_done_when_it_returns(client: FiretitanTrainingClient) -> None:
    assert client.save_state("waited-for", timeout=60.0).done()
    assert asyncio.run(client.save_state_async("waited-for-too", timeout=60.0)).done()


def test_a_client_from_a_state(platform: RunningPlatform) -> None:
    with service_of(platform, create_deployment=False, lora_rank=4) as service:
        client = service.create_lora_training_client(rank=4)
        client.forward_backward([datum()], "cross_entropy")
        client.optim_step(AdamParams(learning_rate=1e-2)).result()
        client.save_state("compat-from").result()
        trained = client.forward([datum()], "cross_entropy").result().metrics["loss:sum"]
        base = client.create_base_training_client(platform.model)
        untrained = base.forward([datum()], "cross_entropy").result().metrics["loss:sum"]
        assert untrained > trained
        make = service.create_training_client_from_state_with_optimizer_async
        again = asyncio.run(make("compat-from", lora_rank=4))
        assert isinstance(again, FiretitanTrainingClient)
        assert again.forward([datum()], "cross_entropy").result().metrics["loss:sum"] == trained
        with pytest.raises(RequestFailed, match="compat-nothing"):
            service.create_training_client_from_state("compat-nothing")


@SDKS
@pytest.mark.parametrize("options", [{"max_lora_rank": 8}, {"lora_rank": 4}], ids=["many", "one"])
async def test_a_state_that_can_not_be_loaded_leaves_no_model(
    platform: RunningPlatform, package: ModuleType, options: dict[str, int]
) -> None:
    seen: Counter[str] = Counter()

    def fail(url: str) -> None:
        with service_of(
            platform, package, base_url=url, create_deployment=False, **options
        ) as service:
            for make in (
                service.create_training_client_from_state,
                service.create_training_client_from_state_with_optimizer,
            ):
                for _ in range(3):
                    with pytest.raises(RequestFailed, match="no-such-state"):
                        make("no-such-state", lora_rank=4)
            assert seen["create_model"] == seen["unload_model"] == 6
            # One that is given away stays.
            service.create_training_client(lora_rank=4)
            assert (seen["create_model"], seen["unload_model"]) == (7, 6)

    async with passing(platform, lambda e: seen.update([e.request.path.split("/")[-1]])) as url:
        await asyncio.to_thread(fail, url)


@SDKS
async def test_a_snapshots_name_is_the_one_that_was_sent(
    platform: RunningPlatform, package: ModuleType
) -> None:
    sent: list[str] = []

    def note(exchange: Exchange) -> None:
        if exchange.request.path.endswith("/save_weights_for_sampler"):
            sent.append(json.loads(exchange.body)["path"])

    def save(url: str) -> Any:
        with service_of(platform, package, base_url=url, create_deployment=False) as service:
            return service.create_training_client().save_weights_for_sampler_ext("compat-named")

    async with passing(platform, note) as url:
        saved = await asyncio.to_thread(save, url)
    assert type(saved) is fireworks_training.SaveSamplerResult
    assert [saved.snapshot_name] == sent
    assert saved.snapshot_name.startswith("compat-named-")
    assert saved.path == saved.snapshot_name  # this platform adds nothing to it


@SDKS
async def test_a_snapshots_name_on_a_server_that_adds_to_it(
    platform: RunningPlatform, package: ModuleType
) -> None:
    def save(url: str) -> Any:
        with package.FiretitanServiceClient.from_tinker_server(
            platform.model, base_url=url, api_key=platform.api_key, lora_rank=4
        ) as service:
            return service.create_training_client().save_weights_for_sampler_ext("compat-added")

    async with tinker_server(platform) as (url, _):
        saved = await asyncio.to_thread(save, url)
    assert saved.snapshot_name.startswith("compat-added-")
    assert saved.path.endswith(f".{saved.snapshot_name}")


def test_weights_are_saved_loaded_sampled_and_promoted(
    platform: RunningPlatform, service: FiretitanServiceClient, client: FiretitanTrainingClient
) -> None:
    deployments = DeploymentManager(platform.api_key, platform.base_url)
    syncer = WeightSyncer(
        client, deployments, "compat-clients", platform.model, warmup_max_retries=2
    )
    assert syncer.check_deployment_state() is None
    first = syncer.save_only("compat-a")
    assert first is not None
    assert syncer.hotload(first, "base")
    assert syncer.check_deployment_state() == syncer.base_identity == first
    client.forward_backward([datum()], "cross_entropy")
    client.optim_step(AdamParams(learning_rate=1e-3)).result()
    second = syncer.save_and_hotload("compat-b", "base")
    assert syncer.last_timing.keys() == {
        "save_time_s",
        "hotload_time_s",
        "warmup_time_s",
        "total_time_s",
    }
    assert not syncer.hotload("nothing", "base")
    assert deployments.last_hotload_error_message is not None
    assert syncer.base_identity == second
    syncer.reset_delta_chain()
    assert (syncer.base_saved, syncer.base_identity) == (False, None)
    sampler = syncer.get_deployment_sampler(service.get_tokenizer())
    found = sampler.sample_with_prompt_tokens([1, 2, 3], n=1, max_tokens=2).result()
    assert found[0].snapshot_identity == second
    sampler.close()
    prompt, params = ModelInput.from_ints([1, 2, 3]), SamplingParams(max_tokens=2)
    tinkers = syncer.get_sampling_client(service.get_tokenizer())
    assert len(tinkers.sample(prompt, 2, params).result().sequences) == 2
    tinkers.close()
    patient = RetryConfig(retry_delay_base=0.1)
    own = asyncio.run(client.create_sampling_client_async(second or "", patient))
    assert own.sample(prompt, 1, params).result().sequences[0].tokens
    mine = service.create_deployment_sampler()
    wrapped = asyncio.run(service.create_sampling_client_async(second, None, None, mine))
    assert wrapped.deployment_sampler is mine
    assert wrapped.sample(prompt, 1, params).result().sequences[0].tokens
    with pytest.raises(InvalidArgument, match="not both"):
        service.create_sampling_client(second, "base", deployment_sampler=mine)
    with pytest.raises(NotSupported, match="stuck"):
        service.create_sampling_client(
            second, retry_config=RetryConfig(enable_stuck_detection=False)
        )
    deployments.close()

    (row,) = [row for row in service.list_checkpoints() if row["name"].endswith(f"/{second}")]
    assert row["promotable"]
    model = service.promote_checkpoint(name=row["name"], output_model_id="compat-model")
    assert model == {
        "name": "accounts/local/models/compat-model",
        "state": "READY",
        "kind": "HF_BASE_MODEL",
    }
    with TrainerJobManager(platform.api_key, platform.base_url) as trainers:
        again = trainers.promote_checkpoint(
            name=row["name"], output_model_id="compat-model-2", base_model=platform.model
        )
        assert again["state"] == "READY"
        with pytest.raises(ValueError, match="is a checkpoint of"):
            trainers.promote_checkpoint(
                "other", name=row["name"], output_model_id="x", base_model=platform.model
            )
        with pytest.warns(DeprecationWarning, match="name="), pytest.raises(RuntimeError):
            trainers.promote_checkpoint("compat-none", "c", "x-model", platform.model)
