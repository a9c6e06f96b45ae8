"""Evaluation records: what is written comes back, whole, and nothing is ever half there."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from fireworks_training import (
    InvalidArgument,
    SampledCompletion,
    read_evaluation,
    write_evaluation,
)

PROMPTS = [[{"role": "user", "content": "a?"}], [{"role": "user", "content": "b?"}]]


def completion(prompt: int, sample: int, snapshot: str | None = "s-1") -> SampledCompletion:
    return SampledCompletion(
        "an answer\u2028in two lines",
        [10 + prompt, 2, 3],
        2,
        "stop",
        1,
        prompt_index=prompt,
        sample_index=sample,
        snapshot_identity=snapshot,
        snapshot_identity_first=snapshot,
    )


COMPLETIONS = [completion(p, s) for p in range(2) for s in range(2)]


def test_what_was_written_is_read_back(tmp_path: Path) -> None:
    written = write_evaluation(
        tmp_path / "e.jsonl",
        COMPLETIONS,
        prompts=PROMPTS,
        scores=[1, 0, 1, 1],
        settings={"temperature": 1.0, "seed": 3},
        name="before",
    )
    read = read_evaluation(tmp_path / "e.jsonl")
    assert read == written
    assert read.snapshot == "s-1"
    assert read.mean_score == 0.75
    assert read.prompts == PROMPTS
    assert [sample.prompt_tokens for sample in read.samples] == [[10, 2], [10, 2], [11, 2], [11, 2]]
    assert read.samples[3].text == "an answer\u2028in two lines"
    assert [file.name for file in tmp_path.iterdir()] == ["e.jsonl"]


def test_equal_prompts_have_an_equal_hash(tmp_path: Path) -> None:
    first = write_evaluation(tmp_path / "1", COMPLETIONS)
    again = write_evaluation(tmp_path / "2", [completion(p, 0, "s-2") for p in range(2)])
    other = write_evaluation(tmp_path / "3", COMPLETIONS[:2])
    assert first.prompts_sha256 == again.prompts_sha256 != other.prompts_sha256
    assert first.mean_score is None


@pytest.mark.parametrize(
    ("completions", "options", "says"),
    [
        ([], {}, "no completions"),
        (COMPLETIONS, {"scores": [1.0]}, "1 scores for 4 completions"),
        (COMPLETIONS, {"prompts": PROMPTS[:1]}, "prompt_index 1, and there are 1 prompts"),
        (COMPLETIONS, {"snapshot": "s-0"}, "leave snapshot= out"),
        ([completion(0, 0), completion(0, 1, "s-2")], {}, "of several snapshots.*hot load"),
        ([completion(0, 0, None)], {}, "pass snapshot=.*current_snapshot"),
        (COMPLETIONS, {"settings": {"f": object()}}, "settings can't be written as JSON"),
    ],
)
def test_a_record_that_would_mislead_is_refused_and_leaves_nothing(
    tmp_path: Path, completions: Sequence[SampledCompletion], options: dict[str, Any], says: str
) -> None:
    with pytest.raises(InvalidArgument, match=says):
        write_evaluation(tmp_path / "e", completions, **options)
    assert not list(tmp_path.iterdir())


def test_a_record_is_not_overwritten(tmp_path: Path) -> None:
    write_evaluation(tmp_path / "e", COMPLETIONS)
    before = (tmp_path / "e").read_bytes()
    with pytest.raises(InvalidArgument, match="choose another path"):
        write_evaluation(tmp_path / "e", COMPLETIONS[:1])
    assert (tmp_path / "e").read_bytes() == before


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        write_evaluation(tmp_path / "e", COMPLETIONS)
    assert not list(tmp_path.iterdir())


def test_a_damaged_record_is_told(tmp_path: Path) -> None:
    path = tmp_path / "e"
    write_evaluation(path, COMPLETIONS)
    lines = path.read_text().splitlines(keepends=True)
    moved = json.loads(lines[1]) | {"prompt_tokens": [9, 9]}
    damaged = {
        "cut short: 3 of its 4": lines[:-1],
        "line 2: not an evaluation": [lines[0], "{\n"],
        "line 1: not an evaluation": [],
        "format 2": [lines[0].replace('"evaluation": 1', '"evaluation": 2')],
        "was changed": [lines[0], json.dumps(moved) + "\n", *lines[2:]],
    }
    for says, content in damaged.items():
        path.write_text("".join(content))
        with pytest.raises(InvalidArgument, match=says):
            read_evaluation(path)


@pytest.mark.parametrize("taken", [False, True])
def test_a_folder_without_hard_links_will_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, taken: bool
) -> None:
    target = tmp_path / "e.jsonl"

    def no_links(_: str, to: Path) -> None:
        if taken:  # by another process, meanwhile
            to.write_text("theirs")
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    if taken:
        with pytest.raises(InvalidArgument, match="exists by now"):
            write_evaluation(target, COMPLETIONS)
        assert target.read_text() == "theirs"
    else:
        assert write_evaluation(target, COMPLETIONS) == read_evaluation(target)
    assert [file.name for file in tmp_path.iterdir()] == ["e.jsonl"]
