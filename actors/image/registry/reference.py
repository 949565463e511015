"""The name of an image, as people write it, in full.

The grammar is the one of the distribution project (github.com/distribution/reference, regexp.go), the defaults are Docker's:
`ubuntu` is `docker.io/library/ubuntu:latest`.  No I/O.
"""

from __future__ import annotations

import dataclasses
import ipaddress
import re

from actors.image.errors import ReferenceInvalid

DEFAULT_REGISTRY = "docker.io"
DEFAULT_TAG = "latest"
NAME_SIZE_MAX = 255  # registry and repository together, as the grammar says
TEXT_SIZE_MAX = 512  # such a name, a tag of 128 and a digest are fewer

_LABEL = r"[a-zA-Z0-9](?:[a-zA-Z0-9-]*[a-zA-Z0-9])?"
_REGISTRY = re.compile(rf"(?:{_LABEL}(?:\.{_LABEL})*|\[[0-9a-fA-F:]+\])(?::[0-9]{{1,5}})?")
_COMPONENT = r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*"
_REPOSITORY = re.compile(rf"{_COMPONENT}(?:/{_COMPONENT})*")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")
_DIGEST = re.compile(r"sha256:[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class Reference:
    """An image's name in full.  `str()` of it parses to an equal one.

    `tag` is None only when there is a digest; with both, the digest decides and the tag is a remark.
    """

    registry: str  # "docker.io", "localhost:5000", "[::1]:5000"
    repository: str  # "library/ubuntu"
    tag: str | None
    digest: str | None  # "sha256:" and 64 hex digits

    @classmethod
    def parse(cls, text: str) -> Reference:
        """The reference that `text` names.  Raises ReferenceInvalid, saying what is wrong with it."""
        if len(text) > TEXT_SIZE_MAX:
            raise _invalid(text, f"it is longer than {TEXT_SIZE_MAX} characters")
        name, at, digest = text.partition("@")
        if at and not _DIGEST.fullmatch(digest):
            raise _invalid(text, f"{digest!r} is not a digest (sha256: and 64 lower-case hex digits)")
        first, slash, rest = name.partition("/")
        # Docker's rule for what is a registry: a dot, a port or capitals (which no repository may have), or just localhost.
        if slash and ("." in first or ":" in first or first == "localhost" or first != first.lower()):
            registry, name = first, rest
        else:
            registry = DEFAULT_REGISTRY
        if not _REGISTRY.fullmatch(registry) or not _is_port(registry):
            raise _invalid(text, f"{registry!r} is not a registry's host name with an optional port")
        repository, colon, tag = name.partition(":")
        if colon and not _TAG.fullmatch(tag):
            raise _invalid(text, f"{tag!r} is not a tag (at most 128 of A-Z a-z 0-9 _ . -)")
        if registry in ("index.docker.io", DEFAULT_REGISTRY):
            registry = DEFAULT_REGISTRY
            repository = repository if "/" in repository else f"library/{repository}"
        if not _REPOSITORY.fullmatch(repository):
            raise _invalid(
                text, f"{repository.removeprefix('library/')!r} is not a repository (a-z 0-9, with . _ - and / between)"
            )
        if len(registry) + 1 + len(repository) > NAME_SIZE_MAX:
            raise _invalid(text, f"it is longer than {NAME_SIZE_MAX} characters")
        if not colon and not at:
            tag = DEFAULT_TAG
        return cls(registry, repository, tag or None, digest or None)

    @property
    def host(self) -> str:
        """The registry without its port: "localhost", "::1"."""
        return _host_and_port(self.registry)[0]

    @property
    def is_loopback(self) -> bool:
        """Whether the registry is on this machine, which is reached by plain HTTP, as Docker does; all others by HTTPS."""
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host == "localhost"

    @property
    def wanted(self) -> str:
        """What the registry is asked for: the digest if there is one, else the tag."""
        return self.digest or self.tag or DEFAULT_TAG

    def pinned(self, digest: str) -> Reference:
        """The same repository, at this manifest and no other."""
        return dataclasses.replace(self, tag=None, digest=digest)

    def __str__(self) -> str:
        tag = f":{self.tag}" if self.tag else ""
        digest = f"@{self.digest}" if self.digest else ""
        return f"{self.registry}/{self.repository}{tag}{digest}"


def _host_and_port(registry: str) -> tuple[str, str]:
    if registry.startswith("["):
        host, _, port = registry[1:].partition("]")
        return host, port.removeprefix(":")
    host, _, port = registry.partition(":")
    return host, port


def _is_port(registry: str) -> bool:
    _, port = _host_and_port(registry)
    return not port or 0 < int(port) < 65536


def _invalid(text: str, why: str) -> ReferenceInvalid:
    shown = text if len(text) <= 100 else text[:100] + "…"
    return ReferenceInvalid(f"{shown!r} is not an image reference: {why}; expected [HOST[:PORT]/]NAME[:TAG][@sha256:…]")
