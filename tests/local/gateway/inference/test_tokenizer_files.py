"""The tokenizer's files that a model's folder shows: its own, and none that links lead to."""

from __future__ import annotations

from pathlib import Path

import pytest

from fireworks_training.local.gateway.inference.tokenizer_route import read_files
from fireworks_training.local.gateway.web.problems import HttpProblem


def test_a_link_out_of_the_folder_is_not_followed(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("mine")
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "tokenizer.json").write_text("{}")
    (folder / "vocab.json").symlink_to("../secret")
    (folder / "merges.txt").symlink_to(tmp_path / "secret")
    (folder / "added").write_text("own")
    (folder / "added_tokens.json").symlink_to("added")
    assert set(read_files(folder).files) == {"tokenizer.json", "added_tokens.json"}
    linked = tmp_path / "name"
    linked.symlink_to(folder)
    assert set(read_files(linked).files) == {"tokenizer.json", "added_tokens.json"}


@pytest.mark.parametrize(("target", "served"), [("blobs", True), ("others", False)])
def test_a_folder_of_the_hugging_face_cache_is_served(
    tmp_path: Path, target: str, served: bool
) -> None:
    folder = tmp_path / "models--a--b" / "snapshots" / "0123"
    other = tmp_path / "models--a--b" / target
    folder.mkdir(parents=True)
    other.mkdir()
    (other / "abc").write_text("{}")
    (folder / "tokenizer.json").symlink_to(f"../../{target}/abc")
    if served:
        assert set(read_files(folder).files) == {"tokenizer.json"}
    else:
        with pytest.raises(HttpProblem, match=r"no tokenizer\.json"):
            read_files(folder)
