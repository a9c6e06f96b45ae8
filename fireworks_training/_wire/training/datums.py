"""Captures and checks datums before they are encoded, in whatever dialect; and their results.

A datum is captured when the operation is called, so that arrays which the caller changes afterwards
do no harm, and checked and encoded later, away from the loop. What is checked here is what a server
can't explain as well: lengths, NaN, kinds of chunks.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, cast

import numpy as np
import numpy.typing as npt

from fireworks_training.errors import InvalidDatum, NotSupported

Array = npt.NDArray[Any]

MASKS = ("weights", "loss_mask", "mask")
"""Names of the input that says which targets count; the first is the contract's."""

RATIO_MASK = "sequence_ratio_mask"
"""Tinker's name for the mask of the tokens that a sequence's ratio is the mean of (gspo)."""

ALL_MASKS = frozenset({*MASKS, RATIO_MASK})
"""Every name of a mask."""


class TensorLike(Protocol):
    """The part of `tinker.TensorData` that this module needs."""

    @property
    def dtype(self) -> str: ...

    @property
    def shape(self) -> list[int] | None: ...

    @property
    def data(self) -> Sequence[float]: ...

    @property
    def sparse_crow_indices(self) -> list[int] | None: ...

    @property
    def sparse_col_indices(self) -> list[int] | None: ...

    def to_numpy(self) -> Array: ...


class DatumLike(Protocol):
    """The part of `tinker.Datum` that this module needs."""

    @property
    def model_input(self) -> Any: ...

    @property
    def loss_fn_inputs(self) -> Mapping[str, Any]: ...


class Encoding(NamedTuple):
    """An encoded datum: its size in bytes, and the parts that they lie in.

    The parts are bytes, and arrays as they lie in memory; numpy's stubs know the latter as buffers
    from Python 3.12 on.
    """

    size: int
    parts: Sequence[Any]


@dataclass(frozen=True, slots=True)
class PassResult:
    """The result of one pass: arrays of each datum, and metrics."""

    output_type: str
    outputs: list[dict[str, Array]]
    metrics: dict[str, float]


@dataclass(slots=True)  # not frozen: that costs more than the copies
class Captured:
    """A datum as it was when an operation was called; nothing of it is checked yet.

    Attributes:
        chunks: of the model input.
        tensors: copies of the loss inputs; sparse ones, whose parts are lists, as they are.
    """

    chunks: tuple[Any, ...]
    tensors: dict[str, Array | TensorLike]

    def tokens(self, index: int) -> Sequence[int]:
        """The token ids of the model input.

        Raises:
            NotSupported: it has chunks that are not text.
            InvalidDatum: it is empty.
        """
        tokens: Sequence[int] = []
        for chunk in self.chunks:
            kind = getattr(chunk, "type", type(chunk).__name__)
            if kind != "encoded_text":
                raise NotSupported(
                    f"datum {index}: chunks of type {kind!r} are not supported; only text"
                )
            tokens = [*tokens, *chunk.tokens] if tokens else chunk.tokens
        if not tokens:
            raise InvalidDatum(f"datum {index} has no input tokens", index=index)
        return tokens

    def arrays(self, index: int) -> dict[str, Array]:
        """The loss inputs, dense, in their shapes.

        Raises:
            InvalidDatum: the parts of a sparse one contradict each other.
        """
        return {
            name: tensor if isinstance(tensor, np.ndarray) else _dense(tensor, name, index)
            for name, tensor in self.tensors.items()
        }

    def targets(self, index: int) -> dict[str, Array]:
        """Targets and weights, all that a plain forward needs; without a mask every target counts.

        Raises:
            InvalidDatum: there are no targets.
        """
        arrays = self.arrays(index)
        if "target_tokens" not in arrays:
            raise InvalidDatum(
                f"datum {index} has no 'target_tokens': the tokens whose logprobs are wanted",
                index=index,
            )
        targets = arrays["target_tokens"]
        weights = next((arrays[name] for name in MASKS if name in arrays), None)
        if weights is None:
            weights = np.ones(targets.shape, np.float32)
        elif weights.dtype.kind != "f":
            weights = weights.astype(np.float32)
        return {"target_tokens": targets, "weights": weights}


def without_idle_weights(arrays: Mapping[str, Array], loss_fn: str) -> Mapping[str, Array]:
    """Leave out weights that change no sum, for a server whose contract has none beside advantages.

    gspo's are the mask of its ratio there, by that name; dro's penalty always needs them.
    """
    weights, advantages = arrays.get("weights"), arrays.get("advantages")
    if (
        weights is None
        or advantages is None
        or loss_fn == "dro"
        or weights.shape != advantages.shape
    ):
        return arrays
    if ((weights != 1) & (advantages != 0)).any():
        return arrays
    rest = {name: array for name, array in arrays.items() if name != "weights"}
    if loss_fn == "gspo" and RATIO_MASK not in rest:
        rest[RATIO_MASK] = weights
    return rest


def capture(datum: DatumLike, *, copy: bool = True) -> Captured:
    """Capture a datum as it is now, with a copy of its arrays; never raises on their content.

    Args:
        copy: False for a datum that is encoded before its caller can change it.
    """
    tensors: dict[str, Array | TensorLike] = {}
    for name, tensor in datum.loss_fn_inputs.items():
        if tensor.sparse_crow_indices is None:
            tensors[name] = tensor.to_numpy().copy() if copy else tensor.to_numpy()
        else:
            tensors[name] = tensor
    return Captured(tuple(datum.model_input.chunks), tensors)


def capture_all(data: Sequence[DatumLike]) -> list[Captured]:
    """Capture the datums of a pass, as `capture` does, with one copy for the arrays of all.

    numpy lets go of the interpreter in each copy of 500 elements or more, and a thread that encodes
    the pass before takes it every time: with a copy for each array the caller's loop would stand
    still for a multiple of the time that the copies take.
    """
    captured = [capture(datum, copy=False) for datum in data]
    found = [
        (each.tensors, name, array)
        for each in captured
        for name, array in each.tensors.items()
        if isinstance(array, np.ndarray)
    ]
    found.sort(key=lambda place: -place[2].itemsize)  # so that each is aligned
    # numpy's stubs know arrays as buffers from Python 3.12 on.
    parts: list[Any] = [np.ascontiguousarray(array) for _, _, array in found]
    block = bytearray().join(parts)
    offset = 0
    for tensors, name, array in found:
        tensors[name] = np.ndarray(array.shape, array.dtype, block, offset)
        offset += array.nbytes
    return captured


def count_tokens(data: Sequence[DatumLike]) -> int:
    """Count the tokens of the model inputs; chunks that are not text have none."""
    return sum(
        len(getattr(chunk, "tokens", ())) for datum in data for chunk in datum.model_input.chunks
    )


def _dense(tensor: TensorLike, name: str, index: int) -> Array:
    """Make a sparse tensor's dense array; `to_numpy` needs torch for that."""
    try:
        return _written_out(tensor)
    except (ValueError, IndexError, TypeError) as error:
        raise InvalidDatum(
            f"datum {index}: {name!r} is no tensor of shape {tensor.shape}: {error}", index=index
        ) from error


def _written_out(tensor: TensorLike) -> Array:
    rows, columns = cast(list[int], tensor.shape)
    dtype = np.int64 if tensor.dtype == "int64" else np.float32
    dense = np.zeros((rows, columns), dtype=dtype)
    row_of = np.repeat(np.arange(rows), np.diff(np.asarray(tensor.sparse_crow_indices)))
    dense[row_of, np.asarray(tensor.sparse_col_indices)] = np.asarray(tensor.data, dtype)
    return dense


def check_inputs(arrays: Mapping[str, Array], length: int, index: int) -> None:
    """Refuse loss inputs that can't belong to a model input of `length` tokens.

    Gradients by a pooled output (names ending in `_grads`) have the shape of that output.

    Raises:
        InvalidDatum: lengths that differ, or values that are not finite.
    """
    for name, array in arrays.items():
        shape = array.shape
        if (not shape or shape[0] != length) and not name.endswith("_grads"):
            rows = "a single number" if array.ndim == 0 else f"{array.shape[0]} entries"
            raise InvalidDatum(
                f"datum {index}: {name!r} has {rows}, but model_input has {length} tokens. Entry t "
                "of each loss input belongs to predicting target t from the inputs up to t, so the "
                "lengths are equal (supervised_datum and rl_datum build them so).",
                index=index,
            )
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            at = tuple(np.argwhere(~np.isfinite(array))[0])
            raise InvalidDatum(
                f"datum {index}: {name!r} is {array[at]} at position {at[0] if at else 0}; every "
                "value must be finite",
                index=index,
            )
