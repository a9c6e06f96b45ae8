"""The rooms of the package are few, in order, and without circles: counted, as a script counts."""

from __future__ import annotations

from pathlib import Path

import fireworks_training
from tests.structure import folders

PACKAGE = Path(fireworks_training.__file__).parent


def test_the_asyncio_shell_has_few_rooms_in_one_order() -> None:
    shell = folders(PACKAGE)["_async"]
    assert len(shell.arrows) <= 10
    assert 0 < len(shell.floors()) <= 8
    assert sum(map(len, shell.arrows.values())) <= 35


def test_rooms_floors_arrows_and_circles_are_counted(tmp_path: Path) -> None:
    """The count sees what it looks for."""
    root = tmp_path / PACKAGE.name
    files = {
        "__init__.py": f"import {PACKAGE.name}.top",
        "top.py": f"from {PACKAGE.name} import middle, low",
        "middle/__init__.py": "",
        "middle/a.py": f"def f():\n    from {PACKAGE.name}.low import X\n    from . import b",
        "middle/b.py": f"import {PACKAGE.name}.middle.a",
        "low.py": "import low",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    found = folders(root)
    assert found[""].arrows == {"top": {"middle", "low"}, "middle": {"low"}, "low": set()}
    assert found[""].floors() == [{"top"}, {"middle"}, {"low"}]
    assert (found[""].modules, found["middle"].modules) == (2, 2)
    assert found["middle"].arrows == {"a": set(), "b": {"a"}}
    (root / "low.py").write_text(f"from {PACKAGE.name} import top")
    turned = folders(root)[""]
    assert turned.circles() == [{"top", "middle", "low"}]
    assert turned.floors() == []
