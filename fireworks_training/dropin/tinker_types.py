"""Lets `tinker.ModelInput.from_ints` take the official SDK's `routing_matrices`, where it is None.

Programs for the official SDK pass it with every datum; it holds the choices of experts to replay,
which this package refuses.
"""

from __future__ import annotations

from typing import Any

from fireworks_training.errors import NotSupported

_original: Any = None


def patch() -> None:
    """Replace `from_ints`; idempotent."""
    global _original
    if _original is not None:
        return
    from tinker import ModelInput

    _original = ModelInput.__dict__["from_ints"]
    original = _original.__func__

    def from_ints(
        cls: type[Any], /, tokens: Any, routing_matrices: object = None, **others: object
    ) -> Any:
        """Make a model input of token ids."""
        for name, value in {"routing_matrices": routing_matrices, **others}.items():
            if value is not None:
                raise NotSupported(f"{name}: this package does not replay a model's routing")
        return original(cls, tokens)

    ModelInput.from_ints = classmethod(from_ints)  # type: ignore[method-assign, assignment]  # pyright: ignore[reportAttributeAccessIssue]


def restore() -> None:
    """Undo `patch`."""
    global _original
    if _original is None:
        return
    from tinker import ModelInput

    ModelInput.from_ints = _original  # type: ignore[method-assign]
    _original = None
