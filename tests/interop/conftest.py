"""Interpreters with the official SDKs, and a platform whose key they take."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.conftest import RunningPlatform, running_platform
from tests.interop.environments import interpreter

OFFICIAL_KEY = "fw_interop_test_key"


@pytest.fixture(scope="session")
def official_python() -> str:
    """An interpreter that has the official Fireworks training SDK."""
    return interpreter("official")


@pytest.fixture(scope="session")
def official_platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningPlatform]:
    """A platform with a key as the official SDK wants it: it refuses those that begin with tml-."""
    state = tmp_path_factory.mktemp("official")
    with running_platform(state, "--api-key", OFFICIAL_KEY) as running:
        yield running
