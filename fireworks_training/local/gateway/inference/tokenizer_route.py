"""`GET .../models/<m>/tokenizer`: serves a model's tokenizer to clients on other machines.

Serves a fixed list of file names from the model's directory, and nothing else of it.
"""

from __future__ import annotations

import asyncio
import base64
import hashlib
from dataclasses import dataclass
from pathlib import Path

from aiohttp import hdrs, web

from fireworks_training.local.gateway.inference.registry import UnknownModel
from fireworks_training.local.gateway.inference.serving import REGISTRY
from fireworks_training.local.gateway.web.problems import HttpProblem

# config.json names the architecture, by which the tokenizer's class is found.
FILES = (
    "added_tokens.json",
    "chat_template.jinja",
    "config.json",
    "merges.txt",
    "special_tokens_map.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
)
MAX_FILE_BYTES = 64 << 20


@dataclass(frozen=True, slots=True)
class TokenizerFiles:
    """Holds the files of one tokenizer.

    Attributes:
        files: content in base64, by name.
        sha256: over the lines `name:sha256 of the content`, in the order of names.
    """

    files: dict[str, str]
    sha256: str


CACHE: web.AppKey[dict[Path, TokenizerFiles]] = web.AppKey("tokenizers", dict)


def add_routes(app: web.Application) -> None:
    """Register the route; the app holds `REGISTRY`."""
    app[CACHE] = {}
    app.router.add_get("/v1/accounts/{account}/models/{model}/tokenizer", get_tokenizer)


def read_files(folder: Path) -> TokenizerFiles:
    """Read the tokenizer's files of a model directory. Blocks on the disk: call it in a thread.

    Raises:
        HttpProblem: 404 when there is no tokenizer.json; 413 when a file is over 64 MiB.
    """
    files: dict[str, str] = {}
    total = hashlib.sha256()
    for name in FILES:
        path = folder / name
        if not path.is_file() or not _is_of(folder, path):
            continue
        if path.stat().st_size > MAX_FILE_BYTES:
            raise HttpProblem(413, f"{name} of the tokenizer is over {MAX_FILE_BYTES} bytes")
        content = path.read_bytes()
        files[name] = base64.b64encode(content).decode()
        total.update(f"{name}:{hashlib.sha256(content).hexdigest()}\n".encode())
    if "tokenizer.json" not in files:
        raise HttpProblem(404, "the model's directory holds no tokenizer.json")
    return TokenizerFiles(files, total.hexdigest())


def _is_of(folder: Path, path: Path) -> bool:
    """Return whether a file belongs to a model's folder: a link that leads out of it does not.

    In the Hugging Face cache a folder `snapshots/<revision>` links to `blobs` beside `snapshots`.
    """
    real, home = path.resolve(), folder.resolve()
    if real.is_relative_to(home):
        return True
    return home.parent.name == "snapshots" and real.parent == home.parent.parent / "blobs"


async def get_tokenizer(request: web.Request) -> web.Response:
    """GET /v1/accounts/<a>/models/<m>/tokenizer: show `{"files": {name: base64}, "sha256",
    "model"}`.

    The hash is the ETag too, so that a client that has it is answered 304.
    """
    name = f"accounts/{request.match_info['account']}/models/{request.match_info['model']}"
    try:
        entry, notice = request.app[REGISTRY].find_model(name)
    except UnknownModel as error:
        raise HttpProblem(404, str(error)) from None
    cache = request.app[CACHE]
    if entry.path not in cache:
        cache[entry.path] = await asyncio.to_thread(read_files, entry.path)
    found = cache[entry.path]
    headers = {hdrs.ETAG: f'"{found.sha256}"', hdrs.CACHE_CONTROL: "private, no-cache"}
    if request.headers.get(hdrs.IF_NONE_MATCH) == headers[hdrs.ETAG]:
        return web.Response(status=304, headers=headers)
    return web.json_response(
        {
            "files": found.files,
            "sha256": found.sha256,
            "model": entry.name,
            "statusMessage": notice or "",
        },
        headers=headers,
    )
