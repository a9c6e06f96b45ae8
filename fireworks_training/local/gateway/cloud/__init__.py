"""`serve --as-cloud`: the platform without its extensions, and with the habits of a cloud.

- `requests` tells which operation a request is of; only what a cloud has too is one.
- `schemas` closes the bodies of these operations: the official client's fields and no others.
- `references` refuses a deployment that names a job which is not there, and the other way round.
- `answers` takes out of an answer what only this platform says.
- `habits` decides what goes wrong, and when: a schedule that hands out the same faults each time.
- `middleware` applies all five.

The habits are those that the official client (1.2.30) lives through; `--trouble SEED` adds those
that it may not. The routes under `/local/` and the Tinker API at the root are left as they are: the
first belong to this platform alone, and the second is the interface of another service.
"""

from __future__ import annotations

from fireworks_training.local.gateway.cloud.middleware import install

__all__ = ["install"]
