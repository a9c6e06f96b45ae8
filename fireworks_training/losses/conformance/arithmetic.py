"""The objectives' terms and their derivatives in plain arithmetic, from the papers' equations.

Written apart from the library's tensor functions, and without torch: floats in, floats out. Each
policy term takes the counted tokens of one row and gives for every token its value x_t and the
derivative of sum x_t by its logprob l_t; each pair term those of one pair.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Terms = tuple[list[float], list[float]]
PairTerm = tuple[float, list[float], list[float]]


@dataclass(frozen=True, slots=True)
class Counted:
    """The tokens of a row that count; lists of equal length.

    Attributes:
        logprobs: l. sampled: q. old: the ratio's denominator. reference, teacher: their logprobs.
        advantages: A, one a token.
        kept: the probability that the sampler kept at each token, by top-p or top-k.
    """

    logprobs: list[float]
    sampled: list[float]
    old: list[float]
    reference: list[float]
    teacher: list[float]
    advantages: list[float]
    kept: list[float]


Term = Callable[[Counted, list[float]], Terms]


def exp(value: float) -> float:
    """e to the power of a value; infinity where that is no float."""
    return math.exp(value) if value < 709.0 else math.inf


def each(token: Callable[[float, float, float], tuple[float, float]]) -> Term:
    """Make a term of one that looks at a token alone: (l, old, A) -> (x, dx/dl)."""

    def term(row: Counted, advantages: list[float]) -> Terms:
        found = [
            token(*values) if values[2] != 0 else (0.0, 0.0)
            for values in zip(row.logprobs, row.old, advantages, strict=True)
        ]
        return [x for x, _ in found], [g for _, g in found]

    return term


def clipped(ratio: float, advantage: float, low: float, high: float) -> tuple[float, float]:
    """-min(r A, clip(r) A), and its derivative by log r."""
    if advantage == 0:
        return 0.0, 0.0
    plain, held = ratio * advantage, min(max(ratio, low), high) * advantage
    return (-plain, -plain) if plain <= held else (-held, 0.0)


def token_clip(low: float, high: float) -> Term:
    """PPO's term of each token."""
    return each(lambda l, old, a: clipped(exp(l - old), a, low, high))


def sequence_clip(low: float, high: float) -> Term:
    """GSPO: one ratio a row, s = exp(mean(l - old)), in its token form (eq. 13 and 14): where the
    advantages of a row differ, each token's l has the gradient of its own term."""

    def term(row: Counted, advantages: list[float]) -> Terms:
        count = len(row.logprobs)
        ratio = exp(sum(l - o for l, o in zip(row.logprobs, row.old, strict=True)) / count)
        found = [clipped(ratio, advantage, low, high) for advantage in advantages]
        return [x for x, _ in found], [g for _, g in found]

    return term


def cispo(low: float, high: float) -> Term:
    """-clamp(r) A l; the weight is a constant."""

    def token(l: float, old: float, advantage: float) -> tuple[float, float]:
        weight = min(max(exp(l - old), low), high)
        return -weight * advantage * l, -weight * advantage

    return each(token)


def dppo(delta_low: float, delta_high: float) -> Term:
    """-r A where the probability has not moved too far along A, else nothing."""

    def token(l: float, old: float, advantage: float) -> tuple[float, float]:
        moved = exp(l) - exp(old)
        if (advantage > 0 and moved > delta_high) or (advantage < 0 and -moved > delta_low):
            return 0.0, 0.0
        return -exp(l - old) * advantage, -exp(l - old) * advantage

    return each(token)


def sapo(tau_positive: float, tau_negative: float) -> Term:
    """-(4 / tau) sigmoid(tau (r - 1)) A."""

    def token(l: float, old: float, advantage: float) -> tuple[float, float]:
        tau, ratio = (tau_positive if advantage > 0 else tau_negative), exp(l - old)
        gate = 1.0 / (1.0 + exp(-tau * (ratio - 1.0)))
        slope = 0.0 if math.isinf(ratio) else 4.0 * gate * (1.0 - gate) * ratio
        return -4.0 / tau * gate * advantage, -slope * advantage

    return each(token)


def importance() -> Term:
    """-r A."""
    return each(lambda l, old, a: (-exp(l - old) * a, -exp(l - old) * a))


def reinforce() -> Term:
    """-l A."""
    return each(lambda l, _, a: (-l * a, -a))


def dro(beta: float) -> Term:
    """-(A l - beta / 2 (l - old)^2), the square at every counted token."""

    def term(row: Counted, advantages: list[float]) -> Terms:
        gaps = [l - old for l, old in zip(row.logprobs, row.old, strict=True)]
        rows = list(zip(row.logprobs, gaps, advantages, strict=True))
        values = [-a * l + beta / 2 * d * d for l, d, a in rows]
        return values, [-a + beta * d for _, d, a in rows]

    return term


def supervised() -> Term:
    """-l."""
    return lambda row, _: ([-l for l in row.logprobs], [-1.0] * len(row.logprobs))


def kl_terms(kind: str, row: Counted, cap: float) -> Terms:
    """k2, k3 or k3+ of each token, times min(exp(l - q), cap)."""
    values, slopes = list[float](), list[float]()
    for l, q, reference in zip(row.logprobs, row.sampled, row.reference, strict=True):
        gap, whole = l - reference, exp(l - q)
        rho = min(whole, cap)
        third = exp(-gap) + gap - 1.0
        if kind == "k2":
            values.append(rho * gap * gap / 2)
            slopes.append(rho * gap)
        elif kind == "k3+":
            values.append(rho * third)
            slopes.append(rho * gap)
        else:
            values.append(rho * third)
            own = rho * third if whole < cap else 0.0
            slopes.append(own + rho * (1.0 - exp(-gap)))
    return values, slopes


def correction(kind: str, low: float, high: float, row: Counted) -> list[float]:
    """The weight of each token, from w = exp(old - q)."""
    logs = [old - q for old, q in zip(row.old, row.sampled, strict=True)]
    if kind == "tis":
        return [min(exp(value), high) for value in logs]
    if kind == "decoupled":
        return [exp(value) for value in logs]
    if kind == "icepop":
        return [exp(value) if low <= exp(value) <= high else 0.0 for value in logs]
    mean = kind == "geometric"
    whole = exp(sum(logs) / (len(logs) if mean else 1))
    kept = low <= whole <= high
    return [(1.0 if mean else whole) if kept else 0.0] * len(logs)


def _log_sigmoid(value: float) -> tuple[float, float]:
    """log sigmoid, and its derivative."""
    if value >= 0:
        small = math.exp(-value)
        return -math.log1p(small), small / (1.0 + small)
    small = math.exp(value)
    return value - math.log1p(small), 1.0 / (1.0 + small)


def _margin(chosen: Counted, rejected: Counted, means: bool) -> tuple[float, float, float]:
    """h, and its derivatives by each chosen and each rejected logprob."""
    won = [l - r for l, r in zip(chosen.logprobs, chosen.reference, strict=True)]
    lost = [l - r for l, r in zip(rejected.logprobs, rejected.reference, strict=True)]
    up, down = (1 / len(won), -1 / len(lost)) if means else (1.0, -1.0)
    return up * sum(won) + down * sum(lost), up, down


def dpo(
    chosen: Counted, rejected: Counted, *, beta: float, smoothing: float, means: bool
) -> PairTerm:
    """-(1 - e) log sigmoid(beta h) - e log sigmoid(-beta h)."""
    margin, up, down = _margin(chosen, rejected, means)
    right, slope_right = _log_sigmoid(beta * margin)
    wrong, slope_wrong = _log_sigmoid(-beta * margin)
    slope = beta * (-(1 - smoothing) * slope_right + smoothing * slope_wrong)
    value = -(1 - smoothing) * right - smoothing * wrong
    return value, [slope * up] * len(chosen.logprobs), [slope * down] * len(rejected.logprobs)


def ipo(chosen: Counted, rejected: Counted, *, tau: float) -> PairTerm:
    """(h - 1 / (2 tau))^2, h of means."""
    margin, up, down = _margin(chosen, rejected, True)
    gap = margin - 1 / (2 * tau)
    slope = 2 * gap
    return gap * gap, [slope * up] * len(chosen.logprobs), [slope * down] * len(rejected.logprobs)


def _log_odds(logprobs: Sequence[float]) -> tuple[float, float]:
    """a - log(1 - e^a) of the mean a, and its derivative by a: 1 / (1 - e^a)."""
    mean = sum(logprobs) / len(logprobs)
    rest = -math.expm1(mean)
    return mean - math.log(rest), 1.0 / rest


def orpo(chosen: Counted, rejected: Counted, *, lam: float) -> PairTerm:
    """The mean NLL of the chosen response - lam log sigmoid of the difference of log odds."""
    won, slope_won = _log_odds(chosen.logprobs)
    lost, slope_lost = _log_odds(rejected.logprobs)
    value, slope = _log_sigmoid(won - lost)
    m, n = len(chosen.logprobs), len(rejected.logprobs)
    nll = -sum(chosen.logprobs) / m
    return (
        nll - lam * value,
        [-1 / m - lam * slope * slope_won / m] * m,
        [lam * slope * slope_lost / n] * n,
    )
