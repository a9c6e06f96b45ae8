from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
import pytest
import tinker
import torch
import transformers

from fireworks_training import (
    FiretitanServiceClient,
    InvalidArgument,
    InvalidDatum,
    SampledCompletion,
    chat_datum,
    check_alignment,
    check_normalization,
    completion_datum,
    rl_datum,
    rollout_datum,
    supervised_datum,
)
from tests.conftest import RunningPlatform


def test_supervised_shifts_by_one() -> None:
    datum = supervised_datum([5, 6, 7, 8], [0, 0, 1, 2])
    assert datum.model_input.to_ints() == [5, 6, 7]
    assert datum.loss_fn_inputs["target_tokens"].tolist() == [6, 7, 8]
    assert datum.loss_fn_inputs["weights"].tolist() == [0, 1, 2]


def test_rl_puts_arrays_on_the_completion() -> None:
    datum = rl_datum([1, 2, 3], [4, 5], logprobs=[-0.5, -1.0], advantages=2.0, mask=True)
    assert datum.model_input.to_ints() == [1, 2, 3, 4]
    assert datum.loss_fn_inputs["target_tokens"].tolist() == [2, 3, 4, 5]
    assert datum.loss_fn_inputs["logprobs"].tolist() == [0, 0, -0.5, -1.0]
    assert datum.loss_fn_inputs["advantages"].tolist() == [0, 0, 2, 2]
    assert datum.loss_fn_inputs["weights"].tolist() == [0, 0, 1, 1]
    assert datum.loss_fn_inputs["logprobs"].to_numpy().dtype == np.float32


def test_lengths_are_checked() -> None:
    with pytest.raises(InvalidDatum, match="'weights' has 1 entries for 2 tokens"):
        supervised_datum([1, 2], [1])
    with pytest.raises(InvalidDatum, match="needs two"):
        supervised_datum([1], [1])
    with pytest.raises(InvalidDatum, match="'logprobs'"):
        rl_datum([1], [2, 3], logprobs=[0.0], advantages=1)
    with pytest.raises(InvalidDatum, match="'advantages'"):
        rl_datum([1], [2, 3], logprobs=[0.0, 0.0], advantages=[1.0])
    with pytest.raises(InvalidDatum, match="prompt is empty"):
        rl_datum([], [2], logprobs=[0.0], advantages=1)


class ChatML:
    """A tokenizer of one token a character, with the field's commonest template."""

    def __init__(self, *, forgets: bool = False) -> None:
        self.forgets = forgets

    def apply_chat_template(
        self,
        messages: list[dict[str, str]],
        *,
        tokenize: bool,
        add_generation_prompt: bool,
        return_dict: bool,
    ) -> list[int] | str:
        assert not return_dict
        text = ""
        for place, message in enumerate(messages):
            content = message["content"]
            if self.forgets and place < len(messages) - 1:
                content = content.replace("hm. ", "")
            text += f"<{message['role']}>{content};"
        text += "<assistant>" if add_generation_prompt else ""
        return [ord(c) for c in text] if tokenize else text


CHAT = [
    {"role": "user", "content": "a?"},
    {"role": "assistant", "content": "hm. b"},
    {"role": "user", "content": "c?"},
    {"role": "assistant", "content": "d"},
]


def trained_text(datum: tinker.Datum) -> str:
    targets = datum.loss_fn_inputs["target_tokens"].tolist()
    weights = datum.loss_fn_inputs["weights"].tolist()
    return "".join(chr(t) if w else "|" for t, w in zip(targets, weights, strict=True)).strip("|")


def test_a_conversation_trains_on_what_the_assistant_says() -> None:
    assert trained_text(chat_datum(ChatML(), CHAT)) == "d;"
    whole = trained_text(chat_datum(ChatML(), CHAT, train_on="all"))
    assert [part for part in whole.split("|") if part] == ["hm. b;", "d;"]


def test_a_template_that_writes_turns_anew_is_refused_for_all_of_them() -> None:
    assert trained_text(chat_datum(ChatML(forgets=True), CHAT)) == "d;"
    with pytest.raises(InvalidDatum, match=r"message 1.*train_on='last'"):
        chat_datum(ChatML(forgets=True), CHAT, train_on="all")


def test_a_conversation_has_to_end_with_the_assistant() -> None:
    with pytest.raises(InvalidArgument, match="last message must be the assistant's"):
        chat_datum(ChatML(), CHAT[:3])
    with pytest.raises(InvalidArgument, match="'last' or 'all'"):
        chat_datum(ChatML(), CHAT, train_on="first")  # type: ignore[arg-type]


def test_the_shipped_tokenizer_s_template(platform: RunningPlatform) -> None:
    with FiretitanServiceClient.from_firetitan_config(
        base_url=platform.base_url, api_key=platform.api_key, base_model=platform.model
    ) as service:
        tokenizer = service.get_tokenizer()
        datum = chat_datum(tokenizer, [*CHAT[2:]])
        targets = datum.loss_fn_inputs["target_tokens"].tolist()
        weights = datum.loss_fn_inputs["weights"].tolist()
    trained = [int(t) for t, w in zip(targets, weights, strict=True) if w]
    # The line break that the template writes behind it is never sampled.
    assert tokenizer.decode(trained, skip_special_tokens=False) == "d<|im_end|>"


def test_a_completion_becomes_a_datum() -> None:
    echoed = SampledCompletion(
        "x",
        [1, 2, 3, 4],
        2,
        "stop",
        2,
        inference_logprobs=[-9.0, -0.5, -1.0],
        logprobs_echoed=True,
        echoed_prompt_logprob_count=1,
    )
    datum = completion_datum(echoed, 2.0)
    assert datum.loss_fn_inputs["logprobs"].tolist() == [0, -0.5, -1.0]
    with pytest.raises(InvalidDatum, match="logprobs=True"):
        completion_datum(SampledCompletion("x", [1, 2], 1, "stop", 1), 1.0)


def sampled_at(temperature: float) -> tuple[SampledCompletion, list[float]]:
    """Two tokens, and what the trainer computes for the four of the row."""
    raw = [-0.7, -1.5]
    own = [value / temperature for value in raw]
    completion = SampledCompletion(
        "x", [1, 2, 3, 4], 2, "stop", 2, inference_logprobs=raw, sampling_logprobs=own
    )
    return completion, [-9.0, *raw]


def test_a_completion_brings_the_logprobs_that_it_was_sampled_by() -> None:
    completion, raw = sampled_at(0.5)
    datum = completion_datum(completion, 1.0)
    assert datum.loss_fn_inputs["logprobs"].tolist() == pytest.approx([0, -1.4, -3.0])
    assert check_alignment([datum], [computed(raw)]) == pytest.approx(1.1)
    aligned = check_alignment([datum], [computed(raw)], completions=[completion])
    assert aligned == pytest.approx(0, abs=1e-6)
    with pytest.raises(InvalidArgument, match="0 completions for 1 datums"):
        check_alignment([datum], [computed(raw)], completions=[])
    holes = dataclasses.replace(completion, sampling_logprobs=[-1.0, math.nan])
    with pytest.raises(InvalidDatum, match="for some tokens of the completion only"):
        completion_datum(holes, 1.0)


def test_a_completion_of_an_unknown_distribution_is_refused() -> None:
    """A server without sampling logprobs, at a temperature: the raw ones are another's."""
    completion, _ = sampled_at(0.5)
    raw_only = dataclasses.replace(completion, sampling_logprobs=None, full_distribution=False)
    with pytest.raises(InvalidDatum, match="temperature=1, top_p=1"):
        completion_datum(raw_only, 1.0)
    plain = dataclasses.replace(raw_only, full_distribution=True)
    datum = completion_datum(plain, 1.0)
    assert datum.loss_fn_inputs["logprobs"].tolist() == pytest.approx([0, -0.7, -1.5])


SCALARS = {
    "int": 2,
    "float": 2.0,
    "numpy float32": np.float32(2),
    "numpy float64": np.float64(2),
    "numpy int64": np.int64(2),
    "numpy 0-d": np.array(2.0),
    "torch": torch.tensor(2.0),
    "torch int": torch.tensor(2),
    "torch bfloat16": torch.tensor(2.0, dtype=torch.bfloat16),
    "torch with a gradient": torch.tensor(2.0, requires_grad=True),
}


@pytest.mark.parametrize("kind", SCALARS)
def test_numbers_of_python_numpy_and_torch_are_the_same(kind: str) -> None:
    value: Any = SCALARS[kind]
    pair = [value, value]
    stacked = torch.stack(pair) if isinstance(value, torch.Tensor) else np.array(pair)
    for advantages in (value, pair, stacked):
        datum = rl_datum([1, 2], [3, 4], logprobs=[-0.1, -0.2], advantages=advantages)
        assert datum.loss_fn_inputs["advantages"].tolist() == [0, 2, 2]
    row: dict[str, Any] = {"logprobs": [0, 0, -0.1, -0.2], "loss_mask": [0, 0, 1, 1]}
    for advantages in (value, [0, 0, value, value]):
        datum = rollout_datum([1, 2, 3, 4], advantages=advantages, **row)
        assert datum.loss_fn_inputs["advantages"].tolist() == [0, 2, 2]
    datum = supervised_datum([1, 2, 3], [0, *[value] * 2])
    assert datum.loss_fn_inputs["weights"].tolist() == [2, 2]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("ab", "text: tokenize"),
        ([1.0, 2.0], "whole numbers"),
        ([True, False], "whole numbers"),
        (["1", "2"], "not numbers"),
        ([[1, 2]], "the ids of one sequence"),
        ([1, [2]], "no flat sequence"),
        ({"attention_mask": [1]}, "pass its token ids"),
        ([1, -100], "negative"),
        ([None, 1], "not numbers"),
    ],
)
def test_what_is_no_list_of_token_ids_is_refused_by_name(given: Any, words: str) -> None:
    with pytest.raises(InvalidDatum, match=f"'tokens'.*{words}"):
        supervised_datum(given, [1, 1])
    with pytest.raises(InvalidDatum, match=f"'prompt_tokens'.*{words}"):
        rl_datum(given, [1], logprobs=[-1.0], advantages=1)
    with pytest.raises(InvalidDatum, match=f"'completion_tokens'.*{words}"):
        rl_datum([1], given, logprobs=[-1.0, -1.0], advantages=1)


@pytest.mark.parametrize(
    "given",
    [
        np.array([1, 2, 3], np.uint32),
        torch.tensor([1, 2, 3]),
        (1, 2, 3),
        range(1, 4),
        transformers.BatchEncoding({"input_ids": [1, 2, 3], "attention_mask": [1, 1, 1]}),
    ],
    ids=lambda given: type(given).__name__,
)
def test_token_ids_come_in_many_forms(given: Any) -> None:
    assert supervised_datum(given, [0, 1, 1]).model_input.to_ints() == [1, 2]
    datum = rl_datum(given, given, logprobs=[-1.0] * 3, advantages=1)
    assert datum.loss_fn_inputs["target_tokens"].tolist() == [2, 3, 1, 2, 3]


def test_both_values_of_mask_give_the_same_datum() -> None:
    for mask in (True, False):
        datum = rl_datum([1, 2], [3], logprobs=[-1.0], advantages=0.0, mask=mask)
        assert datum.loss_fn_inputs["weights"].tolist() == [0, 1]
        row: dict[str, Any] = {"logprobs": [0, -1.0, 0], "loss_mask": [False, True, False]}
        datum = rollout_datum([1, 2, 3], advantages=0.0, mask=mask, **row)
        assert datum.loss_fn_inputs["weights"].tolist() == [1, 0]


def test_what_is_outside_the_mask_may_be_anything() -> None:
    row: dict[str, Any] = {"loss_mask": [0, 0, 1], "logprobs": [math.nan, 7.0, -1.0]}
    datum = rollout_datum([1, 2, 3], advantages=[math.inf, math.nan, 1.0], **row)
    assert datum.loss_fn_inputs["advantages"].tolist() == [0, 1]
    assert datum.loss_fn_inputs["logprobs"].tolist() == [0, -1]
    with pytest.raises(InvalidDatum, match=r"'advantages'.*position 1"):
        rollout_datum([1, 2, 3], advantages=[0.0, 0.0, math.nan], **row)
    with pytest.raises(InvalidDatum, match=r"'loss_mask'.*neither 0 nor 1"):
        rollout_datum([1, 2, 3], logprobs=[0, 0, -1], loss_mask=[0, 0, 2], advantages=1)  # type: ignore[list-item]
    with pytest.raises(InvalidDatum, match="'weights'"):
        supervised_datum([1, 2], [0, 1e39])


class Recording(ChatML):
    """Keeps what the template was given; special tokens as `transformers` names them."""

    all_special_ids = (ord(";"),)
    eos_token_id = None

    def __init__(self, *, after: str = "") -> None:
        super().__init__()
        self.after = after
        self.seen: list[dict[str, Any]] = []

    def apply_chat_template(
        self, messages: list[dict[str, Any]], *, tokenize: bool, **options: Any
    ) -> list[int] | str:
        self.seen.append({"messages": messages, **options})
        text = "".join(f"<{m['role']}>{m['content']};{self.after}" for m in messages)
        text += "<assistant>" if options["add_generation_prompt"] else ""
        return self.encode(text) if tokenize else text

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        assert not add_special_tokens
        return [ord(c) for c in text]


class Merging(Recording):
    """A tokenizer for which the prompt's '>' and an answer's first 'd' are one token."""

    def encode(self, text: str, *, add_special_tokens: bool = False) -> list[int]:
        return [ord(c) for c in text.replace(">d", "\u00bb")]


def test_nothing_behind_the_end_of_turn_is_trained() -> None:
    whole = trained_text(chat_datum(Recording(after="\n\n"), CHAT, train_on="all"))
    assert [part for part in whole.split("|") if part] == ["hm. b;", "d;"]


def test_an_answer_that_merges_with_its_prompt_is_tokenized_apart() -> None:
    assert trained_text(chat_datum(Merging(), CHAT)) == "d;"
    datum = chat_datum(Merging(), CHAT, train_on="all")
    assert [part for part in trained_text(datum).split("|") if part] == ["hm. b;", "d;"]
    text = "".join(map(chr, datum.loss_fn_inputs["target_tokens"].tolist()))
    assert text.endswith("<assistant>d;")


def test_a_template_gets_tools_and_arguments_as_mappings() -> None:
    tokenizer = Recording()
    call: dict[str, Any] = {
        "type": "function",
        "function": {"name": "look", "arguments": '{"city": "Rome"}'},
    }
    asked: dict[str, Any] = {"role": "assistant", "content": "", "tool_calls": [call]}
    tools = [{"type": "function", "function": {"name": "look"}}]
    chat_datum(tokenizer, [CHAT[0], asked, CHAT[3]], tools=tools)
    assert all(seen["tools"] == tools for seen in tokenizer.seen)
    (given,) = tokenizer.seen[0]["messages"][1]["tool_calls"]
    assert given["function"]["arguments"] == {"city": "Rome"}
    assert call["function"]["arguments"] == '{"city": "Rome"}'  # the caller's is not touched
    tokenizer = Recording()
    chat_datum(tokenizer, CHAT)
    assert "tools" not in tokenizer.seen[0]


def test_a_conversation_is_cut_where_its_caller_says() -> None:
    whole = chat_datum(ChatML(), CHAT, train_on="all")
    assert whole.model_input.length == 47
    cut = chat_datum(ChatML(), CHAT, train_on="all", max_length=40)
    assert cut.model_input.length == 39
    with pytest.raises(InvalidDatum, match="max_length=5 cuts off all"):
        chat_datum(ChatML(), CHAT, max_length=5)
    with pytest.raises(InvalidArgument, match="max_length"):
        chat_datum(ChatML(), CHAT, max_length=1)


def test_failures_of_a_template_are_in_the_tree_and_quote_nothing() -> None:
    with pytest.raises(InvalidDatum, match=r"first 2 messages.*KeyError") as caught:
        chat_datum(ChatML(), [{"role": "user", "secret": "s3"}, CHAT[3]])
    assert isinstance(caught.value.__cause__, KeyError)
    assert "s3" not in str(caught.value)
    for wrong in ("hello", {"role": "assistant"}, ["hello"], [CHAT[0], "x"]):
        with pytest.raises(InvalidArgument, match="mapping"):
            chat_datum(ChatML(), wrong)  # type: ignore[arg-type]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused(value: float) -> None:
    with pytest.raises(InvalidDatum, match=r"'weights'.*NaN or infinite.*position 0"):
        supervised_datum([1, 2], [0, value])
    with pytest.raises(InvalidDatum, match="'logprobs'"):
        rl_datum([1], [2], logprobs=[-value], advantages=1)
    with pytest.raises(InvalidDatum, match="'advantages'"):
        rl_datum([1], [2], logprobs=[-1.0], advantages=value)


def test_probabilities_are_no_logprobs() -> None:
    with pytest.raises(InvalidDatum, match="natural logprobs, not probabilities"):
        rl_datum([1], [2], logprobs=[0.5], advantages=1)


def computed(values: list[float]) -> dict[str, tinker.TensorData]:
    return {"logprobs": tinker.TensorData.from_numpy(np.asarray(values, np.float32))}


def test_misalignment_is_told_from_drift() -> None:
    truth = [-3.0, -0.5, -2.0, -4.0, -1.0, -0.1, -5.0]
    good = rl_datum([1, 2], [3, 4, 5, 6, 7, 8], logprobs=truth[1:], advantages=1)
    output = computed(truth)
    assert check_alignment([good], [output]) == pytest.approx(0)
    drifted = computed([value - 0.8 for value in truth])
    assert check_alignment([good], [drifted]) == pytest.approx(0.8)
    shifted = rl_datum([1, 2], [3, 4, 5, 6, 7, 8], logprobs=truth[:-1], advantages=1)
    with pytest.raises(InvalidDatum, match=r"datum 1: .*moved by -1.*rl_datum") as caught:
        check_alignment([good, shifted], [output, output])
    assert caught.value.index == 1
    with pytest.raises(InvalidArgument, match="1 outputs for 2 datums"):
        check_alignment([good, good], [output])
    with pytest.raises(InvalidArgument, match="no datum has logprobs"):
        check_alignment([supervised_datum([1, 2], [0, 1])], [output])


def batch(advantage: float, count: int = 4, length: int = 20) -> list[tinker.Datum]:
    return [
        rl_datum([1], list(range(2, 2 + length)), logprobs=[-1.0] * length, advantages=sign)
        for sign in [advantage, -advantage] * (count // 2)
    ]


@pytest.mark.parametrize("normalization", ["num_loss_tokens", "num_sequences"])
@pytest.mark.parametrize(("divisor", "over"), [(80, "all tokens"), (20, "each datum's tokens")])
def test_double_normalisation_is_seen(normalization: str, divisor: int, over: str) -> None:
    divided = batch(1 / divisor)
    with pytest.raises(InvalidArgument, match=rf"{over}.*grad_accumulation_normalization=None"):
        check_normalization(divided, normalization)
    check_normalization(divided, None)
    check_normalization(divided, "none")
    check_normalization(batch(1.0), normalization)
    check_normalization(batch(0.0), normalization)
    averaged = [supervised_datum(list(range(40)), [0.0] * 20 + [1 / 20] * 20)]
    with pytest.raises(InvalidArgument, match="divided by a count already"):
        check_normalization(averaged, normalization)
    check_normalization([supervised_datum([1, 2, 3], [0, 0, 1])], normalization)


def test_small_rewards_are_let_through_with_a_word(caplog: pytest.LogCaptureFixture) -> None:
    small = [
        rl_datum([1, 2], list(range(3, 23)), logprobs=[-1.0] * 20, advantages=a)
        for a in (0.02, -0.01, 0.01, -0.02)
    ]
    check_normalization(small, "num_loss_tokens")
    assert "if these are no small rewards" in caplog.text


def test_a_divisor_that_counts_the_prompt_is_refused() -> None:
    (good,) = batch(1.0, 2)[:1]
    bare = tinker.Datum(
        model_input=good.model_input,
        loss_fn_inputs={k: v for k, v in good.loss_fn_inputs.items() if k != "weights"},
    )
    with pytest.raises(InvalidArgument, match="datum 1 has advantages and no 'weights'"):
        check_normalization([good, bare], "num_loss_tokens")
    check_normalization([good, bare], "num_sequences")
    row = rl_datum([1, 2, 3], [4, 5], logprobs=[-1.0, -1.0], advantages=1.0)
    check_normalization([row], "num_loss_tokens")
    ones = tinker.TensorData.from_numpy(np.ones(4, np.float32))
    whole = tinker.Datum(
        model_input=row.model_input, loss_fn_inputs={**row.loss_fn_inputs, "weights": ones}
    )
    with pytest.raises(InvalidArgument, match="datum 0: its 'weights' count its first 2"):
        check_normalization([whole], "num_loss_tokens")
