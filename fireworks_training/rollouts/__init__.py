"""Keeps rollouts in flight and hands out optimizer batches, with a bound on their staleness.

`law` decides which group may start and what makes a batch, `failures` what a failure means, and
`token_ledger` counts the tokens; none of them does I/O.
"""
