"""Names of the Tinker API, and the notes that the platform keeps of them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fireworks_training.local.store.tinker_store import (
    BadTinkerPath,
    Checkpoint,
    CheckpointNote,
    SessionNote,
    TinkerStore,
    expiry,
    parse_path,
)

RUN = f"ts-{'0' * 32}:train:0"


def note(kind: str, name: str, expires_at: str | None = None) -> CheckpointNote:
    path = f"tinker://{RUN}/{kind}/{name}"
    return CheckpointNote(path, 1, f"2026-01-01T00:00:0{len(name)}+00:00", expires_at)


def test_a_path_and_its_folder() -> None:
    checkpoint = parse_path(f"tinker://{RUN}/weights/step-1")
    assert checkpoint == Checkpoint(RUN, "weights", "step-1")
    assert checkpoint.path == f"tinker://{RUN}/weights/step-1"
    assert checkpoint.identity == f"ts-{'0' * 32}.train.0.step-1"


@pytest.mark.parametrize(
    "path",
    [
        "",
        f"{RUN}/weights/x",
        f"tinker://{RUN}/weights",
        f"tinker://{RUN}/models/x",
        f"tinker://{RUN}/weights/../x",
        f"tinker://{RUN}/weights/.x",
        f"tinker://{RUN}/weights/{'x' * 129}",
        "tinker://../weights/x",
        f"tinker://{RUN}:1/weights/x",
    ],
)
def test_paths_that_are_refused(path: str) -> None:
    with pytest.raises(BadTinkerPath):
        parse_path(path)


def test_named_snapshots_are_kept_until_their_time_is_over(tmp_path: Path) -> None:
    store = TinkerStore(tmp_path)
    store.write_checkpoint(note("weights", "a"))
    store.write_checkpoint(note("sampler_weights", "bb"))
    store.write_checkpoint(note("sampler_weights", "ccc", expiry(3600)))
    store.write_checkpoint(note("sampler_weights", "dddd", "2026-01-01T00:00:00+00:00"))
    names = [one.checkpoint.name for one in store.checkpoints(RUN)]
    assert names == ["a", "bb", "ccc", "dddd"]
    assert store.named_snapshots() == {f"ts-{'0' * 32}.train.0.{name}" for name in ("bb", "ccc")}
    assert store.checkpoint(Checkpoint(RUN, "sampler_weights", "dddd")) is None
    store.forget_checkpoint(Checkpoint(RUN, "sampler_weights", "bb"))
    store.forget_checkpoint(Checkpoint(RUN, "sampler_weights", "bb"))
    assert store.named_snapshots() == {f"ts-{'0' * 32}.train.0.ccc"}


@pytest.mark.parametrize(
    "damage", ["", '{"run', "null", "[]", '{"of_a_later_version": 1}', "\x00\x00"]
)
def test_a_damaged_note_is_left_out_and_the_others_are_there(tmp_path: Path, damage: str) -> None:
    store = TinkerStore(tmp_path)
    session = f"ts-{'0' * 32}"
    other = f"ts-{'1' * 32}"
    kept: list[list[object]] = []
    for damaged in (False, True):
        if damaged:
            for folder, name in (
                ("runs", f"{other}.train.0"),
                ("sessions", other),
                ("samplers", f"{session}.sampler.7"),
                ("checkpoints", f"weights.{other}.train.0.x"),
            ):
                (tmp_path / folder / f"{name}.json").write_text(damage)
        else:
            store.write_session(SessionNote(session))
            store.write_checkpoint(note("sampler_weights", "a"))
        kept.append(
            [
                store.runs(),
                store.sessions(),
                store.samplers_of(session),
                store.checkpoints(),
                store.named_snapshots(),
            ]
        )
    assert kept[0] == kept[1]
    assert store.session(other) is None
    assert store.run(f"{other}:train:0") is None
    assert [one.session for one in store.sessions()] == [session]


@pytest.mark.parametrize(
    "change",
    [
        {"size_bytes": "many"},
        {"time": 5},
        {"path": "tinker://elsewhere"},
        {"expires_at": "soon"},
        {"expires_at": "2030-01-01T00:00:00"},
        {"of_another_version": 1},
    ],
)
def test_a_note_with_other_values_is_skipped_and_said_once(
    tmp_path: Path, change: dict[str, object], caplog: pytest.LogCaptureFixture
) -> None:
    store = TinkerStore(tmp_path)
    good = note("weights", "a")
    store.write_checkpoint(good)
    (path,) = (tmp_path / "checkpoints").iterdir()
    assert store.checkpoints() == [good]
    path.write_text(json.dumps(json.loads(path.read_bytes()) | change))
    for _ in range(3):
        assert store.checkpoints() == []
    assert len(caplog.messages) == 1
    assert str(path) in caplog.messages[0]
    assert path.exists()
