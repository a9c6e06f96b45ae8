"""Scores a small model on word problems: sampled and greedy accuracy, and accuracy by style.

Knows how to generate with `transformers` and what counts as right. Does not change model or
tokenizer; sampling draws from torch's global generator, which the caller seeds.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

from fireworks_training.local.pretraining.data import Encoder
from fireworks_training.local.pretraining.problems import ANSWER_MARK, Arithmetic, final_answer
from fireworks_training.local.pretraining.tokenizer import END, PAD

MAX_NEW_TOKENS = 40


@dataclass(frozen=True, slots=True)
class ModelEvaluation:
    """Holds shares in 0..1 over one completion a problem; `working_*` at temperature 1.

    `working_share` is how often a sampled completion shows its working; `working_accuracy` and
    `blurt_accuracy` are the accuracies of the two kinds, 0 where a kind never came.
    """

    problems: int
    sampled_accuracy: float
    greedy_accuracy: float
    working_share: float
    working_accuracy: float
    blurt_accuracy: float


def evaluate(
    model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, problems: Sequence[Arithmetic]
) -> ModelEvaluation:
    """Completes each problem once at temperature 1 and once greedily, and scores both."""
    sampled = complete(model, tokenizer, problems, greedy=False)
    greedy = complete(model, tokenizer, problems, greedy=True)
    right = _right(problems, sampled)
    working = [not text.startswith(ANSWER_MARK) for text in sampled]
    by_working = [ok for ok, shown in zip(right, working, strict=True) if shown]
    by_blurt = [ok for ok, shown in zip(right, working, strict=True) if not shown]
    return ModelEvaluation(
        problems=len(problems),
        sampled_accuracy=_share(right),
        greedy_accuracy=_share(_right(problems, greedy)),
        working_share=_share(working),
        working_accuracy=_share(by_working),
        blurt_accuracy=_share(by_blurt),
    )


def complete(
    model: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    problems: Sequence[Arithmetic],
    *,
    greedy: bool,
) -> list[str]:
    """Samples one completion a problem as text, without specials, up to `MAX_NEW_TOKENS` tokens."""
    encoder = Encoder(tokenizer)
    prompts = [encoder.prompt(problem) for problem in problems]
    longest = max(map(len, prompts))
    vocabulary = tokenizer.get_vocab()
    pad, end = vocabulary[PAD], vocabulary[END]
    ids_BT = torch.tensor([[pad] * (longest - len(ids)) + ids for ids in prompts])
    mask_BT = torch.tensor([[0] * (longest - len(ids)) + [1] * len(ids) for ids in prompts])
    model.eval()  # type: ignore[no-untyped-call]
    settings = (
        {"do_sample": False} if greedy else {"do_sample": True, "temperature": 1.0, "top_k": 0}
    )
    with torch.no_grad():
        output_BT = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids=ids_BT,
            attention_mask=mask_BT,
            max_new_tokens=MAX_NEW_TOKENS,
            eos_token_id=end,
            pad_token_id=pad,
            **settings,
        )
    completions_BT = output_BT[:, longest:].tolist()
    return [str(tokenizer.decode(ids, skip_special_tokens=True)) for ids in completions_BT]


def _right(problems: Sequence[Arithmetic], completions: Sequence[str]) -> list[bool]:
    return [
        final_answer(completion) == problem.answer
        for problem, completion in zip(problems, completions, strict=True)
    ]


def _share(flags: Sequence[bool]) -> float:
    return sum(flags) / len(flags) if flags else 0.0
