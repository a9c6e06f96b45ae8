"""The running batch: prefill, decode steps, and what each row still has to do.

Knows the model, the cache and the requests in it; not the queue, the weights' names or the socket.
Prompts are right-padded for the prefill, so plain causal attention needs no mask and no position is
shifted; requests with the same prompt share one computation of it. A row leaves as soon as it is
done; new rows join between two steps.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from transformers import PreTrainedModel
from transformers.cache_utils import DynamicCache, DynamicLayer

from fireworks_training.local.engine.cache import SlotCache
from fireworks_training.local.engine.requests import SamplingRequest, uniforms
from fireworks_training.local.engine.sampling import SamplingRows, sample, top
from fireworks_training.local.frames import NO_TOKEN, Finish, PromptLogprobs

PREFILL_TOKENS = 8192
"""Padded prompt tokens that one prefill computes at most (a longer prompt goes alone)."""

_ECHO_ROWS = 512
"""Prompt positions whose logits are held at once."""


class UnsupportedModelError(Exception):
    """The model can't be served by this engine; the message says why."""


@dataclass(frozen=True, slots=True)
class Rows:
    """Tokens of one prefill or decode step, one entry a stream; see `frames.Step`."""

    streams: npt.NDArray[np.uint32]
    tokens: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    sampling_logprobs: npt.NDArray[np.float32]
    finished: npt.NDArray[np.uint8]
    top_ids: npt.NDArray[np.int32]
    top_logprobs: npt.NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Prefilled:
    """What a prefill gave: the first tokens, echoed logprobs, prompt tokens not computed anew."""

    rows: Rows
    echoes: list[PromptLogprobs]
    cached: npt.NDArray[np.uint32]


class Decoder:
    """The two parts of a causal language model that the engine calls: its body and its head."""

    def __init__(self, model: PreTrainedModel) -> None:
        """Checks that head(body(x)) is the model, and that every layer attends to all it saw.

        Raises:
            UnsupportedModelError: it isn't, or it doesn't.
        """
        kinds = set(getattr(model.config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise UnsupportedModelError(
                f"layers of type {sorted(kinds)}: only full attention can be served yet"
            )
        body = model.get_decoder()  # type: ignore[no-untyped-call]
        head = model.get_output_embeddings()  # type: ignore[no-untyped-call]
        if body is None or head is None:
            raise UnsupportedModelError(f"{type(model).__name__} has no separate body and head")
        self._body: torch.nn.Module = body
        self._head: torch.nn.Module = head
        # transformers 5.24 renamed the argument; the old name warns there and goes in 5.40.
        parameters = inspect.signature(type(body).forward).parameters
        self._cache_name = "cache" if "cache" in parameters else "past_key_values"
        self.vocab_size = int(head.weight.shape[0])
        probe = torch.tensor([[0, min(1, self.vocab_size - 1)]])
        with torch.inference_mode():
            expected = model(input_ids=probe, use_cache=False).logits
            if not torch.equal(self._head(self._body(input_ids=probe)[0]), expected):
                raise UnsupportedModelError(
                    f"the logits of {type(model).__name__} are not its head's: a scale or a cap "
                    "that the engine does not know"
                )

    def logits(self, hidden_nE: torch.Tensor) -> torch.Tensor:
        """Float32 logits `[n, V]` of final hidden states."""
        logits: torch.Tensor = self._head(hidden_nE)
        return logits.float()

    def prefill(self, ids_bP: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Hidden states `[b, P, E]`, keys and values `[L, b, H, P, D]` of right-padded prompts."""
        cache = DynamicCache()
        hidden = self._body(input_ids=ids_bP, use_cache=True, **{self._cache_name: cache})[0]
        pairs = [_keys_and_values(layer) for layer in cache.layers]
        keys, values = (torch.stack(tensors) for tensors in zip(*pairs, strict=True))
        return hidden, keys, values

    def decode(
        self, ids_n: torch.Tensor, positions_n: torch.Tensor, cache: SlotCache, room: int
    ) -> torch.Tensor:
        """Logits `[n, V]` after one more token in each row of `cache`."""
        columns, mask = cache.open_column(room)
        hidden = self._body(
            input_ids=ids_n[:, None],
            position_ids=positions_n[:, None],
            attention_mask=mask,
            use_cache=True,
            **{self._cache_name: columns},
        )[0]
        return self.logits(hidden[:, -1])


class RunningBatch:
    """The streams that hold a slot."""

    def __init__(self, decoder: Decoder, max_slots: int) -> None:
        self._decoder = decoder
        self._cache = SlotCache(max_slots)
        self._requests: list[SamplingRequest] = []
        self._last = np.zeros(max_slots, np.int64)
        self._produced = np.zeros(max_slots, np.int64)

    def __len__(self) -> int:
        return len(self._requests)

    @property
    def room(self) -> int:
        """Tokens that the longest row will come to."""
        return max((request.total for request in self._requests), default=0)

    def forget(self) -> None:
        """Drops the cache of an empty batch: the weights changed."""
        assert not self._requests
        self._cache.clear()

    @torch.inference_mode()
    def drop(self, streams: Iterable[int]) -> None:
        """Frees the slots of cancelled streams; unknown ids are ignored."""
        gone = set(streams)
        for row in range(len(self._requests) - 1, -1, -1):
            if self._requests[row].stream in gone:
                self._leave(row)

    @torch.inference_mode()
    def admit(self, requests: Sequence[SamplingRequest]) -> Prefilled:
        """Reads the prompts of `requests` and samples the first token of each.

        They must fit into the free slots; `next_prefill` says how many to pass at a time.
        """
        prompts = list(dict.fromkeys(request.prompt for request in requests))
        places = {prompt: place for place, prompt in enumerate(prompts)}
        sources = np.array([places[request.prompt] for request in requests], np.int64)
        lengths = np.array([len(prompt) for prompt in prompts], np.int64)
        ids_bP = torch.zeros((len(prompts), int(lengths.max())), dtype=torch.int64)
        for place, prompt in enumerate(prompts):
            ids_bP[place, : len(prompt)] = torch.tensor(prompt)
        hidden_bPE, keys, values = self._decoder.prefill(ids_bP)

        echoes = [
            self._echo(request, hidden_bPE[source])
            for request, source in zip(requests, sources, strict=True)
            if request.echo
        ]
        first = len(self._requests)
        self._requests += requests
        self._produced[first : first + len(requests)] = 0
        self._cache.join(keys, values, lengths, sources, self.room)
        last_bE = hidden_bPE[torch.arange(len(prompts)), torch.from_numpy(lengths) - 1]
        logits_nV = self._decoder.logits(last_bE)[torch.from_numpy(sources)]
        # The first request with a prompt pays for it, the others found it computed.
        cached = lengths[sources]
        cached[np.unique(sources, return_index=True)[1]] = 0
        return Prefilled(self._take(logits_nV, first), echoes, cached.astype(np.uint32))

    @torch.inference_mode()
    def step(self) -> Rows:
        """One more token for every row. The batch must not be empty."""
        n = len(self._requests)
        positions = torch.from_numpy(self._cache.lengths[:n].copy())
        ids = torch.from_numpy(self._last[:n].copy())
        return self._take(self._decoder.decode(ids, positions, self._cache, self.room), 0)

    def _take(self, logits_nV: torch.Tensor, first: int) -> Rows:
        """Samples the rows from `first` on, notes their tokens, and lets finished rows leave."""
        requests = self._requests[first:]
        produced = self._produced[first : first + len(requests)]
        sampled = sample(logits_nV, _sampling_rows(requests, produced))
        tokens = sampled.tokens.copy()
        self._last[first : first + len(requests)] = tokens
        produced += 1
        finished = np.zeros(len(requests), np.uint8)
        for index, request in enumerate(requests):
            if not sampled.finite[index]:
                finished[index] = Finish.NOT_FINITE
                tokens[index] = NO_TOKEN
            elif request.max_tokens == 0:
                finished[index] = Finish.LENGTH
                tokens[index] = NO_TOKEN
            elif int(tokens[index]) in request.stop_ids:
                finished[index] = Finish.STOP
            elif produced[index] >= request.max_tokens:
                finished[index] = Finish.LENGTH
        rows = Rows(
            np.array([request.stream for request in requests], np.uint32),
            tokens,
            sampled.logprobs,
            sampled.sampling_logprobs,
            finished,
            sampled.top_ids,
            sampled.top_logprobs,
        )
        for index in np.flatnonzero(finished)[::-1]:
            self._leave(first + int(index))
        return rows

    def _leave(self, row: int) -> None:
        self._cache.leave(row)
        last = self._requests.pop()
        if row < len(self._requests):
            self._requests[row] = last
            self._last[row] = self._last[len(self._requests)]
            self._produced[row] = self._produced[len(self._requests)]

    def _echo(self, request: SamplingRequest, hidden_PE: torch.Tensor) -> PromptLogprobs:
        """Raw logprobs of the last `echo` prompt tokens, the very first one excepted."""
        length = len(request.prompt)
        first = max(1, length - request.echo)
        targets = torch.tensor(request.prompt[first:], dtype=torch.int64)
        logprobs, top_ids, top_logprobs = [], [], []
        for start in range(0, len(targets), _ECHO_ROWS):
            targets_n = targets[start : start + _ECHO_ROWS]
            # The logits at a position are about the token after it.
            at = first - 1 + start
            logits_nV = self._decoder.logits(hidden_PE[at : at + len(targets_n)])
            lse_n = torch.logsumexp(logits_nV, dim=-1)
            logprobs.append((logits_nV.gather(1, targets_n[:, None])[:, 0] - lse_n).numpy())
            wanted = np.full(len(targets_n), request.top_logprobs)
            ids, values = top(logits_nV, lse_n, wanted)
            top_ids.append(ids)
            top_logprobs.append(values)
        k = request.top_logprobs
        return PromptLogprobs(
            request.stream,
            np.concatenate([*logprobs, np.empty(0, np.float32)]),
            np.concatenate([*top_ids, np.empty((0, k), np.int32)]),
            np.concatenate([*top_logprobs, np.empty((0, k), np.float32)]),
        )


def next_prefill(waiting: Sequence[SamplingRequest]) -> int:
    """How many requests, from the front, one prefill takes: see `PREFILL_TOKENS`."""
    prompts: set[tuple[int, ...]] = set()
    longest = 0
    for count, request in enumerate(waiting):
        longest = max(longest, len(request.prompt))
        prompts.add(request.prompt)
        if count and len(prompts) * longest > PREFILL_TOKENS:
            return count
    return len(waiting)


def _sampling_rows(
    requests: Sequence[SamplingRequest], produced: npt.NDArray[np.int64]
) -> SamplingRows:
    keys = np.array([request.key for request in requests], np.uint64)
    return SamplingRows(
        temperature=np.array([request.temperature for request in requests], np.float32),
        top_p=np.array([request.top_p for request in requests], np.float32),
        top_k=np.array([request.top_k for request in requests], np.int64),
        uniform=uniforms(keys, produced.astype(np.uint64)),
        top_logprobs=np.array([request.top_logprobs for request in requests], np.int64),
        banned={
            index: request.stop_ids
            for index, request in enumerate(requests)
            if produced[index] < request.min_tokens and request.stop_ids
        },
    )


def _keys_and_values(layer: object) -> tuple[torch.Tensor, torch.Tensor]:
    if not isinstance(layer, DynamicLayer) or layer.keys is None or layer.values is None:
        raise UnsupportedModelError(f"a cache layer is a {type(layer).__name__}, not keys/values")
    return layer.keys, layer.values
