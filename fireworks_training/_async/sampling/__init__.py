"""Samplers: completions from a deployment, streamed, retried, within a concurrency window."""
