"""The blocking twins of `fireworks_training._async.control_plane`.

Written by `python -m fireworks_training._generate_sync`.
"""
