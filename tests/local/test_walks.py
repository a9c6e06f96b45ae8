"""The walks in the docstrings of the platform's rooms name modules and functions that exist."""

from __future__ import annotations

import pkgutil
import pydoc
import re
from importlib import import_module

import pytest

LOCAL = "fireworks_training.local"
ROOMS = ("engine", "trainer", "processes")


def unresolved(room: str, text: str) -> list[str]:
    """Dotted names in backticks that are neither in the room nor in the platform."""
    package = import_module(f"{LOCAL}.{room}")
    places = [LOCAL, "fireworks_training", package.__name__]
    places += [found.name for found in pkgutil.walk_packages(package.__path__, f"{places[2]}.")]
    names = re.findall(r"`([A-Za-z_]\w*(?:\.\w+)+)`", text)
    return [n for n in names if not any(pydoc.locate(f"{place}.{n}") for place in places)]


@pytest.mark.parametrize("room", ROOMS)
def test_a_walk_names_what_exists(room: str) -> None:
    assert unresolved(room, import_module(f"{LOCAL}.{room}").__doc__ or "") == []


def test_a_name_that_is_gone_is_found() -> None:
    text = "`core.Engine.tick`, `core.Engine.tock`, `no_such_module.Engine`, `Engine.tick`"
    assert unresolved("engine", text) == ["core.Engine.tock", "no_such_module.Engine"]
