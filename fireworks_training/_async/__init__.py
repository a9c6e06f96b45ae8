"""The asyncio shell: carries out what `_core` decides."""

GENERATE = {
    "control_plane.client": ["AsyncControlPlane"],
    "reaper": ["AsyncResourceLedger"],
    "service": ["AsyncFiretitanServiceClient"],
    "trainer": ["AsyncFiretitanTrainingClient"],
}
"""The classes whose blocking twins are generated into `_sync/`, by module."""
