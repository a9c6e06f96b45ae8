"""Loads the message classes of the Tinker protobuf dialect.

They come from the file that the `tinker` package generated from its schema, loaded by its path:
importing the package itself loads torch and transformers where they are installed, and takes
seconds; this takes 0.04 s. A later `import tinker` gives the same classes, since protobuf keeps one
pool of them.

Raises at import:
    MissingExtra: `tinker` is not installed, or has no such file.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from fireworks_training.errors import MissingExtra

FILE = "proto/tinker_public_pb2.py"
"""The path of the generated file in the package."""


def load(package: str = "tinker") -> ModuleType:
    """Load the generated module without importing the package it is in.

    Raises:
        MissingExtra: there is no such package, or it has no such file.
    """
    found = importlib.util.find_spec(package)
    places = None if found is None else found.submodule_search_locations
    path = Path(places[0]) / FILE if places else None
    if path is None or not path.is_file():
        raise MissingExtra(
            f"the protobuf dialect needs the schema in {package} 0.38: "
            "pip install 'tinker>=0.38,<0.39'"
        )
    spec = importlib.util.spec_from_file_location("_fireworks_training_tinker_schema", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


if TYPE_CHECKING:
    from tinker.proto.tinker_public_pb2 import (
        DESCRIPTOR,
        ArrayRecord,
        BatchedTensor,
        Datum,
        ForwardBackwardOutput,
        ForwardBackwardRequest,
        PromptAltTokens,
        SampledSequence,
        SampleResponse,
        Tensor,
        TopkLogprobs,
    )
else:
    _module = load()
    DESCRIPTOR = _module.DESCRIPTOR
    ArrayRecord = _module.ArrayRecord
    BatchedTensor = _module.BatchedTensor
    Datum = _module.Datum
    ForwardBackwardOutput = _module.ForwardBackwardOutput
    ForwardBackwardRequest = _module.ForwardBackwardRequest
    # Of answers to samples, which the local platform writes; tinker 0.23 has no such messages.
    PromptAltTokens = getattr(_module, "PromptAltTokens", None)
    SampledSequence = _module.SampledSequence
    SampleResponse = _module.SampleResponse
    Tensor = _module.Tensor
    TopkLogprobs = getattr(_module, "TopkLogprobs", None)

TYPED_OPTIONS = "loss_fn_config_v2" in ForwardBackwardRequest.DESCRIPTOR.fields_by_name
"""Whether options of a loss may be text; the schema of tinker 0.23 has numbers alone."""

__all__ = [
    "DESCRIPTOR",
    "TYPED_OPTIONS",
    "ArrayRecord",
    "BatchedTensor",
    "Datum",
    "ForwardBackwardOutput",
    "ForwardBackwardRequest",
    "PromptAltTokens",
    "SampleResponse",
    "SampledSequence",
    "Tensor",
    "TopkLogprobs",
]
