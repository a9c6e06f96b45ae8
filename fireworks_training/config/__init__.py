"""Configures a service: what is provisioned, and where the platform is.

The options of a trainer and a deployment are in `provisioning`; URLs, keys, proxies and folders,
and the environment that holds them, in `endpoint`.
"""

from __future__ import annotations

from fireworks_training.config.endpoint import (
    DEFAULT_BASE_URL,
    EXAMPLE_URL,
    Endpoint,
    attribution_headers,
    cache_dir,
    certificate_file,
    checked_key,
    checked_url,
    cloudflare_headers,
    environment_api_key,
    environment_proxy,
    resolve_endpoint,
    resolve_tinker_server,
    session_tags,
    state_dir,
)
from fireworks_training.config.provisioning import (
    RESOURCE_ID,
    CleanUp,
    FiretitanProvisioningConfig,
    ProvisioningOptions,
    SnapshotDtype,
    TransitionType,
    WireDialect,
    cast_options,
    show_options,
)

__all__ = [
    "DEFAULT_BASE_URL",
    "EXAMPLE_URL",
    "RESOURCE_ID",
    "CleanUp",
    "Endpoint",
    "FiretitanProvisioningConfig",
    "ProvisioningOptions",
    "SnapshotDtype",
    "TransitionType",
    "WireDialect",
    "attribution_headers",
    "cache_dir",
    "cast_options",
    "certificate_file",
    "checked_key",
    "checked_url",
    "cloudflare_headers",
    "environment_api_key",
    "environment_proxy",
    "resolve_endpoint",
    "resolve_tinker_server",
    "session_tags",
    "show_options",
    "state_dir",
]
