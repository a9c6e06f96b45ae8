"""Runs each test twice: on the platform as it is, and on one that stands in for a cloud.

On the second no extension is offered. A test whose promise leans on one names it in a marker,
`@pytest.mark.extension("snapshot")`, and asserts there (`platform.as_cloud`) what a user gets
without it; the names are those of the README's table. The fast stage runs as a cloud only tests
marked `as_cloud`; the slow stage all.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

README = Path(__file__).parents[2] / "README.md"


@cache
def extensions() -> str:
    """The README's table of extensions."""
    return README.read_text("utf-8").split("### What leans on")[1].split("\n## ")[0]


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give each test that uses the shared platform both modes."""
    for marker in metafunc.definition.iter_markers("extension"):
        for name in marker.args:
            assert name in extensions(), f"the README's table names no extension {name!r}"
    if "platform" not in metafunc.fixturenames:
        return
    chosen = metafunc.definition.get_closest_marker("as_cloud")
    marks = [] if chosen else [pytest.mark.slow]
    modes = ["local", pytest.param("as-cloud", marks=marks)]
    metafunc.parametrize("platform", modes, indirect=True, scope="session")
