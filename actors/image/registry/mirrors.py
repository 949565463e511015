"""Where else a registry's repositories are to be had.  No I/O.

A setting names mirrors as `REGISTRY=MIRROR` pairs with spaces between, those of one registry in the order in which they are
asked: `docker.io=https://mirror.example/hub docker.io=10.0.0.5:5000`.  A mirror is HOST[:PORT][/PREFIX], with or without `http://`
or `https://` in front; without, it is reached as a registry of that name would be.
"""

from __future__ import annotations

import re

from actors.image.errors import ReferenceInvalid
from actors.image.registry.reference import DEFAULT_REGISTRY, Reference

_MIRROR = re.compile(r"(?:(https?)://)?([^/]+)(?:/(.*))?")


def mirrors_of(registry: str, setting: str) -> list[str]:
    """The mirrors that `setting` has for `registry`, in their order."""
    pairs = [pair.partition("=") for pair in setting.split()]
    return [mirror for of, _, mirror in pairs if of == registry]


def host_of(mirror: str) -> str:
    """HOST[:PORT] of a mirror."""
    match = _MIRROR.fullmatch(mirror)
    return match[2] if match else mirror


def api_url(place: str, repository: str) -> str:
    """Where the API of the distribution specification serves `repository`: at a registry, or at a mirror.

    Raises ReferenceInvalid for a mirror that is none.
    """
    match = _MIRROR.fullmatch(place)
    if not match:
        raise ReferenceInvalid(f"{place!r} is not a mirror; expected [http://|https://]HOST[:PORT][/PREFIX]")
    scheme, host, prefix = match.groups()
    if scheme is None:
        scheme = "http" if Reference(host, repository, None, None).is_loopback else "https"
    host = "registry-1.docker.io" if host == DEFAULT_REGISTRY else host
    path = "/".join([part for part in (prefix or "").split("/") if part] + [repository])
    return f"{scheme}://{host}/v2/{path}"
