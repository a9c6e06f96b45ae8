"""Sampling: from logits to one token a row, by temperature, top-k and top-p, with its logprobs.

Knows rows and their settings. Does not know streams or the model.

Shapes: n rows, V vocabulary, k top logprobs. All arithmetic is float32, sums of probabilities
float64. Two distributions are reported on:

- raw: `log_softmax(logits)`, what a trainer's forward gives for the same token;
- sampling: after masking, temperature, top-k and then top-p, renormalised: the behaviour policy.
  With temperature 0 it is the point mass on the most likely token, so its logprob is 0.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from fireworks_training.local.model.devices import array_of, on


@dataclass(frozen=True, slots=True)
class SamplingRows:
    """Holds the sampling parameters of n rows, as arrays of n entries.

    Attributes:
        temperature: float32; 0 is greedy.
        top_p: float32 in (0, 1].
        top_k: int64; 0 is off.
        uniform: float64 in [0, 1), one number a row, which decides the token.
        top_logprobs: int64, most likely tokens to report.
        banned: for some rows, tokens that must not be sampled.
    """

    temperature: npt.NDArray[np.float32]
    top_p: npt.NDArray[np.float32]
    top_k: npt.NDArray[np.int64]
    uniform: npt.NDArray[np.float64]
    top_logprobs: npt.NDArray[np.int64]
    banned: Mapping[int, Collection[int]]


@dataclass(frozen=True, slots=True)
class Sampled:
    """Holds the sampled tokens as arrays of n entries, top ones `[n, k]`, k the largest wanted.

    `finite` is False where the logits held NaN, infinity or nothing but -infinity: the row's other
    values mean nothing.
    """

    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    sampling_logprobs: npt.NDArray[np.float32]
    finite: npt.NDArray[np.bool_]
    top_ids: npt.NDArray[np.int32]
    top_logprobs: npt.NDArray[np.float32]


def sample(logits_nV: torch.Tensor, rows: SamplingRows) -> Sampled:
    """Samples one token for each row of `logits_nV` (float32 `[n, V]`, not changed)."""
    raw = _Cumulated(logits_nV)
    # A sum of exponentials is finite where no logit is NaN or infinite and not all are -infinite.
    finite_n = np.isfinite(raw.total_n)
    if not finite_n.all():
        keep_n1 = on(logits_nV.device, finite_n)[:, None]
        logits_nV = torch.where(keep_n1, logits_nV, 0.0)
        raw = _Cumulated(logits_nV)

    greedy_n = rows.temperature == 0
    policy_nV = _policy_logits(logits_nV, rows)
    policy = raw if policy_nV is logits_nV else _Cumulated(policy_nV)
    if greedy_n.all():
        at_n1 = policy_nV.argmax(dim=-1, keepdim=True)
    else:
        at_n1 = policy.draw(rows.uniform[:, None])
        if greedy_n.any():
            most_n1 = policy_nV.argmax(dim=-1, keepdim=True)
            at_n1 = torch.where(on(logits_nV.device, greedy_n)[:, None], most_n1, at_n1)

    tokens = array_of(at_n1)[:, 0].astype(np.int32)
    logprobs = raw.logprobs(at_n1)
    sampling = logprobs if policy is raw else policy.logprobs(at_n1)
    top_ids, top_logprobs = top(logits_nV, raw.lse_n, rows.top_logprobs)
    return Sampled(
        tokens=tokens,
        logprobs=logprobs,
        sampling_logprobs=np.where(greedy_n, np.float32(0), sampling),
        finite=finite_n,
        top_ids=top_ids,
        top_logprobs=top_logprobs,
    )


class _Cumulated:
    """Holds distributions given by logits, cumulated over the vocabulary in one pass.

    Attributes:
        total_n: float64, sum of exponentials over the largest one. NaN or infinite where logits
            are.
        lse_n: float64, log-sum-exp.
    """

    def __init__(self, logits_nV: torch.Tensor) -> None:
        self._logits_nV = logits_nV
        most_n1 = logits_nV.amax(dim=-1, keepdim=True)
        self._cdf_nV = (logits_nV - most_n1).exp_().cumsum(dim=-1, dtype=torch.float64)
        self.total_n: npt.NDArray[np.float64] = array_of(self._cdf_nV[:, -1])
        with np.errstate(invalid="ignore"):
            self.lse_n: npt.NDArray[np.float64] = array_of(most_n1)[:, 0] + np.log(self.total_n)

    def draw(self, uniform_nk: npt.NDArray[np.float64]) -> torch.Tensor:
        """Finds the first token whose cumulated probability exceeds each number of a row."""
        total_n1 = self.total_n[:, None]
        # The number is below 1 by 2^-52 at least, so the target stays below the total, and a token
        # without mass (equal to its predecessor) is never the first to exceed it.
        target_nk = np.minimum(uniform_nk * total_n1, np.nextafter(total_n1, 0.0))
        return torch.searchsorted(self._cdf_nV, on(self._cdf_nV.device, target_nk), right=True)

    def logprobs(self, at_n1: torch.Tensor) -> npt.NDArray[np.float32]:
        """Computes the logprob of one token a row."""
        chosen_n: npt.NDArray[np.float32] = array_of(self._logits_nV.gather(1, at_n1))[:, 0]
        return (chosen_n - self.lse_n).astype(np.float32)


def top(
    logits_nV: torch.Tensor, lse_n: npt.NDArray[np.floating], wanted_n: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Finds the most likely tokens of each row and their raw logprobs, best first.

    Rows that want fewer than the most wanted are padded with id -1.
    """
    n = logits_nV.shape[0]
    k = int(wanted_n.max(initial=0))
    if k == 0:
        return np.empty((n, 0), np.int32), np.empty((n, 0), np.float32)
    values_nk, ids_nk = logits_nV.topk(k, dim=-1)
    ids = array_of(ids_nk.to(torch.int32))
    ids[np.arange(k) >= wanted_n[:, None]] = -1
    return ids, (array_of(values_nk) - lse_n[:, None]).astype(np.float32)


def draw(
    logits_nV: torch.Tensor, temperature: float, uniform_nk: npt.NDArray[np.float64]
) -> torch.Tensor:
    """Draws tokens int64 `[n, k]`, independently and at a temperature, from each row's logits.

    Temperature 0 gives the most likely one. Logits that are not finite give any token.
    """
    if temperature == 0:
        return logits_nV.argmax(dim=-1)[:, None].expand(-1, uniform_nk.shape[1])
    drawn_nk = _Cumulated(logits_nV / temperature).draw(uniform_nk)
    return drawn_nk.clamp(max=logits_nV.shape[-1] - 1)


def _policy_logits(logits_nV: torch.Tensor, rows: SamplingRows) -> torch.Tensor:
    """Computes the behaviour policy's logits, -inf where it has no mass; the input if equal."""
    policy_nV = logits_nV
    if rows.banned:
        policy_nV = policy_nV.clone()
        for row, tokens in rows.banned.items():
            policy_nV[row, list(tokens)] = -torch.inf
    temperature_n = np.where(rows.temperature == 0, np.float32(1), rows.temperature)
    if np.any(temperature_n != 1):
        policy_nV = policy_nV / on(logits_nV.device, temperature_n)[:, None]
    filtered = np.flatnonzero(((rows.top_k > 0) | (rows.top_p < 1)) & (rows.temperature > 0))
    if len(filtered):
        if policy_nV is logits_nV:
            policy_nV = policy_nV.clone()
        device = logits_nV.device
        at = on(device, filtered)
        policy_nV[at] = _filter(
            policy_nV[at],
            on(device, rows.top_k[filtered]),
            on(device, rows.top_p[filtered]),
        )
    return policy_nV


def _filter(logits_nV: torch.Tensor, top_k_n: torch.Tensor, top_p_n: torch.Tensor) -> torch.Tensor:
    """Keeps the top-k tokens, then the smallest set of the most likely that reaches top-p."""
    vocabulary = logits_nV.shape[-1]
    sorted_nV, order_nV = logits_nV.sort(dim=-1, descending=True, stable=True)
    limit_n = torch.where(top_k_n > 0, top_k_n, vocabulary)
    rank_V = torch.arange(vocabulary, device=logits_nV.device)
    sorted_nV = sorted_nV.masked_fill(rank_V >= limit_n[:, None], -torch.inf)
    probs_nV = sorted_nV.softmax(dim=-1, dtype=torch.float64)
    # A token stays while the mass before it is below top-p, so the first one always does.
    before_nV = probs_nV.cumsum(dim=-1) - probs_nV
    outside_nV = (before_nV >= top_p_n.to(torch.float64)[:, None]) & (top_p_n < 1)[:, None]
    outside_nV[:, 0] = False
    sorted_nV = sorted_nV.masked_fill(outside_nV, -torch.inf)
    return torch.empty_like(logits_nV).scatter_(1, order_nV, sorted_nV)
