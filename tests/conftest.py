"""One platform for each worker's session, and platforms of their own for tests that break them.

Starting one costs seconds of imports, so tests share `platform`: on it a test may do what it likes
with jobs and deployments that it made. What concerns the platform's own processes starts its own.
"""

from __future__ import annotations

import atexit
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

# Before anything imports torch: two workers and the tests share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests write into a ledger of their own, never into the user's; so do the processes they start.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="fireworks-training-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_STATE_HOME"], ignore_errors=True)

READY_WITHIN = 120.0

AS_CLOUD = ("--as-cloud", "--cloud-pace", "0.1")
"""Options of a platform that stands in for a cloud, ten times as fast as one."""


@dataclass(frozen=True)
class RunningPlatform:
    """A platform that serves: the fields of its ready line, its state folder and its process."""

    base_url: str
    api_key: str
    account: str
    model: str
    training_shape: str
    tokenizer: str
    state_dir: Path
    process: subprocess.Popen[bytes]
    as_cloud: bool = False


@contextmanager
def running_platform(state_dir: Path, *options: str) -> Iterator[RunningPlatform]:
    """`fireworks-training serve --json`, ended by SIGTERM, or with this process."""
    command = [sys.executable, "-m", "fireworks_training.cli", "serve", "--json", "--until-eof"]
    environment = {k: v for k, v in os.environ.items() if not k.startswith("FIREWORKS_")}
    process = subprocess.Popen(
        [*command, "--state-dir", str(state_dir), *options],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        start_new_session=True,
        env=environment,
    )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, f"the platform ended with {process.wait(5)}"
        ready = json.loads(line)
        as_cloud = AS_CLOUD[0] in options
        yield RunningPlatform(**ready, state_dir=state_dir, process=process, as_cloud=as_cloud)
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(20)
        finally:
            process.kill()
            process.wait()
        assert process.stdin is not None
        process.stdin.close()
        assert process.stdout is not None
        process.stdout.close()


@pytest.fixture(scope="session")
def platforms(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Callable[[str], RunningPlatform]]:
    """The platforms that the session's tests share, by mode; each starts when it is asked for."""
    started: dict[str, RunningPlatform] = {}
    with ExitStack() as stack:

        def of(mode: str) -> RunningPlatform:
            if mode not in started:
                options = AS_CLOUD if mode == "as-cloud" else ()
                folder = tmp_path_factory.mktemp("platform")
                started[mode] = stack.enter_context(running_platform(folder, *options))
            return started[mode]

        yield of


@pytest.fixture(scope="session")
def platform(
    request: pytest.FixtureRequest, platforms: Callable[[str], RunningPlatform]
) -> RunningPlatform:
    """The shared platform; that of a cloud's ways where the test is run "as-cloud"."""
    return platforms(getattr(request, "param", "local"))


@pytest.fixture
def own_platform(tmp_path: Path) -> Callable[..., object]:
    """Starts a platform for one test alone: `with own_platform() as platform:`."""
    return lambda *options: running_platform(tmp_path / "state", *options)
