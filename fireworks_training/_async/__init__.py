"""The asyncio shell: carries out what `_core` decides."""
