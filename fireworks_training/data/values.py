"""Turns what callers have for numbers and token ids into arrays, or refuses it by its name.

Takes numbers of Python, numpy and torch, alone or in sequences: tensors with gradients and in
bfloat16 too. What is refused is an `InvalidDatum` that names the field.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, cast

from fireworks_training.errors import InvalidDatum

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import tinker


def datum_of(tokens: npt.NDArray[np.int64], **arrays: npt.NDArray[np.float32]) -> tinker.Datum:
    import tinker

    if len(tokens) < 2:
        raise InvalidDatum(f"{len(tokens)} token: a datum needs two, one to predict the other from")
    inputs: dict[str, npt.NDArray[Any]] = {"target_tokens": tokens[1:], **arrays}
    return tinker.Datum(
        model_input=tinker.ModelInput.from_ints(tokens[:-1].tolist()),
        loss_fn_inputs={
            name: tinker.TensorData.from_numpy(array) for name, array in inputs.items()
        },
    )


def plain_array(name: str, values: object) -> npt.NDArray[Any]:
    """Make an array of what Python, numpy or torch has for numbers; bfloat16 and gradients too."""
    import numpy as np

    if isinstance(values, Mapping):
        raise InvalidDatum(f"{name!r} is a {type(values).__name__}, not a sequence of numbers")
    try:
        try:
            array = np.asarray(detached(values))
        except (TypeError, ValueError, RuntimeError):
            entries = cast("Sequence[object]", values)  # tensors that numpy can't read as they are
            array = np.asarray([detached(entry) for entry in entries])
    except (TypeError, ValueError, RuntimeError) as error:
        raise InvalidDatum(
            f"{name!r} is no flat sequence of numbers ({type(error).__name__})"
        ) from None
    if array.dtype.kind not in "biuf" and array.size:
        raise InvalidDatum(f"{name!r} has entries that are not numbers")
    return array


def detached(value: Any) -> Any:
    """Take a torch tensor out of its graph, to where numpy can read it."""
    if not hasattr(value, "detach"):
        return value
    tensor = value.detach().cpu()
    return (tensor.double() if tensor.is_floating_point() else tensor).numpy()


def several(name: str, values: Sequence[float]) -> Sequence[float]:
    """Refuse one number where one for each token is needed."""
    if not hasattr(values, "__len__") or getattr(values, "shape", None) == ():
        raise InvalidDatum(f"{name!r} is a single {type(values).__name__}: one a token is needed")
    return values


def token_ids(name: str, values: Sequence[int]) -> npt.NDArray[np.int64]:
    """Token ids as an array; a BatchEncoding is taken by its `input_ids`."""
    import numpy as np

    given: object = values
    if isinstance(given, Mapping):
        if "input_ids" not in given:
            raise InvalidDatum(f"{name!r} is a {type(given).__name__}: pass its token ids")
        given = cast("Mapping[str, object]", given)["input_ids"]
    if isinstance(given, (str, bytes)):
        raise InvalidDatum(f"{name!r} is text: tokenize it first")
    array = plain_array(name, given)
    if array.ndim != 1:
        raise InvalidDatum(f"{name!r} has shape {list(array.shape)}: pass the ids of one sequence")
    if array.size and array.dtype.kind not in "iu":
        raise InvalidDatum(
            f"{name!r} has entries of type {array.dtype}: token ids are whole numbers"
        )
    if array.size and int(array.min()) < 0:
        raise InvalidDatum(f"{name!r} has a negative entry: token ids are at least 0")
    return array.astype(np.int64)


def numbers(name: str, values: object, length: int) -> npt.NDArray[np.float32]:
    """Make `length` float32 numbers of as many, or of one for all."""
    import numpy as np

    if isinstance(values, (str, bytes)):
        raise InvalidDatum(f"{name!r} is text, not numbers")
    array = plain_array(name, values)
    if array.ndim > 1:
        raise InvalidDatum(f"{name!r} has shape {list(array.shape)}: one entry a token is needed")
    if array.ndim == 1 and len(array) != length:
        raise InvalidDatum(
            f"{name!r} has {len(array)} entries for {length} tokens: one a token is needed"
        )
    with np.errstate(over="ignore"):  # `finite` says it
        return np.broadcast_to(array.astype(np.float32), (length,)).copy()


def finite(name: str, array: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    import numpy as np

    bad = np.flatnonzero(~np.isfinite(array))
    if bad.size:
        raise InvalidDatum(
            f"{name!r} has {bad.size} entries that are NaN or infinite, the first at position "
            f"{int(bad[0])} of {len(array)}: mend what computed them; they would make every weight "
            "NaN"
        )
    return array


def sampled_logprobs(array: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    finite("logprobs", array)
    if array.max() > 1e-3:
        raise InvalidDatum(
            f"'logprobs' has an entry of {array.max():.3g}: a logprob is at most 0. Pass natural "
            "logprobs, not probabilities or their negatives"
        )
    return array
