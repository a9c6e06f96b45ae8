"""How long `import fireworks_training` takes over the libraries it can't do without.

    python benchmarks/imports.py [--runs 11]

Each run is a new interpreter; the two sides take turns. Reported are medians and the spread of the
wall time inside the interpreter, from before the first import to after the last line. The claim:
importing every light public name and building a service and a sampler costs at most 0.15 s over a
bare `import aiohttp, pydantic, anyio`, and loads neither torch nor transformers nor tinker.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import subprocess
import sys
from pathlib import Path

BARE = "import aiohttp, pydantic, anyio"
OURS = """
import fireworks_training as ft
for name in ft.__all__:
    if name != "SaveWeightsForSamplerResponse":
        getattr(ft, name)
service = ft.FiretitanServiceClient.from_firetitan_config(base_url="local", base_model="m")
sampler = ft.DeploymentSampler("http://127.0.0.1:9", "accounts/a/deployments/d", "key")
import sys
heavy = {"torch", "transformers", "tinker", "rich", "click", "matplotlib"} & sys.modules.keys()
assert not heavy, heavy
"""
TIMED = "import time; start = time.perf_counter()\n{}\nprint(time.perf_counter() - start)"


def run(body: str) -> float:
    """Seconds of one run in a new interpreter."""
    finished = subprocess.run(
        [sys.executable, "-c", TIMED.format(body)],
        capture_output=True,
        text=True,
        check=True,
        cwd=Path(__file__).parent.parent,
    )
    return float(finished.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description="Import time over the bare libraries.")
    parser.add_argument("--runs", type=int, default=11)
    runs: int = parser.parse_args().runs
    run(BARE), run(OURS)  # byte code and page cache
    sides: dict[str, list[float]] = {BARE: [], OURS: []}
    for _ in range(runs):
        for body, times in sides.items():
            times.append(run(body))
    print(f"{platform.platform()}, Python {platform.python_version()}, {runs} runs a side")
    for label, body in (("bare aiohttp, pydantic, anyio", BARE), ("fireworks_training", OURS)):
        times = sides[body]
        print(
            f"{label:32} median {statistics.median(times):.3f} s"
            f"   min {min(times):.3f}   max {max(times):.3f}"
        )
    differences = [ours - bare for bare, ours in zip(sides[BARE], sides[OURS], strict=True)]
    print(f"{'over the bare libraries':32} median {statistics.median(differences):.3f} s")


if __name__ == "__main__":
    main()
