"""Finds the types of this package that public signatures mention and users can't import.

A signature is public if it is a public method, constructor or field of a class that the root
exports, or a function that it exports. Each class or alias in it has to be exported too, and has to
stand in a module whose path has no underscore; but classes with behaviour may live in a private
room, where their code belongs. Names that exist only for type checkers are abbreviations: what they
are made of counts. Nothing is imported: the sources are read.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
Definition = ast.ClassDef | Function | ast.Assign | ast.AnnAssign
Place = tuple[str, str]  # module, name


@dataclass
class Source:
    """The names of a module: what it defines, what it imports, and what only checkers see."""

    defined: dict[str, Definition] = field(default_factory=dict)
    imported: dict[str, Place] = field(default_factory=dict)
    for_checkers: set[str] = field(default_factory=set)


def _read(path: Path) -> Source:
    source = Source()
    tree = ast.parse(path.read_text("utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                source.imported[alias.asname or alias.name] = (node.module, alias.name)
    for node in tree.body:
        checked = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for one in node.body if checked and isinstance(node, ast.If) else [node]:
            for name in _bound(one):
                assert isinstance(one, Definition)
                source.defined[name] = one
                if checked:
                    source.for_checkers.add(name)
    return source


def _bound(node: ast.stmt) -> list[str]:
    if isinstance(node, ast.ClassDef | Function):
        return [node.name]
    if not isinstance(node, ast.Assign | ast.AnnAssign):
        return []
    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
    return [target.id for target in targets if isinstance(target, ast.Name)]


class Package:
    """The sources of a package.

    Args:
        root: its folder.
        doors: modules whose `__all__` counts as exported.
        made_inside: classes that users never construct: their constructors don't count.
        rooms: classes that may live in a private module.
        exempt: names that may be missing.
    """

    def __init__(
        self,
        root: Path,
        doors: tuple[str, ...] = ("",),
        made_inside: frozenset[str] = frozenset(),
        rooms: frozenset[str] = frozenset(),
        exempt: frozenset[str] = frozenset(),
    ) -> None:
        self.name = root.name
        self.sources: dict[str, Source] = {}
        for path in sorted(root.rglob("*.py")):
            parts = path.relative_to(root.parent).with_suffix("").parts
            self.sources[".".join(parts).removesuffix(".__init__")] = _read(path)
        self.made_inside = {f"{name}.__init__" for name in made_inside}
        self.rooms, self.exempt = rooms, exempt
        self.exported = {
            name for door in doors for name in self._all(f"{self.name}.{door}".rstrip("."))
        }

    def _all(self, module: str) -> list[str]:
        node = self.sources[module].defined["__all__"]
        assert isinstance(node, ast.Assign)
        names: list[str] = ast.literal_eval(node.value)
        return names

    def missing(self) -> list[str]:
        """The types that users can't import, and where each is mentioned first."""
        found: dict[str, str] = {}
        for name in self._all(self.name):
            if (place := self._home(self.name, name)) is not None:
                for where, module, annotation in self._signatures(*place):
                    for used in self._types(module, annotation):
                        if (problem := self._problem(used)) is not None:
                            found.setdefault(problem, where)
        return [f"{where}: {problem}" for problem, where in sorted(found.items())]

    def _problem(self, place: Place) -> str | None:
        module, name = place
        if name in self.exempt:
            return None
        if name not in self.exported:
            return f"{name} of {module} is not exported"
        if name not in self.rooms and "._" in module:
            return f"{name} stands in {module}"
        return None

    def _home(self, module: str, name: str) -> Place | None:
        """The module of the package that defines a name; None for names of other libraries."""
        source = self.sources.get(module)
        if source is None:
            return None
        if name in source.defined:
            return module, name
        return self._home(*source.imported[name]) if name in source.imported else None

    def _signatures(self, module: str, name: str) -> Iterator[tuple[str, str, ast.expr]]:
        node = self.sources[module].defined[name]
        if isinstance(node, Function):
            yield from _annotations(name, module, node)
        if not isinstance(node, ast.ClassDef):
            return
        seen: set[str] = set()
        for home, part in self._classes(module, node):
            for member in part.body:
                names = [member.name] if isinstance(member, Function) else _bound(member)
                public = names and (names[0] == "__init__" or not names[0].startswith("_"))
                if not public or names[0] in seen:
                    continue
                seen.add(names[0])
                where = f"{name}.{names[0]}"
                if isinstance(member, ast.AnnAssign):
                    yield where, home, member.annotation
                elif isinstance(member, Function) and where not in self.made_inside:
                    yield from _annotations(where, home, member)

    def _classes(self, module: str, node: ast.ClassDef) -> Iterator[tuple[str, ast.ClassDef]]:
        """A class and its bases in the package, the class first."""
        yield module, node
        for base in node.bases:
            place = self._home(module, ast.unparse(base).partition("[")[0])
            above = self.sources[place[0]].defined[place[1]] if place else None
            if place and isinstance(above, ast.ClassDef):
                yield from self._classes(place[0], above)

    def _types(self, module: str, annotation: ast.expr) -> Iterator[Place]:
        """The classes and aliases of the package in an annotation, type variables aside."""
        for node in ast.walk(annotation):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                if node.value.isidentifier():
                    yield from self._types(module, ast.Name(node.value))
            elif isinstance(node, ast.Name) and (place := self._home(module, node.id)):
                definition = self.sources[place[0]].defined[place[1]]
                value = getattr(definition, "value", None)
                if isinstance(value, ast.Call) and ast.unparse(value.func).startswith("TypeVar"):
                    continue
                if place[1] in self.sources[place[0]].for_checkers and value is not None:
                    yield from self._types(place[0], value)
                else:
                    yield place


def _annotations(where: str, module: str, node: Function) -> Iterator[tuple[str, str, ast.expr]]:
    given = node.args
    arguments = [*given.posonlyargs, *given.args, *given.kwonlyargs, given.vararg, given.kwarg]
    annotations = [argument.annotation for argument in arguments if argument is not None]
    yield from ((where, module, one) for one in (*annotations, node.returns) if one is not None)
