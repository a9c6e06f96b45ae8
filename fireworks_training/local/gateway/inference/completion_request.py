"""The body of a completions request: its fields, their bounds, and what they ask of an engine.

Knows names and ranges; no deployment, no tokenizer file, no HTTP. What is not understood is
refused, with the field's name: a sampling option that silently does nothing costs a training run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fireworks_training.local.gateway.web.bodies import parse_object
from fireworks_training.local.gateway.web.problems import HttpProblem

DEFAULT_MAX_TOKENS = 1024
MAX_TOP_LOGPROBS = 20
MAX_STOPS = 16
MAX_STOP_CHARS = 256

TokenId = Annotated[int, Field(ge=0)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]
StopList = Annotated[list[StopText | TokenId], Field(max_length=MAX_STOPS)]
Affinity = Annotated[str, Field(max_length=512)]

_RULES = {
    "prompt": "a list of token ids, or one text",
    "stop": f"a text, or a list of at most {MAX_STOPS} texts (1 to {MAX_STOP_CHARS} characters) "
    "and token ids",
    "logprobs": f"true, false, or the number of top logprobs from 0 to {MAX_TOP_LOGPROBS}",
}
"""Rules of fields with several forms, where the checker would list each form's fault."""


_NEUTRAL: dict[str, tuple[object, ...]] = {
    "frequency_penalty": (0,),
    "presence_penalty": (0,),
    "repetition_penalty": (1,),
    "min_p": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "service_tier": ("auto", "default"),
    "typical_p": (1,),
}
"""Fields of the contract that this platform can't serve, with values that do nothing."""

_IGNORED = ("metadata", "prompt_cache_isolation_key", "safety_identifier")
"""Fields that concern no sampling."""


class CompletionBody(BaseModel):
    """Parses `POST /inference/v1/completions`, before anything is known of the model. None =
    default."""

    model_config = ConfigDict(extra="forbid", strict=True)

    model: Annotated[str, Field(min_length=1, max_length=512)]
    prompt: Annotated[list[TokenId], Field(min_length=1)] | Annotated[str, Field(min_length=1)]
    n: int | None = None
    max_tokens: Annotated[int, Field(ge=0)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, lt=2**31)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: StopText | StopList | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0)] | None = None
    stream: bool | None = None
    raw_output: bool | None = None
    perf_metrics_in_response: bool | None = None
    logprobs: bool | Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS)] | None = None
    echo: bool | None = None
    echo_last: Annotated[int, Field(ge=0)] | None = None
    user: Affinity | None = None
    prompt_cache_key: Affinity | None = None
    images: Literal[None] = None

    @property
    def stop_texts(self) -> list[str]:
        """Stop strings, of `stop`."""
        stops: Sequence[str | int] = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return [stop for stop in stops if isinstance(stop, str)]

    @property
    def stop_ids(self) -> list[int]:
        """Stop token ids, from both fields."""
        stops = self.stop if isinstance(self.stop, list) else []
        return [stop for stop in stops if isinstance(stop, int)] + (self.stop_token_ids or [])

    @property
    def wants_logprobs(self) -> bool:
        """True when each token comes with its logprobs. A number asks for them too, 0 included."""
        given = self.logprobs is not None and self.logprobs is not False
        return given or self.top_count > 0

    @property
    def top_count(self) -> int:
        """Most likely tokens that each token comes with."""
        given = 0 if isinstance(self.logprobs, bool) else self.logprobs or 0
        return max(given, self.top_logprobs or 0)

    def echo_count(self, prompt_tokens: int) -> int:
        """Return how many prompt tokens, from the end, stand before the completion."""
        if self.echo_last is not None:
            return min(self.echo_last, prompt_tokens)
        return prompt_tokens if self.echo else 0


def parse_body(data: bytes) -> CompletionBody:
    """Parse and check the body.

    Raises:
        HttpProblem: 400 with the field's name; never with its value, which may be a prompt.
    """
    found = parse_object(data)
    if found.get("images"):
        raise HttpProblem(400, "images are not supported by this platform, field: 'images'")
    found.pop("images", None)
    _drop_neutral(found)
    try:
        body = CompletionBody.model_validate(found)
    except ValidationError as error:
        raise HttpProblem(400, _fault_text(error)) from None
    if (body.n or 1) != 1:
        raise HttpProblem(400, "n must be 1: send one request for each sample, field: 'n'")
    if body.max_tokens == 0 and not (body.echo or body.echo_last):
        raise HttpProblem(
            400, "max_tokens 0 gives prompt logprobs only: it needs echo, field: 'max_tokens'"
        )
    return body


def _drop_neutral(found: dict[str, Any]) -> None:
    """Take out of a body what asks for nothing, and refuse what can't be met, by name."""
    for name in _IGNORED:
        found.pop(name, None)
    for name, neutral in _NEUTRAL.items():
        value = found.pop(name, None)
        if value is not None and value not in neutral:
            raise HttpProblem(
                400,
                f"this platform does not serve {name}: leave it out, or pass {neutral[0]}, at "
                f"which it does nothing, field: '{name}'",
            )
    most = found.pop("max_completion_tokens", None)
    if most is not None and found.setdefault("max_tokens", most) != most:
        raise HttpProblem(
            400, "max_completion_tokens and max_tokens differ, field: 'max_completion_tokens'"
        )


def _fault_text(error: ValidationError) -> str:
    """Return the text of the first fault, of an unknown field before others."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    unknown = [fault for fault in faults if fault["type"] == "extra_forbidden"]
    fault = (unknown or faults)[0]
    name = str(fault["loc"][0])
    if unknown:
        return f"Extra inputs are not permitted, field: '{name}'"
    return f"{_RULES.get(name, fault['msg'])}, field: '{name}'"
