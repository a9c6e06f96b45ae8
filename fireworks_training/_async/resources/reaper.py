"""Lists and removes resources that this user's runs have left behind on one account.

The ledger shows where to look, the rules in `_core.ledger` decide what may be touched, and the
resource itself proves whose it is: nothing is removed that does not carry the nonce of a run
without a live owner. It knows the control plane and the ledger, and nothing of a running service.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Self

from fireworks_training._async.control_plane.client import AsyncControlPlane
from fireworks_training._async.http.transport import Transport
from fireworks_training._async.resources.ledger_file import LedgerFile
from fireworks_training._async.resources.ownership import carries_nonce, delete, find
from fireworks_training._async.runtime.cancellation import finish_in_spite_of_cancellation
from fireworks_training._async.runtime.loops import OwnerLoop
from fireworks_training._async.runtime.processes import is_alive, this_process
from fireworks_training._async.runtime.threads import in_thread
from fireworks_training._core.ledger import (
    AskPlatform,
    Close,
    Leave,
    OpenClaim,
    Remove,
    close,
    fold,
    judge,
    judge_found,
)
from fireworks_training.config import resolve_endpoint
from fireworks_training.errors import FireworksTrainingError
from fireworks_training.models import DeploymentInfo, HeldResource, TrainerJobInfo

AT_ONCE = 8
"""Resources that are fetched at the same time."""

Decision = AskPlatform | Leave | Close | Remove


@dataclass(frozen=True, slots=True)
class _ReapOptions:
    """Holds the arguments of `AsyncResourceLedger.reap`."""

    older_than_s: float = 0.0
    kept: bool = False
    other_machines: bool = False
    forget: bool = False


class AsyncResourceLedger:
    """Lists and removes what runs of this user hold, as recorded on this machine.

    Make one with `connect`; use it as a context manager, or `close()` it.
    """

    def __init__(self, plane: AsyncControlPlane | None, owner: OwnerLoop, base_url: str) -> None:
        self._plane = plane
        self._owner = owner
        self._base_url = base_url
        self._file = LedgerFile()

    @classmethod
    def connect(
        cls,
        *,
        api_key: str | None = None,
        base_url: str | None = None,
        additional_headers: Mapping[str, str] | None = None,
        verify_ssl: bool = True,
    ) -> Self:
        """Describe the connection; nothing is sent yet.

        Args:
            api_key: default `FIREWORKS_API_KEY`. Resources of other accounts are listed, and left.
            base_url: default `FIREWORKS_BASE_URL`, else the Fireworks cloud. Resources of other
                platforms are listed, and left.
            additional_headers: sent with every request; they win over the SDK's own.
            verify_ssl: False accepts any TLS certificate.

        Raises:
            InvalidArgument: no key, or `base_url` is not a URL.
        """
        endpoint = resolve_endpoint(base_url=base_url, api_key=api_key)
        owner = OwnerLoop()
        if endpoint.embedded:  # it ends with its process: there is nobody to ask
            return cls(None, owner, endpoint.base_url)
        transport = Transport(
            owner=owner,
            base_url=endpoint.base_url,
            api_key=endpoint.api_key or "",
            additional_headers=additional_headers,
            verify_ssl=verify_ssl,
        )
        return cls(AsyncControlPlane(transport), owner, endpoint.base_url)

    async def ps(self, *, forget: bool = False) -> list[HeldResource]:
        """List resources that are held or left behind, oldest first; changes nothing by default.

        Each has the `outcome` that a plain `reap()` would give it: "remove", "close" or "leave".

        Args:
            forget: note in the ledger that what is proven gone has ended, so that it is listed this
                once ("closed") and not again.

        Raises:
            ApiError: the platform can't be asked.
        """
        options = _ReapOptions(forget=forget)
        return await self._owner.run(lambda: self._all(options, act=False), label="ps")

    async def reap(
        self,
        *,
        older_than_s: float = 0.0,
        dry_run: bool = False,
        kept: bool = False,
        other_machines: bool = False,
    ) -> list[HeldResource]:
        """Remove resources that runs have left behind: they carry a nonce, and no owner lives.

        Deployments go before trainers; a failure of one ("failed") does not stop the others.

        Args:
            older_than_s: only resources that were asked for at least so many seconds ago.
            dry_run: only list what would be done.
            kept: also resources that were kept on purpose at the end of their run.
            other_machines: also resources of runs on other machines, whose processes can't be seen
                from here: pass it only if you know that they have ended.

        Returns:
            Everything that is held or left, with its `outcome`.

        Raises:
            ApiError: the platform can't be asked.
        """
        options = _ReapOptions(older_than_s, kept, other_machines)
        return await self._owner.run(lambda: self._all(options, act=not dry_run), label="reap")

    async def close(self) -> None:
        """Close the connections; idempotent."""
        if self._plane is not None:
            await self._plane.close()
        elif self._owner.bound is not None:
            self._owner.release()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<AsyncResourceLedger {self._base_url}>"

    # -- plumbing ----------------------------------------------------------------------------------

    def _bind_to_portal(self) -> None:
        self._owner.use_portal()

    async def _all(self, options: _ReapOptions, *, act: bool) -> list[HeldResource]:
        claims = await self._claims()
        account = await self._plane.account() if self._plane is not None and claims else None
        places = asyncio.Semaphore(AT_ONCE)

        async def one(claim: OpenClaim) -> HeldResource:
            async with places:
                return await self._one(claim, claims, account, options, act=act)

        deployments = [claim for claim in claims if claim.last.kind == "deployment"]
        trainers = [claim for claim in claims if claim.last.kind == "trainer"]
        done = dict[int, HeldResource]()
        for part in (deployments, trainers):  # trainers last: others load what they saved
            rows = await asyncio.gather(*map(one, part))
            done |= {id(claim): row for claim, row in zip(part, rows, strict=True)}
        return [done[id(claim)] for claim in claims]

    async def _claims(self) -> list[OpenClaim]:
        return fold(await in_thread(self._file.read))

    async def _one(
        self,
        claim: OpenClaim,
        claims: list[OpenClaim],
        account: str | None,
        options: _ReapOptions,
        *,
        act: bool,
    ) -> HeldResource:
        shown = self._shown(claim)
        decision: Decision = await in_thread(_judged, claim, claims, options)
        here = (claim.last.base_url, claim.last.account) == (self._base_url, account)
        if not here or self._plane is None:
            if isinstance(decision, AskPlatform):
                where = f"{claim.last.account} at {claim.last.base_url}"
                decision = Leave(f"of another account or platform ({where}): sign in there")
        else:
            try:
                row = await find(self._plane, claim.last.kind, claim.last.resource_id)
            except FireworksTrainingError as error:
                return replace(shown, outcome="failed", reason=str(error))
            shown = _with_state(shown, row)
            if isinstance(decision, AskPlatform):
                carries = row is not None and carries_nonce(row, claim.last.nonce)
                decision = judge_found(
                    claim, present=row is not None, carries=carries, now=time.time()
                )
        return await self._carry_out(shown, claim, decision, options, act=act)

    async def _carry_out(
        self,
        shown: HeldResource,
        claim: OpenClaim,
        decision: Decision,
        options: _ReapOptions,
        *,
        act: bool,
    ) -> HeldResource:
        if isinstance(decision, Leave):
            return replace(shown, outcome="leave", reason=decision.reason)
        if isinstance(decision, Close):
            noted = act or options.forget
            if noted:
                await self._note_gone(claim, decision.reason)
            return replace(shown, outcome="closed" if noted else "close", reason=decision.reason)
        reason = "its run has ended" if claim.last.event != "kept" else "it was kept"
        if not act:
            return replace(shown, outcome="remove", reason=reason)
        # Another run may have adopted it since the ledger was read.
        again = await in_thread(_judged, claim, await self._claims(), options)
        if isinstance(again, Leave):
            return replace(shown, outcome="leave", reason=again.reason)
        assert self._plane is not None
        try:
            await delete(self._plane, claim.last.kind, claim.last.resource_id)
        except FireworksTrainingError as error:
            return replace(shown, outcome="failed", reason=str(error))
        await self._note_gone(claim, "reaped")
        return replace(shown, outcome="removed", reason=reason)

    async def _note_gone(self, claim: OpenClaim, note: str) -> None:
        entry = close(claim, at=time.time(), owner=this_process(), note=note)
        await finish_in_spite_of_cancellation(in_thread(self._file.append, [entry]))

    def _shown(self, claim: OpenClaim) -> HeldResource:
        entry = claim.last
        assert entry.event != "gone"  # `fold` gives open claims only
        return HeldResource(
            kind=entry.kind,
            resource_id=entry.resource_id,
            account=entry.account,
            base_url=entry.base_url,
            run=entry.run,
            standing=entry.event,
            age_s=max(0.0, time.time() - claim.since),
            owner_pid=entry.owner.pid,
            owner_alive=is_alive(entry.owner),
        )


def _judged(
    claim: OpenClaim, claims: list[OpenClaim], options: _ReapOptions
) -> AskPlatform | Leave | Close:
    return judge(
        claim,
        claims,
        is_alive,
        now=time.time(),
        older_than=options.older_than_s,
        kept=options.kept,
        elsewhere=options.other_machines,
    )


def _with_state(shown: HeldResource, row: TrainerJobInfo | DeploymentInfo | None) -> HeldResource:
    if row is None:
        return shown
    replicas = row.replica_count if isinstance(row, DeploymentInfo) else None
    return replace(shown, state=row.state, message=row.message, replicas=replicas)
