"""Handles: where a sampler samples, as a string that may travel to another process.

A handle holds no credentials: the process that opens it uses its own. It knows a sampler's
properties, and makes none.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping
from typing import Any, Protocol, TypedDict

import orjson

from fireworks_training._async.sampling.concurrency import (
    FixedConcurrencyController,
    SamplingConcurrencyController,
)
from fireworks_training.config import environment_api_key
from fireworks_training.errors import InvalidArgument

_CREDENTIALS = re.compile(
    r"auth|key|token|secret|cookie|passw|pwd|credential|jwt|assertion|signature|session|cf-access",
    re.IGNORECASE,
)
"""What the name of a header that proves who is asking contains; the official SDK's list, and more.
A header that is dropped for nothing can be given again, one that is kept can't be taken back."""

_CREDENTIAL_VALUES = re.compile(r"(?i)^(bearer|basic|digest|token)\s|^eyJ|^(fw|sk|tml)[-_]")


class Sampler(Protocol):
    """Declares what a handle tells of a sampler."""

    @property
    def inference_url(self) -> str: ...
    @property
    def model(self) -> str: ...
    @property
    def additional_headers(self) -> Mapping[str, str]: ...
    @property
    def concurrency_controller(self) -> SamplingConcurrencyController: ...
    @property
    def integer_stops(self) -> bool: ...
    @property
    def verify_ssl(self) -> bool: ...


class Arguments(TypedDict):
    """Names the arguments of a `DeploymentSampler` that a handle gives."""

    inference_url: str
    model: str
    api_key: str
    concurrency_controller: SamplingConcurrencyController | None
    additional_headers: dict[str, str]
    integer_stops: bool
    verify_ssl: bool


def encode(sampler: Sampler) -> str:
    """Encode where a sampler samples, without credentials and tokenizer."""
    controller = sampler.concurrency_controller
    fixed = isinstance(controller, FixedConcurrencyController)
    handle = {
        "inference_url": sampler.inference_url,  # holds no name or password: the pool refuses such
        "model": sampler.model,
        "headers": {
            name: value
            for name, value in sampler.additional_headers.items()
            if not (_CREDENTIALS.search(name) or _CREDENTIAL_VALUES.search(value))
        },
        # A fixed window is the caller's choice; another one is what this process has learned.
        "window": controller.window_size if fixed else None,
        "integer_stops": sampler.integer_stops,
        "verify_ssl": sampler.verify_ssl,
    }
    return base64.urlsafe_b64encode(orjson.dumps(handle)).decode()


def arguments(handle: str, *, api_key: str | None = None) -> Arguments:
    """Decode a handle into the arguments of a sampler.

    Args:
        api_key: default `FIREWORKS_API_KEY`.

    Raises:
        InvalidArgument: this is not a handle, or there is no key.
    """
    try:
        fields: dict[str, Any] = json.loads(base64.urlsafe_b64decode(handle))
        window: int | None = fields["window"]
        inference_url, model = str(fields["inference_url"]), str(fields["model"])
        headers = {str(name): str(value) for name, value in fields["headers"].items()}
        integer_stops, verify_ssl = bool(fields["integer_stops"]), bool(fields["verify_ssl"])
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise InvalidArgument(
            "this is no sampler handle: pass what get_sampler_handle() returned"
        ) from error
    key = api_key or environment_api_key()
    if not key:
        raise InvalidArgument(
            "a sampler that comes from another process brings no credentials: set "
            "FIREWORKS_API_KEY in this process, or pass api_key= to from_sampler_handle()"
        )
    return {
        "inference_url": inference_url,
        "model": model,
        "api_key": key,
        "concurrency_controller": None if window is None else FixedConcurrencyController(window),
        "additional_headers": headers,
        "integer_stops": integer_stops,
        "verify_ssl": verify_ssl,
    }
