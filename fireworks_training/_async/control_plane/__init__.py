"""Client of the control plane: accounts, shapes, trainer jobs, deployments."""
