"""A worker's memory: checks that a model fits before it loads, and gives freed pages back.

Knows the headers of safetensors files, the system's figures of free memory, and the C library's
allocator. Does not load anything. A model that does not fit would be ended by the kernel in the
middle of loading, together with whatever else runs here.
"""

from __future__ import annotations

import ctypes
import json
import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import cast

_HEADER_LIMIT = 100 << 20
_SPARE = 0.9
"""Share of the free memory that a model may take: others run here too."""


class NotEnoughMemory(MemoryError):
    """Raised where a model would not fit; the message gives the bytes needed and free."""


def parameter_count(model_path: Path) -> int:
    """Count the parameters of a Hugging Face directory, from the headers of its files.

    Raises:
        FileNotFoundError: it has no safetensors files.
    """
    files = sorted(model_path.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"{model_path} holds no safetensors files")
    return sum(_numbers_in(file) for file in files)


def _numbers_in(file: Path) -> int:
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > _HEADER_LIMIT:
            raise ValueError(f"{file.name} is no safetensors file")
        header = cast("dict[str, dict[str, object]]", json.loads(stream.read(length)))
    shapes = [entry["shape"] for name, entry in header.items() if name != "__metadata__"]
    return sum(math.prod(cast("list[int]", shape)) for shape in shapes)


_CGROUP = Path("/sys/fs/cgroup")


def free_bytes() -> int | None:
    """Measure the memory that a new process could take: the machine's or the container's, whichever
    is less; None where the system does not report it."""
    known = [free for free in (_machine_bytes(), container_bytes(_CGROUP)) if free is not None]
    return min(known, default=None)


def container_bytes(cgroup: Path) -> int | None:
    """Measure the memory left of a control group's limit (version 2); None without a limit."""
    try:
        limit = (cgroup / "memory.max").read_text().strip()
        used = int((cgroup / "memory.current").read_text())
        # Pages of files are given up when memory is short.
        for line in (cgroup / "memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):
                used -= int(line.split()[1])
        return None if limit == "max" else max(0, int(limit) - used)
    except (OSError, ValueError):
        return None


def _machine_bytes() -> int | None:
    meminfo = Path("/proc/meminfo")
    if meminfo.exists():
        for line in meminfo.read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    try:
        return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (ValueError, OSError):
        return None


def fits(needed: int, free: int | None) -> bool:
    """Return whether so many bytes may be taken of those that are free; None checks nothing."""
    return free is None or needed <= free * _SPARE


def check_memory(
    model_path: Path,
    bytes_per_parameter: float,
    extra: int,
    free: int | None,
    what: str,
    *,
    parameters: int | None = None,
) -> None:
    """Refuse a model that would not fit.

    Args:
        model_path: directory in the Hugging Face layout.
        bytes_per_parameter: bytes that the process holds for each, all copies together.
        extra: bytes that it takes besides.
        free: bytes that are free, from `free_bytes`; None checks nothing.
        what: name of the process, for the message.
        parameters: the model's number of parameters; None counts them in its files.

    Raises:
        NotEnoughMemory: the model would not fit; the message gives both figures.
    """
    if free is None:
        return
    count = parameter_count(model_path) if parameters is None else parameters
    needed = int(count * bytes_per_parameter) + extra
    if not fits(needed, free):
        raise NotEnoughMemory(
            f"{model_path.name} has {count / 1e6:,.0f} M parameters; {what} would take "
            f"{needed / 2**30:.1f} GiB ({bytes_per_parameter:g} bytes a parameter and "
            f"{extra / 2**30:.1f} GiB), and {free / 2**30:.1f} GiB are free, of which "
            f"{_SPARE:.0%} may be used. Serve a smaller model, or free memory"
        )


def c_library_trim() -> Callable[[], object] | None:
    """Return a function that makes the C library give the free pages between its blocks back to the
    system; None where it can't (glibc can)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    return None if trim is None else lambda: trim(0)


class PageReturn:
    """Gives freed pages back now and then, so that a worker's memory stays near what it uses.

    Buffers of ever other sizes leave holes in the allocator's heap: an engine under mixed load took
    three times what it used, and more each minute. One call takes a millisecond where little was
    freed, and 20 for hundreds of MB.

    Args:
        trim: from `c_library_trim`; None does nothing.
        busy: seconds between two calls while work goes on.
        idle: seconds between two calls while work pauses: a call then delays nobody, unless pauses
            are many.
    """

    def __init__(
        self, trim: Callable[[], object] | None, *, busy: float = 10.0, idle: float = 2.0
    ) -> None:
        self._trim = trim
        self._busy = busy
        self._idle = idle
        self._last = 0.0
        self._worked = False

    def worked(self, now: float) -> None:
        """Note that a piece of work was done, at `now` seconds of a steady clock."""
        self._worked = True
        self._give_back(now, self._busy)

    def paused(self, now: float) -> None:
        """Note that there is nothing to do at `now`."""
        if self._worked:
            self._give_back(now, self._idle)

    def _give_back(self, now: float, pause: float) -> None:
        if now - self._last < pause:
            return
        self._last, self._worked = now, False
        if self._trim is not None:
            self._trim()
