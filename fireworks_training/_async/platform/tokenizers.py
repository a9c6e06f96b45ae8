"""Loads the tokenizer of a service: the platform's own where it serves one, else one by name.

Files that a platform serves are cached by their hash, so that a changed tokenizer gets a new
folder. It knows the control plane and the cache, and no chat templates.
"""

from __future__ import annotations

import base64
import hashlib
import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from fireworks_training._async.control_plane.client import AsyncControlPlane
from fireworks_training._async.runtime.threads import in_thread
from fireworks_training.config import FiretitanProvisioningConfig, cache_dir
from fireworks_training.errors import NotFound, ProtocolError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


_FILE_NAME = re.compile(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,127}")

LOCAL_ACCOUNT = "local"
"""The account of the local platform, which may serve the tokenizers of its models."""


async def load(source: str | Path) -> PreTrainedTokenizerBase:
    """Load a tokenizer by name or folder, in a thread: importing transformers takes seconds."""

    def work() -> PreTrainedTokenizerBase:
        from transformers import AutoTokenizer

        auto = cast(Any, AutoTokenizer)
        return cast("PreTrainedTokenizerBase", auto.from_pretrained(str(source)))

    return await in_thread(work)


async def find_tokenizer(
    plane: AsyncControlPlane, config: FiretitanProvisioningConfig
) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer of a service's model: what the platform serves, else `tokenizer_model`.

    Returns:
        The tokenizer; None where the platform serves none and no `tokenizer_model` was given.

    Raises:
        ProtocolError: what the platform serves is no tokenizer.
    """
    served = await _served(plane, config.base_model)
    if served is not None:
        # The name that a script gives is ignored: only the served model's own tokenizer fits.
        try:
            return await load(store(served))
        except ProtocolError:
            raise
        except Exception as error:  # transformers raises anything
            raise ProtocolError(
                f"the tokenizer that the platform serves for {config.base_model} can't be loaded "
                f"({type(error).__name__}); pass tokenizer= to the sampler",
                cause=error,
            ) from error
    return None if config.tokenizer_model is None else await load(config.tokenizer_model)


async def _served(plane: AsyncControlPlane, model: str) -> Mapping[str, Any] | None:
    """Fetch the tokenizer's files; None where the platform serves none, as no cloud does."""
    if await plane.account() != LOCAL_ACCOUNT:
        return None
    try:
        return await plane.tokenizer_files(model)
    except NotFound:
        return None


def _served_files(answer: Mapping[str, Any]) -> dict[str, bytes]:
    listed: object = answer.get("files")
    if not isinstance(listed, dict) or not listed:
        raise ProtocolError("the platform serves a tokenizer without files")
    files: dict[str, bytes] = {}
    told = hashlib.sha256()
    for name, text in cast(dict[str, object], listed).items():
        if not _FILE_NAME.fullmatch(name):
            raise ProtocolError(f"the platform serves a tokenizer file with the name {name[:80]!r}")
        try:
            files[name] = base64.b64decode(cast(str, text), validate=True)
        except (ValueError, TypeError):
            raise ProtocolError(f"the tokenizer's file {name} is served as no base64") from None
        told.update(f"{name}:{hashlib.sha256(files[name]).hexdigest()}\n".encode())
    if answer.get("sha256") not in (None, told.hexdigest()):
        raise ProtocolError("the tokenizer's files are not those of the hash that is told")
    return files


def store(answer: Mapping[str, Any]) -> Path:
    """Put served tokenizer files into the cache; gives their folder.

    Raises:
        ProtocolError: there are none, a file has a name that is not allowed, or is no base64, or
            the files are not those of the hash that is told.
    """
    files = _served_files(answer)
    digest = hashlib.sha256()
    for name in sorted(files):
        digest.update(name.encode() + b"\0" + files[name])
    folder = cache_dir() / "tokenizers" / digest.hexdigest()
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as temporary:
            made = Path(temporary) / "files"
            made.mkdir()
            for name, content in files.items():
                (made / name).write_bytes(content)
            try:
                os.rename(made, folder)  # noqa: PTH104 - must fail, not merge, if it is there
            except OSError:
                if not folder.is_dir():
                    raise
    return folder
