"""The sampled distribution is the one that temperature, top-k and top-p describe."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fireworks_training.local.engine.requests import (
    RequestRefused,
    key_of_seed,
    parse_add,
    uniforms,
)
from fireworks_training.local.engine.sampling import Sampled, SamplingRows, sample

GRID = 4000


def draw(
    logits: np.ndarray,
    uniform: np.ndarray,
    temperature: float = 1.0,
    top_p: float = 1.0,
    top_k: int = 0,
    banned: tuple[int, ...] = (),
) -> Sampled:
    n = len(uniform)
    rows = SamplingRows(
        temperature=np.full(n, temperature, np.float32),
        top_p=np.full(n, top_p, np.float32),
        top_k=np.full(n, top_k, np.int64),
        uniform=uniform,
        top_logprobs=np.zeros(n, np.int64),
        banned=dict.fromkeys(range(n), banned) if banned else {},
    )
    return sample(torch.from_numpy(np.tile(logits.astype(np.float32), (n, 1))), rows)


def policy(
    logits: np.ndarray, temperature: float, top_p: float, top_k: int, banned: tuple[int, ...]
) -> np.ndarray:
    """The behaviour policy, written from its definition."""
    logits = logits.astype(np.float64).copy()
    logits[list(banned)] = -np.inf
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    order = sorted(range(len(p)), key=lambda i: (-p[i], i))
    kept = order[:top_k] if top_k else order
    total = sum(p[i] for i in kept)
    nucleus, mass = [], 0.0
    for i in kept:
        if nucleus and mass >= top_p * total and top_p < 1:
            break
        nucleus.append(i)
        mass += p[i]
    out = np.zeros_like(p)
    out[nucleus] = p[nucleus] / mass
    return out


@settings(deadline=None)
@given(
    seed=st.integers(0, 10_000),
    size=st.integers(2, 12),
    temperature=st.floats(0.2, 3.0),
    top_p=st.sampled_from([1.0, 0.95, 0.6, 0.05]),
    top_k=st.sampled_from([0, 1, 3, 50]),
    ban=st.booleans(),
)
def test_frequencies_and_logprobs_are_the_policys(
    seed: int, size: int, temperature: float, top_p: float, top_k: int, ban: bool
) -> None:
    logits = np.random.default_rng(seed).normal(size=size) * 2
    banned = (int(logits.argmax()),) if ban else ()
    uniform = (np.arange(GRID) + 0.5) / GRID
    sampled = draw(logits, uniform, temperature, top_p, top_k, banned)
    expected = policy(logits, temperature, top_p, top_k, banned)
    frequency = np.bincount(sampled.tokens, minlength=size) / GRID
    np.testing.assert_allclose(frequency, expected, atol=2 / GRID + 1e-5)
    np.testing.assert_allclose(
        sampled.sampling_logprobs, np.log(expected[sampled.tokens]), atol=1e-4
    )
    raw = logits - np.logaddexp.reduce(logits)
    np.testing.assert_allclose(sampled.logprobs, raw[sampled.tokens], atol=1e-5)


def test_full_sampling_reports_the_same_logprob_twice() -> None:
    sampled = draw(np.random.default_rng(0).normal(size=50), np.linspace(0, 0.999, 40))
    assert sampled.logprobs.tolist() == sampled.sampling_logprobs.tolist()


def test_a_token_without_mass_is_never_drawn() -> None:
    logits = np.array([0.0, -np.inf, 0.0, -np.inf])
    logits[[1, 3]] = -1e30
    edges = np.array([0.0, 0.5, np.nextafter(0.5, 0), 1 - 2.0**-52])
    assert draw(logits, edges).tokens.tolist() == [0, 2, 0, 2]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_rows_that_are_not_finite_are_marked_and_spare_the_others(bad: float) -> None:
    logits = torch.zeros(3, 5)
    logits[1, 2] = bad
    n = 3
    rows = SamplingRows(
        np.ones(n, np.float32),
        np.ones(n, np.float32),
        np.zeros(n, np.int64),
        np.full(n, 0.5),
        np.zeros(n, np.int64),
        {},
    )
    sampled = sample(logits, rows)
    assert sampled.finite.tolist() == [True, False, True]
    np.testing.assert_allclose(sampled.logprobs[[0, 2]], -np.log(5), rtol=1e-6)


def test_uniform_numbers_depend_on_key_and_counter_alone() -> None:
    keys = np.array([key_of_seed(seed) for seed in (1, 2, 1)], np.uint64)
    counters = np.array([0, 0, 5], np.uint64)
    together = uniforms(keys, counters)
    alone = [float(uniforms(keys[i : i + 1], counters[i : i + 1])[0]) for i in range(3)]
    assert together.tolist() == alone
    assert len(set(alone)) == 3
    many = uniforms(np.full(20_000, key_of_seed(-7), np.uint64), np.arange(20_000, dtype=np.uint64))
    assert abs(many.mean() - 0.5) < 0.01
    assert many.min() >= 0
    assert many.max() < 1
    assert abs(np.corrcoef(many[:-1], many[1:])[0, 1]) < 0.03


GOOD = {"op": "add", "stream": 1, "prompt": [1, 2], "max_tokens": 3}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompt": []}, "prompt"),
        ({"prompt": [9]}, "prompt"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"max_tokens": 9}, "context"),
        ({"max_tokens": True}, "max_tokens"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_k": -1}, "top_k"),
        ({"seed": "s"}, "seed"),
        ({"echo": 3}, "echo"),
        ({"echo": 2, "targets": [[1], [1]]}, "each of the 1 echoed"),
        ({"echo": 1, "targets": [[8]]}, "targets"),
        ({"echo": 1, "targets": [list(range(8)) * 3]}, "targets"),
        ({"prompt": [1, 2, 3], "echo": 3, "targets": [[1], [1, 2]]}, "of one length"),
        ({"draws": 21}, "draws"),
        ({"min_tokens": 1, "stop_ids": list(range(8))}, "stop token"),
        ({"stop_ids": [8]}, "stop_ids"),
    ],
)
def test_requests_that_are_refused(change: dict[str, object], message: str) -> None:
    limits = {"vocab_size": 8, "max_context": 10, "eos_ids": frozenset({3})}
    assert parse_add(GOOD, **limits, fresh_key=5, now=1.0).stop_ids == {3}
    assert not parse_add({**GOOD, "ignore_eos": True}, **limits, fresh_key=5, now=1.0).stop_ids
    with pytest.raises(RequestRefused, match=message):
        parse_add({**GOOD, **change}, **limits, fresh_key=5, now=1.0)
