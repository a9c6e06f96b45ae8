"""The states of a deployment, and the ways in which a hot load may treat streams in flight."""

from __future__ import annotations

from typing import Literal

Transition = Literal["ASYNC", "SYNC"]
DeploymentState = Literal["CREATING", "READY", "UPDATING", "FAILED", "DELETING", "DELETED"]
