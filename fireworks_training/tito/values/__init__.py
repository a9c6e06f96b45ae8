"""The values of a trajectory: requests, messages, records, artifacts, metrics, errors."""
