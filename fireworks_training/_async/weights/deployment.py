"""The deployment of a service: the weights that it serves, its tokenizer, and its samplers.

Samplers share connections and the concurrency window across snapshots, so that a new snapshot costs
no connection and forgets no window. How weights are loaded is in `weight_sync`; which snapshot a
training client saves for it, and when, in `publisher`.
"""

from __future__ import annotations

import asyncio
import logging
from dataclasses import replace
from typing import TYPE_CHECKING
from weakref import WeakSet

from fireworks_training._async.control_plane.client import AsyncControlPlane
from fireworks_training._async.platform.platform import Platform
from fireworks_training._async.platform.tokenizers import LOCAL_ACCOUNT, find_tokenizer, load
from fireworks_training._async.resources.ownership import Claim
from fireworks_training._async.resources.plans import inference_deployment
from fireworks_training._async.resources.provisioner import Provisioner
from fireworks_training._async.sampling.concurrency import (
    AdaptiveConcurrencyController,
    SamplingConcurrencyController,
)
from fireworks_training._async.sampling.context import SamplerContext
from fireworks_training._async.sampling.hot_load_signal import HotLoadSignal
from fireworks_training._async.sampling.sampler import DeploymentSampler, SamplerInternals
from fireworks_training._async.weights.hot_load_requests import Target
from fireworks_training._async.weights.weight_sync import WeightSync
from fireworks_training._core.snapshots import Chain, links_to
from fireworks_training.config import CleanUp, FiretitanProvisioningConfig
from fireworks_training.errors import ApiError, HotLoadFailed, InvalidArgument
from fireworks_training.models import DeploymentInfo
from fireworks_training.options import DeploymentConfig, Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger("fireworks_training.weight_sync")


class ServedDeployment:
    """Serves the weights of one service; everything runs on its owner loop.

    Args:
        platform: its platform.
        config: what the service was made for.
        provisioner: gets the deployment up.
    """

    def __init__(
        self,
        platform: Platform,
        config: FiretitanProvisioningConfig,
        provisioner: Provisioner,
    ) -> None:
        self._platform = platform
        self._config = config
        self._provisioner = provisioner
        self._fetching = asyncio.Lock()
        self.chain = Chain(
            whole_only=bool(config.lora_rank or config.max_lora_rank),
            several=config.max_lora_rank is not None,
        )
        self._hot_loads = HotLoadSignal()
        self._sampled: WeakSet[SamplerContext] = WeakSet()
        self._sync: WeightSync | None = None
        self._controller: SamplingConcurrencyController | None = None
        self._tokenizer: PreTrainedTokenizerBase | None = None

    async def deployment(self) -> DeploymentInfo:
        """The deployment, provisioned.

        Raises:
            InvalidArgument: the service has none.
        """
        deployment = (await self._provisioner.provisioned()).deployment
        if deployment is None:
            raise InvalidArgument(
                "this service has no deployment (create_deployment=False): there is nothing to "
                "load a snapshot into or to sample from"
            )
        return deployment

    async def weights(self) -> WeightSync:
        """The weights of the deployment."""
        deployment = await self.deployment()
        if self._sync is None:
            target = Target(
                url=self._platform.hotload_url,
                deployment=deployment.name,
                # It may serve another quantization of the trainer's model.
                base_model=deployment.base_model or self._config.base_model,
            )
            self._sync = WeightSync(
                self._platform.transport,
                target,
                chain=self.chain,
                timeout=self._config.hotload_timeout_s,
                hot_loads=self._hot_loads,
                on_live=self._note_live,
                learn=self._learn_chain,
            )
        return self._sync

    async def _learn_chain(self, identity: str) -> None:
        """Note the links up to a snapshot that another service saved, as its job lists them.

        A platform that lists no predecessors is asked for the snapshot as it is.
        """
        job_id = self._provisioner.resources.job_id
        if job_id is None or self._config.lora_rank or self._config.max_lora_rank:
            return
        try:
            rows = await (await self._platform.open()).list_checkpoints(job_id)
        except ApiError as error:
            logger.debug("the chain of %s can't be looked up: %s", identity, error)
            return
        predecessors = {
            row.name.rpartition("/")[2]: row.predecessor
            for row in rows
            if row.predecessor is not None or row.promotable
        }
        for snapshot in links_to(identity, predecessors):
            self.chain.learn(snapshot)

    def _note_live(self, identity: str) -> None:
        self._provisioner.resources.stale = False
        for context in self._sampled:
            context.current_snapshot = identity

    async def close(self) -> None:
        """Let the load under way end; idempotent."""
        if self._sync is not None:
            await self._sync.close()

    async def load(self, path: object) -> WeightSync:
        """Bring a snapshot into the deployment; returns when every replica serves it."""
        if not isinstance(path, str) or not path:
            raise InvalidArgument(
                f"model_path={path!r}: pass the `path` that save_weights_for_sampler returned"
            )
        weights = await self.weights()
        await weights.load(path)
        return weights

    async def of_deployment(
        self,
        model_path: str | None,
        tokenizer: Tokenizer | None,
        controller: SamplingConcurrencyController | None,
    ) -> DeploymentSampler:
        """A sampler of the deployment, with a snapshot live if one is named."""
        weights = await (self.weights() if model_path is None else self.load(model_path))
        known = tokenizer if tokenizer is not None else await self._tokenizer_if_any()
        other = None if model_path is None else weights.replaces(model_path)
        if other is not None:
            raise HotLoadFailed(
                f"{model_path} was loaded, but {other} was asked for by its name meanwhile, and "
                "takes its place: a deployment serves one snapshot at a time. Make the samplers of "
                "several snapshots one after the other, or give each its own deployment.",
                identity=model_path,
            )
        return await self._make(weights, known, controller or self.controller())

    async def of_probe(self) -> DeploymentSampler:
        """A sampler for token ids, with a window of its own: it does not wait for rollouts."""
        return await self._make(await self.weights(), None, AdaptiveConcurrencyController())

    async def _make(
        self,
        weights: WeightSync,
        tokenizer: Tokenizer | None,
        controller: SamplingConcurrencyController,
    ) -> DeploymentSampler:
        model, integer_stops = (await self.deployment()).name, await self._integer_stops()
        # Nothing is awaited from here on: a snapshot that goes live is either current or noted.
        context = SamplerContext(
            transport=self._platform.transport,
            inference_url=self._platform.inference_url,
            model=model,
            tokenizer=tokenizer,
            concurrency_controller=controller,
            current_snapshot=weights.current,
            integer_stops=integer_stops,
            hot_loads=self._hot_loads,
            distance=self.chain.distance,
        )
        self._sampled.add(context)
        return SamplerInternals.over(context)

    async def of_model(
        self,
        model: str,
        tokenizer: Tokenizer | None,
        controller: SamplingConcurrencyController | None,
        inference_url: str | None,
    ) -> DeploymentSampler:
        """A sampler of any model string; it has a window of its own unless one is given."""
        await self._platform.open()
        context = SamplerContext(
            transport=self._platform.transport,
            inference_url=inference_url or self._platform.inference_url,
            model=model,
            tokenizer=tokenizer if tokenizer is not None else await self._tokenizer_if_any(),
            concurrency_controller=controller or AdaptiveConcurrencyController(),
            integer_stops=await self._integer_stops(),
        )
        return SamplerInternals.over(context)

    async def of_inference(
        self,
        config: DeploymentConfig,
        budget: float,
        clean_up: CleanUp | None,
        tokenizer: Tokenizer | None,
        controller: SamplingConcurrencyController | None,
    ) -> DeploymentSampler:
        """A sampler of a deployment that only serves, made if there is none."""
        config.validate()
        if config.max_replica_count <= 0:
            raise InvalidArgument("max_replica_count must be positive for a deployment to sample")
        resources = self._provisioner.resources
        if config.deployment_shape is None and config.base_model == self._config.base_model:
            linked = resources.profile.deployment_shape if resources.profile else None
            config = replace(config, deployment_shape=self._config.deployment_shape or linked)
        config = replace(config, region=config.region or self._config.region)
        claim = Claim("inference", config.deployment_id, clean_up)
        found = list[DeploymentInfo]()

        async def work(plane: AsyncControlPlane) -> None:
            holdings = self._provisioner.holdings
            found.append(await inference_deployment(plane, config, holdings, claim, budget=budget))

        await self._provisioner.hold(claim, work)
        return await self.of_model(found[0].name, tokenizer, controller, None)

    async def _integer_stops(self) -> bool:
        return await self._local()

    async def _local(self) -> bool:
        return await (await self._platform.open()).account() == LOCAL_ACCOUNT

    def controller(self) -> SamplingConcurrencyController:
        """The service's own, made at first use."""
        if self._controller is None:
            self._controller = AdaptiveConcurrencyController()
        return self._controller

    async def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of the service's model, found once.

        Raises:
            InvalidArgument: the platform serves none, and no `tokenizer_model` was given.
        """
        found = await self._tokenizer_if_any()
        if found is None:
            raise InvalidArgument(
                "no tokenizer: pass tokenizer_model= to from_firetitan_config, or tokenizer= to "
                "the sampler"
            )
        return found

    async def _tokenizer_if_any(self) -> PreTrainedTokenizerBase | None:
        """The tokenizer; None where none is named or served: token ids can be sampled without."""
        async with self._fetching:
            if self._tokenizer is None and self._platform.tinker_only:
                named = self._config.tokenizer_model or self._config.base_model
                self._tokenizer = await load(named)
            elif self._tokenizer is None:
                plane = await self._platform.open()
                self._tokenizer = await find_tokenizer(plane, self._config)
            return self._tokenizer
