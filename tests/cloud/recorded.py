"""The official client's outcomes, as they were the last time that they were written down."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.cloud.scenario import Outcome

FILE = Path(__file__).parent / "official_outcomes.json"


def read() -> dict[str, Outcome]:
    """By scenario."""
    return {name: Outcome.from_json(row) for name, row in json.loads(FILE.read_text()).items()}


def write(found: dict[str, Outcome]) -> None:
    """Put these in the place of what was recorded of the same scenarios; keep the others."""
    known = json.loads(FILE.read_text()) if FILE.exists() else {}
    known |= {name: _brief(outcome.as_json()) for name, outcome in found.items()}
    rows = [f"{json.dumps(name)}: {json.dumps(known[name])}" for name in sorted(known)]
    FILE.write_text("{\n" + ",\n".join(rows) + "\n}\n")


def _brief(row: dict[str, Any]) -> dict[str, Any]:
    """Failures by their types alone: their words hold ports and random ids."""
    return row | {"steps": [(name, said.partition(":")[0]) for name, said in row["steps"]]}
