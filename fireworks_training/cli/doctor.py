"""`fireworks-training doctor`: checks versions, key, platform, and a whole training loop.

Each check is a row: its subject, whether it is right, the finding, its time. The checks go on after
a failure where they can, so that one run reports everything. Knows the public SDK. Does not know
its inside, nor how rows are printed.
"""

from __future__ import annotations

import importlib.metadata
import platform
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, TypeVar

import click

from fireworks_training.cli.output import base_url_option, json_option, show

if TYPE_CHECKING:
    from fireworks_training.config import Endpoint

T = TypeVar("T")

PINGS = 5
CLOCK_TOLERANCE_S = 30.0
TIMEOUT_S = 10.0
LOCAL_MODEL = "accounts/local/models/tiny-qwen3"


@dataclass(slots=True)
class Check:
    """Holds the result of one check.

    Attributes:
        check: its subject.
        ok: whether it is as it should be.
        detail: the finding, and what to do if it is not right.
        ms: milliseconds that it took; None where that means nothing.
    """

    check: str
    ok: bool
    detail: str
    ms: float | None = None


@click.command()
@click.option(
    "--end-to-end",
    is_flag=True,
    help="Also train a step, load a snapshot and sample from it. Makes a trainer and a deployment,"
    " and deletes both: a cloud charges for that.",
)
@click.option("--base-model", help="The model for --end-to-end.  [default: the local platform's]")
@click.option("--training-shape", help="Its training shape, if the platform is to use one.")
@base_url_option
@json_option
def doctor(
    end_to_end: bool,
    base_model: str | None,
    training_shape: str | None,
    base_url: str | None,
    as_json: bool,
) -> None:
    """Check the key, the way to the platform, the clock, the versions, and the whole loop.

    Exit status 1 if something is wrong.
    """
    checks = [*_versions(), *_platform(base_url)]
    if end_to_end and all(check.ok for check in checks):
        checks += _loop(base_url, base_model or LOCAL_MODEL, training_shape)
    columns = {"CHECK": "check", "OK": "ok", "MS": "ms", "DETAIL": "detail"}
    show([asdict(check) for check in checks], columns, as_json=as_json)
    if not all(check.ok for check in checks):
        sys.exit(1)


# -- versions ------------------------------------------------------------------------------------


def _versions() -> Iterator[Check]:
    from fireworks_training.compat import CONTRACTS
    from fireworks_training.models import __version__

    yield Check("python", sys.version_info >= (3, 11), platform.python_version())
    yield Check("fireworks_training", True, __version__)
    tested = CONTRACTS["tinker"]
    found = _installed("tinker")
    same = found is not None and found.split(".")[:2] == tested.split(".")[:2]
    advice = "" if same else f"; tested with {tested}: pip install 'tinker=={tested}'"
    yield Check("tinker", same, f"{found or 'not installed'}{advice}")
    for name in ("aiohttp", "torch"):
        found = _installed(name)
        missing = "not installed; custom losses and the local platform need it"
        yield Check(name, found is not None or name == "torch", found or missing)


def _installed(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# -- the platform --------------------------------------------------------------------------------


def _platform(base_url: str | None) -> Iterator[Check]:
    from fireworks_training.config import resolve_endpoint
    from fireworks_training.errors import FireworksTrainingError

    try:
        endpoint = resolve_endpoint(base_url=base_url, api_key=None)
    except FireworksTrainingError as error:
        yield Check("key", False, error.message)
        return
    if endpoint.embedded:
        yield Check("platform", True, "embedded: it starts with its service; see --end-to-end")
        return
    yield Check("key", True, "given")
    checks = _probe(endpoint)
    yield from checks
    if all(check.ok for check in checks):
        yield from _account(endpoint)


def _probe(endpoint: Endpoint) -> list[Check]:
    """Check reachability, the key and the server's clock, with one request."""
    request = urllib.request.Request(  # noqa: S310 - an http(s) URL, checked by resolve_endpoint
        f"{endpoint.base_url}/v1/accounts?pageSize=2",
        headers={"X-API-Key": endpoint.api_key or ""},
    )
    before = time.time()
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT_S) as answer:  # noqa: S310
            status, date = answer.status, answer.headers.get("Date")
    except urllib.error.HTTPError as error:
        status, date = error.code, error.headers.get("Date")
    except OSError as error:
        return [Check("reachable", False, f"{endpoint.base_url}: {error}; is the URL right?")]
    after = time.time()
    checks = [Check("reachable", True, endpoint.base_url, 1000 * (after - before))]
    if status in (401, 403):
        checks.append(Check("key taken", False, f"HTTP {status}: give a key for training"))
    else:
        checks.append(Check("key taken", status < 500, f"HTTP {status}"))
    if date:
        # The header has whole seconds.
        offset = parsedate_to_datetime(date).timestamp() + 0.5 - (before + after) / 2
        right = abs(offset) < CLOCK_TOLERANCE_S
        advice = "" if right else ": set the clock, or certificates and ages will be wrong"
        checks.append(Check("clock", right, f"{offset:+.1f} s from the server's{advice}"))
    return checks


def _account(endpoint: Endpoint) -> Iterator[Check]:
    from fireworks_training import ControlPlane, FireworksTrainingError

    try:
        connected = ControlPlane.connect(base_url=endpoint.base_url, api_key=endpoint.api_key)
        with connected as plane:
            account = plane.account()
            times = sorted(_timed(plane.list_jobs)[1] for _ in range(PINGS))
            shapes = len(plane.list_training_shapes())
    except FireworksTrainingError as error:
        yield Check("account", False, error.message)
        return
    yield Check("account", True, f"{account}, {shapes} training shapes of its own")
    spread = f"median of {PINGS}, {times[0]:.1f} to {times[-1]:.1f}"
    yield Check("control plane", True, spread, times[PINGS // 2])


def _timed(work: Callable[[], T]) -> tuple[T, float]:
    started = time.perf_counter()
    return work(), 1000 * (time.perf_counter() - started)


# -- the whole loop ------------------------------------------------------------------------------


def _loop(base_url: str | None, base_model: str, shape: str | None) -> list[Check]:
    """Run one step of training, from provisioning to a sampled token, and time each part."""
    from fireworks_training import FireworksTrainingError

    checks: list[Check] = []

    @contextmanager
    def part(name: str) -> Generator[None]:
        started = time.perf_counter()
        yield
        checks.append(Check(name, True, "done", 1000 * (time.perf_counter() - started)))

    try:
        _train_one_step(base_url, base_model, shape, part)
    except FireworksTrainingError as error:
        checks.append(Check("end to end", False, error.message))
    return checks


def _train_one_step(
    base_url: str | None,
    base_model: str,
    shape: str | None,
    part: Callable[[str], AbstractContextManager[None]],
) -> None:
    from fireworks_training import FiretitanServiceClient, supervised_datum
    from fireworks_training.compat import AdamParams

    with part("clean-up and all before"):
        service = FiretitanServiceClient.from_firetitan_config(
            base_url=base_url,
            base_model=base_model,
            training_shape_id=shape,
            cleanup_deployment_on_close="delete",
            cleanup_trainer_on_close=True,
        )
        with service:
            with part("provision"):
                client = service.create_training_client()
            datum = supervised_datum([1, 2, 3, 4], [1.0] * 4)
            with part("forward_backward"):
                client.forward_backward([datum], "cross_entropy").result()
            with part("optim_step"):
                client.optim_step(AdamParams(learning_rate=0.0)).result()
            with part("save snapshot"):
                saved = client.save_weights_for_sampler("doctor").result()
            with part("hot load"):
                sampler = service.create_deployment_sampler(model_path=saved.path)
            with part("sample a token"):
                sampler.sample_with_prompt_tokens([1, 2, 3], n=1, max_tokens=1).result()
