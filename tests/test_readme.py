"""Every snippet of the README runs, and its claims about commands and names hold."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import tinker
import torch
from click.testing import CliRunner

import fireworks_training
from fireworks_training import AsyncFiretitanServiceClient, FiretitanServiceClient
from fireworks_training.cli.main import main
from tests.conftest import RunningPlatform
from tests.end_to_end.support import datums, service_on

README = (Path(__file__).parent.parent / "README.md").read_text("utf-8")
SNIPPETS = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


def on(platform: RunningPlatform, snippet: str) -> str:
    """The snippet, with the session's platform in the place of an embedded one; URL, key and, on
    a cloud, which serves none, the name of the tokenizer are all that changes."""
    place = f"base_url={platform.base_url!r}, api_key={platform.api_key!r}"
    if platform.as_cloud:
        place += f", tokenizer_model={platform.tokenizer!r}"
    assert 'base_url="local"' in snippet
    return snippet.replace('base_url="local"', place)


@pytest.mark.parametrize(
    ("platform", "snippet"),
    [
        pytest.param("local", SNIPPETS[0], id="script"),
        pytest.param("local", SNIPPETS[1], id="coroutine"),
        pytest.param("as-cloud", SNIPPETS[0], id="script-as-cloud"),
        pytest.param("as-cloud", SNIPPETS[1], id="coroutine-as-cloud", marks=pytest.mark.slow),
    ],
    indirect=["platform"],
    scope="session",
)
def test_a_whole_program_runs(
    platform: RunningPlatform, snippet: str, capsys: pytest.CaptureFixture[str]
) -> None:
    exec(compile(on(platform, snippet), "README.md", "exec"), {"__name__": "__main__"})
    assert capsys.readouterr().out.count("SampledCompletion(") == 2


def test_the_custom_loss_runs(platform: RunningPlatform) -> None:
    assert len(SNIPPETS) == 9  # those of the endpoint and of losses run in tests/tito, tests/losses
    with FiretitanServiceClient.from_firetitan_config(
        base_url=platform.base_url,
        api_key=platform.api_key,
        base_model=platform.model,
        create_deployment=False,
        cleanup_trainer_on_close=True,
    ) as service:
        client = service.create_training_client()
        exec(SNIPPETS[2], {"torch": torch, "client": client, "data": datums(2)})


async def test_the_hook_prints_what_happens(
    platform: RunningPlatform, capsys: pytest.CaptureFixture[str]
) -> None:
    names: dict[str, Any] = {"model": platform.model}
    exec(on(platform, SNIPPETS[5]), names)
    await names["service"].close()
    options: dict[str, Any] = {"create_deployment": True, "on_event": names["hook"]}
    async with service_on(platform, **options) as service:
        sampler = await service.create_deployment_sampler()
        await sampler.sample_with_prompt_tokens([10, 11], n=16, max_tokens=1)
    assert "WindowEvent(" in capsys.readouterr().out


async def test_the_test_of_a_loop_runs() -> None:
    async def my_loop(service: AsyncFiretitanServiceClient, steps: int) -> None:
        client = await service.create_training_client()
        for step in range(steps):
            client.forward_backward(datums(4), "cross_entropy")
            client.optim_step(tinker.AdamParams())
            await client.weight_sync(f"step-{step}")

    names: dict[str, Any] = {"my_loop": my_loop}
    exec(SNIPPETS[6], names)
    await names["test_my_loop"]()


def test_data_checks_and_evaluations_run(
    platform: RunningPlatform, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with FiretitanServiceClient.from_firetitan_config(
        base_url=platform.base_url,
        api_key=platform.api_key,
        base_model=platform.model,
        cleanup_trainer_on_close=True,
        cleanup_deployment_on_close="delete",
    ) as service:
        client = service.create_training_client()
        saved = client.save_weights_for_sampler("step").result()
        sampler = service.create_deployment_sampler(saved.path)
        completions = sampler.sample_with_tokens(
            [{"role": "user", "content": "hi"}], n=2, max_tokens=8, logprobs=True
        ).result()
        names = {name: getattr(fireworks_training, name) for name in fireworks_training.__all__}
        names |= {"client": client, "completions": completions, "adam": tinker.AdamParams()}
        exec(SNIPPETS[3], names | {"advantages": [1.0, -1.0], "scores": [1.0, 0.0]})
    assert (tmp_path / "evaluation.jsonl").exists()


def test_the_commands_exist() -> None:
    runner = CliRunner()
    for command in set(re.findall(r"fireworks-training (\w+)", README)):
        assert runner.invoke(main, [command, "--help"]).exit_code == 0, command


def test_the_names_in_backticks_exist() -> None:
    """Outside the comparison with the other SDKs, which names theirs."""
    ours = README.split("## Compatibility")[0] + README.split("## Errors")[1]
    errors = re.findall(r"^\| `(\w+)`(?:, `(\w+)`)?(?:, `(\w+)`)?(?:, `(\w+)`)?", ours, re.M)
    names = {name for row in errors for name in row if re.fullmatch(r"[A-Z]\w+", name)}
    assert len(names) > 15
    assert names <= set(fireworks_training.__all__)


def test_the_files_it_links_to_exist() -> None:
    root = Path(__file__).parent.parent
    for target in re.findall(r"\]\((?!https?://)([^)#]+)\)", README):
        assert (root / target).exists(), target
