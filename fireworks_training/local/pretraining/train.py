"""The pretraining loop: trains a Qwen3 model of a given size from a seed, bit for bit repeatable.

Knows the architecture, the optimizers and their schedule. Does not know files or scores.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from fireworks_training.local.pretraining.data import IGNORED, Encoder, batches
from fireworks_training.local.pretraining.tokenizer import BOS, END, PAD

MAX_CONTEXT = 2048
_HEAD_DIM = 32
_MLP_RATIO = 3
_WARM_UP_STEPS = 30
_MATRIX_RATE = 1.5e-2
_OTHER_RATE = 3e-3


@dataclass(frozen=True, slots=True)
class PretrainingPlan:
    """Holds all that a pretraining run depends on: runs of equal plans write equal weights.

    The defaults make the model that ships, of 0.94 million parameters.
    """

    seed: int = 0
    steps: int = 2500
    batch_size: int = 16
    hidden_size: int = 128
    layers: int = 4


@dataclass(frozen=True, slots=True)
class LossPoint:
    """Holds a point of the loss curve: the mean loss since the point before, in nats."""

    step: int
    loss: float
    seconds: float


def build_model(plan: PretrainingPlan, tokenizer: PreTrainedTokenizerFast) -> Qwen3ForCausalLM:
    """Makes a randomly initialised float32 model, with its own input and output embeddings."""
    heads = plan.hidden_size // _HEAD_DIM
    vocabulary = tokenizer.get_vocab()
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=plan.hidden_size,
        intermediate_size=_MLP_RATIO * plan.hidden_size,
        num_hidden_layers=plan.layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        head_dim=_HEAD_DIM,
        max_position_embeddings=MAX_CONTEXT,
        tie_word_embeddings=False,
        initializer_range=0.05,
        bos_token_id=vocabulary[BOS],
        eos_token_id=vocabulary[END],
        pad_token_id=vocabulary[PAD],
    )
    return Qwen3ForCausalLM(config)


@contextmanager
def repeatable(seed: int) -> Generator[None]:
    """Sets one thread, deterministic kernels and a seed inside; torch is as before afterwards."""
    threads = torch.get_num_threads()
    deterministic = torch.are_deterministic_algorithms_enabled()
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(deterministic)


def pretrain(
    plan: PretrainingPlan,
    tokenizer: PreTrainedTokenizerFast,
    report: Callable[[LossPoint], None],
    report_every: int = 50,
) -> Qwen3ForCausalLM:
    """Trains a new model; calls `report` every `report_every` steps and at the end.

    Raises RuntimeError where torch is older than 2.9 and has no Muon.
    """
    if not hasattr(torch.optim, "Muon"):
        raise RuntimeError(
            f"torch {torch.__version__} has no Muon optimizer; pretraining needs torch 2.9 or newer"
        )
    model = build_model(plan, tokenizer)
    optimizers = _optimizers(model)
    started = time.monotonic()
    losses: list[float] = []
    stream = batches(Encoder(tokenizer), plan.seed, plan.steps, plan.batch_size)
    for step, (ids, labels) in enumerate(stream, start=1):
        loss = completion_loss(model, ids, labels)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        # Linear warm-up, then linearly down to zero.
        scale = min(1.0, step / _WARM_UP_STEPS) * (1 - (step - 1) / plan.steps)
        for optimizer, rate in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate * scale
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        if step % report_every == 0 or step == plan.steps:
            report(LossPoint(step, sum(losses) / len(losses), time.monotonic() - started))
            losses.clear()
    return model


def completion_loss(
    model: Qwen3ForCausalLM, ids_BT: torch.Tensor, labels_BT: torch.Tensor
) -> torch.Tensor:
    """Computes the mean cross entropy over the positions whose label counts, in nats."""
    targets_BT = labels_BT[:, 1:]
    counted_BT = targets_BT != IGNORED
    hidden_BTD = model.model(input_ids=ids_BT, use_cache=False).last_hidden_state[:, :-1]
    logits_NV = model.lm_head(hidden_BTD[counted_BT])
    return functional.cross_entropy(logits_NV, targets_BT[counted_BT])


def _optimizers(model: Qwen3ForCausalLM) -> list[tuple[torch.optim.Optimizer, float]]:
    """Makes Muon for the matrices inside the layers, and AdamW for embeddings and norms.

    With AdamW alone the arithmetic took more than twice as many steps to appear.
    """
    matrices: list[torch.nn.Parameter] = []
    others: list[torch.nn.Parameter] = []
    for name, parameter in model.named_parameters():
        inside = parameter.ndim == 2 and ".layers." in name
        (matrices if inside else others).append(parameter)
    muon = torch.optim.Muon(matrices, lr=_MATRIX_RATE, weight_decay=0.01)
    adamw = torch.optim.AdamW(others, lr=_OTHER_RATE, betas=(0.9, 0.98), weight_decay=0.05)
    return [(muon, _MATRIX_RATE), (adamw, _OTHER_RATE)]
