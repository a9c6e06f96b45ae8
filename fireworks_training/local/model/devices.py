"""The device that models are computed on, and conversions of arrays to it and back.

Knows devices. Does not know models. The same code runs on a CPU and on a CUDA device: a model is
put on the device once, what is made from numbers of the host goes there by `on`, and what leaves
for the host goes by `array_of`. (CUDA has not been tried on hardware: the tests hold that no tensor
of a forward pass, a backward pass or a decode step is made anywhere but on the model's device.)
"""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch


def chosen() -> torch.device:
    """Return the first CUDA device where there is one, else the CPU.

    An empty `CUDA_VISIBLE_DEVICES` in the platform's environment leaves only the CPU; another one
    names the device that is the first.
    """
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def on(device: torch.device, array: npt.NDArray[Any]) -> torch.Tensor:
    """Make a tensor of an array on a device; on the CPU it shares the array's memory."""
    return torch.from_numpy(array).to(device)


def array_of(tensor: torch.Tensor) -> npt.NDArray[Any]:
    """Make an array of a tensor, without its graph; on the CPU it shares the tensor's memory."""
    array: npt.NDArray[Any] = tensor.detach().cpu().numpy()
    return array
