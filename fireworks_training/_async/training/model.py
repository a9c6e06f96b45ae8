"""A model in a remote trainer: its session, its operation queue, and how its passes are written.

This is the inner face of a training client: the factory keeps it, the client stands in front of it
with the operations that users call. Knows nothing of arguments, snapshots or deployments.
"""

from __future__ import annotations

from functools import partial
from uuid import uuid4

from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._async.training.queue import OperationQueue
from fireworks_training._async.training.session import Capabilities, TrainerSession
from fireworks_training._core.operations import OperationLine
from fireworks_training._core.saved_states import SavedStates
from fireworks_training._wire.training.bodies import failing_pass
from fireworks_training.config import FiretitanProvisioningConfig


class RemoteModel:
    """One model in a trainer, from its making to the end of its client.

    Args:
        session: the session that the model was made in.
        capabilities: the trainer's answer to its making.
        config: what it was made from.
        owner: the service's loop.
        pipeline_steps: send an `optim_step` at once even where the server does not enforce steps.
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
                step_protocol=capabilities.step_protocol, pipeline_steps=pipeline_steps
            ),
            filler_request=partial(filler_pass, dialect, self.id),
            failing_request=partial(failing_pass, self.id),
            states=self.states,
            forward_only=forward_only,
            batch_polls=capabilities.batch_polls,
            parallel=session.client_config.parallel_chunks,
        )

    @property
    def id(self) -> str:
        """The trainer's name for the model."""
        return self.capabilities.model_id

    async def close(self, *, drain: bool) -> None:
        """Let accepted operations finish (or not), and accept no more."""
        await self.queue.close(drain=drain)
