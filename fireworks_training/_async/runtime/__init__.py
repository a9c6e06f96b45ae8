"""What the other rooms run on: owner loops, cancellation, waits, the worker thread, counters."""
