"""The concurrency window: decides how many sampling requests may be in flight at once.

It is additive increase, multiplicative decrease (AIMD), with what TCP has learned since. `aimd.py`
counts the requests and keeps the window; `queue_law.py` and `status_law.py` set it at the end of a
round, by the constants at their heads; `occupancy.py` measures the load, `pacing.py` spreads it;
`settings.py` checks what users may set. All are pure: they take events and times, hold no lock,
wake nobody and read no clock. The controllers in `_async/sampling/concurrency.py` do that.

Symbols, times in seconds:

    w       window: requests that may be in flight        AdaptiveWindow.size
    q       how long a prompt queued on the server        ServerMetrics.prefill_queue_duration
    s       service time: latency of the answer less q
    o       requests that the server had in service       Occupancy.mean
    T       target of q                                   prefill_queue_target     0.5
    a       growth of a round                             additive_increase        1
    b       factor of the deepest decrease                multiplicative_decrease  0.5
    mean    over the answers of a round
    ema     moving average of the rounds' mean(q)         ema_alpha                0.3

A round is as many answers as the window has slots, at most `adjustment_interval`, or fewer if the
verdict is clear. Where the server reports q, its end sets

    w  =  max(b w,  w mean(s) / (mean(s) + mean(q)) * allowance)  more than 5 % of q are over T
    w  =  o * allowance                                           the same, first time since a start
    w  =  w + max(a, a w / 64)                                    95 % of q, and ema, at most T / 2
    w  =  w + max(a, a w / 64, w / 8)                             the same, and no q for a round
    w  =  2 w, slow start again                                   the same, and q was seen at this w
    w  =  w                                                       else

with allowance = 1 + 0.2 T / mean(s): a fifth of the target may queue. On every server

    w  =  b w        at a 429, a 503 or a transport error, once a cooldown; b b w from try 3 on

and where it does not report q, or has refused a request since the window was larger than now,

    w  =  max(w + a, min(1.25 w, 0.75 w of the last refusal))     a round without any of these
    w  =  max(w + a, 1.25 w)                                      the same, beyond what was refused

In slow start each answer adds two slots, so that w triples in a round trip, until the server is
found full; from then on, where q is reported, bursts are spread. A window that was never full in
its round is not the bottleneck, and does not grow. It stays within `min_window` and `max_window`.

The window is driven by four methods:

    admit()                 a request takes a slot; only while `has_room`
    hold_back(now)          a request takes over a freed slot; the seconds that it waits with it
    release(metrics, now)   an attempt ended: a slot is free, and here is the evidence
    step_completed()        a step of the training loop ended: end the round, and summarise

and by two for exceptions: `withdraw()` undoes an admission that was not used, and
`note_retry_exhausted(metrics)` counts a request that gave up.

Two invariants hold. Nothing is admitted unless fewer than w requests are in flight: a window that
falls below what is in flight leaves a debt, which releases repay before anything is admitted. And
evidence has an age: a request that was admitted before the last decrease met the queue of the old
window, and is no evidence about the new one, so that each congestion costs one decrease.
"""
