"""What the README says of losses: the snippets run, and the table is that of the package."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from fireworks_training import FiretitanServiceClient, losses
from tests.conftest import RunningPlatform
from tests.losses.test_court import DEFAULTS
from tests.losses.test_over_http import rows

README = (Path(__file__).parents[2] / "README.md").read_text("utf-8")
SECTION = README.partition("\n## Losses\n")[2].partition("\n## Errors\n")[0]
USE, CHECK = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
ROWS = [line.split(" | ") for line in SECTION.splitlines() if line.startswith("| `")]


def test_losses_are_used_as_it_says(platform: RunningPlatform) -> None:
    with FiretitanServiceClient.from_firetitan_config(
        base_url=platform.base_url,
        api_key=platform.api_key,
        base_model=platform.model,
        create_deployment=False,
    ) as service:
        client = service.create_training_client()
        names: dict[str, Any] = {"client": client, "reference": client}
        names["data"] = rows(service, client)
        exec(USE, names)
        assert names["metrics"]["correction/weight_mean"] > 0
        assert names["metrics"]["kl/k1"] == pytest.approx(0.0, abs=1e-5)


def test_the_loss_of_ten_lines_is_judged_as_it_says(capsys: pytest.CaptureFixture[str]) -> None:
    exec(CHECK, {})
    printed = " ".join(capsys.readouterr().out.split())
    lines = [line.removeprefix("# ") for line in CHECK.splitlines() if line.startswith("# ")]
    for shown in " ".join(lines).split("..."):
        assert " ".join(shown.split()) in printed, printed


def test_the_table_names_every_loss_and_its_twin() -> None:
    assert {row[0].strip("| `") for row in ROWS} == {name for name, _, _ in DEFAULTS}
    for name, args, _ in DEFAULTS:
        row = next(row for row in ROWS if row[0].strip("| `") == name)
        twin = getattr(losses, name)(*args).twin
        assert (f"`{twin[0]}`" if twin else "custom only") in row[4]
