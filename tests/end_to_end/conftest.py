"""Runs each test twice: on the platform as it is, and on one that stands in for a cloud.

On the second no extension is offered. A test whose promise leans on one names it in a marker,
`@pytest.mark.extension("snapshot")`, and asserts there (`platform.as_cloud`) what a user gets
without it. The fast stage runs as a cloud only tests marked `as_cloud`; the slow stage all.
"""

from __future__ import annotations

import pytest


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Give each test that uses the shared platform both modes."""
    if "platform" not in metafunc.fixturenames:
        return
    chosen = metafunc.definition.get_closest_marker("as_cloud")
    marks = [] if chosen else [pytest.mark.slow]
    modes = ["local", pytest.param("as-cloud", marks=marks)]
    metafunc.parametrize("platform", modes, indirect=True, scope="session")
