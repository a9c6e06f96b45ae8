"""Text streams: turn token ids into text piece by piece, and find where a stop string ends it.

Knows `tokenizers` files; no torch, no HTTP. The pieces of a stream joined are the text that
`Tokenizer.decode` gives for all its ids at once: a piece never holds half a character.
"""

from __future__ import annotations

import codecs
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import orjson
from tokenizers import Tokenizer

_REPLACEMENT = "\ufffd"


class TextStream(Protocol):
    """Turns one stream's ids into text."""

    def push(self, ids: Sequence[int]) -> str:
        """Return the text that `ids` complete; "" while a character is incomplete."""
        ...

    def finish(self) -> str:
        """Return what is left: U+FFFD for bytes that never became a character."""
        ...


class NoTokenizer(Exception):
    """Raised for a model whose tokenizer is missing or can't be read; says which and why."""


class TextCodec:
    """Encodes prompts and opens text streams with the tokenizer of one model. Special tokens are no
    text.

    Args:
        path: a `tokenizer.json`, or the folder that holds one.

    Raises:
        NoTokenizer: there is none that can be read.
    """

    def __init__(self, path: Path) -> None:
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise NoTokenizer(f"{file} is missing: the model has no tokenizer")
        try:
            self._tokenizer = Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises no other type
            raise NoTokenizer(f"{file} is no tokenizer that can be read: {error}") from error
        self._special = frozenset(
            token_id
            for token_id, token in self._tokenizer.get_added_tokens_decoder().items()
            if token.special
        )
        self._bytes = _byte_table(self._tokenizer, self._special)

    def encode(self, text: str) -> list[int]:
        """Return the token ids of a text, with the special tokens that the tokenizer itself
        adds."""
        ids: list[int] = self._tokenizer.encode(text).ids
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of all ids at once."""
        stream = self.stream()
        return stream.push(ids) + stream.finish()

    def stream(self) -> TextStream:
        """Open a new stream of text."""
        if self._bytes is not None:
            return _ByteStream(self._bytes)
        return _WindowStream(self._tokenizer, self._special)


class _ByteStream:
    """Decodes for byte-level tokenizers: each id is some bytes, and UTF-8 says what is complete."""

    def __init__(self, table: dict[int, bytes]) -> None:
        self._table = table
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, ids: Sequence[int]) -> str:
        table = self._table
        return self._decoder.decode(b"".join([table.get(token, b"") for token in ids]))

    def finish(self) -> str:
        return self._decoder.decode(b"", final=True)


class _WindowStream:
    """Decodes for any other tokenizer: a short window twice, whose difference is the piece.

    The window starts at the last piece given out, since a token's text may depend on the one
    before it (a leading space, a merged byte sequence).
    """

    _LONGEST_HELD = 16

    def __init__(self, tokenizer: Tokenizer, special: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self._special = special
        self._ids: list[int] = []
        self._given = 0

    def push(self, ids: Sequence[int]) -> str:
        return "".join([self._push_one(token) for token in ids if token not in self._special])

    def finish(self) -> str:
        if self._given == len(self._ids):
            return ""
        return self._difference(final=True)

    def _push_one(self, token: int) -> str:
        self._ids.append(token)
        # A character has four bytes at most, so what is held longer is no character.
        return self._difference(final=len(self._ids) - self._given >= self._LONGEST_HELD)

    def _difference(self, *, final: bool) -> str:
        before = self._tokenizer.decode(self._ids[: self._given], skip_special_tokens=True)
        after = self._tokenizer.decode(self._ids, skip_special_tokens=True)
        if after.endswith(_REPLACEMENT) and not final:
            return ""
        # Some tokens before the window's end have to stay: they are the context of the next one.
        del self._ids[: self._given]
        self._given = len(self._ids)
        return str(after[len(before) :])


class StopMatcher:
    """Finds the first of some strings in a text that comes in pieces.

    Args:
        stops: non-empty strings; none of them is searched for in what was already let go.
    """

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""

    def push(self, piece: str) -> tuple[str, bool]:
        """Return text that is certain not to belong to a stop string, and whether one was found.

        When one was found, the text ends before it, and what follows it is dropped.
        """
        text = self._held + piece
        found = [at for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self._held = ""
            return text[: min(found)], True
        keep = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def finish(self) -> str:
        """Return what was held back, since no stop string can come any more."""
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that is a proper beginning of `stop`."""
    for length in range(min(len(text), len(stop) - 1), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def _byte_table(tokenizer: Tokenizer, special: frozenset[int]) -> dict[int, bytes] | None:
    """Return the bytes of each id, for a byte-level tokenizer; None for any other."""
    decoder: Mapping[str, object] | None = orjson.loads(tokenizer.to_str()).get("decoder")
    if decoder is None or decoder.get("type") != "ByteLevel":
        return None
    byte_of = {char: byte for byte, char in enumerate(_byte_characters())}
    table: dict[int, bytes] = {}
    for token, token_id in tokenizer.get_vocab(with_added_tokens=True).items():
        if token_id in special:
            continue
        found = [byte_of.get(char) for char in token]
        # As the ByteLevel decoder does: a token with a foreign character stands for itself.
        known = [byte for byte in found if byte is not None]
        table[token_id] = bytes(known) if len(known) == len(found) else token.encode()
    return table


def _byte_characters() -> list[str]:
    """Return the printable character that byte-level tokenizers write for each byte, 0 to 255."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = iter(range(256, 512))
    return [chr(byte) if byte in printable else chr(next(others)) for byte in range(256)]
