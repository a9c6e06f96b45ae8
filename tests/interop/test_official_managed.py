"""The official SDK, unchanged, against the platform: managed flow, reconnect, cleanup, managers."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RunningPlatform
from tests.interop.compatibility import BEGIN, README, rewritten, rows_for

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parent / "official_managed.py"
JOB = "rlorTrainerJobs/official-job"
DEPLOYMENT = "deployments/official-deployment"


class Official:
    """Runs parts of the script, and looks at the platform."""

    def __init__(self, python: str, platform: RunningPlatform) -> None:
        self._python = python
        self._platform = platform

    def run(self, part: str) -> dict[str, Any]:
        """One part in a process of its own; the facts that it printed."""
        platform = self._platform
        arguments = (platform.base_url, platform.api_key, platform.model, platform.training_shape)
        done = subprocess.run(
            [self._python, str(SCRIPT), *arguments, part],
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stderr[-4000:]
        (line,) = [line for line in done.stdout.splitlines() if line.startswith("FACTS")]
        return dict(json.loads(line.removeprefix("FACTS")))

    def request(self, method: str, path: str, body: object = None) -> dict[str, Any]:
        """One request to the platform."""
        request = urllib.request.Request(
            f"{self._platform.base_url}{path}",
            method=method,
            data=None if body is None else json.dumps(body).encode(),
            headers={"X-API-Key": self._platform.api_key, "Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request) as answer:
            return dict(json.load(answer))

    def row(self, name: str) -> dict[str, Any]:
        """A resource of the account."""
        return self.request("GET", f"/v1/accounts/local/{name}")

    def names(self, collection: str) -> set[str]:
        """Ids of a collection's resources."""
        rows = self.request("GET", f"/v1/accounts/local/{collection}")[collection]
        return {row["name"].rsplit("/", 1)[-1] for row in rows}


@pytest.fixture
def official(official_python: str, official_platform: RunningPlatform) -> Official:
    return Official(official_python, official_platform)


@pytest.mark.parametrize(
    "official_platform",
    [
        pytest.param((), id="with extensions"),
        pytest.param(("--as-cloud", "--cloud-pace", "0.5"), id="as a cloud"),
    ],
    indirect=True,
)
def test_managed_flow_reconnect_and_cleanup(official: Official) -> None:
    facts = official.run("managed")
    assert (facts["job"], facts["deployment"]) == ("official-job", "official-deployment")
    assert facts["context"] == 2048
    assert facts["shape"].startswith("accounts/local/deploymentShapes/cpu")
    losses = facts["losses"]
    assert losses == sorted(losses, reverse=True)
    # Of the same weights: -sum(w l A), with A one half, is half of the cross-entropy.
    by_reinforce, cross_entropy = facts["reinforce"]
    assert by_reinforce == pytest.approx(cross_entropy / 2, rel=1e-5)
    assert "score centering" in facts["centred"]
    assert facts["states"] == ["official-state"]
    assert {"official-state", *facts["snapshots"]} == set(facts["checkpoints"])
    assert all(len(tokens) == 7 for tokens in facts["completions"])
    # A reference that is full-parameter is a trainer of its own, at the base weights, and goes
    # with its service.
    assert facts["reference_loss"] == pytest.approx(losses[0], abs=1e-3)
    assert facts["reference"] not in official.names("rlorTrainerJobs")
    assert official.row(JOB)["state"] == "JOB_STATE_RUNNING"
    assert official.row(DEPLOYMENT)["state"] == "READY"

    # The trainer dies between the two services: it is started again, and nothing is cleaned up
    # that was found.
    fault = {"resource": f"accounts/local/{JOB}", "fail": "preempted"}
    official.request("POST", "/local/v1/faults", fault)
    again = official.run("reconnect")
    assert again["loss"] == pytest.approx(losses[3], rel=1e-6)
    assert official.row(JOB)["state"] == "JOB_STATE_RUNNING"
    assert official.row(DEPLOYMENT)["hotLoadTransitionType"] == "SYNC"

    before = official.names("rlorTrainerJobs"), official.names("deployments")
    made = official.run("cleanup")
    assert made["job"] not in before[0]
    assert (official.names("rlorTrainerJobs"), official.names("deployments")) == before

    adapter = official.run("lora")
    assert adapter["losses"] == sorted(adapter["losses"], reverse=True)
    assert len(set(adapter["snapshots"])) == 2
    assert all(len(tokens) == 7 for tokens in adapter["completions"])
    assert (official.names("rlorTrainerJobs"), official.names("deployments")) == before

    last = official.run("managers")
    assert (last["model"], last["state"]) == ("accounts/local/models/official-model", "READY")
    assert last["transition"] == "SYNC"
    assert last["moe"] is False
    assert last["profile"] == "accounts/local/trainingShapes/cpu/versions/1"
    assert official.names("rlorTrainerJobs") == before[0] - {"official-job"}
    assert official.names("deployments") == before[1] - {"official-deployment"}


def test_the_table_in_the_readme_is_current(official_python: str) -> None:
    readme = README.read_text()
    assert BEGIN in readme
    assert rewritten(readme, rows_for(official_python)) == readme, (
        "run: python tests/interop/compatibility.py --official PYTHON --write"
    )
