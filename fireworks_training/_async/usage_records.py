"""What runs have used, kept after they ended: one JSON line a run, in the user's state folder.

Written when a service is closed. Everything here blocks on the disk: call it in a thread.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

from fireworks_training._async.usage import RunUsage, Usage
from fireworks_training.config import state_dir

logger = logging.getLogger("fireworks_training.usage")

NAME = "usage.jsonl"


def write(run: str, run_id: str, base_url: str, base_model: str, usage: Usage) -> None:
    """Append the record of a run.

    Raises:
        OSError: the folder can't be written.
    """
    path = state_dir() / NAME
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    record = {
        "run": run,
        "run_id": run_id,
        "ended": datetime.now(UTC).isoformat(timespec="seconds"),
        "base_url": base_url,
        "base_model": base_model,
        "usage": asdict(usage),
    }
    line = json.dumps(record).encode() + b"\n"
    # One write to a file that is only appended to: lines of several processes do not mix.
    descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        os.write(descriptor, line)
    finally:
        os.close(descriptor)


def read_usage_records(path: Path | None = None) -> list[RunUsage]:
    """All records, oldest first; a line that can't be read is skipped, with a warning."""
    path = path if path is not None else state_dir() / NAME
    try:
        lines = path.read_text("utf-8").splitlines()
    except FileNotFoundError:
        return []
    found: list[RunUsage] = []
    for number, line in enumerate(lines, 1):
        try:
            record = cast(dict[str, Any], json.loads(line))
            used = Usage(**record.pop("usage"))
            found.append(RunUsage(usage=used, **record))
        except (ValueError, TypeError, KeyError, AttributeError):
            logger.warning("%s:%d can't be read; it is skipped", path, number)
    return found
