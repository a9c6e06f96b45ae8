"""The gateway process: serves the control plane, the trainers' data plane and inference on one
port, without torch."""
