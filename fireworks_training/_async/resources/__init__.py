"""The trainers and deployments of a run: planned, provisioned, owned, recorded and deleted."""
