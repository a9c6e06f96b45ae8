"""Adds arrays to datums: the logprobs of a reference, a teacher, or the trainer itself."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from fireworks_training._checks import one_of
from fireworks_training.errors import InvalidArgument, InvalidDatum

if TYPE_CHECKING:
    import tinker

ARRAYS = ("old_logprobs", "ref_logprobs", "teacher_logprobs", "kept_mass", "weights", "advantages")


def attach(data: Sequence[tinker.Datum], **arrays: Sequence[Any]) -> list[tinker.Datum]:
    """Make new datums that carry more arrays; those given stay as they are.

        reference = client.forward(data, "cross_entropy").result().loss_fn_outputs
        data = losses.attach(data, ref_logprobs=[output["logprobs"] for output in reference])

    Args:
        data: the rows.
        arrays: by name, one array for each row, with one entry for each target: `old_logprobs`
            (the trainer's, before the step), `ref_logprobs`, `teacher_logprobs`, `kept_mass`,
            `weights` or `advantages`. An array is a `tinker.TensorData` or a sequence of floats.

    Raises:
        InvalidArgument: an unknown name, or not one array for each row.
        InvalidDatum: an array has another length than its row's targets, or holds a NaN.
    """
    import numpy as np
    import tinker

    for name, values in arrays.items():
        one_of("the array's name", name, ARRAYS)
        if len(values) != len(data):
            raise InvalidArgument(f"{len(values)} arrays of {name!r} for {len(data)} datums")
    made: list[tinker.Datum] = []
    for index, datum in enumerate(data):
        inputs = dict(datum.loss_fn_inputs)
        for name, values in arrays.items():
            value = values[index]
            array = np.asarray(
                value.to_numpy() if isinstance(value, tinker.TensorData) else value, np.float32
            )
            if array.shape != inputs["target_tokens"].to_numpy().shape:
                raise InvalidDatum(
                    f"datum {index}: {name!r} has {array.shape} entries, its targets have "
                    f"{inputs['target_tokens'].to_numpy().shape}",
                    index=index,
                )
            if bool(np.isnan(array).any()):
                raise InvalidDatum(f"datum {index}: {name!r} holds a NaN", index=index)
            inputs[name] = tinker.TensorData.from_numpy(array)
        made.append(tinker.Datum(model_input=datum.model_input, loss_fn_inputs=cast(Any, inputs)))
    return made
