"""Serves `fireworks.training.sdk` and its submodules from this package, by an import finder.

A module has the names that the official one has: this package's object of a name, or a stand-in
that refuses to be used (`missing`). It knows names; what they do is the core's and `compat`'s.
"""

from __future__ import annotations

import importlib
import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from types import ModuleType
from typing import Any

from fireworks_training.dropin import http_errors, tinker_types
from fireworks_training.dropin.missing import missing
from fireworks_training.dropin.official_names import OFFICIAL_NAMES
from fireworks_training.errors import UsageError

SDK = "fireworks.training.sdk"
TYPES = f"{SDK}.types"
_PARENTS = ("fireworks", "fireworks.training")


def _owner(module: str, name: str) -> Any:
    """Find the module of this package that has an official name; None if none has it."""
    from fireworks_training import compat

    if module in ("errors", "sampling") and hasattr(http_errors, name):
        return http_errors
    if name in compat.__all__:
        return compat
    root = importlib.import_module("fireworks_training")
    if name in root.__all__:
        return root
    return http_errors if hasattr(http_errors, name) else None


class _SdkModule(ModuleType):
    """A module of the official SDK, whose names are looked up at their first use."""

    def __getattr__(self, name: str) -> Any:
        module = self.__name__.removeprefix(SDK).removeprefix(".")
        if name not in OFFICIAL_NAMES.get(module, ()):
            if not module and name in (*OFFICIAL_NAMES, "types"):
                return importlib.import_module(f"{SDK}.{name}")
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        owner = _owner(module, name)
        value = missing(self.__name__, name) if owner is None else getattr(owner, name)
        setattr(self, name, value)
        return value

    def __dir__(self) -> list[str]:
        module = self.__name__.removeprefix(SDK).removeprefix(".")
        return sorted({*super().__dir__(), *OFFICIAL_NAMES.get(module, ())})


class _Makes(Loader):
    """Makes the module of a name: a served one, an alias of one of `tinker`'s, or a parent."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType:
        """Make the module."""
        if spec.name == TYPES or spec.name.startswith(f"{TYPES}."):
            return _TypesModule(spec.name)
        return _SdkModule(spec.name) if spec.name.startswith(SDK) else ModuleType(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Give the module its list of public names."""
        name = module.__name__.removeprefix(SDK).removeprefix(".")
        if module.__name__.startswith(SDK) and name in OFFICIAL_NAMES:
            module.__all__ = sorted(OFFICIAL_NAMES[name])  # type: ignore[attr-defined]  # pyright: ignore[reportAttributeAccessIssue]


class _TypesModule(ModuleType):
    """`fireworks.training.sdk.types` or a submodule: the module of the same name in `tinker`."""

    def __getattr__(self, name: str) -> Any:
        from fireworks_training import _tinker_types

        # Options that only Fireworks has come as subclasses.
        home: Any = _tinker_types if name == "AdamParams" else None
        if home is None:
            home = importlib.import_module(self.__name__.replace(SDK, "tinker", 1))
        return getattr(home, name)

    def __dir__(self) -> list[str]:
        return dir(importlib.import_module(self.__name__.replace(SDK, "tinker", 1)))


class _Finder(MetaPathFinder):
    """Finds the official SDK's modules here, and its parents where `fireworks-ai` is absent."""

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,  # noqa: ARG002 - importlib's signature
        target: ModuleType | None = None,  # noqa: ARG002
    ) -> importlib.machinery.ModuleSpec | None:
        """Find a module; None leaves it to the other finders."""
        name = fullname.removeprefix(SDK).removeprefix(".")
        served = fullname == SDK or (fullname.startswith(f"{SDK}.") and name in OFFICIAL_NAMES)
        package = fullname in (SDK, TYPES) or name in {n.partition(".")[0] for n in OFFICIAL_NAMES}
        if fullname == TYPES or (fullname.startswith(f"{TYPES}.") and _in_tinker(fullname)):
            served = True
        elif fullname in _PARENTS and not _installed(self, fullname):
            served = package = True
        if not served:
            return None
        return importlib.machinery.ModuleSpec(fullname, _Makes(), is_package=package)


def _in_tinker(fullname: str) -> bool:
    return importlib.util.find_spec(fullname.replace(SDK, "tinker", 1)) is not None


def _installed(finder: _Finder, fullname: str) -> bool:
    """Whether another finder knows a parent of the SDK."""
    parent = sys.modules.get(fullname.rpartition(".")[0])
    path = getattr(parent, "__path__", None)
    others = (one for one in sys.meta_path if one is not finder)
    return any(one.find_spec(fullname, path) is not None for one in others)


_finder = _Finder()


def install() -> None:
    """Serve `fireworks.training.sdk` from this package, from the next import on. Idempotent.

    Raises:
        UsageError: a module of the official SDK was imported already.
    """
    if _finder in sys.meta_path:
        return
    taken = next((n for n in sys.modules if n == SDK or n.startswith(f"{SDK}.")), None)
    if taken is not None:
        raise UsageError(
            f"{taken} was imported already: call fireworks_training.dropin.install() before the "
            "first import of the official SDK, or run the program by "
            "`python -m fireworks_training.dropin SCRIPT`"
        )
    sys.meta_path.insert(0, _finder)
    tinker_types.patch()


def uninstall() -> None:
    """Serve nothing any more, and forget the modules that were served; for tests."""
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)
    for name, module in list(sys.modules.items()):
        spec = getattr(module, "__spec__", None)
        if spec is not None and isinstance(spec.loader, _Makes):
            del sys.modules[name]
    tinker_types.restore()
