"""The embedded local platform: a gateway, a trainer worker a job, an engine worker a replica."""
