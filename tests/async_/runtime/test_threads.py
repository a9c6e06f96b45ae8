"""Work of the SDK's own threads: it never waits for the caller's executor, nor one for another."""

from __future__ import annotations

import ast
import asyncio
import contextvars
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

import fireworks_training
from fireworks_training._async.http.transport import Transport
from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._async.runtime.threads import Threads, in_thread
from fireworks_training._async.runtime.worker import in_worker

PACKAGE = Path(fireworks_training.__file__).parent
OWN_PROCESSES = ("local", "testing")
"""Rooms whose loops are no user's: the platform's processes, and scripted servers."""


def borrowed(source: str) -> Iterator[int]:
    """Lines that use the default executor of a loop."""
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Attribute(attr="to_thread" | "getaddrinfo" | "getnameinfo" as name):
                if name == "to_thread" or not (
                    isinstance(node.value, ast.Name) and node.value.id == "socket"
                ):
                    yield node.lineno
            case ast.Call(
                func=ast.Attribute(attr="run_in_executor"), args=[ast.Constant(value=None), *_]
            ):
                yield node.lineno
            case ast.Attribute(attr="ThreadedResolver" | "DefaultResolver"):
                yield node.lineno
            case _:
                pass


def test_no_module_uses_the_default_executor_of_its_users_loop() -> None:
    places = [
        f"{path.relative_to(PACKAGE)}:{line}"
        for path in sorted(PACKAGE.rglob("*.py"))
        if path.relative_to(PACKAGE).parts[0] not in OWN_PROCESSES
        for line in borrowed(path.read_text())
    ]
    assert not places


@pytest.mark.parametrize(
    "source",
    [
        "await asyncio.to_thread(f)",
        "loop.run_in_executor(None, f)",
        "loop.getaddrinfo('x', 1)",
        "aiohttp.ThreadedResolver()",
    ],
)
def test_the_guard_finds_each_way(source: str) -> None:
    assert list(borrowed(source)) == [1]
    assert not list(borrowed("loop.run_in_executor(pool, f)\nsocket.getaddrinfo('x', 1)"))


@asynccontextmanager
async def full_executor() -> AsyncIterator[None]:
    """Fill the running loop's default executor with calls that block."""
    release = threading.Event()
    blocked = [asyncio.create_task(asyncio.to_thread(release.wait, 60)) for _ in range(40)]
    try:
        yield
    finally:
        release.set()
        await asyncio.gather(*blocked)


async def test_work_begins_though_the_callers_executor_is_full() -> None:
    async with full_executor():
        stuck = asyncio.create_task(asyncio.to_thread(threading.get_ident))
        assert await asyncio.wait_for(in_thread(divmod, 7, 2), 10) == (3, 1)
        assert await asyncio.wait_for(in_worker(lambda: "encoded"), 10) == "encoded"
        assert not stuck.done()  # the executor is full indeed
    await stuck


async def test_a_request_to_a_host_name_is_made_though_the_callers_executor_is_full() -> None:
    async def handle(_: web.Request) -> web.Response:
        return web.json_response({"ok": 1})

    app = web.Application()
    app.router.add_get("/x", handle)
    server = TestServer(app)
    await server.start_server()
    owner = OwnerLoop()
    owner.get()
    url = f"http://localhost:{server.port}"
    async with Transport(owner=owner, base_url=url, api_key="k") as transport, full_executor():
        assert await transport.call("GET", "/x", what="look", timeout=10) == {"ok": 1}
    await server.close()


async def test_results_errors_and_context_come_through() -> None:
    mark = contextvars.ContextVar("mark", default="")
    mark.set("here")
    assert await in_thread(mark.get) == "here"
    with pytest.raises(ZeroDivisionError):
        await in_thread(divmod, 1, 0)
    with pytest.raises(RuntimeError, match="StopIteration"):
        await in_thread(next, iter(()))


async def test_work_waits_for_no_other_work() -> None:
    meet = threading.Barrier(50)
    await asyncio.wait_for(asyncio.gather(*(in_thread(meet.wait, 10) for _ in range(50))), 20)


async def test_cancelled_work_ends_by_itself_and_its_loop_may_be_gone() -> None:
    release, ended = threading.Event(), threading.Event()

    def work() -> None:
        release.wait(10)
        ended.set()

    def on_a_loop() -> None:
        async def leave() -> None:
            task = asyncio.create_task(in_thread(work))
            await asyncio.sleep(0)
            task.cancel()

        asyncio.run(leave())

    await in_thread(on_a_loop)
    release.set()
    assert await in_thread(ended.wait, 10)


def test_a_thread_is_used_again_and_ends_when_it_is_idle() -> None:
    threads = Threads(idle=0.001)
    seen: list[threading.Thread] = []
    done = threading.Event()

    def work() -> None:
        seen.append(threading.current_thread())
        done.set()

    for _ in range(3):
        done.clear()
        threads.start(work)
        assert done.wait(10)
    for thread in seen:
        assert thread.daemon
        thread.join(10)
        assert not thread.is_alive()
