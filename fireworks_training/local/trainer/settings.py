"""The settings that a trainer worker starts with. Knows names and types, nothing else."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field


class TrainerSettings(BaseModel):
    """Holds the settings of one trainer job's worker.

    Attributes:
        socket: Unix socket to serve on.
        job: id of the job; names the writer of its snapshots.
        base_model: resource name of the model, for answers and manifests.
        model_path: Hugging Face directory to start from.
        states_dir: `<jobs>/<job>/states`; sibling jobs lie beside it.
        snapshots_dir: shared by all jobs of the platform.
        tinker_dir: folder of the notes about runs and checkpoints of the Tinker API, where the
            job's models are such runs; None for every other job.
        lora_rank: 0 trains every parameter; else the models of this job are adapters of rank 1 to
            this.
        forward_only: the job's models are not trained, so that less memory is needed.
        snapshot_dtype: precision of the values that trainer and engine compute with.
        max_context_length: tokens that a sequence may have.
        delta_compression: "fast", or "small" for fewer bytes at many times the time.
        seed: seed of adapters whose request has none.
        session_timeout_s: a session without a request for so long is ended, with its models.
        max_models: models that are loaded at a time; None = as many as memory holds, up to 64.
        atomic_steps: whether a failed operation takes the rest of its step with it; a trainer that
            stands in for a cloud's does without.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=())

    socket: Path
    job: str
    base_model: str
    model_path: Path
    states_dir: Path
    snapshots_dir: Path
    tinker_dir: Path | None = None
    lora_rank: int = Field(default=0, ge=0)
    forward_only: bool = False
    snapshot_dtype: Literal["bfloat16", "float32"] = "bfloat16"
    delta_compression: Literal["fast", "small"] = "fast"
    max_context_length: int = Field(ge=1)
    seed: int = 0
    session_timeout_s: float = Field(default=300.0, gt=0)
    max_models: int | None = Field(default=None, ge=1)
    atomic_steps: bool = True
