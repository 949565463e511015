"""Who we are to a registry: credentials from Docker's config.json and from the credential helpers that it names.

Formats: Docker's config.json (`auths`, `credHelpers`, `credsStore`), as `docker login` writes it, and the protocol of
docker-credential-helpers: `docker-credential-NAME get`, the registry on stdin, JSON on stdout.  A helper is a program of the
operator's, run as this process's user, and killed when it takes too long or when this process dies.
"""

from __future__ import annotations

import os
import pathlib
import re
import signal
import subprocess
from collections.abc import Callable
from typing import TypeVar

import msgspec

from actors.image.registry.login import Auth, Login, parse_auth
from actors.image.registry.reference import DEFAULT_REGISTRY

HELPER_TIMEOUT_S = 15.0  # some ask a cloud's metadata server
_DEFAULT_REGISTRY_KEY = "https://index.docker.io/v1/"  # what Docker calls docker.io in its config and to its helpers
_IDENTITY_TOKEN_USER = "<token>"  # a helper's user name when its secret is an identity token
_HELPER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


class HelperFailed(Exception):
    """A credential helper gave no answer that can be used.  The text says which and why, without secrets."""


T = TypeVar("T")
FindLogin = Callable[[str], Login | None]


class _DockerConfig(msgspec.Struct, rename="camel"):
    auths: dict[str, Auth] | None = None
    cred_helpers: dict[str, str] | None = None
    creds_store: str | None = None


class _Helped(msgspec.Struct, rename="pascal"):
    username: str = ""
    secret: str = ""


def docker_login(registry: str) -> Login | None:
    """What $DOCKER_CONFIG/config.json, or ~/.docker/config.json, has for `registry`, if anything.

    The registry's own helper is asked, or else the one for all; what it does not have may stand in the file.  A file that is
    not there, not readable or not understood counts as none: a public image needs no login, and for another the registry's
    refusal says so.  Raises HelperFailed when a helper fails and the file has nothing either.
    """
    directory = os.environ.get("DOCKER_CONFIG") or os.path.expanduser("~/.docker")
    try:
        config = msgspec.json.decode(pathlib.Path(directory, "config.json").read_bytes(), type=_DockerConfig)
    except (OSError, msgspec.MsgspecError):
        return None
    name = _of_host(config.cred_helpers or {}, registry) or config.creds_store
    failure = None
    if name:
        try:
            if found := helper_login(name, registry):
                return found
        except HelperFailed as error:
            failure = error
    auth = _of_host(config.auths or {}, registry)
    login = parse_auth(auth) if auth else None
    if login is None and failure is not None:
        raise failure
    return login


def helper_login(name: str, registry: str) -> Login | None:
    """What `docker-credential-NAME` has for `registry`; None when it says that it has nothing.  Raises HelperFailed."""
    if not _HELPER.fullmatch(name):
        raise HelperFailed(f"{name!r} is not the name of a credential helper")
    program = f"docker-credential-{name}"
    server = _DEFAULT_REGISTRY_KEY if registry == DEFAULT_REGISTRY else registry
    # setpriv: so that it ends with us, whatever it is doing, if we are killed.
    command = ["setpriv", "--pdeathsig", "KILL", program, "get"]
    try:
        code, answer, complaint = _run(command, server.encode())
    except subprocess.TimeoutExpired:
        raise HelperFailed(f"{program} gave no answer within {HELPER_TIMEOUT_S:g} s") from None
    except OSError as error:
        raise HelperFailed(f"{program} cannot be run: {error.strerror}") from None
    if code:
        # It says why on stdout (the protocol), or on stderr (when it is broken, or is not there).
        said = (answer.strip() or complaint.strip()).decode(errors="replace")
        if "credentials not found" in said:
            return None
        raise HelperFailed(f"{program} failed: {said[-200:] or f'exit code {code}'}")
    try:
        helped = msgspec.json.decode(answer, type=_Helped)
    except msgspec.MsgspecError:
        raise HelperFailed(f"{program} answers with what is not a login") from None
    if helped.username == _IDENTITY_TOKEN_USER:
        return Login(identity_token=helped.secret)
    return Login(helped.username, helped.secret) if helped.secret else None


def _run(command: list[str], text: bytes) -> tuple[int, bytes, bytes]:
    """Exit code, stdout and stderr of `command` with `text` on its stdin.  Raises OSError, TimeoutExpired."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, start_new_session=True) as process:
        try:
            answer, complaint = process.communicate(text, HELPER_TIMEOUT_S)
        except BaseException:  # too late, or the build is over its time
            os.killpg(process.pid, signal.SIGKILL)  # and what it started
            raise
    return process.returncode, answer, complaint


def _of_host(entries: dict[str, T], registry: str) -> T | None:
    """The entry for a registry, whose key may also be an address with it in."""
    if registry == DEFAULT_REGISTRY and _DEFAULT_REGISTRY_KEY in entries:
        return entries[_DEFAULT_REGISTRY_KEY]
    if registry in entries:
        return entries[registry]
    for key, entry in entries.items():
        if re.sub(r"^https?://", "", key).partition("/")[0] == registry:
            return entry
    return None
