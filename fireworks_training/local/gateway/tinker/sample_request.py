"""A sampling request of the Tinker API and its answer: checks the body, encodes the message.

Knows fields, bounds and the protobuf form of a SampleResponse. Does not know engines' connections,
sessions or HTTP.

Ids and logprobs of one sample end with the token that met a stop: a stop token is part of it, and
so are the tokens of a stop string.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, StrictBool, StrictInt, StrictStr, ValidationError

from fireworks_training._wire.training import schema
from fireworks_training.local.gateway.inference.detokenize import StopMatcher, TextCodec
from fireworks_training.local.gateway.inference.engine_client import EngineHello
from fireworks_training.local.gateway.inference.engine_stream import (
    Delta,
    EngineStream,
    Generation,
    TopLogprobs,
)
from fireworks_training.local.gateway.tinker.prompt_probes import (
    MAX_A_PLACE,
    PromptProbes,
    Targets,
    read_probes,
)
from fireworks_training.local.gateway.web.bodies import invalid_body
from fireworks_training.local.gateway.web.problems import HttpProblem

MAX_SAMPLES = 1024
MAX_TOP = 20
MAX_TEMPERATURE = 1e6
_EMPTY = -99999.0
"""Logprob of an empty cell of a top-k table; its id is 0."""


class _Chunk(BaseModel):
    model_config = ConfigDict(extra="forbid")

    type: StrictStr = "encoded_text"
    tokens: list[StrictInt] = Field(default_factory=list[int])


class _Prompt(BaseModel):
    model_config = ConfigDict(extra="forbid")

    chunks: list[_Chunk]


class _Params(BaseModel):
    model_config = ConfigDict(extra="forbid")

    max_tokens: StrictInt | None = Field(default=None, ge=1, lt=1 << 31)
    seed: StrictInt | None = Field(default=None, ge=0, lt=1 << 63)
    stop: StrictStr | list[StrictStr] | list[StrictInt] | None = None
    temperature: float = Field(default=1.0, ge=0.0, le=MAX_TEMPERATURE, allow_inf_nan=False)
    top_k: StrictInt = Field(default=-1, ge=-1, lt=1 << 31)
    top_p: float = Field(default=1.0, gt=0.0, le=1.0)


class SampleBody(BaseModel):
    """Parses the body of asample. `prompt_logprobs_last_n` counts prompt tokens from the end."""

    model_config = ConfigDict(extra="forbid")

    type: StrictStr = "sample"
    sampling_session_id: StrictStr | None = None
    seq_id: StrictInt | None = Field(default=None, ge=0, lt=1 << 63)
    base_model: StrictStr | None = None
    model_path: StrictStr | None = None
    num_samples: StrictInt = Field(default=1, ge=1, le=MAX_SAMPLES)
    prompt: _Prompt
    sampling_params: _Params
    prompt_logprobs: StrictBool | None = None
    topk_prompt_logprobs: StrictInt = Field(default=0, ge=0, le=MAX_TOP)
    topk_sample_logprobs: StrictInt = Field(default=0, ge=0, le=MAX_TOP)
    prompt_logprobs_last_n: StrictInt | None = Field(default=None, ge=1)
    target_prompt_logprobs: Targets | None = None
    prompt_alt_tokens_k: StrictInt = Field(default=0, ge=0, le=MAX_A_PLACE)
    record_stability_info: StrictBool | None = None


def parse_sample(raw: bytes) -> SampleBody:
    """Parse and check the body of asample.

    Raises:
        HttpProblem: 400 with the first field that is wrong; never with what it held.
    """
    try:
        body = SampleBody.model_validate_json(raw)
    except ValidationError as error:
        raise invalid_body(error) from None
    if body.record_stability_info:
        text = (
            "record_stability_info is not supported here: the formula of the loss that it serves,"
            " stable_reinforce, is not public; use importance_sampling, ppo, cispo or gspo"
        )
        raise HttpProblem(400, text, code="UNIMPLEMENTED")
    if any(chunk.type != "encoded_text" for chunk in body.prompt.chunks):
        raise HttpProblem(400, "this platform takes text only: every chunk must be encoded_text")
    return body


@dataclass(slots=True)
class SamplePlan:
    """Holds what to ask an engine for.

    Attributes:
        generations: one a sample.
        stop_texts: strings that end a sample.
        prompt_tokens: length of the prompt.
        echo: prompt tokens, from the end, whose logprobs are wanted; 0 for none.
        probes: tokens that are named or to be drawn at the prompt's places.
        top_prompt, top_sample: most likely tokens to report.
    """

    generations: list[Generation]
    stop_texts: list[str]
    prompt_tokens: int
    echo: int
    probes: PromptProbes
    top_prompt: int
    top_sample: int


def plan_samples(body: SampleBody, limits: EngineHello) -> SamplePlan:
    """Return the generations of a request.

    Raises:
        HttpProblem: 400 when ids or lengths do not fit the engine.
    """
    prompt = [token for chunk in body.prompt.chunks for token in chunk.tokens]
    params = body.sampling_params
    stops = [params.stop] if isinstance(params.stop, str) else list(params.stop or ())
    stop_ids = [stop for stop in stops if isinstance(stop, int)]
    stop_texts = [stop for stop in stops if isinstance(stop, str)]
    for name, ids in (("prompt", prompt), ("stop", stop_ids)):
        if ids and not 0 <= min(ids) <= max(ids) < limits.vocab_size:
            raise HttpProblem(400, f"{name}: token ids must be from 0 to {limits.vocab_size - 1}")
    max_tokens = _max_tokens(params.max_tokens, len(prompt), limits.max_context)
    if "" in stop_texts:
        raise HttpProblem(400, "stop: a stop string must not be empty")
    last = body.prompt_logprobs_last_n
    if last is not None and (not body.prompt_logprobs or last > len(prompt) - 1):
        raise HttpProblem(
            400,
            "prompt_logprobs_last_n needs prompt_logprobs, and must be below the prompt's length",
        )
    wanted = bool(body.prompt_logprobs) or body.topk_prompt_logprobs > 0
    echo = (last or len(prompt)) if wanted else 0
    probes = read_probes(
        body.target_prompt_logprobs, body.prompt_alt_tokens_k, len(prompt), limits.vocab_size
    )
    places = max(echo, probes.echo)
    top = max(body.topk_prompt_logprobs, body.topk_sample_logprobs)
    seeds = (_seed(params.seed, index) for index in range(body.num_samples))
    generations = [
        Generation(
            prompt=prompt,
            max_tokens=max_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=max(params.top_k, 0),
            seed=seed,
            stop_ids=stop_ids,
            ignore_eos=params.stop is not None and not stops,
            top_logprobs=min(top, limits.vocab_size),
            echo=places if index == 0 else 0,
            targets=probes.targets(places) if index == 0 else [],
            draws=probes.draws if index == 0 else 0,
        )
        for index, seed in enumerate(seeds)
    ]
    return SamplePlan(
        generations,
        stop_texts,
        len(prompt),
        echo,
        probes,
        body.topk_prompt_logprobs,
        body.topk_sample_logprobs,
    )


def _max_tokens(asked: int | None, prompt: int, context: int) -> int:
    """Return the tokens to sample; without a wish as many as there is room for."""
    room = context - prompt
    if not prompt or room < 1:
        raise HttpProblem(400, f"the prompt must have 1 to {context - 1} tokens")
    max_tokens = room if asked is None else asked
    if max_tokens > room:
        raise HttpProblem(
            400,
            f"prompt ({prompt} tokens) and max_tokens ({max_tokens}) are {prompt + max_tokens}"
            f" tokens, over the context of {context}",
        )
    return max_tokens


def _seed(seed: int | None, index: int) -> int | None:
    """Return the seed of one sample: each has a stream of its own, the first the request's."""
    return None if seed is None else (seed + index * 0x9E3779B97F4A7C15) % (1 << 63)


@dataclass(slots=True)
class Sample:
    """Collects the tokens of one sample."""

    tokens: list[int] = field(default_factory=list[int])
    logprobs: list[float] = field(default_factory=list[float])
    top: list[TopLogprobs] = field(default_factory=list[TopLogprobs])
    stopped: bool = False

    def push(self, delta: Delta, text: StopText | None) -> bool:
        """Take tokens in; return True once a stop string is complete, with what follows dropped."""
        for index, token in enumerate(delta.tokens):
            self.tokens.append(token)
            self.logprobs.append(delta.logprobs[index])
            self.top.append(delta.top[index] if delta.top else [])
            if text is not None and text.ends_with(token):
                self.stopped = True
                return True
        return False


class StopText:
    """Finds whether the text of some tokens has met a stop string."""

    def __init__(self, codec: TextCodec, stops: Sequence[str]) -> None:
        self._text = codec.stream()
        self._matcher = StopMatcher(stops)

    def ends_with(self, token: int) -> bool:
        """Return whether this token completes one."""
        return self._matcher.push(self._text.push([token]))[1]


def encode_samples(plan: SamplePlan, samples: Sequence[Sample], first: EngineStream) -> bytes:
    """Encode a SampleResponse.

    Args:
        first: the stream of the first sample, which read the prompt for all.
    """
    message = schema.SampleResponse(prompt_cache_hit_tokens=first.cached_tokens)
    for sample in samples:
        sequence = message.sequences.add(
            stop_reason="STOP_REASON_STOP" if sample.stopped else "STOP_REASON_LENGTH",
            tokens=np.asarray(sample.tokens, "<i4").tobytes(),
            logprobs=np.asarray(sample.logprobs, "<f4").tobytes(),
        )
        if plan.top_sample:
            _set_top(sequence.topk_sampled_logprobs, sample.top, plan.top_sample)
    if plan.echo:
        # More places may have been read for what else was asked.
        logprobs = first.prompt_logprobs[-plan.echo :]
        missing = plan.prompt_tokens - len(logprobs)
        scores = np.full(plan.prompt_tokens, np.nan, "<f4")
        scores[missing:] = logprobs
        message.prompt_logprobs = scores.tobytes()
        if plan.top_prompt:
            rows: list[TopLogprobs] = [[] for _ in range(missing)]
            rows += first.prompt_top[-plan.echo :]
            _set_top(message.topk_prompt_logprobs, rows, plan.top_prompt)
    plan.probes.fill(message, first.probed_ids, first.probed_logprobs)
    return message.SerializeToString()


def _set_top(message: schema.TopkLogprobs, rows: Sequence[TopLogprobs], k: int) -> None:
    ids = np.zeros((len(rows), k), "<i4")
    values = np.full((len(rows), k), _EMPTY, "<f4")
    for row, best in enumerate(rows):
        for column, (token, logprob) in enumerate(best[:k]):
            ids[row, column], values[row, column] = token, logprob
    message.token_ids = ids.tobytes()
    message.logprobs = values.tobytes()
    message.k, message.length = k, len(rows)


def failure(message: str, category: str) -> Mapping[str, str]:
    """Return the body of a 200 answer for a failed sample."""
    return {"error": message, "category": category}
