"""Which names and methods of the official Fireworks training SDK are the same here.

    python tests/interop/compatibility.py --official PYTHON [--write]

PYTHON is an interpreter that has the official package; this script describes what is installed
there and what `fireworks_training.compat` has, and compares: a name or method is *same* when it is
there and takes the parameters of the official one, in its places (it may take more), and none of
them only to refuse it (`REFUSES`). A class that the SDK makes and its users read (`READ`) is the
same when it has the official one's fields. `BEHAVES` lists what takes the same parameters and yet
behaves differently, `REFUSED` what will not be there. `--write` puts the table into the README of
`fireworks_training/compat`.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

README = Path(__file__).parents[2] / "fireworks_training" / "compat" / "README.md"
BEGIN, END = "<!-- compatibility: begin -->", "<!-- compatibility: end -->"
OFFICIAL, OURS = "fireworks.training.sdk", "fireworks_training.compat"
RECORD = "@@"

VERDICTS = ("same", "differs", "not yet", "refused")

BEHAVES = {
    "FiretitanTrainingClient.save_weights_for_sampler": "a future; training goes on meanwhile",
    "FiretitanServiceClient.create_training_client": (
        "other arguments than the service's are refused, not ignored"
    ),
    "DeploymentSampler.async_completions_stream": (
        "`hotload_*` refused: a request waits as long as a load takes"
    ),
    "TITOSidecar": "keeps traces of failures only where `failure_trace_config` is given",
    "DeploymentManager.wait_for_hotload": "waits for every replica, not only the first",
    **dict.fromkeys(
        (
            "FiretitanServiceClient.create_sampling_client",
            "FiretitanServiceClient.create_sampling_client_async",
            "FiretitanTrainingClient.create_sampling_client",
            "FiretitanTrainingClient.create_sampling_client_async",
        ),
        "of a `retry_config`, refuses other `retryable_exceptions` and no `enable_stuck_detection`",
    ),
}
"""Names that take the same parameters and behave differently, and how."""

_HEAD = ("projection_head_dim", "init_method")
_MADE = "FiretitanServiceClient.create_"
REFUSES: dict[str, tuple[str, ...]] = {
    f"{_MADE}lora_training_client": _HEAD,
    f"{_MADE}lora_training_client_async": _HEAD,
    **{
        f"{_MADE}training_client_from_state{kind}": ("projection_head_dim",)
        for kind in ("", "_async", "_with_optimizer", "_with_optimizer_async")
    },
    "FiretitanServiceClient.from_firetitan_config": ("project_id",),
    "FiretitanSamplingClient.sample": ("topk_prompt_logprobs", "images"),
    "FiretitanSamplingClient.sample_async": ("topk_prompt_logprobs", "images"),
    "FiretitanTrainingClient.save_state": ("ttl_seconds", "overwrite"),
    "FiretitanTrainingClient.save_state_async": ("ttl_seconds", "overwrite"),
    "FiretitanTrainingClient.save_weights_for_sampler_async": ("ttl_seconds",),
    "FiretitanTrainingClient.save_weights_for_sampler_ext": ("ttl_seconds",),
}
"""Parameters that are there to be refused in words, whatever is passed but the default."""

READ = {
    "APIFuture",
    "CreatedTrainerJob",
    "DeploymentInfo",
    "FiretitanSampleResponse",
    "FiretitanSampledSequence",
    "FiretitanServiceClient",
    "FiretitanTrainingClient",
    "ForwardBackwardOutput",
    "OptimStepResponse",
    "SampledCompletion",
    "SaveSamplerResult",
    "ServerMetrics",
    "TrainerServiceEndpoint",
    "TrainingShapeProfile",
}
"""Classes whose instances come from the SDK: their fields count, not their constructors."""

REFUSED = {
    "get_telemetry": "there is no telemetry",
    "on_queue_state_change": "a hook of the other SDK's own transport",
    "negotiate_routing_matrix_format": "router replay",
    "comms": "RDMA",
    "supports_rdma_weight_sync": "RDMA",
    "weight_sync": "RDMA",
    "weight_sync_async": "RDMA",
    "WeightSyncResponse": "RDMA",
    "create_rest_client": "Tinker's REST of runs and sessions",
    "delete_training_session": "serverless sessions",
    "training_session_name": "serverless sessions",
}
"""Names of the table, or their last parts, that are refused, and why."""

ALWAYS_RAISES = {"FiretitanServiceClient.delete_training_session"}
"""Names of the table that are there, and raise whatever is passed."""


# -- describing: runs in both interpreters, so with the standard library alone ------------------


def describe(package: str) -> dict[str, Any]:
    """Describe every public name of a package: its kind, parameters, own methods and properties."""
    module = importlib.import_module(package)
    found: dict[str, Any] = {}
    values = {name: getattr(module, name) for name in sorted(module.__all__)}
    classes = {
        id(value): name for name, value in reversed(values.items()) if inspect.isclass(value)
    }
    for name, value in values.items():
        entry: dict[str, Any] = {"parameters": None, "members": {}}
        if inspect.isclass(value):
            entry["parameters"] = _constructor(value)
            entry["fields"] = _fields(value)
            alias = classes[id(value)]
            entry["alias_of"] = alias if alias != name else None
            if alias == name:
                entry["members"] = dict(_members(value, {id(v) for v in values.values()}))
        elif inspect.isfunction(value):
            entry["parameters"] = _parameters(value)
        found[name] = entry
    return found


def _constructor(value: type) -> list[list[Any]] | None:
    """List the parameters of a class that its users make; exceptions are made by the package."""
    if issubclass(value, BaseException) or getattr(value, "_is_protocol", False):
        return None
    return _parameters(value)


def _fields(value: type) -> list[str]:
    """List the public attributes that instances are made with."""
    named = getattr(value, "__dataclass_fields__", None) or getattr(value, "model_fields", {})
    return [name for name in named if not name.startswith("_")]


def _members(value: type, public: set[int]) -> Iterator[tuple[str, Any]]:
    """List the methods and properties that a class has from its package, and from no other public
    class."""
    for name in dir(value):
        if name.startswith(("_", "model_")):
            continue
        owner = next((c for c in value.__mro__ if name in c.__dict__), None)
        if owner is None or (owner is not value and id(owner) in public):
            continue
        if owner.__module__.partition(".")[0] in ("pydantic", "builtins", "typing", "enum"):
            continue
        member = inspect.getattr_static(value, name)
        if isinstance(member, property):
            yield name, "property"
        elif isinstance(member, classmethod | staticmethod) or inspect.isfunction(member):
            yield name, _parameters(getattr(value, name), bound=inspect.isfunction(member))


def _parameters(value: Any, *, bound: bool = False) -> list[list[Any]] | None:
    """List `[name, kind, has a default]` of each parameter; None where Python can't tell them."""
    try:
        parameters = list(inspect.signature(value).parameters.values())
    except (TypeError, ValueError):
        return None
    if bound:
        parameters = parameters[1:]
    return [[p.name, p.kind.name, p.default is not p.empty] for p in parameters]


def describe_elsewhere(python: str, package: str) -> dict[str, Any]:
    """Run `describe` in another interpreter."""
    command = [python, __file__, "--describe", package]
    answer = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return dict(json.loads(answer.stdout.partition(RECORD)[2]))


# -- comparing ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One name or method.

    Attributes:
        name: `Class` or `Class.method`.
        verdict: one of `VERDICTS`.
        how: what differs, or why it is refused.
    """

    name: str
    verdict: str
    how: str = ""


def compare(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> list[Row]:
    """Make a row for each name and method of theirs."""
    rows: list[Row] = []
    for name, entry in theirs.items():
        mine = ours.get(name)
        have: Mapping[str, Any] = {} if mine is None else mine["all_members"]
        if mine is not None and (entry.get("alias_of") or name) in READ:
            lacking = [f"`{field}`" for field in entry["fields"] if field not in have]
            rows.append(_verdict(name, f"no {', '.join(lacking)}" if lacking else ""))
        else:
            parameters = mine and mine["parameters"]
            rows.append(_row(name, mine is not None, entry["parameters"], parameters))
        for member, wanted in entry["members"].items():
            rows.append(_row(f"{name}.{member}", member in have, wanted, have.get(member)))
    return rows


def _row(name: str, there: bool, theirs: Any, ours: Any) -> Row:
    if not there or name in ALWAYS_RAISES:
        why = _refusal(name)
        return Row(name, "refused", why) if why else Row(name, "not yet")
    return _verdict(name, _difference(theirs, ours))


def _verdict(name: str, difference: str) -> Row:
    refused = REFUSES.get(name)
    how = BEHAVES.get(name) or difference or (f"refuses {_listed([*refused])}" if refused else "")
    return Row(name, "differs", how) if how else Row(name, "same")


def _refusal(name: str) -> str:
    return REFUSED.get(name) or REFUSED.get(name.rpartition(".")[2], "")


def _difference(theirs: Any, ours: Any) -> str:
    """Name the parameters of theirs that ours does not take, or takes in another place."""
    if not isinstance(theirs, list) or not isinstance(ours, list):
        return ""
    names = [p[0] for p in ours]
    kinds = {p[0]: p[1] for p in ours}
    takes_any = "VAR_KEYWORD" in kinds.values()
    wanted = [p for p in theirs if not p[1].startswith("VAR_") and not p[0].startswith("_")]
    missing = [p[0] for p in wanted if p[0] not in names and not takes_any]
    places = [p[0] for p in wanted if p[1] == "POSITIONAL_OR_KEYWORD"]
    moved = [
        name
        for place, name in enumerate(places)
        if name in names and kinds[name] == "POSITIONAL_OR_KEYWORD" and names.index(name) != place
    ]
    keyword_only = [name for name in places if kinds.get(name) == "KEYWORD_ONLY" and name in places]
    needed = [
        p[0]
        for p in ours
        if not p[2] and not p[1].startswith("VAR_") and p[0] not in [w[0] for w in theirs]
    ]
    texts = [
        f"no {_listed(missing)}" if missing else "",
        f"{_listed(moved)} in another place" if moved else "",
        f"{_listed(keyword_only)} by keyword" if keyword_only else "",
        f"needs {_listed(needed)}" if needed else "",
    ]
    return "; ".join(text for text in texts if text)


def _listed(names: list[str]) -> str:
    """List names for a sentence; very many are counted."""
    return f"{len(names)} parameters" if len(names) > 12 else ", ".join(f"`{n}`" for n in names)


def with_all_members(package: str) -> dict[str, Any]:
    """Describe a package, and for each class everything it has, inherited or not."""
    described = describe(package)
    module = importlib.import_module(package)
    for name, entry in described.items():
        value = getattr(module, name)
        entry["all_members"] = dict.fromkeys(entry.get("fields", ()), "field")
        if inspect.isclass(value):
            for member in dir(value):
                if not member.startswith("_"):
                    static = inspect.getattr_static(value, member)
                    callable_ = callable(getattr(value, member, None))
                    entry["all_members"][member] = (
                        _parameters(getattr(value, member), bound=inspect.isfunction(static))
                        if callable_ and not isinstance(static, property)
                        else "property"
                    )
    return described


# -- the table ----------------------------------------------------------------------------------


def counts(rows: list[Row]) -> dict[str, int]:
    """Count the rows of each verdict."""
    return {verdict: sum(row.verdict == verdict for row in rows) for verdict in VERDICTS}


def table(rows: list[Row]) -> str:
    """Write Markdown: a summary, the names that are the same or absent as a whole, and a row for
    each of the others."""
    lines = [f"{len(rows)} names and methods: {_summary(counts(rows), len(rows))}.", ""]
    owners: dict[str, list[Row]] = {}
    for row in rows:
        owners.setdefault(row.name.partition(".")[0], []).append(row)
    for verdict in VERDICTS:
        whole = [n for n, mine in owners.items() if {r.verdict for r in mine} == {verdict}]
        if verdict != "differs" and whole:
            lines += [
                f"{verdict.capitalize()}: {', '.join(_counted(n, owners[n]) for n in whole)}.",
                "",
            ]
            owners = {name: mine for name, mine in owners.items() if name not in whole}
    lines += ["| Name | Same | Differs, not yet, refused |", "|---|---|---|"]
    for name, mine in owners.items():
        same = ", ".join(_short(row) for row in mine if row.verdict == "same")
        rest: dict[tuple[str, str], list[str]] = {}
        for row in mine:
            if row.verdict != "same":
                rest.setdefault((row.verdict, row.how), []).append(_short(row))
        said = "; ".join(
            f"{', '.join(names)}: {verdict}{f' ({how})' if how else ''}"
            for (verdict, how), names in rest.items()
        )
        lines.append(f"| `{name}` | {same} | {said} |")
    return "\n".join(lines)


def _summary(total: Mapping[str, int], of: int) -> str:
    return ", ".join(f"{number} {verdict} ({number / of:.0%})" for verdict, number in total.items())


def _counted(name: str, rows: list[Row]) -> str:
    """Write a name, with how many methods it has."""
    return f"`{name}`" + (f" and its {len(rows) - 1}" if len(rows) > 1 else "")


def _short(row: Row) -> str:
    """Write the method's name, or "itself" for the class."""
    return f"`{row.name.partition('.')[2]}`" if "." in row.name else "itself"


def rewritten(readme: str, rows: list[Row]) -> str:
    """Put the table between the markers of the README."""
    before, _, rest = readme.partition(BEGIN)
    _, _, after = rest.partition(END)
    return f"{before}{BEGIN}\n{table(rows)}\n{END}{after}"


def rows_for(python: str) -> list[Row]:
    """Compare with the official package of another interpreter."""
    return compare(describe_elsewhere(python, OFFICIAL), with_all_members(OURS))


def main() -> int:
    """Run the command; its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--describe", metavar="PACKAGE")
    parser.add_argument("--official", metavar="PYTHON")
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    if arguments.describe:
        print(RECORD + json.dumps(describe(arguments.describe)))
        return 0
    rows = rows_for(arguments.official)
    if arguments.write:
        README.write_text(rewritten(README.read_text(), rows))
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
