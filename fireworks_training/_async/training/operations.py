"""The operations of a training client that are one JSON request: optimizer steps, saves, loads.

Each function checks its arguments and returns an `Operation`, ready to run. Its place in the line
is given by `OperationQueue.submit`; its body is written in `_wire.training.bodies`. Passes over
datums are in `pass_operations`.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from fireworks_training._async.training.arguments import (
    adam_settings,
    check_name,
    check_state,
    check_ttl,
)
from fireworks_training._async.training.context import Operation, OperationContext
from fireworks_training._async.training.model import RemoteModel
from fireworks_training._async.training.requests import Request
from fireworks_training._checks import integer, one_of
from fireworks_training._core.operations import Role
from fireworks_training._core.snapshots import Chain
from fireworks_training._wire.training import bodies
from fireworks_training.errors import InvalidArgument, NotSupported, ProtocolError
from fireworks_training.models import Snapshot
from fireworks_training.options import CheckpointType, GradNorms, Normalization

if TYPE_CHECKING:
    import tinker
    from tinker.types import LoadWeightsResponse, OptimStepResponse, SaveWeightsResponse

    from fireworks_training._tinker_types import SaveWeightsForSamplerResponse

logger = logging.getLogger("fireworks_training.trainer")

GIVEN_UP = "given_up_passes"
"""The metric of an `optim_step` that counts the passes which had succeeded in steps given up before
it."""

CHECKPOINT_TYPES = (None, "base", "delta", "merged_base")
NORMALIZATIONS = (None, "num_loss_tokens", "num_sequences", "none")
GRAD_NORM_METRICS = (None, "off", "basic", "detailed", True, False)


async def _send(context: OperationContext, path: str, body: bytes) -> Mapping[str, Any]:
    """Send one JSON request and wait for its result."""
    (answer,) = await context.send([Request(partial(bodies.with_seq_id, path, body))])
    if isinstance(answer, bytes):
        raise ProtocolError(f"{path}: the trainer answered protobuf where JSON is due")
    return answer


def optim_step(
    model: RemoteModel,
    adam_params: tinker.AdamParams,
    normalization: Normalization | None,
    emit_grad_norm_metrics: GradNorms | None,
    *,
    accept_partial: bool,
    passes: int | None = None,
) -> Operation[OptimStepResponse]:
    """Apply the gradients held; `passes`: how many passes the step must hold."""
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
    if passes is not None:
        integer("passes", passes, 1)
    given = adam_params.model_dump(exclude={"emit_grad_norm_metrics"})
    adam: dict[str, Any] = {**adam_settings(given)}
    if mode is not None:
        adam["emit_grad_norm_metrics"] = mode
    body = bodies.optim_step(model.id, adam, normalization)
    return Operation(
        Role.OPTIM,
        "optim_step",
        _optim_step,
        (body,),
        accept_partial=accept_partial,
        passes=passes,
    )


async def _optim_step(context: OperationContext, body: bytes) -> OptimStepResponse:
    from tinker.types import OptimStepResponse

    payload = await _send(context, "optim_step", body)
    metrics: dict[str, float] | None = payload.get("metrics")
    if context.given_up:
        metrics = {**(metrics or {}), GIVEN_UP: float(context.given_up)}
    return OptimStepResponse(metrics=metrics)


def discard_step() -> Operation[int]:
    """Drop the step under way; the queue sends what is needed for it before this runs."""

    async def run(context: OperationContext) -> int:
        return int(context.dropped)

    return Operation(Role.DISCARD, "discard_step", run)


def save_state(
    model: RemoteModel, name: str, ttl_seconds: int | None, overwrite: bool
) -> Operation[SaveWeightsResponse]:
    """Save weights and optimizer, and note the state."""
    check_name("name", name)
    ttl_seconds = check_ttl(ttl_seconds)
    one_of("overwrite", overwrite, (True, False))
    if not (model.session.tinker_only or model.capabilities.state_options):
        _refuse(ttl_seconds=ttl_seconds, overwrite=overwrite or None)
    states = model.states

    async def run(context: OperationContext) -> SaveWeightsResponse:
        from tinker.types import SaveWeightsResponse

        body = bodies.save_weights(model.id, name, overwrite=overwrite, ttl_seconds=ttl_seconds)
        payload = await _send(context, "save_weights", body)
        path = payload.get("path")
        if not isinstance(path, str):
            raise ProtocolError("the trainer saved a state but named no path")
        if payload.get("replaced") is True:
            if not overwrite:
                logger.warning("save_state(%r) replaced an earlier state of this name", name)
        elif name in states and not model.capabilities.state_options:
            logger.warning(
                "save_state(%r): this client saved a state of this name before, and the trainer "
                "does not say what became of it",
                name,
            )
        states.saved(name, path)
        return SaveWeightsResponse(path=path)

    return Operation(Role.SAVE, "save_state", run)


def load_state(
    model: RemoteModel, path: str, access_token: str | None, *, optimizer: bool
) -> Operation[LoadWeightsResponse]:
    """Load a saved state; with its optimizer, the client is noted to go on from it."""
    check_state("path", path)

    async def run(context: OperationContext) -> LoadWeightsResponse:
        from tinker.types import LoadWeightsResponse

        body = bodies.load_weights(model.id, path, optimizer=optimizer, access_token=access_token)
        payload = await _send(context, "load_weights", body)
        if optimizer:
            model.states.resumed(path)
        return LoadWeightsResponse(path=payload.get("path", path))

    return Operation(Role.LOAD, "load_state", run)


def load_adapter(model: RemoteModel, adapter_path: str) -> Operation[LoadWeightsResponse]:
    """Load the weights of an adapter that a trainer or peft wrote."""
    if not adapter_path.strip():
        raise InvalidArgument(
            f"adapter_path={adapter_path!r}: pass a model resource, a gs:// folder, or what the "
            "platform lets you load"
        )

    async def run(context: OperationContext) -> LoadWeightsResponse:
        from tinker.types import LoadWeightsResponse

        body = bodies.load_adapter(model.id, adapter_path)
        payload = await _send(context, "load_adapter", body)
        return LoadWeightsResponse(path=payload.get("adapter_path", adapter_path))

    return Operation(Role.LOAD, "load_adapter", run)


def save_weights_for_sampler(
    model: RemoteModel,
    name: str,
    *,
    chain: Chain,
    checkpoint_type: CheckpointType | None,
    export_precision: str | None = None,
    ttl_seconds: int | None = None,
    **refused: object,
) -> Operation[SaveWeightsForSamplerResponse]:
    """Save a snapshot that a deployment can load, named with the model's suffix.

    Args:
        chain: decides the type, unless the caller does, and notes what was written; on a Tinker
            server all snapshots are of one type.
    """
    tinker_only = model.session.tinker_only
    check_name("name", name)
    one_of("checkpoint_type", checkpoint_type, CHECKPOINT_TYPES)
    ttl_seconds = check_ttl(ttl_seconds)
    _refuse(**refused, **({"checkpoint_type": checkpoint_type} if tinker_only else {}))
    if not (tinker_only or model.capabilities.state_options):
        _refuse(ttl_seconds=ttl_seconds)
    if export_precision is not None and checkpoint_type != "merged_base":
        raise InvalidArgument("export_precision goes only with checkpoint_type='merged_base'")

    async def run(context: OperationContext) -> SaveWeightsForSamplerResponse:
        from fireworks_training._tinker_types import SaveWeightsForSamplerResponse

        async def save(kind: CheckpointType) -> Snapshot:
            body = bodies.save_weights_for_sampler(
                model.id,
                f"{name}-{model.suffix}",
                checkpoint_type=None if tinker_only else kind,
                export_precision=export_precision,
                ttl_seconds=ttl_seconds,
            )
            payload = await _send(context, "save_weights_for_sampler", body)
            return bodies.decode_snapshot(payload)

        if checkpoint_type == "merged_base":
            snapshot = await save(checkpoint_type)  # stands alone, and is no link of the chain
        else:
            # Chosen now, at this operation's turn: what came before it is on its way.
            asked = chain.take_next_type(checkpoint_type)
            try:
                snapshot = chain.saved(
                    await save(asked), asked, context.step, lambda: model.queue.line.steps
                )
            except BaseException:
                chain.failed()
                raise
        return SaveWeightsForSamplerResponse(path=snapshot.identity, snapshot=snapshot)

    return Operation(Role.SAVE, "save_weights_for_sampler", run)


def unload_model(model: RemoteModel) -> Operation[None]:
    """Free the trainer's memory."""
    body = bodies.unload_model(model.id)

    async def run(context: OperationContext) -> None:
        if not model.capabilities.step_protocol:  # to such a server it is none of the line
            request = bodies.WireRequest("unload_model", body)
            await context.send([Request(lambda _: request)])
        else:
            await _send(context, "unload_model", body)

    return Operation(Role.OTHER, "unload_model", run)


def _refuse(**options: object) -> None:
    """Refuse options of other servers that would have no effect here."""
    for name, value in options.items():
        if value is not None:
            raise NotSupported(
                f"{name}={value!r} is not supported: a trainer of this kind keeps what it saves, "
                "under names of its own; leave it out"
            )
