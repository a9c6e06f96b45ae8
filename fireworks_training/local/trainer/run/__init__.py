"""The execution of operations: models in training, passes, states and snapshots."""
