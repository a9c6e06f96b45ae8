"""What a user's program does in a scenario, written once for both SDKs: the names are the same.

This file runs in the official client's interpreter too, so it imports nothing but the standard
library. A program is handed a `Run` and the SDK (`official_side` or `our_side`); every operation is
a step of the run, and a step that fails does not end the program: the next one shows whether the
client still lives. The last step of a program is called `alive`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

MODEL = "accounts/fireworks/models/any"
SHAPE = "accounts/acme/trainingShapes/small"
LORA_SHAPE = "accounts/acme/trainingShapes/lora"
KEY = "fw_cloud_harness_key"
TOKENS = [5, 6, 7, 8, 9]
RESULT_S = 200.0
OK = "ok"


class Letters:
    """A tokenizer for samplers that are given token ids: it is never asked."""

    def apply_chat_template(self, messages: Any, **options: Any) -> list[int]:
        """Refuse: no program sends messages."""
        raise NotImplementedError

    def encode(self, text: str, **options: Any) -> list[int]:
        """The code points."""
        return [ord(letter) for letter in text]

    def decode(self, tokens: Any, **options: Any) -> str:
        """The letters of code points."""
        return "".join(chr(token) for token in tokens)


class Missing(Exception):
    """A step needs what an earlier one did not bring."""


class Run:
    """The steps of a program and how each ended: "ok", or the error's type and words."""

    def __init__(self) -> None:
        self.steps: list[tuple[str, str]] = []

    def __call__(self, name: str, action: Callable[[], Any]) -> Any:
        """Carry a step out; its value, or None where it failed."""
        try:
            value = action()
        except Exception as error:
            self.note(name, error)
            return None
        self.note(name, None)
        return value

    def note(self, name: str, error: BaseException | None) -> None:
        """A step ended."""
        said = OK if error is None else f"{type(error).__name__}: {str(error)[:300]}"
        self.steps.append((name, said))


def needed(value: Any) -> Any:
    """A value that an earlier step should have brought."""
    if value is None:
        raise Missing("an earlier step failed")
    return value


def datum(sdk: Any) -> Any:
    """One short sequence with its targets and weights."""
    count = len(TOKENS) - 1
    return sdk.Datum(
        model_input=sdk.ModelInput.from_ints(TOKENS[:-1]),
        loss_fn_inputs={
            "target_tokens": sdk.TensorData(data=TOKENS[1:], dtype="int64", shape=[count]),
            "weights": sdk.TensorData(data=[1.0] * count, dtype="float32", shape=[count]),
        },
    )


def service(sdk: Any, url: str, **options: Any) -> Any:
    """A service on the scenario's cloud; the deployment is told by name, or left out."""
    options.setdefault("training_shape_id", SHAPE)
    options.setdefault("reattach_poll_interval_s", 1)
    return sdk.FiretitanServiceClient.from_firetitan_config(
        api_key=KEY, base_url=url, base_model=MODEL, **options
    )


def _step(run: Run, sdk: Any, client: Any, name: str) -> None:
    def forward_backward() -> None:
        needed(client).forward_backward([datum(sdk)], "cross_entropy").result(RESULT_S)

    def optim_step() -> None:
        needed(client).optim_step(sdk.AdamParams(learning_rate=1e-4)).result(RESULT_S)

    run(f"forward_backward {name}", forward_backward)
    run(f"optim_step {name}", optim_step)


def _forward(sdk: Any, client: Any) -> None:
    needed(client).forward([datum(sdk)], "cross_entropy").result(RESULT_S)


def _complete(sampler: Any, count: int, **options: Any) -> list[Any]:
    """Completions at the same time; what each brought, errors among them."""

    async def all_of_them() -> list[Any]:
        calls = [
            _awaited(sampler.sample_with_prompt_tokens([1, 2, 3], n=1, max_tokens=3, **options))
            for _ in range(count)
        ]
        return await asyncio.gather(*calls, return_exceptions=True)

    return asyncio.run(all_of_them())


async def _awaited(call: Any) -> Any:
    found = await call
    if len(found) != 1 or list(found[0].full_tokens) != [1, 2, 3, 7, 8, 9]:
        raise Missing("not the completion that the server made")
    return found


def _sample(run: Run, sampler: Any, count: int, **options: Any) -> None:
    if sampler is None:
        for number in range(count):
            run.note(f"completion {number}", Missing("no sampler"))
        return
    for number, ended in enumerate(_complete(sampler, count, **options)):
        run.note(f"completion {number}", ended if isinstance(ended, BaseException) else None)


def sample(run: Run, sdk: Any, url: str, *, count: int = 8, **options: Any) -> None:
    """Completions of a deployment, all asked for at once."""
    sampler = run("sampler", lambda: sdk.sampler(url))
    _sample(run, sampler, count, **options)
    run("alive", lambda: needed(_one(sampler)))


def _one(sampler: Any) -> Any:
    (ended,) = _complete(needed(sampler), 1)
    if isinstance(ended, BaseException):
        raise ended
    return ended


def train(run: Run, sdk: Any, url: str, *, steps: int = 2, **options: Any) -> None:
    """Steps on a trainer that runs already, then a state and a snapshot."""
    made = service(sdk, url, trainer_job_id="job-1", create_deployment=False, **options)
    rank = options.get("lora_rank", 0)
    client = run("client", lambda: made.create_training_client(MODEL, lora_rank=rank))
    for number in range(steps):
        _step(run, sdk, client, str(number))
    run("save_state", lambda: needed(client).save_state("state-1").result(RESULT_S))
    run("save", lambda: sdk.saved_path(needed(client), "one"))
    run("alive", lambda: _forward(sdk, client))
    run("close", made.close)


def state(run: Run, sdk: Any, url: str) -> None:
    """Save a state, list it, load it with the optimizer, go on, and unload the model."""
    made = service(sdk, url, trainer_job_id="job-1", create_deployment=False)
    client = run("client", lambda: made.create_training_client(MODEL, lora_rank=0))
    _step(run, sdk, client, "before")
    run("save_state", lambda: needed(client).save_state("state-1").result(RESULT_S))

    def load() -> None:
        needed(client).load_state_with_optimizer("state-1").result(RESULT_S)

    run("list_checkpoints", lambda: needed(needed(client).list_checkpoints() or None))
    run("load", load)
    run("alive", lambda: _forward(sdk, client))
    run("unload", lambda: needed(client).unload_model().result(RESULT_S))
    run("close", made.close)


def _load_and_sample(
    run: Run, sdk: Any, made: Any, client: Any, name: str, samples: int, tokenizer: bool
) -> None:
    chosen = {"tokenizer": Letters()} if tokenizer else {}
    path = run(f"save {name}", lambda: sdk.saved_path(needed(client), name))

    def load() -> Any:
        return made.create_deployment_sampler(model_path=needed(path), **chosen)

    _sample(run, run(f"hot load {name}", load), samples)


def hot_load(
    run: Run,
    sdk: Any,
    url: str,
    *,
    loads: int = 1,
    lora_rank: int = 0,
    tokenizer: bool = True,
    **options: Any,
) -> None:
    """Train, save, hot load and sample, on a trainer and a deployment that run already."""
    options.setdefault("hotload_timeout_s", 60)
    made = service(
        sdk,
        url,
        trainer_job_id="job-1",
        deployment_id="deployment-1",
        training_shape_id=LORA_SHAPE if lora_rank else SHAPE,
        lora_rank=lora_rank,
        **options,
    )
    client = run("client", lambda: made.create_training_client(MODEL, lora_rank=lora_rank))
    for number in range(loads):
        _step(run, sdk, client, str(number))
        _load_and_sample(run, sdk, made, client, f"snapshot-{number}", 1, tokenizer)
    run("alive", lambda: _forward(sdk, client))
    run("close", made.close)


def managed(
    run: Run,
    sdk: Any,
    url: str,
    *,
    lora_rank: int = 0,
    tokenizer: bool = True,
    **options: Any,
) -> None:
    """Everything from nothing: trainer, deployment, a step, a hot load, completions, clean-up."""
    options.setdefault("cleanup_trainer_on_close", True)
    options.setdefault("cleanup_deployment_on_close", "delete")
    made = service(
        sdk,
        url,
        training_shape_id=LORA_SHAPE if lora_rank else SHAPE,
        lora_rank=lora_rank,
        **options,
    )
    client = run("client", lambda: made.create_training_client(MODEL, lora_rank=lora_rank))
    _step(run, sdk, client, "first")
    _load_and_sample(run, sdk, made, client, "snapshot-0", 2, tokenizer)
    run("alive", lambda: _forward(sdk, client))
    run("close", made.close)


def reference(run: Run, sdk: Any, url: str, *, lora_rank: int = 0, **options: Any) -> None:
    """A policy and its reference, and a forward of each."""
    made = service(
        sdk,
        url,
        trainer_job_id="job-1",
        create_deployment=False,
        training_shape_id=LORA_SHAPE if lora_rank else SHAPE,
        lora_rank=lora_rank,
        **options,
    )
    client = run("client", lambda: made.create_training_client(MODEL, lora_rank=lora_rank))
    base = run("reference", lambda: made.create_reference_client(MODEL))
    run("forward of the reference", lambda: _forward(sdk, base))
    run("alive", lambda: _forward(sdk, client))
    run("close", made.close)


def promote(run: Run, sdk: Any, url: str) -> None:
    """Save a state and make a model of it."""
    made = service(sdk, url, trainer_job_id="job-1", create_deployment=False)
    client = run("client", lambda: made.create_training_client(MODEL, lora_rank=0))
    run("save_state", lambda: needed(client).save_state("state-1").result(RESULT_S))

    def to_model() -> Any:
        rows = made.list_checkpoints("job-1")
        name = rows[-1]["name"] if isinstance(rows[-1], dict) else rows[-1].name
        return made.promote_checkpoint(name=name, output_model_id="promoted", base_model=MODEL)

    run("promote", to_model)
    run("alive", lambda: _forward(sdk, client))
    run("close", made.close)


PROGRAMS: dict[str, Callable[..., None]] = {
    program.__name__: program
    for program in (sample, train, state, hot_load, managed, reference, promote)
}
