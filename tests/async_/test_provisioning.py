"""What a provisioning call refuses before it makes anything."""

from __future__ import annotations

import pytest

from fireworks_training import FiretitanProvisioningConfig, NotSupported
from fireworks_training._async.control_plane.client import AsyncControlPlane
from fireworks_training._async.provisioning import Resources, provision


class OfAnotherAccount(AsyncControlPlane):
    def __init__(self) -> None:
        pass

    async def account(self) -> str:
        return "somebody"


async def test_an_option_of_the_local_platform_is_refused_elsewhere() -> None:
    config = FiretitanProvisioningConfig(base_model="m", snapshot_dtype="float32")
    resources = Resources()
    with pytest.raises(NotSupported, match="snapshot_dtype"):
        await provision(OfAnotherAccount(), config, resources)
    assert resources == Resources()
