"""One host that serves a repository, the registry itself or a mirror of it: how it is asked, and what for.

An answer comes from the host, or from wherever it sends us: a storage service, mostly, by an address that is signed and runs out.
Redirects are followed here and not by urllib3, because only the host itself may see the Authorization header (a storage
service answers 400 to two kinds of authorisation, and another host has no business with it), because the address is
remembered for the ranges to come, and because a storage's refusal means "ask the registry for a new address", not "log in".
Not thread-safe: one owner.
"""

from __future__ import annotations

import re
import time
import urllib.parse
from typing import Final

import urllib3
from urllib3.exceptions import HTTPError

from actors.image.errors import ImageError, RegistryBroken, RegistryUnreachable, Unauthorised
from actors.image.registry.challenges import BasicChallenge, BearerChallenge, is_token, parse_challenge, parse_token
from actors.image.registry.credentials import FindLogin, HelperFailed
from actors.image.registry.login import Login
from actors.image.registry.patience import Patience, retry_after_s

ANSWERS: Final = (200, 206, 404, 416)  # what `get` gives back; all else is an error
REDIRECTS_MAX = 5
_REDIRECTS = (301, 302, 303, 307, 308)
_PASSING = (408, 429, 500, 502, 503, 504)
# A signed address that has run out: 403 at S3, Google and Azure, the others elsewhere.
_RUN_OUT = (400, 401, 403, 404, 410)
_TOKEN_BYTES_MAX = 1 << 20
_DISCARD_BYTES_MAX = 64 << 10
_PUT_OFF_S = 60.0


class _TokenRefused(Exception):
    """The token server does not know us, so it says with this status; there may be a newer login."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Endpoint:
    """`name` is the host, for errors; `url` its API for the one repository (https://HOST/v2/REPOSITORY); `about` the image.

    `find_login` is asked for a login when the host wants one, and again when it refuses the one it got: credentials are
    renewed while a process runs.  `query` is added to each request to the host itself.
    """

    def __init__(
        self, name: str, url: str, about: str, pool: urllib3.PoolManager, find_login: FindLogin, scope: str, query: str = ""
    ) -> None:
        self.name = name
        self.put_off_until = 0.0  # on time.monotonic(); for whoever has others to ask
        self._url = url
        self._about = about
        self._pool = pool
        self._find_login = find_login
        self._scope = scope
        self._query = f"?{query}" if query else ""
        self._login: Login | None = None
        self._login_problem = ""
        self._login_asked = False
        self._authorization: str | None = None
        self._challenge: BearerChallenge | BasicChallenge | None = None
        self._places: dict[str, str] = {}  # by path: where it was found, on another host

    def put_off(self) -> None:
        self.put_off_until = time.monotonic() + _PUT_OFF_S

    def get(self, path: str, headers: dict[str, str], patience: Patience) -> urllib3.BaseHTTPResponse:
        """The answer to a GET, its status one of ANSWERS, its body unread.  Raises ImageError for everything else."""
        start = self._url + path + self._query
        url = self._places.get(path, start)
        refusals = asked_anew = 0
        while True:
            response, place = self._follow(url, headers, patience)
            at_home = _origin(place) == _origin(start)
            if at_home and response.status in (401, 403):
                refusals += 1
                # Also with a token in hand: it may have run out, which some registries call 401 and others 403.
                if refusals <= 2 and self._authorise(response, patience, renew=refusals > 1):
                    continue
            elif not at_home and response.status in _RUN_OUT and (url != start or not asked_anew):
                self._places.pop(path, None)
                asked_anew, url = 1, start
                discard(response)
                continue
            if response.status not in ANSWERS:
                discard(response)
                raise self._refused(response)
            if not at_home:
                self._places[path] = place
            return response

    def unreachable(self, error: HTTPError) -> RegistryUnreachable:
        cause = _plain(getattr(error, "reason", None) or error)
        return RegistryUnreachable(
            f"{self._about}: the registry {self.name} cannot be reached ({cause}); is it up, and its name right?"
        )

    def _follow(self, url: str, headers: dict[str, str], patience: Patience) -> tuple[urllib3.BaseHTTPResponse, str]:
        """The answer that is no redirect, and the address that it came from."""
        home = _origin(self._url)
        for _ in range(REDIRECTS_MAX + 1):
            authorised = self._authorization is not None and _origin(url) == home
            sent = headers | {"Authorization": self._authorization or ""} if authorised else headers
            response = self._send("GET", url, sent, patience)
            location = response.headers.get("Location")
            if response.status not in _REDIRECTS or not location:
                return response, url
            discard(response)
            target = urllib.parse.urljoin(url, location)
            schemes = ("https",) if url.startswith("https:") else ("http", "https")
            if urllib.parse.urlsplit(target).scheme not in schemes:
                raise RegistryBroken(f"{self._about}: {self.name} sends us to {_shown(target)}, which is not {schemes[-1]}")
            url = target
        raise RegistryBroken(f"{self._about}: {self.name} sends us on and on, at last to {_shown(url)}")

    def _send(
        self, method: str, url: str, headers: dict[str, str], patience: Patience, form: dict[str, str] | None = None
    ) -> urllib3.BaseHTTPResponse:
        """The answer to one request, which is repeated while what is wrong may pass.  Raises RegistryUnreachable."""
        body = None
        if form is not None:
            body = urllib.parse.urlencode(form)
            headers = headers | {"Content-Type": "application/x-www-form-urlencoded"}
        while True:
            timeout = urllib3.Timeout(connect=patience.connect_timeout_s, read=patience.answer_timeout_s)
            try:
                response = self._pool.request(
                    method,
                    url,
                    body=body,
                    headers=headers,
                    timeout=timeout,
                    redirect=False,
                    retries=False,
                    preload_content=False,
                )
            except HTTPError as error:
                if not patience.again():
                    raise self.unreachable(error) from None
                continue
            if response.status in _PASSING and patience.again(retry_after_s(response.headers)):
                discard(response)
                continue
            return response

    # --- who we are ---

    def _authorise(self, response: urllib3.BaseHTTPResponse, patience: Patience, renew: bool) -> bool:
        """Get what the challenge in `response` (or the last one before it) asks for; False when there is nothing new to show.

        `renew`: what we had to show just now was refused.  Raises Unauthorised when the token server refuses, RegistryBroken.
        """
        discard(response)  # so that the connection can be used again
        self._challenge = parse_challenge(response.headers.getlist("WWW-Authenticate"), self._scope) or self._challenge
        refusal: _TokenRefused | None = None
        for renewing in (True,) if renew else (False, True):
            if renewing and not self._renew_login():
                break
            try:
                proof = self._proof(patience)
            except _TokenRefused as error:
                refusal = error
                continue
            if proof is not None and proof != self._authorization:
                self._authorization = proof
                return True
        if refusal is not None:
            raise self._unauthorised(refusal.status)
        return False

    def _proof(self, patience: Patience) -> str | None:
        """An Authorization header for the challenge; None when we have nothing to show.  Raises _TokenRefused, ImageError."""
        login = self._known_login()
        if login is not None and is_token(login.registry_token):
            return f"Bearer {login.registry_token}"
        if isinstance(self._challenge, BearerChallenge):
            return f"Bearer {self._token(self._challenge, login, patience)}"
        if isinstance(self._challenge, BasicChallenge) and login is not None and login.user:
            return login.basic
        return None

    def _token(self, challenge: BearerChallenge, login: Login | None, patience: Patience) -> str:
        """A new token.  Raises _TokenRefused, ImageError."""
        if self._url.startswith("https:") and not challenge.realm.startswith("https:"):
            raise RegistryBroken(f"{self.name} sends us to {challenge.realm}, without TLS, for a token")
        if login is not None and login.identity_token:
            answer = self._send("POST", challenge.realm, {}, patience, form=challenge.form(login.identity_token))
        else:
            headers = {"Authorization": login.basic} if login is not None else {}
            answer = self._send("GET", challenge.url(), headers, patience)
        try:
            token = parse_token(answer.read(_TOKEN_BYTES_MAX)) if answer.status == 200 else None
        except HTTPError as error:
            raise self.unreachable(error) from None
        discard(answer)
        if answer.status in (401, 403):
            raise _TokenRefused(answer.status)
        if token is None:
            raise self._refused(answer)
        return token

    def _known_login(self) -> Login | None:
        if not self._login_asked:
            self._renew_login()
        return self._login

    def _renew_login(self) -> bool:
        """Ask for our login again → whether it is another one now."""
        before, self._login_asked = self._login, True
        try:
            self._login = self._find_login(self.name) or before
            self._login_problem = ""
        except HelperFailed as error:
            self._login_problem = f" ({error})"
        return self._login != before

    def _refused(self, response: urllib3.BaseHTTPResponse) -> ImageError:
        host, status = self.name, response.status
        if status in (401, 403):
            return self._unauthorised(status)
        if status == 429:
            wait_s = retry_after_s(response.headers)
            when = f"in {wait_s:.0f} s" if wait_s else "later"
            return RegistryUnreachable(f"{self._about}: {host} answers too many requests (429); try again {when}, or log in")
        return RegistryBroken(f"{self._about}: {host} answers {status} {response.reason or ''}".rstrip() + "; see its log")

    def _unauthorised(self, status: int) -> Unauthorised:
        had = "these credentials" if self._login else "anonymous access"
        return Unauthorised(
            f"{self._about}: {self.name} refuses {had} ({status}){self._login_problem}: "
            f"the image does not exist, or `docker login {self.name}` with an account that may read it is needed"
        )


def discard(response: urllib3.BaseHTTPResponse) -> None:
    """Be done with an answer: its connection can be used again if what is left of the body is small, else it is closed."""
    try:
        if response.status == 416:  # with which docker-registry announces the whole blob's length, and sends less
            response.close()
            return
        response.read(_DISCARD_BYTES_MAX)
        if response.length_remaining or response.length_remaining is None:
            response.close()
    except HTTPError:
        response.close()
    response.release_conn()


def _origin(url: str) -> tuple[str, str]:
    parts = urllib.parse.urlsplit(url)
    return parts.scheme, parts.netloc


def _shown(url: str) -> str:
    """An address without its query, in which a signature may stand."""
    return url.partition("?")[0][:200]


def _plain(error: object) -> str:
    """urllib3's text without the object's address in front."""
    return re.sub(r"^.*?>: |^.*?object at 0x[0-9a-f]+>: ", "", str(error))
