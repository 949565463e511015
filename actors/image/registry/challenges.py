"""How a registry wants to be asked: its challenge (RFC 7235), and a token for it.  No I/O.

The token protocol is the distribution project's (docs/spec/auth/token.md, and oauth.md for identity tokens).
"""

from __future__ import annotations

import re
import urllib.parse
from collections.abc import Iterable

import msgspec

_PARAMETER = re.compile(r'(\w+)="([^"]*)"')
_TOKEN_TEXT = re.compile(r"[!-~]+")
_CLIENT_ID = "aerie"  # who asks, in the words of oauth.md; servers only log it


class BearerChallenge(msgspec.Struct, frozen=True):
    """The registry wants a token from `realm`."""

    realm: str
    service: str
    scope: str

    def url(self) -> str:
        """Where the token is to be had."""
        query = urllib.parse.urlencode([(k, v) for k, v in (("service", self.service), ("scope", self.scope)) if v])
        return f"{self.realm}{'&' if '?' in self.realm else '?'}{query}"

    def form(self, identity_token: str) -> dict[str, str]:
        """What is posted to `realm` to get a token for an identity token."""
        return {
            "grant_type": "refresh_token",
            "service": self.service,
            "client_id": _CLIENT_ID,
            "scope": self.scope,
            "refresh_token": identity_token,
        }


class BasicChallenge(msgspec.Struct, frozen=True):
    """The registry wants user name and password."""


class _Token(msgspec.Struct):
    token: str = ""
    access_token: str = ""


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
    token = answer.token or answer.access_token
    return token if is_token(token) else None


def is_token(text: str) -> bool:
    """Whether it may stand in a header: printable ASCII without spaces, as RFC 6750 has it (and nothing that ends the header)."""
    return bool(_TOKEN_TEXT.fullmatch(text))
