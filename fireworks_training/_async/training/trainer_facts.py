"""What the training client says of itself: names, and what its trainer can do."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fireworks_training._async.training.session import Capabilities, TrainerSession

if TYPE_CHECKING:
    from fireworks_training._async.training.passes import Passes


class TrainerFacts:
    """Properties of a model in training.

    `supports_...` is what the trainer said when it made the model: True, False, or None where it
    did not say.
    """

    _capabilities: Capabilities
    _session: TrainerSession
    _passes: Passes

    @property
    def model_id(self) -> str:
        """The trainer's name for the model."""
        return self._capabilities.model_id

    @property
    def session_id(self) -> str:
        """The trainer's name for the session."""
        return self._session.session_id

    @property
    def run_id(self) -> str | None:
        """The training run that the model belongs to, where its id names one (`run-...`)."""
        run, _, rest = self.model_id.partition(":train:")
        return run if rest and run.startswith("run-") else None

    @property
    def dialect(self) -> str:
        """ "json" or "protobuf": how passes are written."""
        return self._passes.dialect.name

    @property
    def comms(self) -> str:
        """ "v1" or "v2" of the JSON dialect."""
        return self._capabilities.comms

    @property
    def supports_router_replay(self) -> bool | None:
        """Whether the trainer can replay the routing of a mixture of experts; this client can't."""
        return self._capabilities.supports("router_replay")

    @property
    def supports_target_logprob_support(self) -> bool | None:
        """Whether the trainer takes the support of target logprobs."""
        return self._capabilities.supports("target_logprob_support")

    @property
    def supports_reinforce(self) -> bool | None:
        """Whether the trainer has the loss `reinforce`."""
        return self._capabilities.supports("reinforce")

    @property
    def supports_score_centering(self) -> bool | None:
        """Whether the trainer can center scores."""
        return self._capabilities.supports("score_centering")

    @property
    def supports_policy_importance_sampling(self) -> bool | None:
        """Whether the trainer can weight by the policy's importance."""
        return self._capabilities.supports("policy_importance_sampling")

    @property
    def supports_policy_diagnostics(self) -> bool | None:
        """Whether the trainer reports diagnostics of the policy."""
        return self._capabilities.supports("policy_diagnostics")

    @property
    def supports_rdma_weight_sync(self) -> bool:
        """False: this client brings weights live through the deployment's hot load."""
        return False
