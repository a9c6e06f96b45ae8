"""A model in training: runs one operation at a time on the torch thread.

Knows module, optimizer, state and snapshot stores, and what each operation does to them. Does not
know order, failure rules, wire formats or asyncio.

Every operation either completes or leaves weights, moments and accumulated gradients as they were;
the queue decides when the gradients of a failed step are dropped.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fireworks_training.local.model.model import (
    LoraSettings,
    SnapshotDtype,
    adapter_parameters,
    apply_lora,
    merged_base,
    round_parameters_,
)
from fireworks_training.local.model.optimizer import (
    AdamSettings,
    MasterAdamW,
    Moments,
    NoGradients,
    NonFinite,
)
from fireworks_training.local.store.deltas import Effort
from fireworks_training.local.store.expiry import set_expiry
from fireworks_training.local.store.snapshots import (
    LoraBlock,
    SnapshotError,
    SnapshotStore,
    written_or_gone,
)
from fireworks_training.local.store.tinker_store import (
    CheckpointNote,
    SamplerNote,
    TinkerStore,
    ephemeral_identity,
    expiry,
    now,
)
from fireworks_training.local.trainer.queue.operations import (
    Answer,
    Backward,
    Deferred,
    DiscardGradients,
    EmbeddingPass,
    LoadAdapter,
    LoadState,
    Operation,
    OperationFailed,
    OptimStep,
    Pass,
    PassOutputs,
    SaveSnapshot,
    SaveState,
    TinkerSave,
)
from fireworks_training.local.trainer.run.embeddings import (
    HEAD,
    embedding_metrics,
    new_head,
    run_embedding_pass,
)
from fireworks_training.local.trainer.run.exports import SnapshotExports
from fireworks_training.local.trainer.run.graphs import GraphCache
from fireworks_training.local.trainer.run.network import Network
from fireworks_training.local.trainer.run.passes import (
    ComputedPass,
    metrics_of,
    run_backward,
    run_pass,
)
from fireworks_training.local.trainer.run.states import StateInfo, StateStore


@dataclass(frozen=True, slots=True)
class Stores:
    """Holds the stores of a trainer's files, and the effort that makes its deltas small."""

    states: StateStore
    snapshots: SnapshotStore
    tinker: TinkerStore | None = None
    delta_effort: Effort = "fast"


class TrainedModel:
    """Trains one model: its module, its optimizer, its random stream.

    Args:
        module: a fresh module in fp32; changed in place from here on.
        stores: where its states and snapshots go.
        base_model: resource name, for manifests.
        lora: an adapter to train; None trains every parameter.
        dtype: precision of the values that passes compute with.
        trainable: False for a reference, which takes forward passes only.
        projection_head_dim: outputs of a projection head to train along; None has none.
        seed: seed of the model's own random stream.
    """

    def __init__(
        self,
        module: PreTrainedModel,
        stores: Stores,
        *,
        base_model: str,
        lora: LoraSettings | None,
        dtype: SnapshotDtype,
        trainable: bool = True,
        projection_head_dim: int | None = None,
        seed: int = 0,
    ) -> None:
        self._stores = stores
        self._base_model = base_model
        self._dtype: SnapshotDtype = dtype
        self._rng = torch.Generator().manual_seed(seed).get_state()
        self._adam: AdamSettings | None = None
        self._adapter = lora
        self._lora = None
        if lora is not None:
            round_parameters_(module, dtype)
            self._lora = apply_lora(module, lora)
        self._module = module
        self._network = Network(module)
        parameters = dict(module.named_parameters()) if lora is None else adapter_parameters(module)
        self._head = None
        if projection_head_dim is not None:
            self._head = new_head(int(module.config.hidden_size), projection_head_dim, seed).to(
                module.device
            )
            parameters |= {f"{HEAD}.{name}": p for name, p in self._head.named_parameters()}
        self._trainable = trainable
        self._graphs = GraphCache()
        self._backwards_by_forward = False
        self._optimizer = MasterAdamW(parameters, dtype)
        self._exports = SnapshotExports(
            stores.snapshots,
            base_model=base_model,
            dtype=dtype,
            lora=self._lora,
            effort=stores.delta_effort,
        )

    def execute(
        self, operation: Operation, *, drop_gradients: bool
    ) -> PassOutputs | Answer | Deferred:
        """Runs one operation, after dropping the accumulated gradients if `drop_gradients`.

        Raises:
            OperationFailed: for a reason that concerns the client.
            Exception: anything else is a fault of the trainer.
        """
        if drop_gradients:
            self._optimizer.drop_gradients()
        forward = isinstance(operation, Pass | EmbeddingPass) and not operation.backward
        if not self._trainable and not forward:
            raise OperationFailed(
                "this is a reference model: it takes forward passes only",
                error_class="ReferenceModel",
            )
        try:
            return self._execute(operation)
        except SnapshotError as error:
            raise OperationFailed.of(error) from error
        except (MemoryError, RuntimeError) as error:
            if not _of_memory(error):
                raise
            self._graphs.clear()
            raise OperationFailed(
                f"there was not enough memory for this operation; {_left_behind(operation)}. Send"
                " fewer or shorter datums at a time, close other clients, or train an adapter",
                category="server",
                error_class="OutOfMemory",
            ) from error

    def _execute(self, operation: Operation) -> PassOutputs | Answer | Deferred:
        match operation:
            case Pass():
                return self._pass(operation)
            case Backward():
                return self._backward(operation)
            case EmbeddingPass():
                return self._embedding_pass(operation)
            case OptimStep():
                return self._optim_step(operation)
            case DiscardGradients():
                self._optimizer.drop_gradients()
                return Answer({"discarded": True})
            case SaveState():
                return self._save_state(operation)
            case LoadState():
                return self._load_state(operation)
            case LoadAdapter():
                return self._load_adapter(operation)
            case SaveSnapshot():
                return self._save_snapshot(operation)

    @contextmanager
    def _own_randomness(self) -> Iterator[None]:
        """Draws random numbers inside from this model's stream, which its states carry along."""
        with torch.random.fork_rng(devices=[]):
            torch.set_rng_state(self._rng)
            yield
            self._rng = torch.get_rng_state()

    def _pass(self, operation: Pass) -> PassOutputs:
        optimizer = self._optimizer
        with self._own_randomness():
            keeping = self._backwards_by_forward and not operation.backward
            graphs = self._graphs if keeping else None
            passed = run_pass(self._network, optimizer.parameters, operation, graphs)
        self._accumulate(passed, len(operation.data))
        return PassOutputs(passed.outputs, metrics_of(passed, operation.data))

    def _backward(self, operation: Backward) -> PassOutputs:
        # From the first one on, forward passes keep their graphs: others need not pay for that.
        self._backwards_by_forward = True
        with self._own_randomness():
            passed, cached = run_backward(
                self._network, self._optimizer.parameters, operation, self._graphs
            )
        self._accumulate(passed, len(operation.forward.data))
        metrics = metrics_of(passed, operation.forward.data)
        return PassOutputs(passed.outputs, {**metrics, "backward_cached_tokens:sum": float(cached)})

    def _embedding_pass(self, operation: EmbeddingPass) -> PassOutputs:
        with self._own_randomness():
            passed = run_embedding_pass(
                self._network, self._head, self._optimizer.parameters, operation
            )
        self._accumulate(passed, len(operation.data))
        return PassOutputs(passed.outputs, embedding_metrics(passed, operation))

    def _accumulate(self, passed: ComputedPass, sequences: int) -> None:
        if passed.gradients is None:
            return
        try:
            self._optimizer.accumulate(
                passed.gradients, loss_tokens=passed.loss_tokens, sequences=sequences
            )
        except NonFinite as error:
            raise OperationFailed(f"{error}; nothing was added", error_class="NonFinite") from error

    def _optim_step(self, operation: OptimStep) -> Answer:
        self._graphs.clear()
        try:
            metrics = self._optimizer.step(operation.adam, operation.normalization)
        except NoGradients as error:
            raise OperationFailed(
                "optim_step has no gradients to apply: no forward_backward succeeded since the"
                " last optim_step, load or discard_gradients",
                error_class="NoGradients",
            ) from error
        except NonFinite as error:
            raise OperationFailed(
                f"{error}; the weights are unchanged and the gradients are dropped",
                error_class="NonFinite",
            ) from error
        self._adam = operation.adam
        return Answer({"metrics": metrics})

    # -- states ----------------------------------------------------------------------------------

    def _save_state(self, operation: SaveState) -> Answer:
        first, second = self._optimizer.moments()
        tensors = {
            **_prefixed("master.", self._optimizer.masters),
            **_prefixed("exp_avg.", first),
            **_prefixed("exp_avg_sq.", second),
            "rng": self._rng,
        }
        info = StateInfo(
            base_model=self._base_model,
            lora=self._lora,
            snapshot_dtype=self._dtype,
            optimizer_steps=self._optimizer.steps,
            adam=self._adam,
            adapter=self._adapter,
            projection_head_dim=None if self._head is None else self._head.out_features,
        )
        states = self._stores.states
        states.remove_expired()
        taken = states.has(operation.name) and self._is_noted(operation.tinker)
        if taken and not operation.overwrite:
            raise OperationFailed(
                f"there is a state {operation.name!r} already; pass overwrite=True to replace it,"
                " or choose another name",
                error_class="StateExists",
            )
        states.save(operation.name, info, tensors, operation.ttl_seconds)
        path = operation.name
        if operation.tinker is not None:
            size = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
            path = self._note(operation.tinker, size) or path
        answer = {"path": path, "type": "save_weights"}
        return Answer({**answer, "replaced": True} if taken else answer)

    def _is_noted(self, saved: TinkerSave | None) -> bool:
        """Tells whether a client knows of a state: one without its note is unknown, since its save
        failed, or its process ended, in between."""
        store = self._stores.tinker
        if store is None or saved is None or saved.checkpoint is None:
            return True
        return store.checkpoint(saved.checkpoint) is not None

    def _note(self, saved: TinkerSave, size: int) -> str | None:
        """Writes the note of a checkpoint of the Tinker API; returns the checkpoint's path."""
        store = self._stores.tinker
        if store is None:
            return None
        if saved.sampling_session is not None:
            run = store.run(saved.run)
            named = self._base_model if run is None else run.base_model
            identity = ephemeral_identity(saved.sampling_session)
            store.write_sampler(SamplerNote(saved.sampling_session, named, identity))
        if saved.checkpoint is None:
            return None
        note = CheckpointNote(
            saved.checkpoint.path,
            size,
            now().isoformat(),
            expiry(saved.ttl_seconds),
            saved.user_metadata,
        )
        with written_or_gone(f"the note of {note.path}"):
            store.write_checkpoint(note)
        return note.path

    def _load_state(self, operation: LoadState) -> Answer:
        info, tensors = self._stores.states.load(operation.name, operation.job)
        masters = _with_prefix("master.", tensors)
        own = self._optimizer.masters
        self._check_fits(
            f"state {operation.name!r}", "was saved with", info.lora, info.base_model, own, masters
        )
        moments = None
        if operation.optimizer:
            moments = _with_prefix("exp_avg.", tensors), _with_prefix("exp_avg_sq.", tensors)
            self._check_complete(operation.name, info, moments, tensors.get("rng"))
        self._restore(masters, moments, info.optimizer_steps)
        if operation.optimizer:
            self._rng, self._adam = tensors["rng"], info.adam
        return Answer({"path": operation.path or operation.name, "type": "load_weights"})

    def _check_complete(
        self,
        name: str,
        info: StateInfo,
        moments: Moments,
        rng: Tensor | None,
    ) -> None:
        """Checks the optimizer's part of a state, before anything is changed."""
        own = _shapes(self._optimizer.masters if info.optimizer_steps else {})
        fits = rng is not None and (rng.dtype, rng.shape) == (self._rng.dtype, self._rng.shape)
        if [_shapes(moment) for moment in moments] != [own, own] or not fits:
            raise OperationFailed(
                f"state {name!r} is damaged: it lacks moments of the optimizer, or the random"
                " stream; load_state takes its weights alone",
                error_class="StateDamaged",
            )

    def _restore(
        self,
        masters: Mapping[str, Tensor],
        moments: Moments | None,
        steps: int,
    ) -> None:
        self._graphs.clear()
        self._optimizer.restore(masters, moments, steps)

    def _load_adapter(self, operation: LoadAdapter) -> Answer:
        manifest, tensors = self._stores.snapshots.load(operation.identity)
        what, own = f"snapshot {operation.identity!r}", self._served_masters()
        self._check_fits(what, "holds", manifest.lora, manifest.base_model, own, tensors)
        given = {name: tensor.float() for name, tensor in tensors.items()}
        self._restore({**self._optimizer.masters, **given}, None, 0)
        return Answer({"adapter_path": operation.path, "type": "load_adapter"})

    def _check_fits(
        self,
        what: str,
        holds: str,
        lora: LoraBlock | None,
        base_model: str,
        own: Mapping[str, Tensor],
        given: Mapping[str, Tensor],
    ) -> None:
        """Checks that weights to load are of this model; `what` and `holds` are for the message."""
        if lora != self._lora:
            raise OperationFailed(
                f"{what} {holds} {_described(lora)}, and this model trains"
                f" {_described(self._lora)}",
                error_class="StateMismatch",
            )
        if _shapes(own) != _shapes(given):
            raise OperationFailed(
                f"{what} is of another model ({base_model}): names or shapes of its tensors differ",
                error_class="StateMismatch",
            )

    # -- snapshots -------------------------------------------------------------------------------

    def _save_snapshot(self, operation: SaveSnapshot) -> Deferred:
        weights = self._served_masters()
        if operation.checkpoint_type == "merged_base":
            assert self._lora is not None, "refused where it was decoded"
            weights = merged_base(self._module, self._lora)
        exports, kind = self._exports, operation.checkpoint_type
        tensors = exports.capture(operation.name, weights)
        if operation.tinker is None:
            return Deferred(
                lambda: self._with_time(exports.write(operation.name, tensors, kind), operation)
            )
        saved = operation.tinker
        if self._stores.snapshots.path(operation.name).exists():
            raise OperationFailed(
                "there is a sampler checkpoint of that name already: choose another, or delete it",
                error_class="SnapshotExists",
            )
        return Deferred(lambda: self._add_path(saved, exports.write(operation.name, tensors, kind)))

    def _with_time(self, answer: Answer, operation: SaveSnapshot) -> Answer:
        """Notes after how long a snapshot that was just written may be removed."""
        if operation.ttl_seconds is not None:
            written = cast("Mapping[str, str]", answer.fields["snapshot"])
            folder = self._stores.snapshots.path(written["identity"])
            set_expiry(folder, operation.ttl_seconds)
        return answer

    def _served_masters(self) -> dict[str, Tensor]:
        """Returns the masters but for those of the projection head, which is never served."""
        masters = self._optimizer.masters.items()
        return {name: master for name, master in masters if not name.startswith(f"{HEAD}.")}

    def _add_path(self, saved: TinkerSave, answer: Answer) -> Answer:
        """Adds the checkpoint's path to the answer about a snapshot, for the Tinker API."""
        written = cast("Mapping[str, int]", answer.fields["snapshot"])
        path = self._note(saved, written["bytes"])
        names = {"path": path, "sampling_session_id": saved.sampling_session}
        return Answer({**answer.fields, **names})


def _left_behind(operation: Operation) -> str:
    """Describes the model after an operation was cut off; a pass adds its gradients at its end."""
    if isinstance(operation, OptimStep):
        return "its gradients are dropped; load a saved state if the weights must be certain"
    if isinstance(operation, LoadState):
        return "the model may be loaded in part: load again before going on"
    return "the model is as it was"


def _of_memory(error: Exception) -> bool:
    """Tells whether memory was missing: torch has a type for that only on an accelerator."""
    known = isinstance(error, (MemoryError, torch.OutOfMemoryError))
    return known or "can't allocate memory" in str(error)


def _prefixed(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def _with_prefix(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor
        for name, tensor in tensors.items()
        if name.startswith(prefix)
    }


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def _described(lora: object) -> str:
    return f"the adapter ({lora})" if lora is not None else "every parameter, without an adapter"
