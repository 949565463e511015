"""One repository of a registry, over HTTP: its manifests and blobs, and ranges of blobs.

The protocol is the OCI distribution specification 1.1.  Which hosts serve the repository, mirrors first and the registry last, is
decided here; how one host is asked, in `endpoint`; how long and how often, in `patience`.  What comes back is an image's content,
or an `errors.ImageError` that names who must do something about it.  Not thread-safe: one owner.
"""

from __future__ import annotations

import hashlib
import time
import types
from collections.abc import Generator, Iterator, Sequence

import urllib3
from urllib3.exceptions import HTTPError

from actors.image.errors import ContentCorrupt, ImageError, ImageUnknown, RegistryBroken, Unsupported
from actors.image.registry.blobs import Straggling, content_range, range_header, receive
from actors.image.registry.credentials import FindLogin, docker_login
from actors.image.registry.endpoint import Endpoint, discard
from actors.image.registry.login import Login
from actors.image.registry.manifests import (
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
from actors.image.registry.mirrors import api_url, host_of
from actors.image.registry.patience import Meter, Patience
from actors.image.registry.reference import Reference

INDEX_DEPTH_MAX = 3  # an index may name indexes
MIRROR_ATTEMPTS = 2  # of a mirror there is no need to expect much: the next one, or the registry, is asked instead
MIRROR_TIMEOUT_S = 15.0


class Registry:
    """The repository of one reference.  A context manager: leaving it closes the connections.

    `login` is for the registry itself, and never shown to a mirror.  Without it `find_login(HOST)` is asked for one, for the registry
    or a mirror, when the host wants one; asked again when it is refused, it may find a newer one.  `mirrors` (see `mirrors`) are asked
    before the registry; what is wrong with one is no error as long as another, or the registry, answers.
    """

    def __init__(
        self,
        reference: Reference,
        login: Login | None = None,
        *,
        mirrors: Sequence[str] = (),
        find_login: FindLogin = docker_login,
    ) -> None:
        self.reference = reference
        self._pool = urllib3.PoolManager(maxsize=4)
        self._manifests: dict[str, bytes] = {}  # by digest: resolve() has often read what manifest() is asked for
        about, scope = str(reference), f"repository:{reference.repository}:pull"
        url = api_url(reference.registry, reference.repository)
        own_login = (lambda _: login) if login else find_login
        self._registry = Endpoint(reference.registry, url, about, self._pool, own_login, scope)
        # `ns` tells a mirror of several registries which one is meant (distribution specification, "Registry Proxying").
        self._mirrors = [
            Endpoint(
                host_of(mirror),
                api_url(mirror, reference.repository),
                about,
                self._pool,
                find_login,
                scope,
                f"ns={reference.registry}",
            )
            for mirror in mirrors
        ]

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
        self._verify(body, wanted.digest)
        return parse_config(bytes(body), manifest, platform, str(self.reference))

    def blob(self, blob: Descriptor) -> Iterator[bytes]:
        """The blob's bytes, in pieces of at most blobs.PIECE_BYTES, NOT verified: whoever reads them to the end hashes them.

        A connection that breaks, stalls or straggles is made again from where it broke.  Raises ImageError.
        """
        patience = Patience()
        position = 0
        while True:
            host, response = self._open(f"/blobs/{blob.digest}", range_header(position, None), patience)
            try:
                for piece in self._body(host, response, blob.digest, position, patience):
                    position += len(piece)
                    patience.progressed()
                    yield piece
                return
            except HTTPError as error:
                self._broken(host, error, patience)

    def read_range(
        self, digest: str, offset: int, length: int, *, timeout_s: float | None = None, only_if_short: bool = False
    ) -> bytes:
        """`length` bytes of a blob from `offset`, NOT verified, within `timeout_s` if given.  Raises as `stream_range`."""
        return b"".join(self.stream_range(digest, offset, length, timeout_s=timeout_s, only_if_short=only_if_short))

    def stream_range(
        self, digest: str, offset: int, length: int, *, timeout_s: float | None = None, only_if_short: bool = False
    ) -> Generator[bytes, None, None]:
        """`length` bytes of a blob from `offset`, NOT verified, in pieces of at most blobs.PIECE_BYTES.

        A connection that breaks, stalls or straggles is made again from where it broke.  `timeout_s` is for all of it, from the first
        piece's asking on.  Raises ImageError; ContentCorrupt when the blob is shorter; Unsupported, with `only_if_short`, when all of the
        blob would come because the registry knows no ranges.
        """
        patience = Patience(timeout_s)
        at, end = offset, offset + length
        while at < end:
            host, response = self._open(f"/blobs/{digest}", range_header(at, end - at), patience)
            before = at
            if only_if_short and response.status == 200:
                response.close()
                raise Unsupported(f"{self.reference}: the registry knows no ranges")
            body = self._body(host, response, digest, at, patience)
            try:
                for piece in body:
                    wanted = piece[: end - at]
                    at += len(wanted)
                    patience.progressed()
                    yield wanted
                    if at == end and (response.status == 200 or len(wanted) < len(piece)):
                        return  # a registry that knows no ranges sends all that follows
            except HTTPError as error:
                self._broken(host, error, patience)
                continue
            finally:
                body.close()
            there = content_range(response) if response.status == 206 else None
            # A part of what was asked for is an answer too (RFC 9110, 15.3.7): the rest is asked for next.
            partial = at > before and there is not None and there[1] is not None and there[1] >= end
            if at < end and not partial:
                raise ContentCorrupt(f"{self.reference}: the registry's copy of {digest} ends before byte {end}")

    def distrust_mirrors(self) -> bool:
        """Ask the registry only from now on, since something was not what its digest says → False if no mirror was asked."""
        had = bool(self._mirrors)
        self._mirrors = []
        return had

    def _manifest(self, wanted: str) -> tuple[str, bytes]:
        """Digest and body of the manifest or index with that tag or digest."""
        if wanted in self._manifests:
            return wanted, self._manifests[wanted]
        patience = Patience()
        while True:
            host, response = self._open(f"/manifests/{wanted}", {"Accept": ACCEPT}, patience, missing=True)
            if response.status == 404:
                discard(response)
                raise ImageUnknown(
                    f"{self.reference}: the registry {self.reference.registry} has no such image; check name and tag"
                )
            try:
                digest, body = self._document(wanted, response, Meter(host.name, patience))
            except HTTPError as error:
                self._broken(host, error, patience)
            except ImageError:
                if host is self._registry:
                    raise
                host.put_off()
            else:
                self._manifests[digest] = body
                return digest, body

    def _open(
        self, path: str, headers: dict[str, str], patience: Patience, missing: bool = False
    ) -> tuple[Endpoint, urllib3.BaseHTTPResponse]:
        """Who answers, and the answer, 200 or 206 (or 404, if `missing` may be).  Raises ImageError."""
        problems = ""
        for mirror in self._mirrors:
            if mirror.put_off_until > time.monotonic():
                continue
            try:
                response = mirror.get(path, headers, Patience(min(MIRROR_TIMEOUT_S, patience.left_s), MIRROR_ATTEMPTS))
            except ImageError as error:
                mirror.put_off()
                problems += f"; nor does its mirror help: {error}"
                continue
            if response.status in (200, 206):
                return mirror, response
            discard(response)
        try:
            response = self._registry.get(path, headers, patience)
        except ImageError as error:
            raise type(error)(f"{error}{problems}") from None
        if response.status in (200, 206) or (missing and response.status == 404):
            return self._registry, response
        discard(response)
        digest = path.rpartition("/")[2]
        if response.status == 404:
            raise RegistryBroken(
                f"{self.reference}: the registry has lost {digest}, a part of this image; push the image again"
            )
        raise ContentCorrupt(
            f"{self.reference}: the registry's copy of {digest} ends before byte "
            f"{headers.get('Range', '').removeprefix('bytes=').partition('-')[0] or '0'}"
        )

    def _body(
        self, host: Endpoint, response: urllib3.BaseHTTPResponse, digest: str, offset: int, patience: Patience
    ) -> Generator[bytes, None, None]:
        """The blob's bytes from `offset` on, as the answer has them.  Raises RegistryBroken, and urllib3's HTTPError."""
        skip = offset
        if response.status == 206:
            skip = 0
            there = content_range(response)
            if there is None or there[0] != offset:
                response.close()
                raise RegistryBroken(
                    f"{self.reference}: the registry answers with another range of {digest} than it was asked for"
                )
        return receive(response, skip, Meter(host.name, patience))

    def _broken(self, host: Endpoint, error: HTTPError, patience: Patience) -> None:
        """A body broke off: wait as long as is right before it is asked for again.  Raises RegistryUnreachable."""
        if host is not self._registry:
            host.put_off()
        elif isinstance(error, Straggling):
            return  # there are not many of them in one piece of work
        elif not patience.again():
            raise host.unreachable(error) from None

    def _document(self, wanted: str, response: urllib3.BaseHTTPResponse, meter: Meter) -> tuple[str, bytes]:
        """Digest, verified, and body of a small document.  Raises RegistryBroken, ContentCorrupt, and urllib3's HTTPError."""
        body = bytearray()
        for piece in receive(response, 0, meter):
            body += piece
            if len(body) > DOCUMENT_SIZE_MAX:
                response.close()
                raise RegistryBroken(f"{self.reference}: a document of more than {DOCUMENT_SIZE_MAX} bytes")
        digest = wanted if wanted.startswith("sha256:") else response.headers.get("Docker-Content-Digest", "")
        if digest.startswith("sha256:"):
            self._verify(body, digest)
        else:
            digest = "sha256:" + hashlib.sha256(body).hexdigest()
        return digest, bytes(body)

    def _verify(self, body: bytes | bytearray, digest: str) -> None:
        found = "sha256:" + hashlib.sha256(body).hexdigest()
        if found != digest:
            raise ContentCorrupt(
                f"{self.reference}: the registry's copy of {digest} is damaged (it is {found}); push the image again"
            )
