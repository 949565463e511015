"""One repository of a registry, over HTTP: its manifests and blobs, and ranges of blobs.

The protocol is the OCI distribution specification 1.1.  Every wait is bounded: 5 s to connect, 30 s between two pieces of an
answer; what may pass (no connection, 429, 5xx) is tried a few times.  What comes back is an image's content, or an
`errors.ImageError` that names who must do something about it.  Not thread-safe: one owner.
"""

from __future__ import annotations

import hashlib
import re
import types
from collections.abc import Iterator

import urllib3
from urllib3.exceptions import HTTPError
from urllib3.util import Retry, Timeout

from actors.image.credentials import BasicChallenge, BearerChallenge, Login, docker_login, parse_challenge, parse_token
from actors.image.errors import ContentCorrupt, ImageError, ImageUnknown, RegistryBroken, RegistryUnreachable, Unauthorised
from actors.image.manifests import (
    ACCEPT,
    DOCUMENT_SIZE_MAX,
    ConfigDocument,
    Descriptor,
    Index,
    Manifest,
    Platform,
    choose,
    parse_config,
    parse_manifest,
)
from actors.image.reference import DEFAULT_REGISTRY, Reference

PIECE_SIZE = 256 << 10  # bytes of a blob handed on at once
TIMEOUT = Timeout(connect=5.0, read=30.0)
# `raise_on_*` off: the last answer comes back and says more than "too many".  urllib3 itself follows redirects and leaves
# Authorization out when they lead to another host (a storage service answers 400 to two kinds of authorisation).
RETRIES = Retry(
    total=8,
    connect=2,
    read=2,
    status=3,
    redirect=5,
    backoff_factor=0.2,
    status_forcelist=(429, 500, 502, 503, 504),
    raise_on_status=False,
    raise_on_redirect=False,
    retry_after_max=30,
)
STREAM_ATTEMPTS = 4  # without one byte of progress in between
INDEX_DEPTH_MAX = 3  # an index may name indexes
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class Registry:
    """The repository of one reference.  A context manager: leaving it closes the connections."""

    def __init__(self, reference: Reference, login: Login | None = None) -> None:
        """`login` None means what Docker's config.json has for this registry, or anonymous."""
        self.reference = reference
        self._pool = urllib3.PoolManager(timeout=TIMEOUT, retries=RETRIES, maxsize=4)
        self._login = login or docker_login(reference.registry)
        self._authorization: str | None = None
        self._challenge: BearerChallenge | BasicChallenge | None = None
        self._manifests: dict[str, bytes] = {}  # by digest: resolve() has often read what manifest() is asked for
        scheme = "http" if reference.is_loopback else "https"
        host = "registry-1.docker.io" if reference.registry == DEFAULT_REGISTRY else reference.registry
        self._url = f"{scheme}://{host}/v2/{reference.repository}"

    def __enter__(self) -> Registry:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self._pool.clear()

    def resolve(self, platform: Platform) -> str:
        """The digest of the manifest that the reference names for `platform`.  Raises ImageError."""
        wanted = self.reference.wanted
        for _ in range(INDEX_DEPTH_MAX):
            digest, body = self._manifest(wanted)
            document = parse_manifest(body, str(self.reference))
            if isinstance(document, Manifest):
                return digest
            chosen = choose(document, platform, str(self.reference))
            wanted = chosen.digest
            if "index" not in chosen.media_type and "list" not in chosen.media_type:
                return wanted
        raise RegistryBroken(f"{self.reference}: an index of indexes, more than {INDEX_DEPTH_MAX} deep")

    def manifest(self, digest: str) -> Manifest:
        """The manifest of that digest (of one platform's image).  Raises ImageError."""
        document = parse_manifest(self._manifest(digest)[1], str(self.reference))
        if isinstance(document, Index):
            raise RegistryBroken(f"{self.reference}: {digest} is an index where a manifest was announced")
        return document

    def config(self, manifest: Manifest, platform: Platform) -> ConfigDocument:
        """The image's config, its digest verified.  Raises ImageError."""
        wanted = manifest.config
        body = bytearray()
        for piece in self.blob(wanted):
            body += piece
            if len(body) > DOCUMENT_SIZE_MAX:
                raise RegistryBroken(f"{self.reference}: a config of more than {DOCUMENT_SIZE_MAX} bytes")
        self._verify(bytes(body), wanted.digest)
        return parse_config(bytes(body), manifest, platform, str(self.reference))

    def blob(self, blob: Descriptor) -> Iterator[bytes]:
        """The blob's bytes, in pieces of at most PIECE_SIZE, NOT verified: whoever reads them to the end hashes them.

        A connection that breaks is made again from where it broke.  Raises ImageError.
        """
        position = failures = 0
        while True:
            response = self._get_blob(blob.digest, position, None)
            try:
                for piece in response:
                    position += len(piece)
                    failures = 0
                    yield piece
                return
            except HTTPError as error:
                failures += 1
                if failures == STREAM_ATTEMPTS:
                    raise self._unreachable(error) from None

    def read_range(self, digest: str, offset: int, length: int) -> bytes:
        """`length` bytes of a blob from `offset`, NOT verified.  Raises ImageError; ContentCorrupt when the blob is shorter."""
        for attempt in range(1, STREAM_ATTEMPTS + 1):
            data = bytearray()
            try:
                for piece in self._get_blob(digest, offset, length):
                    data += piece
                    if len(data) >= length:  # a registry that knows no ranges sends all that follows
                        return bytes(data[:length])
            except HTTPError as error:
                if attempt == STREAM_ATTEMPTS:
                    raise self._unreachable(error) from None
            else:
                break
        raise ContentCorrupt(f"{self.reference}: the registry's copy of {digest} ends before byte {offset + length}")

    def _manifest(self, wanted: str) -> tuple[str, bytes]:
        """Digest and body of the manifest or index with that tag or digest."""
        if wanted in self._manifests:
            return wanted, self._manifests[wanted]
        response = self._get(f"/manifests/{wanted}", {"Accept": ACCEPT})
        if response.status == 404:
            raise ImageUnknown(
                f"{self.reference}: the registry {self.reference.registry} has no such image; check name and tag"
            )
        body = self._document(response)
        announced = response.headers.get("Docker-Content-Digest", "")
        digest = wanted if wanted.startswith("sha256:") else announced
        if digest.startswith("sha256:"):
            self._verify(body, digest)
        else:
            digest = "sha256:" + hashlib.sha256(body).hexdigest()
        self._manifests[digest] = body
        return digest, body

    def _get_blob(self, digest: str, offset: int, length: int | None) -> Iterator[bytes]:
        """The blob's bytes from `offset` on, `length` of them or all.  Raises ImageError, and what urllib3 raises."""
        headers = {}
        if offset or length is not None:
            headers["Range"] = f"bytes={offset}-{'' if length is None else offset + length - 1}"
        response = self._get(f"/blobs/{digest}", headers)
        if response.status == 404:
            response.close()
            raise RegistryBroken(
                f"{self.reference}: the registry has lost {digest}, a part of this image; push the image again"
            )
        if response.status == 416:
            response.close()
            raise ContentCorrupt(f"{self.reference}: the registry's copy of {digest} ends before byte {offset}")
        skip = offset
        if response.status == 206:
            skip = 0
            there = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
            if not there or int(there[1]) != offset:
                response.close()
                raise RegistryBroken(
                    f"{self.reference}: the registry answers with another range of {digest} than it was asked for"
                )
        return self._pieces(response, skip)

    def _pieces(self, response: urllib3.BaseHTTPResponse, skip: int) -> Iterator[bytes]:
        """What is left of an answer's body after `skip` bytes.  Left half way, it closes the connection."""
        try:
            for piece in response.stream(PIECE_SIZE, decode_content=False):
                if skip >= len(piece):
                    skip -= len(piece)
                    continue
                yield piece[skip:]
                skip = 0
        except BaseException:
            response.close()
            raise
        response.release_conn()

    def _document(self, response: urllib3.BaseHTTPResponse) -> bytes:
        """A small body.  Raises RegistryBroken when it is none."""
        body = bytearray()
        try:
            for piece in self._pieces(response, 0):
                body += piece
                if len(body) > DOCUMENT_SIZE_MAX:
                    response.close()
                    raise RegistryBroken(f"{self.reference}: a document of more than {DOCUMENT_SIZE_MAX} bytes")
        except HTTPError as error:
            raise self._unreachable(error) from None
        return bytes(body)

    def _get(self, path: str, headers: dict[str, str]) -> urllib3.BaseHTTPResponse:
        """The answer to a GET, of status 200, 206, 404 or 416, body unread.  Raises ImageError for everything else."""
        response = self._get_once(self._url + path, headers, self._authorization)
        if response.status in (401, 403) and not _was_redirected(response) and self._authorise(response):
            # Also with a token in hand: it may have run out, which some registries call 401 and others 403.
            response = self._get_once(self._url + path, headers, self._authorization)
        if response.status in (200, 206, 404, 416):
            return response
        response.close()
        raise self._refused(response)

    def _get_once(self, url: str, headers: dict[str, str], authorization: str | None) -> urllib3.BaseHTTPResponse:
        if authorization:
            headers = headers | {"Authorization": authorization}
        try:
            return self._pool.request("GET", url, headers=headers, preload_content=False)
        except HTTPError as error:
            raise self._unreachable(error) from None

    def _authorise(self, response: urllib3.BaseHTTPResponse) -> bool:
        """Get what the challenge in `response` (or the last one before it) asks for.  False when that cannot be had."""
        self._document(response)  # so that the connection can be used again
        scope = f"repository:{self.reference.repository}:pull"
        self._challenge = parse_challenge(response.headers.getlist("WWW-Authenticate"), scope) or self._challenge
        if isinstance(self._challenge, BasicChallenge) and self._login and self._authorization is None:
            self._authorization = self._login.basic
            return True
        if not isinstance(self._challenge, BearerChallenge):
            return False
        url = self._challenge.url()
        if self._url.startswith("https:") and not url.startswith("https:"):
            raise RegistryBroken(f"{self.reference.registry} sends us to {self._challenge.realm}, without TLS, for a token")
        answer = self._get_once(url, {}, self._login.basic if self._login else None)
        body = self._document(answer)
        token = parse_token(body) if answer.status == 200 else None
        if token is None:
            raise self._refused(answer)
        self._authorization = f"Bearer {token}"
        return True

    def _refused(self, response: urllib3.BaseHTTPResponse) -> ImageError:
        registry, status = self.reference.registry, response.status
        if status in (401, 403):
            had = "these credentials" if self._login else "anonymous access"
            return Unauthorised(
                f"{self.reference}: {registry} refuses {had} ({status}): "
                f"the image does not exist, or `docker login {registry}` with an account that may read it is needed"
            )
        if status == 429:
            return RegistryUnreachable(
                f"{self.reference}: {registry} answers too many requests (429); try again later, or log in"
            )
        return RegistryBroken(
            f"{self.reference}: {registry} answers {status} {response.reason or ''}".rstrip() + "; see its log"
        )

    def _unreachable(self, error: HTTPError) -> ImageError:
        cause = _plain(getattr(error, "reason", None) or error)
        registry = self.reference.registry
        return RegistryUnreachable(
            f"{self.reference}: the registry {registry} cannot be reached ({cause}); is it up, and its name right?"
        )

    def _verify(self, body: bytes, digest: str) -> None:
        found = "sha256:" + hashlib.sha256(body).hexdigest()
        if found != digest:
            raise ContentCorrupt(
                f"{self.reference}: the registry's copy of {digest} is damaged (it is {found}); push the image again"
            )


def _was_redirected(response: urllib3.BaseHTTPResponse) -> bool:
    """Whether it is another host's answer, whose challenges are not for us."""
    return response.retries is not None and any(step.redirect_location for step in response.retries.history)


def _plain(error: object) -> str:
    """urllib3's text without the object's address in front."""
    return re.sub(r"^.*?>: |^.*?object at 0x[0-9a-f]+>: ", "", str(error))
