"""A class name stands in one module of the package, or has a reason here."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import fireworks_training

PACKAGE = Path(fireworks_training.__file__).parent

SHARED: dict[str, str] = {
    "ControlPlane": "the client of a control plane, and the platform's own part that serves it",
    "FiretitanServiceClient": "the official SDK's class in `compat`, over the one of `_sync`",
    "FiretitanTrainingClient": "the official SDK's class in `compat`, over the one of `_sync`",
}
"""Names that stand in two modules, and why."""

MOST = 12


def class_names(root: Path) -> dict[str, set[str]]:
    """The modules of each class name, at whatever depth in them."""
    homes = defaultdict[str, set[str]](set)
    for path in sorted(root.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                homes[node.name].add(path.relative_to(root).as_posix())
    return homes


def test_a_class_name_stands_in_one_module() -> None:
    shared = {name for name, homes in class_names(PACKAGE).items() if len(homes) > 1}
    assert shared == SHARED.keys()
    assert len(SHARED) <= MOST


def test_a_second_class_of_a_name_is_seen(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "x.py").write_text("def f():\n    class Inner: ...\n")
    assert class_names(tmp_path) == {"Inner": {"a/x.py", "b/x.py"}}
