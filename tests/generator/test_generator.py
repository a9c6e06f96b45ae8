"""The generator of blocking classes, on the `shop` beside this file and on snippets it must refuse.

`shop/_sync` is what it wrote: read it to see what becomes of what.
"""

from __future__ import annotations

import asyncio
import inspect
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from fireworks_training import _generate_sync
from fireworks_training._generate_sync import RENAMED, CannotGenerate, generate, main

SHOP = Path(__file__).parent / "shop"


@pytest.fixture
def till(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The module of the generated `Till` and `Drawer`."""
    monkeypatch.syspath_prepend(str(SHOP.parent))
    yield __import__("shop._sync.till", fromlist=["Till"])
    for name in [name for name in sys.modules if name.partition(".")[0] == "shop"]:
        del sys.modules[name]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A copy of the shop, to be spoilt."""
    return Path(
        shutil.copytree(SHOP, tmp_path / "shop", ignore=shutil.ignore_patterns("__pycache__"))
    )


def pythons() -> list[str]:
    """This interpreter, and those of other supported versions that can be found and start."""
    found = [sys.executable]
    installed = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv")) / "versions"
    for version in ("3.11", "3.12", "3.13", "3.14"):
        named = [shutil.which(f"python{version}") or ""]
        named += map(str, sorted(installed.glob(f"{version}.*/bin/python")))
        found += [python for python in named if python and _starts(python)][:1]
    return found


def _starts(python: str) -> bool:
    return not subprocess.run([python, "-c", ""], capture_output=True, check=False).returncode


class TestWhatIsWritten:
    def test_it_is_what_is_committed(self) -> None:
        for name, text in generate(SHOP).items():
            assert (SHOP / "_sync" / name).read_text("utf-8") == text

    def test_it_is_the_same_under_every_python_that_is_here(self) -> None:
        command = "import sys; sys.path.insert(0, sys.argv[1]); from pathlib import Path\n"
        command += "from _generate_sync import main; sys.exit(main(['--check'], Path(sys.argv[2])))"
        folder = str(Path(_generate_sync.__file__).parent)
        for python in pythons():
            done = subprocess.run(
                [python, "-I", "-B", "-c", command, folder, str(SHOP)],
                capture_output=True,
                text=True,
                check=False,
            )
            assert (done.returncode, done.stdout, done.stderr) == (0, "", ""), python

    def test_each_public_method_has_its_twin_with_the_same_parameters(
        self, till: ModuleType
    ) -> None:
        for twin, source in ((till.Till, till.AsyncTill), (till.Drawer, till.AsyncDrawer)):
            for name, member in vars(source).items():
                public = name in RENAMED or not name.startswith("_")
                if inspect.isfunction(member) and public:
                    mine = inspect.signature(vars(twin)[RENAMED.get(name, name)])
                    assert mine.parameters.keys() == inspect.signature(member).parameters.keys()

    @pytest.mark.parametrize(
        "command",
        [
            ["ruff", "format", "--check", "--line-length", "100", "shop"],
            ["ruff", "check", "--select", "E,F,I,RET,UP", "--line-length", "100", "shop"],
            ["mypy", "--strict", "shop"],
            ["pyright", "--pythonpath", sys.executable],
        ],
        ids=lambda command: " ".join(command[:2]),
    )
    def test_it_passes_the_checkers(self, copied: Path, command: list[str]) -> None:
        settings = copied.parent / "pyrightconfig.json"
        settings.write_text('{"typeCheckingMode": "strict", "include": ["shop"]}')

        def status() -> int:
            whole = [sys.executable, "-m", *command]
            return subprocess.run(
                whole, cwd=settings.parent, capture_output=True, check=False
            ).returncode

        assert status() == 0
        with (copied / "_sync" / "till.py").open("a") as file:
            file.write("SHELVES = unknown  ;LAMPS = 1\n")
        assert status() == 1

    def test_an_internal_constructor_has_no_twin(self, till: ModuleType) -> None:
        assert "__init__" in vars(till.Till)
        assert "__init__" not in vars(till.Drawer)


class TestWhatTheTwinsDo:
    def test_a_constructor_binds(self, till: ModuleType) -> None:
        assert till.Till("corner").bound == 1

    def test_a_classmethod_makes_a_bound_twin_of_its_class(self, till: ModuleType) -> None:
        class Mine(till.Till):  # type: ignore[name-defined, misc]
            pass

        made = Mine.from_config(name="corner", shelves=2)
        assert type(made) is Mine
        assert (made.name, made.bound) == ("corner", 1)

    def test_the_context_manager_enters_and_exits(self, till: ModuleType) -> None:
        with till.Till("corner") as inside:
            assert inside.drawer.till().name == "corner"
        assert inside.drawer is None

    def test_coroutines_block_and_return(self, till: ModuleType) -> None:
        corner = till.Till("corner")
        assert corner.open() is None
        assert corner.count("coins", at_least=7) == 7
        assert corner.first([], "nothing") == "nothing"

    def test_operations_return_futures_in_both_spellings(self, till: ModuleType) -> None:
        corner = till.Till("corner")

        async def on_a_loop() -> tuple[str, str]:
            return await corner.sell("tea"), await (await corner.sell_async("milk"))

        assert corner.sell("bread").result() == "bread sold"
        assert asyncio.run(on_a_loop()) == ("tea sold", "milk sold")

    def test_listed_classes_are_wrapped_and_unwrapped(self, till: ModuleType) -> None:
        corner = till.Till("corner")
        first = corner.create_ledger("1")
        assert type(first).__name__ == "Ledger"
        second = corner.create_ledger("2", first)
        assert second.path == "1/2"
        assert corner.close_ledger(second, successor=second) is True
        assert corner.find_ledger("nowhere") is None
        assert corner.find_ledger("1/2").path == "1/2"
        assert asyncio.run(corner.create_ledger_async("3")).path == "3"

    def test_async_iterators_become_iterators(self, till: ModuleType) -> None:
        corner = till.Till("corner")
        ledger = corner.create_ledger("1")
        for line in "abc":
            ledger.write(line)
        assert list(ledger.read(1)) == ["b", "c"]
        assert list(corner.receipts(up_to=3)) == [0, 1, 2]

    def test_an_iterator_left_early_closes_the_async_one(self, till: ModuleType) -> None:
        ledger = till.Till("corner").create_ledger("1")
        for line in "abc":
            ledger.write(line)
        lines: Any = ledger.read()
        assert next(lines) == "a"
        assert ledger.readers == 1
        lines.close()
        assert ledger.readers == 0


REFUSED = {
    "a result without annotation": ("def f(self):\n        pass", "no annotation of its result"),
    "a parameter without annotation": (
        "def f(self, a) -> None:\n        pass",
        "parameter of no type",
    ),
    "*args": ("def f(self, *args: int) -> None:\n        pass", "parameters without a name"),
    "**kwargs": ("def f(self, **kwargs: int) -> None:\n        pass", "takes any keyword"),
    "positional-only": (
        "def f(self, a: int, /) -> None:\n        pass",
        "parameters without a name",
    ),
    "async property": ("@property\n    async def f(self) -> int:\n        pass", "is decorated"),
    "async classmethod": (
        "@classmethod\n    async def f(cls) -> Self:\n        pass",
        "is decorated",
    ),
    "unknown decorator": ("@cache\n    def f(self) -> int:\n        pass", "is decorated"),
    "setter": ("@f.setter\n    def f(self, value: int) -> None:\n        pass", "is decorated"),
    "staticmethod": ("@staticmethod\n    def f() -> int:\n        pass", "is decorated"),
    "overload": ("@overload\n    def f(self) -> int:\n        pass", "is decorated"),
    "classmethod": ("@classmethod\n    def f(cls) -> int:\n        pass", "makes no instance"),
    "Self": ("def f(self) -> Self:\n        pass", "returns Self"),
    "special method": ("def __len__(self) -> int:\n        pass", "is a special method"),
    "an awaitable": ("def f(self) -> Awaitable[int]:\n        pass", "returns Awaitable"),
    "a coroutine": ("def f(self) -> Coroutine[Any, Any, int]:\n        pass", "returns Coroutine"),
    "an async generator": (
        "async def f(self) -> AsyncGenerator[int]:\n        pass",
        "AsyncGenerator",
    ),
    "a future of a listed class": (
        "def f(self) -> APIFuture[AsyncX]:\n        pass",
        "may stand alone",
    ),
    "listed classes as parameter": (
        "def f(self, a: list[AsyncX]) -> None:\n        pass",
        "stand alone",
    ),
    "a body beside its head": ("def f(self) -> None: ...", "on the line of its head"),
    "a public attribute": ("shelves: int = 3", "make it a property"),
    "a public assignment": ("shelves = alias = 3", "make it a property"),
    "a nested class": ("class Inner: ...", "make it a property"),
    "a conditional method": (
        "if True:\n        def f(self) -> None:\n            pass",
        "make it a property",
    ),
}


def shop_of(folder: Path, source: str, listed: str = '{"x": ["AsyncX"]}') -> Path:
    package = folder / "shop"
    (package / "_async").mkdir(parents=True)
    (package / "_async" / "__init__.py").write_text(f"GENERATE = {listed}\n")
    (package / "_async" / "x.py").write_text(source)
    return package


class TestWhatIsRefused:
    @pytest.mark.parametrize(("member", "why"), REFUSED.values(), ids=REFUSED)
    def test_with_file_and_line(self, tmp_path: Path, member: str, why: str) -> None:
        package = shop_of(tmp_path, f'class AsyncX:\n    """A class."""\n\n    {member}\n')
        with pytest.raises(CannotGenerate, match=rf"x\.py:[45]: .*{why}"):
            generate(package)

    @pytest.mark.parametrize(
        ("source", "why"),
        [
            ("class AsyncX(Base):\n    'Mine.'\n", "x.py:1: AsyncX has a base"),
            ("@final\nclass AsyncX:\n    pass\n", "x.py:2: AsyncX has a keyword or a decorator"),
            ("class AsyncY:\n    pass\n", "x.py:1: has no class AsyncX"),
        ],
    )
    def test_classes(self, tmp_path: Path, source: str, why: str) -> None:
        with pytest.raises(CannotGenerate, match=why):
            generate(shop_of(tmp_path, source))

    def test_a_part_is_refused_with_its_own_file(self, tmp_path: Path) -> None:
        source = "from shop._async.part import Part\n\n\nclass AsyncX(Part):\n    'A class.'\n"
        package = shop_of(tmp_path, source)
        (package / "_async" / "part.py").write_text("class Part:\n    a = 1\n")
        with pytest.raises(CannotGenerate, match=r"part\.py:2: "):
            generate(package)

    @pytest.mark.parametrize(
        ("listed", "why"),
        [
            ('{"y": ["AsyncX"]}', "y.py:1: has no class AsyncX"),
            ("{}\nGENERATE = {}", "__init__.py:1: has no GENERATE"),
            ("{}\ndel GENERATE\n", ""),
        ],
    )
    def test_lists(self, tmp_path: Path, listed: str, why: str) -> None:
        package = shop_of(tmp_path, "class AsyncX:\n    pass\n", listed)
        if why:
            with pytest.raises(CannotGenerate, match=why):
                generate(package)
        else:
            assert generate(package) == {}

    def test_private_members_are_not_looked_at(self, tmp_path: Path) -> None:
        hidden = ("__slots__ = ()", "_a = 1", "def _f(self, *a): ...", "def __repr__(self): ...")
        lines = "\n    ".join(["class AsyncX:", "'''Mine.'''", *hidden])
        package = shop_of(tmp_path, lines)
        assert generate(package)["x.py"].endswith("class X(Blocking[AsyncX]):\n    '''Mine.'''\n")

    def test_the_command_tells(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        package = shop_of(tmp_path, "class AsyncX:\n    a = 1\n")
        assert main([], package) == 1
        assert "x.py:2: " in capsys.readouterr().err
        assert not (package / "_sync").exists()


NAMES = '''"""Further names."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from decimal import Decimal


class Names:
    """Not for users."""

    own: Callable[..., Decimal]

    @property
    @abstractmethod
    def stock(self) -> int: ...

    async def price(self) -> Decimal:
        """The price."""
        return self.own(self._n)
'''
WHOLE = '''"""A whole."""

from __future__ import annotations

from shop._async.names import Names


class AsyncX(Names):
    """A class."""

    _n = 1

    async def own(self) -> int:
        """Its own."""
        return 1
'''


def test_the_further_names_of_a_class_come_last(tmp_path: Path) -> None:
    package = shop_of(tmp_path, WHOLE)
    (package / "_async" / "names.py").write_text(NAMES)
    assert (
        generate(package)["x.py"].partition("from __future__ import annotations\n\n")[2]
        == '''\
from decimal import Decimal

from shop._async.x import AsyncX
from shop._portal import Blocking


class X(Blocking[AsyncX]):
    """A class."""

    def own(self) -> int:
        """Its own."""
        return self._run(self._async.own)

    def price(self) -> Decimal:
        """The price."""
        return self._run(self._async.price)
'''
    )


def test_a_listed_class_declares_nothing_without_defining_it(tmp_path: Path) -> None:
    package = shop_of(tmp_path, "class AsyncX:\n    own: int\n")
    with pytest.raises(CannotGenerate, match=r"x\.py:2: .* make it a property"):
        generate(package)


class TestTheCheck:
    def test_passes_on_what_is_committed(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["--check"], SHOP) == 0
        assert capsys.readouterr().out == ""

    @pytest.mark.parametrize("name", ["till.py", "back/ledger.py", "back/__init__.py"])
    @pytest.mark.parametrize("damage", ["appended", "edited", "removed", "line ends"])
    def test_sees_damage(
        self, copied: Path, capsys: pytest.CaptureFixture[str], name: str, damage: str
    ) -> None:
        path = copied / "_sync" / name
        text = path.read_text("utf-8")
        if damage == "removed":
            path.unlink()
        else:
            changed = {
                "appended": text + "\n",
                "edited": text.replace("twins", "twin"),
                "line ends": text.replace("\n", "\r\n"),
            }
            path.write_bytes(changed[damage].encode())
        assert main(["--check"], copied) == 1
        assert str(path) in capsys.readouterr().out
        assert main([], copied) == 0
        assert path.read_bytes().decode() == text
        assert main(["--check"], copied) == 0

    @pytest.mark.parametrize("name", ["orphan.py", "back/orphan.txt"])
    def test_sees_an_orphan(
        self, copied: Path, capsys: pytest.CaptureFixture[str], name: str
    ) -> None:
        orphan = copied / "_sync" / name
        orphan.write_text("")
        assert main(["--check"], copied) == 1
        assert str(orphan) in capsys.readouterr().out
        assert main([], copied) == 0
        assert not orphan.exists()

    def test_sees_a_change_of_the_source(self, copied: Path) -> None:
        source = copied / "_async" / "till.py"
        source.write_text(
            source.read_text("utf-8").replace("at_least: int = 0", "at_least: int = 1")
        )
        assert main(["--check"], copied) == 1
