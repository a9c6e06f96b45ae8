"""Subclasses of tinker's types, with the fields that only the Fireworks contract has.

The one module that imports tinker at its top; importing it may load torch, so it is itself only
imported inside functions, and through the lazy root.
"""

from __future__ import annotations

from typing import Literal

import tinker.types as tinker_types
from tinker.types import AdamParams as _AdamParams
from tinker.types import SaveWeightsForSamplerResponse as _SaveWeightsForSamplerResponse

from fireworks_training.models import Snapshot


class SaveWeightsForSamplerResponse(_SaveWeightsForSamplerResponse):
    """A saved sampler snapshot.

    Attributes:
        path: public identity of the snapshot, to be passed as `model_path`; not a storage URI.
        snapshot: kind, size and hash of the snapshot, as far as the trainer tells.
    """

    snapshot: Snapshot


class AdamParams(_AdamParams):
    """Parameters of an optimizer step, and the choice of the gradient norms that it reports.

    Attributes:
        emit_grad_norm_metrics: "off", "basic" or "detailed"; False is "off" and True "basic". None
            leaves it to the trainer. The argument of `optim_step` goes before it.
    """

    emit_grad_norm_metrics: Literal["off", "basic", "detailed"] | bool | None = None


__all__ = ["AdamParams", "SaveWeightsForSamplerResponse", "tinker_types"]
