"""Hot loads that replicas notice late, as on a cloud: until then everything is as it was."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.local.engine.tiny_model import write_base
from tests.local.gateway.control_plane.test_hot_load import post, rows, settled
from tests.local.gateway.serving_app import make_model_folder, serving

NEVER_S = 3600.0


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return make_model_folder(tmp_path_factory.mktemp("model"))


async def test_a_load_is_not_begun_before_it_is_noticed(model_path: Path, tmp_path: Path) -> None:
    async with serving(model_path, tmp_path, lambda _: NEVER_S) as served:
        write_base(served.store, "step-1", seed=3)
        before = await rows(served)
        assert (await post(served, {"identity": "step-1"}))[0] == 200
        assert await rows(served) == before
        assert served.live.loaded_identity is None


async def test_a_noticed_load_is_made_and_no_completion_names_it(
    model_path: Path, tmp_path: Path
) -> None:
    async with serving(model_path, tmp_path, lambda _: 0.0) as served:
        write_base(served.store, "step-1", seed=3)
        await post(served, {"identity": "step-1"})
        assert (await settled(served, "step-1"))["current_snapshot_identity"] == "step-1"
        metrics = (await served.complete(prompt=[5, 6], max_tokens=2))["perf_metrics"]
        assert metrics["prompt-tokens"] == 2
        assert not [name for name in metrics if name.startswith("snapshot-")]


async def test_a_load_that_is_not_noticed_yet_holds_up_no_later_one(
    model_path: Path, tmp_path: Path
) -> None:
    waits = iter([NEVER_S, 0.0, 0.0])
    async with serving(model_path, tmp_path, lambda _: next(waits)) as served:
        for number, name in enumerate(("step-1", "step-2")):
            write_base(served.store, name, seed=number)
            await post(served, {"identity": name})
        assert (await settled(served, "step-2"))["current_snapshot_identity"] == "step-2"
        assert served.client.state.version == 1


async def test_asked_twice_it_is_one_load(model_path: Path, tmp_path: Path) -> None:
    asked: list[int] = []

    def notice_after(replica: int) -> float:
        asked.append(replica)
        return 0.02

    async with serving(model_path, tmp_path, notice_after) as served:
        write_base(served.store, "step-1", seed=3)
        for _ in range(3):
            await post(served, {"identity": "step-1"})
        await settled(served, "step-1")
        assert served.client.state.version == 1
        assert set(asked) == {0}
