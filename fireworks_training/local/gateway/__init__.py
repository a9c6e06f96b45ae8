"""The gateway process: control plane, trainer data plane and inference on one port. No torch."""
