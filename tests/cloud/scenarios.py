"""The scenarios, by what they are about. Each is a row; the programs are in `programs`.

Each fault on each route is in `grid`; here is what needs more than that: outages by the clock,
several faults, replicas, storms, streams, networks.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tests.cloud.grid import GRID
from tests.cloud.replicas import Replica
from tests.cloud.scenario import Scenario
from tests.cloud.server import OTHER_JOB, Fault, Habits

LONG = 200.0
LORA = {"lora_rank": 8}


def _plain() -> list[Scenario]:
    """Nothing is wrong; the request counts and the time stand for themselves."""
    slow_post = Habits(job_post_s=0.5)
    closed = Habits(closed=True)
    return [
        Scenario("plain: sampling", "sample"),
        Scenario("plain: training", "train"),
        Scenario("plain: training, LoRA", "train", options=LORA),
        Scenario("plain: training, 20 steps", "train", options={"steps": 20}),
        Scenario("plain: state", "state"),
        Scenario("plain: hot loads", "hot_load", options={"loads": 2}),
        Scenario("plain: managed", "managed"),
        Scenario("plain: managed, LoRA", "managed", options=LORA),
        Scenario("plain: reference", "reference"),
        Scenario("plain: reference, LoRA", "reference", options=LORA),
        Scenario("plain: promotion", "promote"),
        Scenario("no tokenizer: managed", "managed", slow_post, options={"tokenizer": False}),
        Scenario("no tokenizer: hot load", "hot_load", options={"tokenizer": False}),
        Scenario("closed schemas: training", "train", closed),
        Scenario("closed schemas: state, unload", "state", closed),
        Scenario("closed schemas: hot load", "hot_load", closed),
        Scenario("closed schemas: managed", "managed", closed),
        Scenario("closed schemas: managed, LoRA", "managed", closed, options=LORA),
        Scenario("closed schemas: reference", "reference", closed),
        Scenario("closed schemas: reference, LoRA", "reference", closed, options=LORA),
    ]


def _provisioning() -> list[Scenario]:
    """Orders and waits of the resources, and outages of the control plane."""
    orders = {
        "the job's POST takes 1 s": Habits(job_post_s=1.0),
        "the job is pending, then created": Habits(job_pending_s=2, job_ready_s=3),
        "the deployment takes 3 s": Habits(deployment_ready_s=3),
        "both take their time": Habits(job_post_s=0.5, job_ready_s=3, deployment_ready_s=5),
        "a job is refused as a reference for 3 s": Habits(accepts_once_created_s=3),
        "references are not checked": Habits(checks_references=False),
    }
    rows = [
        Scenario(f"provisioning: {what}", "managed", habits, limit_s=90)
        for what, habits in orders.items()
    ]
    rows += [
        Scenario(f"provisioning: LoRA, {what}", "managed", habits, options=LORA, limit_s=90)
        for what, habits in orders.items()
    ]
    faults = {
        "accounts 503 for 20 s": Fault("accounts", seconds=20),
        "job POST 503 for 20 s": Fault("create_job", seconds=20),
        "job GET 404 once, after its POST": Fault("get_job", 404, times=1),
        "job GET 503 for 20 s": Fault("get_job", seconds=20),
        "trainer not healthy for 5 s": Fault("healthz", seconds=5),
        "deployment POST 503 for 20 s": Fault("create_deployment", seconds=20),
        "deployment GET 503 for 20 s": Fault("get_deployment", seconds=20),
        "everything 503 for 5 s": Fault("*", seconds=5, skip=3),
        "everything 503 for 20 s": Fault("*", seconds=20, skip=3, after_s=0.2),
        "everything 503 for 60 s": Fault("*", seconds=60, skip=3, after_s=0.2),
        "everything 503 for 90 s": Fault("*", seconds=90, skip=3, after_s=0.2),
    }
    rows += [
        Scenario(f"provisioning: {what}", "managed", faults=(fault,), limit_s=150)
        for what, fault in faults.items()
    ]
    rows += [
        Scenario(
            "re-attach: the deployment is UPDATING for 3 s",
            "hot_load",
            Habits(deployment_state="UPDATING", deployment_ready_s=3, serves_job=OTHER_JOB),
        ),
        Scenario("re-attach: another trainer", "hot_load", Habits(serves_job=OTHER_JOB)),
        Scenario("resume: a failed job", "train", Habits(job_state="JOB_STATE_FAILED")),
        Scenario("resume: a paused job", "train", Habits(job_state="JOB_STATE_PAUSED")),
        Scenario(
            "re-attach: another trainer, another quantization",
            "hot_load",
            Habits(serves_job=OTHER_JOB, deployment_model="accounts/fireworks/models/any-fp8"),
        ),
    ]
    return rows


def _sessions() -> list[Scenario]:
    """Beginnings of a session and a model, heartbeats, and a trainer that goes."""
    moved = {"Location": "/moved{path}"}
    faults = {
        "create_session 503 for 5 s": Fault("create_session", seconds=5),
        "create_session 503 for 20 s": Fault("create_session", seconds=20),
        "create_session 503 for 60 s": Fault("create_session", seconds=60),
        "create_model 503 for 20 s": Fault("create_model", seconds=20),
        "create_model 503 for 60 s": Fault("create_model", seconds=60),
        "create_model's poll 404": Fault("retrieve_future", 404, times=1),
        "create_model's poll 503 twice": Fault("retrieve_future", 503, times=2),
        "heartbeats 503": Fault("heartbeat"),
        "heartbeats 404": Fault("heartbeat", 404),
        "everything of the trainer 307": Fault("trainer", 307, headers=moved, body="", skip=1),
        "the trainer is gone, 404": Fault("trainer", 404, skip=7),
        "the trainer is gone, 410": Fault("trainer", 410, skip=7),
    }
    return [
        Scenario(f"session: {what}", "train", faults=(fault,), limit_s=110)
        for what, fault in faults.items()
    ]


def _submits_and_polls() -> list[Scenario]:
    """One route of the trainer refuses what it is sent, for a while or in special words."""
    statuses = (413, 422)
    faults = {
        **{f"forward_backward {n} once": Fault("forward_backward", n, times=1) for n in statuses},
        **{f"poll {n} once": Fault("retrieve_future", n, times=1, skip=1) for n in (410, 422)},
        "forward_backward carried out, 409": Fault(
            "forward_backward", 409, times=1, carried_out=True
        ),
        "forward_backward 503 for 20 s": Fault("forward_backward", seconds=20, after_s=0.2),
        "optim_step 503 for 5 s": Fault("optim_step", seconds=5),
        "optim_step 402 for 10 s": Fault("optim_step", 402, seconds=10),
        "429 with Retry-After 1.5": Fault(
            "forward_backward", 429, times=2, headers={"Retry-After": "1.5"}
        ),
        "503, not to be retried": Fault(
            "forward_backward", times=1, headers={"x-should-retry": "false"}
        ),
        "400, to be retried": Fault(
            "forward_backward", 400, times=1, headers={"x-should-retry": "true"}
        ),
        "poll 400 three times": Fault("retrieve_future", 400, times=3, skip=1),
        "poll 404 three times": Fault("retrieve_future", 404, times=3, skip=1),
        "poll 402 for 10 s": Fault("retrieve_future", 402, seconds=10, skip=1),
        "poll cut three times": Fault("retrieve_future", 0, times=3, skip=1),
        "poll 503 for 5 s": Fault("retrieve_future", seconds=5, skip=1, after_s=0.2),
        "poll 503 for 60 s": Fault("retrieve_future", seconds=60, skip=1, after_s=0.5),
        "poll try_again for ever so often": Fault(
            *("retrieve_future", 200, 30), skip=1, body='{"type": "try_again", "request_id": "r"}'
        ),
    }
    rows = [
        Scenario(f"trainer: {what}", "train", faults=(fault,), limit_s=110)
        for what, fault in faults.items()
    ]
    habits = {
        "held 1 s, 408": Habits(pass_s=3, poll_hold_s=1),
        "held 1 s, try_again": Habits(pass_s=3, poll_hold_s=1, poll_style="200"),
        "held 0.2 s, 408": Habits(pass_s=3, poll_hold_s=0.2),
    }
    rows += [
        Scenario(f"trainer: a pass takes 3 s, {what}", "train", one) for what, one in habits.items()
    ]
    slow = Habits(pass_s=40, poll_hold_s=44, result_body_s=8)
    rows.append(
        Scenario(
            "trainer: a pass takes 40 s, its result 8 s more",
            "train",
            slow,
            options={"steps": 1},
            limit_s=LONG,
        )
    )
    return rows


def _outages() -> list[Scenario]:
    """Nobody answers, in real time; it begins in the middle of the run."""
    rows = []
    for seconds in (5, 20, 60, 90):
        fault = Fault("trainer", seconds=seconds, skip=5, after_s=0.2)
        rows.append(
            Scenario(f"outage: trainer, {seconds} s", "train", faults=(fault,), limit_s=LONG)
        )
        fault = Fault("completions", seconds=seconds)
        rows.append(
            Scenario(f"outage: sampling, {seconds} s", "sample", faults=(fault,), limit_s=LONG)
        )
        for route in ("hot_load_get", "hot_load_post"):
            fault = Fault(route, seconds=seconds, skip=int(route == "hot_load_get"))
            rows.append(
                Scenario(
                    f"outage: {route}, {seconds} s",
                    "hot_load",
                    faults=(fault,),
                    options={"hotload_timeout_s": 150},
                    limit_s=LONG,
                )
            )
    cut = Fault("completions", 0, seconds=20)
    rows.append(Scenario("outage: sampling, cut, 20 s", "sample", faults=(cut,), limit_s=LONG))
    rolling = Fault("completions", 404, seconds=20)
    rows.append(Scenario("outage: sampling, 404, 20 s", "sample", faults=(rolling,), limit_s=LONG))
    rolling = Fault("completions", 425, seconds=30)
    rows.append(Scenario("outage: sampling, 425, 30 s", "sample", faults=(rolling,), limit_s=LONG))
    cut = Fault("trainer", 0, seconds=20, skip=5, after_s=0.2)
    rows.append(Scenario("outage: trainer, cut, 20 s", "train", faults=(cut,), limit_s=LONG))
    everything = Fault("*", 503, seconds=20, skip=20, after_s=0.2)
    rows.append(
        Scenario("outage: everything, 20 s", "hot_load", faults=(everything,), limit_s=LONG)
    )
    return rows


def _hot_loads() -> list[Scenario]:
    """Replicas that are late, roll, or hold more than one adapter."""
    late = {"notices_s": 3.0, "unready_before": True}
    replicas = {
        "notices after 3 s": (Replica(notices_s=3),),
        "notices after 10 s": (Replica(notices_s=10),),
        "notices after 30 s": (Replica(notices_s=30),),
        "takes 8 s": (Replica(loads_s=8),),
        "not ready before its first snapshot": (Replica(unready_before=True),),
        "not listed before it is asked": (Replica(listed_from_s=0),),
        "not listed for 8 s": (Replica(listed_from_s=8),),
        "gone for 6 s while it rolls": (Replica(loads_s=8, hidden=(1, 7)),),
        "an error of another load": (Replica(loads_s=6, stale_error=True),),
        "two, one after the other": (Replica(loads_s=1), Replica(loads_s=4)),
        "two, one not listed for 8 s": (Replica(), Replica(listed_from_s=8)),
        "two, one rolls": (Replica(), Replica(loads_s=3, hidden=(0, 6))),
        "two, late and not ready": (Replica(**late), Replica(**late)),
    }
    rows = [
        Scenario(f"hot load: {what}", "hot_load", Habits(replicas=some), limit_s=100)
        for what, some in replicas.items()
    ]
    rows += [
        Scenario(
            f"hot load: delta, noticed after {seconds} s",
            "hot_load",
            Habits(replicas=(Replica(notices_s=seconds),)),
            options={"loads": 2},
            limit_s=100,
        )
        for seconds in (3, 10)
    ]
    rows += [
        Scenario(
            f"hot load: LoRA, the former adapter stays, {order}",
            "hot_load",
            Habits(replicas=(Replica(adapters=order),)),
            options={"loads": 3, **LORA},
            limit_s=150,
        )
        for order in ("new_first", "new_last")
    ]
    rows.append(
        Scenario(
            "hot load: LoRA, two replicas, late, former adapters stay",
            "hot_load",
            Habits(replicas=(Replica(notices_s=2, adapters="new_first"),) * 2),
            options={"loads": 2, **LORA},
            limit_s=150,
        )
    )
    faults = {
        "the client's first GET 503 twice": Fault("hot_load_get", 503, times=2),
        "GET 404 for 10 s": Fault("hot_load_get", 404, seconds=10, skip=1),
    }
    rows += [
        Scenario(f"hot load: {what}", "hot_load", faults=(fault,)) for what, fault in faults.items()
    ]
    return rows


def _sampling() -> list[Scenario]:
    """Storms of a deployment, and streams as servers and proxies write them."""
    fault = Fault("completions", 429, times=4, headers={"Retry-After": "1.5"})
    rows = [Scenario("sampling: 429 with Retry-After 1.5", "sample", faults=(fault,))]
    slow = Habits(slots=16, service_s=0.3)
    queue = Habits(slots=16, service_s=0.3, reports_queue=True)
    storms = {
        "200, without queue times": (200, slow),
        "200, with queue times": (200, queue),
        "200, with queue times and Retry-After": (
            200,
            Habits(slots=16, service_s=0.3, reports_queue=True, retry_after="1"),
        ),
        "200, four slots, with queue times": (
            200,
            Habits(slots=4, service_s=0.1, reports_queue=True),
        ),
        "1,000, with queue times": (1000, queue),
    }
    rows += [
        Scenario(
            f"storm: {what}", "sample", habits, options={"count": count}, alone=True, limit_s=LONG
        )
        for what, (count, habits) in storms.items()
    ]
    rows += [
        Scenario(
            f"stream: {style}",
            "sample",
            Habits(sse=style),
            options={"count": 2, **options},
            limit_s=20,
        )
        for style, options in _STYLES.items()
    ]
    return rows


_SCORED = {"logprobs": True}
_RANKED = {"logprobs": True, "top_logprobs": 2}
_STYLES: Mapping[str, Mapping[str, Any]] = {
    "plain": _RANKED,
    "empty_data": _SCORED,
    "done_blank": _SCORED,
    "comments": _SCORED,
    "named_ping": _SCORED,
    "crlf": _SCORED,
    "no_space": _SCORED,
    "no_done": _SCORED,
    "two_chunks": _SCORED,
    "empty_choices": _SCORED,
    "ids": _SCORED,
    "bom": _SCORED,
    "bytewise": _SCORED,
    "unicode": _SCORED,
    "no_logprobs": _SCORED,
    "no_top_logprobs": _RANKED,
    "no_token_id": _SCORED,
    "null_sampling_logprob": _SCORED,
    "no_usage": _SCORED,
    "text_metrics": _SCORED,
    "cut_twice": {},
    "error_chunk_twice": {},
    "error_event_twice": {},
    "html_twice": {},
    "error_400": {},
}


def _networks() -> list[Scenario]:
    """What the environment of the client's process says of the network."""
    proxy = {"HTTP_PROXY": "{url}", "http_proxy": "{url}"}
    elsewhere = "http://cloud.example.invalid"
    return [
        Scenario("network: HTTP_PROXY, sampling", "sample", environment=proxy, url=elsewhere),
        Scenario("network: HTTP_PROXY, training", "train", environment=proxy, url=elsewhere),
        Scenario("network: HTTP_PROXY, managed", "managed", environment=proxy, url=elsewhere),
        Scenario(
            "network: NO_PROXY",
            "sample",
            environment={"http_proxy": "http://127.0.0.1:9", "no_proxy": "127.0.0.1"},
        ),
    ]


SCENARIOS: tuple[Scenario, ...] = (
    *_plain(),
    *_provisioning(),
    *_sessions(),
    *_submits_and_polls(),
    *_outages(),
    *_hot_loads(),
    *_sampling(),
    *_networks(),
    *GRID,
)
