"""Archives shared by a fleet of nodes, through a bucket of S3 or of anything that speaks its protocol.

    PREFIX/archives/v4/sha256-….aerie.zst    an archive, named by its image's digest and the version of its format, compressed
    PREFIX/leases/v4/sha256-…                who builds it right now

An image's archive is named by its digest, so a tag that has moved is another archive, and two names of one image share theirs.
Of all nodes that want an archive which is not there one builds it: the one whose conditional put made the lease.  It renews the
lease until the archive is in the bucket; the others look every few seconds.  A lease that was not renewed for LEASE_S, by the
server's clock alone (the time of its last write against the Date of the answer), is a dead node's, and whoever replaces
exactly that state of it (If-Match) is the next.  A lease that was lost nevertheless (a node that slept) does no harm: archives are put
only where there is none, and both are good.

What comes from the bucket is checked as a whole (`Archive.open`) before anybody sees it, and removed from the bucket when it is damaged.
The bucket being away is no error of an image's: then this node works for itself.
"""

from __future__ import annotations

import enum
import hashlib
import os
import random
import secrets
import tempfile
import threading
import time
from collections.abc import Callable
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import BinaryIO, NamedTuple

from backports import zstd

from actors.image.archives.archive import VERSION, Archive, receive_archive
from actors.image.archives.bucket import BucketAway, BucketClient
from actors.image.errors import ArchiveInvalid
from actors.image.wire import Bucket

__all__ = ["BucketAway", "SharedArchive"]

LEASE_S = 30.0  # without a renewal; S3 tells times in whole seconds
RENEW_S = 8.0
RENEWED_S = 8.0  # how long who gives the lease back waits for a renewal that is under way
LOOK_S = 2.0  # how often, on average, a node that waits looks again
LEVEL = 6  # of zstd: a third of META and table, at 60 MB/s
PULL_ATTEMPTS = 2


class Next(enum.Enum):
    """What a node does that wants an archive."""

    PULL = enum.auto()
    CLAIM = enum.auto()  # the lease, which is not there
    TAKE_OVER = enum.auto()  # the lease, which is a dead node's
    WAIT = enum.auto()


class Lease(NamedTuple):
    """A lease as it was found: its state, and how long ago it was written, by the server's clock."""

    etag: str
    age_s: float


def decide(archive_is_there: bool, lease: Lease | None) -> Next:
    """What is next for a node that has found this.  Pure."""
    if archive_is_there:
        return Next.PULL
    if lease is None:
        return Next.CLAIM
    return Next.TAKE_OVER if lease.age_s > LEASE_S else Next.WAIT


class SharedArchive:
    """The archive of one image in a bucket.  One owner, who calls `close` in the end."""

    def __init__(self, bucket: Bucket, digest: str) -> None:
        """Opens no connection yet.  Raises BucketAway."""
        self._digest = digest
        self._client = BucketClient(bucket)
        name = digest.replace(":", "-")
        self._key = f"{self._client.prefix}archives/v{VERSION}/{name}.aerie.zst"
        self._etag = ""  # of the archive as it was pulled last
        self._lease_key = f"{self._client.prefix}leases/v{VERSION}/{name}"
        self._lease_etag = ""  # of the lease as we wrote it last; "" while we do not hold it
        self._renewal: threading.Thread | None = None
        self._closing = threading.Event()

    def obtain(self, directory: str, layers: list[str], waiting: Callable[[], None]) -> Archive | None:
        """The archive, pulled into `directory`; None when it is for this node to build it: then the lease is ours, until `close`.

        `layers`: the digests of the image's layers, which the archive must be made of.  `waiting` is called before each wait for
        another node.  Raises BucketAway, OSError.
        """
        if (archive := self._pull(directory, layers)) is not None:
            return archive  # in one round trip
        while True:
            is_there = self._client.look(self._key) is not None
            lease = None if is_there else self._find_lease()
            match decide(is_there, lease):
                case Next.PULL:
                    if (archive := self._pull(directory, layers)) is not None:
                        return archive
                case Next.CLAIM:
                    if self._write_lease(IfNoneMatch="*"):
                        break
                case Next.TAKE_OVER:
                    assert lease is not None
                    if self._write_lease(IfMatch=lease.etag):
                        break
                case Next.WAIT:
                    waiting()
                    time.sleep(LOOK_S * random.uniform(0.5, 1.5))
        self._renewal = threading.Thread(target=self._renew, name="lease", daemon=True)
        self._renewal.start()
        # Whoever had the lease until just now may have put the archive there between our look and our claim.
        return self._pull(directory, layers)

    def push(self, path: str) -> bool:
        """Put the archive at `path` into the bucket unless there is one → whether it was put.  Raises BucketAway, OSError."""
        with open(path, "rb") as file, tempfile.TemporaryFile(dir=os.path.dirname(path)) as packed:
            put = False
            if self._client.look(self._key) is None:
                compressor = zstd.ZstdCompressor(LEVEL)
                while piece := file.read(1 << 20):
                    packed.write(compressor.compress(piece))
                packed.write(compressor.flush())
                packed.flush()
                put = self._client.put(self._key, packed)
        if not self._lease_etag:  # that of a builder which was killed; nobody needs one for an archive that is there
            self._client.remove(self._lease_key)
        return put

    def close(self) -> None:
        """Give back the lease, if it is ours.  What goes wrong is mended by the lease's end."""
        self._closing.set()
        if self._renewal is not None:
            # One that comes through later has written another state of the lease than the one that is removed: that stays, to its end.
            self._renewal.join(RENEWED_S)
        if self._lease_etag:
            try:
                self._client.remove(self._lease_key, self._lease_etag)
            except BucketAway:
                pass
            self._lease_etag = ""
        self._client.close()

    # --- the archive ---

    def _pull(self, directory: str, layers: list[str]) -> Archive | None:
        """The archive, whole and checked; None when there is none, or it was damaged and is removed now."""
        try:
            archive = receive_archive(directory, self._digest, self._download)
            if archive is None or [layer.digest for layer in archive.info.layers] == layers:
                return archive
            os.unlink(archive.path)
        except ArchiveInvalid:
            pass
        self._client.remove(self._key, self._etag)
        return None

    def _download(self, file: BinaryIO) -> bool:
        """Fill the file → False when there is no archive.  Raises ArchiveInvalid, too."""
        for attempt in range(PULL_ATTEMPTS):
            found = self._client.open(self._key)
            if found is None:
                return False
            self._etag, pieces = found
            file.seek(0)
            file.truncate()
            decompressor = zstd.ZstdDecompressor()
            try:
                file.writelines(decompressor.decompress(piece) for piece in pieces)
            except zstd.ZstdError as error:
                raise ArchiveInvalid(f"{self._key}: {error}") from None
            except EOFError:
                raise ArchiveInvalid(f"{self._key}: something comes behind its end") from None
            except BucketAway:
                if attempt + 1 == PULL_ATTEMPTS:
                    raise
                continue
            if not decompressor.eof:
                raise ArchiveInvalid(f"{self._key}: it ends in the middle")
            return True
        raise AssertionError

    # --- the lease ---

    def _find_lease(self) -> Lease | None:
        found = self._client.ask(self._client.s3.head_object, Key=self._lease_key)
        if found is None:
            return None
        written: datetime = found["LastModified"]
        now = parsedate_to_datetime(found["ResponseMetadata"]["HTTPHeaders"]["date"])
        return Lease(str(found["ETag"]), (now - written).total_seconds())

    def _write_lease(self, **condition: str) -> bool:
        """Whether the lease could be written, on this condition: it is ours then."""
        # Never the same bytes twice: the ETag is of the content, and tells one writing from another.
        body = f"{os.uname().nodename} {secrets.token_hex(16)}\n".encode()
        written = self._client.ask(self._client.s3.put_object, Key=self._lease_key, Body=body, **condition)
        etag = str(written["ETag"]) if written is not None else ""
        if written is None and (found := self._find_lease()) and found.etag.strip('"') == hashlib.md5(body).hexdigest():
            etag = found.etag  # it was written, and again when the answer had been lost on its way
        self._lease_etag = etag
        return bool(etag)

    def _renew(self) -> None:
        while not self._closing.wait(RENEW_S):
            try:
                if not self._write_lease(IfMatch=self._lease_etag):
                    return  # somebody has taken us for dead
            except BucketAway:
                pass  # perhaps next time
