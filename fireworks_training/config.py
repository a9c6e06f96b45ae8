"""Checks the keywords of `from_firetitan_config`, and reads the environment.

This is the only module that reads environment variables. It knows which keywords exist, which
exclude each other and which this version refuses; it does not know how they are carried out.
"""

from __future__ import annotations

import difflib
import inspect
import logging
import os
import re
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import MISSING, dataclass, fields
from math import isfinite
from pathlib import Path
from typing import Any, ForwardRef, Literal, TypedDict, cast
from urllib.parse import urlsplit

from fireworks_training._checks import one_of
from fireworks_training.errors import InvalidArgument, NotSupported, UnknownOption

logger = logging.getLogger("fireworks_training.config")

_FOLDER = "fireworks-training"
DEFAULT_BASE_URL = "https://api.fireworks.ai"
RESOURCE_ID = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")

TransitionType = Literal["ASYNC", "SYNC"]
CleanUp = Literal["delete", "scale_to_zero"]
SnapshotDtype = Literal["bfloat16", "float32"]
WireDialect = Literal["json", "protobuf"]


class ProvisioningOptions(TypedDict, total=False):
    """Types the keywords of `from_firetitan_config`, as `FiretitanProvisioningConfig` has them."""

    base_model: str
    model_name: str
    tokenizer_model: str | None
    lora_rank: int
    lora_alpha: int | None
    max_lora_rank: int | None
    projection_head_dim: int | None
    training_shape_id: str | None
    training_shape: str | None
    training_shape_ref: str | None
    reference_training_shape_id: str | None
    reference_trainer_job_id: str | None
    cleanup_reference_trainer_on_close: bool
    reference_required: bool
    deployment_shape: str | None
    trainer_job_id: str | None
    trainer_id: str | None
    deployment_id: str | None
    create_deployment: bool
    forward_only: bool
    region: str | None
    max_context_length: int | None
    learning_rate: float
    gradient_accumulation_steps: int
    seed: int | None
    train_mlp: bool
    train_attn: bool
    train_unembed: bool
    node_count: int | None
    accelerator_type: str | None
    accelerator_count: int | None
    custom_image_tag: str | None
    extra_args: list[str] | None
    extra_values: dict[str, str] | None
    deployment_extra_args: list[str] | None
    deployment_extra_values: dict[str, str] | None
    trainer_replica_count: int | None
    replica_count: int | None
    deployment_replica_count: int | None
    trainer_timeout_s: float
    trainer_pending_timeout_s: float
    inactivity_timeout: str | None
    disable_inactivity_cleanup: bool
    deployment_timeout_s: float
    hotload_timeout_s: float
    reattach_settle_timeout_s: float
    reattach_poll_interval_s: float
    cleanup_trainer_on_close: bool
    cleanup_deployment_on_close: CleanUp | None
    display_name: str | None
    purpose: str | None
    managed_by: str | None
    preemptible: bool
    skip_validations: bool
    disable_speculative_decoding: bool
    hot_load_transition_type: str | None
    use_reservation: bool
    reservation_target: str | None
    wait_for_trainer_before_deployment: bool
    weight_sync_transport: str | None
    snapshot_dtype: SnapshotDtype | None
    dialect: WireDialect | None


_ALIASES = {
    "model_name": "base_model",
    "training_shape": "training_shape_id",
    "training_shape_ref": "training_shape_id",
    "trainer_id": "trainer_job_id",
    "deployment_replica_count": "replica_count",
}
_URL = re.compile(r"https?://[^/]")
EXAMPLE_URL = "https://api.fireworks.ai"
_SHAPE_OWNED = ("node_count", "accelerator_type", "accelerator_count")
_REFUSED: dict[str, str] = {
    "projection_head_dim": "projection heads are not supported yet",
    "reservation_target": "reservations are not supported",
    "weight_sync_transport": "RDMA publication is not supported; leave it out for hot load",
}


@dataclass(frozen=True, kw_only=True)
class FiretitanProvisioningConfig:
    """Describes one trainer and one deployment, as the caller wants them.

    Attributes:
        base_model: resource name of the model (alias `model_name`). Required.
        tokenizer_model: name or folder of the tokenizer; None takes the one the platform serves.
        lora_rank: 0 trains all parameters, more trains an adapter of that rank.
        lora_alpha: scale of the adapter; None is 32. Only with `lora_rank > 0`.
        max_lora_rank: many adapters on one trainer, each of a rank up to this, one a
            `create_training_client(lora_rank=...)`; None is one model. Excludes `lora_rank` and
            `lora_alpha`.
        training_shape_id: name of the training shape (aliases `training_shape`,
            `training_shape_ref`); None lets the control plane choose.
        deployment_shape: name of the deployment shape; None takes the one of the training shape.
        trainer_job_id: reuse this trainer job (alias `trainer_id`), resumed if it has stopped; one
            that does not exist is created under this id.
        deployment_id: reuse this deployment; one that does not exist is created under this id.
        create_deployment: False trains without a deployment.
        forward_only: the trainer computes logprobs only.
        reference_training_shape_id, reference_trainer_job_id: give a reference model a trainer of
            its own, of this shape, or this job (which is resumed if it has stopped).
        cleanup_reference_trainer_on_close: delete the reference trainer that this service made.
        reference_required: start a separate reference trainer together with the rest.
        max_context_length: tokens of a sequence; what the service reports, also beside a training
            shape, which decides what the trainer itself takes. None takes the shape's.
        learning_rate: shown with the job; the rate of each step comes with `optim_step`.
        seed: seed of the adapter's initialisation; None lets the trainer choose.
        train_mlp, train_attn, train_unembed: which layers an adapter covers.
        trainer_replica_count, region, custom_image_tag, extra_args, extra_values, purpose,
            managed_by, preemptible, use_reservation, skip_validations, inactivity_timeout,
            disable_inactivity_cleanup, display_name: passed on to the trainer job. Arguments with
            blanks are split there. `use_reservation=False` leaves reserved capacity alone.
        deployment_extra_args, deployment_extra_values, disable_speculative_decoding: passed on to
            the deployment.
        replica_count: replicas of the deployment (alias `deployment_replica_count`), at least 1.
        trainer_timeout_s: seconds from placement to ready.
        trainer_pending_timeout_s: seconds to wait for capacity.
        deployment_timeout_s: seconds for the deployment to become ready.
        hotload_timeout_s: seconds for every replica to report a snapshot.
        reattach_settle_timeout_s: seconds for a deployment that was found to become ready before it
            is pointed to this trainer, and the same again to settle afterwards.
        reattach_poll_interval_s: the longest pause between two looks meanwhile, in seconds.
        cleanup_trainer_on_close: delete the trainer job if this service created it.
        cleanup_deployment_on_close: "delete" or "scale_to_zero" the deployment if this service
            created it; None leaves it.
        hot_load_transition_type: "ASYNC" or "SYNC", any case; None is the platform's own.
        wait_for_trainer_before_deployment: create them one after the other.
        snapshot_dtype: type of weights and snapshots; "float32" turns the rounding off. Local
            platform only.
        dialect: wire format of the trainer's data plane: "json" (Fireworks) or "protobuf" (Tinker);
            None takes protobuf where the trainer offers it, else JSON.
    """

    base_model: str
    tokenizer_model: str | None = None
    lora_rank: int = 0
    lora_alpha: int | None = None
    max_lora_rank: int | None = None
    training_shape_id: str | None = None
    deployment_shape: str | None = None
    trainer_job_id: str | None = None
    deployment_id: str | None = None
    create_deployment: bool = True
    forward_only: bool = False
    reference_training_shape_id: str | None = None
    reference_trainer_job_id: str | None = None
    cleanup_reference_trainer_on_close: bool = True
    reference_required: bool = False
    region: str | None = None
    max_context_length: int | None = None
    learning_rate: float = 1e-5
    seed: int | None = None
    train_mlp: bool = True
    train_attn: bool = True
    train_unembed: bool = True
    custom_image_tag: str | None = None
    extra_args: tuple[str, ...] = ()
    extra_values: Mapping[str, str] | None = None
    deployment_extra_args: tuple[str, ...] = ()
    deployment_extra_values: Mapping[str, str] | None = None
    trainer_replica_count: int | None = None
    replica_count: int = 1
    trainer_timeout_s: float = 3600.0
    trainer_pending_timeout_s: float = 172_800.0
    inactivity_timeout: str | None = None
    disable_inactivity_cleanup: bool = False
    deployment_timeout_s: float = 5400.0
    hotload_timeout_s: float = 600.0
    reattach_settle_timeout_s: float = 600.0
    reattach_poll_interval_s: float = 5.0
    cleanup_trainer_on_close: bool = False
    cleanup_deployment_on_close: CleanUp | None = None
    display_name: str | None = None
    purpose: str | None = None
    managed_by: str | None = None
    preemptible: bool = False
    use_reservation: bool = True
    skip_validations: bool = False
    disable_speculative_decoding: bool = False
    hot_load_transition_type: TransitionType | None = None
    wait_for_trainer_before_deployment: bool = False
    snapshot_dtype: SnapshotDtype | None = None
    dialect: WireDialect | None = None

    def __post_init__(self) -> None:
        if not self.base_model:
            raise InvalidArgument("base_model is required: the resource name of the model to train")
        _at_least("lora_rank", self.lora_rank, 0)
        _at_least("replica_count", self.replica_count, 1)
        if self.max_lora_rank is not None:
            _at_least("max_lora_rank", self.max_lora_rank, 1)
            if self.lora_rank or self.lora_alpha is not None:
                raise InvalidArgument(
                    "max_lora_rank excludes lora_rank and lora_alpha: each model gets its own from "
                    "create_training_client"
                )
        if self.lora_alpha is not None and self.lora_rank == 0:
            raise InvalidArgument(
                "lora_alpha is given but lora_rank is 0 (full-parameter): give lora_rank, or leave "
                "lora_alpha out"
            )
        for name in (
            "trainer_timeout_s",
            "trainer_pending_timeout_s",
            "deployment_timeout_s",
            "hotload_timeout_s",
            "reattach_settle_timeout_s",
            "reattach_poll_interval_s",
        ):
            if not getattr(self, name) > 0:
                raise InvalidArgument(f"{name} must be more than 0 seconds")
        if not (isfinite(self.learning_rate) and self.learning_rate >= 0):
            raise InvalidArgument(
                f"learning_rate={self.learning_rate!r}: a finite number of at least 0 is needed"
            )
        for name in ("trainer_job_id", "deployment_id", "reference_trainer_job_id"):
            value = getattr(self, name)
            if value is not None and not RESOURCE_ID.fullmatch(value):
                raise InvalidArgument(
                    f"{name}={value!r}: an id has 1 to 63 characters of a-z, 0-9 and '-', and "
                    "neither starts nor ends with '-'"
                )
        one_of("hot_load_transition_type", self.hot_load_transition_type, (None, "ASYNC", "SYNC"))
        one_of(
            "cleanup_deployment_on_close",
            self.cleanup_deployment_on_close,
            (None, "delete", "scale_to_zero"),
        )
        one_of("snapshot_dtype", self.snapshot_dtype, (None, "bfloat16", "float32"))
        one_of("dialect", self.dialect, (None, "json", "protobuf"))
        if self.display_name is not None and len(self.display_name) >= 64:
            raise InvalidArgument(
                f"display_name has {len(self.display_name)} characters; at most 63 are allowed"
            )

    @property
    def alpha(self) -> int:
        """The adapter's effective scale."""
        return 32 if self.lora_alpha is None else self.lora_alpha

    @classmethod
    def from_options(cls, options: Mapping[str, Any]) -> FiretitanProvisioningConfig:
        """Check the keywords of `from_firetitan_config` and make the configuration.

        Raises:
            UnknownOption: a keyword that does not exist.
            InvalidArgument: a value out of range, or a keyword together with its alias.
            NotSupported: a keyword that this version refuses.
        """
        known = {field.name for field in fields(cls)}
        _refuse_unknown(options, known | set(ProvisioningOptions.__annotations__))
        chosen = _without_aliases(options)
        for name, reason in _REFUSED.items():
            if chosen.pop(name, None):
                raise NotSupported(f"{name}: {reason}")
        if chosen.pop("gradient_accumulation_steps", 1) != 1:
            raise InvalidArgument(
                "gradient_accumulation_steps must be 1: accumulate by calling forward_backward "
                "several times before one optim_step"
            )
        for name in _SHAPE_OWNED:
            if chosen.pop(name, None) is not None:
                warnings.warn(
                    f"{name} is ignored: the training shape decides it",
                    DeprecationWarning,
                    stacklevel=4,
                )
        if chosen.get("replica_count", 1) in (0, None):
            logger.warning("replica_count=%s: one replica is used", chosen["replica_count"])
            chosen["replica_count"] = 1
        transition = chosen.get("hot_load_transition_type")
        if isinstance(transition, str):
            chosen["hot_load_transition_type"] = transition.upper()
        for name in ("extra_args", "deployment_extra_args"):
            if name in chosen:
                chosen[name] = tuple(chosen[name] or ())
        for name in ("reference_training_shape_id", "reference_trainer_job_id"):
            chosen[name] = chosen.get(name) or None
        if "base_model" not in chosen:
            raise InvalidArgument("base_model is required: the resource name of the model to train")
        return cls(**chosen)

    @classmethod
    def for_tinker_server(
        cls,
        *,
        lora_rank: int | None,
        max_lora_rank: int | None,
        dialect: WireDialect = "protobuf",
        **options: Any,
    ) -> FiretitanProvisioningConfig:
        """The configuration of a service on a server that has the Tinker API and nothing else.

        Args:
            lora_rank: of the adapter; default 32, or with `max_lora_rank` each client's own.
            dialect: how passes are written.
            max_lora_rank, options: fields of the configuration.

        Raises:
            InvalidArgument: a rank below 1.
        """
        if lora_rank is None:
            lora_rank = 32 if max_lora_rank is None else 0
        elif lora_rank < 1:
            raise InvalidArgument(f"lora_rank={lora_rank}: a Tinker server trains adapters, from 1")
        return cls(
            lora_rank=lora_rank,
            max_lora_rank=max_lora_rank,
            create_deployment=False,
            dialect=dialect,
            **options,
        )


def _at_least(name: str, value: object, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise InvalidArgument(f"{name}={value!r}: an integer of at least {least} is needed")


def _refuse_unknown(options: Mapping[str, Any], known: Iterable[str]) -> None:
    names = sorted(known)
    for name in options:
        if name not in names:
            near = difflib.get_close_matches(name, names, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are: {', '.join(names)}"
            raise UnknownOption(f"unknown keyword {name!r}: {hint}")


def _without_aliases(options: Mapping[str, Any]) -> dict[str, Any]:
    chosen: dict[str, Any] = {}
    spelt: dict[str, str] = {}
    for name, value in options.items():
        canonical = _ALIASES.get(name, name)
        if canonical in spelt:
            raise InvalidArgument(
                f"{spelt[canonical]!r} and {name!r} mean the same: give one of them"
            )
        spelt[canonical] = name
        chosen[canonical] = value
    return chosen


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Holds the platform's URLs and key; the repr hides the key.

    Attributes:
        base_url: an http(s) URL without a trailing slash, or "local" / "local:/path".
        api_key: None only for an embedded platform.
        tinker_only: whether it is a Tinker server, with a trainer's routes and no control plane.
    """

    base_url: str
    api_key: str | None
    inference_url: str | None = None
    hotload_api_url: str | None = None
    trainer_gateway_url: str | None = None
    tinker_only: bool = False

    def __repr__(self) -> str:
        return f"Endpoint({self.base_url!r})"

    @property
    def embedded(self) -> bool:
        """Whether this process starts the platform, and stops it."""
        return self.base_url == "local" or self.base_url.startswith("local:")

    @property
    def state_dir(self) -> str | None:
        """The folder of `local:/path`; None for temporary state."""
        return self.base_url.removeprefix("local:") if ":" in self.base_url else None


def checked_key(key: str, source: str = "api_key") -> str:
    """Check that a key can be sent in a header; it is never repeated.

    Args:
        source: where it came from, for the message.

    Raises:
        InvalidArgument: it holds blanks, line ends or characters outside ASCII.
    """
    if not isinstance(cast(object, key), str):
        raise InvalidArgument(f"{source} must be a string, got {type(key).__name__}")
    if key != key.strip():
        wrong = "begins or ends with a blank or a line end"
    elif not key.isascii():
        wrong = "holds a character outside ASCII (typographic quotes?)"
    elif not key.isprintable() or any(sign in " \"'" for sign in key):
        wrong = "holds a blank, a line end, a quote or a control character"
    else:
        return key
    raise InvalidArgument(f"{source} {wrong}: copy the key alone, without what stands around it")


def checked_url(name: str, url: str) -> str:
    """Check the URL of a host; gives it without a trailing slash.

    Raises:
        InvalidArgument: it is no http(s) URL, holds a user name or password, has a query, or ends
            with the version that the SDK adds itself.
    """
    bare = url.rstrip("/")
    if not _URL.match(bare):
        raise InvalidArgument(f"{name}: an http(s) URL of a host is needed, such as {EXAMPLE_URL}")
    try:
        parts = urlsplit(bare)
        port = parts.port
    except ValueError:
        raise InvalidArgument(f"{name} is no URL: its port must be a number") from None
    if "@" in parts.netloc:
        raise InvalidArgument(
            f"{name} holds a user name or password: leave them out, and pass api_key="
        )
    if port == 0 or not parts.hostname or any(sign.isspace() for sign in bare):
        raise InvalidArgument(f"{name} is no URL of a host; one is {EXAMPLE_URL}")
    if parts.query or parts.fragment:
        raise InvalidArgument(f"{name} has a query or a fragment: leave out what follows the path")
    for version in ("/inference/v1", "/api/v1", "/v1"):
        if parts.path.endswith(version):
            raise InvalidArgument(
                f"{name} ends with {version}, which the SDK adds itself: pass "
                f"{bare.removesuffix(version)}"
            )
    return bare


def environment_proxy(url: str) -> str | None:
    """Find the proxy for a URL: HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, less NO_PROXY.

    Raises:
        InvalidArgument: the proxy's own scheme is neither http nor https.
    """
    from urllib.request import getproxies, proxy_bypass  # not needed to build a service

    parts = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(parts.netloc):
        return None
    if "://" not in proxy:
        proxy = "http://" + proxy
    scheme = proxy.partition("://")[0]
    if scheme not in ("http", "https"):
        raise InvalidArgument(
            f"the environment's proxy for {parts.scheme} has the scheme {scheme[:20]!r}; http and "
            "https are supported. NO_PROXY lists hosts that need none"
        )
    return proxy


def certificate_file() -> str | None:
    """Find the file of certificates to trust, `SSL_CERT_FILE`; None if it is not set.

    Raises:
        InvalidArgument: there is no such file.
    """
    name = os.environ.get("SSL_CERT_FILE")
    if name and not Path(name).is_file():
        raise InvalidArgument(f"SSL_CERT_FILE={name!r}: there is no such file")
    return name or None


def cloudflare_headers() -> dict[str, str]:
    """Make the headers of Cloudflare Access, from the two variables of the official client.

    Raises:
        InvalidArgument: one of the two can't be sent in a header.
    """
    names = {
        "CF-Access-Client-Id": "CLOUDFLARE_ACCESS_CLIENT_ID",
        "CF-Access-Client-Secret": "CLOUDFLARE_ACCESS_CLIENT_SECRET",
    }
    values = {header: os.environ.get(name, "") for header, name in names.items()}
    if not all(values.values()):
        return {}
    return {header: checked_key(values[header], name) for header, name in names.items()}


def environment_api_key() -> str | None:
    """Read `FIREWORKS_API_KEY`; None if it is not set."""
    return os.environ.get("FIREWORKS_API_KEY") or None


def resolve_endpoint(
    *,
    base_url: str | None,
    api_key: str | None,
    inference_url: str | None = None,
    hotload_api_url: str | None = None,
) -> Endpoint:
    """Find the platform from the arguments, then the environment, then the defaults.

    The environment's key is never handed to an embedded platform.

    Raises:
        InvalidArgument: no key, or `base_url` is not a URL.
    """
    url = (base_url or os.environ.get("FIREWORKS_BASE_URL") or DEFAULT_BASE_URL).rstrip("/")
    endpoint = Endpoint(url, api_key)
    if endpoint.embedded:
        if endpoint.state_dir == "":
            raise InvalidArgument(
                "base_url='local:' names no folder: write 'local' or 'local:/path'"
            )
        return endpoint
    if not _URL.match(url):
        raise InvalidArgument(
            f"base_url={url!r} is neither an http(s) URL nor 'local' nor 'local:/path'"
        )
    url = checked_url("base_url" if base_url else "FIREWORKS_BASE_URL", url)
    key = api_key or environment_api_key()
    if not key:
        raise InvalidArgument(
            "no API key: pass api_key=, or set FIREWORKS_API_KEY (or use base_url='local', which "
            "needs none)"
        )
    checked_key(key, "api_key" if api_key else "FIREWORKS_API_KEY")
    return Endpoint(
        url,
        key,
        inference_url=inference_url,
        hotload_api_url=hotload_api_url,
        trainer_gateway_url=os.environ.get("FIREWORKS_TRAINER_GATEWAY_URL"),
    )


def resolve_tinker_server(*, base_url: str | None, api_key: str | None) -> Endpoint:
    """Find a Tinker server from the arguments, then `TINKER_BASE_URL` and `TINKER_API_KEY`.

    Raises:
        InvalidArgument: no key, or `base_url` is not a URL.
    """
    url = (base_url or os.environ.get("TINKER_BASE_URL") or "").rstrip("/")
    if not _URL.match(url):
        raise InvalidArgument(
            f"base_url={url!r}: pass the http(s) URL of a Tinker server, or set TINKER_BASE_URL"
        )
    url = checked_url("base_url" if base_url else "TINKER_BASE_URL", url)
    key = api_key or os.environ.get("TINKER_API_KEY")
    if not key:
        raise InvalidArgument("no API key: pass api_key=, or set TINKER_API_KEY")
    checked_key(key, "api_key" if api_key else "TINKER_API_KEY")
    return Endpoint(url, key, tinker_only=True)


def show_options(service: type) -> None:
    """Let `inspect.signature`, and so an editor, show each keyword of `from_firetitan_config`.

    Args:
        service: a class whose `from_firetitan_config` ends in `**options`; it stays as it is where
            it has none of its own.
    """
    method = service.__dict__.get("from_firetitan_config")
    if not isinstance(method, classmethod):
        return
    function = cast(Any, method).__func__
    plain = inspect.signature(function)
    defaults = {
        field.name: field.default
        for field in fields(FiretitanProvisioningConfig)
        if field.default is not MISSING
    }
    parameters = [p for p in plain.parameters.values() if p.kind is not p.VAR_KEYWORD]
    for name, kind in ProvisioningOptions.__annotations__.items():
        written = kind.__forward_arg__ if isinstance(kind, ForwardRef) else kind
        default = defaults.get(_ALIASES.get(name, name))
        parameters.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=written
            )
        )
    function.__signature__ = plain.replace(parameters=parameters)


def cast_options(options: ProvisioningOptions) -> Mapping[str, Any]:
    """Type the keywords as a plain mapping."""
    return cast(Mapping[str, Any], options)


def cache_dir() -> Path:
    """Find the folder for files that can be fetched again: `XDG_CACHE_HOME`, else `~/.cache`."""
    from platformdirs.unix import Unix  # not needed to build a service

    return Unix(_FOLDER).user_cache_path


def state_dir() -> Path:
    """Find the folder for files that outlive a process: `XDG_STATE_HOME`, else `~/.local/state`."""
    from platformdirs.unix import Unix

    return Unix(_FOLDER).user_state_path


def session_tags() -> list[str]:
    """Read the tags of a new trainer session from `TINKER_TAGS`, comma-separated."""
    return [tag for tag in os.environ.get("TINKER_TAGS", "").split(",") if tag]
