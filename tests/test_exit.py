"""How a program ends: without close(), by Ctrl-C, by kill -9. Nothing hangs, nothing is left."""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import textwrap
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from fireworks_training import FiretitanServiceClient, _portal
from tests.conftest import RunningPlatform
from tests.end_to_end.support import service_on

ROOT = Path(__file__).parent.parent

# Two seconds are the promise; the rest is for a machine that does two other things meanwhile.
SOON = 6.0

SERVICE = """
    import os, sys, asyncio
    from fireworks_training import AsyncFiretitanServiceClient, FiretitanServiceClient
    OPTIONS = dict(
        base_model="accounts/local/models/tiny-qwen3",
        training_shape_id="accounts/local/trainingShapes/cpu",
        cleanup_trainer_on_close=True,
        cleanup_deployment_on_close="delete",
    )
    HELLO = [{"role": "user", "content": "hello"}]
"""


@contextmanager
def script(
    body: str, platform: RunningPlatform | None, temporary: str | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A script in a process of its own, on `platform` or on one that it embeds.

    `temporary` is the folder it takes for the system's temporary one.
    """
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "FIREWORKS_BASE_URL": "local"}
    environment.pop("FIREWORKS_API_KEY", None)
    if temporary is not None:
        environment["TMPDIR"] = temporary
    if platform is not None:
        environment["FIREWORKS_BASE_URL"] = platform.base_url
        environment["FIREWORKS_API_KEY"] = platform.api_key
    process = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(SERVICE) + textwrap.dedent(body)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # In the background of a shell Ctrl-C is ignored, and that would be inherited.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    """The next line that the script prints."""
    assert process.stdout is not None
    line = process.stdout.readline().strip()
    if not line:
        assert process.stderr is not None
        raise AssertionError(process.stderr.read())
    return line


SYNC = """
    service = FiretitanServiceClient.from_firetitan_config(**OPTIONS)
    client = service.create_training_client()
    sampler = service.create_deployment_sampler()
    asyncio.run(sampler.sample_with_tokens(HELLO, max_tokens=2))
    print(service.trainer_job_id, flush=True)
"""

ASYNC = """
    async def main():
        service = AsyncFiretitanServiceClient.from_firetitan_config(**OPTIONS)
        client = await service.create_training_client()
        print(service.trainer_job_id, flush=True)
    asyncio.run(main())
"""


@pytest.mark.parametrize("body", [SYNC, ASYNC], ids=["blocking", "async"])
async def test_a_script_that_never_closes_ends_and_its_trainer_with_it(
    platform: RunningPlatform, body: str
) -> None:
    with script(body, platform) as process:
        job = said(process)
        assert process.wait(SOON) == 0
    async with service_on(platform) as service:
        plane = await service._on_owner(service._platform.open, "test")
        assert await plane.get_job(job) is None or (await plane.get_job(job)).state in (
            "JOB_STATE_DELETED",
            "JOB_STATE_DELETING",
        )


def test_an_embedded_platform_ends_with_a_script_that_never_closes() -> None:
    with (
        tempfile.TemporaryDirectory() as temporary,
        script(
            SYNC + "    print('ready', flush=True)\n    sys.stdin.readline()\n", None, temporary
        ) as process,
    ):
        said(process)
        assert said(process) == "ready"
        assert list(Path(temporary).glob("fwt*"))
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.send_signal(signal.SIGKILL)
        process.wait(SOON)
        _, left = psutil.wait_procs(children, timeout=20)
        assert not left
        assert not list(Path(temporary).glob("fwt*"))


def test_ctrl_c_reaches_a_blocking_wait(platform: RunningPlatform) -> None:
    body = """
        import tinker, threading
        service = FiretitanServiceClient.from_firetitan_config(**OPTIONS, create_deployment=False)
        client = service.create_training_client()
        from fireworks_training.data import supervised_datum
        entered = threading.Event()
        def slow(data, logprobs):
            print("in the loss", flush=True)
            threading.Event().wait()
        try:
            client.forward_backward_custom([supervised_datum([1, 2, 3], [1, 1, 1])], slow).result()
        except KeyboardInterrupt:
            print("interrupted", flush=True)
    """
    with script(textwrap.indent(textwrap.dedent(body), "    "), platform) as process:
        assert said(process) == "in the loss"
        process.send_signal(signal.SIGINT)
        assert said(process) == "interrupted"
        assert process.wait(SOON) == 0


def test_a_forked_child_is_told_to_make_its_own(platform: RunningPlatform) -> None:
    body = """
        import warnings
        warnings.simplefilter("ignore", DeprecationWarning)
        service = FiretitanServiceClient.from_firetitan_config(**OPTIONS, create_deployment=False)
        service.create_training_client()
        child = os.fork()
        if child == 0:
            try:
                service.get_tokenizer()
            except Exception as error:
                os.write(1, f"{type(error).__name__}\\n".encode())
            os._exit(0)
        os.waitpid(child, 0)
        service.close()
        print("parent closed", flush=True)
    """
    with script(textwrap.indent(textwrap.dedent(body), "    "), platform) as process:
        assert said(process) == "OwnerLoopGone"
        assert said(process) == "parent closed"
        assert process.wait(SOON) == 0


def test_two_closes_are_one(platform: RunningPlatform) -> None:
    service = FiretitanServiceClient.from_firetitan_config(
        base_url=platform.base_url,
        api_key=platform.api_key,
        base_model=platform.model,
        create_deployment=False,
        cleanup_trainer_on_close=True,
    )
    service.create_training_client()
    service.close()
    service.close()


def test_the_thread_keeps_what_would_wait_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Collected with the interpreter, the provider would wait for a thread that is frozen then."""
    with monkeypatch.context() as patched:
        patched.setattr(_portal, "_state", _portal._State())
        lease = _portal.Lease()
        provider = weakref.ref(lease._provider)
    del lease
    gc.collect()
    kept = provider()
    assert kept is not None
    kept.__exit__(None, None, None)
    del kept
    gc.collect()
    assert provider() is None  # the end of the thread lets it go
