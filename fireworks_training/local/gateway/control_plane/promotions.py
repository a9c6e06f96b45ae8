"""Promotion: a sampler snapshot becomes a model of the account, by way of an operation.

Knows which checkpoints can become models, and the rows of the models and operations that come of
it; the weights are written by a process of its own (`local.promotion`). A promotion that a gateway
did not see to its end is taken up by the next one: its result appears whole, or not at all.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
import shutil
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import cast

from fireworks_training.local.gateway.control_plane.checkpoints import find_snapshot
from fireworks_training.local.gateway.inference.registry import (
    ModelEntry,
    ServingRegistry,
    UnknownModel,
)
from fireworks_training.local.gateway.web.problems import HttpProblem
from fireworks_training.local.model.promotion import Order
from fireworks_training.local.settings import ACCOUNT, MODEL_PREFIX, is_resource_id
from fireworks_training.local.store.database import AlreadyExists, Body, Database, ResourceRow

log = logging.getLogger(__name__)

RUNNING, DONE, FAILED = "RUNNING", "DONE", "FAILED"
BUDGET_S = 600.0

MakeModel = Callable[[Order], Awaitable[str]]
"""Carries out an order; returns why it failed, or an empty string."""


class Promotions:
    """All promotions, and the models that came of them.

    Args:
        make_model: carries out an order.
    """

    def __init__(
        self, database: Database, registry: ServingRegistry, state_dir: Path, make_model: MakeModel
    ) -> None:
        self._database = database
        self._registry = registry
        self._snapshots_dir = state_dir / "snapshots"
        self._models_dir = state_dir / "models"
        self._make_model = make_model
        self._running: dict[str, asyncio.Task[None]] = {}

    # -- promoting -------------------------------------------------------------------------------

    def start(self, job: str, checkpoint: str, body: Mapping[str, object]) -> ResourceRow:
        """Begin a promotion; returns its operation.

        Args:
            job: id of the trainer job whose checkpoint it is.
            checkpoint: its identity.
            body: `output_model` and `base_model`, in either spelling.

        Raises:
            Problem: 404, 409 or 400; nothing was begun.
        """
        manifest = find_snapshot(job, checkpoint, self._snapshots_dir)
        base = self._base_model(_text(body, "base_model", "baseModel"), manifest)
        model_id = _output_id(_text(body, "output_model", "outputModel"))
        self._reserve(model_id, base, manifest)
        number = self._database.next_number("operations")
        row = ResourceRow(
            "operation",
            f"promote-{number}",
            RUNNING,
            f"making {MODEL_PREFIX}{model_id} of {checkpoint}",
            {"model": model_id, "identity": checkpoint, "base": base.name},
        )
        self._database.create(row)
        self._begin(row)
        return row

    async def finished(self, id_: str) -> ResourceRow:
        """An operation once it has ended."""
        task = self._running.get(id_)
        if task is not None:
            await asyncio.shield(task)
        return self.operation(id_)

    def operation(self, id_: str) -> ResourceRow:
        """An operation.

        Raises:
            Problem: 404.
        """
        row = self._database.get("operation", id_)
        if row is None:
            raise HttpProblem(404, f"no operation {id_!r}")
        return row

    def model(self, id_: str) -> ResourceRow | None:
        """The row of a promoted model; None for a model that came with the platform, and others."""
        return self._database.get("model", id_)

    def delete_model(self, id_: str) -> None:
        """Remove a promoted model and its files.

        Raises:
            Problem: 404; 409 while a job or a deployment uses it, or it is being made.
        """
        row, name = self.model(id_), f"{MODEL_PREFIX}{id_}"
        if row is None:
            raise HttpProblem(404, f"no promoted model {id_!r}")
        users = [
            *(r.id for r in self._database.rows("job") if _uses(r, name)),
            *(r.id for r in self._database.rows("deployment") if _uses(r, name)),
        ]
        if users or row.state == "UPLOADING":
            by = f" by {', '.join(users)}" if users else ""
            raise HttpProblem(409, f"model {id_!r} is in use{by}", code="FAILED_PRECONDITION")
        self._registry.models.pop(name, None)
        self._database.forget("model", id_)
        shutil.rmtree(self._models_dir / id_, ignore_errors=True)

    # -- lives -----------------------------------------------------------------------------------

    def recover(self) -> None:
        """Serve the models of earlier promotions, and go on with those that were cut off."""
        for row in self._database.rows("model"):
            if row.state == "READY":
                self._serve(row)
        for row in self._database.rows("operation"):
            if row.state == RUNNING:
                self._begin(row)

    async def close(self) -> None:
        """Give up what runs; the next gateway begins it again."""
        for task in self._running.values():
            task.cancel()
        await asyncio.gather(*self._running.values(), return_exceptions=True)

    def _begin(self, row: ResourceRow) -> None:
        task = asyncio.create_task(self._run(row), name=f"operation {row.id}")
        self._running[row.id] = task
        task.add_done_callback(lambda _: self._running.pop(row.id, None))

    async def _run(self, row: ResourceRow) -> None:
        id_, base = str(row.body["model"]), self._registry.models.get(str(row.body["base"]))
        try:
            failure = "its base model is not served any more" if base is None else ""
            if base is not None:
                failure = await self._make(id_, str(row.body["identity"]), base)
        except Exception as error:
            log.exception("operation %s", row.id)
            failure = f"{type(error).__name__}: {error}"
        model = self.model(id_)
        if failure or model is None:
            self._database.forget("model", id_)
            self._database.update(replace(row, state=FAILED, message=failure or "it was deleted"))
            log.warning("operation %s failed: %s", row.id, failure)
            return
        self._serve(self._database.update(replace(model, state="READY")))
        self._database.update(replace(row, state=DONE))

    async def _make(self, id_: str, identity: str, base: ModelEntry) -> str:
        target = self._models_dir / id_
        if (target / "config.json").is_file():
            return ""  # an earlier gateway got so far
        self._models_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        order = Order(str(self._snapshots_dir), identity, base.name, str(base.path), str(target))
        try:
            async with asyncio.timeout(BUDGET_S):
                return await self._make_model(order)
        except TimeoutError:
            return f"it was not done within {BUDGET_S:.0f} s"

    def _serve(self, row: ResourceRow) -> None:
        name, path = f"{MODEL_PREFIX}{row.id}", self._models_dir / row.id
        length = cast(int, row.body["contextLength"])
        self._registry.models[name] = ModelEntry(name, path, length)

    def _reserve(self, id_: str, base: ModelEntry, manifest: Body) -> None:
        if f"{MODEL_PREFIX}{id_}" in self._registry.models:
            raise HttpProblem(409, f"model {id_!r} exists already")
        lora = cast("Body | None", manifest.get("lora"))
        body: Body = {
            "contextLength": base.max_context_length,
            "kind": "HF_PEFT_ADDON" if lora else "HF_BASE_MODEL",
        }
        if lora:
            targets = lora.get("target_modules")
            body["peftDetails"] = {
                "baseModel": base.name,
                "r": lora.get("rank"),
                "targetModules": targets,
            }
        try:
            self._database.create(ResourceRow("model", id_, "UPLOADING", "", body))
        except AlreadyExists:
            raise HttpProblem(409, f"model {id_!r} exists already, or is being made") from None

    def _base_model(self, asked: str, manifest: Body) -> ModelEntry:
        try:
            entry, _ = self._registry.find_model(asked)
        except UnknownModel as error:
            raise HttpProblem(400, f"base_model: {error}") from None
        if entry.name != manifest["base_model"]:
            raise HttpProblem(
                400, f"base_model {asked!r}: it was trained from {manifest['base_model']}"
            )
        return entry


def operation_name(id_: str) -> str:
    """The full name of an operation."""
    return f"accounts/{ACCOUNT}/operations/{id_}"


def _uses(row: ResourceRow, model: str) -> bool:
    worker = cast(Body, row.body.get("worker") or {})
    used = model in (row.body.get("model"), worker.get("base_model"))
    return used and not row.state.endswith("DELETED")


def _text(body: Mapping[str, object], snake: str, camel: str) -> str:
    value = body.get(snake, body.get(camel))
    if not isinstance(value, str) or not value:
        raise HttpProblem(400, f"{snake} is missing, or no string")
    return value


_MODEL_NAME = re.compile(rf"(?:{re.escape(MODEL_PREFIX)})?([^/]*)")


def _output_id(name: str) -> str:
    match = _MODEL_NAME.fullmatch(name)
    if match is None or not is_resource_id(match.group(1)):
        raise HttpProblem(
            400,
            f"output_model {name[:100]!r} must be {MODEL_PREFIX}<id>, the id 1 to 63 of a-z, 0-9"
            " and '-'",
        )
    return match.group(1)


async def run_promotion(order: Order) -> str:
    """See `MakeModel`: in a process that has torch."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "fireworks_training.local.model.promotion",
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        out, _ = await process.communicate(order.line())
    except BaseException:
        if process.returncode is None:
            process.kill()
            await process.wait()
        raise
    if process.returncode == 0:
        return ""
    try:
        return str(json.loads(out.splitlines()[-1])["error"])
    except (ValueError, IndexError, KeyError, TypeError):
        return f"its process ended with {process.returncode}; see the platform's log"
