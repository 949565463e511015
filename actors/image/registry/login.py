"""Who we are to a registry, as a value: a login, and its form as JSON.  Small, for clients load it.  No I/O."""

from __future__ import annotations

import base64
import binascii

import msgspec


class Login(msgspec.Struct, frozen=True):
    """What proves who we are to one registry: user name and password, or a token in their place.

    `identity_token` is exchanged for tokens at the registry's token server; `registry_token` is sent as it is.
    """

    user: str = ""
    password: str = ""
    identity_token: str = ""
    registry_token: str = ""

    @property
    def basic(self) -> str:
        """The value of an Authorization header."""
        return "Basic " + base64.b64encode(f"{self.user}:{self.password}".encode()).decode()

    @property
    def fingerprint(self) -> str:
        """Tells one login from another, in memory.  Not to be stored: a weak password could be guessed from it."""
        import hashlib

        return hashlib.sha256(msgspec.msgpack.encode(self)).hexdigest()

    def __repr__(self) -> str:
        return f"Login({self.user!r}, …)"  # secrets stay out of logs and tracebacks


class Access(msgspec.Struct, frozen=True):
    """How a process may come at an image: the login that came with a task, None for Docker's, and the registry's mirrors."""

    login: Login | None = None
    mirrors: list[str] = []


class Auth(msgspec.Struct):
    """One entry of `auths` in Docker's config.json."""

    auth: str = ""
    username: str = ""
    password: str = ""
    identitytoken: str = ""
    registrytoken: str = ""


def parse_login(document: bytes) -> Login:
    """A login as JSON: one entry of `auths`, such as {"username": …, "password": …}.  Raises ValueError, without the secret."""
    try:
        login = parse_auth(msgspec.json.decode(document, type=Auth))
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        login = None
    if login is None:
        raise ValueError("it must be a JSON object of username and password, auth, identitytoken or registrytoken")
    return login


def parse_auth(auth: Auth) -> Login | None:
    """The login of one entry of `auths`; None when there is none in it."""
    if auth.identitytoken or auth.registrytoken:
        return Login(identity_token=auth.identitytoken, registry_token=auth.registrytoken)
    if auth.auth:
        try:
            user, colon, password = base64.b64decode(auth.auth, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            return None
        return Login(user, password.rstrip("\0")) if colon else None
    return Login(auth.username, auth.password) if auth.username else None
