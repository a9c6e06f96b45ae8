"""The settings of the platform's processes, one JSON line each.

Settings travel as one JSON line over a pipe, since arguments and environment show in `ps`. This
module knows their fields, defaults and checks; it reads no environment and starts nothing.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Literal, TypeVar, cast

from fireworks_training.errors import LocalPlatformError
from fireworks_training.local.limits import Limits

ACCOUNT = "local"
MODEL_PREFIX = f"accounts/{ACCOUNT}/models/"
JOB_PREFIX = f"accounts/{ACCOUNT}/rlorTrainerJobs/"
DEPLOYMENT_PREFIX = f"accounts/{ACCOUNT}/deployments/"
OPERATION_PREFIX = f"accounts/{ACCOUNT}/operations/"
TRAINING_SHAPE = f"accounts/{ACCOUNT}/trainingShapes/cpu"
DEPLOYMENT_SHAPE = f"accounts/{ACCOUNT}/deploymentShapes/cpu"

SHIPPED_MODEL = "tiny-qwen3"
SHIPPED_MODEL_PATH = Path(__file__).parent / "assets" / SHIPPED_MODEL

RESOURCE_ID = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?")
RESOURCE_ID_RULE = "1 to 63 of a-z, 0-9 and '-', starting and ending with a letter or digit"
MAX_SETTINGS_BYTES = 1 << 20
MOST_PACE = 100.0

OFFERS: dict[str, str] = {
    "batch-polling": "sample_use_retrieve_futures",
    "zstd": "proto_compress_fwdbwd",
}
"""What clients of the Tinker API use when `/api/v1/client/config` says so; it works regardless."""

WorkerKind = Literal["trainer", "engine"]
WorkerStart = Literal["fork", "exec"]
Output = Literal["json", "text"]

ENTRY_POINTS: dict[str, str] = {
    "trainer": "fireworks_training.local.trainer.worker:main",
    "engine": "fireworks_training.local.engine.worker:main",
}

# What a worker imports anyway and what costs seconds: paid once, before the first fork.
PRELOAD = (
    "torch",
    "transformers.models.qwen3.modeling_qwen3",
    "peft",
    "safetensors.torch",
    "aiohttp.web",
)

# Set before the interpreter starts: libraries read them at import, and a thread pool that exists
# at the fork would not exist in the child.
WORKER_ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "HF_HUB_OFFLINE": "1",
    # Large pages for large tensors where the C library can ask for them: reading 64 prompts took 53
    # instead of 74 ms.
    "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1",
    # Products that oneDNN and torch's layer over it keep prepared, one for each number of rows; the
    # usual 1024 of each came to 490 MB of an engine, and were no faster.
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "128",
    "LRU_CACHE_CAPACITY": "128",
    # CUDA's matrix products are deterministic with a workspace of their own.
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",
}


def is_resource_id(name: str) -> bool:
    """Return whether a name may be the last part of a resource: no path tricks, bounded."""
    return RESOURCE_ID.fullmatch(name) is not None


def default_worker_start() -> WorkerStart:
    """Return "fork" on Linux; elsewhere the system's libraries do not survive a fork."""
    return "fork" if sys.platform == "linux" else "exec"


def _new_key() -> str:
    return f"tml-{secrets.token_urlsafe(24)}"


@dataclass(frozen=True, slots=True)
class PlatformSettings:
    """Holds the settings of the supervisor.

    Attributes:
        host: address to listen on; loopback by default.
        port: TCP port; 0 takes a free one.
        api_key: the key that every request must carry; made when absent.
        state_dir: folder of snapshots, states and the database; None = temporary.
        models: Hugging Face directories by model id, beside the shipped model.
        embedded: end on EOF of the settings pipe, and log to a file.
        until_eof: end on EOF of standard input, which is a pipe.
        output: form of the ready message.
        worker_start: "fork" from the template, or "exec" new processes.
        entry_points: `module:function` of each worker kind; tests put small ones here.
        preload: modules that the template imports before it forks.
        limits: changes to the defaults of `limits.Limits`, in its JSON spelling.
        offers: names in `OFFERS` that clients of the Tinker API are asked to use.
        as_cloud: stand in for a cloud: no extensions, and a cloud's habits.
        cloud_pace: factor on the durations of these habits, from 0.
        trouble: seed of stray faults beside them; None = none.
    """

    host: str = "127.0.0.1"
    port: int = 0
    api_key: str = field(default_factory=_new_key, repr=False)
    state_dir: str | None = None
    models: dict[str, str] = field(default_factory=dict[str, str])
    embedded: bool = False
    until_eof: bool = False
    output: Output = "json"
    worker_start: WorkerStart = field(default_factory=default_worker_start)
    entry_points: dict[str, str] = field(default_factory=lambda: dict(ENTRY_POINTS))
    preload: tuple[str, ...] = PRELOAD
    limits: dict[str, float | None] = field(default_factory=dict[str, float | None])
    offers: tuple[str, ...] = ()
    as_cloud: bool = False
    cloud_pace: float = 1.0
    trouble: int | None = None

    def __post_init__(self) -> None:
        if not self.host:
            raise LocalPlatformError("settings: host is empty")
        if not 0 <= self.port <= 65535:
            raise LocalPlatformError(f"settings: port {self.port} is not in 0..65535")
        if not re.fullmatch(r"[!-~]{8,512}", self.api_key):
            raise LocalPlatformError(
                "settings: the API key must be 8 to 512 printable ASCII characters without spaces"
            )
        for name in self.models:
            if not is_resource_id(name):
                raise LocalPlatformError(f"settings: model name {name!r} is not {RESOURCE_ID_RULE}")
        if self.output not in ("json", "text"):
            raise LocalPlatformError(f"settings: output {self.output!r} is not 'json' or 'text'")
        if self.worker_start not in ("fork", "exec"):
            raise LocalPlatformError(
                f"settings: worker_start {self.worker_start!r} is not 'fork' or 'exec'"
            )
        Limits().changed(self.limits)
        for offer in self.offers:
            if offer not in OFFERS:
                raise LocalPlatformError(
                    f"settings: offer {offer[:80]!r} is none of {', '.join(OFFERS)}"
                )
        if not 0 <= self.cloud_pace <= MOST_PACE:
            raise LocalPlatformError(
                f"settings: cloud_pace {self.cloud_pace} is not in 0..{MOST_PACE}"
            )
        if self.trouble is not None and not self.as_cloud:
            raise LocalPlatformError("settings: trouble needs as_cloud")
        if set(self.entry_points) != set(ENTRY_POINTS):
            raise LocalPlatformError(f"settings: entry_points must name {sorted(ENTRY_POINTS)}")


@dataclass(frozen=True, slots=True)
class GatewaySettings:
    """Holds the settings of the gateway process; it inherits `socket_fd` and `lifetime_fd`."""

    socket_fd: int
    lifetime_fd: int
    host: str
    port: int
    api_key: str = field(repr=False)
    runtime_dir: str
    state_dir: str
    models: dict[str, str]
    default_model: str
    limits: dict[str, float | None] = field(default_factory=dict[str, float | None])
    offers: tuple[str, ...] = ()
    as_cloud: bool = False
    cloud_pace: float = 1.0
    trouble: int | None = None


@dataclass(frozen=True, slots=True)
class TemplateSettings:
    """Holds the settings of the template process; it inherits `socket_fd` and `lifetime_fd`."""

    socket_fd: int
    lifetime_fd: int
    runtime_dir: str
    worker_start: WorkerStart
    entry_points: dict[str, str]
    preload: tuple[str, ...]


Settings = TypeVar("Settings", PlatformSettings, GatewaySettings, TemplateSettings)

_KINDS: dict[str, tuple[type, ...]] = {
    "str": (str,),
    "int": (int,),
    "float": (int, float),
    "int | None": (int, type(None)),
    "bool": (bool,),
    "str | None": (str, type(None)),
    "dict[str, str]": (dict,),
    "dict[str, float | None]": (dict,),
    "tuple[str, ...]": (list,),
    "Output": (str,),
    "WorkerStart": (str,),
}


def dump(settings: PlatformSettings | GatewaySettings | TemplateSettings) -> bytes:
    """Return the settings as one JSON line."""
    return json.dumps(asdict(settings)).encode() + b"\n"


def parse(cls: type[Settings], line: bytes | str) -> Settings:
    """Parse the settings in one JSON line; null stands for a field's default.

    Raises:
        LocalPlatformError: not a JSON object, an unknown field, or a value of the wrong kind.
            The message holds no value of the line, since one of them is the key.
    """
    try:
        raw: object = json.loads(line)
    except ValueError:
        raise LocalPlatformError("settings: the line is not JSON") from None
    if not isinstance(raw, dict):
        raise LocalPlatformError("settings: the line is not a JSON object")
    known = {f.name: str(f.type) for f in fields(cls)}
    values: dict[str, object] = {}
    for name, value in cast(Mapping[str, object], raw).items():
        if name not in known:
            raise LocalPlatformError(f"settings: unknown field {name!r}; known: {sorted(known)}")
        if value is not None:
            values[name] = _checked(name, value, known[name])
    try:
        return cls(**values)  # type: ignore[arg-type]  # each value was checked just above
    except TypeError as error:
        raise LocalPlatformError(f"settings: {error}") from None


def _checked(name: str, value: object, kind: str) -> object:
    right = isinstance(value, _KINDS[kind]) and (kind == "bool" or not isinstance(value, bool))
    if right and kind.startswith("dict"):
        pairs = cast(Mapping[object, object], value).items()
        # The values of `limits` are checked by `Limits` itself, with a better message.
        items = (str,) if kind == "dict[str, str]" else (int, float, type(None))
        right = all(isinstance(key, str) and isinstance(item, items) for key, item in pairs)
    if right and kind.startswith("tuple"):
        texts = cast(list[object], value)
        right = all(isinstance(text, str) for text in texts)
        value = tuple(texts)
    if not right:
        raise LocalPlatformError(f"settings: field {name!r} is not of type {kind}")
    return value


def read_line(fd: int) -> bytes:
    """Read up to a newline or EOF of a blocking descriptor; nothing behind it is consumed.

    Raises:
        LocalPlatformError: the line is empty or longer than 1 MiB.
    """
    line = bytearray()
    while not line.endswith(b"\n"):
        byte = os.read(fd, 1)
        if not byte:
            break
        line += byte
        if len(line) > MAX_SETTINGS_BYTES:
            raise LocalPlatformError(f"settings: the line is over {MAX_SETTINGS_BYTES} bytes")
    if not line.strip():
        raise LocalPlatformError("settings: one JSON line is expected on the settings descriptor")
    return bytes(line)
