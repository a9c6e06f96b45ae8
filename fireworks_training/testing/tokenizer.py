"""A tokenizer of one token a character, for tests that need one and don't care which."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any


class CharacterTokenizer:
    """A tokenizer whose token ids are Unicode code points; its chat template is `role:content;`."""

    def encode(self, text: str) -> list[int]:
        """Turn a text into token ids, one a character."""
        return [ord(character) for character in text]

    def decode(self, ids: Iterable[int], **_: Any) -> str:
        """Turn token ids into text; options of other tokenizers are ignored."""
        return "".join(map(chr, ids))

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        add_generation_prompt: bool = False,
        tokenize: bool = True,
        **_: Any,
    ) -> list[int] | str:
        """Turn messages into a prompt.

        Args:
            messages: with `role` and `content`.
            add_generation_prompt: whether the assistant's turn is begun.
            tokenize: False returns the text.
            **_: options of other tokenizers are ignored.

        Returns:
            Token ids, or the text.
        """
        text = "".join(f"{message['role']}:{message['content']};" for message in messages)
        text += "assistant:" if add_generation_prompt else ""
        return self.encode(text) if tokenize else text
