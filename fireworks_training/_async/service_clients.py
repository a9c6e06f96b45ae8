"""The part of the service client that makes training clients and reference clients."""

from __future__ import annotations

from collections.abc import Mapping

from fireworks_training._async.resources.plans import reference_config, separate_reference
from fireworks_training._async.service_core import ServiceCore
from fireworks_training._async.training.client import AsyncFiretitanTrainingClient
from fireworks_training._async.training.factory import ModelOptions
from fireworks_training.errors import InvalidArgument


class ServiceClients(ServiceCore):
    """Training clients of a service."""

    async def create_training_client(
        self,
        base_model: str | None = None,
        lora_rank: int | None = None,
        seed: int | None = None,
        train_mlp: bool | None = None,
        train_attn: bool | None = None,
        train_unembed: bool | None = None,
        lora_alpha: int | None = None,
        user_metadata: Mapping[str, str] | None = None,
    ) -> AsyncFiretitanTrainingClient:
        """The training client, provisioning what it needs.

        The same one at every call; with `max_lora_rank` a new model at every call.

        Args:
            base_model, lora_rank, seed, train_mlp, train_attn, train_unembed, lora_alpha: if given,
                must be those of the service. With `max_lora_rank` they are the new model's, and
                `lora_rank` is required.
            user_metadata: noted with the model.

        Raises:
            InvalidArgument: another model than the service was made for, or a rank out of range.
            ProvisioningError: the trainer or the deployment did not come up.
        """
        options = ModelOptions(
            base_model, lora_rank, lora_alpha, seed, train_mlp, train_attn, train_unembed
        )
        return await self._on_owner(
            lambda: self._trainers.policy(options, user_metadata), "create_training_client"
        )

    async def create_lora_training_client(
        self,
        base_model: str | None = None,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool | None = None,
        train_attn: bool | None = None,
        train_unembed: bool | None = None,
        alpha: int | None = None,
        user_metadata: Mapping[str, str] | None = None,
    ) -> AsyncFiretitanTrainingClient:
        """`create_training_client` by the names of the LoRA guide; needs a service made with
        `lora_rank=` or `max_lora_rank=`."""
        return await self.create_training_client(
            base_model,
            rank,
            seed,
            train_mlp,
            train_attn,
            train_unembed,
            alpha,
            user_metadata,
        )

    async def create_lora_training_client_async(
        self,
        base_model: str | None = None,
        rank: int = 32,
        seed: int | None = None,
        train_mlp: bool | None = None,
        train_attn: bool | None = None,
        train_unembed: bool | None = None,
        alpha: int | None = None,
        user_metadata: Mapping[str, str] | None = None,
    ) -> AsyncFiretitanTrainingClient:
        """`create_lora_training_client`, awaited."""
        return await self.create_lora_training_client(
            base_model, rank, seed, train_mlp, train_attn, train_unembed, alpha, user_metadata
        )

    async def create_training_client_from_state(
        self,
        path: str,
        user_metadata: Mapping[str, str] | None = None,
        weights_access_token: str | None = None,
        *,
        lora_rank: int | None = None,
    ) -> AsyncFiretitanTrainingClient:
        """A training client whose weights are those of a saved state; the optimizer starts anew.

        Args:
            path: a name, `cross_job://<job>/<name>`, or what `save_state` returned.
            user_metadata: noted with the model.
            weights_access_token: for states of others, where the server asks for one.
            lora_rank: of the state's adapter; required with `max_lora_rank`.

        Raises:
            RequestFailed: there is no such state, or it does not fit; no client is made.
            InvalidArgument: the service has its one training client already.
            ProvisioningError: the trainer or the deployment did not come up.
        """
        return await self._on_owner(
            lambda: self._trainers.from_state(
                ModelOptions(lora_rank=lora_rank),
                path,
                optimizer=False,
                weights_access_token=weights_access_token,
                user_metadata=user_metadata,
            ),
            "create_training_client_from_state",
        )

    async def create_training_client_from_state_with_optimizer(
        self,
        path: str,
        user_metadata: Mapping[str, str] | None = None,
        weights_access_token: str | None = None,
        *,
        lora_rank: int | None = None,
    ) -> AsyncFiretitanTrainingClient:
        """A training client that goes on where a saved state stopped: weights and optimizer.

        Args and errors as for `create_training_client_from_state`.
        """
        return await self._on_owner(
            lambda: self._trainers.from_state(
                ModelOptions(lora_rank=lora_rank),
                path,
                optimizer=True,
                weights_access_token=weights_access_token,
                user_metadata=user_metadata,
            ),
            "create_training_client_from_state_with_optimizer",
        )

    async def create_base_training_client(
        self, base_model: str | None = None, user_metadata: Mapping[str, str] | None = None
    ) -> AsyncFiretitanTrainingClient:
        """A client of the base model on the service's trainer, with the adapter off; only for LoRA.

        It computes logprobs (`forward`) and trains nothing. The same one until
        `release_references()`.

        Raises:
            InvalidArgument: another model, or a full-parameter service, whose trainer no longer
                holds the base weights: use `create_reference_client`.
        """
        self._check_model(base_model)
        if separate_reference(self._config) and not self._config.lora_rank:
            raise InvalidArgument(
                "a full-parameter trainer holds no base model beside the one it trains: "
                "create_reference_client gives it a trainer of its own"
            )
        return await self._on_owner(
            lambda: self._trainers.base(user_metadata), "create_base_training_client"
        )

    async def create_reference_client(
        self,
        base_model: str | None = None,
        *,
        lora_rank: int | None = None,
        policy_client: AsyncFiretitanTrainingClient | None = None,
        user_metadata: Mapping[str, str] | None = None,
    ) -> AsyncFiretitanTrainingClient:
        """A client of the model before training, for KL penalties and DPO; only `forward` is legal.

        A LoRA policy's reference is its own trainer with the adapter off. A full-parameter policy,
        or an explicit `reference_training_shape_id` or `reference_trainer_job_id`, gets a separate
        forward-only trainer, which the service owns: `cleanup_reference_trainer_on_close` says
        whether it is deleted at the end. The same client until `release_references()`; one whose
        separate trainer was lost is replaced, in the job started again.

        Args:
            base_model, lora_rank: if given, must be those of the service.
            policy_client: whose reference it is; required with `max_lora_rank`.
            user_metadata: noted with the model.

        Raises:
            InvalidArgument: as said above.
            ProvisioningError: the reference trainer did not come up.
        """
        self._check_model(base_model)
        if lora_rank not in (None, self._config.lora_rank):
            raise InvalidArgument(
                f"lora_rank={lora_rank}, but the policy's is {self._config.lora_rank}"
            )
        if self._config.max_lora_rank is not None and policy_client is None:
            raise InvalidArgument("policy_client= is needed: this service trains several models")
        self._check_client("policy_client", policy_client)

        async def make() -> AsyncFiretitanTrainingClient:
            if not separate_reference(self._config):
                return await self._trainers.base(user_metadata)
            if self._references is None:
                self._references = self._make_trainers(
                    reference_config(self._config), self._provisioner.reference, None, False
                )
            return await self._references.policy(ModelOptions(), user_metadata)

        return await self._on_owner(make, "create_reference_client")

    async def release_references(self) -> None:
        """Free the reference model now, and give back a separate reference trainer by its policy.

        Raises:
            FireworksTrainingError: the first failure on the way.
        """

        async def release() -> None:
            references, self._references = self._references, None
            await self._trainers.release_base()
            if references is not None:
                await references.close(drain=True)
            await self._provisioner.release_references()

        await self._on_owner(release, "release_references")

    async def recover_training_client(
        self, lost: AsyncFiretitanTrainingClient | None = None
    ) -> AsyncFiretitanTrainingClient:
        """After `TrainerLost`: start the job again, and go on from the newest saved state.

        The job gets a new process; a new model in it loads, with its optimizer, the newest state
        that the lost client saved. What was done after that save is to be done again.

        Args:
            lost: the client that ended with `TrainerLost`; required with `max_lora_rank`, where
                each lost client is recovered by a call of its own, and the first of them starts
                the job again.

        Raises:
            TrainerLost: the lost client had saved no state; there is nothing to go on from.
            InvalidArgument: the trainer is not lost, or this client was recovered already.
            ProvisioningError: the job could not be started again.
        """
        self._check_client("lost", lost)
        return await self._on_owner(
            lambda: self._trainers.recovered(lost), "recover_training_client"
        )
