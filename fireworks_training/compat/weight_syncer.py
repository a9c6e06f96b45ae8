"""`WeightSyncer`: saves a training client's weights and loads them into a deployment.

Keeps the chain of base and delta snapshots for callers who drive a deployment by hand; a service
keeps and checks its own (`create_deployment_sampler(model_path=...)`). Whether a snapshot is to be
a base or a delta is decided in `_core/snapshots.py`.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, cast

from fireworks_training._async.sampling.sampler import DeploymentSampler
from fireworks_training._async.sampling.sampling_client import FiretitanSamplingClient
from fireworks_training._async.weights.hot_load_requests import DELTA_COMPRESSION, difference_to
from fireworks_training._core.snapshots import choose_type
from fireworks_training.compat.deployment import DeploymentManager
from fireworks_training.errors import (
    ApiError,
    FireworksTrainingError,
    HotLoadFailed,
    InvalidArgument,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("fireworks_training.compat")

HOT_LOAD_TIMEOUT_S = 600
MANAGER_TIMEOUT_S = 300


class SavedSnapshot(Protocol):
    """The result of a save, as far as it is needed here."""

    @property
    def snapshot_name(self) -> str: ...


class SavesSnapshots(Protocol):
    """A training client, as far as it is needed here."""

    def save_weights_for_sampler_ext(
        self, name: str, checkpoint_type: Any = None
    ) -> SavedSnapshot: ...


@dataclass
class WeightSyncer:
    """Saves weights and loads them, one snapshot after the other.

    Attributes:
        policy_client: a blocking training client.
        deploy_mgr, deployment_id: the deployment to load into; without them it only saves.
        base_model: full name, for routing.
        hotload_timeout: seconds for every replica to report a snapshot.
        first_checkpoint_type: type of the first snapshot, "base" or "delta"; the later ones are
            deltas.
        lora_rank: rank of the adapter; above 0, every snapshot is a whole adapter.
        warmup_after_hotload, warmup_max_retries: whether and how often to ask for four tokens once
            a snapshot is loaded.
        reset_prompt_cache: drop the caches of the prompts, which the old weights made.
        base_saved: whether a snapshot was saved, so that the next may be a delta.
        base_identity: the snapshot that this object loaded last.
        last_timing: seconds of the last call: `save_time_s`, `hotload_time_s`, `warmup_time_s`,
            `total_time_s`.
    """

    policy_client: SavesSnapshots
    deploy_mgr: DeploymentManager | None = None
    deployment_id: str | None = None
    base_model: str = ""
    hotload_timeout: int = HOT_LOAD_TIMEOUT_S
    first_checkpoint_type: str = "base"
    compression_format: str = DELTA_COMPRESSION
    warmup_after_hotload: bool = True
    warmup_max_retries: int = 10
    reset_prompt_cache: bool = True
    lora_rank: int = 0
    base_saved: bool = field(default=False, init=False)
    base_identity: str | None = field(default=None, init=False)
    last_timing: dict[str, float] = field(default_factory=dict[str, float], init=False)
    _looked: bool = field(default=False, init=False, repr=False)

    def check_deployment_state(self) -> str | None:
        """Look up the snapshot that the deployment holds; None if none, or if it can't be asked."""
        target = self._target()
        if target is None:
            return None
        manager, deployment_id = target
        try:
            status = manager.hotload_check_status(deployment_id, self.base_model)
        except ApiError as error:
            logger.warning("the state of %s can't be read: %s", deployment_id, error)
            return None
        replicas = cast(list[dict[str, Any]], status.get("replicas") or [])
        return replicas[0].get("current_snapshot_identity") if replicas else None

    def reset_delta_chain(self) -> None:
        """Make the next save a base, as after the deployment was pointed at another trainer."""
        self.base_saved = False
        self.base_identity = None

    def wait_for_hotload_ready(
        self, timeout_s: int = MANAGER_TIMEOUT_S, poll_interval_s: int = 5
    ) -> None:
        """Wait until the deployment lists its replicas: before that it takes no hot load.

        Raises:
            HotLoadTimeout: the deployment listed none in time.
        """
        target = self._target()
        if target is None:
            return
        manager, deployment_id = target
        manager.wait_for_hotload_manager(deployment_id, self.base_model, timeout_s, poll_interval_s)

    # -- saving and loading ------------------------------------------------------------------------

    def save_only(self, name: str, checkpoint_type: str | None = None) -> str | None:
        """Save a snapshot without loading it; its name, or None if that failed (logged)."""
        self.last_timing = {}
        try:
            return self._save(name, checkpoint_type or self._next_type())
        except FireworksTrainingError as error:
            logger.warning("%s was not saved: %s", name, error)
            return None

    def hotload(self, snapshot_name: str, checkpoint_type: str) -> bool:
        """Load a snapshot that `save_only` saved; False if that failed (logged).

        Args:
            checkpoint_type: the type that it was saved with.
        """
        self.last_timing = {}
        if self._target() is None:
            return False
        try:
            self._load(snapshot_name, checkpoint_type)
        except FireworksTrainingError as error:
            logger.warning("%s was not loaded: %s", snapshot_name, error)
            return False
        return True

    def save_and_hotload(self, name: str, checkpoint_type: str | None = None) -> str | None:
        """Save a snapshot, load it, and wait until every replica serves it; the snapshot's name.

        Raises:
            FireworksTrainingError: the save or the load failed.
        """
        self.last_timing = {}
        kind = checkpoint_type or self._next_type()
        with self._timed("total_time_s"):
            snapshot = self._save(name, kind)
            if self._target() is not None:
                self._load(snapshot, kind)
        return snapshot

    # -- sampling ----------------------------------------------------------------------------------

    def get_deployment_sampler(
        self, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> DeploymentSampler:
        """Make a sampler of the deployment, to be closed by the caller."""
        manager, _ = self._needed_target()
        return DeploymentSampler(
            manager.inference_url,
            self._model(),
            manager.api_key,
            tokenizer,
            additional_headers=manager.additional_headers,
        )

    def get_sampling_client(
        self, tokenizer: PreTrainedTokenizerBase | None = None
    ) -> FiretitanSamplingClient:
        """Make a Tinker-shaped client of the deployment, to be closed by the caller."""
        return FiretitanSamplingClient(self.get_deployment_sampler(tokenizer))

    # -- parts -------------------------------------------------------------------------------------

    def _target(self) -> tuple[DeploymentManager, str] | None:
        if self.deploy_mgr is None or self.deployment_id is None:
            return None
        return self.deploy_mgr, self.deployment_id

    def _needed_target(self) -> tuple[DeploymentManager, str]:
        target = self._target()
        if target is None:
            raise InvalidArgument("this WeightSyncer has no deploy_mgr and deployment_id")
        return target

    def _model(self) -> str:
        manager, deployment_id = self._needed_target()
        return f"accounts/{manager.account_id}/deployments/{deployment_id}"

    def _next_type(self) -> str:
        follows = self.base_saved or self.first_checkpoint_type == "delta"
        return choose_type(whole_only=self.lora_rank > 0, follows=follows)

    def _save(self, name: str, kind: str) -> str:
        with self._timed("save_time_s"):
            saved = self.policy_client.save_weights_for_sampler_ext(name, checkpoint_type=kind)
        self.base_saved = True
        return saved.snapshot_name

    def _load(self, snapshot: str, kind: str) -> None:
        manager, deployment_id = self._needed_target()
        self._look_once()
        difference: dict[str, Any] | None = None
        if kind == "delta" and self.lora_rank == 0 and self.base_identity is not None:
            difference = difference_to(self.base_identity, self.compression_format)
        with self._timed("hotload_time_s"):
            loaded = manager.hotload_and_wait(
                deployment_id,
                self.base_model,
                snapshot,
                difference,
                self.reset_prompt_cache,
                self.hotload_timeout,
            )
        if not loaded:
            reason = manager.last_hotload_error_message or f"{snapshot} was not loaded"
            raise HotLoadFailed(reason, identity=snapshot, replicas={})
        self.base_identity = snapshot
        with self._timed("warmup_time_s"):
            if self.warmup_after_hotload:
                manager.warmup(self._model(), self.warmup_max_retries)

    def _look_once(self) -> None:
        """Before the first load, make it a full one if somebody else loaded the deployment."""
        if not self._looked:
            self.wait_for_hotload_ready()
            if self.check_deployment_state() is not None:
                self.base_identity = None
            self._looked = True

    @contextmanager
    def _timed(self, name: str) -> Generator[None]:
        started = time.monotonic()
        try:
            yield
        finally:
            self.last_timing[name] = time.monotonic() - started
