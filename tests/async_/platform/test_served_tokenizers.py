"""Tokenizer files of a server are taken only if they are what they are said to be."""

from __future__ import annotations

import base64
import hashlib
from pathlib import Path
from typing import Any

import pytest

from fireworks_training import FiretitanProvisioningConfig, NotFound, ProtocolError
from fireworks_training._async.platform.tokenizers import find_tokenizer, store
from tests.end_to_end.support import model_folder

CONTENT = b"{}"
TEXT = base64.b64encode(CONTENT).decode()
HASH = hashlib.sha256(
    f"tokenizer.json:{hashlib.sha256(CONTENT).hexdigest()}\n".encode()
).hexdigest()


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"files": None},
        {"files": []},
        {"files": [TEXT]},
        {"files": {}},
        {"files": {"": TEXT}},
        {"files": {"a\0b": TEXT}},
        {"files": {"x" * 300: TEXT}},
        {"files": {"../up": TEXT}},
        {"files": {".hidden": TEXT}},
        {"files": {"tokenizer.json": 5}},
        {"files": {"tokenizer.json": None}},
        {"files": {"tokenizer.json": "no base64 !"}},
        {"files": {"tokenizer.json": TEXT}, "sha256": "another"},
        {"files": {"tokenizer.json": TEXT}, "sha256": 7},
    ],
)
def test_what_is_off_is_a_typed_error_and_stores_nothing(
    answer: dict[str, Any], cache: Path
) -> None:
    with pytest.raises(ProtocolError):
        store(answer)
    assert list(cache.rglob("*.json")) == []


def test_what_is_sound_is_stored(cache: Path) -> None:
    folder = store({"files": {"tokenizer.json": TEXT}, "sha256": HASH})
    assert (folder / "tokenizer.json").read_bytes() == CONTENT


class Plane:
    async def account(self) -> str:
        return "local"

    async def tokenizer_files(self, model: str) -> dict[str, Any]:
        return {"files": {"tokenizer.json": TEXT}, "sha256": HASH}


class PlaneWithout(Plane):
    """The platform as a cloud: its account is the same, and the route is not there."""

    async def tokenizer_files(self, model: str) -> dict[str, Any]:
        raise NotFound("no such route", status=404)


async def test_where_none_is_served_the_name_counts(cache: Path) -> None:
    model = "accounts/local/models/m"
    unnamed = FiretitanProvisioningConfig(base_model=model)
    assert await find_tokenizer(PlaneWithout(), unnamed) is None  # type: ignore[arg-type]
    named = FiretitanProvisioningConfig(base_model=model, tokenizer_model=str(model_folder()))
    found = await find_tokenizer(PlaneWithout(), named)  # type: ignore[arg-type]
    assert found is not None
    assert found.vocab_size == 328


async def test_a_served_tokenizer_that_is_none_is_a_typed_error() -> None:
    config = FiretitanProvisioningConfig(base_model="accounts/local/models/m")
    with pytest.raises(ProtocolError, match="accounts/local/models/m"):
        await find_tokenizer(Plane(), config)  # type: ignore[arg-type]
