"""A batch gives each stream the tokens of a plain forward pass, whichever streams join or leave."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedModel, Qwen3ForCausalLM

from fireworks_training.local.engine.batch import RunningBatch, StepResult, TokenRows
from fireworks_training.local.engine.decoder import Decoder
from fireworks_training.local.engine.requests import StreamRequest, key_of_seed
from fireworks_training.local.engine_frames import NO_TOKEN, Finish, PromptLogprobs
from tests.local.engine.tiny_model import VOCABULARY, tiny_qwen3

SLOTS = 8


class Recorder:
    """Runs a batch and keeps what each stream got."""

    def __init__(
        self,
        model: PreTrainedModel,
        *,
        fuse: bool | None = None,
        share: bool = True,
        slots: int = SLOTS,
    ) -> None:
        self.batch = RunningBatch(Decoder(model, 512, fuse), slots, share=share)
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.logprobs: dict[int, list[float]] = defaultdict(list)
        self.sampling: dict[int, list[float]] = defaultdict(list)
        self.top: dict[int, list[tuple[np.ndarray, np.ndarray]]] = defaultdict(list)
        self.finish: dict[int, Finish] = {}
        self.echoes: dict[int, PromptLogprobs] = {}
        self.cached: dict[int, int] = {}

    def admit(self, *requests: StreamRequest) -> None:
        for made in requests:
            self.batch.add(made)
        self.step()

    def step(self, max_tokens: int = 1 << 30) -> StepResult:
        stepped = self.batch.step(max_tokens)
        self.cached |= dict(stepped.begun)
        self.echoes |= {echo.stream: echo for echo in stepped.echoes}
        if stepped.rows is not None:
            self._take(stepped.rows)
        return stepped

    def finish_all(self) -> None:
        while len(self.batch):
            self.step()

    def _take(self, rows: TokenRows) -> None:
        for i, stream in enumerate(rows.streams.tolist()):
            assert stream not in self.finish
            if rows.finished[i]:
                self.finish[stream] = Finish(rows.finished[i])
            if rows.tokens[i] == NO_TOKEN:
                continue
            self.tokens[stream].append(int(rows.tokens[i]))
            self.logprobs[stream].append(float(rows.logprobs[i]))
            self.sampling[stream].append(float(rows.sampling_logprobs[i]))
            self.top[stream].append((rows.top_ids[i], rows.top_logprobs[i]))


def request(stream: int, prompt: list[int], **fields: object) -> StreamRequest:
    made = StreamRequest(stream, tuple(prompt), max_tokens=6, key=key_of_seed(stream))
    return replace(made, **fields)


def prompt_of(length: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(0, VOCABULARY, length).tolist()


@torch.no_grad()
def plain_logprobs(model: Qwen3ForCausalLM, prompt: list[int], tokens: list[int]) -> np.ndarray:
    """[len(tokens), V] raw logprobs that a forward over the whole sequence gives."""
    logits = model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0]
    return logits[len(prompt) - 1 : -1].log_softmax(-1).numpy()


def check(model: Qwen3ForCausalLM, recorder: Recorder, requests: list[StreamRequest]) -> None:
    for made in requests:
        tokens = recorder.tokens[made.stream]
        plain = plain_logprobs(model, list(made.prompt), tokens)
        expected = plain[np.arange(len(tokens)), tokens]
        np.testing.assert_allclose(recorder.logprobs[made.stream], expected, atol=1e-4)


def test_mixed_lengths_agree_with_a_plain_forward(model: Qwen3ForCausalLM) -> None:
    lengths = [1, 30, 7, 7, 2]
    requests = [request(i, prompt_of(n, i), max_tokens=3 + 5 * i) for i, n in enumerate(lengths)]
    recorder = Recorder(model)
    recorder.admit(*requests)
    recorder.finish_all()
    check(model, recorder, requests)
    assert [len(recorder.tokens[i]) for i in range(5)] == [3, 8, 13, 18, 23]
    assert set(recorder.finish.values()) == {Finish.LENGTH}


def test_a_shifted_mask_would_be_seen(model: Qwen3ForCausalLM) -> None:
    """Negative control: with one column too few to see the comparison fails."""
    recorder = Recorder(model)
    shared = [request(i, prompt_of(5, 0), max_tokens=8) for i in range(2)]
    alone = request(2, prompt_of(9, 1), max_tokens=8)
    recorder.admit(*shared, alone)
    for lane in recorder.batch._lanes.values():
        if lane.kind.shared:
            lane._prompts[0].tokens = lane._prompts[0].tokens[:-1]
        else:
            lane._own[0] -= 1
    recorder.finish_all()
    for made in (shared[0], alone):
        with pytest.raises(AssertionError):
            check(model, recorder, [made])


@settings(max_examples=15, deadline=None)
@given(st.data())
def test_any_order_of_joining_and_leaving(model: Qwen3ForCausalLM, data: st.DataObject) -> None:
    recorder = Recorder(model)
    requests: list[StreamRequest] = []
    cancelled: set[int] = set()
    for _ in range(data.draw(st.integers(1, 14))):
        free = SLOTS - len(recorder.batch)
        action = data.draw(st.sampled_from(["join", "step", "cancel"]))
        if action == "join" and free:
            joining = [
                request(
                    len(requests) + i,
                    prompt_of(data.draw(st.integers(1, 40)), data.draw(st.integers(0, 2))),
                    max_tokens=data.draw(st.integers(1, 90)),
                )
                for i in range(data.draw(st.integers(1, free)))
            ]
            requests += joining
            for made in joining:
                recorder.batch.add(made)
        elif action == "cancel" and requests:
            victim = data.draw(st.integers(0, len(requests) - 1))
            cancelled.add(victim)
            recorder.batch.drop([victim, 10**6])
        elif len(recorder.batch):
            budget = data.draw(st.sampled_from([1, 7, 1 << 30]))
            for _ in range(data.draw(st.integers(1, 70))):
                if len(recorder.batch):
                    recorder.step(budget)
    recorder.finish_all()
    check(model, recorder, requests)
    for made in requests:
        if made.stream not in cancelled:
            assert len(recorder.tokens[made.stream]) == made.max_tokens


def test_greedy_is_the_argmax_and_certain(model: Qwen3ForCausalLM) -> None:
    recorder = Recorder(model)
    made = request(3, prompt_of(9, 1), temperature=0.0, max_tokens=12)
    recorder.admit(made)
    recorder.finish_all()
    plain = plain_logprobs(model, list(made.prompt), recorder.tokens[3])
    assert recorder.tokens[3] == plain.argmax(-1).tolist()
    assert recorder.sampling[3] == [0.0] * 12


def test_a_seed_gives_its_tokens_in_any_batch(model: Qwen3ForCausalLM) -> None:
    made = request(0, prompt_of(6, 1), key=key_of_seed(42), max_tokens=20, temperature=1.3)
    alone = Recorder(model)
    alone.admit(made)
    alone.finish_all()
    crowd = Recorder(model)
    crowd.admit(*[request(i, prompt_of(3 * i, i), max_tokens=9) for i in range(1, 5)])
    crowd.step()
    crowd.admit(replace(made, stream=9))
    crowd.finish_all()
    assert crowd.tokens[9] == alone.tokens[0]
    other = Recorder(model)
    other.admit(replace(made, key=key_of_seed(43)))
    other.finish_all()
    assert other.tokens[0] != alone.tokens[0]


def test_a_shared_prompt_is_computed_once(model: Qwen3ForCausalLM) -> None:
    shared = prompt_of(11, 5)
    requests = [request(i, shared) for i in range(4)] + [request(4, prompt_of(3, 1))]
    recorder = Recorder(model)
    recorder.admit(*requests)
    recorder.finish_all()
    check(model, recorder, requests)
    assert recorder.cached == {0: 0, 1: 11, 2: 11, 3: 11, 4: 0}
    assert len({tuple(recorder.tokens[i]) for i in range(4)}) > 1


def test_stop_ids_end_a_stream_and_belong_to_it(model: Qwen3ForCausalLM) -> None:
    free = Recorder(model)
    made = request(0, prompt_of(6, 2), max_tokens=10)
    free.admit(made)
    free.finish_all()
    stop = free.tokens[0][4]
    first = free.tokens[0].index(stop)
    stopped = Recorder(model)
    stopped.admit(replace(made, stop_ids=frozenset({stop})))
    stopped.finish_all()
    assert stopped.tokens[0] == free.tokens[0][: first + 1]
    assert stopped.finish[0] is Finish.STOP


def test_min_tokens_bans_stop_ids_until_then(model: Qwen3ForCausalLM) -> None:
    recorder = Recorder(model)
    stops = frozenset(range(VOCABULARY - 1))
    recorder.admit(request(0, prompt_of(6, 2), max_tokens=10, min_tokens=4, stop_ids=stops))
    recorder.finish_all()
    assert recorder.tokens[0][:4] == [VOCABULARY - 1] * 4
    assert recorder.sampling[0][:4] == pytest.approx([0.0] * 4, abs=1e-5)
    assert recorder.logprobs[0][0] < -0.1


def test_echo_gives_the_prompts_own_logprobs(model: Qwen3ForCausalLM) -> None:
    prompt = prompt_of(20, 7)
    other = prompt_of(33, 8)
    recorder = Recorder(model)
    recorder.admit(
        request(0, prompt, echo=20, top_logprobs=3),
        request(1, prompt, echo=4),
        request(2, other, echo=33, max_tokens=0),
        request(3, [5], echo=1),
    )
    plain = plain_logprobs(model, prompt[:1], prompt[1:])
    expected = plain[np.arange(19), prompt[1:]]
    np.testing.assert_allclose(recorder.echoes[0].logprobs, expected, atol=1e-4)
    np.testing.assert_allclose(
        recorder.echoes[0].top_logprobs, np.sort(plain, axis=-1)[:, :-4:-1], atol=1e-4
    )
    np.testing.assert_allclose(recorder.echoes[1].logprobs, expected[-4:], atol=1e-4)
    assert recorder.echoes[1].top_ids.shape == (4, 0)
    assert len(recorder.echoes[2].logprobs) == 32
    assert len(recorder.echoes[3].logprobs) == 0
    assert recorder.finish[2] is Finish.LENGTH
    assert recorder.tokens[2] == []


def test_named_and_drawn_tokens_are_scored_at_their_places(model: Qwen3ForCausalLM) -> None:
    prompt = prompt_of(40, 7)
    named = [(3, -1), (4, 9)] * 5
    asked = {"echo": 10, "targets": tuple(named), "draws": 3}
    plain, whole, pieces = Recorder(model), Recorder(model), Recorder(model)
    plain.admit(request(0, prompt))
    whole.admit(request(0, prompt, **asked), request(1, prompt, **asked), request(2, prompt))
    pieces.batch.add(request(0, prompt, **asked))
    while 0 not in pieces.cached:
        pieces.step(7)
    for recorder in (plain, whole, pieces):
        recorder.finish_all()
    assert whole.tokens[0] == plain.tokens[0], "draws take nothing from the completion's numbers"
    logprobs = plain_logprobs(model, prompt[:30], prompt[30:])
    echo, other = whole.echoes[0], whole.echoes[1]
    assert echo.probed_ids[:, :2].tolist() == [list(row) for row in named]
    expected = np.take_along_axis(logprobs, np.maximum(echo.probed_ids, 0), axis=1)
    expected[echo.probed_ids == NO_TOKEN] = 0.0
    np.testing.assert_allclose(echo.probed_logprobs, expected, atol=1e-4)
    # Drawn by the request's own key, wherever the prompt was cut into pieces.
    np.testing.assert_array_equal(echo.probed_ids, pieces.echoes[0].probed_ids)
    assert echo.probed_ids[:, 2:].tolist() != other.probed_ids[:, 2:].tolist()
    assert len(set(echo.probed_ids[:, 2:].ravel().tolist())) > 3
    assert 2 not in whole.echoes


def test_draws_follow_the_distribution(model: Qwen3ForCausalLM) -> None:
    prompt, places = prompt_of(3, 7), 2
    counts = np.zeros((places, VOCABULARY))
    recorder = Recorder(model, slots=200)
    asked = {"echo": 2, "draws": 20, "max_tokens": 0, "temperature": 0.5}
    recorder.admit(*(request(stream, prompt, **asked) for stream in range(200)))
    for echo in recorder.echoes.values():
        for place in range(places):
            np.add.at(counts[place], echo.probed_ids[place], 1)
    policy = plain_logprobs(model, prompt[:1], prompt[1:]) / 0.5
    policy = np.exp(policy) / np.exp(policy).sum(-1, keepdims=True)
    expected = 200 * 20 * policy
    likely = expected > 20
    assert likely.any(axis=-1).all()
    assert (np.abs(counts - expected)[likely] < 5 * np.sqrt(expected[likely])).all()
    # Negative control: the same draws are not those of the temperature 1.
    plain = np.exp(plain_logprobs(model, prompt[:1], prompt[1:])) * 200 * 20
    assert (np.abs(counts - plain)[likely] > 5 * np.sqrt(plain[likely])).any()
    recorder.admit(request(900, prompt, echo=2, draws=2, temperature=0.0))
    best = plain_logprobs(model, prompt[:1], prompt[1:]).argmax(-1)
    assert recorder.echoes[900].probed_ids.tolist() == [[b, b] for b in best.tolist()]


def test_top_logprobs_are_the_raw_models_best(model: Qwen3ForCausalLM) -> None:
    recorder = Recorder(model)
    made = request(0, prompt_of(5, 3), top_logprobs=4, temperature=0.3)
    recorder.admit(made, request(1, prompt_of(5, 4)))
    recorder.finish_all()
    plain = plain_logprobs(model, list(made.prompt), recorder.tokens[0])
    for (ids, values), row in zip(recorder.top[0], plain, strict=True):
        assert ids.tolist()[:4] == row.argsort()[::-1][:4].tolist()
        np.testing.assert_allclose(values[:4], np.sort(row)[::-1][:4], atol=1e-4)
    assert recorder.top[1][0][0].tolist() == [-1] * 4


def test_weights_that_diverged_end_the_stream_without_a_token() -> None:
    broken = tiny_qwen3(5)
    recorder = Recorder(broken)
    recorder.admit(request(0, [3, 4]))
    with torch.no_grad():
        broken.lm_head.weight[7] = torch.nan
    recorder.batch.weights_changed()
    recorder.step()
    assert recorder.finish[0] is Finish.NOT_FINITE
    assert len(recorder.tokens[0]) == 1
    recorder.admit(request(1, prompt_of(5, 2), echo=4, draws=2, targets=((1,),) * 4))
    assert recorder.finish[1] is Finish.NOT_FINITE


def test_pieces_of_a_prompt_give_the_same_as_the_whole(model: Qwen3ForCausalLM) -> None:
    prompt = prompt_of(40, 3)
    whole, pieces = Recorder(model), Recorder(model)
    whole.admit(request(0, prompt, echo=40))
    whole.finish_all()
    running = request(1, prompt_of(5, 9), max_tokens=30)
    pieces.admit(running)
    pieces.batch.add(request(0, prompt, echo=40))
    steps = 0
    while 0 not in pieces.cached:
        before = len(pieces.tokens[1])
        stepped = pieces.step(7)
        steps += 1
        assert len(pieces.tokens[1]) == before + 1, "a row waits for no prompt"
        assert stepped.rows is not None
    assert steps == 6
    pieces.finish_all()
    assert pieces.tokens[0] == whole.tokens[0]
    np.testing.assert_allclose(pieces.echoes[0].logprobs, whole.echoes[0].logprobs, atol=1e-4)
    check(model, pieces, [running])


def test_a_prompt_that_was_read_is_not_read_again(model: Qwen3ForCausalLM) -> None:
    first, same = request(0, prompt_of(40, 1)), request(1, prompt_of(40, 1))
    longer = request(2, [*prompt_of(40, 1), *prompt_of(9, 2)])
    branch = request(3, [*prompt_of(40, 1)[:20], *prompt_of(20, 5)])
    other = request(4, prompt_of(40, 8))
    recorder = Recorder(model)
    for made in (first, same, longer, branch, other):
        recorder.admit(made)
    recorder.finish_all()
    assert recorder.cached == {0: 0, 1: 40, 2: 40, 3: 20, 4: 0}
    check(model, recorder, [first, same, longer, branch, other])


def test_an_echo_is_computed_even_where_the_prompt_is_known(model: Qwen3ForCausalLM) -> None:
    prompt = prompt_of(40, 4)
    recorder = Recorder(model)
    recorder.admit(request(0, prompt))
    recorder.admit(request(1, prompt, echo=40))
    recorder.admit(request(2, prompt, echo=5))
    recorder.finish_all()
    assert recorder.cached == {0: 0, 1: 0, 2: 34}
    expected = plain_logprobs(model, prompt[:1], prompt[1:])[np.arange(39), prompt[1:]]
    np.testing.assert_allclose(recorder.echoes[1].logprobs, expected, atol=1e-4)
    np.testing.assert_allclose(recorder.echoes[2].logprobs, expected[-5:], atol=1e-4)


def test_new_weights_forget_prompts_and_reread_what_has_not_begun() -> None:
    served, fresh = tiny_qwen3(1), tiny_qwen3(2)
    recorder = Recorder(served)
    recorder.admit(request(0, prompt_of(40, 1)))
    recorder.finish_all()
    recorder.batch.add(request(1, prompt_of(30, 2)))
    recorder.step(10)
    with torch.no_grad():
        for mine, new in zip(served.parameters(), fresh.parameters(), strict=True):
            mine.copy_(new)
    recorder.batch.weights_changed()
    after = request(2, prompt_of(40, 1))
    recorder.batch.add(after)
    recorder.finish_all()
    assert recorder.cached == {0: 0, 1: 0, 2: 0}
    check(fresh, recorder, [request(1, prompt_of(30, 2)), after])
    # Negative control: the old weights would be seen.
    with pytest.raises(AssertionError):
        check(tiny_qwen3(1), recorder, [after])


def test_without_sharing_each_request_reads_its_own_prompt(model: Qwen3ForCausalLM) -> None:
    requests = [request(i, prompt_of(20, 1)) for i in range(3)]
    recorder = Recorder(model, share=False)
    recorder.admit(*requests)
    recorder.finish_all()
    assert recorder.cached == {0: 0, 1: 0, 2: 0}
    check(model, recorder, requests)


def test_many_samples_of_a_few_prompts(model: Qwen3ForCausalLM) -> None:
    """Groups of unlike size, one over what a lane holds together, rows leaving out of order."""
    requests = [
        request(i, prompt_of(10 + i % 3, i % 3), max_tokens=1 + (i * 7) % 23) for i in range(60)
    ]
    requests += [request(60 + i, prompt_of(12, 2), max_tokens=5 + i) for i in range(20)]
    recorder = Recorder(model, slots=80)
    recorder.admit(*requests)
    recorder.finish_all()
    check(model, recorder, requests)
    assert [len(recorder.tokens[r.stream]) for r in requests] == [r.max_tokens for r in requests]


@pytest.mark.parametrize("steps", [1, 5, 15, 16, 17, 40])
def test_a_row_that_was_first_shares_its_prompt_with_those_who_come(
    model: Qwen3ForCausalLM, steps: int
) -> None:
    """Whatever the first one has in settled columns and in the tail moves with it."""
    prompt = prompt_of(20, 3)
    first, other = request(0, prompt, max_tokens=50), request(1, prompt_of(9, 1), max_tokens=60)
    followers = [request(2 + i, prompt, max_tokens=30) for i in range(3)]
    recorder = Recorder(model)
    recorder.admit(other)
    recorder.admit(first)
    for _ in range(steps - 1):
        recorder.step()
    recorder.admit(*followers)
    assert [len(lane) for kind, lane in recorder.batch._lanes.items() if kind.shared] == [4]
    assert [len(lane) for kind, lane in recorder.batch._lanes.items() if not kind.shared] == [1]
    recorder.finish_all()
    check(model, recorder, [first, other, *followers])
    assert [recorder.cached[follower.stream] for follower in followers] == [20] * 3


def test_requests_one_by_one_for_a_known_prompt_share_a_lane(model: Qwen3ForCausalLM) -> None:
    prompt = prompt_of(20, 3)
    requests = [request(i, prompt, max_tokens=12 + i) for i in range(5)]
    recorder = Recorder(model)
    for made in requests:
        recorder.admit(made)
    assert [(kind.shared, len(lane)) for kind, lane in recorder.batch._lanes.items()] == [(True, 5)]
    recorder.finish_all()
    check(model, recorder, requests)


def test_a_first_row_that_left_has_no_followers(model: Qwen3ForCausalLM) -> None:
    prompt = prompt_of(20, 3)
    requests = [request(i, prompt, max_tokens=6) for i in range(2)]
    recorder = Recorder(model)
    for made in requests:
        recorder.admit(made)
        recorder.finish_all()
    check(model, recorder, requests)
    recorder.admit(request(2, prompt))
    recorder.batch.drop([2])
    recorder.admit(again := request(3, prompt))
    assert [kind.shared for kind in recorder.batch._lanes] == [False]
    recorder.finish_all()
    check(model, recorder, [again])
