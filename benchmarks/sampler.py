"""How fast the sampling client is: against the official SDK's, and against bare aiohttp + orjson.

    python benchmarks/sampler.py --official /path/to/python    # all claims; 20 minutes
    python benchmarks/sampler.py --only throughput --runs 3
    python benchmarks/sampler.py --official ... --write        # and the table in README.md

`--official` names the Python of an environment with `fireworks-ai[training]`; without it the peer
is left out. Server and client are processes of their own (`sampler_server.py`,
`sampler_clients.py`); the sides take turns within a run, and ratios are of one run.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import platform
import statistics
import subprocess
import sys
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
OURS = ("ours-async", "ours-portal", "ours-sync")
Figures = dict[str, float]


class Server:
    """The mock server's process."""

    def __init__(self, *, tls: bool = False) -> None:
        command = [sys.executable, str(HERE / "sampler_server.py"), *(["--tls"] if tls else [])]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self.process.stdout is not None
        self.url = self.process.stdout.readline().strip()

    def counts(self) -> Figures:
        """What it counted since it was asked last."""
        import ssl

        context = ssl._create_unverified_context() if self.url.startswith("https") else None
        with urllib.request.urlopen(self.url + "/stats", context=context) as answer:
            figures: Figures = json.load(answer)
            return figures

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait(10)


class Bench:
    """Runs clients, keeps their figures, prints rows."""

    def __init__(self, official: str | None, runs: int, wanted: list[str]) -> None:
        self.official = official
        self.runs = runs
        self.wanted = wanted
        self.rows: list[str] = []

    def client(
        self, adapter: str, server: Server, model: str, total: int, in_flight: int, *more: object
    ) -> Figures:
        """One client process; its figures and the server's."""
        python = self.official if adapter == "official" else sys.executable
        assert python is not None
        server.counts()
        command = [
            python, str(HERE / "sampler_clients.py"), adapter, "--url", server.url,
            "--model", f"accounts/bench/deployments/{model}", "--total", total,
            "--in-flight", in_flight, *more,
        ]  # fmt: skip
        done = subprocess.run(
            [str(part) for part in command], capture_output=True, text=True, cwd=HERE.parent
        )
        if done.returncode:
            raise SystemExit(f"{adapter} failed:\n{done.stderr[-3000:]}")
        figures: Figures = json.loads(done.stdout.splitlines()[-1])
        return figures | server.counts()

    def adapters(self, *names: str) -> list[str]:
        """Those of `names` that can run here."""
        return [n for n in names if n != "official" or self.official]

    def interleaved(
        self, names: list[str], one: Callable[[str], Figures], runs: int | None = None
    ) -> dict[str, list[Figures]]:
        """Every adapter in turn, `runs` times."""
        found: dict[str, list[Figures]] = {name: [] for name in names}
        for _ in range(runs or self.runs):
            for name in names:
                found[name].append(one(name))
        return found

    def title(self, text: str, *columns: str) -> None:
        self.rows += ["", f"**{text}**", "", f"| client | {' | '.join(columns)} |"]
        self.rows.append("|---|" + "---|" * len(columns))
        print("\n".join(self.rows[-5:]), flush=True)

    def row(self, name: str, *cells: str) -> None:
        self.rows.append(f"| {name} | {' | '.join(cells)} |")
        print(self.rows[-1], flush=True)


def spread(values: list[float], form: str = "{:.2f}") -> str:
    """Median, least and greatest."""
    middle = form.format(statistics.median(values))
    if len(values) == 1:
        return middle
    return f"{middle} ({form.format(min(values))} to {form.format(max(values))})"


def column(figures: list[Figures], name: str) -> list[float]:
    return [one[name] for one in figures]


def ratios(ours: list[Figures], theirs: list[Figures], name: str) -> list[float]:
    return [a[name] / b[name] for a, b in zip(ours, theirs, strict=True)]


def throughput(bench: Bench) -> None:
    """Completions a second and CPU each; the client is the bottleneck."""
    cases = [(256, 32, 64, 2400), (256, 32, 256, 2400), (2048, 256, 64, 480), (2048, 256, 256, 512)]
    names = bench.adapters("floor", *OURS, "official")
    with Server() as server:
        for tokens, chunks, in_flight, total in cases:

            def one(
                name: str, model: str = f"tokens-{tokens}_chunks-{chunks}",
                total: int = total, in_flight: int = in_flight,
            ) -> Figures:  # fmt: skip
                count = total // 6 if name == "official" else total
                count = max(count, in_flight)
                return bench.client(name, server, model, count, in_flight, "--warm-up", in_flight)

            found = bench.interleaved(names, one)
            bench.title(
                f"{tokens} tokens in {chunks} events with logprobs, {in_flight} in flight",
                "completions/s", "CPU each, ms", "rate: times floor", "rate: times official",
                "CPU: official's over it",
            )  # fmt: skip
            for name, figures in found.items():
                peer = found.get("official")
                bench.row(
                    name,
                    spread(column(figures, "rate"), "{:.0f}"),
                    spread(column(figures, "cpu_ms")),
                    spread(ratios(figures, found["floor"], "rate")),
                    spread(ratios(figures, peer, "rate"), "{:.1f}") if peer else "-",
                    spread(ratios(peer, figures, "cpu_ms"), "{:.1f}") if peer else "-",
                )


def tls(bench: Bench) -> None:
    """The same over TLS, with its handshakes."""
    names = bench.adapters("floor", *OURS, "official")
    with Server(tls=True) as server:

        def one(name: str) -> Figures:
            total = 400 if name == "official" else 1600
            return bench.client(name, server, "tokens-256_chunks-32", total, 64)

        found = bench.interleaved(names, one)
        bench.title(
            "TLS: 256 tokens in 32 events, 64 in flight",
            "completions/s", "CPU each, ms", "handshakes", "requests",
        )  # fmt: skip
        for name, figures in found.items():
            bench.row(
                name,
                spread(column(figures, "rate"), "{:.0f}"),
                spread(column(figures, "cpu_ms")),
                spread(column(figures, "connections"), "{:.0f}"),
                f"{figures[0]['requests']:.0f}",
            )


def streams(bench: Bench) -> None:
    """Many streams of 2 s at once."""
    model = "tokens-64_chunks-16_seconds-2_first-0.2"
    plan: list[tuple[str, str, int, list[object]]] = [
        ("floor", "1,000 at once, twice", 1000, []),
        ("ours-async", "1,000 at once, twice", 1000, []),
        ("ours-portal", "1,000 at once, twice", 1000, []),
        ("floor", "5,000 at once, twice", 5000, []),
        ("ours-async", "5,000 at once, twice", 5000, []),
        ("ours-async", "no arguments: 1,000", 1000, ["--window", "adaptive"]),
    ]
    if bench.official:  # minutes a run: it has one
        plan.append(("official", "1,000 at once, twice", 1000, []))
    bench.title(
        "Streams of 2 s (ideal wall: 4 s; one round of no arguments: 2 s)",
        "work", "wall, s", "peak MB", "longest stall, ms", "most at once", "connections",
    )  # fmt: skip
    with Server() as server:
        runs: list[list[Figures]] = [[] for _ in plan]
        for number in range(bench.runs):
            for found, (name, _, count, more) in zip(runs, plan, strict=True):
                if name == "official" and number > 0:
                    continue
                total = count if more else 2 * count
                found.append(bench.client(name, server, model, total, count, *more))
        for found, (name, what, _, _) in zip(runs, plan, strict=True):
            bench.row(
                name,
                what,
                spread(column(found, "wall")),
                spread(column(found, "peak_mb"), "{:.0f}"),
                spread([1000 * one["stall"] for one in found], "{:.0f}"),
                spread(column(found, "peak"), "{:.0f}"),
                spread(column(found, "connections"), "{:.0f}"),
            )


def paced(bench: Bench) -> None:
    """256 streams of 2,048 tokens over 8 s, and the time to the first token."""
    names = bench.adapters("floor", "ours-async", "ours-portal", "official")
    with Server() as server:

        def long(name: str) -> Figures:
            return bench.client(name, server, "tokens-2048_chunks-256_seconds-8", 256, 256)

        found = bench.interleaved(names, long)
        bench.title(
            "256 streams of 2,048 tokens in 256 events, paced over 8 s",
            "wall, s", "peak MB", "longest stall, ms", "CPU each, ms",
        )  # fmt: skip
        for name, figures in found.items():
            bench.row(
                name,
                spread(column(figures, "wall")),
                spread(column(figures, "peak_mb"), "{:.0f}"),
                spread([1000 * one["stall"] for one in figures], "{:.0f}"),
                spread(column(figures, "cpu_ms")),
            )

        def first(name: str) -> Figures:
            return bench.client(name, server, "tokens-64_chunks-16_seconds-2_first-0.2", 32, 32)

        found = bench.interleaved(names, first)
        bench.title("Time to first token: truth 0.2 s, stream of 2 s", "reported, s")
        for name, figures in found.items():
            bench.row(name, spread(column(figures, "first"), "{:.3f}"))


def engine(bench: Bench) -> None:
    """An engine of 32 slots, 0.64 s a request, over HTTP, and one whose slots change."""
    steady = "tokens-16_chunks-2_slots-32_service-0.64"
    changing = "tokens-16_chunks-2_slots-32,8,64_stage-20_service-0.64"
    cases = [
        (f"32 slots, {told}", window, f"{steady}_jitter-{jitter}", 2000)
        for jitter, told in (("0", "all 0.64 s"), ("0.2", "0.64 s within 20 %"))
        for window in ("8", "256")
    ]
    cases += [
        (f"32, 8, 64 slots, 20 s each, {told}", "8", f"{changing}_jitter-{jitter}", 3250)
        for jitter, told in (("0", "all 0.64 s"), ("0.2", "within 20 %"))
    ]
    bench.title(
        "An engine over HTTP, 512 workers, default arguments. Each row has a server of its own; "
        "all run at the same time, at a few per cent of a core each",
        "engine", "window from", "engine busy", "p95 queue after a quarter of the requests, s",
        "wall, s",
    )  # fmt: skip

    def one(name: str, window: str, model: str, total: int) -> Figures:
        with Server() as server:
            return bench.client(name, server, model, total, 512, "--window", f"from-{window}")

    names = bench.adapters("ours-async", "official")
    with ThreadPoolExecutor(len(cases) * len(names)) as pool:
        started = {
            (name, *case): pool.submit(one, name, *case[1:]) for case in cases for name in names
        }
    for (name, told, window, *_), future in started.items():
        found = future.result()
        bench.row(
            name,
            told,
            window,
            f"{found['busy']:.1%}",
            f"{found['p95_wait']:.2f}",
            f"{found['wall']:.1f}",
        )


def law(bench: Bench) -> None:
    """The adaptive law in virtual time: engines that serve in waves, and such that do not."""
    from fireworks_training.testing import AimdSettings, EngineRun, simulate_engine

    jitters = (0.0, 0.02, 0.05, 0.1, 0.2, 0.4, 0.6, 0.9)

    def runs(window: int, **engine: Any) -> list[EngineRun]:
        return [
            simulate_engine(
                AimdSettings(initial_window=window),
                **{"slots": 32, "service": 0.64, "requests": 2000}
                | engine
                | {"jitter": jitter, "seed": seed},
            )
            for jitter in jitters
            for seed in range(4)
        ]

    def stages(now: float) -> int:
        return 32 if now < 20 else 8 if now < 40 else 64

    refusing = {"queue_limit": 32, "reports_queue": False}
    cases: list[tuple[str, int, dict[str, Any]]] = [
        ("32 slots, 0.64 s, 2,000 requests, window from 8", 8, {}),
        ("the same, window from 256", 256, {}),
        (
            "32, then 8, then 64 slots, 20 s each, 3,250 requests",
            8,
            {"slots": stages, "requests": 3250},
        ),
        ("429 law: 32 slots and a queue of 32, no queue times", 8, refusing),
        ("429 law: 32 slots and a queue of 8, no queue times", 8, refusing | {"queue_limit": 8}),
    ]
    bench.title(
        "The adaptive window with default arguments, in virtual time: 32 runs, service times from "
        "all equal to spread by 90 %, median (worst)",
        "engine busy", "p95 queue after a quarter of the requests, s", "refused",
    )  # fmt: skip
    for name, window, engine in cases:
        found = runs(window, **engine)
        busy = [one.busy for one in found]
        waits = [
            one.queue_quantile(0.95, after=one.queues[len(one.queues) // 4][0]) for one in found
        ]
        bench.row(
            name,
            f"{statistics.median(busy):.1%} ({min(busy):.1%})",
            f"{statistics.median(waits):.2f} ({max(waits):.2f})",
            f"{statistics.median(one.refused for one in found):.0f}",
        )


def faults(bench: Bench) -> None:
    """5 % cut short, 5 % 503, 2 % reset: wall over the fault-free run."""
    names = bench.adapters("ours-async", "official")
    calm = "tokens-256_chunks-32_seconds-0.5_first-0.05"
    with Server() as server:

        def one(name: str) -> Figures:
            without = bench.client(name, server, calm, 1000, 64)
            with_faults = bench.client(name, server, calm + "_faults-1", 1000, 64)
            return with_faults | {"ratio": with_faults["wall"] / without["wall"]}

        found = bench.interleaved(names, one, 1 if bench.runs == 1 else 3)
        bench.title(
            "12 % faults, 1,000 completions of 0.5 s, 64 in flight",
            "wall over fault-free", "completed", "extra requests", "injected",
        )  # fmt: skip
        for name, figures in found.items():
            last = figures[-1]
            injected = last["truncated"] + last["refused"] + last["aborted"]
            bench.row(
                name,
                spread(column(figures, "ratio")),
                f"{last['completed']:.0f}",
                f"{last['requests'] - 1000:.0f}",
                f"{injected:.0f}",
            )


CLAIMS = {
    "throughput": throughput,
    "tls": tls,
    "streams": streams,
    "paced": paced,
    "engine": engine,
    "law": law,
    "faults": faults,
}


def machine() -> Iterator[str]:
    cpu = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((one.partition(": ")[2] for one in lines if one.startswith("model name")), cpu)
        cpu += f" x {sum(one.startswith('processor') for one in lines)}"
    yield f"{cpu}, {platform.platform()}, Python {platform.python_version()}"
    yield ", ".join(f"{name} {version(name)}" for name in ("aiohttp", "orjson"))


def write(claim: str, lines: list[str]) -> None:
    """Put a claim's tables into README.md, between its marks."""
    readme = HERE / "README.md"
    begin, end = f"<!-- sampler_{claim} -->", f"<!-- /sampler_{claim} -->"
    section = "\n".join(
        [
            begin,
            f"## Sampling: {claim}",
            "",
            f"    python benchmarks/sampler.py --official PYTHON --only {claim} --write",
            "",
            *lines,
            end,
        ]
    )
    text = readme.read_text()
    if begin in text:
        text = text[: text.index(begin)] + section + text[text.index(end) + len(end) :]
    else:
        text = text.rstrip() + "\n\n" + section + "\n"
    readme.write_text(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--official", help="Python with fireworks-ai[training]")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--only", nargs="*", choices=tuple(CLAIMS), default=list(CLAIMS))
    parser.add_argument("--write", action="store_true", help="the tables into README.md")
    args = parser.parse_args()
    bench = Bench(args.official, args.runs, args.only)
    where = "; ".join(machine()) + f"; {args.runs} runs a side, taking turns"
    print(where)
    for name in args.only:
        bench.rows.clear()
        CLAIMS[name](bench)
        if args.write:
            write(name, [where + ".", *bench.rows])


if __name__ == "__main__":
    main()
