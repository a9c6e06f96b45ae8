"""The blocking twins of `shop._async`.

Written by `python -m shop._generate_sync`.
"""
