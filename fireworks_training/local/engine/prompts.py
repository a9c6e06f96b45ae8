"""The prefix cache: prompts with the keys and values computed for them so far.

Knows token ids and tensors. Does not know requests or the model. Legend: L layers, H key/value
heads, P prompt tokens, D head size, E hidden size.

A prompt is stored once, however many requests carry it. Another prompt that begins with the same
tokens copies the common part, found by a hash chain over blocks of `BLOCK` tokens, and compared
token by token, so that a hash collision can't mix two prompts. The least recently used prompts go
when the store is full; running requests don't need them any more, since lanes hold copies.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from fireworks_training.local.engine.buffers import zeros

BLOCK = 16
"""Tokens that two prompts must share, from the first on, for the second to profit."""


@dataclass(frozen=True, slots=True)
class Geometry:
    """Gives the shape of a model's keys and values.

    Attributes:
        layers: attention layers.
        heads: key/value heads.
        key_size, value_size: numbers in one head's key and value.
        device: where they are kept.
    """

    layers: int
    heads: int
    key_size: int
    value_size: int
    device: torch.device

    @property
    def bytes_per_token(self) -> int:
        """Bytes of one token's keys and values in fp32, over all layers."""
        return 4 * self.layers * self.heads * (self.key_size + self.value_size)


class Prompt:
    """Holds one prompt's keys and values, and how far they are computed.

    Attributes:
        tokens: its ids.
        keys_LHPD, values_LHPD: filled up to `done`.
        done: tokens computed or copied.
        reused: tokens that were copied from another prompt.
        last_E: final hidden state of the last token; None until all are computed.
    """

    def __init__(self, tokens: tuple[int, ...], geometry: Geometry) -> None:
        self.tokens = tokens
        layers, heads, length = geometry.layers, geometry.heads, len(tokens)
        self.keys_LHPD = zeros(layers, heads, length, geometry.key_size, device=geometry.device)
        self.values_LHPD = zeros(layers, heads, length, geometry.value_size, device=geometry.device)
        self.done = 0
        self.reused = 0
        self.last_E: torch.Tensor | None = None

    @property
    def unread(self) -> int:
        """Number of tokens still to compute."""
        return len(self.tokens) - self.done

    def reuse(self, other: Prompt, count: int) -> None:
        """Copies keys and values of the first `count` tokens from a prompt that begins alike."""
        self.keys_LHPD[:, :, :count] = other.keys_LHPD[:, :, :count]
        self.values_LHPD[:, :, :count] = other.values_LHPD[:, :, :count]
        self.done = self.reused = count


class PromptStore:
    """Stores prompts by their tokens, within a budget of bytes; the least recently used go first.

    Args:
        geometry: shape of the model's keys and values.
        max_bytes: bytes of all stored prompts at most; 0 stores nothing.
    """

    def __init__(self, geometry: Geometry, max_bytes: int) -> None:
        self._geometry = geometry
        self._max_bytes = max_bytes
        self._bytes = 0
        self._prompts: OrderedDict[tuple[int, ...], Prompt] = OrderedDict()
        # For each block boundary of each stored prompt: the prompt that was stored last with it.
        self._blocks: dict[int, Prompt] = {}

    def __len__(self) -> int:
        return len(self._prompts)

    def find(self, tokens: tuple[int, ...]) -> Prompt | None:
        """Finds the stored prompt of exactly these tokens."""
        found = self._prompts.get(tokens)
        if found is not None:
            self._prompts.move_to_end(tokens)
        return found

    def start(self, tokens: tuple[int, ...], limit: int) -> Prompt:
        """Makes a prompt to read, its beginning copied from a stored one that begins alike.

        Args:
            tokens: its ids.
            limit: tokens to copy at most, below `len(tokens)`.
        """
        prompt = Prompt(tokens, self._geometry)
        chain = list(_chain(tokens[:limit]))
        for blocks in range(len(chain), 0, -1):
            other = self._blocks.get(chain[blocks - 1])
            if other is None:
                continue
            common = _common(tokens, other.tokens, limit)
            if common >= BLOCK:
                prompt.reuse(other, common)
                if other.tokens in self._prompts:
                    self._prompts.move_to_end(other.tokens)
                break
        return prompt

    def put(self, prompt: Prompt) -> None:
        """Stores a completely computed prompt, in place of the least recently used ones."""
        size = self._size(prompt)
        if size > self._max_bytes:
            return
        old = self._prompts.pop(prompt.tokens, None)
        if old is not None:
            self._bytes -= size
        while self._bytes + size > self._max_bytes:
            _, evicted = self._prompts.popitem(last=False)
            self._bytes -= self._size(evicted)
            self._forget_blocks(evicted)
        self._prompts[prompt.tokens] = prompt
        self._bytes += size
        for link in _chain(prompt.tokens):
            self._blocks[link] = prompt

    def clear(self) -> None:
        """Forgets all prompts: the weights changed, or a client asked for it."""
        self._prompts.clear()
        self._blocks.clear()
        self._bytes = 0

    def _forget_blocks(self, prompt: Prompt) -> None:
        for link in _chain(prompt.tokens):
            if self._blocks.get(link) is prompt:
                del self._blocks[link]

    def _size(self, prompt: Prompt) -> int:
        return len(prompt.tokens) * self._geometry.bytes_per_token


def _chain(tokens: tuple[int, ...]) -> Iterator[int]:
    """Yields a hash for each complete block, of all tokens up to its end."""
    link = 0
    for end in range(BLOCK, len(tokens) + 1, BLOCK):
        link = hash((link, tokens[end - BLOCK : end]))
        yield link


def _common(tokens: tuple[int, ...], other: tuple[int, ...], limit: int) -> int:
    """Computes the length of the common beginning, at most `limit`."""
    most = min(limit, len(other))
    if tokens[:most] == other[:most]:
        return most
    return next(i for i in range(most) if tokens[i] != other[i])
