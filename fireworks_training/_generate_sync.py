"""Writes `_sync/`: for every class that `_async/__init__.py` lists, the twin that blocks.

    python -m fireworks_training._generate_sync            writes the files, removes orphans
    python -m fireworks_training._generate_sync --check    exit status 1 if that would change any

The twin `X` of `AsyncX` holds one in `_async`, and each of its public methods delegates to the one
of the same name, by `KINDS`. Bases that are classes of `_async/` and not listed hold further names
of the methods, and come last. A listed class `AsyncY`, or `AsyncY | None`, is unwrapped from a `Y`
as a parameter, and wrapped as a result. Order, signatures and docstrings are the source's. Private
names have no twin, nor has an `__init__` without a docstring. All else is refused with its file and
line. The source must have the layout of `ruff format`; its text is copied, so every version of
Python writes the same files.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import re
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

Function = ast.FunctionDef | ast.AsyncFunctionDef
Origin = tuple[str, str, bool]  # a module, a name in it (empty: itself), whether only for types

WIDTH = 100
HEADER = '"""The blocking twins of `{}`.\n\nWritten by `python -m {}._generate_sync`.\n"""\n'
LIST = "GENERATE"
BASE = "Blocking"  # of `_portal`; has `_run`, `_hop`, `_iterate`, `_wrap` and `_bind`
KINDS = {  # what the twin does: the call, up to its arguments, and what comes after
    "__init__": "self._async = {owner}(; self._bind()",
    "classmethod": "instance = {owner}.{name}(; return cls._wrap(instance)._bind()",
    "property": "return self._async.{name}",
    "def": "return self._async.{name}(",
    "def -> AsyncIterator": "return self._iterate(self._async.{name}",
    "async def": "return self._run(self._async.{name}",
    "async def *_async": "return await self._hop(self._async.{name}",
    "async def *_async -> APIFuture": "return await self._async.{name}(",
}
RENAMED = {"AsyncIterator": "Iterator", "__aenter__": "__enter__", "__aexit__": "__exit__"}
SPECIAL = {"__init__", "__aenter__", "__aexit__"}
PRIVATE = re.compile(r"_(?!_.*__$)|__(del|repr|slots)__$")
NOT_BLOCKING = {"AsyncContextManager", "AsyncGenerator", "AsyncIterable", "Awaitable", "Coroutine"}


class CannotGenerate(Exception):
    """Something in the source has no blocking twin; the message begins with its file and line."""


def generate(package: Path) -> dict[str, str]:
    """The text of each file of `_sync/`, by its path relative to that folder.

    Raises:
        CannotGenerate: a listed class, or one of its public members, has no twin.
    """
    path = package / "_async" / "__init__.py"
    statements = [node for node in ast.parse(path.read_text("utf-8")).body if LIST in _bound(node)]
    if len(statements) != 1 or not isinstance(statements[0], ast.Assign):
        raise CannotGenerate(f"{path}:1: has no {LIST} = {{module: [class, ...], ...}}")
    listed: dict[str, list[str]] = ast.literal_eval(statements[0].value)
    homes = {name: module for module, names in listed.items() for name in names}
    files: dict[str, str] = {}
    for module, names in listed.items():
        path = Path(*module.split(".")).with_suffix(".py")
        for folder in path.parents:
            source = ".".join([package.name, "_async", *folder.parts])
            files[(folder / "__init__.py").as_posix()] = HEADER.format(source, package.name)
        files[path.as_posix()] = _Module(package, module, homes).twin(names)
    return files


class _Module:
    """A module of `_async/`, and how its counterpart is put together."""

    def __init__(self, package: Path, name: str, homes: dict[str, str]) -> None:
        self.package, self.root, self.homes = package, package.name, homes
        self.name = f"{package.name}._async.{name}"
        self.path = Path(package, "_async", *name.split(".")).with_suffix(".py")
        source = self.path.read_text("utf-8") if self.path.is_file() else ""
        self.source, self.tree = source.split("\n"), ast.parse(source)
        self.classes = {
            node.name: node for node in self.tree.body if isinstance(node, ast.ClassDef)
        }
        self.origins = dict(_origins(self.tree.body, self.name))
        self.renamed = RENAMED | {name: name.removeprefix("Async") for name in homes}

    def twin(self, names: list[str]) -> str:
        if unknown := [name for name in names if name not in self.classes]:
            raise CannotGenerate(f"{self.path}:1: has no class {unknown[0]}, which {LIST} names")
        bodies = ["\n\n".join(self.twin_class(self.classes[name], name)) for name in names]
        imports = "\n\n".join(self.imports(ast.parse("\n".join(bodies))))
        return "\n\n\n".join([f"{HEADER.format(self.name, self.root)}\n{imports}", *bodies]) + "\n"

    def twin_class(self, node: ast.ClassDef, owner: str) -> Iterator[str]:
        """The head of a listed class, the twins of its methods, and those of its bases'."""
        if node.keywords or node.decorator_list:
            raise self.refusal(node, f"{node.name} has a keyword or a decorator")
        if node.name == owner:
            head = f"class {self.renamed[owner]}({BASE}[{owner}]):"
            yield "\n".join([head, *self.docstring(node)])
        for member in node.body:
            names = _bound(member)
            declares = node.name != owner and _declares(member)
            private = names and all(map(PRIVATE.match, names))
            if isinstance(member, Function) and not (private or declares):
                if member.name != "__init__" or ast.get_docstring(member):
                    yield "\n".join(_Method(self, owner, member).lines())
            elif not (isinstance(member, ast.Expr) or private or declares):
                raise self.refusal(member, f"{names or 'this'} is no method: make it a property")
        for base in node.bases:
            source, name, _ = self.origins.get(ast.unparse(base), ("", "", False))
            inside = source.removeprefix(f"{self.root}._async.")
            if inside == source or name in self.homes:
                raise self.refusal(node, f"{node.name} has a base from elsewhere: do not inherit")
            module = _Module(self.package, inside, self.homes)
            yield from module.twin_class(module.classes[name], owner)
            self.origins = module.origins | self.origins

    def imports(self, twins: ast.Module) -> Iterator[str]:
        """The sections of imports for the names that the twins use, as the source has them."""
        origins = self.origins | {"Iterator": ("collections.abc", "Iterator", False)}
        origins[BASE] = (f"{self.root}._portal", BASE, False)
        for name, home in self.homes.items():
            origins[self.renamed[name]] = (f"{self.root}._sync.{home}", self.renamed[name], False)
        defined = {name for node in twins.body for name in _bound(node)}
        used = {origins[name] for name in (_names(twins) & origins.keys()) - defined}
        if typed := {origin for origin in used if origin[2]}:
            used.add(("typing", "TYPE_CHECKING", False))
        yield "from __future__ import annotations"
        yield from _sections(self.root, used - typed)
        if typed:
            yield "if TYPE_CHECKING:\n" + "\n\n".join(_sections(self.root, typed, "    "))

    def text(self, first: int, last: int | None) -> str:
        """Lines of the source, with the names of the twins."""
        text = "\n".join(self.source[first - 1 : last])
        return re.sub(r"\w+", lambda word: self.renamed.get(word[0], word[0]), text)

    def docstring(self, node: ast.ClassDef | Function) -> list[str]:
        place = node.body[0]
        return [self.text(place.lineno, place.end_lineno)] if ast.get_docstring(node) else []

    def twin_in(self, node: ast.expr | None) -> tuple[str, bool] | None:
        """The twin of the listed class in an annotation, if there is one, and whether optional."""
        text = ast.unparse(node) if node else ""
        for name in self.homes:
            if text in (name, f"{name} | None"):
                return self.renamed[name], text != name
            if node and name in _names(node):
                raise self.refusal(node, f"{name} may stand alone or with None, nothing else")
        return None

    def refusal(self, node: ast.stmt | ast.expr, why: str) -> CannotGenerate:
        return CannotGenerate(f"{self.path}:{node.lineno}: {why}")


class _Method:
    """A public method of a listed class, and how its twin delegates to it."""

    def __init__(self, module: _Module, owner: str, function: Function) -> None:
        self.module, self.owner, self.function, self.name = module, owner, function, function.name
        self.decorators = [ast.unparse(node) for node in function.decorator_list]
        self.is_async = isinstance(function, ast.AsyncFunctionDef)
        self.parameters = [*function.args.args[1:], *function.args.kwonlyargs]
        self.result = ast.unparse(function.returns) if function.returns else ""
        self.end = function.returns.end_lineno if function.returns else 0
        self.outer = self.result.partition("[")[0]
        if found := [what for holds, what in self.objections() if holds]:
            raise module.refusal(function, f"{owner}.{self.name} {found[0]}: it can have no twin")
        self.kind = self.classified()

    def objections(self) -> Iterator[tuple[object, str]]:
        """What may stand against a twin, each with whether it does."""
        spec, makes_self = self.function.args, self.decorators == ["classmethod"]
        yield set(self.decorators) - ({*KINDS} if not self.is_async else set()), "is decorated"
        yield self.name.startswith("__") and self.name not in SPECIAL, "is a special method"
        yield spec.vararg or spec.posonlyargs, "has parameters without a name"
        yield spec.kwarg and "Unpack[" not in ast.unparse(spec), "takes any keyword"
        yield not all(arg.annotation for arg in self.parameters), "has a parameter of no type"
        yield not self.result, "has no annotation of its result"
        yield self.outer in NOT_BLOCKING, f"returns {self.outer}"
        yield makes_self and self.result not in ("Self", self.owner), "makes no instance"
        yield self.result == "Self" and not (makes_self or self.name in SPECIAL), "returns Self"
        yield self.function.body[0].lineno == self.end, "has its body on the line of its head"

    def classified(self) -> str:
        if self.decorators or self.name == "__init__":
            return [*self.decorators, self.name][0]
        if self.outer == "AsyncIterator":
            return "def -> AsyncIterator"
        if not self.is_async or not self.name.endswith("_async"):
            return "async def" if self.is_async else "def"
        return "async def *_async" + " -> APIFuture" * (self.outer == "APIFuture")

    def lines(self) -> Iterator[str]:
        yield from (f"    @{decorator}" for decorator in self.decorators)
        yield self.signature()
        yield from self.module.docstring(self.function)
        call, _, after = KINDS[self.kind].format(owner=self.owner, name=self.name).partition("; ")
        if self.name == "__aenter__" or (self.result == "None" and not after):
            call, after = call.removeprefix("return "), "return self" * (self.result != "None")
        elif not after and (made := self.module.twin_in(self.function.returns)):
            call = call.replace("return", "instance =", 1)
            after = f"return {made[0]}._wrap(instance)" + " if instance else None" * made[1]
        target, bracket, first = call.partition("(")
        items = ([first] if first else []) + list(self.arguments())
        yield _laid_out(f"        {target}{bracket}", items, ")" if bracket else "")
        yield from [f"        {after}"] if after else []

    def signature(self) -> str:
        """The source's; on one line, if its three lines fit there without `async`."""
        text = self.module.text(self.function.lineno, self.end)
        if "*_async" not in self.kind:
            text = text.replace("async def", "def", 1)
        joined = re.sub(r"\(\n\s+(.*[^,])\n\s+\)", r"(\1)", text)
        return joined if len(joined) <= WIDTH else text

    def arguments(self) -> Iterator[str]:
        """What the twin hands on."""
        for arg in self.parameters:
            twin = self.module.twin_in(arg.annotation)
            optional = f" if {arg.arg} else None" if twin and twin[1] else ""
            prefix = f"{arg.arg}=" if arg in self.function.args.kwonlyargs else ""
            yield prefix + arg.arg + ("._async" if twin else "") + optional
        if options := self.function.args.kwarg:
            yield f"**{options.arg}"


def _names(node: ast.AST, context: type[ast.expr_context] = ast.expr_context) -> set[str]:
    names = (name for name in ast.walk(node) if isinstance(name, ast.Name))
    return {name.id for name in names if isinstance(name.ctx, context)}


def _bound(node: ast.stmt) -> set[str]:
    """The names that a definition or an assignment binds."""
    return {node.name} if isinstance(node, ast.ClassDef | Function) else _names(node, ast.Store)


def _declares(member: ast.stmt) -> bool:
    """Whether a member is named for type checkers, and defined by whoever inherits."""
    if isinstance(member, Function):
        return "abstractmethod" in map(ast.unparse, member.decorator_list)
    return isinstance(member, ast.AnnAssign) and not member.value


def _origins(body: list[ast.stmt], home: str, typed: bool = False) -> Iterator[tuple[str, Origin]]:
    """Where each name of a module comes from."""
    for node in body:
        if isinstance(node, ast.If):
            yield from _origins(node.body, home, "TYPE_CHECKING" in _names(node.test))
        elif isinstance(node, ast.Import | ast.ImportFrom):
            source = getattr(node, "module", None)
            for alias in node.names:
                name = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
                bound = alias.asname or alias.name.partition(".")[0]
                yield bound, (source, name, typed) if source else (name, "", typed)
        else:
            yield from ((name, (home, name, typed)) for name in _bound(node))


def _sections(root: str, origins: set[Origin], indent: str = "") -> Iterator[str]:
    """Import statements, sorted as ruff sorts them: standard library, others, the package."""
    members: dict[str, list[str]] = defaultdict(list)
    for module, name, _ in origins:
        members[module].append(name)
    sections: dict[int, list[str]] = defaultdict(list)
    for module, names in sorted(members.items(), key=lambda item: (item[1] != [""], item[0])):
        names.sort(key=lambda n: (not (n[1:] and n.isupper()), n[:1].islower(), n.lower()))
        line = f"{indent}from {module} import {', '.join(names)}"
        if len(line) > WIDTH:
            line = _laid_out(f"{indent}from {module} import (", names, ")")
        top = module.partition(".")[0]
        section = 2 if top == root else 1 - (top in sys.stdlib_module_names)
        sections[section].append(line if names != [""] else f"{indent}import {module}")
    yield from ("\n".join(sections[section]) for section in sorted(sections))


def _laid_out(head: str, items: list[str], tail: str) -> str:
    """A list in brackets, on one line or with one item a line: `ruff format` leaves it."""
    if len(one := head + ", ".join(items) + tail) <= WIDTH:
        return one
    indent = " " * (len(head) - len(head.lstrip()))
    return "\n".join([head, *(f"{indent}    {item}," for item in items), indent + tail])


def main(arguments: list[str] | None = None, package: Path = Path(__file__).parent) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(description="Write the blocking classes of _sync/.")
    parser.add_argument("--check", action="store_true", help="only compare, and tell by the status")
    check: bool = parser.parse_args(arguments).check
    try:
        produced = generate(package)
    except CannotGenerate as error:
        print(error, file=sys.stderr)
        return 1
    folder = package / "_sync"
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix != ".pyc"]
    found = {path.relative_to(folder).as_posix(): path.read_bytes().decode() for path in files}
    changed = [n for n in sorted({*found, *produced}) if found.get(n) != produced.get(n)]
    for name in changed:
        path = folder / name
        old, new = (texts.get(name, "").split("\n") for texts in (found, produced))
        print(path, *difflib.unified_diff(old, new, n=0, lineterm=""), sep="\n")
        if not check and name in produced:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(produced[name].encode())
        elif not check:
            path.unlink()
    return int(check and bool(changed))


if __name__ == "__main__":
    sys.exit(main())
