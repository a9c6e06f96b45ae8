"""The operations of a training client that are one JSON request: checked, and made ready to run.

Each function checks its arguments and returns an `Operation`. Its place in the queue is given by
`OperationQueue.submit`. Passes over datums are in `pass_operations`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import orjson

from fireworks_training._async.training.arguments import check_name, check_state
from fireworks_training._async.training.queue import Operation, OperationContext, OperationQueue
from fireworks_training._async.training.requests import Request, WireRequest
from fireworks_training._checks import one_of
from fireworks_training._core.operations import Role
from fireworks_training._core.snapshots import Chain
from fireworks_training._wire.training.bodies import decode_snapshot
from fireworks_training.errors import InvalidArgument, NotSupported, ProtocolError
from fireworks_training.models import Snapshot
from fireworks_training.options import CheckpointType as CheckpointType
from fireworks_training.options import GradNorms as GradNorms
from fireworks_training.options import LossConfig as LossConfig
from fireworks_training.options import Normalization as Normalization

if TYPE_CHECKING:
    import tinker
    from tinker.types import LoadWeightsResponse, OptimStepResponse, SaveWeightsResponse

    from fireworks_training._tinker_types import SaveWeightsForSamplerResponse

logger = logging.getLogger("fireworks_training.trainer")

CHECKPOINT_TYPES = (None, "base", "delta", "merged_base")
NORMALIZATIONS = (None, "num_loss_tokens", "num_sequences", "none")
GRAD_NORM_METRICS = (None, "off", "basic", "detailed", True, False)


def _encoded(model_id: str, path: str, fields: Mapping[str, Any]) -> bytes:
    """A request of one operation, but for its id."""
    return orjson.dumps({**fields, "type": path, "model_id": model_id})


def _with_id(path: str, encoded: bytes, seq_id: int) -> WireRequest:
    return WireRequest(path, b'%b,"seq_id":%d}' % (encoded[:-1], seq_id))


async def _one(turn: OperationContext, path: str, encoded: bytes) -> Mapping[str, Any]:
    """Send one JSON request and wait for its result."""
    (answer,) = await turn.send([Request(partial(_with_id, path, encoded))])
    if isinstance(answer, bytes):
        raise ProtocolError(f"{path}: the trainer answered protobuf where JSON is due")
    return answer


def optim_step(
    model_id: str,
    adam_params: tinker.AdamParams,
    normalization: Normalization | None,
    emit_grad_norm_metrics: GradNorms | None,
    *,
    accept_partial: bool,
) -> Operation[OptimStepResponse]:
    """Apply the gradients held."""
    import tinker

    if not isinstance(adam_params, tinker.AdamParams):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise InvalidArgument(
            f"adam_params must be tinker.AdamParams, not {type(adam_params).__name__}"
        )
    one_of("grad_accumulation_normalization", normalization, NORMALIZATIONS)
    mode: Any = emit_grad_norm_metrics
    if mode is None:
        mode = getattr(adam_params, "emit_grad_norm_metrics", None)
    if isinstance(mode, bool):
        mode = "basic" if mode else "off"
    one_of("emit_grad_norm_metrics", mode, GRAD_NORM_METRICS)
    adam: dict[str, Any] = adam_params.model_dump(exclude={"emit_grad_norm_metrics"})
    if mode is not None:
        adam["emit_grad_norm_metrics"] = mode
    fields: dict[str, Any] = {"adam_params": adam}
    if normalization is not None:
        fields["grad_accumulation_normalization"] = normalization
    encoded = _encoded(model_id, "optim_step", fields)
    return Operation(
        Role.OPTIM, "optim_step", _optim_step, (encoded,), accept_partial=accept_partial
    )


async def _optim_step(turn: OperationContext, encoded: bytes) -> OptimStepResponse:
    from tinker.types import OptimStepResponse

    payload = await _one(turn, "optim_step", encoded)
    return OptimStepResponse(metrics=payload.get("metrics"))


def save_state(
    model_id: str, name: str, runner: OperationQueue, ttl_seconds: int | None, overwrite: bool
) -> Operation[SaveWeightsResponse]:
    """Save weights and optimizer; `runner` is told the name."""
    check_name("name", name)
    _refuse(ttl_seconds=ttl_seconds, overwrite=overwrite or None)

    async def run(turn: OperationContext) -> SaveWeightsResponse:
        from tinker.types import SaveWeightsResponse

        encoded = _encoded(model_id, "save_weights", {"path": name})
        payload = await _one(turn, "save_weights", encoded)
        path = payload.get("path")
        if not isinstance(path, str):
            raise ProtocolError("the trainer saved a state but named no path")
        if payload.get("replaced") is True:
            logger.warning("save_state(%r) replaced an earlier state of this name", name)
        elif name in runner.saved_names:
            logger.warning(
                "save_state(%r): this client saved a state of this name before, and the trainer "
                "does not say what became of it",
                name,
            )
        runner.saved_names.add(name)
        runner.last_saved_state = path
        return SaveWeightsResponse(path=path)

    return Operation(Role.SAVE, "save_state", run)


def load_state(
    model_id: str, path: str, weights_access_token: str | None, *, optimizer: OperationQueue | None
) -> Operation[LoadWeightsResponse]:
    """Load a saved state; with the optimizer, a line that has saved none is told its name."""
    check_state("path", path)
    with_optimizer = optimizer is not None
    fields: dict[str, Any] = {"path": path, "optimizer": with_optimizer}
    if weights_access_token is not None:
        fields["weights_access_token"] = weights_access_token

    async def run(turn: OperationContext) -> LoadWeightsResponse:
        from tinker.types import LoadWeightsResponse

        encoded = _encoded(model_id, "load_weights", fields)
        payload = await _one(turn, "load_weights", encoded)
        if optimizer is not None and optimizer.last_saved_state is None:
            optimizer.last_saved_state = path
        return LoadWeightsResponse(path=payload.get("path", path))

    return Operation(Role.LOAD, "load_state", run)


def load_adapter(model_id: str, adapter_path: str) -> Operation[LoadWeightsResponse]:
    """Load the weights of an adapter that a trainer or peft wrote."""
    if not adapter_path.strip():
        raise InvalidArgument(
            f"adapter_path={adapter_path!r}: pass a model resource, a gs:// folder, or what the "
            "platform lets you load"
        )
    encoded = _encoded(model_id, "load_adapter", {"adapter_path": adapter_path})

    async def run(turn: OperationContext) -> LoadWeightsResponse:
        from tinker.types import LoadWeightsResponse

        payload = await _one(turn, "load_adapter", encoded)
        return LoadWeightsResponse(path=payload.get("adapter_path", adapter_path))

    return Operation(Role.LOAD, "load_adapter", run)


def save_weights_for_sampler(
    model_id: str,
    name: str,
    suffix: str,
    *,
    chain: Chain,
    checkpoint_type: CheckpointType | None,
    export_precision: str | None = None,
    tinker_only: bool = False,
    **refused: object,
) -> Operation[SaveWeightsForSamplerResponse]:
    """Save a snapshot that a deployment can load, named with the session's suffix.

    Args:
        chain: decides what is asked for, unless the caller does, and is told what was written.
        tinker_only: for a Tinker server, whose snapshots are of one type.
    """
    check_name("name", name)
    one_of("checkpoint_type", checkpoint_type, CHECKPOINT_TYPES)
    _refuse(**refused, **({"checkpoint_type": checkpoint_type} if tinker_only else {}))
    fields = {"path": f"{name}-{suffix}"}
    if export_precision is not None:
        if checkpoint_type != "merged_base":
            raise InvalidArgument("export_precision goes only with checkpoint_type='merged_base'")
        fields["export_precision"] = export_precision

    async def run(turn: OperationContext) -> SaveWeightsForSamplerResponse:
        from fireworks_training._tinker_types import SaveWeightsForSamplerResponse

        async def save(kind: CheckpointType) -> Snapshot:
            sent = fields if tinker_only else {**fields, "checkpoint_type": kind}
            encoded = _encoded(model_id, "save_weights_for_sampler", sent)
            return decode_snapshot(await _one(turn, "save_weights_for_sampler", encoded))

        if checkpoint_type == "merged_base":
            snapshot = await save(checkpoint_type)  # stands alone, and is no link of the chain
        else:
            # Chosen now, at this operation's turn: what came before it is on its way.
            asked = chain.take_next_type(checkpoint_type)
            try:
                snapshot = chain.saved(await save(asked), asked, turn.ticket.step)
            except BaseException:
                chain.failed()
                raise
        return SaveWeightsForSamplerResponse(path=snapshot.identity, snapshot=snapshot)

    return Operation(Role.SAVE, "save_weights_for_sampler", run)


def unload_model(model_id: str, *, tinker_only: bool = False) -> Operation[None]:
    """Free the trainer's memory.

    Args:
        tinker_only: for a Tinker server, to which it is no operation with a place in the line.
    """
    encoded = _encoded(model_id, "unload_model", {})

    async def run(turn: OperationContext) -> None:
        if tinker_only:
            await turn.send([Request(lambda _: WireRequest("unload_model", encoded))])
        else:
            await _one(turn, "unload_model", encoded)

    return Operation(Role.OTHER, "unload_model", run)


def _refuse(**options: object) -> None:
    """Refuse options of other servers that would have no effect here."""
    for name, value in options.items():
        if value is not None:
            raise NotSupported(
                f"{name}={value!r} is not supported: a trainer of this kind keeps what it saves, "
                "under names of its own; leave it out"
            )
