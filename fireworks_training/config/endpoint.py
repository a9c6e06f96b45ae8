"""Finds the platform and the key: arguments, and what the environment says beside them.

This is the only module that reads environment variables. It knows URLs, keys, proxies and folders;
it does not know what is provisioned.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import cast
from urllib.parse import urlsplit

from fireworks_training.errors import InvalidArgument

_FOLDER = "fireworks-training"
DEFAULT_BASE_URL = "https://api.fireworks.ai"
_CLIENT_SOURCE = re.compile(r"fireworks-training-skill(/[0-9A-Za-z][0-9A-Za-z._+-]{0,63})?")
_SESSION_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
_URL = re.compile(r"https?://[^/]")

EXAMPLE_URL = "https://api.fireworks.ai"


@dataclass(frozen=True, slots=True)
class Endpoint:
    """Holds the platform's URLs and key; the repr hides the key.

    Attributes:
        base_url: an http(s) URL without a trailing slash, or "local" / "local:/path".
        api_key: None only for an embedded platform.
        tinker_only: whether it is a Tinker server, with a trainer's routes and no control plane.
    """

    base_url: str
    api_key: str | None
    inference_url: str | None = None
    hotload_api_url: str | None = None
    trainer_gateway_url: str | None = None
    tinker_only: bool = False

    def __repr__(self) -> str:
        return f"Endpoint({self.base_url!r})"

    @property
    def embedded(self) -> bool:
        """Whether this process starts the platform, and stops it."""
        return self.base_url == "local" or self.base_url.startswith("local:")

    @property
    def state_dir(self) -> str | None:
        """The folder of `local:/path`; None for temporary state."""
        return self.base_url.removeprefix("local:") if ":" in self.base_url else None


def checked_key(key: str, source: str = "api_key") -> str:
    """Check that a key can be sent in a header; it is never repeated.

    Args:
        source: where it came from, for the message.

    Raises:
        InvalidArgument: it holds blanks, line ends or characters outside ASCII.
    """
    if not isinstance(cast(object, key), str):
        raise InvalidArgument(f"{source} must be a string, got {type(key).__name__}")
    if key != key.strip():
        wrong = "begins or ends with a blank or a line end"
    elif not key.isascii():
        wrong = "holds a character outside ASCII (typographic quotes?)"
    elif not key.isprintable() or any(sign in " \"'" for sign in key):
        wrong = "holds a blank, a line end, a quote or a control character"
    else:
        return key
    raise InvalidArgument(f"{source} {wrong}: copy the key alone, without what stands around it")


def checked_url(name: str, url: str) -> str:
    """Check the URL of a host; gives it without a trailing slash.

    Raises:
        InvalidArgument: it is no http(s) URL, holds a user name or password, has a query, or ends
            with the version that the SDK adds itself.
    """
    bare = url.rstrip("/")
    if not _URL.match(bare):
        raise InvalidArgument(f"{name}: an http(s) URL of a host is needed, such as {EXAMPLE_URL}")
    try:
        parts = urlsplit(bare)
        port = parts.port
    except ValueError:
        raise InvalidArgument(f"{name} is no URL: its port must be a number") from None
    if "@" in parts.netloc:
        raise InvalidArgument(
            f"{name} holds a user name or password: leave them out, and pass api_key="
        )
    if port == 0 or not parts.hostname or any(sign.isspace() for sign in bare):
        raise InvalidArgument(f"{name} is no URL of a host; one is {EXAMPLE_URL}")
    if parts.query or parts.fragment:
        raise InvalidArgument(f"{name} has a query or a fragment: leave out what follows the path")
    for version in ("/inference/v1", "/api/v1", "/v1"):
        if parts.path.endswith(version):
            raise InvalidArgument(
                f"{name} ends with {version}, which the SDK adds itself: pass "
                f"{bare.removesuffix(version)}"
            )
    return bare


def environment_proxy(url: str) -> str | None:
    """Find the proxy for a URL: HTTP_PROXY, HTTPS_PROXY, ALL_PROXY, less NO_PROXY.

    Raises:
        InvalidArgument: the proxy's own scheme is neither http nor https.
    """
    from urllib.request import getproxies, proxy_bypass  # not needed to build a service

    parts = urlsplit(url)
    proxies = getproxies()
    proxy = proxies.get(parts.scheme) or proxies.get("all")
    if not proxy or proxy_bypass(parts.netloc):
        return None
    if "://" not in proxy:
        proxy = "http://" + proxy
    scheme = proxy.partition("://")[0]
    if scheme not in ("http", "https"):
        raise InvalidArgument(
            f"the environment's proxy for {parts.scheme} has the scheme {scheme[:20]!r}; http and "
            "https are supported. NO_PROXY lists hosts that need none"
        )
    return proxy


def certificate_file() -> str | None:
    """Find the file of certificates to trust, `SSL_CERT_FILE`; None if it is not set.

    Raises:
        InvalidArgument: there is no such file.
    """
    name = os.environ.get("SSL_CERT_FILE")
    if name and not Path(name).is_file():
        raise InvalidArgument(f"SSL_CERT_FILE={name!r}: there is no such file")
    return name or None


def cloudflare_headers() -> dict[str, str]:
    """Make the headers of Cloudflare Access, from the two variables of the official client.

    Raises:
        InvalidArgument: one of the two can't be sent in a header.
    """
    names = {
        "CF-Access-Client-Id": "CLOUDFLARE_ACCESS_CLIENT_ID",
        "CF-Access-Client-Secret": "CLOUDFLARE_ACCESS_CLIENT_SECRET",
    }
    values = {header: os.environ.get(name, "") for header, name in names.items()}
    if not all(values.values()):
        return {}
    return {header: checked_key(values[header], name) for header, name in names.items()}


def attribution_headers() -> dict[str, str]:
    """Make the headers that say on whose behalf a program runs, from the variables of the official
    client, FIREWORKS_CLIENT_SOURCE and FIREWORKS_SESSION_ID; a value of another form is left out.
    """
    source = os.environ.get("FIREWORKS_CLIENT_SOURCE", "")
    session = os.environ.get("FIREWORKS_SESSION_ID", "")
    headers: dict[str, str] = {}
    if _CLIENT_SOURCE.fullmatch(source):
        headers["X-Fireworks-Client-Source"] = source
    if _SESSION_ID.fullmatch(session):
        headers["X-Fireworks-Session-Id"] = session
    return headers


def environment_api_key() -> str | None:
    """Read `FIREWORKS_API_KEY`; None if it is not set."""
    return os.environ.get("FIREWORKS_API_KEY") or None


def resolve_endpoint(
    *,
    base_url: str | None,
    api_key: str | None,
    inference_url: str | None = None,
    hotload_api_url: str | None = None,
) -> Endpoint:
    """Find the platform from the arguments, then the environment, then the defaults.

    The environment's key is never handed to an embedded platform.

    Raises:
        InvalidArgument: no key, or `base_url` is not a URL.
    """
    url = (base_url or os.environ.get("FIREWORKS_BASE_URL") or DEFAULT_BASE_URL).rstrip("/")
    endpoint = Endpoint(url, api_key)
    if endpoint.embedded:
        if endpoint.state_dir == "":
            raise InvalidArgument(
                "base_url='local:' names no folder: write 'local' or 'local:/path'"
            )
        return endpoint
    if not _URL.match(url):
        raise InvalidArgument(
            f"base_url={url!r} is neither an http(s) URL nor 'local' nor 'local:/path'"
        )
    url = checked_url("base_url" if base_url else "FIREWORKS_BASE_URL", url)
    key = api_key or environment_api_key()
    if not key:
        raise InvalidArgument(
            "no API key: pass api_key=, or set FIREWORKS_API_KEY (or use base_url='local', which "
            "needs none)"
        )
    checked_key(key, "api_key" if api_key else "FIREWORKS_API_KEY")
    return Endpoint(
        url,
        key,
        inference_url=inference_url,
        hotload_api_url=hotload_api_url,
        trainer_gateway_url=os.environ.get("FIREWORKS_TRAINER_GATEWAY_URL"),
    )


def resolve_tinker_server(*, base_url: str | None, api_key: str | None) -> Endpoint:
    """Find a Tinker server from the arguments, then `TINKER_BASE_URL` and `TINKER_API_KEY`.

    Raises:
        InvalidArgument: no key, or `base_url` is not a URL.
    """
    url = (base_url or os.environ.get("TINKER_BASE_URL") or "").rstrip("/")
    if not _URL.match(url):
        raise InvalidArgument(
            f"base_url={url!r}: pass the http(s) URL of a Tinker server, or set TINKER_BASE_URL"
        )
    url = checked_url("base_url" if base_url else "TINKER_BASE_URL", url)
    key = api_key or os.environ.get("TINKER_API_KEY")
    if not key:
        raise InvalidArgument("no API key: pass api_key=, or set TINKER_API_KEY")
    checked_key(key, "api_key" if api_key else "TINKER_API_KEY")
    return Endpoint(url, key, tinker_only=True)


def cache_dir() -> Path:
    """Find the folder for files that can be fetched again: `XDG_CACHE_HOME`, else `~/.cache`."""
    from platformdirs.unix import Unix  # not needed to build a service

    return Unix(_FOLDER).user_cache_path


def state_dir() -> Path:
    """Find the folder for files that outlive a process: `XDG_STATE_HOME`, else `~/.local/state`."""
    from platformdirs.unix import Unix

    return Unix(_FOLDER).user_state_path


def session_tags() -> list[str]:
    """Read the tags of a new trainer session from `TINKER_TAGS`, comma-separated."""
    return [tag for tag in os.environ.get("TINKER_TAGS", "").split(",") if tag]
