"""Is a loss what it claims to be? Holds any implementation against exact arithmetic.

    from fireworks_training.losses import conformance
    from fireworks_training.losses.conformance import objectives

    result = conformance.check(my_loss, objectives.dapo())
    print(result)               # a table of laws; a broken one in a sentence
    assert result.ok

The loss is a function `(data, logprobs_list) -> (loss, metrics)`, as `forward_backward_custom`
takes it: one of this package, your own, or another library's behind a small adapter. It sees every
outcome of a tiny policy as rows with `weights` (the mask), and what the objective needs: `logprobs`
(as sampled), `advantages`, `old_logprobs`, `ref_logprobs`, `teacher_logprobs`.
"""

from __future__ import annotations

from fireworks_training.losses.conformance.laws import check
from fireworks_training.losses.conformance.objectives import Objective
from fireworks_training.losses.conformance.result import ConformanceResult, Law

__all__ = ["ConformanceResult", "Law", "Objective", "check"]
