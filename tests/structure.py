"""Counts the rooms of a folder of the package, and the imports between them.

    python -m tests.structure              the table of all folders
    python -m tests.structure _async       one folder: its floors, from the top, and its arrows

A room is a module or a package that stands in the folder (`__init__` is the folder itself). An
arrow is one room that imports from another, wherever in it, also inside functions and for type
checkers only. A room's floor is the length of the longest chain of arrows below it; a circle is a
group of rooms that reach one another.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

PACKAGE = "fireworks_training"


@dataclass(frozen=True, slots=True)
class Folder:
    """The rooms of one folder.

    Attributes:
        name: dotted, relative to the package; empty for the package itself.
        arrows: for each room, the rooms of the same folder that it imports.
        modules: how many of the rooms are modules, not packages.
    """

    name: str
    arrows: dict[str, set[str]] = field(default_factory=dict)
    modules: int = 0

    def circles(self) -> list[set[str]]:
        """Groups of rooms that reach one another."""
        reached = {room: self._reached(room) for room in self.arrows}
        groups = [
            {other for other in reached[room] if room in reached[other]} for room in self.arrows
        ]
        return [
            group for n, group in enumerate(groups) if len(group) > 1 and group not in groups[:n]
        ]

    def _reached(self, room: str) -> set[str]:
        seen: set[str] = set()
        todo = [room]
        while todo:
            for other in self.arrows[todo.pop()] - seen:
                seen.add(other)
                todo.append(other)
        return seen

    def floors(self) -> list[set[str]]:
        """The rooms by floor, from the top; a folder with a circle has none."""
        if self.circles():
            return []
        floors: list[set[str]] = []
        rest = dict(self.arrows)
        while rest:
            lowest = {room for room, below in rest.items() if not below & rest.keys()}
            floors.insert(0, lowest)
            rest = {room: below for room, below in rest.items() if room not in lowest}
        return floors


def imported(path: Path) -> Iterator[str]:
    """The dotted names that a module imports, everywhere in it."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def folders(root: Path) -> dict[str, Folder]:
    """Every folder of the package that has modules, by its dotted name."""
    paths = [path for path in sorted(root.rglob("*.py")) if "__pycache__" not in path.parts]
    found: dict[str, Folder] = {}
    for path in paths:
        parts = path.relative_to(root).with_suffix("").parts
        for depth in range(len(parts)):
            folder = found.setdefault(".".join(parts[:depth]), Folder(".".join(parts[:depth])))
            if parts[depth] != "__init__":
                folder.arrows.setdefault(parts[depth], set())
    for name, folder in found.items():
        place = root.joinpath(*name.split("."))
        modules = sum((place / f"{room}.py").is_file() for room in folder.arrows)
        found[name] = Folder(name, folder.arrows, modules)
    for path in paths:
        mine = path.relative_to(root).with_suffix("").parts
        for target in imported(path):
            theirs = target.split(".")
            if theirs[0] == root.name:
                _note(found, mine, theirs[1:])
    return found


def _note(found: dict[str, Folder], mine: tuple[str, ...], theirs: list[str]) -> None:
    """Count an import where the ways of the two modules part."""
    depth = 0
    while depth < min(len(mine), len(theirs)) and mine[depth] == theirs[depth]:
        depth += 1
    if depth < min(len(mine), len(theirs)) and mine[depth] != "__init__":
        folder = found[".".join(mine[:depth])]
        if theirs[depth] in folder.arrows:
            folder.arrows[mine[depth]].add(theirs[depth])


def main(arguments: list[str]) -> None:
    """Print the table, or one folder."""
    found = folders(Path(__file__).parent.parent / PACKAGE)
    if arguments:
        folder = found[arguments[0]]
        for number, rooms in enumerate(folder.floors()):
            print(f"{len(folder.floors()) - number}: {', '.join(sorted(rooms))}")
        for room, below in sorted(folder.arrows.items()):
            print(f"{room} -> {', '.join(sorted(below)) or '-'}")
        print(*(f"circle: {', '.join(sorted(circle))}" for circle in folder.circles()), sep="\n")
        return
    print(f"{'folder':32} {'rooms':>5} {'modules':>7} {'floors':>6} {'arrows':>6} {'circles':>7}")
    for name, folder in sorted(found.items()):
        arrows = sum(map(len, folder.arrows.values()))
        counts = (len(folder.arrows), folder.modules, len(folder.floors()), arrows)
        row = " ".join(f"{n:>{w}}" for n, w in zip(counts, (5, 7, 6, 6), strict=True))
        print(f"{name or PACKAGE:32} {row} {len(folder.circles()):>7}")


if __name__ == "__main__":
    main(sys.argv[1:])
