"""Archives shared by a fleet of nodes, through a bucket of S3 or of anything that speaks its protocol.

    PREFIX/archives/v2/sha256-….aerie    an archive, named by its image's digest and the version of its format
    PREFIX/leases/v2/sha256-…            who builds it right now

An image's archive is named by its digest, so a tag that has moved is another archive, and two names of one image share theirs.
Of all nodes that want an archive which is not there one builds it: the one whose conditional put made the lease.  It renews the
lease until the archive is in the bucket; the others look every few seconds.  A lease that was not renewed for LEASE_S, by the
server's clock alone (the time of its last write against the Date of the answer), is a dead node's, and whoever replaces
exactly that state of it (If-Match) is the next.  A lease that was lost nevertheless (a node that slept) does no harm: archives are put
only where there is none, and both are good.

What comes from the bucket is checked as a whole (`Archive.open`) before anybody sees it, and removed from the bucket when it is damaged.
The bucket being away is no error of an image's: then this node works for itself.  Credentials are found by boto3's own chain.
"""

from __future__ import annotations

import enum
import hashlib
import os
import random
import secrets
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from email.utils import parsedate_to_datetime
from typing import Any, BinaryIO, NamedTuple

import boto3
import boto3.s3.transfer
import botocore.config
import botocore.exceptions
import s3transfer.exceptions

from actors.image.archive import VERSION, Archive, receive_archive
from actors.image.errors import ArchiveInvalid
from actors.image.wire import Bucket

LEASE_S = 30.0  # without a renewal; S3 tells times in whole seconds
RENEW_S = 8.0
LOOK_S = 2.0  # how often, on average, a node that waits looks again
PART_BYTES = 16 << 20  # of a multipart upload (S3 wants at least 5 MiB), and of a download
CONNECTIONS = 4
CLIENT = {
    "connect_timeout": 5,
    "read_timeout": 8,  # so that a bucket that hangs delays the first task of an image by no more than twice this
    "retries": {"mode": "standard", "total_max_attempts": 2},
    # Archives have a checksum of their own; and what S3 itself likes, others do not understand.
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
}
_REFUSED = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409"}
_MISSING = {"NoSuchKey", "NotFound", "404"}


class BucketAway(Exception):
    """The bucket cannot be used: the text says which, and why."""


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
        self._bucket = bucket.name
        prefix = bucket.prefix.strip("/") + "/" if bucket.prefix.strip("/") else ""
        name = digest.replace(":", "-")
        self._key = f"{prefix}archives/v{VERSION}/{name}.aerie"
        self._lease_key = f"{prefix}leases/v{VERSION}/{name}"
        self._lease_etag = ""  # of the lease as we wrote it last; "" while we do not hold it
        self._renewal: threading.Thread | None = None
        self._closing = threading.Event()
        # Servers of one's own seldom have a name for each bucket.
        style = {"addressing_style": "path"} if bucket.endpoint else {}
        try:
            self._s3 = boto3.session.Session().client(
                "s3",
                endpoint_url=bucket.endpoint or None,
                region_name=bucket.region or None,
                config=botocore.config.Config(s3=style, **CLIENT),
            )
        except (botocore.exceptions.BotoCoreError, ValueError) as error:
            raise BucketAway(f"bucket {bucket.name}: {error}") from None

    def obtain(self, directory: str, layers: list[str], waiting: Callable[[], None]) -> Archive | None:
        """The archive, pulled into `directory`; None when it is for this node to build it: then the lease is ours, until `close`.

        `layers`: the digests of the image's layers, which the archive must be made of.  `waiting` is called before each wait for
        another node.  Raises BucketAway, OSError.
        """
        while True:
            etag = self._look()
            lease = None if etag else self._find_lease()
            match decide(etag is not None, lease):
                case Next.PULL:
                    assert etag is not None
                    if (archive := self._pull(directory, layers, etag)) is not None:
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
        etag = self._look()
        return None if etag is None else self._pull(directory, layers, etag)

    def push(self, path: str) -> bool:
        """Put the archive at `path` into the bucket unless there is one → whether it was put.  Raises BucketAway, OSError."""
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if self._look() is not None:
                put = False
            elif size <= PART_BYTES:
                put = self._ask(self._s3.put_object, Key=self._key, Body=file, IfNoneMatch="*") is not None
            else:
                put = self._push_parts(file, size)
        if not self._lease_etag:  # that of a builder which was killed; nobody needs one for an archive that is there
            self._ask(self._s3.delete_object, Key=self._lease_key)
        return put

    def close(self) -> None:
        """Give back the lease, if it is ours.  What goes wrong is mended by the lease's end."""
        self._closing.set()
        if self._renewal is not None:
            self._renewal.join(RENEW_S)
        if self._lease_etag:
            try:
                self._ask(self._s3.delete_object, Key=self._lease_key, IfMatch=self._lease_etag)
            except BucketAway:
                pass
            self._lease_etag = ""
        self._s3.close()

    # --- the archive ---

    def _look(self) -> str | None:
        """The state (ETag) of the archive in the bucket; None when there is none."""
        found = self._ask(self._s3.head_object, Key=self._key)
        return str(found["ETag"]) if found is not None else None

    def _pull(self, directory: str, layers: list[str], etag: str) -> Archive | None:
        """The archive, whole and checked; None when it is gone again, or was damaged and is removed now."""
        try:
            archive = receive_archive(directory, self._digest, self._download)
            if archive is None or [layer.digest for layer in archive.info.layers] == layers:
                return archive
            os.unlink(archive.path)
        except ArchiveInvalid:
            pass
        self._ask(self._s3.delete_object, Key=self._key, IfMatch=etag)
        return None

    def _download(self, file: BinaryIO) -> bool:
        """Fill the file → False when there is no archive any more."""
        config = boto3.s3.transfer.TransferConfig(multipart_chunksize=PART_BYTES, max_concurrency=CONNECTIONS)
        return self._ask(self._s3.download_fileobj, Key=self._key, Fileobj=file, Config=config, absent=False) is not False

    def _push_parts(self, file: BinaryIO, size: int) -> bool:
        upload = self._ask(self._s3.create_multipart_upload, Key=self._key)["UploadId"]
        place = {"Key": self._key, "UploadId": upload}

        def put(number: int) -> dict[str, Any]:
            data = os.pread(file.fileno(), PART_BYTES, (number - 1) * PART_BYTES)
            return {
                "PartNumber": number,
                "ETag": self._ask(self._s3.upload_part, Body=data, PartNumber=number, **place)["ETag"],
            }

        try:
            with ThreadPoolExecutor(CONNECTIONS) as pool:
                parts = list(pool.map(put, range(1, -(-size // PART_BYTES) + 1)))
            done = self._ask(self._s3.complete_multipart_upload, MultipartUpload={"Parts": parts}, IfNoneMatch="*", **place)
        except BaseException:
            self._abort(place)
            raise
        if done is None:
            self._abort(place)
        return done is not None

    def _abort(self, place: dict[str, Any]) -> None:
        try:
            self._ask(self._s3.abort_multipart_upload, **place)
        except BucketAway:
            pass  # what is left of it the bucket's own rule for incomplete uploads removes

    # --- the lease ---

    def _find_lease(self) -> Lease | None:
        found = self._ask(self._s3.head_object, Key=self._lease_key)
        if found is None:
            return None
        written: datetime = found["LastModified"]
        now = parsedate_to_datetime(found["ResponseMetadata"]["HTTPHeaders"]["date"])
        return Lease(str(found["ETag"]), (now - written).total_seconds())

    def _write_lease(self, **condition: str) -> bool:
        """Whether the lease could be written, on this condition: it is ours then."""
        # Never the same bytes twice: the ETag is of the content, and tells one writing from another.
        body = f"{os.uname().nodename} {secrets.token_hex(16)}\n".encode()
        written = self._ask(self._s3.put_object, Key=self._lease_key, Body=body, **condition)
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

    def _ask(self, operation: Callable[..., Any], absent: Any = None, **arguments: Any) -> Any:
        """The answer of the bucket; `absent` when the object is not there or not as the condition wants it.  Raises BucketAway."""
        try:
            return operation(Bucket=self._bucket, **arguments)
        except botocore.exceptions.ClientError as error:
            code = str(error.response.get("Error", {}).get("Code"))
            if code in _REFUSED | _MISSING:
                return absent
            raise BucketAway(f"bucket {self._bucket}: {error}") from None
        except (botocore.exceptions.BotoCoreError, s3transfer.exceptions.RetriesExceededError) as error:
            raise BucketAway(f"bucket {self._bucket}: {error}") from None
