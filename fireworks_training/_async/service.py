"""The service client: one trainer, one deployment, and everything that belongs to them.

It provisions at the first call that needs it, hands out the training client and samplers, brings
snapshots into the deployment, and gives back at `close()` what it made. All of its I/O runs on its
owner loop, over one connection pool.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self, Unpack

from fireworks_training._async.service_clients import ServiceClients
from fireworks_training._async.service_facts import ServiceFacts
from fireworks_training._async.service_samplers import ServiceSamplers
from fireworks_training.config import (
    FiretitanProvisioningConfig,
    ProvisioningOptions,
    cast_options,
    resolve_endpoint,
    resolve_tinker_server,
)
from fireworks_training.errors import InvalidArgument, NotSupported
from fireworks_training.futures import mark_retrieved, was_retrieved

if TYPE_CHECKING:
    from fireworks_training.events import OnEvent

logger = logging.getLogger("fireworks_training.service")


class AsyncFiretitanServiceClient(ServiceClients, ServiceSamplers, ServiceFacts):
    """A trainer and a deployment, managed together.

    Make one with `from_firetitan_config`; use it as a context manager, or `close()` it. Lazy:
    nothing is provisioned before the first client or sampler is asked for.
    """

    @classmethod
    def from_firetitan_config(
        cls,
        *,
        api_key: str | None = None,
        base_url: str | None = None,
        managed_config: FiretitanProvisioningConfig | None = None,
        inference_url: str | None = None,
        hotload_api_url: str | None = None,
        additional_headers: Mapping[str, str] | None = None,
        verify_ssl: bool = True,
        user_metadata: Mapping[str, str] | None = None,
        project_id: str | None = None,
        pipeline_steps: bool = False,
        on_event: OnEvent | None = None,
        **options: Unpack[ProvisioningOptions],
    ) -> Self:
        """Describe a trainer and a deployment; nothing is sent yet.

        Args:
            api_key: default `FIREWORKS_API_KEY`. An embedded platform needs none.
            base_url: default `FIREWORKS_BASE_URL`, else the Fireworks cloud. "local" embeds a
                platform with temporary state, "local:/path" one that keeps its state there.
            managed_config: the whole description as one object, instead of `options`.
            inference_url, hotload_api_url: where to sample, and to hot load; default `base_url`.
            additional_headers: sent with every request; they win over the SDK's own.
            verify_ssl: False accepts any TLS certificate.
            user_metadata: noted with the trainer session.
            project_id: not supported.
            pipeline_steps: send an `optim_step` before the results of its step are in, also to a
                server that does not enforce atomic steps: such a server may then apply a part of a
                step that failed.
            on_event: a plain, quick function that is told what happens (see `Event`), on the
                service's loop; an exception in it is logged once. None: no events are made.
            **options: see `FiretitanProvisioningConfig`.

        Raises:
            UnknownOption, InvalidArgument, NotSupported: see `FiretitanProvisioningConfig`.
        """
        if project_id is not None:
            raise NotSupported("project_id is not supported; leave it out")
        if managed_config is not None and options:
            raise InvalidArgument(
                f"give managed_config or keywords, not both: {', '.join(sorted(options))}"
            )
        config = managed_config or FiretitanProvisioningConfig.from_options(cast_options(options))
        endpoint = resolve_endpoint(
            base_url=base_url,
            api_key=api_key,
            inference_url=inference_url,
            hotload_api_url=hotload_api_url,
        )
        return cls(
            endpoint,
            config,
            additional_headers=additional_headers,
            verify_ssl=verify_ssl,
            user_metadata=user_metadata,
            pipeline_steps=pipeline_steps,
            on_event=on_event,
        )

    @classmethod
    def from_tinker_server(
        cls,
        base_model: str,
        *,
        base_url: str | None = None,
        api_key: str | None = None,
        lora_rank: int | None = None,
        max_lora_rank: int | None = None,
        seed: int | None = None,
        train_mlp: bool = True,
        train_attn: bool = True,
        train_unembed: bool = True,
        tokenizer_model: str | None = None,
        additional_headers: Mapping[str, str] | None = None,
        verify_ssl: bool = True,
        user_metadata: Mapping[str, str] | None = None,
        pipeline_steps: bool = False,
        on_event: OnEvent | None = None,
    ) -> Self:
        """Train on a server that has the Tinker API and nothing else; nothing is sent yet.

        What is saved stays on the server. There is no job and no deployment: samplers,
        `weight_sync`, references and promotion raise `NotSupported` or `InvalidArgument`.

        Args:
            base_model: as the server names it.
            base_url, api_key: default `TINKER_BASE_URL` (without `/api/v1`) and `TINKER_API_KEY`.
            lora_rank: of the adapter; default 32, or with `max_lora_rank` each client's own.
            max_lora_rank: make a model at every `create_training_client(lora_rank=...)`, of a rank
                up to this; None makes one.
            seed: of the adapter's initialisation; None lets the server choose.
            train_mlp, train_attn, train_unembed: which layers an adapter covers.
            tokenizer_model: name or folder of the tokenizer; default `base_model`.
            additional_headers, verify_ssl, user_metadata, pipeline_steps, on_event: as for
                `from_firetitan_config`.

        Raises:
            InvalidArgument: no URL or key, or a rank below 1.
        """
        config = FiretitanProvisioningConfig(
            base_model=base_model,
            tokenizer_model=tokenizer_model,
            lora_rank=_tinker_rank(lora_rank, max_lora_rank),
            max_lora_rank=max_lora_rank,
            seed=seed,
            train_mlp=train_mlp,
            train_attn=train_attn,
            train_unembed=train_unembed,
            create_deployment=False,
            dialect="protobuf",
        )
        return cls(
            resolve_tinker_server(base_url=base_url, api_key=api_key),
            config,
            additional_headers=additional_headers,
            verify_ssl=verify_ssl,
            user_metadata=user_metadata,
            pipeline_steps=pipeline_steps,
            on_event=on_event,
        )

    # -- the end -----------------------------------------------------------------------------------

    async def close(self) -> None:
        """Finish accepted operations, clean up as the policies say, close every connection.

        Idempotent, bounded in time, and goes on to the end when its waiter is cancelled.

        Raises:
            FireworksTrainingError: the first failure of an operation that nobody asked about, or
                else of the clean-up; after everything is closed.
        """
        await self._close(quiet=False)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        tb: TracebackType | None,
    ) -> None:
        await self._close(quiet=exc is not None)

    def __repr__(self) -> str:
        state = "closed" if self._closed else (self.trainer_job_id or "not provisioned")
        return f"<AsyncFiretitanServiceClient {self.base_url} {state}>"

    # -- closing -----------------------------------------------------------------------------------

    async def _close(self, *, quiet: bool) -> None:
        self._closed = True
        if self._owner.bound is None or (self._closing is not None and self._closing.done()):
            return  # nothing was ever asked of it, or everything has been given back
        await self._owner.run(lambda: self._close_once(quiet), label="close")

    async def _close_once(self, quiet: bool) -> None:
        if self._closing is None:
            self._closing = asyncio.create_task(self._give_everything_back(drain=not quiet))
        error = await asyncio.shield(self._closing)
        if error is not None and not quiet and not was_retrieved(error):
            mark_retrieved(error)  # raised once: a second close is quiet
            raise error

    async def _record_usage(self) -> None:
        """Keep what was used, for `fireworks-training usage`."""
        await self._provisioner.recorder.finish(self._connection.release_usage())

    async def _give_everything_back(self, *, drain: bool) -> BaseException | None:
        """Close in order, whatever fails on the way; the error worth raising."""
        errors = list[BaseException]()

        async def clean_up() -> None:
            errors.extend(await self._provisioner.clean_up())

        async with contextlib.AsyncExitStack() as stack:
            stack.callback(self._owner.release)
            stack.push_async_callback(self._connection.close)
            stack.push_async_callback(clean_up)
            stack.push_async_callback(self._record_usage)
            stack.push_async_callback(self._publishing.close)
            stack.push_async_callback(self._samplers.close)
            for trainers in (self._references, self._trainers):
                unseen = None if trainers is None else await trainers.close(drain=drain)
                errors.extend([unseen] if unseen is not None else [])
            if self._connection.temporary and self._trainers.saved_a_state:
                logger.info(
                    "the saved states go away with the embedded platform; "
                    "base_url='local:/path' keeps them"
                )
        return errors[0] if errors else None


def _tinker_rank(lora_rank: int | None, max_lora_rank: int | None) -> int:
    """The rank of the adapter; 0 where each client has its own."""
    if lora_rank is None:
        return 32 if max_lora_rank is None else 0
    if lora_rank < 1:
        raise InvalidArgument(f"lora_rank={lora_rank}: a Tinker server trains adapters, from 1")
    return lora_rank
