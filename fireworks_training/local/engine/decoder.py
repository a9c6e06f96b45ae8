"""The model as the engine calls it: hidden states of a packed pass, and logits of some of them.

Knows the parts of a Hugging Face causal language model. Does not know requests. Any model is served
whose attention layers go through the library's attention interface and attend to all tokens before:
its modules run as they are, and only attention is ours. Families that `fused` knows run faster.
Either way a probe compares with the model itself before anything is served.
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import Protocol

import torch
from transformers import PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from fireworks_training.local.engine.attention import ForwardPass, PromptPiece
from fireworks_training.local.engine.fused import FusedBody, NotFusable
from fireworks_training.local.engine.lanes import Lane, LaneKind
from fireworks_training.local.engine.prompts import Geometry, Prompt
from fireworks_training.local.model.model import vocab_size

_ATTENTION = "fireworks_training_engine"
_PROBE_TOLERANCE = 2e-4
_PROBE_TOKENS = 6


class UnsupportedModelError(Exception):
    """Raised for a model that this engine can't serve; the message gives the reason."""


class Attention(Protocol):
    """Attends for the layers: a `ForwardPass`, or the probe that learns their shapes."""

    def attend(
        self,
        layer: int,
        queries_NQD: torch.Tensor,
        keys_NHD: torch.Tensor,
        values_NHD: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """Attends as `ForwardPass.attend` does."""
        ...

    def finish(self) -> None:
        """Ends the pass as `ForwardPass.finish` does."""
        ...


_attention: ContextVar[Attention | None] = ContextVar("engine_attention", default=None)


def _interface(
    module: torch.nn.Module,
    query_1QND: torch.Tensor,
    key_1HND: torch.Tensor,
    value_1HND: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: object,
) -> tuple[torch.Tensor, None]:
    """Attends for the library's layers; outside of an engine's pass by plain causal attention."""
    attention = _attention.get()
    if attention is None:
        plain: tuple[torch.Tensor, None] = sdpa_attention_forward(
            module, query_1QND, key_1HND, value_1HND, attention_mask, scaling=scaling
        )
        return plain
    if options.get("sliding_window") or options.get("softcap") or options.get("s_aux") is not None:
        raise UnsupportedModelError("attention with a window, a cap or sinks can't be served")
    scale = query_1QND.shape[-1] ** -0.5 if scaling is None else scaling
    out_NQD = attention.attend(
        int(module.layer_idx),  # type: ignore[arg-type]
        query_1QND[0].transpose(0, 1),
        key_1HND[0].transpose(0, 1),
        value_1HND[0].transpose(0, 1),
        scale,
    )
    return out_NQD[None], None


ALL_ATTENTION_FUNCTIONS.register(_ATTENTION, _interface)


class Decoder:
    """Runs a model in its two parts, body and head.

    Attributes:
        vocab_size: token ids that can be fed and sampled.
        geometry: shape of its keys and values.
        device: where it computes.

    Args:
        model: a model in eval mode; its attention implementation is replaced.
        max_context: positions that it has to serve.
        fuse: whether a faster body may be used; None = where the family is known.

    Raises:
        UnsupportedModelError: this engine would not serve it faithfully.
    """

    def __init__(self, model: PreTrainedModel, max_context: int, fuse: bool | None = None) -> None:
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
        self.device: torch.device = head.weight.device
        self.vocab_size = min(int(head.weight.shape[0]), vocab_size(model))
        self._fused: FusedBody | None = None
        ids = torch.arange(_PROBE_TOKENS, device=self.device) % self.vocab_size
        with torch.inference_mode():
            expected_NV = model(input_ids=ids[None], use_cache=False).logits[0].float()
            model.set_attn_implementation(_ATTENTION)
            self.geometry = self._measure(ids)
            self._check(ids, expected_NV, type(model).__name__)
            if fuse is not False:
                try:
                    self._fused = FusedBody(model, max_context)
                except NotFusable as reason:
                    if fuse:
                        raise UnsupportedModelError(str(reason)) from None
                else:
                    self._check(ids, expected_NV, type(model).__name__)

    @property
    def fused(self) -> bool:
        """Tells whether the faster body runs."""
        return self._fused is not None

    def refresh(self) -> None:
        """Packs the weights again; to be called when the model's weights have changed."""
        if self._fused is not None:
            self._fused.refresh()

    def hidden(
        self,
        ids_N: torch.Tensor,
        positions_N: torch.Tensor,
        attention: Attention,
        wanted_n: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Computes the final hidden states `[n, E]` of one pass.

        Args:
            ids_N: tokens.
            positions_N: their places in their sequences.
            attention: attends, and keeps keys and values.
            wanted_n: tokens whose states are wanted; None = all of them.
        """
        if self._fused is not None:
            hidden_nE = self._fused.hidden(ids_N, positions_N, attention.attend, wanted_n)
        else:
            token = _attention.set(attention)
            try:
                hidden_1NE: torch.Tensor = self._body(
                    input_ids=ids_N[None], position_ids=positions_N[None], use_cache=False
                )[0]
            finally:
                _attention.reset(token)
            hidden_nE = hidden_1NE[0] if wanted_n is None else hidden_1NE[0][wanted_n]
        attention.finish()
        return hidden_nE

    def logits(self, hidden_nE: torch.Tensor) -> torch.Tensor:
        """Computes float32 logits `[n, V]` of final hidden states."""
        if self._fused is not None:
            return self._fused.logits(hidden_nE)
        logits: torch.Tensor = self._head(hidden_nE)
        return logits.float()

    def _measure(self, ids_N: torch.Tensor) -> Geometry:
        """Measures the shapes of keys and values that the layers hand over."""
        probe = _ShapeProbe()
        self.hidden(ids_N, torch.arange(len(ids_N), device=self.device), probe)
        shapes = set(probe.shapes.values())
        if set(probe.shapes) != set(range(len(probe.shapes))) or len(shapes) != 1:
            raise UnsupportedModelError(f"attention layers of unlike shapes: {probe.shapes}")
        return Geometry(len(probe.shapes), *shapes.pop(), device=ids_N.device)

    def _check(self, ids_N: torch.Tensor, expected_NV: torch.Tensor, name: str) -> None:
        """Checks that a prompt in pieces, then single tokens, give the model's own logits."""
        length = len(ids_N)
        prompt = Prompt(tuple(ids_N[:-2].tolist()), self.geometry)
        rows: list[torch.Tensor] = []
        positions_N = torch.arange(length, device=self.device)
        for end in (2, len(prompt.tokens)):
            piece = PromptPiece(prompt, end)
            at = slice(piece.start, end)
            rows.append(self.hidden(ids_N[at], positions_N[at], ForwardPass([], [piece])))
            prompt.done = end
        lane = Lane(LaneKind.of(len(prompt.tokens), 2, shared=False), self.geometry)
        lane.join(prompt, [0], [2])
        rows += [
            self.hidden(ids_N[place, None], positions_N[place, None], ForwardPass([lane], []))
            for place in range(len(prompt.tokens), length)
        ]
        error = float((self.logits(torch.cat(rows)) - expected_NV).abs().max())
        if not error <= _PROBE_TOLERANCE * max(1.0, float(expected_NV.abs().max())):
            raise UnsupportedModelError(
                f"{name}: decoding with the engine's cache gives logits that differ by {error:.3g} "
                "from the model's own: it scales, caps or masks in a way that the engine does not "
                "know"
            )


class _ShapeProbe:
    """Notes the shapes that each layer attends with."""

    def __init__(self) -> None:
        self.shapes: dict[int, tuple[int, int, int]] = {}

    def attend(
        self,
        layer: int,
        queries_NQD: torch.Tensor,
        keys_NHD: torch.Tensor,
        values_NHD: torch.Tensor,
        scale: float,  # noqa: ARG002 - the protocol's name
    ) -> torch.Tensor:
        """Returns zeros: only shapes matter."""
        self.shapes[layer] = (keys_NHD.shape[1], keys_NHD.shape[2], values_NHD.shape[2])
        return queries_NQD.new_zeros(*queries_NQD.shape[:2], values_NHD.shape[2])

    def finish(self) -> None:
        """Does nothing, since nothing was kept."""
