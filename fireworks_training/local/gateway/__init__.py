"""The gateway process: control plane, trainer data plane and inference behind one port. No torch."""
