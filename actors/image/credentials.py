"""How a registry wants to be asked: its challenge (RFC 7235), a token for it, and credentials from Docker's config.json.

The token protocol is the distribution project's (docs/spec/auth/token.md).  No I/O but the reading of config.json.
"""

from __future__ import annotations

import base64
import binascii
import os
import pathlib
import re
import urllib.parse
from collections.abc import Iterable

import msgspec

_PARAMETER = re.compile(r'(\w+)="([^"]*)"')


class Login(msgspec.Struct, frozen=True):
    """A user name and password for one registry."""

    user: str
    password: str

    @property
    def basic(self) -> str:
        """The value of an Authorization header."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()


class BearerChallenge(msgspec.Struct, frozen=True):
    """The registry wants a token from `realm`."""

    realm: str
    service: str
    scope: str

    def url(self) -> str:
        """Where the token is to be had."""
        query = urllib.parse.urlencode([(k, v) for k, v in (("service", self.service), ("scope", self.scope)) if v])
        return f"{self.realm}{'&' if '?' in self.realm else '?'}{query}"


class BasicChallenge(msgspec.Struct, frozen=True):
    """The registry wants user name and password."""


class _Token(msgspec.Struct):
    token: str = ""
    access_token: str = ""


class _Auth(msgspec.Struct):
    auth: str = ""


class _DockerConfig(msgspec.Struct):
    auths: dict[str, _Auth] | None = None


def parse_challenge(headers: Iterable[str], scope: str) -> BearerChallenge | BasicChallenge | None:
    """The challenge in the WWW-Authenticate headers, a token's before a password's; `scope` is for one that names none."""
    challenges = list(headers)
    for challenge in challenges:
        scheme, _, rest = challenge.strip().partition(" ")
        parameters = {key.lower(): value for key, value in _PARAMETER.findall(rest)}
        if scheme.lower() == "bearer" and parameters.get("realm"):
            return BearerChallenge(parameters["realm"], parameters.get("service", ""), parameters.get("scope", scope))
    if any(challenge.strip().lower().startswith("basic") for challenge in challenges):
        return BasicChallenge()
    return None


def parse_token(body: bytes) -> str | None:
    """The token in a token server's answer, or None when there is none."""
    try:
        answer = msgspec.json.decode(body, type=_Token)
    except msgspec.MsgspecError:
        return None
    return answer.token or answer.access_token or None


def docker_login(registry: str) -> Login | None:
    """What `docker login` left for `registry` in $DOCKER_CONFIG or ~/.docker, if anything.

    A config.json that is not there, not readable or not understood counts as none: a public image needs none, and for
    another the registry's refusal says so.  Credential helpers are not asked.
    """
    directory = os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")
    try:
        config = msgspec.json.decode(pathlib.Path(directory, "config.json").read_bytes(), type=_DockerConfig)
    except (OSError, msgspec.MsgspecError):
        return None
    auths = config.auths or {}
    names = ("https://index.docker.io/v1/", "docker.io") if registry == "docker.io" else (registry, f"https://{registry}")
    for name in names:
        if name in auths:
            try:
                user, colon, password = base64.b64decode(auths[name].auth, validate=True).decode().partition(":")
            except (binascii.Error, UnicodeDecodeError):
                return None
            return Login(user, password.rstrip("\0")) if colon else None
    return None
