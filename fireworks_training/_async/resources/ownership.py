"""Keeps track of the resources of one run: which it holds, which it made, and their clean-up.

Each change is written to the ledger. A create request is preceded by an intent in the ledger, and
carries the run's nonce, so that the run's own resources can be recognized whatever happens to this
process. Only resources that the run made are cleaned up; those that it found stay. It knows the
control plane and the ledger; what a run needs, and how it is configured, is known to `plans`.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Literal, TypeVar
from uuid import uuid4

from fireworks_training._async.control_plane.client import AsyncControlPlane
from fireworks_training._async.resources.ledger_file import LedgerFile
from fireworks_training._async.runtime.cancellation import finish_in_spite_of_cancellation
from fireworks_training._async.runtime.processes import this_process
from fireworks_training._async.runtime.threads import in_thread
from fireworks_training._core.ledger import (
    ANNOTATION,
    Event,
    Kind,
    LedgerEntry,
    annotations_carry,
    marked_name,
    name_carries,
)
from fireworks_training._core.lifecycle import Readiness, deployment_readiness, job_readiness
from fireworks_training.config import CleanUp
from fireworks_training.errors import ApiError, FireworksTrainingError, LedgerUnavailable
from fireworks_training.models import DeploymentInfo, TrainerJobInfo

Row = TypeVar("Row", TrainerJobInfo, DeploymentInfo)

CREATE_GRACE = 5.0
"""Seconds that a cancelled call waits for the answer to its create request: only the answer shows
whether there is something to clean up."""

CLEAN_UP_TIMEOUT = 60.0
"""Seconds for all clean-up of a service together."""

logger = logging.getLogger("fireworks_training.provisioning")

Standing = Literal["new", "intended", "created", "adopted", "released"]
Role = Literal["reference", "inference", "deployment", "trainer"]

_ORDER: tuple[Role, ...] = ("reference", "inference", "deployment", "trainer")
"""Order of the clean-up: a trainer is last, since the others load what it saved."""


@dataclass(slots=True, eq=False)
class Claim:
    """Holds the state of one resource in the run that is going on, in this process's memory.

    Each change of its standing is written to the ledger as a `_core.ledger.LedgerEntry`; a
    `_core.ledger.OpenClaim` is what another process reads there.

    Attributes:
        role: the resource's use in the run.
        resource_id: its id.
        clean_up: what is done with it at the end, if this run made it; None keeps it.
        standing: how the run came to hold it.
        own_id: whether this run drew the id at random, so that nobody else's resource has it.
    """

    role: Role
    resource_id: str
    clean_up: CleanUp | None = None
    standing: Standing = "new"
    own_id: bool = False

    @property
    def kind(self) -> Kind:
        """The kind of resource in this role."""
        return "trainer" if self.role in ("reference", "trainer") else "deployment"

    def __str__(self) -> str:
        return f"{self.kind} {self.resource_id}"


class RunResources:
    """Holds the claims of one run.

    Args:
        base_url: the platform's URL, as the user gave it.
        embedded: whether the platform ends with this process.
        run: name of the run, for people; default the name of the script.
        ledger: default the user's.
    """

    def __init__(
        self,
        base_url: str,
        *,
        embedded: bool = False,
        run: str | None = None,
        ledger: LedgerFile | None = None,
    ) -> None:
        self.nonce = uuid4().hex[:12]
        self.claims: list[Claim] = []
        self.errors: list[BaseException] = []
        self._base_url = base_url
        self._embedded = embedded
        self.run = run or PurePath(sys.argv[0] if sys.argv else "").name or "python"
        self._ledger = ledger if ledger is not None else LedgerFile()
        self._complained = False

    @property
    def open(self) -> bool:
        """Whether the run holds a resource."""
        return any(claim.standing != "released" for claim in self.claims)

    # -- marks -------------------------------------------------------------------------------------

    def job_name(self, wanted: str | None) -> str:
        """Make the display name of a job that this run makes."""
        return marked_name(wanted or self.run[:40], self.nonce)

    def annotations(self) -> dict[str, str]:
        """Make the annotations of a deployment that this run makes."""
        return {ANNOTATION: self.nonce}

    def carries(self, row: TrainerJobInfo | DeploymentInfo) -> bool:
        """Whether a resource carries this run's nonce: this run made it."""
        return carries_nonce(row, self.nonce)

    # -- taking hold -------------------------------------------------------------------------------

    async def create(
        self,
        plane: AsyncControlPlane,
        claim: Claim,
        send: Callable[[], Awaitable[tuple[Row, bool]]],
    ) -> Row:
        """Note an intent, send a create request, and note whether the resource was made or found.

        When cancelled meanwhile, it waits for the answer for up to `CREATE_GRACE` seconds; without
        one the claim stays "intended", for `abandon` or `reap` to decide about.
        """
        self.claims.append(claim)
        await self._note(plane, "intent", claim)
        claim.standing = "intended"
        request = asyncio.ensure_future(send())
        try:
            row, answered = await asyncio.shield(request)
        except asyncio.CancelledError:
            await asyncio.wait([request], timeout=CREATE_GRACE)
            if not request.done():
                request.cancel()
                await asyncio.wait([request])
            elif request.exception() is None:
                row, answered = request.result()
                await self._made(plane, claim, made=answered or claim.own_id or self.carries(row))
            raise
        # "It exists" may answer a repeated request of ours whose first answer was lost.
        await self._made(plane, claim, made=answered or claim.own_id or self.carries(row))
        return row

    async def _made(self, plane: AsyncControlPlane, claim: Claim, *, made: bool) -> None:
        claim.standing = "created" if made else "adopted"
        await self._note(plane, "created" if made else "adopted", claim)

    async def adopt(self, plane: AsyncControlPlane, claim: Claim) -> None:
        """Note that the run holds a resource that it found."""
        claim.standing = "adopted"
        self.claims.append(claim)
        await self._note(plane, "adopted", claim)

    # -- clean-up ----------------------------------------------------------------------------------

    async def give_back(self, plane: AsyncControlPlane, role: Role | None = None) -> None:
        """Clean up as configured: delete, scale to zero or keep what was made; release the rest.

        Claims are cleaned up one after another, also after one that failed; failures are logged and
        kept in `errors`.

        Args:
            role: only the claims of this role.
        """
        ordered = sorted(self.claims, key=lambda claim: _ORDER.index(claim.role))
        wanted = [claim for claim in ordered if role in (None, claim.role)]
        await self._in_time([(claim, claim.clean_up) for claim in wanted], plane)

    async def abandon(
        self, plane: AsyncControlPlane, claims: Sequence[Claim] | None = None
    ) -> None:
        """Delete the resources that a failed call has made, all at once.

        Args:
            claims: only these; default all.
        """
        wanted = list(self.claims if claims is None else claims)
        await self._in_time([(claim, "delete") for claim in wanted], plane, together=True)

    async def _in_time(
        self,
        ends: Sequence[tuple[Claim, CleanUp | None]],
        plane: AsyncControlPlane,
        *,
        together: bool = False,
    ) -> None:
        left = [claim for claim, _ in ends if claim.standing != "released"]

        async def one(claim: Claim, clean_up: CleanUp | None) -> None:
            await self._end(plane, claim, clean_up)
            left.remove(claim)

        todo = [end for end in ends if end[0] in left]
        try:
            async with asyncio.timeout(CLEAN_UP_TIMEOUT):
                if together:
                    await asyncio.gather(*(one(claim, clean_up) for claim, clean_up in todo))
                else:
                    for claim, clean_up in todo:
                        await one(claim, clean_up)
        except TimeoutError:
            names = ", ".join(map(str, left))
            error = ApiError(
                f"not cleaned up within {CLEAN_UP_TIMEOUT:.0f} s: {names}. Look with "
                "`fireworks-training ps`, and `reap` what is left."
            )
            logger.warning("%s", error)
            self.errors.append(error)

    async def _end(self, plane: AsyncControlPlane, claim: Claim, clean_up: CleanUp | None) -> None:
        made = claim.standing == "created"
        try:
            if claim.standing == "intended":
                made = await self._was_made(plane, claim)
                if not made:
                    # Left in the ledger: the request may still take effect, and `reap` looks.
                    claim.standing = "released"
                    return
            if made and clean_up == "delete":
                await delete(plane, claim.kind, claim.resource_id)
            elif made and clean_up == "scale_to_zero":
                await plane.scale_to_zero(claim.resource_id)
        except FireworksTrainingError as error:
            logger.warning("%s was not cleaned up: %s", claim, error)
            self.errors.append(error)
            return
        claim.standing = "released"
        if made and clean_up == "delete":
            await self._note(plane, "gone", claim, "deleted")
        elif made and not self._embedded:
            await self._note(plane, "kept", claim, "scaled to zero" if clean_up else "")
        else:
            note = "ends with its embedded platform" if made else "let go: it was not made here"
            await self._note(plane, "gone", claim, note)

    async def _was_made(self, plane: AsyncControlPlane, claim: Claim) -> bool:
        row = await find(plane, claim.kind, claim.resource_id)
        return row is not None and self.carries(row)

    # -- the ledger --------------------------------------------------------------------------------

    async def _note(
        self, plane: AsyncControlPlane, event: Event, claim: Claim, note: str = ""
    ) -> None:
        """Write an entry to the ledger; if that fails, log it once and go on."""
        account = await plane.account()

        def write() -> None:
            entry = LedgerEntry(
                at=time.time(),
                event=event,
                kind=claim.kind,
                resource_id=claim.resource_id,
                account=account,
                base_url=self._base_url,
                nonce=self.nonce,
                owner=this_process(),
                run=self.run,
                embedded=self._embedded,
                note=note,
            )
            self._ledger.append([entry])

        try:
            # To its end, so that the entries are in the order of the events.
            await finish_in_spite_of_cancellation(in_thread(write))
        except LedgerUnavailable as error:
            if not self._complained:
                self._complained = True
                logger.warning(
                    "the ledger %s can't be written (%s): after a crash, `fireworks-training reap` "
                    "will not find what this run has made",
                    self._ledger.path,
                    error,
                )


def carries_nonce(row: TrainerJobInfo | DeploymentInfo, nonce: str) -> bool:
    """Whether a resource carries a run's nonce, which proves that the run made it."""
    if isinstance(row, TrainerJobInfo):
        return name_carries(row.display_name, nonce)
    return annotations_carry(row.annotations, nonce)


async def find(
    plane: AsyncControlPlane, kind: Kind, resource_id: str
) -> TrainerJobInfo | DeploymentInfo | None:
    """Fetch a resource; None where there is none, or it is deleted."""
    if kind == "trainer":
        job = await plane.get_job(resource_id)
        return None if job is None or job_readiness(job.state) is Readiness.GONE else job
    deployment = await plane.get_deployment(resource_id)
    gone = deployment is None or deployment_readiness(deployment.state) is Readiness.GONE
    return None if gone else deployment


async def delete(plane: AsyncControlPlane, kind: Kind, resource_id: str) -> None:
    """Delete a resource; one that is gone is fine."""
    if kind == "trainer":
        await plane.delete_job(resource_id)
    else:
        await plane.delete_deployment(resource_id)
