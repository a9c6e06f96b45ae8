"""A completions server for `sampler.py`, in a process of its own: fast, paced, crowded or faulty.

    python benchmarks/sampler_server.py [--tls]

It prints its URL and then serves until its stdin ends. What it does with a request stands in the
last segment of the model string, as `name-value` pairs joined by `_`:

    tokens, chunks   size of a completion, and how many events it comes in
    first, seconds   when the first event comes, and how long the whole stream takes; 0: at once
    faults           1: of 100 new requests 5 are cut short, 5 get 503 and 2 are reset
    slots, service   an engine of so many slots, each busy for `service` seconds a request; others
                     queue, and the queue time is reported
    stage            `slots` may be a list; so many seconds each of them holds
    jitter           service times are uniform within this share of `service`, both ways; without
                     it an engine that starts all slots at once serves in waves for ever

`GET /stats` tells what it counted since the last one. It is a bare `asyncio.Protocol` that sends
prepared bytes, so that the client is what is measured.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import random
import ssl
import subprocess
import sys
import tempfile
from collections import deque
from pathlib import Path
from typing import Any

import orjson

HEAD = (
    b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n"
    b"X-Request-Id: bench\r\n\r\n"
)
BUSY = b"HTTP/1.1 503 Busy\r\nContent-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"


def framed(payload: bytes) -> bytes:
    """An event as one HTTP chunk."""
    data = b"data: " + payload + b"\n\n"
    return b"%x\r\n%b\r\n" % (len(data), data)


@functools.lru_cache
def last_event(tokens: int, queued: float) -> bytes:
    choice = {
        "index": 0,
        "text": "",
        "finish_reason": "length",
        "raw_output": {"completion_token_ids": list(range(1000, 1000 + tokens))},
    }
    perf = {"prefill-queue-duration": queued, "server-time-to-first-token": queued + 0.01}
    usage = {"completion_tokens": tokens}
    event = {"id": "cmpl-bench", "choices": [choice], "usage": usage, "perf_metrics": perf}
    return framed(orjson.dumps(event)) + framed(b"[DONE]") + b"0\r\n\r\n"


@functools.lru_cache
def token_events(tokens: int, chunks: int, logprobs: bool) -> tuple[bytes, ...]:
    """The events of the tokens: text, and of each token its id and two logprobs."""
    events: list[bytes] = []
    for index in range(chunks):
        ids = range(tokens * index // chunks, tokens * (index + 1) // chunks)
        choice: dict[str, Any] = {"index": 0, "text": " word" * len(ids)}
        if logprobs:
            choice["logprobs"] = {
                "content": [
                    {
                        "token": " word",
                        "token_id": 1000 + i,
                        "logprob": -0.12345678 - i / 4096,
                        "sampling_logprob": -0.23456789 - i / 4096,
                    }
                    for i in ids
                ]
            }
        events.append(framed(orjson.dumps({"id": "cmpl-bench", "choices": [choice]})))
    return tuple(events)


@functools.lru_cache
def behaviour(model: str) -> dict[str, list[float]]:
    pairs = (part.partition("-") for part in model.rsplit("/", 1)[-1].split("_"))
    return {name: [float(part) for part in value.split(",")] for name, _, value in pairs}


class Engine:
    """Slots and a queue before them; integrates how busy they are.

    What comes after the last request that had to wait for work counts for none: at the end of a run
    there is nothing to fill the slots with.
    """

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.random = random.Random(0)
        self.queue: deque[tuple[Stream, float, float]] = deque()
        self.busy = 0
        self.reset()

    def reset(self) -> None:
        self.slots = 1
        self.busy_time = self.slot_time = 0.0
        self.told = (0.0, 0.0)
        self.begun: float | None = None
        self.since = 0.0
        self.waits: list[float] = []

    def advance(self) -> None:
        now = self.loop.time()
        self.busy_time += min(self.busy, self.slots) * (now - self.since)
        self.slot_time += self.slots * (now - self.since)
        self.since = now

    def change(self, slots: float) -> None:
        """The next stage of its plan."""
        self.advance()
        self.slots = int(slots)
        self.start()

    def ask(self, stream: Stream, plan: list[float], stage: float, service: float) -> None:
        if self.begun is None:
            self.begun = self.since = self.loop.time()
            self.slots = int(plan[0])
            for index, slots in enumerate(plan[1:], start=1):
                self.loop.call_later(stage * index, self.change, slots)
        self.advance()
        self.told = (self.busy_time, self.slot_time)
        self.queue.append((stream, service, self.loop.time()))
        self.start()

    def start(self) -> None:
        while self.queue and self.busy < self.slots:
            stream, service, asked = self.queue.popleft()
            if stream.closed:
                continue
            self.busy += 1
            wait = self.loop.time() - asked
            self.waits.append(wait)
            self.loop.call_later(service, self.finish, stream, wait)

    def finish(self, stream: Stream, wait: float) -> None:
        self.advance()
        self.busy -= 1
        if not stream.closed:
            stream.finish(wait)
        self.start()

    def report(self) -> dict[str, float]:
        waits = sorted(self.waits[len(self.waits) // 4 :]) or [0.0]
        busy, offered = self.told
        figures = {
            "busy": busy / offered if offered else 0.0,
            "p95_wait": waits[len(waits) * 95 // 100],
        }
        self.reset()
        return figures


class Counts:
    """What the server has seen since it was asked last."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.requests = self.connections = self.completed = self.cancelled = 0
        self.truncated = self.refused = self.aborted = 0
        self.peak = self.live

    live = 0


class Stream(asyncio.Protocol):
    """One connection."""

    def __init__(self, counts: Counts, engine: Engine) -> None:
        self.counts = counts
        self.engine = engine
        self.loop = asyncio.get_running_loop()
        self.received = b""
        self.closed = False
        self.answering = False
        self.timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        transport.set_write_buffer_limits(high=2**24)
        self.counts.connections += 1

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        self.closed = True
        if self.timer is not None:
            self.timer.cancel()
        if self.answering:
            self.counts.live -= 1
            self.counts.cancelled += 1

    def data_received(self, data: bytes) -> None:
        self.received += data
        head, found, body = self.received.partition(b"\r\n\r\n")
        if not found:
            return
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line[15:])
        if len(body) < length:
            return
        self.received = b""
        if head.startswith(b"GET"):
            self.tell()
        else:
            self.answer(orjson.loads(body))

    def tell(self) -> None:
        counts = self.counts
        figures = {k: v for k, v in vars(counts).items() if isinstance(v, int)}
        body = orjson.dumps(figures | self.engine.report())
        counts.reset()
        self.transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\n"
            b"Content-Length: %d\r\n\r\n%b" % (len(body), body)
        )
        self.counts.connections -= 1
        self.transport.close()

    def answer(self, body: dict[str, Any]) -> None:
        counts, how = self.counts, behaviour(body["model"])
        counts.requests += 1
        counts.live += 1
        counts.peak = max(counts.peak, counts.live)
        self.answering = True
        self.tokens, self.chunks = int(how["tokens"][0]), int(how["chunks"][0])
        self.logprobs = bool(body.get("logprobs"))
        if "faults" in how and self.fault(counts.requests % 100):
            return
        if "slots" in how:
            plan = how["slots"]
            self.transport.write(HEAD)
            spread = how.get("jitter", [0.0])[0] * self.engine.random.uniform(-1.0, 1.0)
            seconds = how["service"][0] * (1.0 + spread)
            self.engine.ask(self, plan, how.get("stage", [1e9])[0], seconds)
        elif how.get("seconds", [0.0])[0]:
            self.pace(how.get("first", [0.0])[0], how["seconds"][0])
        else:
            self.done()
            write = self.transport.write
            write(HEAD)
            for event in token_events(self.tokens, self.chunks, self.logprobs):
                write(event)  # a packet each, as from a server that decodes
            write(last_event(self.tokens, 0.0))

    def done(self) -> None:
        if self.answering:
            self.answering = False
            self.counts.live -= 1
            self.counts.completed += 1

    def fault(self, place: int) -> bool:
        """5 cut short, 5 refused, 2 reset, of each 100."""
        counts = self.counts
        if place % 20 == 3:
            counts.truncated += 1
            events = token_events(self.tokens, self.chunks, self.logprobs)
            self.transport.write(HEAD + b"".join(events[: len(events) // 2]) + b"0\r\n\r\n")
        elif place % 20 == 9:
            counts.refused += 1
            self.transport.write(BUSY)
        elif place % 50 == 35:
            counts.aborted += 1
            events = token_events(self.tokens, self.chunks, self.logprobs)
            self.transport.write(HEAD + b"".join(events[: len(events) // 3])[:-5])
            self.answering = False
            counts.live -= 1
            self.transport.abort()
            return True
        else:
            return False
        self.answering = False
        counts.live -= 1
        return True

    def pace(self, first: float, seconds: float) -> None:
        events = token_events(self.tokens, self.chunks, self.logprobs)
        start = self.loop.time()
        gap = (seconds - first) / max(1, len(events) - 1)
        self.transport.write(HEAD)

        def send(index: int) -> None:
            self.transport.write(events[index])
            if index + 1 < len(events):
                due = start + first + gap * (index + 1)
                self.timer = self.loop.call_at(due, send, index + 1)
            else:
                self.done()
                self.transport.write(last_event(self.tokens, 0.0))

        self.timer = self.loop.call_at(start + first, send, 0)

    def finish(self, queued: float) -> None:
        self.done()
        events = token_events(self.tokens, self.chunks, self.logprobs)
        self.transport.write(b"".join(events) + last_event(self.tokens, queued))


def certificate(folder: Path) -> ssl.SSLContext:
    """A context with a certificate made for this run."""
    key, cert = folder / "key.pem", folder / "cert.pem"
    command = "openssl req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=127.0.0.1"
    subprocess.run(
        [*command.split(), "-keyout", key, "-out", cert], check=True, capture_output=True
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    return context


async def serve(tls: bool) -> None:
    loop = asyncio.get_running_loop()
    counts, engine = Counts(), Engine()
    with tempfile.TemporaryDirectory() as folder:
        context = certificate(Path(folder)) if tls else None
        server = await loop.create_server(
            lambda: Stream(counts, engine), "127.0.0.1", 0, ssl=context, backlog=8192
        )
        port = server.sockets[0].getsockname()[1]
        print(f"{'https' if tls else 'http'}://127.0.0.1:{port}", flush=True)
        await loop.run_in_executor(None, sys.stdin.read)
        server.close()


def main() -> None:
    parser = argparse.ArgumentParser(description="The server of benchmarks/sampler.py.")
    parser.add_argument("--tls", action="store_true")
    asyncio.run(serve(parser.parse_args().tls))


if __name__ == "__main__":
    main()
