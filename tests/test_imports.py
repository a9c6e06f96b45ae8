"""Who may import whom, what is heavy and where, and how long a module and a function may be.

The tables below are the rules. `violations` applies them to any tree, so that each rule has its
negative control: a small tree that breaks it.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

import fireworks_training
from tests.structure import folders

PACKAGE = "fireworks_training"
ROOT = Path(fireworks_training.__file__).parent

CLOSED = {"local", "cli", "testing"}  # nothing imports these
VALUES = {"config", "data", "errors", "evaluation", "events", "futures", "models"}
VALUES |= {"options", "usage"}
"""What is public and needs no loop."""

UNITS = VALUES | {"compat", "rollouts", "losses", "schedules", "tito", "root"}
UNITS |= {
    "_checks",
    "_core",
    "_wire",
    "_async",
    "_sync",
    "_portal",
    "_outcome",
    "_inbox",
    "_perf_metrics",
    "_tinker_types",
}
PEERS = {"compat", "rollouts", "losses"}  # these do not import each other

SHELL = VALUES - {"evaluation"}
SHELL |= {"_checks", "_core", "_wire", "_portal", "_outcome", "_inbox", "_perf_metrics"}
SHELL |= {"_tinker_types"}
"""What every room of `_async` may import."""

PLATFORM = {"_checks", "_wire", "_core", "models", "errors"}
"""What every room of `local` may import."""


def rooms(name: str, common: set[str], **below: str) -> dict[str, set[str]]:
    """Rows of the rooms of a folder: each may import those that are named behind it."""
    names = {room: f"{name}.{room}" for room in below}
    return {
        names[room]: common | {names.get(other, f"{name}.{other}") for other in others.split()}
        for room, others in below.items()
    }


MAY_IMPORT: dict[str, set[str]] = {
    "errors": set(),
    "_checks": {"errors"},
    "config": {"errors", "models", "_checks"},
    "_perf_metrics": set(),
    "models": {"errors", "_perf_metrics"},
    "options": {"errors", "_checks"},
    "events": {"errors", "models"},
    "usage": {"errors", "models"},
    "_inbox": set(),
    "_outcome": {"errors", "_inbox"},
    "futures": {"errors", "models", "_outcome"},
    "data": {"errors", "models", "_checks"},
    "evaluation": {"errors", "models"},
    "_core": {"errors", "models", "_core.waits", "_core.window"},
    "_core.waits": set(),
    "_core.window": {"errors", "models", "_checks"},
    "_wire": {"errors", "models"},
    "_wire.completions": {"errors", "models", "options", "_checks", "_perf_metrics", "_wire"},
    "_wire.training": {"errors", "models", "_wire"},
    "_tinker_types": {"errors", "models"},
    "_portal": {"errors", "futures", "_outcome", "_inbox"},
    # A file beside the rooms is the service's.
    "_async": SHELL | {"_async"},
    **rooms(
        "_async",
        SHELL,
        runtime="",
        http="runtime",
        control_plane="http runtime",
        platform="control_plane http runtime",
        resources="platform control_plane http runtime",
        sampling="http runtime",
        weights="sampling resources platform control_plane http runtime",
        training="weights sampling resources platform control_plane http runtime",
    ),
    "_sync": VALUES - {"data", "evaluation"} | {"_async", "_portal"},
    "testing": {"_core.window", "_wire.completions", "_wire.training", "models", "errors"},
    "schedules": {"errors"},
    "compat": UNITS - PEERS,
    "rollouts": UNITS - PEERS,
    "losses": UNITS - PEERS,
    "dropin": {"root", "compat", "errors", "_tinker_types"},
    # A server for agents over the public sampler: it samples like any user, and knows the names of
    # sampling options.
    "tito": {"_checks", "_wire", "models", "errors", "_async.runtime", "tito"},
    **rooms(
        "tito",
        {"_checks", "_wire", "models", "errors", "_async.runtime"},
        values="",
        rendering="values",
        evidence="rendering values",
        turns="evidence rendering values",
    ),
    "cli": {"root", "compat", "config", "models", "errors"},
    "local": PLATFORM | {"local.processes", "local.settings"},
    **rooms(
        "local",
        PLATFORM,
        limits="",
        engine_frames="",
        results="",
        settings="limits",
        store="",
        pretraining="",
        pretrain="pretraining",
        model="store settings limits",
        processes="settings limits",
        engine="model store engine_frames",
        trainer="trainer",
        gateway="gateway model processes store settings limits results engine_frames",
    ),
    **rooms(
        "local.trainer",
        PLATFORM | {"local.model", "local.store", "local.results"},
        settings="",
        queue="",
        wire="queue",
        run="wire queue settings",
    ),
    **rooms(
        "local.gateway",
        PLATFORM
        | {"local.model", "local.processes", "local.store", "local.settings", "local.limits"}
        | {"local.results", "local.engine_frames"},
        web="",
        inference="web",
        control_plane="inference web",
        tinker="control_plane inference web",
        faults="control_plane web",
        cloud="control_plane web",
    ),
    "root": UNITS,
    "_generate_sync": set(),
}
"""Parts of the package, and what each may import beside itself; a part of a part has its own row.
"""

MAY_IMPORT["local.trainer"] |= MAY_IMPORT["local.trainer.run"]

TENSOR_ROOMS = {"local.model", "local.trainer", "local.engine", "local.store.deltas"}
TENSOR_ROOMS |= {"local.pretrain", "local.pretraining"}
TENSOR_ROOMS |= (TENSOR_LOSSES := {"losses.tensors", "losses.library"})
DEMO = {"cli.demo", "cli.demo_loop"}
LIBRARIES: dict[str, tuple[set[str], set[str]]] = {
    "torch": (
        TENSOR_ROOMS,
        {"local.store.snapshots", "_async.training.custom_loss", "losses", *DEMO},
    ),
    "transformers": (TENSOR_ROOMS, {"_async.platform.tokenizers", *DEMO}),
    "peft": (TENSOR_ROOMS, set()),
    "safetensors": (TENSOR_ROOMS, {"local.store.snapshots"}),
    "tinker": (
        {"_tinker_types"},
        {"_async", "data", "compat", "dropin", "rollouts", "losses", *DEMO},
    ),
    "matplotlib": (set(), {"cli"}),
    "click": ({"cli", "local.pretrain"}, set()),
    "rich": ({"cli"}, {"_async"}),
    "pickle": ({"errors"}, set()),
    "multiprocessing": (set(), set()),
}
"""Where a library may be imported at the top, and where only inside functions."""

FORBIDDEN = {"_core": {"asyncio", "aiohttp", "anyio", "time", "threading"}}
FORBIDDEN["_wire"] = FORBIDDEN["_core"]
"""What a part may not import at all: decisions know neither loops nor sockets nor clocks."""

HEAVY = {"torch", "transformers", "tinker", "peft", "rich", "click", "matplotlib"}
LIGHT = {"local.gateway": HEAVY, "local.processes.supervisor": HEAVY, "local.__main__": HEAVY}
LIGHT |= dict.fromkeys({row.partition(".")[0] for row in MAY_IMPORT} - CLOSED, HEAVY)
del LIGHT["_tinker_types"]
"""What the import of a part may not load, through whatever chain."""

MODULE_LINES = 500
SIDE_BY_SIDE, IN_THE_ROOT = 18, 16
FUNCTION_LINES = 60
FRIENDS = {"_async.runtime.loop_watch"}
"""Where pyright may be told to pass over a private name: the frames of other threads, in `sys`."""

READS, READER = {"environ", "environb", "getenv"}, "config.endpoint"
DYNAMIC = ("importlib.import_module('", "import_module('", "__import__('")


@dataclass(frozen=True)
class Import:
    """One name imported from somewhere, and whether inside a function."""

    line: int
    target: str
    inside: bool


class Module:
    """A parsed module; `name` is relative to the package, "root" for the package itself."""

    def __init__(self, root: Path, path: Path) -> None:
        parts = path.relative_to(root).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        self.name = ".".join(parts) or "root"
        self.unit = parts[0] if parts else "root"
        self.place = next(filter(MAY_IMPORT.__contains__, _outwards(self.name)), self.name)
        self.path = path.relative_to(root.parent)
        self.text = path.read_text("utf-8")
        self.tree = ast.parse(self.text)
        self.imports = list(_imports(self.tree))


def _outwards(name: str) -> Iterator[str]:
    """A dotted name and those of the folders around it, the innermost first."""
    while name:
        yield name
        name = name.rpartition(".")[0]


def _imports(node: ast.AST, inside: bool = False) -> Iterator[Import]:
    """All imports below a node, but for those that only type checkers see."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import(child.lineno, alias.name, inside) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            source = "." * child.level + (child.module or "")
            yield from (Import(child.lineno, f"{source}.{n.name}", inside) for n in child.names)
        elif isinstance(child, ast.Call) and ast.unparse(child).startswith(DYNAMIC):
            yield Import(child.lineno, str(ast.literal_eval(child.args[0])), inside)
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            yield from _imports(ast.Module(child.orelse, []), inside)
        else:
            is_function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _imports(child, inside or is_function)


def _within(module: str, places: set[str]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)


class Tree:
    """All modules of a package."""

    def __init__(self, root: Path) -> None:
        paths = sorted(path for path in root.rglob("*.py") if "__pycache__" not in path.parts)
        self.modules = {module.name: module for module in (Module(root, p) for p in paths)}
        self.units = {module.unit for module in self.modules.values()}

    def home(self, target: str) -> str | None:
        """The module of the package that an import reaches; None for other libraries."""
        if target.partition(".")[0] != PACKAGE:
            return None
        name = target.removeprefix(PACKAGE).removeprefix(".")
        while name and name not in self.modules:
            name = name.rpartition(".")[0]
        return name or "root"

    def loads(self, module: str, seen: set[str]) -> set[str]:
        """The libraries that importing a module loads: its own and those of what it imports."""
        if module in seen:
            return set()
        parents = module.rpartition(".")[0]
        libraries = self.loads(parents, seen) if parents in self.modules else set[str]()
        seen.add(module)
        for found in self.modules[module].imports:
            home = self.home(found.target)
            if not found.inside:
                top = found.target.partition(".")[0]
                libraries |= self.loads(home, seen) if home is not None else {top}
        return libraries


def violations(root: Path) -> list[str]:
    """Everything in the package at `root` that breaks a rule."""
    tree = Tree(root)
    checks = (_directions, _libraries, _closures, _environment, _sizes, _friends)
    return [line for check in checks for line in check(tree)] + list(_shapes(root))


def _shapes(root: Path) -> Iterator[str]:
    """Folders with too many modules side by side, and circles, typing-only imports included."""
    for name, folder in folders(root).items():
        place = name or PACKAGE
        if folder.modules > (SIDE_BY_SIDE if name else IN_THE_ROOT):
            yield f"{place}: has {folder.modules} modules side by side"
        for circle in folder.circles():
            yield f"{place}: {' and '.join(sorted(circle))} import each other in a circle"


def _directions(tree: Tree) -> Iterator[str]:
    for module in tree.modules.values():
        if module.place not in MAY_IMPORT:
            yield f"{module.path}:1: {module.unit} has no row in the table"
            continue
        for found in module.imports:
            where = f"{module.path}:{found.line}"
            if found.target.startswith("."):
                yield f"{where}: relative import"
            home = tree.home(found.target)
            if home is None:
                continue
            unit, place = tree.modules[home].unit, tree.modules[home].place
            allowed = MAY_IMPORT[module.place] | {module.place}
            if allowed.isdisjoint(_outwards(place)):
                yield f"{where}: {module.place} may not import {place}"
            if unit == "_tinker_types" and not found.inside:
                yield f"{where}: _tinker_types is imported only inside functions"


def _libraries(tree: Tree) -> Iterator[str]:
    for module in tree.modules.values():
        for found in module.imports:
            library = found.target.partition(".")[0]
            where = f"{module.path}:{found.line}"
            if library in FORBIDDEN.get(module.unit, ()):
                yield f"{where}: {module.unit} may not import {library}"
            top, in_functions = LIBRARIES.get(library, ({module.unit}, set[str]()))
            if not _within(module.name, top):
                if not _within(module.name, in_functions):
                    yield f"{where}: {library} may not be imported here"
                elif not found.inside:
                    yield f"{where}: {library} may be imported only inside functions here"


def _closures(tree: Tree) -> Iterator[str]:
    for module in tree.modules.values():
        for part, forbidden in LIGHT.items():
            if _within(module.name, {part}) and not _within(module.name, TENSOR_LOSSES):
                heavy = tree.loads(module.name, set()) & forbidden
                yield from (f"{module.path}:1: importing it loads {name}" for name in sorted(heavy))


def _environment(tree: Tree) -> Iterator[str]:
    for module in tree.modules.values():
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Attribute) and node.attr in READS and module.name != READER:
                yield f"{module.path}:{node.lineno}: reads the environment"


def _friends(tree: Tree) -> Iterator[str]:
    for module in tree.modules.values():
        for number, line in enumerate(module.text.split("\n"), 1):
            if "reportPrivateUsage" in line and module.name not in FRIENDS:
                yield f"{module.path}:{number}: uses what is another's own"


def _height(node: ast.stmt) -> int:
    return (node.end_lineno or 0) - node.lineno + 1


def _documentation(node: ast.AST) -> int:
    """Lines of docstrings in a node and below it."""
    documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
    nodes = (child for child in ast.walk(node) if isinstance(child, documented))
    return sum(_height(child.body[0]) for child in nodes if ast.get_docstring(child))


def _sizes(tree: Tree) -> Iterator[str]:
    for module in tree.modules.values():
        if module.unit == "_sync":  # generated code is read where it comes from
            continue
        if (lines := module.text.count("\n") - _documentation(module.tree)) >= MODULE_LINES:
            yield f"{module.path}:1: has {lines} lines without docstrings"
        for node in ast.walk(module.tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                size = _height(node) - _documentation(node)
                if size >= FUNCTION_LINES:
                    yield f"{module.path}:{node.lineno}: {node.name} has {size} lines of code"


def test_the_package_keeps_the_rules() -> None:
    assert violations(ROOT) == []


LONG = "\n".join(f"    a = {n}" for n in range(FUNCTION_LINES))
BROKEN = {
    "direction": (
        {"errors.py": "import fireworks_training.models"},
        "errors may not import models",
    ),
    "direction, by name": (
        {"_core/x.py": "from fireworks_training import futures", "futures.py": ""},
        "_core may not import futures",
    ),
    "direction, inside a function": (
        {"_wire/x.py": "def f():\n    from fireworks_training._core.y import z", "_core/y.py": ""},
        "_wire may not import _core",
    ),
    "direction, in a branch": (
        {"local/x.py": "try:\n    import fireworks_training\nexcept ImportError:\n    raise"},
        "local may not import root",
    ),
    "direction, dynamic": (
        {
            "cli/x.py": "def f():\n    importlib.import_module('fireworks_training.local.y')",
            "local/y.py": "",
        },
        "cli may not import local",
    ),
    "closed": ({"__init__.py": "import fireworks_training.testing"}, "root may not import testing"),
    "test servers on the shell": (
        {"testing/x.py": "import fireworks_training._async.y", "_async/y.py": ""},
        "testing may not import _async",
    ),
    "options on the shell": (
        {"options.py": "import fireworks_training.config", "config.py": ""},
        "options may not import config",
    ),
    "not only for type checkers": (
        {"errors.py": "if TYPE_CHECKING:\n    pass\nelse:\n    import fireworks_training.models"},
        "errors may not import models",
    ),
    "peers": (
        {"compat.py": "import fireworks_training.losses", "losses.py": ""},
        "compat may not import losses",
    ),
    "the generator": (
        {"_generate_sync.py": "import fireworks_training.errors"},
        "_generate_sync may not import errors",
    ),
    "no row": ({"helpers.py": ""}, "helpers has no row"),
    "relative": ({"_core/x.py": "from .y import z"}, "relative import"),
    "tinker types at the top": (
        {"_async/x.py": "import fireworks_training._tinker_types", "_tinker_types.py": ""},
        "_tinker_types is imported only inside functions",
    ),
    "tinker at the top": ({"_async/x.py": "import tinker"}, "tinker may be imported only inside"),
    "tinker in the platform": (
        {"local/x.py": "def f():\n    import tinker"},
        "tinker may not be imported here",
    ),
    "torch at the top": (
        {"_async/training/custom_loss.py": "from torch import nn"},
        "torch may be imported only inside",
    ),
    "torch elsewhere": (
        {"_async/x.py": "def f():\n    import torch.nn"},
        "torch may not be imported here",
    ),
    "matplotlib at the top": (
        {"cli/x.py": "import matplotlib.pyplot as plt"},
        "matplotlib may be imported only inside",
    ),
    "matplotlib elsewhere": (
        {"local/x.py": "def f():\n    import matplotlib"},
        "matplotlib may not be imported here",
    ),
    "multiprocessing": ({"local/x.py": "import multiprocessing.queues"}, "multiprocessing may not"),
    "pickle": ({"local/x.py": "import pickle"}, "pickle may not"),
    "a clock among decisions": ({"_core/x.py": "from time import time"}, "may not import time"),
    "a loop among decisions": ({"_wire/x.py": "import asyncio"}, "may not import asyncio"),
    "torch in the gateway, through others": (
        {
            "local/gateway/x.py": "from fireworks_training.local import y",
            "local/y.py": "from fireworks_training.local.model.model import Model",
            "local/model.py": "import torch",
        },
        "gateway/x.py:1: importing it loads torch",
    ),
    "torch in the gateway, through a package": (
        {
            "local/gateway/x.py": "import fireworks_training.local.engine.frames",
            "local/engine/__init__.py": "import torch",
            "local/engine/frames.py": "",
        },
        "gateway/x.py:1: importing it loads torch",
    ),
    "environment": ({"local/x.py": "import os\nos.environ['A']"}, "x.py:2: reads the environment"),
    "a friend": (
        {"_async/x.py": "a._b  # pyright: ignore[reportPrivateUsage]"},
        "x.py:1: uses what is another's own",
    ),
    "a long module": ({"models.py": "\n" * MODULE_LINES}, "has 500 lines"),
    "a room that looks up": (
        {
            "_async/http/x.py": "def f():\n    from fireworks_training._async.sampling import y",
            "_async/sampling/y.py": "",
        },
        "_async.http may not import _async.sampling",
    ),
    "a room that looks at the hall": (
        {
            "_async/weights/x.py": "from fireworks_training._async.service import y",
            "_async/service.py": "",
        },
        "_async.weights may not import _async",
    ),
    "rooms of the gateway": (
        {
            "local/gateway/web/x.py": "from fireworks_training.local.gateway.tinker import y",
            "local/gateway/tinker/y.py": "",
        },
        "local.gateway.web may not import local.gateway.tinker",
    ),
    "rooms of the trainer": (
        {
            "local/trainer/queue/x.py": "from fireworks_training.local.trainer.run import y",
            "local/trainer/run/y.py": "",
        },
        "local.trainer.queue may not import local.trainer.run",
    ),
    "rooms of the agents' server": (
        {
            "tito/values/x.py": "from fireworks_training.tito.turns import y",
            "tito/turns/y.py": "",
        },
        "tito.values may not import tito.turns",
    ),
    "decisions on the window and on waits": (
        {
            "_core/waits/x.py": "import fireworks_training._core.window.y",
            "_core/window/y.py": "",
        },
        "_core.waits may not import _core.window",
    ),
    "a circle, for type checkers only": (
        {
            "_core/x.py": "from fireworks_training._core.y import Y",
            "_core/y.py": "if TYPE_CHECKING:\n    from fireworks_training._core.x import X",
        },
        "x and y import each other in a circle",
    ),
    "a long circle": (
        {
            "_core/x.py": "import fireworks_training._core.y",
            "_core/y.py": "import fireworks_training._core.z",
            "_core/z.py": "import fireworks_training._core.x",
        },
        "x and y and z import each other in a circle",
    ),
    "a hall": ({f"_core/x{n}.py": "" for n in range(19)}, "_core: has 19 modules side by side"),
    "a long function": ({"models.py": f"async def f():\n{LONG}\n"}, "f has 61 lines"),
}
ALLOWED = {
    "for type checkers": {
        "_core/x.py": "if TYPE_CHECKING:\n    import torch\n    import fireworks_training.config",
        "config.py": "",
    },
    "inside functions": {"_async/training/custom_loss.py": "def f():\n    import torch, tinker"},
    "rooms below": {
        "_async/training/x.py": "from fireworks_training._async.weights import y",
        "_async/weights/y.py": "from fireworks_training._async.sampling import z",
        "_async/sampling/z.py": "",
    },
    "a full folder": {f"_core/x{n}.py": "" for n in range(18)},
    "a module long by its docstrings": {"models.py": '"""A.' + "\n" * MODULE_LINES + '"""\n'},
    "a long docstring": {"models.py": f'def f():\n    """A.\n{LONG}\n    """\n'},
    "long generated code": {"_sync/x.py": f"def f():\n{LONG}\n"},
    "a long generated module": {"_sync/x.py": "\n" * MODULE_LINES},
    "the root": {"_async/x.py": "", "__init__.py": "import fireworks_training._async.x"},
    "a later loading of what is heavy": {
        "local/gateway/x.py": "def f():\n    import fireworks_training.local.model.model",
        "local/model.py": "import torch",
    },
}


def tree_of(folder: Path, files: dict[str, str]) -> Path:
    root = folder / PACKAGE
    for name, text in {
        "errors.py": "",
        "models.py": "",
        "testing/__init__.py": "",
        **files,
    }.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (root / "__init__.py").touch()
    return root


@pytest.mark.parametrize(("files", "message"), BROKEN.values(), ids=BROKEN)
def test_a_tree_that_breaks_a_rule_is_caught(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    assert message in "\n".join(violations(tree_of(tmp_path, files)))


@pytest.mark.parametrize("files", ALLOWED.values(), ids=ALLOWED)
def test_a_tree_that_keeps_the_rules_passes(tmp_path: Path, files: dict[str, str]) -> None:
    assert violations(tree_of(tmp_path, files)) == []
