"""Builds datums from tokens, completions and chats, owns the shift by one, and checks datums.

A causal model predicts token t+1 from the tokens up to t: of a sequence of N tokens the model input
is the first N-1, the targets are the last N-1, and every per-token array is that of the target.
The builders take arrays in the caller's terms (one entry a token) and check lengths and values;
which losses there are is the trainer's business.

Every datum says which of its tokens count, by `weights`: 0 where a token takes no part in the loss,
nor in a ratio, a mean, a divisor or a metric.

`builders` <- `chats`; `checks` looks at datums that others built, too; `values` turns what callers
have for numbers and token ids into arrays.
"""

from __future__ import annotations

from fireworks_training.data.builders import (
    completion_datum,
    rl_datum,
    rollout_datum,
    supervised_datum,
)
from fireworks_training.data.chats import ChatTokenizer, chat_datum
from fireworks_training.data.checks import check_alignment, check_normalization

__all__ = [
    "ChatTokenizer",
    "chat_datum",
    "check_alignment",
    "check_normalization",
    "completion_datum",
    "rl_datum",
    "rollout_datum",
    "supervised_datum",
]
