"""The blocking twins of `shop._async.back`.

Written by `python -m shop._generate_sync`.
"""
