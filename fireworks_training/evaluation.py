"""Records evaluations: the exact prompts, the snapshot, its completions, and their scores.

Knows completions and a JSONL file; nothing about sampling. One evaluation is one file: a header
line, and a line for each completion. A file appears whole or not at all, and is never overwritten,
so that a result can't change after it was measured.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, TextIO

from fireworks_training.errors import InvalidArgument
from fireworks_training.models import SampledCompletion

FORMAT = 1


@dataclass(frozen=True, slots=True)
class EvaluatedSample:
    """One completion of an evaluation.

    Attributes:
        prompt_index, sample_index: as in `SampledCompletion`.
        prompt_tokens, completion_tokens: token ids, exactly as sampled.
        text: text of the completion.
        finish_reason: "stop", "length" or "tool_calls".
        score: the caller's; None if no scores were passed.
    """

    prompt_index: int
    sample_index: int
    prompt_tokens: Sequence[int]
    completion_tokens: Sequence[int]
    text: str
    finish_reason: str
    score: float | None = None


@dataclass(frozen=True, slots=True)
class Evaluation:
    """One evaluation: the completions of one snapshot, and how they were sampled and scored.

    Attributes:
        snapshot: identity of the snapshot that sampled every completion.
        samples: the completions, in the order they were passed.
        prompts: the caller's prompts (messages or texts), by `prompt_index`; None if not passed.
        settings: sampling options, as the caller gave them: temperature, seed, max_tokens, ...
        name: the caller's own.
        created_at: time of writing, UTC, ISO 8601.
        prompts_sha256: hash of the prompts' token ids: equal if two evaluations asked the same.
    """

    snapshot: str
    samples: Sequence[EvaluatedSample]
    prompts: Sequence[Any] | None = None
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    name: str = ""
    created_at: str = ""
    prompts_sha256: str = ""

    @property
    def mean_score(self) -> float | None:
        """The mean over all samples; None if they were not scored."""
        scores = [sample.score for sample in self.samples if sample.score is not None]
        return sum(scores) / len(scores) if scores else None


def write_evaluation(
    path: str | os.PathLike[str],
    completions: Sequence[SampledCompletion],
    *,
    prompts: Sequence[Any] | None = None,
    scores: Sequence[float] | None = None,
    snapshot: str | None = None,
    settings: Mapping[str, Any] | None = None,
    name: str = "",
) -> Evaluation:
    """Store an evaluation in a new JSONL file.

    Args:
        path: the file; its folder has to exist.
        completions: all from one snapshot, at least one.
        prompts: messages or texts in the order of `prompt_index`; anything that JSON can hold.
        scores: one for each completion.
        snapshot: the snapshot's identity; needed only where the server does not report it.
        settings: sampling options; anything that JSON can hold.
        name: name of the evaluation.

    Returns:
        The evaluation that was stored; `read_evaluation(path)` gives an equal value.

    Raises:
        InvalidArgument: the file exists, nothing was sampled, lengths differ, several snapshots
            sampled the completions or another than `snapshot` did, or none is known.
        OSError: it could not be written; nothing is left of it.
    """
    target = Path(path)
    if target.exists():
        raise InvalidArgument(
            f"{target} exists, and an evaluation is not overwritten: choose another path"
        )
    _check(completions, prompts, scores)
    samples = [
        EvaluatedSample(
            completion.prompt_index,
            completion.sample_index,
            list(completion.prompt_tokens),
            list(completion.completion_tokens),
            completion.text,
            completion.finish_reason,
            None if scores is None else float(scores[index]),
        )
        for index, completion in enumerate(completions)
    ]
    evaluation = Evaluation(
        _one_snapshot(completions, snapshot),
        samples,
        None if prompts is None else _as_json("prompts", list(prompts)),
        _as_json("settings", dict(settings or {})),
        name,
        datetime.now(UTC).isoformat(timespec="seconds"),
        _hash_of(samples),
    )
    _write(target, evaluation)
    return evaluation


def read_evaluation(path: str | os.PathLike[str]) -> Evaluation:
    """Read an evaluation from its file.

    Raises:
        InvalidArgument: the file is no evaluation, of an unknown format, cut short, or its prompts
            are not those that its header was made of; names the line.
        OSError: it can't be read.
    """
    lines = Path(path).read_text("utf-8").splitlines()
    number = 1
    try:
        header: dict[str, Any] = json.loads(lines[0])
        count, form = header.pop("samples"), header.pop("evaluation")
        if form != FORMAT:
            raise InvalidArgument(f"{path} has format {form!r}; this version reads {FORMAT}")
        samples: list[EvaluatedSample] = []
        for line in lines[1:]:
            number += 1
            samples.append(EvaluatedSample(**json.loads(line)))
        evaluation = Evaluation(samples=samples, **header)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError) as error:
        if isinstance(error, InvalidArgument):
            raise
        raise InvalidArgument(
            f"{path}, line {number}: not an evaluation that write_evaluation wrote ({error!r})",
            cause=error,
        ) from error
    if len(samples) != count:
        raise InvalidArgument(f"{path} is cut short: {len(samples)} of its {count} samples")
    if _hash_of(samples) != evaluation.prompts_sha256:
        raise InvalidArgument(f"{path} was changed: its prompts are not those of its header")
    return evaluation


def _check(
    completions: Sequence[SampledCompletion],
    prompts: Sequence[Any] | None,
    scores: Sequence[float] | None,
) -> None:
    if not completions:
        raise InvalidArgument("no completions: there is nothing to record")
    if scores is not None and len(scores) != len(completions):
        raise InvalidArgument(
            f"{len(scores)} scores for {len(completions)} completions: one each is needed"
        )
    last = max(completion.prompt_index for completion in completions)
    if prompts is not None and last >= len(prompts):
        raise InvalidArgument(
            f"a completion has prompt_index {last}, and there are {len(prompts)} prompts: pass the "
            "list that was sampled from"
        )


def _one_snapshot(completions: Sequence[SampledCompletion], said: str | None) -> str:
    reported = {
        identity
        for completion in completions
        for identity in (completion.snapshot_identity_first, completion.snapshot_identity)
        if identity is not None
    }
    if said is not None and reported - {said}:
        raise InvalidArgument(
            f"snapshot={said!r}, but completions were sampled from {sorted(reported)}: leave "
            "snapshot= out, or sample again from the snapshot that is meant"
        )
    if len(reported) > 1:
        raise InvalidArgument(
            f"the completions are of several snapshots, {sorted(reported)}: an evaluation is of "
            "one; wait for the hot load before sampling"
        )
    if said is None and not reported:
        raise InvalidArgument(
            "the server did not report which snapshot sampled: pass snapshot=, for instance "
            "sampler.current_snapshot"
        )
    return said if said is not None else reported.pop()


def _as_json(what: str, value: Any) -> Any:
    """Return the value as it will be read back."""
    try:
        return json.loads(json.dumps(value))
    except (TypeError, ValueError) as error:
        raise InvalidArgument(f"{what} can't be written as JSON: {error}", cause=error) from error


def _hash_of(samples: Sequence[EvaluatedSample]) -> str:
    prompts = {(sample.prompt_index, tuple(sample.prompt_tokens)) for sample in samples}
    return hashlib.sha256(json.dumps(sorted(prompts)).encode()).hexdigest()


def _lines(evaluation: Evaluation) -> Iterator[str]:
    header = {
        "evaluation": FORMAT,
        "name": evaluation.name,
        "snapshot": evaluation.snapshot,
        "created_at": evaluation.created_at,
        "settings": evaluation.settings,
        "prompts_sha256": evaluation.prompts_sha256,
        "prompts": evaluation.prompts,
        "samples": len(evaluation.samples),
    }
    yield json.dumps(header)
    for sample in evaluation.samples:
        yield json.dumps(asdict(sample))


def _claim_and_replace(temporary: str, target: Path) -> None:
    """Put a file under a name that must be free, by an empty file that holds the name meanwhile."""
    try:
        target.open("x").close()
    except FileExistsError as error:
        raise InvalidArgument(f"{target} exists by now: choose another path") from error
    Path(temporary).replace(target)


def _write(target: Path, evaluation: Evaluation) -> None:
    handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        file: TextIO
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.writelines(f"{line}\n" for line in _lines(evaluation))
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(temporary, target)  # unlike a rename, it fails if the target exists by now
        except FileExistsError as error:
            raise InvalidArgument(f"{target} exists by now: choose another path") from error
        except OSError:  # a file system without hard links, as shared folders often are
            _claim_and_replace(temporary, target)
    finally:
        Path(temporary).unlink(missing_ok=True)
