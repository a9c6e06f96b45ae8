"""The model as training calls it: hidden states and target logprobs of a micro-batch.

Knows Hugging Face modules, caches and masks, body and head. Does not know losses, optimizers or how
micro-batches are chosen.

Legend: G groups of a micro-batch, P their longest prefix, N sequences that go on after it, S the
longest of these, U positions computed (unpadded), M positions of all datums, E hidden size,
V vocabulary, L layers.

Shared prefixes: the prefixes are computed once, with the keys and values of every layer kept in the
graph; the sequences that go on attend to a copy of their prefix's. Autograd adds the copies'
gradients up, so the result is that of separate sequences, up to the order of fp32 sums.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from fireworks_training.local.model.devices import on
from fireworks_training.local.model.losses import target_logprobs
from fireworks_training.local.trainer.run.packing import Group, MicroBatch

LOGITS_BYTES = 64 << 20
"""Bytes of fp32 logits held at once; more are computed in turns, and again for the gradient."""

ACTIVATION_BYTES = 256 << 20
"""Bytes that a micro-batch of a small model may keep for its gradient."""

SPARED_FROM = 0.9
"""Positions without a gradient are computed apart where they are more than one in ten."""

_SMALL, _MOST_TIMES = 64 << 20, 4


def activation_bytes(parameters: int) -> int:
    """Compute the budget for so many parameters: the bytes that they take in fp32, within bounds.

    However few its tokens are, a micro-batch reads every weight three times and adds up a
    gradient of that size.
    """
    return int(ACTIVATION_BYTES * min(max(parameters / _SMALL, 1), _MOST_TIMES))


@dataclass(frozen=True, slots=True)
class HiddenStates:
    """Holds hidden states of the U positions of a micro-batch, and which are each datum's.

    Attributes:
        hidden: [U, E], padding left out.
        rows: for each datum, in the order of `datums_of(batch)`, its T indices into `hidden`.
    """

    hidden: Tensor
    rows: list[NDArray[np.int64]]


class Network:
    """Computes passes with a model, split into body and head.

    Args:
        module: with its adapter, if it has one; not changed.
        sharing: False computes every datum by itself, for comparison.

    Attributes:
        device: where the module computes.
        vocab_size: columns of the logits.
        has_hidden_states: whether `compute` gives the states before the head. (A model whose logits
            are more than its head's output is taken in one piece.)
        sharing: whether datums share the computation of common prefixes.
        token_budget: tokens that a micro-batch should compute at most.
    """

    def __init__(self, module: PreTrainedModel, *, sharing: bool = True) -> None:
        self.device: torch.device = module.device
        self._body, self._head = _parts(module)
        self.vocab_size = int(module.config.get_text_config().vocab_size)
        self.has_hidden_states = not isinstance(self._body, _UndividedModel)
        self.sharing = sharing and _can_share(module)
        self._cache_name = _cache_argument(self._body)
        # Linear outputs and about as much again between them; those of an adapter are added up at
        # once, and what it keeps is its inputs, which the layer that it is for would keep.
        linear = ((n, m) for n, m in self._body.named_modules() if isinstance(m, nn.Linear))
        widths = sum(module.out_features for name, module in linear if ".lora_" not in name)
        budget = activation_bytes(sum(p.numel() for p in module.parameters()))
        self.token_budget = max(budget // (8 * max(widths, 1)), 1)

    def logprobs(
        self,
        computed: HiddenStates,
        targets: Sequence[NDArray[np.int64]],
        differentiated_M: NDArray[np.bool_] | None = None,
    ) -> Tensor:
        """Computes logprobs_M of the targets of all datums, laid end to end.

        Args:
            targets: the target ids of each datum, `[T]`, or `[T, K]` for K of them a position.
            computed: from `compute`.
            differentiated_M: targets whose logprob's gradient may be other than zero; None: all.
                Positions without any (those of a prompt, mostly) are spared two thirds of the
                head's work, and their logprobs have no gradient.
        """
        rows = [
            row if ids.ndim == 1 else np.repeat(row, ids.shape[1])
            for row, ids in zip(computed.rows, targets, strict=True)
        ]
        flat = [ids.reshape(-1) for ids in targets]
        rows_M, targets_M = np.concatenate(rows), np.concatenate(flat)
        if differentiated_M is not None and self.has_hidden_states and torch.is_grad_enabled():
            needed_U = np.zeros(len(computed.hidden), np.bool_)
            needed_U[rows_M[differentiated_M]] = True
            if 0 < needed_U.sum() < SPARED_FROM * len(needed_U):
                return self._logprobs_apart(computed.hidden, rows_M, targets_M, needed_U)
        return self._logprobs(computed.hidden, rows_M, targets_M)

    def _logprobs_apart(
        self,
        hidden_UE: Tensor,
        rows_M: NDArray[np.int64],
        targets_M: NDArray[np.int64],
        needed_U: NDArray[np.bool_],
    ) -> Tensor:
        """Computes logprobs in two parts; only that of the `needed_U` positions has a graph."""
        needed_M = needed_U[rows_M]
        place_U = np.where(needed_U, np.cumsum(needed_U), np.cumsum(~needed_U)) - 1
        parts, order = [], []
        for chosen_U, chosen_M in ((needed_U, needed_M), (~needed_U, ~needed_M)):
            order.append(np.flatnonzero(chosen_M))
            with torch.set_grad_enabled(chosen_U is needed_U):
                some_UE = hidden_UE.index_select(0, on(self.device, np.flatnonzero(chosen_U)))
                part = self._logprobs(some_UE, place_U[rows_M[chosen_M]], targets_M[chosen_M])
            parts.append(part)
        back = np.argsort(np.concatenate(order))
        return torch.cat(parts).index_select(0, on(self.device, back))

    def top(self, computed: HiddenStates, k: int) -> list[tuple[Tensor, Tensor]]:
        """Finds logprobs and ids, `[T, k]` and best first, of each datum's most likely tokens."""
        turn = max(LOGITS_BYTES // (4 * self.vocab_size), 1)
        with torch.no_grad():
            found = [
                torch.log_softmax(self._head(states).float(), -1).topk(k)
                for states in torch.split(computed.hidden.detach(), turn)
            ]
        logprobs_UK = torch.cat([values for values, _ in found])
        ids_UK = torch.cat([ids for _, ids in found])
        places = [on(self.device, rows) for rows in computed.rows]
        return [(logprobs_UK[rows], ids_UK[rows]) for rows in places]

    def compute(self, batch: MicroBatch) -> HiddenStates:
        """Computes hidden states of a micro-batch, with a graph where gradients are enabled."""
        groups = batch.groups
        keep = {self._cache_name: DynamicCache()} if batch.buckets else {}
        prefixes = [group.prefix for group in groups]
        hidden = self._body(
            input_ids=on(self.device, _padded(prefixes)), use_cache=bool(keep), **keep
        )[0]
        parts = [_unpadded(hidden, [len(prefix) for prefix in prefixes])]
        begins = np.cumsum([0, *(len(prefix) for prefix in prefixes)])
        rows = [
            [np.arange(begins[g], begins[g + 1]) for _ in group.members]
            for g, group in enumerate(groups)
        ]
        used = int(begins[-1])
        for bucket in batch.buckets:
            sizes = [groups[g].members[m].tokens.size for g, m in bucket]
            parts.append(self._continue(groups, bucket, sizes, keep[self._cache_name]))
            for (g, m), size in zip(bucket, sizes, strict=True):
                rows[g][m] = np.concatenate([rows[g][m], np.arange(used, used + size)])
                used += size
        of_datums = [
            rows[g][m]
            for g, group in enumerate(groups)
            for m, member in enumerate(group.members)
            for _ in member.data
        ]
        return HiddenStates(torch.cat(parts) if len(parts) > 1 else parts[0], of_datums)

    def _continue(
        self,
        groups: Sequence[Group],
        bucket: Sequence[tuple[int, int]],
        sizes: Sequence[int],
        prefixes: DynamicCache,
    ) -> Tensor:
        """Computes hidden states of a bucket's sequences after their prefixes, without padding."""
        rows = np.array([g for g, _ in bucket])
        chosen_N = on(self.device, rows)
        cache = DynamicCache()
        for index, layer in enumerate(prefixes.layers):
            plain = cast(DynamicLayer, layer)
            keys, values = cast(Tensor, plain.keys), cast(Tensor, plain.values)
            cache.update(keys.index_select(0, chosen_N), values.index_select(0, chosen_N), index)
        lengths = np.array([len(group.prefix) for group in groups])
        width, longest = int(lengths.max()), max(sizes)
        begins_N1 = lengths[rows][:, None]
        columns = np.arange(width + longest)
        # Padding of a prefix lies before the tokens that follow it, so it has to be masked.
        mask = (columns < begins_N1) | (columns >= width)
        hidden = self._body(
            input_ids=on(self.device, _padded([groups[g].members[m].tokens for g, m in bucket])),
            position_ids=on(self.device, begins_N1 + np.arange(longest)),
            attention_mask=None if mask.all() else on(self.device, mask.astype(np.int64)),
            use_cache=True,
            **{self._cache_name: cache},
        )[0]
        return _unpadded(hidden, sizes)

    def _logprobs(
        self, hidden_UE: Tensor, rows_M: NDArray[np.int64], targets_M: NDArray[np.int64]
    ) -> Tensor:
        head = self._head

        def some(states: Tensor, rows: Tensor, targets: Tensor) -> Tensor:
            return target_logprobs(head(states).float(), targets, rows)

        turn = max(LOGITS_BYTES // (4 * self.vocab_size), 1)
        if len(hidden_UE) <= turn:
            return some(hidden_UE, on(self.device, rows_M), on(self.device, targets_M))
        order = np.argsort(rows_M, kind="stable")
        bounds = np.arange(0, len(hidden_UE) + turn, turn)
        cuts = np.searchsorted(rows_M[order], bounds)
        pieces = []
        for place, begin in enumerate(bounds[:-1]):
            chosen = order[cuts[place] : cuts[place + 1]]
            piece = checkpoint(
                some,
                hidden_UE[begin : begin + turn],
                on(self.device, rows_M[chosen] - begin),
                on(self.device, targets_M[chosen]),
                use_reentrant=False,
                preserve_rng_state=False,
            )
            pieces.append(cast(Tensor, piece))
        back = np.empty_like(order)
        back[order] = np.arange(len(order))
        return torch.cat(pieces).index_select(0, on(self.device, back))


def datums_of(batch: MicroBatch) -> list[int]:
    """List the indices of a micro-batch's datums, in the order of its logprobs."""
    return [place for group in batch.groups for member in group.members for place in member.data]


def _padded(sequences: Sequence[NDArray[np.int64]]) -> NDArray[np.int64]:
    """Pad rows on the right: attention is causal, so no real position attends to padding."""
    ids = np.zeros((len(sequences), max(map(len, sequences))), np.int64)
    for row, tokens in zip(ids, sequences, strict=True):
        row[: len(tokens)] = tokens
    return ids


def _unpadded(hidden_BTE: Tensor, lengths: Sequence[int]) -> Tensor:
    flat = hidden_BTE.flatten(0, 1)
    width = hidden_BTE.shape[1]
    if sum(lengths) == len(flat):
        return flat
    real = np.concatenate([np.arange(r * width, r * width + n) for r, n in enumerate(lengths)])
    return flat.index_select(0, on(flat.device, real))


class _UndividedModel(nn.Module):
    """Wraps a model whose logits are more than its head's output, as a body without head."""

    def __init__(self, module: PreTrainedModel) -> None:
        super().__init__()
        self.module = module

    def forward(self, **arguments: object) -> tuple[Tensor]:
        return (self.module(**arguments).logits,)


def _parts(module: PreTrainedModel) -> tuple[nn.Module, Callable[[Tensor], Tensor]]:
    """Split into body and head, if the head's output is the model's own (no scale, no cap)."""
    body = module.get_decoder()  # type: ignore[no-untyped-call]
    head = module.get_output_embeddings()  # type: ignore[no-untyped-call]
    if body is not None and head is not None and body is not module:
        probe = torch.tensor([[0, 0]], device=module.device)
        with torch.no_grad():
            whole = module(input_ids=probe, use_cache=False).logits
            if torch.equal(head(body(input_ids=probe, use_cache=False)[0]), whole):
                return body, head
    return _UndividedModel(module), nn.Identity()


def _cache_argument(body: nn.Module) -> str:
    """Name the cache's argument: transformers 5.24 renamed it; the old one goes in 5.40."""
    inner = body.module if isinstance(body, _UndividedModel) else body
    parameters = inspect.signature(type(inner).forward).parameters
    return "cache" if "cache" in parameters else "past_key_values"


def _can_share(module: PreTrainedModel) -> bool:
    """Tell whether every layer attends to all tokens before, by positions that can be given."""
    layers = DynamicCache(config=module.config).layers
    named = inspect.signature(type(module).forward).parameters
    return (
        "position_ids" in named
        and getattr(module.config, "sliding_window", None) is None
        and all(type(layer) is DynamicLayer for layer in layers)
    )
