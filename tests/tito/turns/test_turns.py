"""What turns become: appended, realigned, a new segment; and what may carry loss."""

from __future__ import annotations

import json
import re
import zlib
from pathlib import Path
from typing import Any

import pytest

import fireworks_training
from fireworks_training import ChatTemplateRenderer, DeploymentSampler, TITOError, rollout_datum
from fireworks_training.testing import CompletionsServer
from fireworks_training.tito import (
    TITOIncrementalPrompt,
    TITOTrajectoryArtifact,
    TITOTurn,
    TrajectoryDriftPolicy,
)
from tests.tito.conftest import Sidecars
from tests.tito.support import END, Characters, ask, assistant, says, user

README = (Path(__file__).parents[3] / "README.md").read_text("utf-8")
HELLO = [user("hello")]


def turns(artifact: TITOTrajectoryArtifact) -> list[TITOTurn]:
    return [turn for segment in artifact.segments for turn in segment.turns]


def rows_are_true(artifact: TITOTrajectoryArtifact) -> None:
    """A token carries loss only where some turn sampled it after exactly the tokens before it."""
    for segment in artifact.segments:
        row = segment.tokens
        assert len(row) == len(segment.loss_mask) == len(segment.logprobs)
        for place, (carries, logprob) in enumerate(
            zip(segment.loss_mask, segment.logprobs, strict=True)
        ):
            sampled = [
                turn.inference_logprobs[place - len(turn.exact_prompt_ids)]
                for turn in segment.turns
                if turn.inference_logprobs is not None
                and place >= len(turn.exact_prompt_ids)
                and turn.exact_checkpoint_ids[: place + 1] == row[: place + 1]
            ]
            assert logprob in sampled if carries else logprob == 0


@pytest.mark.parametrize("mode", ["full_history", "incremental"])
async def test_a_history_sent_back_as_it_was_is_appended_to(
    server: CompletionsServer, sidecars: Sidecars, mode: str
) -> None:
    sidecar = await sidecars(prompt_mode=mode)
    endpoint = await sidecar.create_trajectory_async()
    server.script = [says("one"), says("two"), says("three")]
    first = await ask(endpoint, HELLO)
    # As client libraries send it back: with every field of their message class.
    back = {**first.message, "refusal": None, "tool_calls": None, "annotations": []}
    history = [*HELLO, back, user("more")]
    second = await ask(endpoint, history)
    await ask(endpoint, [*history, second.message, user("again")])
    artifact = await sidecar.finish_trajectory(endpoint.trajectory_id)
    (segment,) = artifact.segments
    assert [turn.prompt_disposition for turn in segment.turns] == [
        "new_segment",
        "append",
        "append",
    ]
    kept = [t for t, carries in zip(segment.tokens, segment.loss_mask, strict=True) if carries]
    assert kept == [*map(ord, "one"), END, *map(ord, "two"), END, *map(ord, "three"), END]
    assert [body["prompt"] for body in server.bodies] == [
        list(turn.exact_prompt_ids) for turn in segment.turns
    ]
    assert segment.tokens[0] == Characters.all_special_ids[0]
    rows_are_true(artifact)
    datum = rollout_datum(
        segment.tokens, logprobs=segment.logprobs, loss_mask=segment.loss_mask, advantages=2.0
    )
    assert datum.loss_fn_inputs["advantages"].to_numpy().sum() == 2.0 * len(kept)


async def test_text_that_tokenizes_otherwise_is_masked_or_kept_exact(
    server: CompletionsServer, sidecars: Sidecars
) -> None:
    odd = [7001, 7002]  # what the text "ab" is not encoded as
    for mode, disposition in (("full_history", "realign"), ("incremental", "append")):
        sidecar = await sidecars(prompt_mode=mode)
        endpoint = await sidecar.create_trajectory_async()
        server.script = [says("ab", odd), says("two")]
        first = await ask(endpoint, HELLO)
        await ask(endpoint, [*HELLO, first.message, user("more")])
        artifact = await sidecar.finish_trajectory(endpoint.trajectory_id)
        (segment,) = artifact.segments
        assert segment.turns[1].prompt_disposition == disposition
        kept = [t for t, carries in zip(segment.tokens, segment.loss_mask, strict=True) if carries]
        two = [*map(ord, "two"), END]
        assert kept == (two if disposition == "realign" else [*odd, END, *two])
        assert segment.turns[1].realigned_masked_tokens == (
            len(segment.turns[1].exact_prompt_ids) - len(segment.turns[0].exact_prompt_ids)
            if disposition == "realign"
            else 0
        )
        rows_are_true(artifact)


async def test_an_answer_cut_by_its_length_gets_its_end_of_turn_without_loss(
    server: CompletionsServer, sidecars: Sidecars
) -> None:
    sidecar = await sidecars(prompt_mode="incremental")
    endpoint = await sidecar.create_trajectory_async()
    server.script = [says("cut", finish="length"), says("two")]
    first = await ask(endpoint, HELLO)
    await ask(endpoint, [*HELLO, first.message, user("more")])
    artifact = await sidecar.finish_trajectory(endpoint.trajectory_id)
    cut, second = turns(artifact)
    assert second.incremental_junction_kind == "added_end_of_turn"
    at = len(cut.exact_checkpoint_ids)
    assert second.exact_prompt_ids[at] == END
    assert not artifact.segments[0].loss_mask[at]
    rows_are_true(artifact)


@pytest.mark.parametrize(
    ("edited", "reason", "kind"),
    [
        ([user("hullo"), assistant("one"), user("more")], "history_rewrite", "prior_context"),
        ([*HELLO, assistant("uno"), user("more")], "history_rewrite", "assistant_roundtrip"),
        (HELLO, "history_rewrite", "truncated"),
    ],
    ids=["context", "answer", "truncated"],
)
async def test_an_edited_history_starts_anew_or_is_rejected(
    server: CompletionsServer,
    sidecars: Sidecars,
    edited: list[dict[str, Any]],
    reason: str,
    kind: str,
) -> None:
    server.otherwise = says("one")
    sidecar = await sidecars()
    endpoint = await sidecar.create_trajectory_async()
    strict = await sidecar.create_trajectory_async(
        drift_policy=TrajectoryDriftPolicy(on_other_mismatch="reject")
    )
    for each in (endpoint, strict):
        await ask(each, HELLO)
    assert (await ask(endpoint, edited)).status == 200
    refused = await ask(strict, edited)
    assert (refused.status, refused.code) == (409, "tito_lineage_divergence")
    going_on = await ask(strict, [*HELLO, assistant("one"), user("more")])
    assert going_on.status == 200

    artifact = await sidecar.finish_trajectory(endpoint.trajectory_id)
    first, second = artifact.segments
    assert (first.closed_reason, second.start_reason) == (reason, reason)
    assert artifact.metrics.counters[f"lineage/history_rewrite_{kind}"] == 1
    rows_are_true(artifact)
    (one,) = (await sidecar.finish_trajectory(strict.trajectory_id)).segments
    assert [turn.prompt_disposition for turn in one.turns] == ["new_segment", "append"]


class Forgetful(Characters):
    """A template that writes earlier answers shorter than they were, as those of reasoners do."""

    def shown(self, message: dict[str, Any]) -> str:
        return str(message["content"]).rpartition("</think>")[2]


async def test_a_drift_that_masks_too_much_starts_a_new_segment(
    server: CompletionsServer, sidecars: Sidecars
) -> None:
    server.otherwise = says("<think>long thoughts</think>42")
    for bound, segments in ((1024, 1), (3, 2)):
        sidecar = await sidecars(
            renderer=ChatTemplateRenderer(Forgetful()),
            default_drift_policy=TrajectoryDriftPolicy(max_masked_tokens=bound),
        )
        endpoint = await sidecar.create_trajectory_async()
        first = await ask(endpoint, HELLO)
        await ask(endpoint, [*HELLO, first.message, user("why")])
        artifact = await sidecar.finish_trajectory(endpoint.trajectory_id)
        assert len(artifact.segments) == segments
        assert segments == 1 or artifact.segments[1].start_reason == "token_drift"
        rows_are_true(artifact)


async def test_other_tools_are_another_segment(
    server: CompletionsServer, sidecars: Sidecars
) -> None:
    server.otherwise = says("one")
    sidecar = await sidecars(prompt_mode="incremental")
    endpoint = await sidecar.create_trajectory_async()
    first = await ask(endpoint, HELLO)
    tool = {"type": "function", "function": {"name": "look", "parameters": {}}}
    await ask(endpoint, [*HELLO, first.message, user("more")], tools=[tool])
    artifact = await sidecar.finish_trajectory(endpoint.trajectory_id)
    assert [segment.start_reason for segment in artifact.segments] == ["initial", "contract_change"]
    assert turns(artifact)[1].incremental_fallback_reason == "contract_change"


class Liar(ChatTemplateRenderer):
    """Says that it continues the tokens so far, and does not."""

    def prepare_incremental_prompt(self, *arguments: Any) -> TITOIncrementalPrompt:
        return TITOIncrementalPrompt((5, 6, 7), "liar", "none")


async def test_a_renderer_that_drops_exact_tokens_is_caught(
    server: CompletionsServer, sidecars: Sidecars
) -> None:
    server.otherwise = says("one")
    sidecar = await sidecars(renderer=Liar(Characters()), prompt_mode="incremental")
    endpoint = await sidecar.create_trajectory_async()
    first = await ask(endpoint, HELLO)
    answer = await ask(endpoint, [*HELLO, first.message, user("more")])
    assert (answer.status, answer.code) == (500, "tito_renderer_contract_error")
    artifact = await sidecar.finish_trajectory(endpoint.trajectory_id)
    assert len(turns(artifact)) == 1


@pytest.mark.parametrize("kept", [True, False])
async def test_tool_calls_come_back_as_calls_and_their_tokens_stay(
    server: CompletionsServer, sidecars: Sidecars, kept: bool
) -> None:
    call = '<tool_call>\n{"name": "look", "arguments": {"b": 1, "a": "x"}}\n</tool_call>'
    server.script = [says(f"Let me see.{call}"), says("done"), says("<tool_call>{oops</tool_call>")]
    sidecar = await sidecars(
        prompt_mode="incremental",
        max_output_tokens=200,
        malformed_answers="content" if kept else "discard",
    )
    endpoint = await sidecar.create_trajectory_async()
    tools = [{"type": "function", "function": {"name": "look"}}]
    first = await ask(endpoint, HELLO, tools=tools)
    assert first.body["choices"][0]["finish_reason"] == "tool_calls"
    (made,) = first.message["tool_calls"]
    assert made["function"] == {"name": "look", "arguments": '{"b": 1, "a": "x"}'}
    # Sent back in other spacing, with a streaming index: the same history still.
    made = {**made, "index": 0}
    made["function"] = {"name": "look", "arguments": '{ "b": 1, "a": "x" }'}
    back = {**first.message, "tool_calls": [made]}
    result = {"role": "tool", "tool_call_id": made["id"], "content": "seen"}
    second = await ask(endpoint, [*HELLO, back, result], tools=tools)
    assert second.message["content"] == "done"
    third = await ask(endpoint, [*HELLO, back, result, second.message, user("again")], tools=tools)
    if kept:
        assert third.message == {"role": "assistant", "content": "<tool_call>{oops</tool_call>"}
        assert third.body["tito"] == {
            "parser_fallback": True,
            "parser_reason_code": "tool_call_json",
        }
        artifact = await sidecar.finish_trajectory(endpoint.trajectory_id)
        assert artifact.status == "completed"
        assert [turn.parser_fallback for turn in turns(artifact)] == [False, False, True]
        assert turns(artifact)[2].assistant.fallback_reason == "tool_call_json"
        assert artifact.metrics.counters["calls/parser_fallback_tool_call_json"] == 1
        (row,) = artifact.segments  # the broken call has its place in the loss
        assert sum(row.loss_mask) == sum(len(t.exact_completion_ids) for t in row.turns)
        rows_are_true(artifact)
        return
    assert (third.status, third.code) == (422, "tito_sdk_parse_error")
    assert third.body["error"]["parser_reason_code"] == "tool_call_json"
    # What was sampled can't be told any more: nothing goes on, and the trajectory has failed.
    assert (await ask(endpoint, HELLO)).code == "tito_sdk_parse_error"
    artifact = await sidecar.finish_trajectory(endpoint.trajectory_id)
    assert (artifact.status, artifact.terminal_reason) == ("failed", "tito_sdk_parse_error")
    assert [call.outcome for call in artifact.calls][:3] == [
        "succeeded",
        "succeeded",
        "model_malformed",
    ]
    rows_are_true(artifact)


async def test_auxiliary_calls_are_answered_and_leave_no_tokens(
    server: CompletionsServer, sidecars: Sidecars, caplog: pytest.LogCaptureFixture
) -> None:
    server.otherwise = says("one")
    sidecar = await sidecars(
        call_classifier=lambda request: request.adapter_metadata.get("kind", "policy")
    )
    endpoint = await sidecar.create_trajectory_async()
    await ask(endpoint, HELLO)
    aside = await ask(endpoint, [user("a title?")], _tito={"kind": "auxiliary"})
    assert aside.message["content"] == "one"
    await ask(endpoint, [*HELLO, assistant("one"), user("more")], _tito={"kind": "nonsense"})
    artifact = await sidecar.finish_trajectory(endpoint.trajectory_id)
    assert len(turns(artifact)) == 2
    assert [call.kind for call in artifact.calls] == ["policy", "auxiliary", "policy"]
    assert artifact.calls[2].classification_source == "classifier_failed"
    (said,) = [line for line in caplog.messages if "call_classifier" in line]
    assert "gave neither" in said


async def test_the_readmes_snippet_runs(
    server: CompletionsServer, sampler: DeploymentSampler
) -> None:
    (snippet,) = [s for s in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if "TITO" in s]
    server.otherwise = says("one")

    async def agent(base_url: str, api_key: str) -> float:
        import aiohttp

        async with (
            aiohttp.ClientSession() as session,
            session.post(
                f"{base_url}/chat/completions",
                json={"messages": HELLO},
                headers={"Authorization": f"Bearer {api_key}"},
            ) as answer,
        ):
            return 1.0 if answer.status == 200 else 0.0

    names: dict[str, Any] = {n: getattr(fireworks_training, n) for n in fireworks_training.__all__}
    names |= {"sampler": sampler, "tokenizer": Characters(), "agent": agent}
    body = "".join(f"    {line}\n" for line in [*snippet.splitlines(), "return data"])
    exec(f"async def rollout():\n{body}", names)
    (datum,) = await names["rollout"]()
    assert datum.loss_fn_inputs["advantages"].to_numpy().sum() == 4.0


@pytest.mark.parametrize("damage", [b"", b"TITOART\x01no", b"TITOART\x02"])
async def test_an_artifact_survives_a_file(
    server: CompletionsServer, sidecars: Sidecars, damage: bytes
) -> None:
    server.otherwise = says("öne")
    sidecar = await sidecars()
    endpoint = await sidecar.create_trajectory_async(metadata={"task": [1, {"a": None}]})
    first = await ask(endpoint, HELLO, top_p=1.0)
    await ask(endpoint, [*HELLO, first.message, user("more")])
    artifact = await sidecar.finish_trajectory(endpoint.trajectory_id)
    data = artifact.pack()
    again = TITOTrajectoryArtifact.unpack(data)
    assert again == artifact
    assert again.pack() == data
    raw = json.loads(zlib.decompress(data[8:]))
    turn = raw["segments"][0]["turns"][0]
    turn["routing_matrices"] = [[1]]  # the other SDK's, as is its flag for what is named here
    turn["server_metrics"]["transport_error"] = False
    theirs = TITOTrajectoryArtifact.unpack(data[:8] + zlib.compress(json.dumps(raw).encode()))
    read = theirs.segments[0].turns[0]
    assert read.routing_matrices == [[1]]
    assert read.server_metrics is not None
    assert read.server_metrics.transport_error is None
    turn["exact_prompt_ids"] = "sesame"
    with pytest.raises(TITOError, match=r"turns\.0\.exact_prompt_ids") as wrong:
        TITOTrajectoryArtifact.unpack(data[:8] + zlib.compress(json.dumps(raw).encode()))
    assert "sesame" not in str(wrong.value)
    for broken in (damage, data[:-4]):
        with pytest.raises(TITOError) as caught:
            TITOTrajectoryArtifact.unpack(broken)
        assert caught.value.code == "tito_artifact_invalid"
