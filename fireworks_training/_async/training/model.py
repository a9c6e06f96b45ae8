"""A model in a remote trainer: its session, its operation queue, and how its passes are written.

This is the inner face of a training client: the factory keeps it, the client stands in front of it
with the operations that users call. Knows nothing of arguments, snapshots or deployments.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from functools import partial
from uuid import uuid4

from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._async.training.queue import OperationQueue
from fireworks_training._async.training.session import Capabilities, TrainerSession
from fireworks_training._core.operations import OperationLine
from fireworks_training._core.saved_states import SavedStates
from fireworks_training._wire.training.bodies import failing_pass
from fireworks_training.config import FiretitanProvisioningConfig
from fireworks_training.errors import InvalidArgument


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """The options of a model; None leaves one to the service's configuration."""

    base_model: str | None = None
    lora_rank: int | None = None
    lora_alpha: int | None = None
    seed: int | None = None
    train_mlp: bool | None = None
    train_attn: bool | None = None
    train_unembed: bool | None = None

    def given(self) -> dict[str, object]:
        """The options that are not left to the service."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def configured(
    config: FiretitanProvisioningConfig, options: ModelOptions
) -> FiretitanProvisioningConfig:
    """Make the configuration of one model.

    Raises:
        InvalidArgument: an option contradicts what the service was made for.
    """
    given = options.given()
    if config.max_lora_rank is None:
        for name, value in given.items():
            mine = config.alpha if name == "lora_alpha" else getattr(config, name)
            if value != mine:
                raise InvalidArgument(
                    f"{name}={value!r}, but the service was made for {mine!r}: give it to "
                    "from_firetitan_config, or make another service for another model"
                )
        return config
    if given.get("base_model", config.base_model) != config.base_model:
        raise InvalidArgument(
            f"base_model={options.base_model!r}, but the service's trainer holds "
            f"{config.base_model!r}: make another service for another model"
        )
    rank = options.lora_rank
    if rank is None or not 1 <= rank <= config.max_lora_rank:
        raise InvalidArgument(
            f"lora_rank={rank!r}: with max_lora_rank each model needs a rank from 1 to "
            f"{config.max_lora_rank}"
        )
    single = replace(config, max_lora_rank=None, lora_rank=rank)
    return replace(single, **given)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]


class RemoteModel:
    """One model in a trainer, from its making to the end of its client.

    Args:
        session: the session that the model was made in.
        capabilities: the trainer's answer to its making.
        config: what it was made from.
        owner: the service's loop.
        pipeline_steps: send an `optim_step` at once even where the server does not enforce steps.
        accept_partial: apply what the server holds even where that is in doubt.
        forward_only: its weights stay as they are.

    Attributes:
        passes: encodes and sends its passes.
        states: the states that were saved of it.
        suffix: what is added to the names of its snapshots, so that runs do not meet.
        queue: carries out its operations.
    """

    def __init__(
        self,
        session: TrainerSession,
        capabilities: Capabilities,
        config: FiretitanProvisioningConfig,
        *,
        owner: OwnerLoop,
        pipeline_steps: bool = False,
        accept_partial: bool = False,
        forward_only: bool = False,
    ) -> None:
        # Imported here, since they load numpy, which a service that only samples does without.
        from fireworks_training._async.training.passes import Passes
        from fireworks_training._wire.training.dialects import choose, filler_pass

        self.session = session
        self.capabilities = capabilities
        self.config = config
        self.owner = owner
        self.forward_only = forward_only
        dialect = choose(
            config.dialect,
            wire=capabilities.wire,
            comms=capabilities.comms,
            zstd=session.client_config.compress,
            json_alone=not session.tinker_only,
        )
        self.passes = Passes(
            self.id,
            dialect,
            backward=capabilities.backward,
            # A server of the Tinker contract alone lists no inputs but those of each loss.
            masks=bool(capabilities.wire) or dialect.name == "json",
            usage=session.plane.usage,
            limits=session.client_config,
        )
        self.states = SavedStates()
        self.suffix = uuid4().hex[:8]
        self.queue = OperationQueue(
            session.plane,
            owner=owner,
            model_id=self.id,
            line=OperationLine(
                step_protocol=capabilities.step_protocol,
                pipeline_steps=pipeline_steps,
                accept_partial=accept_partial,
            ),
            filler_request=partial(filler_pass, dialect, self.id),
            failing_request=partial(failing_pass, self.id),
            states=self.states,
            gone=session.gone,
            look=session.look,
            forward_only=forward_only,
            batch_polls=capabilities.batch_polls,
            parallel=session.client_config.parallel_chunks,
        )

    @property
    def id(self) -> str:
        """The trainer's name for the model."""
        return self.capabilities.model_id

    def freeze(self) -> None:
        """Keep the weights as they are from now on: a reference that was just loaded."""
        self.forward_only = True
        self.queue.freeze()

    async def close(self, *, drain: bool) -> None:
        """Let accepted operations finish (or not), and accept no more."""
        await self.queue.close(drain=drain)
