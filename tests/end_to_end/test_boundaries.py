"""What a newcomer gets wrong, over HTTP: the error says what, why and what to do, and nothing is
left half-done: no job, no deployment, no part of a step, no file."""

from __future__ import annotations

import functools
import math
import sqlite3
import sys
from collections.abc import Callable
from typing import Any

import pytest
import tinker
import torch

from fireworks_training import (
    ApiStatusError,
    AsyncControlPlane,
    AsyncFiretitanServiceClient,
    AsyncFiretitanTrainingClient,
    AuthenticationFailed,
    ClientClosed,
    ConnectionFailed,
    DeploymentSampler,
    FiretitanServiceClient,
    FireworksTrainingError,
    InvalidArgument,
    InvalidDatum,
    LossFailed,
    NotFound,
    PrecedingOperationFailed,
    RequestFailed,
    SamplingRequestError,
    UnknownOption,
    WrongLoop,
    supervised_datum,
)
from fireworks_training._core.backoff import Backoff
from tests.conftest import RunningPlatform
from tests.end_to_end.support import ADAM, datums, saved_state, service_on, told

Loss = Callable[[Any, list[torch.Tensor]], Any]


async def resources(platform: RunningPlatform) -> set[str]:
    """Jobs and deployments that are there."""
    async with AsyncControlPlane.connect(
        base_url=platform.base_url, api_key=platform.api_key
    ) as plane:
        jobs = {job.name for job in await plane.list_jobs()}
        return jobs | {deployment.name for deployment in await plane.list_deployments()}


@pytest.mark.as_cloud
@pytest.mark.parametrize(
    ("options", "kind", "says"),
    [
        (
            {"api_key": "wrong"},
            AuthenticationFailed,
            "401.*wrong API key.*Pass the key of this server as api_key=, or set FIREWORKS_API_KEY",
        ),
        (
            {"base_model": "accounts/local/models/nope"},
            ApiStatusError,
            "no model 'accounts/local/models/nope'; this platform serves: .*/tiny-qwen3",
        ),
        (
            {"training_shape_id": "accounts/local/trainingShapes/nope"},
            NotFound,
            "no shape '.*/nope'; this platform has accounts/local/trainingShapes/cpu",
        ),
        ({"lora_rnk": 4}, UnknownOption, "'lora_rnk': did you mean 'lora_rank'"),
        ({"lora_rank": -1}, InvalidArgument, "lora_rank must be at least 0, got -1"),
        ({"base_url": "locl"}, InvalidArgument, "neither an http.s. URL nor 'local'"),
    ],
)
async def test_a_service_that_can_not_be_had(
    platform: RunningPlatform, options: dict[str, Any], kind: type[Exception], says: str
) -> None:
    before = await resources(platform)
    given = {"base_url": platform.base_url, "api_key": platform.api_key}
    with pytest.raises(kind, match=says) as caught:
        async with AsyncFiretitanServiceClient.from_firetitan_config(
            **{**given, "base_model": platform.model, **options}
        ) as service:
            await service.create_training_client()
    assert platform.api_key not in str(caught.value)
    assert await resources(platform) == before


async def test_an_unreachable_host(unused_tcp_port: int, monkeypatch: pytest.MonkeyPatch) -> None:
    once = functools.partial(Backoff, attempts=1)
    monkeypatch.setattr("fireworks_training._async.http.transport.Backoff", once)
    with pytest.raises(
        ConnectionFailed, match=rf"127.0.0.1:{unused_tcp_port}.*Check base_url.*training serve"
    ):
        async with AsyncFiretitanServiceClient.from_firetitan_config(
            base_url=f"http://127.0.0.1:{unused_tcp_port}", api_key="key", base_model="m"
        ) as service:
            await service.create_training_client()


def changed(datum: tinker.Datum, **inputs: Any) -> tinker.Datum:
    return tinker.Datum(
        model_input=datum.model_input, loss_fn_inputs={**datum.loss_fn_inputs, **inputs}
    )


def second(**inputs: Callable[[int], list[Any]]) -> list[tinker.Datum]:
    """Three datums, the second with other inputs."""
    data = datums(3)
    length = data[1].model_input.length
    data[1] = changed(data[1], **{name: make(length) for name, make in inputs.items()})
    return data


def unconnected(data: Any, logprobs: list[torch.Tensor]) -> Any:
    return torch.tensor(1.0, requires_grad=True), {}


def detached(data: Any, logprobs: list[torch.Tensor]) -> Any:
    return torch.cat(logprobs).detach().sum(), {}


BAD_PASSES: dict[str, tuple[Any, type[FireworksTrainingError], str]] = {
    "lengths": (
        lambda: (second(weights=lambda n: [1.0] * (n - 1)), "cross_entropy"),
        InvalidDatum,
        "datum 1: 'weights' has 11 entries, but model_input has 12 tokens.*supervised_datum",
    ),
    "nan": (
        lambda: (second(weights=lambda n: [1.0, math.nan, *[1.0] * (n - 2)]), "cross_entropy"),
        InvalidDatum,
        "datum 1: 'weights' is nan at position 1",
    ),
    "targets-outside": (
        lambda: (second(target_tokens=lambda n: [9999] * n), "cross_entropy"),
        RequestFailed,
        r"datum 1: .*outside the model's vocabulary of 328: tokenize with service.get_tokenizer",
    ),
    "inputs-outside": (
        lambda: ([supervised_datum([1, 9999, 3], [1, 1, 1])], "cross_entropy"),
        RequestFailed,
        r"datum 0: .*outside the model's vocabulary of 328: tokenize with service.get_tokenizer",
    ),
    "too-long": (
        lambda: ([supervised_datum([5] * 3000, [1.0] * 3000)], "cross_entropy"),
        RequestFailed,
        "it has 2999 tokens; this trainer takes 1 to 2048",
    ),
    "missing-inputs": (
        lambda: (datums(1), "importance_sampling"),
        RequestFailed,
        "needs loss_fn_inputs logprobs, advantages",
    ),
    "unconnected": (lambda: (datums(2), unconnected), LossFailed, "does not depend on any of"),
    "detached": (lambda: (datums(2), detached), LossFailed, r"was it detached.*\.item\(\)"),
}


async def test_a_pass_that_is_wrong_fails_its_step_and_leaves_no_trace(
    platform: RunningPlatform,
) -> None:
    """All of them on one model, a good step after each: at the end the weights are those of the
    good steps alone."""
    masters: list[dict[str, torch.Tensor]] = []
    for bad in (BAD_PASSES, {}):
        async with service_on(platform) as service:
            client = await service.create_training_client()
            for make, kind, says in bad.values():
                data, loss = make()
                failing = (
                    client.forward_backward(data, loss)
                    if isinstance(loss, str)
                    else client.forward_backward_custom(data, loss)
                )
                step = client.optim_step(ADAM)
                with pytest.raises(kind, match=says):
                    await failing
                with pytest.raises(PrecedingOperationFailed):
                    await step
            await client.forward_backward(datums(3), "cross_entropy")
            await client.optim_step(ADAM)
            await client.save_state("end")
            state = saved_state(platform, service.trainer_job_id or "", "end")
            masters.append({n: t for n, t in state.items() if n != "rng"})
    assert masters[0].keys() == masters[1].keys()
    assert all(torch.equal(masters[0][name], masters[1][name]) for name in masters[0])


async def refused(call: Callable[[], Any], kind: type[Exception], says: str) -> None:
    with pytest.raises(kind, match=says):
        await call()


@pytest.mark.as_cloud
async def test_a_call_that_is_wrong_takes_no_place_in_the_line(platform: RunningPlatform) -> None:
    async with service_on(platform) as service:
        client = await service.create_training_client()
        with pytest.raises(TypeError, match="los_fn_config"):
            client.forward_backward(datums(1), "cross_entropy", los_fn_config={})  # type: ignore[call-arg]
        with pytest.raises(
            InvalidArgument, match=r"'\.\./x' is not a valid name: 1 to 200 letters"
        ):
            client.save_state("../x")
        await refused(
            lambda: client.load_state("nope"), FireworksTrainingError, "nope.*(no|none).*"
        )
        with pytest.raises(FireworksTrainingError):
            await client.optim_step(ADAM)  # the load's step
        future = client.forward(datums(1))
        with pytest.raises(WrongLoop, match=r"`await future`.*synchronous class"):
            future.result()
        await future
        await client.forward_backward(datums(1), "cross_entropy")
        await client.optim_step(ADAM)
    await after_close(service, client)


async def after_close(
    service: AsyncFiretitanServiceClient, client: AsyncFiretitanTrainingClient
) -> None:
    for call in (
        lambda: client.forward(datums(1)),
        lambda: client.optim_step(ADAM),
        service.create_training_client,
    ):
        await refused(call, ClientClosed, "closed; make a new one")  # type: ignore[arg-type]


HELLO = [{"role": "user", "content": "hi"}]


@pytest.mark.extension("perf_metrics", "error")
async def test_sampling_calls(platform: RunningPlatform) -> None:
    async with service_on(platform, create_deployment=True) as service:
        client = await service.create_training_client()
        saved = await client.save_weights_for_sampler("s")
        sampler = await service.create_deployment_sampler(saved.path)
        sample = sampler.sample_with_tokens
        ids = sampler.sample_with_prompt_tokens
        # A cloud's replica says that a load failed, and not why.
        why = "nope was not loaded: no reason" if platform.as_cloud else "no snapshot 'nope'"
        cases: list[tuple[Callable[[], Any], type[Exception], str]] = [
            (lambda: sample(HELLO, n=0), InvalidArgument, "n must be at least 1, got 0"),
            (lambda: sample(HELLO, max_tokens=0), InvalidArgument, "max_tokens must be at least 1"),
            (
                lambda: sample(HELLO, max_token=4),  # type: ignore[call-overload, unused-ignore]
                UnknownOption,
                "'max_token'; did you mean max_tokens",
            ),
            (
                lambda: ids([5] * 5000),
                SamplingRequestError,
                r"prompt \(5000 tokens\).*context of 2048: shorten the prompt, or .* max_tokens",
            ),
            (
                lambda: ids([9999]),
                SamplingRequestError,
                r"9999 is outside the vocabulary of 328.*service.get_tokenizer\(\)",
            ),
            (lambda: sample([]), InvalidArgument, "messages is empty; pass"),
            (
                lambda: sample([HELLO, HELLO[0]]),  # type: ignore[list-item]
                InvalidArgument,
                "mixes messages with something else; pass",
            ),
            (
                lambda: service.create_deployment_sampler("nope"),
                FireworksTrainingError,
                f"{why}.*What was served before keeps serving",
            ),
        ]
        for call, kind, says in cases:
            await refused(call, kind, says)
        (completion,) = await sample(HELLO, max_tokens=2)
        assert completion.snapshot_identity == told(platform, saved.path)
    await refused(lambda: sample(HELLO), ClientClosed, "closed; make a new one")


@pytest.mark.as_cloud
def test_the_blocking_class_says_the_same(platform: RunningPlatform) -> None:
    with (
        FiretitanServiceClient.from_firetitan_config(
            base_url=platform.base_url, api_key="wrong", base_model=platform.model
        ) as service,
        pytest.raises(AuthenticationFailed, match="FIREWORKS_API_KEY"),
    ):
        service.create_training_client()


@pytest.mark.as_cloud
async def test_a_sampler_with_a_wrong_key(platform: RunningPlatform) -> None:
    sampler = DeploymentSampler(platform.base_url, "accounts/local/deployments/none", "wrong-key")
    with pytest.raises(SamplingRequestError, match=r"api_key=, or set FIREWORKS_API_KEY") as caught:
        await sampler.sample_with_prompt_tokens([5])
    assert "wrong-key" not in str(caught.value)
    sampler.close()


def worker_pid(platform: RunningPlatform, job: str) -> int:
    """The process that serves a job, asked of the platform's own records."""
    database = sqlite3.connect(platform.state_dir / "state.db")
    try:
        ((pid,),) = database.execute("SELECT pid FROM workers WHERE owner = ?", (job,)).fetchall()
    finally:
        database.close()
    return int(pid)


@pytest.mark.skipif(sys.platform != "linux", reason="limits of another process: Linux only")
async def test_a_disk_that_fills_up_while_a_save_is_written(platform: RunningPlatform) -> None:
    """For real: the worker may write no file over 1 MB, and the files are 2 and 11 MB."""
    import resource

    async with service_on(platform) as service:
        client = await service.create_training_client()
        job = service.trainer_job_id or ""
        await client.save_state("kept")
        pid = worker_pid(platform, job)
        states = platform.state_dir / "jobs" / job / "states"
        snapshots = platform.state_dir / "snapshots"
        before = {path.name for folder in (states, snapshots) for path in folder.iterdir()}
        kept = saved_state(platform, job, "kept")
        limits = resource.prlimit(pid, resource.RLIMIT_FSIZE)
        resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 20, limits[1]))
        says = r"could not be written: .*Nothing is left of it.*Free some space"
        try:
            for save, name in (
                (client.save_state, "new"),
                (functools.partial(client.save_state, overwrite=True), "kept"),
                (client.save_weights_for_sampler, "new"),
            ):
                with pytest.raises(RequestFailed, match=says):
                    await save(name)  # type: ignore[operator]
        finally:
            resource.prlimit(pid, resource.RLIMIT_FSIZE, limits)
        after = {path.name for folder in (states, snapshots) for path in folder.iterdir()}
        assert after == before
        assert len(list((states / "kept").iterdir())) == 2
        unchanged = saved_state(platform, job, "kept")
        assert all(torch.equal(kept[name], unchanged[name]) for name in kept)
        await client.forward_backward(datums(2), "cross_entropy")
        await client.optim_step(ADAM)
        await client.save_state("new")
        await client.save_weights_for_sampler("new")
