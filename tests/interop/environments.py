"""Python environments for other people's SDKs, made once and kept under a hash of their pins.

A pins file is one for pip; lines that begin with `--no-deps` are installed in a second step,
without what they declare. `FIREWORKS_TRAINING_INTEROP_<NAME>` names an interpreter to use instead.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fireworks-training"


def interpreter(name: str) -> str:
    """Python of the environment that `<name>.txt` describes; made if it is not there.

    Raises:
        subprocess.CalledProcessError: pip could not install it.
    """
    if given := os.environ.get(f"FIREWORKS_TRAINING_INTEROP_{name.upper()}"):
        return given
    pins = (HERE / f"{name}.txt").read_text().splitlines()
    version = f"{sys.version_info.major}.{sys.version_info.minor}"
    digest = hashlib.sha256("\n".join([version, *pins]).encode()).hexdigest()[:16]
    folder = CACHE / f"interop-{name}-{digest}"
    CACHE.mkdir(parents=True, exist_ok=True)
    with (CACHE / f"interop-{name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "complete").exists():
            shutil.rmtree(folder, ignore_errors=True)
            _make(folder, pins)
            (folder / "complete").touch()
    return str(folder / "bin" / "python")


def _make(folder: Path, pins: list[str]) -> None:
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    wanted = [line for line in pins if line and not line.startswith("#")]
    alone = [line.removeprefix("--no-deps").strip() for line in wanted if "--no-deps" in line]
    rest = [line for line in wanted if "--no-deps" not in line]
    pip = [str(folder / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    subprocess.run([*pip, *rest], check=True)
    if alone:
        subprocess.run([*pip, "--no-deps", *alone], check=True)
