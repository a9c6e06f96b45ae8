"""The page of the compatibility names: its modules, its links and its table are there."""

from __future__ import annotations

import re
from pathlib import Path

from fireworks_training import compat
from fireworks_training.compat import CONTRACTS
from tests.interop.compatibility import BEGIN, END, README

TEXT = README.read_text("utf-8")


def test_it_has_a_line_for_each_module_and_for_nothing_else() -> None:
    rows = re.findall(r"^\| (`\w+\.py`(?:, `\w+\.py`)*) \|", TEXT, re.MULTILINE)
    named = set(re.findall(r"\w+\.py", " ".join(rows)))
    assert compat.__file__ is not None
    modules = {path.name for path in Path(compat.__file__).parent.glob("*.py")}
    assert named == modules - {"__init__.py"}


def test_the_table_is_of_the_version_that_was_tested() -> None:
    assert f"fireworks-ai {CONTRACTS['fireworks-ai']}" in TEXT
    table = TEXT[TEXT.index(BEGIN) : TEXT.index(END)]
    assert re.search(r"^\| `FiretitanServiceClient` \|", table, re.MULTILINE)
