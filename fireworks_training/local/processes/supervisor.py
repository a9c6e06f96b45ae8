"""The supervisor: owns the listening socket and the folders, keeps gateway and template running.

Knows processes, signals and folders. Does not know their work: it imports neither torch nor
aiohttp, so that it starts at once and little can fail in it. Everything ends with it: it alone
holds the write end of the lifetime pipe.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from fireworks_training.errors import LocalPlatformError
from fireworks_training.local.processes import lifetime
from fireworks_training.local.processes.descriptors import raise_descriptor_limit
from fireworks_training.local.processes.report import last_lines, ready_text
from fireworks_training.local.processes.restarts import RestartPolicy
from fireworks_training.local.processes.state_folder import open_state_folder
from fireworks_training.local.processes.worker_entry import failure_reason
from fireworks_training.local.settings import (
    ACCOUNT,
    MODEL_PREFIX,
    SHIPPED_MODEL,
    SHIPPED_MODEL_PATH,
    TRAINING_SHAPE,
    WORKER_ENVIRONMENT,
    GatewaySettings,
    PlatformSettings,
    TemplateSettings,
    dump,
)

LOG_FILE = "platform.log"
STOP_GRACE_S = 4.0
START_BUDGET_S = 180.0


@dataclass(slots=True)
class Child:
    """Runs one process of the supervisor: the gateway or the template.

    Attributes:
        name: "gateway" or "template", for messages.
        module: run as `python -m`.
        settings: gives the settings line that is written to its standard input.
        fds: descriptors that it inherits.
        policy: decides about restarts.
        process: None before the first start.
        started: seconds of the monotonic clock.
    """

    name: str
    module: str
    settings: Callable[[], bytes]
    fds: tuple[int, ...]
    policy: RestartPolicy = field(default_factory=RestartPolicy)
    process: asyncio.subprocess.Process | None = None
    started: float = 0.0

    async def start(self) -> None:
        """Start the process in a session of its own and hand it its settings."""
        self.process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            self.module,
            stdin=asyncio.subprocess.PIPE,
            # Standard output belongs to the ready line.
            stdout=sys.stderr.fileno(),
            pass_fds=self.fds,
            start_new_session=True,
        )
        self.started = time.monotonic()
        assert self.process.stdin is not None
        # A process that died at once is noticed by `wait`, not here.
        with contextlib.suppress(ConnectionError):
            self.process.stdin.write(self.settings())
            await self.process.stdin.drain()
        self.process.stdin.close()

    async def wait(self) -> int:
        """Wait for the process to end; return its exit code."""
        assert self.process is not None
        return await self.process.wait()

    def terminate(self) -> None:
        """Send SIGTERM: it ends a process that still starts, and does not watch the pipe yet."""
        if self.process is not None and self.process.returncode is None:
            self.process.terminate()

    def kill_group(self) -> None:
        """Send SIGKILL to the process and its forks, while its number is certainly its own."""
        if self.process is not None and self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)


class Supervisor:
    """Makes a platform's folders, sockets and processes, keeps them running, and ends them."""

    def __init__(self, settings: PlatformSettings, stop: asyncio.Event) -> None:
        self._settings = settings
        self._stop = stop
        self.models = _model_paths(settings)
        self.default_model = next(iter(settings.models), SHIPPED_MODEL)
        lifetime.remove_stale_runtime_dirs()
        self.runtime_dir = lifetime.make_runtime_dir()
        self._alive_fd = lifetime.hold_alive(self.runtime_dir)
        try:
            self.state_dir = self._open_state_dir()
            self._listener = _listen(settings.host, settings.port)
            self.port: int = self._listener.getsockname()[1]
            self._template_listener = _listen_unix(self.runtime_dir / "template.sock")
        except BaseException:
            lifetime.remove_when_last(self.runtime_dir, self._alive_fd, 0.0)
            raise
        for name, value in WORKER_ENVIRONMENT.items():
            os.putenv(name, value)
        # torch makes this folder when it is imported; it goes with everything else.
        os.putenv("TORCHINDUCTOR_CACHE_DIR", str(self.runtime_dir / "torch"))
        self._lifetime_read, self._lifetime_write = os.pipe()
        self._gateway = Child(
            "gateway",
            "fireworks_training.local.gateway",
            self._gateway_settings,
            (self._listener.fileno(), self._lifetime_read),
        )
        self._template = Child(
            "template",
            "fireworks_training.local.processes.template",
            self._template_settings,
            (self._template_listener.fileno(), self._lifetime_read),
        )

    @property
    def log_file(self) -> Path:
        """Path of the log file of an embedded platform."""
        return self.state_dir / LOG_FILE

    @property
    def base_url(self) -> str:
        """The URL that clients connect to."""
        host = self._settings.host
        shown = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)  # noqa: S104
        shown = f"[{shown}]" if ":" in shown and not shown.startswith("[") else shown
        return f"http://{shown}:{self.port}"

    def ready_facts(self) -> dict[str, str]:
        """Return the fields of the ready line."""
        return {
            "base_url": self.base_url,
            "api_key": self._settings.api_key,
            "account": ACCOUNT,
            "model": f"{MODEL_PREFIX}{self.default_model}",
            "training_shape": TRAINING_SHAPE,
            "tokenizer": self.models[self.default_model],
        }

    async def run(self, on_ready: Callable[[], None]) -> None:
        """Start everything, call `on_ready`, keep it running, and end it once `stop` is set.

        Raises:
            LocalPlatformError: it did not start, or a process died again and again.
        """
        stopped = asyncio.create_task(self._stop.wait())
        work = asyncio.create_task(self._start_and_keep(on_ready))
        try:
            await asyncio.wait({stopped, work}, return_when=asyncio.FIRST_COMPLETED)
            if work.done():
                work.result()
        except LocalPlatformError as error:
            # Read now: the log of a temporary state goes with it.
            raise LocalPlatformError(f"{error.message}{self._end_of_log()}") from error
        finally:
            for task in (stopped, work):
                task.cancel()
            await asyncio.gather(stopped, work, return_exceptions=True)
            await self._end()

    async def _start_and_keep(self, on_ready: Callable[[], None]) -> None:
        try:
            async with asyncio.timeout(START_BUDGET_S):
                await self._start()
        except TimeoutError:
            raise LocalPlatformError(
                f"the platform was not ready within {START_BUDGET_S:.0f} s"
            ) from None
        on_ready()
        keeping = [asyncio.create_task(self._keep(c)) for c in (self._gateway, self._template)]
        try:
            await asyncio.wait(keeping, return_when=asyncio.FIRST_EXCEPTION)
        finally:
            # The platform ends: the other process must not be started into folders that go.
            for task in keeping:
                task.cancel()
            ends = await asyncio.gather(*keeping, return_exceptions=True)
        for end in ends:
            if isinstance(end, Exception):
                raise end

    async def _start(self) -> None:
        """Start gateway and template, and return when both answer."""
        children = (self._gateway, self._template)
        await asyncio.gather(*(child.start() for child in children))
        ready = asyncio.create_task(self._answers())
        deaths = [asyncio.create_task(child.wait()) for child in children]
        try:
            await asyncio.wait({ready, *deaths}, return_when=asyncio.FIRST_COMPLETED)
            for child, death in zip(children, deaths, strict=True):
                if death.done():
                    reason = failure_reason(self.runtime_dir / child.name)
                    raise LocalPlatformError(
                        f"the platform's {child.name} process ended with code"
                        f" {death.result()} before it was ready{f': {reason}' if reason else ''}"
                    )
            ready.result()
        finally:
            for task in (ready, *deaths):
                task.cancel()
            await asyncio.gather(ready, *deaths, return_exceptions=True)

    async def _keep(self, child: Child) -> None:
        while True:
            code = await child.wait()
            lived = time.monotonic() - child.started
            delay = child.policy.died(lived)
            if delay is None:
                reason = failure_reason(self.runtime_dir / child.name)
                raise LocalPlatformError(
                    f"the platform's {child.name} process died again and again; last code {code}"
                    f"{f': {reason}' if reason else ''}"
                )
            log(f"the {child.name} ended with code {code} after {lived:.1f} s; starting it again")
            await asyncio.sleep(delay)
            await child.start()

    # -- readiness -------------------------------------------------------------------------------

    async def _answers(self) -> int:
        await asyncio.gather(self._gateway_answers(), self._template_answers())
        return 0

    async def _gateway_answers(self) -> None:
        """Send one request: the socket listens from the start, so it waits for the gateway."""
        host, port = self._listener.getsockname()[:2]
        loopback = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104 - what to connect to instead
        reader, writer = await asyncio.open_connection(loopback.get(host, host), port)
        try:
            request = (
                f"GET /healthz HTTP/1.1\r\nHost: localhost:{port}\r\n"
                f"X-API-Key: {self._settings.api_key}\r\nConnection: close\r\n\r\n"
            )
            writer.write(request.encode())
            status = await reader.readline()
        except ConnectionError:
            status = b""
        finally:
            writer.close()
        if b" 200 " not in status:
            raise LocalPlatformError(f"the gateway answered {status.decode().strip()!r}")

    async def _template_answers(self) -> None:
        path = str(self.runtime_dir / "template.sock")
        reader, writer = await asyncio.open_unix_connection(path)
        try:
            writer.write(b'{"op": "ping"}\n')
            if json.loads(await reader.readline() or b"{}") != {"ok": True}:
                raise LocalPlatformError("the template did not answer")
        finally:
            writer.close()

    # -- the end ---------------------------------------------------------------------------------

    async def _end(self) -> None:
        """End all processes by closing the lifetime pipe; kill those that take too long."""
        # Gateway and template wait for the lock to be free, as they do when this process is killed.
        os.close(self._alive_fd)
        os.close(self._lifetime_write)
        children = [c for c in (self._gateway, self._template) if c.process is not None]
        for child in children:
            child.terminate()
        waits = [asyncio.create_task(child.wait()) for child in children]
        if waits:
            await asyncio.wait(waits, timeout=STOP_GRACE_S)
        for child in children:
            child.kill_group()
        await asyncio.gather(*waits)
        self._listener.close()
        self._template_listener.close()
        os.close(self._lifetime_read)
        gone = await asyncio.to_thread(
            lifetime.remove_when_last, self.runtime_dir, None, STOP_GRACE_S
        )
        if not gone:
            log(f"a worker did not end; {self.runtime_dir} is left behind")

    # -- parts -----------------------------------------------------------------------------------

    def _open_state_dir(self) -> Path:
        """Make or take up the state folder, and lock it for this platform alone."""
        given = self._settings.state_dir
        folder = self.runtime_dir / "state" if given is None else Path(given).expanduser().resolve()
        if folder.is_dir() and folder.stat().st_mode & 0o077:
            # A folder of the user's own keeps the mode that they gave it.
            log(f"others may look into {folder}, where the platform keeps its state")
        self._state_lock = open_state_folder(folder)
        return folder

    def _end_of_log(self) -> str:
        if not self._settings.embedded or not (lines := last_lines(self.log_file)):
            return ""
        where = f" ({self.log_file})" if self._settings.state_dir is not None else ""
        return f"\nThe end of its log{where}:\n{lines}"

    def _gateway_settings(self) -> bytes:
        return dump(
            GatewaySettings(
                socket_fd=self._listener.fileno(),
                lifetime_fd=self._lifetime_read,
                host=self._settings.host,
                port=self.port,
                api_key=self._settings.api_key,
                runtime_dir=str(self.runtime_dir),
                state_dir=str(self.state_dir),
                models=self.models,
                default_model=self.default_model,
                limits=self._settings.limits,
                offers=self._settings.offers,
                as_cloud=self._settings.as_cloud,
                cloud_pace=self._settings.cloud_pace,
                trouble=self._settings.trouble,
            )
        )

    def _template_settings(self) -> bytes:
        return dump(
            TemplateSettings(
                socket_fd=self._template_listener.fileno(),
                lifetime_fd=self._lifetime_read,
                runtime_dir=str(self.runtime_dir),
                worker_start=self._settings.worker_start,
                entry_points=self._settings.entry_points,
                preload=self._settings.preload,
            )
        )


def _model_paths(settings: PlatformSettings) -> dict[str, str]:
    """Return each model's directory: the caller's, and the shipped one if its name is free."""
    paths = {name: Path(path).expanduser().resolve() for name, path in settings.models.items()}
    if SHIPPED_MODEL_PATH.is_dir():
        paths.setdefault(SHIPPED_MODEL, SHIPPED_MODEL_PATH)
    if not paths:
        raise LocalPlatformError(
            f"no model: the shipped one is missing from {SHIPPED_MODEL_PATH}, and none was given"
            " (--model NAME=PATH)"
        )
    for name, path in paths.items():
        for file in ("config.json", "tokenizer.json"):
            if not (path / file).is_file():
                raise LocalPlatformError(
                    f"model {name!r}: {path} holds no {file}; a directory in the Hugging Face"
                    " layout is expected"
                )
    return {name: str(path) for name, path in paths.items()}


def _listen(host: str, port: int) -> socket.socket:
    try:
        infos = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = infos[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
            listener.listen(1024)
        except BaseException:
            listener.close()
            raise
    except OSError as error:
        raise LocalPlatformError(f"can't listen on {host}:{port}: {error}") from error
    return listener


def _listen_unix(path: Path) -> socket.socket:
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    listener.bind(str(path))
    listener.listen(64)
    return listener


def log(text: str) -> None:
    """Log one line to standard error, which an embedded platform redirects to its log file."""
    print(f"supervisor: {text}", file=sys.stderr, flush=True)


async def supervise(settings: PlatformSettings, settings_fd: int) -> None:
    """Run a platform until a signal, or until EOF of the settings pipe when it is embedded, or of
    standard input where the settings say so.

    Raises:
        LocalPlatformError: it did not start or could not be kept running; the message of an
            embedded one ends with the last lines of its log.
    """
    # A state folder that others may enter stays so; what the platform puts there is this user's.
    os.umask(0o077)
    raise_descriptor_limit()
    # Before the first folder is made, so that no signal leaves one behind.
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if signal.getsignal(signum) is not signal.SIG_IGN:  # nohup
            loop.add_signal_handler(signum, stop.set)
    supervisor = Supervisor(settings, stop)
    if settings.embedded:
        # The user's terminal stays clean, also from what workers and libraries print.
        fd = os.open(supervisor.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(fd, sys.stderr.fileno())
        os.close(fd)
        _stop_on_eof(loop, settings_fd, stop.set)
    if settings.until_eof:
        _stop_on_eof(loop, 0, stop.set)

    def ready() -> None:
        facts = supervisor.ready_facts()
        state = settings.state_dir and str(supervisor.state_dir)
        text = json.dumps(facts) if settings.output == "json" else ready_text(facts, state)
        print(text, flush=True)

    await supervisor.run(ready)


def _stop_on_eof(loop: asyncio.AbstractEventLoop, fd: int, stop: Callable[[], None]) -> None:
    def readable() -> None:
        if not os.read(fd, 4096):
            loop.remove_reader(fd)
            stop()

    loop.add_reader(fd, readable)
