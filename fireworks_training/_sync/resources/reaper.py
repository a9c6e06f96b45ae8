"""The blocking twins of `fireworks_training._async.resources.reaper`.

Written by `python -m fireworks_training._generate_sync`.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import TracebackType
from typing import Self

from fireworks_training._async.resources.reaper import AsyncResourceLedger
from fireworks_training._portal import Blocking
from fireworks_training.models import HeldResource


class ResourceLedger(Blocking[AsyncResourceLedger]):
    """Lists and removes what runs of this user hold, as recorded on this machine.

    Make one with `connect`; use it as a context manager, or `close()` it.
    """

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
        instance = AsyncResourceLedger.connect(
            api_key=api_key,
            base_url=base_url,
            additional_headers=additional_headers,
            verify_ssl=verify_ssl,
        )
        return cls._wrap(instance)._bind()

    def ps(self, *, forget: bool = False) -> list[HeldResource]:
        """List resources that are held or left behind, oldest first; changes nothing by default.

        Each has the `outcome` that a plain `reap()` would give it: "remove", "close" or "leave".

        Args:
            forget: note in the ledger that what is proven gone has ended, so that it is listed this
                once ("closed") and not again.

        Raises:
            ApiError: the platform can't be asked.
        """
        return self._run(self._async.ps, forget=forget)

    def reap(
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
        return self._run(
            self._async.reap,
            older_than_s=older_than_s,
            dry_run=dry_run,
            kept=kept,
            other_machines=other_machines,
        )

    def close(self) -> None:
        """Close the connections; idempotent."""
        self._run(self._async.close)

    def __enter__(self) -> Self:
        self._run(self._async.__aenter__)
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        self._run(self._async.__aexit__, exc_type, exc, tb)
