"""The model factory: checks a create_model request, and makes a model in training of it.

Knows what a client may ask for and what the job allows. Does not know HTTP or queues.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import asdict, dataclass

from transformers import PreTrainedModel

from fireworks_training.local.model import memory
from fireworks_training.local.model.model import (
    LoraNotPossible,
    LoraSettings,
    load_model,
    vocab_size,
)
from fireworks_training.local.store.snapshots import FreeBytes, SnapshotStore
from fireworks_training.local.store.tinker_store import RunNote, TinkerStore
from fireworks_training.local.trainer.queue.operations import LoadState, OperationFailed
from fireworks_training.local.trainer.run.execution import Stores, TrainedModel
from fireworks_training.local.trainer.run.hosted import CreateModel
from fireworks_training.local.trainer.run.network import activation_bytes
from fireworks_training.local.trainer.run.states import StateStore
from fireworks_training.local.trainer.settings import TrainerSettings
from fireworks_training.local.trainer.wire.datums import ModelLimits
from fireworks_training.local.trainer.wire.json_codec import digest_of
from fireworks_training.local.trainer.wire.json_fields import Body, allow, flag, number, text, whole
from fireworks_training.local.trainer.wire.json_states import tinker_load

CAPABILITIES: Mapping[str, object] = {
    "type": "create_model",
    "wire": ["json", "protobuf"],
    "comms": "v2",
    "step_protocol": 1,
    "snapshot_protocol": 1,
    "state_options": 1,
    "supports_backward": True,
    # Official clients send passes of these kinds only to a trainer that declares them.
    "supports_reinforce": True,
    "supports_score_centering": False,
    "supports_policy_importance_sampling": False,
    "supports_policy_diagnostics": False,
    "supports_target_logprob_support": False,
    "supports_router_replay": False,
    # Polls for all results of a model at once: `local.results`.
    "retrieve_futures": 1,
}
_CREATE_KEYS = (
    "session_id",
    "model_seq_id",
    "base_model",
    "lora_config",
    "user_metadata",
    "optimizer_config",
    "base_only",
    "projection_head_dim",
    "type",
)
_LOAD_KEYS = (
    "session_id",
    "model_seq_id",
    "base_model",
    "user_metadata",
    "optimizer_config",
    "path",
    "optimizer",
    "type",
)
_LORA_KEYS = ("rank", "alpha", "seed", "train_mlp", "train_attn", "train_unembed", "init_method")
_DEFAULT_ALPHA = 32.0
MAX_HEAD_DIM = 4096

BASE_BYTES = 4
"""Memory of a parameter of the base, in fp32, of which every model of the job is a copy."""

MODEL_BYTES = {"full": 20, "adapter": 4, "reference": 8}
"""Memory of a parameter of each model: its fp32 value; where all are trained, also master, gradient
and both moments; in a reference, also the master. An adapter's share of these is small. Activations
come on top."""


@dataclass(frozen=True, slots=True)
class Blueprint:
    """Describes a model to make: its adapter, its projection head, and its first state, if any."""

    lora: LoraSettings | None
    head: int | None
    reference: bool
    load: LoadState | None = None


class ModelFactory:
    """Makes models from the job's base model, which it loads: construct it on the torch thread.

    Args:
        free_bytes: how to measure free space on disk (a fake in tests).

    Raises:
        NotEnoughMemory: the base and one model would not fit; nothing was loaded.
    """

    def __init__(self, settings: TrainerSettings, free_bytes: FreeBytes) -> None:
        self.settings = settings
        self._parameters = memory.parameter_count(settings.model_path)
        kind = "adapter" if settings.lora_rank else "full"
        self._check_memory("reference" if settings.forward_only else kind, BASE_BYTES)
        self._base = load_model(settings.model_path)
        self.vocab_size = vocab_size(self._base)
        self.architecture = str(self._base.config.model_type)
        self._hidden_size = int(self._base.config.hidden_size)
        self.stores = Stores(
            StateStore(settings.states_dir, free_bytes=free_bytes),
            SnapshotStore(settings.snapshots_dir, writer=settings.job, free_bytes=free_bytes),
            None if settings.tinker_dir is None else TinkerStore(settings.tinker_dir),
            settings.delta_compression,
        )
        self.stores.states.clean()
        self.stores.snapshots.clean()

    def request(self, body: Body) -> CreateModel:
        """Checks a create_model request.

        Raises:
            OperationFailed: it asks for something this job does not offer.
        """
        allow(body, _CREATE_KEYS, "create_model")
        _check_optimizer(body)
        reference = flag(body, "base_only", False)
        lora = None if reference else self._lora(body.get("lora_config"))
        head = whole(body, "projection_head_dim", 0) or None
        if head is not None and (reference or head > MAX_HEAD_DIM):
            raise OperationFailed(
                f"projection_head_dim must be from 1 to {MAX_HEAD_DIM}, of a model that is trained"
            )
        return self._wanted(body, Blueprint(lora, head, reference), CAPABILITIES)

    def request_from_state(self, body: Body) -> CreateModel:
        """Checks a request for a model that is made from a state of the Tinker API.

        Raises:
            OperationFailed: there is no such state, or it does not fit this job.
        """
        allow(body, _LOAD_KEYS, "load_weights")
        _check_optimizer(body)
        if self.stores.tinker is None:
            raise OperationFailed(
                "this trainer makes models by create_model; load a state into one by its model_id"
            )
        path = text(body, "path")
        load = tinker_load(path, flag(body, "optimizer", False))
        info = self.stores.states.info(load.name)
        lora = info.adapter
        if lora is not None:
            self._check_rank(lora.rank)
        answer = {**CAPABILITIES, "type": "load_weights", "path": path}
        return self._wanted(body, Blueprint(lora, info.projection_head_dim, False, load), answer)

    def _wanted(
        self, body: Body, blueprint: Blueprint, answer: Mapping[str, object]
    ) -> CreateModel:
        run = None
        if self.stores.tinker is not None:
            run = f"{body.get('session_id')}:train:{body.get('model_seq_id')}"
        # A run has the name that its client chose; all models of a job have the job's.
        named = body.get("base_model") if run is not None else None
        base_model = named if isinstance(named, str) else self.settings.base_model
        metadata = body.get("user_metadata")

        def make() -> TrainedModel:
            model = self._make(blueprint)
            if run is not None and self.stores.tinker is not None:
                lora = None if blueprint.lora is None else asdict(blueprint.lora)
                noted = metadata if isinstance(metadata, dict) else None
                self.stores.tinker.write_run(RunNote(run, base_model, lora, noted))
            return model

        return CreateModel(
            digest_of("create_model", body),
            answer,
            make,
            ModelLimits(
                self.vocab_size,
                self.settings.max_context_length,
                lora=blueprint.lora is not None,
                hidden_size=self._hidden_size,
                projection_head_dim=blueprint.head,
                tinker_run=run,
            ),
            blueprint.lora,
            base_model,
        )

    def _lora(self, config: object) -> LoraSettings | None:
        rank = 0
        if isinstance(config, dict):
            allow(config, _LORA_KEYS, "lora_config")
            rank = whole(config, "rank", 0)
        elif config is not None:
            raise OperationFailed("lora_config must be an object")
        self._check_rank(rank)
        if rank == 0 or not isinstance(config, dict):
            return None
        if config.get("init_method") not in (None, "kaiming"):
            raise OperationFailed("init_method must be kaiming; others are not yet supported")
        return LoraSettings(
            rank=rank,
            alpha=number(config, "alpha", _DEFAULT_ALPHA),
            train_mlp=flag(config, "train_mlp", True),
            train_attn=flag(config, "train_attn", True),
            train_unembed=flag(config, "train_unembed", True),
            seed=whole(config, "seed", self.settings.seed),
        )

    def _check_rank(self, rank: int) -> None:
        most = self.settings.lora_rank
        if not min(most, 1) <= rank <= most:
            takes = f"adapters of rank 1 to {most}" if most else "full-parameter models (rank 0)"
            raise OperationFailed(
                f"this trainer job was created with lora_rank={most}: it takes {takes}, and this"
                f" model asks for rank {rank}; use another job"
            )

    def _check_memory(self, kind: str, base_bytes: int = 0) -> None:
        memory.check_memory(
            self.settings.model_path,
            MODEL_BYTES[kind] + base_bytes,
            activation_bytes(self._parameters),
            memory.free_bytes(),
            {
                "full": "a trainer of all parameters",
                "adapter": "a trainer of an adapter",
                "reference": "a reference",
            }[kind],
            parameters=self._parameters,
        )

    def fits(self, more: int) -> bool:
        """Return whether memory holds so many models more, of the kind that this job trains."""
        kind = "adapter" if self.settings.lora_rank else "full"
        kind = "reference" if self.settings.forward_only else kind
        return more <= 0 or memory.fits(
            self._parameters * MODEL_BYTES[kind] * more + activation_bytes(self._parameters),
            memory.free_bytes(),
        )

    def _make(self, blueprint: Blueprint) -> TrainedModel:
        kind = "reference" if blueprint.reference or self.settings.forward_only else "full"
        try:
            self._check_memory("adapter" if blueprint.lora is not None else kind)
        except memory.NotEnoughMemory as error:
            raise OperationFailed(str(error)) from error
        module: PreTrainedModel = copy.deepcopy(self._base)
        try:
            model = TrainedModel(
                module,
                self.stores,
                base_model=self.settings.base_model,
                lora=blueprint.lora,
                dtype=self.settings.snapshot_dtype,
                trainable=not blueprint.reference,
                projection_head_dim=blueprint.head,
                seed=self.settings.seed,
            )
        except LoraNotPossible as error:
            raise OperationFailed(str(error)) from error
        if blueprint.load is not None:
            model.execute(blueprint.load, drop_gradients=False)
        return model


def _check_optimizer(body: Body) -> None:
    optimizer = body.get("optimizer_config")
    if optimizer is not None and (
        not isinstance(optimizer, dict) or optimizer.get("type", "adamw") != "adamw"
    ):
        raise OperationFailed("optimizer_config must be of type adamw")
