"""Logprobs of other tokens at a prompt's places: tokens that the request names, or has drawn.

Knows requests and logits. Does not know streams or the model. Shapes: n places of a prompt, V
vocabulary, K named tokens a place, d drawn ones, m = K + d. Logprobs are raw, of
`log_softmax(logits)`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from fireworks_training.local.engine.requests import (
    MAX_TOP_LOGPROBS,
    StreamRequest,
    mix64,
    uniforms,
)
from fireworks_training.local.engine.sampling import draw
from fireworks_training.local.engine_frames import NO_TOKEN
from fireworks_training.local.model.devices import array_of


def probe(
    request: StreamRequest, low: int, logits_nV: torch.Tensor, lse_n: torch.Tensor
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Computes tokens `[n, m]` and their logprobs: the named `targets` first, then the drawn ones.

    Args:
        request: names the targets and the number of draws.
        low: place in the prompt of the first row; the others follow.
        logits_nV: logits for the tokens at those places.
        lse_n: their log-sum-exp.

    Returns:
        NO_TOKEN and 0 where a place names fewer targets than others.
    """
    n, asked = len(lse_n), width(request)
    if not asked:
        return np.empty((n, 0), np.int32), np.empty((n, 0), np.float32)
    parts: list[torch.Tensor] = []
    if request.targets:
        first = low - request.first_echo
        parts.append(
            torch.tensor(
                request.targets[first : first + n], dtype=torch.int64, device=logits_nV.device
            )
        )
    if request.draws:
        parts.append(draw(logits_nV, request.temperature, _uniforms(request, low, n)))
    ids_nm = torch.cat(parts, dim=1)
    none_nm = ids_nm == NO_TOKEN
    logprobs_nm = logits_nV.gather(1, ids_nm.clamp(min=0)) - lse_n[:, None]
    logprobs_nm = torch.where(none_nm, 0.0, logprobs_nm)
    return array_of(ids_nm.to(torch.int32)), array_of(logprobs_nm)


def width(request: StreamRequest) -> int:
    """Computes m of a request."""
    return (len(request.targets[0]) if request.targets else 0) + request.draws


def _uniforms(request: StreamRequest, low: int, n: int) -> npt.NDArray[np.float64]:
    """Gives each place and draw a random number of its own; the completion keeps its numbers."""
    columns = np.arange(request.draws, dtype=np.int64)
    counters = np.arange(low, low + n, dtype=np.int64)[:, None] * MAX_TOP_LOGPROBS + columns
    keys = np.full(counters.size, mix64(request.key ^ (1 << 63)), np.uint64)
    return uniforms(keys, counters.ravel().astype(np.uint64)).reshape(counters.shape)
