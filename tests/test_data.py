from __future__ import annotations

import math

import numpy as np
import pytest
import tinker

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
    ) -> list[int]:
        assert tokenize
        assert not return_dict
        text = ""
        for place, message in enumerate(messages):
            content = message["content"]
            if self.forgets and place < len(messages) - 1:
                content = content.replace("hm. ", "")
            text += f"<{message['role']}>{content};"
        return [ord(c) for c in text + ("<assistant>" if add_generation_prompt else "")]


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
    assert tokenizer.decode(trained, skip_special_tokens=False).startswith("d<|im_end|>")


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
