"""`show_options`: lets `inspect.signature` and `help` list the options that a method takes by name.

It reads a `TypedDict`, and knows none of its options.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any, get_type_hints


def show_options(method: Callable[..., Any], options: type[Any]) -> None:
    """Show `**options` of a method as keywords of their own, each with its type; None: not given.

    Args:
        method: takes `**options` of this `TypedDict` last.
        options: the `TypedDict`.
    """
    shown = inspect.signature(method)
    named = [p for p in shown.parameters.values() if p.kind is not p.VAR_KEYWORD]
    keywords = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind)
        for name, kind in get_type_hints(options).items()
    ]
    method.__signature__ = shown.replace(parameters=[*named, *keywords])  # type: ignore[attr-defined]  # pyright: ignore[reportFunctionMemberAccess]
