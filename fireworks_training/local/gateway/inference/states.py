"""What a deployment can be in, and how a hot load may treat the streams in flight."""

from __future__ import annotations

from typing import Literal

Transition = Literal["ASYNC", "SYNC"]
DeploymentState = Literal["CREATING", "READY", "UPDATING", "FAILED", "DELETING", "DELETED"]
