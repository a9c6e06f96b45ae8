"""What a pass holds of its datums after the call: copies, in one block for all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import tinker

from fireworks_training._wire.training.datums import capture, capture_all


def datum(**inputs: np.ndarray[Any, Any]) -> tinker.Datum:
    tensors = {name: SimpleTensor(array) for name, array in inputs.items()}
    tokens = tinker.ModelInput.from_ints([1, 2])
    return SimpleNamespace(model_input=tokens, loss_fn_inputs=tensors)  # type: ignore[return-value]


class SimpleTensor:
    """A tensor that hands its array out as it is, of any layout."""

    sparse_crow_indices = None

    def __init__(self, array: np.ndarray[Any, Any]) -> None:
        self.array = array

    def to_numpy(self) -> np.ndarray[Any, Any]:
        return self.array


ARRAYS = {
    "floats": np.arange(3, dtype=np.float32),
    "integers": np.arange(5),
    "bytes": np.arange(3, dtype=np.int8),
    "matrix": np.arange(6.0, dtype=np.float32).reshape(2, 3),
    "columns first": np.asfortranarray(np.arange(6).reshape(2, 3)),
    "strided": np.arange(10)[::3],
    "number": np.full((), 4.5, np.float32),
    "empty": np.zeros(0, np.float32),
    "half": np.ones(3, np.float16),
}


def test_a_block_holds_arrays_of_every_kind_and_layout() -> None:
    first, second = capture_all([datum(**ARRAYS), datum(floats=ARRAYS["floats"] + 1)])
    assert second.arrays(1)["floats"].tolist() == [1.0, 2.0, 3.0]
    for name, array in first.arrays(0).items():
        given = ARRAYS[name]
        assert (array.dtype, array.shape) == (given.dtype, given.shape), name
        assert array.tolist() == given.tolist(), name
        assert array.flags.aligned, name


def test_later_changes_of_the_callers_arrays_do_not_show() -> None:
    array = np.ones(600, np.float32)
    given = datum(weights=array)
    (copied,), shared = capture_all([given]), capture(given, copy=False)
    array[:] = 7
    assert copied.arrays(0)["weights"].max() == 1
    assert shared.arrays(0)["weights"].max() == 7  # the control: this one has no copy


def test_sparse_tensors_stay_as_they_are() -> None:
    sparse = tinker.TensorData(
        data=[2.0],
        dtype="float32",
        shape=[1, 3],
        sparse_crow_indices=[0, 1],
        sparse_col_indices=[2],
    )
    dense = tinker.TensorData.from_numpy(np.ones(1))
    given = tinker.Datum(
        model_input=tinker.ModelInput.from_ints([1]),
        loss_fn_inputs={"weights": sparse, "target_tokens": dense},
    )
    (captured,) = capture_all([given])
    assert captured.tensors["weights"] is given.loss_fn_inputs["weights"]
    assert captured.arrays(0)["weights"].tolist() == [[0.0, 0.0, 2.0]]


def test_one_pass_makes_one_copy() -> None:
    class Counted(np.ndarray[Any, Any]):
        copies = 0

        def copy(self, order: Any = "C") -> Any:
            Counted.copies += 1
            return super().copy(order)

    def given() -> list[tinker.Datum]:
        return [datum(weights=np.ones(600, np.float32).view(Counted)) for _ in range(8)]

    captured = capture_all(given())
    assert Counted.copies == 0
    bases = {id(each.arrays(0)["weights"].base) for each in captured}
    assert len(bases) == 1
    assert [capture(each) for each in given()]
    assert Counted.copies == 8  # the control: one by one
