"""The keywords: accepted, or refused with a reason."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fireworks_training import (
    AsyncFiretitanServiceClient,
    FiretitanProvisioningConfig,
    InvalidArgument,
    NotSupported,
    UnknownOption,
)
from fireworks_training.config import ProvisioningOptions, cache_dir, resolve_endpoint, state_dir

MODEL = "accounts/local/models/tiny-qwen3"


def config(**options: Any) -> FiretitanProvisioningConfig:
    return FiretitanProvisioningConfig.from_options({"base_model": MODEL, **options})


def test_every_keyword_of_the_field_is_accepted_or_refused_with_a_reason() -> None:
    samples: dict[str, Any] = {"int": 1, "float": 1.0, "bool": True, "str": "x"}
    for name, annotation in ProvisioningOptions.__annotations__.items():
        kind = str(getattr(annotation, "__forward_arg__", annotation)).split("|")[0].strip()
        value = samples.get(kind)
        if name in ("base_model", "model_name") or value is None:
            continue
        said = ""
        try:
            config(**({"lora_rank": 4} if name == "lora_alpha" else {}), **{name: value})
        except (NotSupported, InvalidArgument, DeprecationWarning) as refusal:
            said = str(refusal)
        assert not said or name in said


def test_an_unknown_keyword_names_the_near_one() -> None:
    with pytest.raises(UnknownOption, match="did you mean 'learning_rate'"):
        config(learning_rat=1)
    with pytest.raises(UnknownOption, match="did you mean 'lora_rank'"):
        AsyncFiretitanServiceClient.from_firetitan_config(base_model=MODEL, lora_rnk=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    "options",
    [
        {"lora_rank": -1},
        {"lora_rank": True},
        {"lora_alpha": 8},
        {"deployment_id": "Bad_Name"},
        {"trainer_job_id": "../up"},
        {"hot_load_transition_type": "LATER"},
        {"cleanup_deployment_on_close": "burn"},
        {"display_name": "x" * 64},
        {"gradient_accumulation_steps": 2},
        {"max_lora_rank": 0},
        {"max_lora_rank": 8, "lora_rank": 4},
        {"max_lora_rank": 8, "lora_alpha": 16},
        {"reference_trainer_job_id": "No"},
        {"hotload_timeout_s": 0},
        {"snapshot_dtype": "int8"},
        {"dialect": "xml"},
        {"training_shape": "a", "training_shape_id": "b"},
        {"training_shape": "a", "training_shape_ref": "b"},
    ],
)
def test_a_wrong_value_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(InvalidArgument):
        config(**options)


@pytest.mark.parametrize(
    "options",
    [
        {"weight_sync_transport": "RDMA"},
        {"reservation_target": "x"},
        {"projection_head_dim": 1},
    ],
)
def test_what_this_version_does_not_do_is_refused(options: dict[str, Any]) -> None:
    with pytest.raises(NotSupported, match=next(iter(options))):
        config(**options)


def test_aliases_and_spellings() -> None:
    made = config(
        training_shape="s",
        trainer_id="job-1",
        deployment_replica_count=0,
        hot_load_transition_type="sync",
    )
    assert made.training_shape_id == "s"
    assert made.trainer_job_id == "job-1"
    assert made.replica_count == 1
    assert made.hot_load_transition_type == "SYNC"


def test_what_the_shape_owns_is_ignored_with_a_warning() -> None:
    with pytest.warns(DeprecationWarning, match="node_count"):
        config(node_count=2)


def test_base_model_is_required() -> None:
    with pytest.raises(InvalidArgument, match="base_model"):
        FiretitanProvisioningConfig.from_options({})


def test_project_and_double_configuration_are_refused() -> None:
    with pytest.raises(NotSupported, match="project_id"):
        AsyncFiretitanServiceClient.from_firetitan_config(base_model=MODEL, project_id="p")
    with pytest.raises(InvalidArgument, match="not both"):
        AsyncFiretitanServiceClient.from_firetitan_config(managed_config=config(), base_model=MODEL)


class TestEndpoint:
    def test_arguments_before_the_environment(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("FIREWORKS_BASE_URL", "https://from.env/")
        monkeypatch.setenv("FIREWORKS_API_KEY", "env-key")
        assert resolve_endpoint(base_url=None, api_key=None).base_url == "https://from.env"
        given = resolve_endpoint(base_url="https://given", api_key="k")
        assert (given.base_url, given.api_key) == ("https://given", "k")

    def test_the_environments_key_is_not_handed_to_an_embedded_platform(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("FIREWORKS_API_KEY", "secret-of-the-cloud")
        endpoint = resolve_endpoint(base_url="local:/somewhere", api_key=None)
        assert endpoint.embedded
        assert endpoint.api_key is None
        assert endpoint.state_dir == "/somewhere"
        assert resolve_endpoint(base_url="local", api_key=None).state_dir is None

    def test_a_key_is_never_shown(self) -> None:
        assert "k-e-y" not in repr(resolve_endpoint(base_url="https://x", api_key="k-e-y"))

    @pytest.mark.parametrize("url", ["ftp://x", "localhost:8000", "local:", "http://"])
    def test_what_is_no_url_is_refused(self, url: str) -> None:
        with pytest.raises(InvalidArgument, match="base_url"):
            resolve_endpoint(base_url=url, api_key="k")

    def test_a_cloud_needs_a_key(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("FIREWORKS_API_KEY", raising=False)
        with pytest.raises(InvalidArgument, match="FIREWORKS_API_KEY"):
            resolve_endpoint(base_url="https://x", api_key=None)


def test_folders_are_where_xdg_says_else_below_the_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "c"))
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "s"))
    name = "fireworks-training"
    assert (cache_dir(), state_dir()) == (tmp_path / "c" / name, tmp_path / "s" / name)
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("XDG_STATE_HOME", "")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_dir() == tmp_path / ".cache" / name
    assert state_dir() == tmp_path / ".local" / "state" / name
    assert list(tmp_path.iterdir()) == []  # asking makes none
