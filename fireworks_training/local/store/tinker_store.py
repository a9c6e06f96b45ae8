"""Tinker's names for runs and checkpoints, and the notes that the platform keeps of them.

A *run* is a model in training, `<session>:train:<n>`; its checkpoints are
`tinker://<run>/weights/<name>` (states) and `tinker://<run>/sampler_weights/<name>` (snapshots). On
disk both lie under an *identity*, a folder name made of run and name. Beside them this store keeps
a small JSON note for each run and checkpoint: the trainer writes it after the checkpoint itself,
the gateway lists and removes. It knows no tensors, and reads no checkpoint.
"""

from __future__ import annotations

import json
import logging
import re
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal, TypeVar, cast, get_args

from fireworks_training.local.store.snapshots import sync_file

log = logging.getLogger(__name__)

Kind = Literal["weights", "sampler_weights"]
KINDS = get_args(Kind)

SCHEME = "tinker://"
_RUN = re.compile(r"(ts-[0-9a-f]{32}):train:([0-9]{1,9})")
_SESSION = re.compile(r"ts-[0-9a-f]{32}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_SAMPLER = re.compile(r"(ts-[0-9a-f]{32}):sampler:([0-9]{1,9})")
MAX_SAID = 1000
"""Notes that can't be read and are named in the log, each once."""
NAME_RULE = "1 to 128 letters, digits, '.', '_' and '-', starting with a letter or a digit"


class BadTinkerPath(ValueError):
    """Raised for a text that is no path, name or run of ours; shows what one looks like."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """Names a checkpoint by its parts."""

    run: str
    kind: Kind
    name: str

    def __post_init__(self) -> None:
        if _RUN.fullmatch(self.run) is None:
            raise BadTinkerPath(f"{self.run[:80]!r} is not a training run of this platform")
        if _NAME.fullmatch(self.name) is None:
            raise BadTinkerPath(f"{self.name[:80]!r} can't name a checkpoint: use {NAME_RULE}")

    @property
    def path(self) -> str:
        """`tinker://` path under which users know it."""
        return f"{SCHEME}{self.run}/{self.kind}/{self.name}"

    @property
    def identity(self) -> str:
        """Name of its folder; a run has three parts without dots, so names can't collide."""
        return f"{self.run.replace(':', '.')}.{self.name}"


def parse_path(path: str) -> Checkpoint:
    """Return the checkpoint that a path names.

    Raises:
        BadTinkerPath.
    """
    parts = path.removeprefix(SCHEME).split("/")
    if not path.startswith(SCHEME) or len(parts) != 3 or parts[1] not in KINDS:
        raise BadTinkerPath(
            f"{path[:80]!r} is not a checkpoint: it must be {SCHEME}<run>/weights/<name> or"
            f" {SCHEME}<run>/sampler_weights/<name>"
        )
    return Checkpoint(parts[0], cast(Kind, parts[1]), parts[2])


def session_of(id_: str) -> str | None:
    """Return the session in the id of a run, of a sampling session, or of one of their requests."""
    session, separator, _ = id_.partition(":")
    return session if separator else None


def sampling_session_id(session: str, seq_id: int) -> str:
    """Return the id of a sampling session, the same for the same request."""
    return f"{session}:sampler:{seq_id}"


def ephemeral_identity(sampling_session: str) -> str:
    """Return the identity of the snapshot that is saved for one sampling session alone."""
    if _SAMPLER.fullmatch(sampling_session) is None:
        raise BadTinkerPath(f"{sampling_session[:80]!r} is not a sampling session of this platform")
    return sampling_session.replace(":", ".")


@dataclass(frozen=True, slots=True)
class RunNote:
    """Stores what is remembered of a run; `lora` holds the adapter's settings, None without one."""

    run: str
    base_model: str
    lora: Mapping[str, Any] | None
    user_metadata: Mapping[str, Any] | None = None
    created: str = field(default_factory=lambda: now().isoformat())


@dataclass(frozen=True, slots=True)
class CheckpointNote:
    """Stores what is remembered of a checkpoint; times are RFC 3339 in UTC."""

    path: str
    size_bytes: int
    time: str
    expires_at: str | None = None
    user_metadata: Mapping[str, str] | None = None

    @property
    def checkpoint(self) -> Checkpoint:
        """Run, kind and name of the checkpoint."""
        return parse_path(self.path)

    @property
    def expired(self) -> bool:
        """True once the checkpoint's time is over."""
        return self.expires_at is not None and datetime.fromisoformat(self.expires_at) <= now()


@dataclass(frozen=True, slots=True)
class SamplerNote:
    """Stores what a sampling session samples from.

    Attributes:
        session: its id.
        base_model: the model's name as its client knows it.
        identity: the snapshot; None for the base model itself.
        model_path: path of the checkpoint that it was made from, if that has a name.
    """

    session: str
    base_model: str
    identity: str | None
    model_path: str | None = None


@dataclass(frozen=True, slots=True)
class SessionNote:
    """Stores what is remembered of a client's session.

    Attributes:
        session: its id.
        display_name, user_metadata: the client's own words.
        finished: outcome that its client reported: "success", "errored" or "interrupted"; None
            before.
        detail: the client's words about that outcome.
    """

    session: str
    display_name: str | None = None
    user_metadata: Mapping[str, str] = field(default_factory=dict[str, str])
    created: str = field(default_factory=lambda: now().isoformat())
    finished: str | None = None
    detail: str | None = None


Note = TypeVar("Note", RunNote, SessionNote, SamplerNote, CheckpointNote)


def now() -> datetime:
    """Return the time, in UTC."""
    return datetime.now(UTC)


def expiry(ttl_seconds: int | None) -> str | None:
    """Return when a checkpoint saved now expires."""
    return None if ttl_seconds is None else (now() + timedelta(seconds=ttl_seconds)).isoformat()


class TinkerStore:
    """Keeps the notes of one platform. Several processes may read; a run has one writer.

    Args:
        folder: made if it is missing.
    """

    def __init__(self, folder: Path) -> None:
        self._runs = folder / "runs"
        self._checkpoints = folder / "checkpoints"
        self._samplers = folder / "samplers"
        self._sessions = folder / "sessions"
        for part in (self._runs, self._checkpoints, self._samplers, self._sessions):
            part.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._unreadable: set[Path] = set()

    def write_run(self, note: RunNote) -> None:
        """Write the note of a run."""
        _write(self._runs / f"{note.run.replace(':', '.')}.json", asdict(note))

    def run(self, run: str) -> RunNote | None:
        """Return a run by its id."""
        if _RUN.fullmatch(run) is None:
            return None
        return self._read(RunNote, self._runs / f"{run.replace(':', '.')}.json")

    def runs(self) -> list[RunNote]:
        """Return all runs, oldest first."""
        return sorted(self._read_all(RunNote, self._runs), key=lambda note: note.created)

    def write_session(self, note: SessionNote) -> None:
        """Write the note of a session, in the place of an older one."""
        _write(self._sessions / f"{note.session}.json", asdict(note))

    def session(self, session: str) -> SessionNote | None:
        """Return a session by its id."""
        if _SESSION.fullmatch(session) is None:
            return None
        return self._read(SessionNote, self._sessions / f"{session}.json")

    def sessions(self) -> list[SessionNote]:
        """Return all sessions, oldest first."""
        made = self._read_all(SessionNote, self._sessions)
        return sorted(made, key=lambda note: (note.created, note.session))

    def write_sampler(self, note: SamplerNote) -> None:
        """Write the note of a sampling session."""
        _write(self._samplers / f"{note.session.replace(':', '.')}.json", asdict(note))

    def sampler(self, session: str) -> SamplerNote | None:
        """Return a sampling session by its id."""
        if _SAMPLER.fullmatch(session) is None:
            return None
        return self._read(SamplerNote, self._samplers / f"{session.replace(':', '.')}.json")

    def samplers_of(self, session: str) -> list[str]:
        """Return the ids of the sampling sessions of a client's session."""
        if _SAMPLER.fullmatch(f"{session}:sampler:0") is None:
            return []
        notes = self._read_all(SamplerNote, self._samplers, f"{session}.sampler.*.json")
        return sorted(note.session for note in notes)

    def write_checkpoint(self, note: CheckpointNote) -> None:
        """Write the note of a checkpoint, in the place of an older one of its path."""
        _write(self._note(note.checkpoint), asdict(note))

    def checkpoint(self, checkpoint: Checkpoint) -> CheckpointNote | None:
        """Return a checkpoint's note; None when there is none, or its time is over."""
        note = self._read(CheckpointNote, self._note(checkpoint))
        return None if note is None or note.expired else note

    def checkpoints(self, run: str | None = None) -> list[CheckpointNote]:
        """Return the checkpoints of a run, or all, oldest first; also those whose time is over."""
        notes = self._read_all(CheckpointNote, self._checkpoints)
        chosen = [note for note in notes if run is None or note.checkpoint.run == run]
        return sorted(chosen, key=lambda note: note.time)

    def named_snapshots(self) -> set[str]:
        """Return the identities of the sampler checkpoints that have a name and are still to be
        kept."""
        notes = (note for note in self.checkpoints() if not note.expired)
        of = (note.checkpoint for note in notes)
        return {one.identity for one in of if one.kind == "sampler_weights"}

    def forget_checkpoint(self, checkpoint: Checkpoint) -> None:
        """Drop the note alone. Idempotent."""
        self._note(checkpoint).unlink(missing_ok=True)

    def _note(self, checkpoint: Checkpoint) -> Path:
        return self._checkpoints / f"{checkpoint.kind}.{checkpoint.identity}.json"

    def _read_all(self, cls: type[Note], folder: Path, pattern: str = "*.json") -> Iterable[Note]:
        for path in folder.glob(pattern):
            note = None if path.name.startswith(".") else self._read(cls, path)
            if note is not None:
                yield note

    def _read(self, cls: type[Note], path: Path) -> Note | None:
        """Return a note; None when there is none, or none that this version can read.

        The latter is said once, and its file is left for whoever can read it.
        """
        try:
            return _note_of(cls, json.loads(path.read_bytes()))
        except FileNotFoundError:
            return None
        except (ValueError, OSError) as error:
            if path not in self._unreadable and len(self._unreadable) < MAX_SAID:
                self._unreadable.add(path)
                log.warning("the note %s is skipped: %s", path, error)
            return None


def _note_of(cls: type[Note], raw: object) -> Note:
    """Return the note in a JSON value.

    Raises:
        ValueError: it has other fields than this version writes, or values of other types.
    """
    if not isinstance(raw, dict):
        raise ValueError("it is no JSON object")
    values = cast("dict[str, Any]", raw)
    kinds = {one.name: str(one.type) for one in fields(cls)}
    if unknown := sorted(set(values) - set(kinds)):
        raise ValueError(f"it has fields that this version does not know: {unknown[:5]}")
    for name, value in values.items():
        if not isinstance(value, _TYPES[kinds[name].partition("[")[0].partition(" ")[0]]) and not (
            value is None and "None" in kinds[name]
        ):
            raise ValueError(f"its field {name!r} is not of type {kinds[name]}")
    try:
        note = cls(**values)
    except TypeError:
        raise ValueError("it lacks fields") from None
    _check_values(note)
    return note


def _check_values(note: object) -> None:
    """Raise ValueError for values that a note of ours can't have."""
    if isinstance(note, RunNote) and note.lora is not None:
        if missing := _LORA - set(note.lora):
            raise ValueError(f"its field 'lora' lacks {sorted(missing)}")
    elif isinstance(note, CheckpointNote):
        parse_path(note.path)
        if note.expires_at is not None and datetime.fromisoformat(note.expires_at).tzinfo is None:
            raise ValueError("its field 'expires_at' has no time zone")


_LORA = frozenset({"rank", "train_unembed", "train_mlp", "train_attn"})
_TYPES: dict[str, type | tuple[type, ...]] = {"str": str, "int": int, "Mapping": dict}


def _write(path: Path, note: Mapping[str, Any]) -> None:
    """Write a note whole: flushed before it takes its name, so that no power cut leaves half."""
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        draft.write_text(json.dumps(note))
        sync_file(draft)
        draft.replace(path)
        sync_file(path.parent)
    except BaseException:
        draft.unlink(missing_ok=True)
        raise
