"""The control plane's client: accounts, models, shapes, trainer jobs, deployments, checkpoints."""
