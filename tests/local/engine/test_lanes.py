"""Rows of a lane attend to their own tokens, whichever rows came, left or moved before."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fireworks_training.local.engine.lanes import Lane, LaneKind
from fireworks_training.local.engine.prompts import Geometry, Prompt

LAYERS, HEADS, REPEATS, SIZE = 2, 2, 2, 4
GEOMETRY = Geometry(LAYERS, HEADS, SIZE, SIZE, torch.device("cpu"))
SCALE = 0.5


class Row:
    """Keys and values of one row, kept apart."""

    def __init__(self, prompt: Prompt) -> None:
        self.keys_LHCD = prompt.keys_LHPD.clone()
        self.values_LHCD = prompt.values_LHPD.clone()

    def attend(self, layer: int, query_QD: torch.Tensor) -> torch.Tensor:
        query_HRD = query_QD.view(HEADS, REPEATS, SIZE)
        scores_HRC = query_HRD @ self.keys_LHCD[layer].mT * SCALE
        return (scores_HRC.softmax(-1) @ self.values_LHCD[layer]).flatten(0, 1)


def prompt_of(length: int, random: torch.Generator) -> Prompt:
    """A prompt that was read, with keys and values of its own."""
    prompt = Prompt(tuple(range(length)), GEOMETRY)
    prompt.keys_LHPD.normal_(generator=random)
    prompt.values_LHPD.normal_(generator=random)
    prompt.done = length
    return prompt


def step(lane: Lane, rows: dict[int, Row], random: torch.Generator) -> None:
    """One token for every row; all of them attend as they should."""
    lane.open_column()
    for layer in range(LAYERS):
        queries, keys, values = (
            torch.randn(len(lane), heads, SIZE, generator=random)
            for heads in (HEADS * REPEATS, HEADS, HEADS)
        )
        out = lane.attend(layer, queries, keys, values, SCALE)
        for place, slot in enumerate(lane.slots.tolist()):
            row = rows[slot]
            if layer == 0:
                empty = torch.zeros(LAYERS, HEADS, 1, SIZE)
                row.keys_LHCD = torch.cat((row.keys_LHCD, empty), 2)
                row.values_LHCD = torch.cat((row.values_LHCD, empty), 2)
            row.keys_LHCD[layer, :, -1] = keys[place]
            row.values_LHCD[layer, :, -1] = values[place]
            torch.testing.assert_close(out[place], row.attend(layer, queries[place]))


@pytest.mark.parametrize("shared", [False, True])
def test_columns_that_are_laid_out_anew_keep_their_tokens(shared: bool) -> None:
    random = torch.Generator().manual_seed(0)
    numbers = np.random.default_rng(0)
    prompts = [prompt_of(length, random) for length in (3, 7, 20)]
    lane = Lane(LaneKind.of(20, 64, shared=shared), GEOMETRY)
    rows: dict[int, Row] = {}
    for slot in range(150):
        if slot % 2 == 0:
            prompt = prompts[int(numbers.integers(3))]
            lane.join(prompt, [slot], [60], coming=slot % 3)
            rows[slot] = Row(prompt)
        if len(rows) > 6 or numbers.random() < 0.2:
            # The oldest one first: the longest row goes, and the columns become fewer.
            leaving = min(rows) if numbers.random() < 0.5 else int(numbers.choice(list(rows)))
            lane.leave({leaving})
            del rows[leaving]
        if rows:
            step(lane, rows, random)


@pytest.mark.parametrize("shared", [False, True])
def test_what_a_row_left_behind_reaches_nobody(shared: bool) -> None:
    random = torch.Generator().manual_seed(1)
    prompt, long = prompt_of(4, random), prompt_of(40, random)
    diverged = prompt_of(40, random)
    diverged.keys_LHPD.fill_(torch.nan)
    diverged.values_LHPD.fill_(torch.nan)
    lane = Lane(LaneKind.of(40, 64, shared=shared), GEOMETRY)
    lane.join(prompt, [0], [60], coming=4)  # no new memory after this
    rows = {0: Row(prompt)}
    lane.join(diverged, [1], [60])
    for _ in range(20):  # with the columns laid out anew once
        lane.open_column()
        new = torch.full((2, HEADS, SIZE), torch.nan)
        new[0] = 1.0
        for layer in range(LAYERS):
            lane.attend(layer, torch.ones(2, HEADS * REPEATS, SIZE), new, new, SCALE)
        row = rows[0]
        ones = torch.ones(LAYERS, HEADS, 1, SIZE)
        row.keys_LHCD = torch.cat((row.keys_LHCD, ones), 2)
        row.values_LHCD = torch.cat((row.values_LHCD, ones), 2)
    lane.leave({1})
    for slot, joining in ((2, prompt), (3, prompt_of(5, random)), (4, long)):
        lane.join(joining, [slot], [60])
        rows[slot] = Row(joining)
    for _ in range(40):
        step(lane, rows, random)
