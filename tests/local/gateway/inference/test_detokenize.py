"""Pieces joined are the whole text, for any tokenizer and any cut; stop strings end it exactly."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from fireworks_training.local.gateway.inference.detokenize import (
    NoTokenizer,
    StopMatcher,
    TextCodec,
)


def byte_level() -> Tokenizer:
    """Every byte a token, some merges that cut through characters, special and added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {char: i for i, char in enumerate(alphabet)}
    merges = [("h", "e"), ("Ã", "©"), ("Ġ", "he"), ("ð", "Ł")]
    for left, right in merges:
        vocabulary[left + right] = len(vocabulary)
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer.add_tokens([AddedToken("<think>"), AddedToken("a b é")])
    return tokenizer


def characters() -> Tokenizer:
    vocabulary = {char: i for i, char in enumerate("abc é\n0123")}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="a"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def byte_fallback() -> Tokenizer:
    vocabulary = {"<unk>": 0, "▁": 1, "▁he": 2, "llo": 3, "x": 4}
    for byte in range(256):
        vocabulary[f"<0x{byte:02X}>"] = len(vocabulary)
    tokenizer = Tokenizer(
        models.BPE(vocab=vocabulary, merges=[], byte_fallback=True, unk_token="<unk>")
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    return tokenizer


TOKENIZERS = {"byte_level": byte_level, "characters": characters, "byte_fallback": byte_fallback}


@pytest.fixture(scope="session")
def codecs_by_name(tmp_path_factory: pytest.TempPathFactory) -> dict[str, TextCodec]:
    found = {}
    for name, make in TOKENIZERS.items():
        folder = tmp_path_factory.mktemp(name)
        make().save(str(folder / "tokenizer.json"))
        found[name] = TextCodec(folder)
    return found


@pytest.mark.parametrize("name", ["byte_level", "characters"])
@settings(deadline=None)
@given(data=st.data())
def test_pieces_join_to_the_whole_text(
    codecs_by_name: dict[str, TextCodec], name: str, data: st.DataObject
) -> None:
    tokenizer = TOKENIZERS[name]()
    ids = data.draw(st.lists(st.integers(0, tokenizer.get_vocab_size() - 1), max_size=40))
    stream = codecs_by_name[name].stream()
    pieces = []
    position = 0
    while position < len(ids):
        step = data.draw(st.integers(1, 5))
        pieces.append(stream.push(ids[position : position + step]))
        position += step
    text = "".join([*pieces, stream.finish()])
    assert text == tokenizer.decode(ids, skip_special_tokens=True)
    assert text == codecs_by_name[name].decode(ids)


@settings(deadline=None)
@given(text=st.text(max_size=20))
def test_characters_of_many_tokens_come_whole(
    codecs_by_name: dict[str, TextCodec], text: str
) -> None:
    for name in ("byte_level", "byte_fallback"):
        codec = codecs_by_name[name]
        if name == "byte_fallback":
            ids = [5 + byte for byte in text.encode()]
        else:
            ids = codec.encode(text)
        stream = codec.stream()
        pieces = [stream.push([token]) for token in ids]
        assert "".join([*pieces, stream.finish()]) == text
        if "\ufffd" not in text:
            assert all("\ufffd" not in piece for piece in pieces)


def test_bytes_that_never_become_a_character_are_not_held_for_ever(
    codecs_by_name: dict[str, TextCodec],
) -> None:
    stream = codecs_by_name["byte_fallback"].stream()
    pieces = [stream.push([5 + 0xF0]) for _ in range(40)]
    assert any(pieces)
    assert set("".join(pieces)) == {"\ufffd"}


def test_special_tokens_are_no_text_and_added_ones_are(
    codecs_by_name: dict[str, TextCodec],
) -> None:
    codec = codecs_by_name["byte_level"]
    tokenizer = byte_level()
    end, think = tokenizer.token_to_id("<|end|>"), tokenizer.token_to_id("<think>")
    assert codec.decode([think, end]) == "<think>"
    assert codec.decode([10**6]) == ""


def test_a_folder_without_a_tokenizer(tmp_path: Path) -> None:
    with pytest.raises(NoTokenizer, match="no tokenizer"):
        TextCodec(tmp_path)


@settings(deadline=None)
@given(
    st.text("ab\n", max_size=30),
    st.lists(st.text("ab\n", min_size=1, max_size=4), min_size=1, max_size=3),
    st.lists(st.integers(1, 5), max_size=20),
)
def test_stop_strings_end_the_text_whatever_the_pieces(
    text: str, stops: list[str], cuts: list[int]
) -> None:
    matcher = StopMatcher(stops)
    given_out, consumed, hit = "", 0, False
    for cut in [*cuts, len(text)]:
        piece, hit = matcher.push(text[consumed : consumed + cut])
        given_out += piece
        consumed = min(len(text), consumed + cut)
        if hit:
            break
    if not hit:
        given_out += matcher.finish()
        assert given_out == text
        assert not any(stop in text for stop in stops)
        return
    # The first stop string that was complete when its last piece came.
    starts = [at for stop in stops if (at := text[:consumed].find(stop)) >= 0]
    assert given_out == text[: min(starts)]


def test_nothing_is_held_that_can_not_become_a_stop() -> None:
    matcher = StopMatcher(["\n\n"])
    assert matcher.push("one\n") == ("one", False)
    assert matcher.push("two") == ("\ntwo", False)
    assert matcher.push("\n") == ("", False)
    assert matcher.push("\nthree") == ("", True)


@pytest.mark.parametrize("content", [b"", b"{}", b"[]", b"\x00\xff", b'{"model": 5}'])
def test_a_broken_tokenizer_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(NoTokenizer, match="no tokenizer that can be read"):
        TextCodec(tmp_path)
