"""The blocking classes of the package are what the generator writes today, and whole.

The generator's own tests, with everything it accepts and refuses, stand in `tests/generator`.
"""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import fireworks_training
from fireworks_training._async import GENERATE
from fireworks_training._generate_sync import RENAMED, generate, main
from fireworks_training._portal import Blocking

PACKAGE = Path(fireworks_training.__file__).parent
LISTED = [(module, name) for module, names in GENERATE.items() for name in names]


def pair(module: str, name: str) -> tuple[type[Any], type[Any]]:
    """The async class and its twin."""
    classes = (
        getattr(importlib.import_module(f"fireworks_training.{part}.{module}"), class_name)
        for part, class_name in (("_async", name), ("_sync", name.removeprefix("Async")))
    )
    source, twin = classes
    return source, twin


def untwinned(source: type[Any], twin: type[Any]) -> Iterator[str]:
    """Public members of the async class that the twin lacks, or has with other parameters."""
    for name in dir(source):
        member = inspect.getattr_static(source, name)
        twin_name = RENAMED.get(name, name)
        if name.startswith("_") and name not in RENAMED:
            continue
        mine = inspect.getattr_static(twin, twin_name, None)
        if type(mine) is not type(member):
            yield name
        elif not isinstance(member, property):
            callables = (getattr(member, "__func__", member), getattr(mine, "__func__", mine))
            theirs, ours = (inspect.signature(f).parameters.values() for f in callables)
            shape = [[(p.name, p.kind, p.default) for p in of] for of in (theirs, ours)]
            if shape[0] != shape[1]:
                yield name


def test_the_files_are_what_the_generator_writes(capsys: pytest.CaptureFixture[str]) -> None:
    status = main(["--check"])
    assert (capsys.readouterr().out, status) == ("", 0)


def test_there_is_no_other_file() -> None:
    folder = PACKAGE / "_sync"
    files = {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}
    assert files == generate(PACKAGE).keys()


@pytest.mark.parametrize(("module", "name"), LISTED)
def test_each_public_member_has_its_twin(module: str, name: str) -> None:
    source, twin = pair(module, name)
    assert list(untwinned(source, twin)) == []
    assert issubclass(twin, Blocking)


def test_a_lost_or_changed_twin_would_be_seen() -> None:
    class Source:
        def lost(self) -> int:
            return 1

        async def changed(self, a: int = 1) -> int:
            return a

        async def kept(self, *, b: int) -> int:
            return b

    class Twin:
        def changed(self, a: int = 2) -> int:
            return a

        def kept(self, *, b: int) -> int:
            return b

    assert list(untwinned(Source, Twin)) == ["changed", "lost"]


@pytest.mark.parametrize(("module", "name"), LISTED)
def test_nothing_in_a_twin_is_left_to_await_by_surprise(module: str, name: str) -> None:
    _, twin = pair(module, name)
    members = {n: inspect.getattr_static(twin, n) for n in vars(twin)}
    awaited = {n for n, member in members.items() if inspect.iscoroutinefunction(member)}
    assert awaited == {n for n in members if n.endswith("_async") and not n.startswith("_")}
