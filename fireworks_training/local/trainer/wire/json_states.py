"""Requests to save and load states and snapshots, in JSON.

Knows the names of both APIs: a Fireworks client names states and snapshots of its job; a client of
the Tinker API names checkpoints of its run, and gets their paths back. The model's limits say which
of the two its client is. Does not know files.
"""

from __future__ import annotations

from fireworks_training.local.store.snapshots import SnapshotError, check_name
from fireworks_training.local.store.tinker_store import (
    SCHEME,
    BadTinkerPath,
    Checkpoint,
    Kind,
    ephemeral_identity,
    parse_path,
    sampling_session_id,
    session_of,
)
from fireworks_training.local.trainer.queue.operations import (
    LoadAdapter,
    LoadState,
    Operation,
    OperationFailed,
    SaveSnapshot,
    SaveState,
    TinkerSave,
)
from fireworks_training.local.trainer.wire.datums import ModelLimits
from fireworks_training.local.trainer.wire.json_fields import Body, allow, flag, text, whole

CROSS_JOB = "cross_job://"
_TTL_S = (3600, 10 * 366 * 86400)
_PLACE = ("model_id", "seq_id", "type")


def save_weights(body: Body, limits: ModelLimits) -> Operation:
    """Decode a save of a state."""
    if limits.tinker_run is None:
        allow(body, (*_PLACE, "path", "overwrite", "ttl_seconds"), "save_weights")
        # A client that does not know the field has always had a state of its name replaced.
        replace = flag(body, "overwrite", True)
        return SaveState(_name(body, "state"), replace, ttl_seconds=_ttl(body, 1))
    overwrite = flag(body, "overwrite", False)
    allow(body, (*_PLACE, "path", "overwrite", *_NOTES), "save_weights")
    checkpoint = _checkpoint(limits.tinker_run, "weights", text(body, "path"))
    return SaveState(checkpoint.identity, overwrite, _tinker_save(body, checkpoint))


def load_weights(body: Body, limits: ModelLimits) -> Operation:
    """Decode a load of a state, with the optimizer's moments or without."""
    allow(body, (*_PLACE, "path", "optimizer"), "load_weights")
    path, optimizer = text(body, "path"), flag(body, "optimizer", False)
    if limits.tinker_run is not None:
        return tinker_load(path, optimizer)
    job: str | None = None
    if path.startswith(CROSS_JOB):
        job, _, path = path.removeprefix(CROSS_JOB).partition("/")
    try:
        if job is not None:
            check_name(job, "job")
        return LoadState(check_name(path, "state"), job, optimizer)
    except SnapshotError as error:
        raise OperationFailed(
            f"{error}. A state is named by the name it was saved under, or as"
            f" {CROSS_JOB}<job>/<name>"
        ) from error


def tinker_load(path: str, optimizer: bool) -> LoadState:
    """Make a load of a Tinker path."""
    try:
        checkpoint = parse_path(path)
    except BadTinkerPath as error:
        raise OperationFailed(str(error)) from None
    if checkpoint.kind != "weights":
        raise OperationFailed(
            f"{path} is a sampler checkpoint, which has no training state: load one that"
            " save_state made"
        )
    return LoadState(checkpoint.identity, None, optimizer, path)


def save_weights_for_sampler(body: Body, limits: ModelLimits) -> Operation:
    """Decode a save of a sampler snapshot."""
    if limits.tinker_run is not None:
        return _tinker_snapshot(body, limits.tinker_run)
    fields = ("path", "checkpoint_type", "export_precision", "ttl_seconds")
    allow(body, (*_PLACE, *fields), "save_weights_for_sampler")
    name, ttl = _name(body, "snapshot"), _ttl(body, 1)
    kind, precision = body.get("checkpoint_type") or "base", body.get("export_precision")
    if kind in ("base", "delta"):
        if precision is not None:
            raise OperationFailed("export_precision goes only with checkpoint_type 'merged_base'")
        return SaveSnapshot(name, "base" if kind == "base" else "delta", ttl_seconds=ttl)
    if kind != "merged_base":
        raise OperationFailed("checkpoint_type must be base, delta or merged_base")
    if not limits.lora:
        raise OperationFailed(
            "checkpoint_type 'merged_base' is for LoRA; this model saves as base or delta"
        )
    if precision not in (None, "source", "bf16"):
        raise OperationFailed(
            "export_precision takes source or bf16 here; others are not supported"
        )
    return SaveSnapshot(name, "merged_base", ttl_seconds=ttl)


def load_adapter(body: Body, limits: ModelLimits) -> Operation:
    """Decode a load of an adapter's weights from a snapshot; its optimizer starts anew."""
    allow(body, (*_PLACE, "adapter_path"), "load_adapter")
    path = text(body, "adapter_path")
    if not limits.lora:
        raise OperationFailed("load_adapter is for models with an adapter; this one has none")
    try:
        if path.startswith(SCHEME):
            return LoadAdapter(parse_path(path).identity, path)
        return LoadAdapter(check_name(path.rpartition("/checkpoints/")[2], "snapshot"), path)
    except (SnapshotError, BadTinkerPath) as error:
        raise OperationFailed(
            f"{error}. An adapter is named by the identity of a snapshot that this platform saved,"
            " or by accounts/<account>/rlorTrainerJobs/<job>/checkpoints/<identity>"
        ) from error


def _name(body: Body, what: str) -> str:
    try:
        return check_name(text(body, "path"), what)
    except SnapshotError as error:
        raise OperationFailed(str(error)) from error


# -- Tinker --------------------------------------------------------------------------------------

_NOTES = ("ttl_seconds", "user_metadata")


def _tinker_snapshot(body: Body, run: str) -> SaveSnapshot:
    allow(
        body,
        (*_PLACE, "path", "sampling_session_seq_id", "kind", *_NOTES),
        "save_weights_for_sampler",
    )
    # A snapshot meets what "inflight" promises: samples on weights at least as new as the call.
    if body.get("kind", "snapshot") not in ("snapshot", "inflight"):
        raise OperationFailed("kind must be snapshot or inflight")
    number = body.get("sampling_session_seq_id")
    if number is None:
        checkpoint = _checkpoint(run, "sampler_weights", text(body, "path"))
        return SaveSnapshot(checkpoint.identity, "base", _tinker_save(body, checkpoint))
    if body.get("path") is not None or not isinstance(number, int) or not 0 <= number < 10**9:
        raise OperationFailed(
            "either path or sampling_session_seq_id, a whole number from 0, must be given"
        )
    session = sampling_session_id(str(session_of(run)), number)
    saved = TinkerSave(None, None, None, session, run)
    return SaveSnapshot(ephemeral_identity(session), "base", saved)


def _ttl(body: Body, least: int) -> int | None:
    if body.get("ttl_seconds") is None:
        return None
    return whole(body, "ttl_seconds", least=least, most=_TTL_S[1])


def _tinker_save(body: Body, checkpoint: Checkpoint) -> TinkerSave:
    ttl = _ttl(body, _TTL_S[0])
    metadata = body.get("user_metadata")
    if metadata is not None and (
        not isinstance(metadata, dict)
        or not all(isinstance(k, str) and isinstance(v, str) for k, v in metadata.items())
    ):
        raise OperationFailed("user_metadata must map strings to strings")
    return TinkerSave(checkpoint, ttl, metadata, None, checkpoint.run)


def _checkpoint(run: str, kind: Kind, name: str) -> Checkpoint:
    try:
        return Checkpoint(run, kind, name)
    except BadTinkerPath as error:
        raise OperationFailed(str(error)) from None
