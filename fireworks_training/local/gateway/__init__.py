"""The gateway process: one HTTP front for control plane, trainer data plane and inference. No torch."""
