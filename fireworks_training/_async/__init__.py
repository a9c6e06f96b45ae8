"""The asyncio shell: carries out what `_core` decides."""

GENERATE = {
    "control_plane.client": ["AsyncControlPlane"],
    "resources.reaper": ["AsyncResourceLedger"],
    "service": ["AsyncFiretitanServiceClient"],
    "training.client": ["AsyncFiretitanTrainingClient"],
}
"""The classes whose blocking twins are generated into `_sync/`, by module."""
