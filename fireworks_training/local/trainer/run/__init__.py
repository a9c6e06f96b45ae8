"""What operations do: models in training, passes, states and snapshots, on the torch thread."""
