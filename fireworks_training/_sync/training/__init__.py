"""The blocking twins of `fireworks_training._async.training`.

Written by `python -m fireworks_training._generate_sync`.
"""
