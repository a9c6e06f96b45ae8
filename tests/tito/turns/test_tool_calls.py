"""Tool calls under real chat templates: the model reads them as it wrote them, and is trained."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

import fireworks_training
from fireworks_training import ChatTemplateRenderer
from fireworks_training.testing import CompletionsServer
from tests.tito.conftest import Sidecars
from tests.tito.support import Answer, ask, says, user

SHIPPED = Path(fireworks_training.__file__).parent / "local/assets/tiny-qwen3"
TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {"type": "object"}}}]

# A ChatML template in four parts, to be varied where published ones differ.
HEAD = (
    "{%- set ns = namespace(name='unknown') %}"
    "{%- if tools %}{{- '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{%- endif %}"
    "{%- for m in messages %}{%- if m.role == 'assistant' %}"
    "{{- '<|im_start|>assistant\n' }}CONTENT"
    "{%- for c in m.tool_calls or [] %}{%- set ns.name = c.function.name %}"
)
CALL = (
    '{{- \'<tool_call>\n{"name": "\' + c.function.name + \'", "arguments": \' }}ARGUMENTS'
    "{{- '}\n</tool_call>' }}{%- endfor %}{{- '<|im_end|>\n' }}"
)
TAIL = (
    "{%- elif m.role == 'tool' %}TOOL{%- else %}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}"
)
AS_JSON = "{{- c.function.arguments | tojson }}"
TEXT_OR_JSON = (
    "{%- if c.function.arguments is string %}{{- c.function.arguments }}"
    "{%- else %}{{- c.function.arguments | tojson }}{%- endif %}"
)
WALKED = (
    "{{- '{' }}{%- for k, v in c.function.arguments.items() %}"
    "{{- '\"' + k + '\": ' + v | tojson }}{%- if not loop.last %}{{- ', ' }}{%- endif %}"
    "{%- endfor %}{{- '}' }}"
)
PLAIN_RESULT = (
    "{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}"
)
NAMED_RESULT = "{{- '<|im_start|>tool ' + ns.name + '\n' + m.content + '<|im_end|>\n' }}"
CALLS_ALONE = "{%- if not m.tool_calls %}{{- m.content or '' }}{%- endif %}"


def tokenizer(
    arguments: str = AS_JSON, result: str = PLAIN_RESULT, content: str = "{{- m.content or '' }}"
) -> Any:
    made: Any = AutoTokenizer.from_pretrained(SHIPPED)  # pyright: ignore[reportUnknownMemberType]
    whole = HEAD.replace("CONTENT", content) + CALL.replace("ARGUMENTS", arguments)
    made.chat_template = whole + TAIL.replace("TOOL", result)
    return made


def decoded(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The conversation as templates of transformers take it: arguments as objects."""
    made = copy.deepcopy(messages)
    for call in (call for message in made for call in message.get("tool_calls") or ()):
        call["function"]["arguments"] = json.loads(call["function"]["arguments"])
    return made


def sampled(tok: Any, text: str) -> Any:
    ids = tok.encode(text, add_special_tokens=False)
    return says(text, [*ids, tok.convert_tokens_to_ids("<|im_end|>")], finish="length")


async def conversation(
    server: CompletionsServer, sidecars: Sidecars, tok: Any, mode: str, arguments: str
) -> tuple[Any, list[dict[str, Any]]]:
    """A call, its result and an answer; gives the artifact and the messages."""
    call = f'<tool_call>\n{{"name": "look", "arguments": {arguments}}}\n</tool_call>'
    server.script = [sampled(tok, call), sampled(tok, "Warm.")]
    sidecar = await sidecars(
        renderer=ChatTemplateRenderer(tok),
        prompt_mode=mode,
        max_context_tokens=4000,
        max_output_tokens=400,
    )
    endpoint = await sidecar.create_trajectory_async()
    messages = [user("Weather?")]
    first = await ask(endpoint, messages, tools=TOOLS)
    (made,) = first.message["tool_calls"]
    result = {"role": "tool", "tool_call_id": made["id"], "content": "24 C"}
    messages = [*messages, first.message, result]
    await ask(endpoint, messages, tools=TOOLS)
    return await sidecar.finish_trajectory(endpoint.trajectory_id), messages


@pytest.mark.parametrize("mode", ["full_history", "incremental"])
@pytest.mark.parametrize(
    ("arguments", "result", "content"),
    [
        (AS_JSON, PLAIN_RESULT, "{{- m.content or '' }}"),
        (TEXT_OR_JSON, PLAIN_RESULT, "{{- m.content or '' }}"),
        (WALKED, PLAIN_RESULT, "{{- m.content or '' }}"),
        (AS_JSON, NAMED_RESULT, "{{- m.content or '' }}"),
        (AS_JSON, NAMED_RESULT, CALLS_ALONE),
    ],
    ids=["tojson", "text-or-json", "walked", "named-result", "calls-alone"],
)
@pytest.mark.parametrize("written", ['{"city": "Rome", "days": 2}', '{"b": 1, "a": {"z": [1, 2]}}'])
async def test_the_next_prompt_is_what_the_template_gives_and_every_token_is_trained(
    server: CompletionsServer,
    sidecars: Sidecars,
    mode: str,
    arguments: str,
    result: str,
    content: str,
    written: str,
) -> None:
    tok = tokenizer(arguments, result, content)
    artifact, messages = await conversation(server, sidecars, tok, mode, written)
    # The judge is transformers: the same conversation, its arguments as objects.
    wanted = tok.apply_chat_template(
        decoded(messages), add_generation_prompt=True, return_dict=False, tools=TOOLS
    )
    assert server.bodies[1]["prompt"] == list(wanted)
    (segment,) = artifact.segments
    assert [t.prompt_disposition for t in segment.turns] == ["new_segment", "append"]
    assert sum(segment.loss_mask) == sum(len(t.exact_completion_ids) for t in segment.turns)


async def test_an_agent_that_sorts_the_arguments_changes_nothing(
    server: CompletionsServer, sidecars: Sidecars
) -> None:
    tok = tokenizer()
    call = '<tool_call>\n{"name": "look", "arguments": {"b": 1, "a": 2}}\n</tool_call>'
    server.script = [sampled(tok, call), sampled(tok, "Done.")]
    sidecar = await sidecars(
        renderer=ChatTemplateRenderer(tok), max_context_tokens=4000, max_output_tokens=400
    )
    endpoint = await sidecar.create_trajectory_async()
    first = await ask(endpoint, [user("Go")], tools=TOOLS)
    back = copy.deepcopy(first.message)
    back["tool_calls"][0]["function"]["arguments"] = '{"a":2,"b":1}'
    result = {"role": "tool", "tool_call_id": back["tool_calls"][0]["id"], "content": "x"}
    await ask(endpoint, [user("Go"), back, result], tools=TOOLS)
    artifact = await sidecar.finish_trajectory(endpoint.trajectory_id)
    (segment,) = artifact.segments
    assert sum(segment.loss_mask) == sum(len(t.exact_completion_ids) for t in segment.turns)


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ('<tool_call>\n{"name": "look", "arguments": {"a"\n</tool_call>', "tool_call_json"),
        ('<tool_call>\n{"name": "look", "argum', "tool_call_open"),
        ('<tool_call>\n{"arguments": {}}\n</tool_call>', "tool_call_json"),
        ('<tool_call>\n{"name": 5, "arguments": {}}\n</tool_call>', "tool_call_json"),
        ('<tool_call>\n{"name": "look", "arguments": [1]}\n</tool_call>', "tool_call_json"),
        ("<tool_call>\nlook\n</tool_call>", "tool_call_json"),
    ],
)
@pytest.mark.parametrize("mode", ["full_history", "incremental"])
async def test_a_broken_call_is_an_answer_in_words_whose_tokens_are_trained(
    server: CompletionsServer, sidecars: Sidecars, answer: str, reason: str, mode: str
) -> None:
    tok = tokenizer()
    good = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
    server.script = [sampled(tok, good), sampled(tok, answer), sampled(tok, "Sorry.")]
    sidecar = await sidecars(
        renderer=ChatTemplateRenderer(tok),
        prompt_mode=mode,
        max_context_tokens=4000,
        max_output_tokens=400,
    )
    endpoint = await sidecar.create_trajectory_async()
    messages = [user("Go")]
    answers: list[Answer] = []
    for new in (lambda last: [], _result, lambda last: [user("That was no call.")]):
        messages = [*messages, *(new(answers[-1].message) if answers else [])]
        answers.append(await ask(endpoint, messages, tools=TOOLS))
        messages = [*messages, answers[-1].message]
    assert answers[1].message == {"role": "assistant", "content": answer}
    assert answers[1].body["tito"]["parser_reason_code"] == reason
    artifact = await sidecar.finish_trajectory(endpoint.trajectory_id)
    assert artifact.status == "completed"
    (segment,) = artifact.segments
    assert [t.parser_fallback for t in segment.turns] == [False, True, False]
    assert sum(segment.loss_mask) == sum(len(t.exact_completion_ids) for t in segment.turns)


def _result(last: dict[str, Any]) -> list[dict[str, Any]]:
    (call,) = last["tool_calls"]
    return [{"role": "tool", "tool_call_id": call["id"], "content": "seen"}]


@pytest.mark.parametrize("ignoring", [True, False])
async def test_a_template_that_ignores_tools_is_reported_once(
    server: CompletionsServer,
    sidecars: Sidecars,
    caplog: pytest.LogCaptureFixture,
    ignoring: bool,
) -> None:
    tok = tokenizer()
    if ignoring:
        tok.chat_template = tok.chat_template.replace("if tools", "if false")
    server.otherwise = sampled(tok, "one")
    sidecar = await sidecars(
        renderer=ChatTemplateRenderer(tok), max_context_tokens=4000, max_output_tokens=400
    )
    with caplog.at_level(logging.WARNING, "fireworks_training.tito"):
        for _ in range(2):
            endpoint = await sidecar.create_trajectory_async()
            await ask(endpoint, [user("Go")], tools=TOOLS)
    told = [r for r in caplog.records if "writes nothing of the 1 tools" in r.getMessage()]
    assert len(told) == ignoring


async def test_with_tool_choice_none_a_call_is_text(
    server: CompletionsServer, sidecars: Sidecars
) -> None:
    tok = tokenizer()
    call = '<tool_call>\n{"name": "look", "arguments": {}}\n</tool_call>'
    server.otherwise = sampled(tok, call)
    sidecar = await sidecars(
        renderer=ChatTemplateRenderer(tok), max_context_tokens=4000, max_output_tokens=400
    )
    endpoint = await sidecar.create_trajectory_async()
    answer = await ask(endpoint, [user("Go")], tools=TOOLS, tool_choice="none")
    assert answer.message == {"role": "assistant", "content": call}
    assert "tito" not in answer.body
