"""Stands for a name of the official SDK that this package lacks, until it is used."""

from __future__ import annotations

from typing import Any, NoReturn

from fireworks_training.errors import NotSupported


class _MissingType(type):
    """Makes every use of a missing name raise: calls, attributes, comparisons with its parts."""

    def __call__(cls, *_: Any, **__: Any) -> NoReturn:
        raise _refusal(cls)

    def __getattr__(cls, name: str) -> NoReturn:
        if name.startswith("__"):  # asked by the machinery of imports, annotations and pickles
            raise AttributeError(name)
        raise _refusal(cls)

    def __instancecheck__(cls, _: object) -> bool:
        return False  # there are none

    def _refuse(cls, *_: Any) -> NoReturn:
        raise _refusal(cls)

    __add__ = __radd__ = __sub__ = __rsub__ = __mul__ = __rmul__ = __truediv__ = _refuse
    __lt__ = __le__ = __gt__ = __ge__ = __float__ = __int__ = __index__ = __iter__ = _refuse
    __len__ = __getitem__ = __contains__ = _refuse

    def __repr__(cls) -> str:
        return f"<{cls.__module__}.{cls.__name__}: not in fireworks_training>"


def missing(module: str, name: str) -> type:
    """Make the stand-in of a name: it can be imported and annotated with, and refuses to be used.

    Args:
        module: full name of the official module.
        name: the name in it.
    """
    return _MissingType(name, (), {"__module__": module})


def _refusal(cls: type) -> NotSupported:
    return NotSupported(
        f"{cls.__module__}.{cls.__name__} is a name of the official SDK that fireworks_training "
        "lacks: run this program with fireworks-ai, or do without it"
    )
