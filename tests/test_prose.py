"""What the package's texts may not do: name what does not exist, or say nothing.

A docstring or a comment that puts a name in backticks names something of the package, of its wire,
or of a library that it uses; a rename that forgets the texts shows here.
"""

from __future__ import annotations

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

import fireworks_training

PACKAGE = Path(fireworks_training.__file__).parent
EMPTY = re.compile(r"(The same|Ditto|Likewise)( (for|of|in|as|but)\b|[.,;:])|See [^.]*\.?$")
"""First sentences that send their reader away."""

OUTSIDE = {"CUDA_VISIBLE_DEVICES", "XDG_CACHE_HOME", "XDG_STATE_HOME", "atexit", "grep", "jq"}
OUTSIDE |= {"CHECKPOINT_TYPE_", "JOB_STATE_", "README", "md", "ignore_index", "_ext"}
"""Names of others, and beginnings of names, that texts may quote."""

GENERATOR = "_generate_sync.py"
"""Its text speaks of classes by letters."""

Text = tuple[int, str]


def docstrings(tree: ast.Module) -> Iterator[Text]:
    """The docstrings of a module, attributes' included, each with its line."""
    for node in ast.walk(tree):
        for statement in body if isinstance(body := getattr(node, "body", None), list) else []:
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield statement.lineno, value.value


def comments(source: str) -> Iterator[Text]:
    """The comments of a module, each with its line."""
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            yield token.start[0], token.string


def known_names(root: Path) -> set[str]:
    """All identifiers, module names, and words in strings that are no docstrings."""
    known = set[str]()
    for path in sorted(root.rglob("*.py")):
        source = path.read_text("utf-8")
        tree = ast.parse(source)
        texts = {line for line, _ in docstrings(tree)}
        known |= set(path.relative_to(root).with_suffix("").parts)
        for token in tokenize.generate_tokens(io.StringIO(source).readline):
            if token.type == tokenize.NAME:
                known.add(token.string)
            elif token.type == tokenize.STRING and token.start[0] not in texts:
                known |= set(re.findall(r"\w+", token.string))
    return known


def strays(root: Path) -> list[str]:
    """Names in backticks that are nowhere else, and docstrings that send their reader away."""
    known, found = known_names(root) | OUTSIDE, list[str]()
    for path in sorted(path for path in root.rglob("*.py") if path.name != GENERATOR):
        source = path.read_text("utf-8")
        tree = ast.parse(source)
        told = list(docstrings(tree))
        if not ast.get_docstring(tree):
            found.append(f"{path.relative_to(root)}:1: does not say what it is")
        for line, text in [*told, *comments(source)]:
            for quoted in re.findall(r"`([A-Za-z_][\w.]*)`", text):
                if lost := [name for name in quoted.split(".") if name and name not in known]:
                    found.append(f"{path.relative_to(root)}:{line}: `{quoted}`: no {lost[0]}")
        for line, text in told:
            if EMPTY.match(text):
                found.append(f"{path.relative_to(root)}:{line}: says nothing: {text.strip()!r}")
    return found


def test_texts_name_what_exists_and_say_something() -> None:
    assert strays(PACKAGE) == []


@pytest.mark.parametrize(
    ("source", "complaint"),
    [
        ('"""See `gone` for it."""', "`gone`: no gone"),
        ("a = 1  # as in `a.gone`", "`a.gone`: no gone"),
        ('a = 1\n"""The same."""', "says nothing: 'The same.'"),
        ('def f():\n    """See the module."""', "says nothing: 'See the module.'"),
        ("a = 1", "module.py:1: does not say what it is"),
    ],
)
def test_a_stray_text_is_seen(tmp_path: Path, source: str, complaint: str) -> None:
    (tmp_path / "module.py").write_text(source)
    assert any(complaint in line for line in strays(tmp_path))


def test_a_name_in_code_or_on_the_wire_is_known(tmp_path: Path) -> None:
    text = (
        '"""What `path` means, `module.f` and `there`."""\n\n\ndef f(path):\n    return "there"\n'
    )
    (tmp_path / "module.py").write_text(text)
    assert strays(tmp_path) == []


# -- the contributor's page ------------------------------------------------------------------------

LINK = re.compile(r"\[`([\w./]+)`\]\(([\w./]+)\)|`([A-Za-z_]\w*(?:\.\w+)?)`")


def defined(path: Path) -> set[str]:
    """The classes and functions of a module, methods behind the name of their class."""
    names = set[str]()
    for node in ast.parse(path.read_text("utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            functions = ast.FunctionDef | ast.AsyncFunctionDef
            methods = (child for child in node.body if isinstance(child, functions))
            names |= {f"{node.name}.{method.name}" for method in methods}
    return names


def lost_on_the_way(page: str, root: Path) -> list[str]:
    """Names in the walks that the modules linked so far do not define."""
    known, lost = set[str](), list[str]()
    for _, linked, name in LINK.findall(page):
        if linked.endswith(".py"):
            known |= defined(root / linked)
        elif (name[:1].isupper() or "." in name) and name not in known:
            lost.append(name)
    return lost


def test_the_walks_of_the_contributors_page_name_what_is_there() -> None:
    page = (PACKAGE / "README.md").read_text("utf-8")
    walks = page.partition("## Three walks")[2].partition("## Recipes")[0]
    assert walks.count("`") > 100
    assert lost_on_the_way(walks, PACKAGE) == []


def test_the_contributors_page_links_to_what_is_there() -> None:
    page = (PACKAGE / "README.md").read_text("utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", page)
    assert [link for link in links if not (PACKAGE / link).exists()] == []
    rooms = {f"_async/{path.parent.name}" for path in PACKAGE.glob("_async/*/__init__.py")}
    assert rooms <= set(links)


def test_a_walk_that_gets_lost_is_seen(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("class A:\n    def go(self): ...\n\n\ndef f(): ...\n")
    walk = "[`a.py`](a.py) `A.go`, `A.gone`, then `B`; `not_checked` is no class."
    assert lost_on_the_way(walk, tmp_path) == ["A.gone", "B"]
