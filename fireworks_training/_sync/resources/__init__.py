"""The blocking twins of `fireworks_training._async.resources`.

Written by `python -m fireworks_training._generate_sync`.
"""
