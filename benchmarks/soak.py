"""The local engine under mixed load for a long time: does its memory grow, do descriptors leak?

    python benchmarks/soak.py [--minutes 20] [--write]      # and the table in README.md

96 streams at a time on two replicas: prompts of 3 to 300 tokens, one in four of them known,
completions of 1 to 200 tokens, one in ten cancelled on its way. Every ten seconds the resident
memory and the open descriptors of all processes of the platform are read. Memory is compared
between the second and the last tenth of the run: the first one fills caches.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import platform
import statistics
import time
from importlib.metadata import version
from pathlib import Path

import numpy as np
from serving import served

from fireworks_training import FixedConcurrencyController

STREAMS = 96
SAMPLE_EVERY = 10.0


def descendants(root: int) -> dict[int, str]:
    """The processes of the platform by their names."""
    parents: dict[int, int] = {}
    names: dict[int, str] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with contextlib.suppress(OSError):
                name, _, rest = (entry / "stat").read_text().rpartition(")")
                parents[int(entry.name)] = int(rest.split()[1])
                names[int(entry.name)] = name.partition("(")[2]
    found: dict[int, str] = {}
    for pid in parents:
        above = pid
        while above in parents and above != root:
            above = parents[above]
        if above == root:
            found[pid] = f"{role(pid, names[pid])} {pid}"
    return found


def role(pid: int, name: str) -> str:
    """What a process of the platform is: the module that it runs, or the name that it took."""
    words = (Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")
    modules = [word.decode() for word in words if word.startswith(b"fireworks_training.")]
    return name if name.startswith("fwt-") or not modules else modules[0].split(".", 1)[1]


def resident(pid: int) -> float:
    """MB of memory that the process alone holds or shares."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def open_descriptors(pid: int) -> int:
    """How many descriptors the process has."""
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


async def soak(minutes: float) -> list[str]:
    """Runs; one line a process."""
    random = np.random.default_rng(0)
    known = [random.integers(4, 328, int(n)).tolist() for n in random.integers(20, 300, 40)]
    until = time.monotonic() + 60 * minutes
    counts = {"completed": 0, "cancelled": 0}
    async with served(replicas=2) as deployment:
        sampler = deployment.sampler(FixedConcurrencyController(256))

        async def one_after_the_other() -> None:
            while time.monotonic() < until:
                if random.random() < 0.25:
                    prompt = known[int(random.integers(len(known)))]
                else:
                    prompt = random.integers(4, 328, int(random.integers(3, 300))).tolist()
                call = asyncio.ensure_future(
                    sampler.sample_with_prompt_tokens(
                        [prompt],
                        max_tokens=int(random.integers(1, 200)),
                        logprobs=True,
                        ignore_eos=True,
                    )
                )
                if random.random() < 0.1:
                    await asyncio.sleep(0.2)
                    if call.cancel():
                        await asyncio.gather(call, return_exceptions=True)
                        counts["cancelled"] += 1
                        continue
                await call
                counts["completed"] += 1

        seen: dict[str, list[tuple[float, int]]] = {}

        async def watch() -> None:
            while time.monotonic() < until:
                await asyncio.sleep(SAMPLE_EVERY)
                for pid, name in descendants(deployment.process.pid).items():
                    with contextlib.suppress(OSError):
                        descriptors = open_descriptors(pid)
                        seen.setdefault(name, []).append((resident(pid), descriptors))

        async with sampler, asyncio.TaskGroup() as group:
            group.create_task(watch())
            for _ in range(STREAMS):
                group.create_task(one_after_the_other())
    counted = f"{counts['completed']:,} completions, {counts['cancelled']:,} cancelled"
    machine = f"{platform.platform()}, Python {platform.python_version()}"
    lines = [
        f"{minutes:g} minutes, {counted}; {machine}, torch {version('torch')}",
        "",
        "| process | MB, second tenth | MB, last tenth | grown | descriptors |",
        "|---|---|---|---|---|",
    ]
    for name, rows in seen.items():
        tenth = max(1, len(rows) // 10)
        early = statistics.mean(memory for memory, _ in rows[tenth : 2 * tenth])
        late = statistics.mean(memory for memory, _ in rows[-tenth:])
        grown = late / early - 1
        descriptors = f"{rows[tenth][1]} to {rows[-1][1]}"
        lines.append(f"| {name} | {early:.0f} | {late:.0f} | {grown:+.1%} | {descriptors} |")
    return lines


def write(lines: list[str]) -> None:
    """The section of README.md."""
    readme = Path(__file__).parent / "README.md"
    text, begin, end = readme.read_text(), "<!-- soak -->", "<!-- /soak -->"
    what = "Mixed load on two engines for a long time; regenerate with"
    section = [begin, "## A long run of the local engine", "", what, ""]
    section += ["    python benchmarks/soak.py --write", "", *lines, end]
    before, _, rest = text.partition(begin)
    after = rest.partition(end)[2] or "\n"
    readme.write_text(before.rstrip() + "\n\n" + "\n".join(section) + after)


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    lines = asyncio.run(soak(arguments.minutes))
    print("\n".join(lines))
    if arguments.write:
        write(lines)


if __name__ == "__main__":
    main()
