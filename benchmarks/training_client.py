"""One side of `training.py`: a client, in its own interpreter, against the stub of that benchmark.

    PYTHON benchmarks/training_client.py SIDE WORK URL

SIDE: ours, tinker or fireworks, whatever that interpreter has. Prints one line of JSON. CPU is that
of the whole process, from after the client was made until the last result. The stall is the longest
delay of a callback on the loop that does the client's I/O, after the client was made; the garbage
of the imports is collected before.
"""

from __future__ import annotations

import asyncio
import gc
import json
import logging
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np

KEY = "tml-benchmark"
STEPS = 6
SIZES = {"sft": (256, 512), "rl": (256, 512), "long": (8, 16_384), "custom": (64, 512)}
LOSS = {"sft": "cross_entropy", "long": "cross_entropy", "rl": "importance_sampling"}


class Stall:
    """Watches a loop from inside: the longest time between two callbacks that were due at once."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop, self.worst, self.on = loop, 0.0, True
        loop.call_soon_threadsafe(self.again, None)

    def again(self, due: float | None) -> None:
        now = time.perf_counter()
        if due is not None:
            self.worst = max(self.worst, now - due)
        if self.on:
            self.loop.call_later(0.002, self.again, now + 0.002)


def datums(types: Any, work: str) -> list[Any]:
    """What the training script would hand in: token lists and numpy arrays."""
    count, length = SIZES[work]
    generator = np.random.default_rng(0)
    made = []
    for _ in range(count):
        tokens = generator.integers(0, 150_000, length)
        inputs = {"target_tokens": generator.integers(0, 150_000, length)}
        if work == "rl":
            inputs["logprobs"] = -generator.random(length, dtype=np.float32)
            inputs["advantages"] = generator.standard_normal(length, dtype=np.float32)
        else:
            inputs["weights"] = np.ones(length, np.float32)
        made.append(
            types.Datum(
                model_input=types.ModelInput.from_ints(tokens.tolist()),
                loss_fn_inputs={k: types.TensorData.from_numpy(v) for k, v in inputs.items()},
            )
        )
    return made


def custom_loss(_: Any, logprobs: Any) -> Any:
    """Any loss: here, a weighted sum."""
    total = sum((values * 0.5).sum() for values in logprobs)
    return -total, {"custom": 1.0}


def control(url: str, **state: Any) -> None:
    """Tell the stub how to behave."""
    request = urllib.request.Request(f"{url}/control", json.dumps(state).encode())
    urllib.request.urlopen(request).read()


def polls(url: str) -> int:
    """How many polls the stub has seen since it was last told something."""
    return int(json.load(urllib.request.urlopen(f"{url}/stats"))["polls"])


def run_work(client: Any, types: Any, work: str, url: str) -> dict[str, float]:
    """One kind of work; `client` has methods that return futures with `.result()`."""
    adam = types.AdamParams(learning_rate=1e-4)
    if work == "tiny":
        return tiny(client, types, adam)
    if work == "custom":
        return custom(client, types)
    if work.startswith("storm"):
        return storm(client, adam, int(work[5:]), url)
    if work.startswith("hang"):
        return hang(client, adam, work, url)
    data = datums(types, work)
    client.forward_backward(data, LOSS[work]).result()  # connections, first imports
    begin, wall = time.process_time(), time.perf_counter()
    futures = []
    for _ in range(STEPS):
        futures += [client.forward_backward(data, LOSS[work]), client.optim_step(adam)]
    for future in futures:
        future.result()
    count, length = SIZES[work]
    tokens = STEPS * count * length / 1e6
    return {
        "cpu_per_mtok": (time.process_time() - begin) / tokens,
        "wall": time.perf_counter() - wall,
    }


def tiny(client: Any, types: Any, adam: Any) -> dict[str, float]:
    """2,000 operations of one datum of 8 tokens, all called at once."""
    SIZES["tiny"] = (1, 8)
    data = datums(types, "tiny")
    client.forward_backward(data, "cross_entropy").result()
    begin, wall = time.process_time(), time.perf_counter()
    futures = []
    for _ in range(1000):
        futures += [client.forward_backward(data, "cross_entropy"), client.optim_step(adam)]
    for future in futures:
        future.result()
    elapsed = time.perf_counter() - wall
    return {"cpu_ms": (time.process_time() - begin) / 2, "ops_per_s": 2000 / elapsed}


def custom(client: Any, types: Any) -> dict[str, float]:
    """CPU of one custom loss."""
    import torch

    torch.set_num_threads(1)
    data = datums(types, "custom")
    client.forward_backward_custom(data, custom_loss).result()
    begin = time.process_time()
    for _ in range(10):
        client.forward_backward_custom(data, custom_loss).result()
    return {"cpu_ms": (time.process_time() - begin) * 100}


def storm(client: Any, adam: Any, status: int, url: str) -> dict[str, float]:
    """Polls a second of one operation while the stub answers them with an error for 3 s."""
    client.optim_step(adam).result()
    control(url, status=status)
    future = client.optim_step(adam)
    time.sleep(3.0)
    seen = polls(url)
    control(url, status=0)
    future.result()
    return {"requests_per_s": seen / 3.0}


def hang(client: Any, adam: Any, work: str, url: str) -> dict[str, float]:
    """Seconds until an operation is done, one of whose requests is never answered."""
    said: list[float] = []

    class Listen(logging.Handler):
        def emit(self, _: logging.LogRecord) -> None:
            said.append(time.perf_counter() - begin)

    client.optim_step(adam).result()
    control(url, hang={"hangresult": "retrieve_future", "hangsubmit": "optim_step"}[work])
    logging.getLogger().addHandler(Listen(logging.WARNING))
    begin = time.perf_counter()
    client.optim_step(adam).result()
    return {
        "recovered_s": time.perf_counter() - begin,
        "said_s": said[0] if said else float("nan"),
    }


class NoDeployment:
    """Counts what is saved, and serves nothing."""

    def __init__(self) -> None:
        from fireworks_training._core.snapshots import Chain

        self.chain = Chain()

    async def weights(self) -> Any:
        raise AssertionError("this benchmark has no deployment")

    of_probe = weights


@contextmanager
def ours(url: str, dialect: str) -> Iterator[tuple[Any, Any, asyncio.AbstractEventLoop]]:
    """Our client on a loop in a thread, as the blocking classes have it."""
    import tinker

    from fireworks_training import AsyncFiretitanTrainingClient, FiretitanProvisioningConfig
    from fireworks_training._async.http.transport import Transport
    from fireworks_training._async.runtime.loops import OwnerLoop
    from fireworks_training._async.training.model import RemoteModel
    from fireworks_training._async.training.session import TrainerSession
    from fireworks_training._async.weights.publisher import WeightPublisher

    owner = OwnerLoop(portal=True)

    def make(loop: OwnerLoop) -> Transport:
        return Transport(owner=loop, base_url=url, api_key=KEY)

    transport = make(owner)
    session = TrainerSession(transport, make, url)
    model: RemoteModel | None = None

    async def begin() -> AsyncFiretitanTrainingClient:
        await session.open(None)
        config = FiretitanProvisioningConfig(base_model="stub", dialect=dialect)  # type: ignore[arg-type]
        nonlocal model
        model = RemoteModel(session, await session.create_model(config), config, owner=owner)
        return AsyncFiretitanTrainingClient(model, WeightPublisher(owner, NoDeployment()))

    async def end() -> None:
        assert model is not None
        await model.close(drain=False)
        await session.close()
        await transport.close()

    client = owner.spawn(begin, label="begin").result()
    try:
        yield client, tinker, owner.get()
    finally:
        owner.spawn(end, label="end").result()
        owner.release()


@contextmanager
def official_tinker(url: str, _: str) -> Iterator[tuple[Any, Any, asyncio.AbstractEventLoop]]:
    """tinker's own client."""
    import tinker

    service = tinker.ServiceClient(base_url=url, api_key=KEY)
    client = service.create_lora_training_client("stub", rank=8).result()
    yield client, tinker, service.holder.get_loop()


@contextmanager
def official_fireworks(url: str, _: str) -> Iterator[tuple[Any, Any, asyncio.AbstractEventLoop]]:
    """The Fireworks SDK's client, straight on a trainer."""
    from fireworks.training import sdk

    service = sdk.FiretitanServiceClient(base_url=url, api_key="fw_benchmark")
    client = service.create_training_client("stub", lora_rank=8)
    yield client, sdk, service.holder.get_loop()


SIDES: dict[str, Callable[..., Any]] = {
    "ours-protobuf": ours,
    "ours-json": ours,
    "tinker": official_tinker,
    "fireworks-v1": official_fireworks,
    "fireworks-v2": official_fireworks,
}


def main() -> None:
    """Run one work with one side."""
    side, work, url = sys.argv[1:4]
    with SIDES[side](url, side.rpartition("-")[2]) as (client, types, loop):
        # What the imports left to collect would fall into anybody's time: here, into none's.
        gc.collect()
        stall = Stall(loop)
        result = run_work(client, types, work, url)
        result["stall_ms"] = stall.worst * 1e3
        stall.on = False
        print(json.dumps(result), flush=True)
    threading.Timer(2.0, lambda: __import__("os")._exit(0)).start()


if __name__ == "__main__":
    main()
