"""A bucket of S3, or of anything that speaks its protocol with conditional writes: what nodes share through one.

Objects are put whole, only where there is none (If-None-Match), and removed only in the state in which they were found (If-Match).
Credentials are found by boto3's own chain.  Thread-safe.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, BinaryIO

import boto3
import boto3.session
import botocore.config
import botocore.exceptions
import botocore.session

from actors.image.archives.archive import VERSION
from actors.image.wire import Bucket

PART_BYTES = 16 << 20  # of a multipart upload (S3 wants at least 5 MiB)
PIECE_BYTES = 32 << 10  # of what is read
CONNECTIONS = 4
CLIENT = {
    "connect_timeout": 5,
    "read_timeout": 8,  # so that a bucket that hangs delays the first task of an image by no more than twice this
    "retries": {"mode": "standard", "total_max_attempts": 2},
    # What is shared has checksums of its own; and what S3 itself likes, others do not understand.
    "request_checksum_calculation": "when_required",
    "response_checksum_validation": "when_required",
}
_REFUSED = {"PreconditionFailed", "412", "ConditionalRequestConflict", "409"}
_MISSING = {"NoSuchKey", "NotFound", "404"}


class BucketAway(Exception):
    """The bucket cannot be used: the text says which, and why."""


def pack_key(prefix: str, digest: str, workload: str) -> str:
    """Where the pack of a workload of the image `digest` lies: beside its archive, whose table it is understood by."""
    return f"{prefix}packs/v{VERSION}/{digest.replace(':', '-')}.{workload}.pack"


def _loaded() -> Any:
    """botocore's description of S3, parsed: 0.2 s of each process, for 0.2 s once in the fork server, which loads this module."""
    session = botocore.session.get_session()
    # With credentials of nobody, or it would look for some.
    session.create_client(
        "s3", "us-east-1", endpoint_url="http://127.0.0.1", aws_access_key_id="x", aws_secret_access_key="x"
    ).close()
    return session.get_component("data_loader")


_LOADER = _loaded()


class BucketClient:
    """One owner, who calls `close` in the end.  Opens no connection yet.  Raises BucketAway; so do all methods."""

    def __init__(self, bucket: Bucket) -> None:
        self.name = bucket.name
        self.prefix = bucket.prefix.strip("/") + "/" if bucket.prefix.strip("/") else ""
        # Servers of one's own seldom have a name for each bucket.
        style = {"addressing_style": "path"} if bucket.endpoint else {}
        session = botocore.session.get_session()
        session.register_component("data_loader", _LOADER)
        try:
            self.s3 = boto3.session.Session(botocore_session=session).client(
                "s3",
                endpoint_url=bucket.endpoint or None,
                region_name=bucket.region or None,
                config=botocore.config.Config(s3=style, **CLIENT),
            )
        except (botocore.exceptions.BotoCoreError, ValueError) as error:
            raise BucketAway(f"bucket {bucket.name}: {error}") from None

    def ask(self, operation: Callable[..., Any], absent: Any = None, **arguments: Any) -> Any:
        """The answer to an operation of `s3`; `absent` when the object is not there or not as the condition wants it."""
        try:
            return operation(Bucket=self.name, **arguments)
        except botocore.exceptions.ClientError as error:
            code = str(error.response.get("Error", {}).get("Code"))
            if code in _REFUSED | _MISSING:
                return absent
            raise BucketAway(f"bucket {self.name}: {error}") from None
        except botocore.exceptions.BotoCoreError as error:
            raise BucketAway(f"bucket {self.name}: {error}") from None

    def look(self, key: str) -> str | None:
        """The state (ETag) of the object; None when there is none."""
        found = self.ask(self.s3.head_object, Key=key)
        return str(found["ETag"]) if found is not None else None

    def open(self, key: str) -> tuple[str, Generator[bytes, None, None]] | None:
        """The state of the object and its bytes, in pieces as they come; None when there is none."""
        found = self.ask(self.s3.get_object, Key=key)
        return None if found is None else (str(found["ETag"]), self._pieces(found["Body"]))

    def _pieces(self, body: Any) -> Generator[bytes, None, None]:
        try:
            yield from body.iter_chunks(PIECE_BYTES)
        except botocore.exceptions.BotoCoreError as error:
            raise BucketAway(f"bucket {self.name}: {error}") from None
        finally:
            body.close()

    def put(self, key: str, file: BinaryIO) -> bool:
        """Put all of the file there unless there is something → whether it was put.  Raises OSError too."""
        size = os.fstat(file.fileno()).st_size
        if self.look(key) is not None:
            return False
        if size <= PART_BYTES:
            file.seek(0)
            return self.ask(self.s3.put_object, Key=key, Body=file, IfNoneMatch="*") is not None
        upload = self.ask(self.s3.create_multipart_upload, Key=key)["UploadId"]
        place = {"Key": key, "UploadId": upload}

        def put(number: int) -> dict[str, Any]:
            data = os.pread(file.fileno(), PART_BYTES, (number - 1) * PART_BYTES)
            return {
                "PartNumber": number,
                "ETag": self.ask(self.s3.upload_part, Body=data, PartNumber=number, **place)["ETag"],
            }

        try:
            with ThreadPoolExecutor(CONNECTIONS) as pool:
                parts = list(pool.map(put, range(1, -(-size // PART_BYTES) + 1)))
            done = self.ask(self.s3.complete_multipart_upload, MultipartUpload={"Parts": parts}, IfNoneMatch="*", **place)
        except BaseException:
            self._abort(place)
            raise
        if done is None:
            self._abort(place)
        return done is not None

    def remove(self, key: str, etag: str | None = None) -> None:
        """Remove the object, if given only in that state."""
        self.ask(self.s3.delete_object, Key=key, **({"IfMatch": etag} if etag else {}))

    def _abort(self, place: dict[str, Any]) -> None:
        try:
            self.ask(self.s3.abort_multipart_upload, **place)
        except BucketAway:
            pass  # what is left of it the bucket's own rule for incomplete uploads removes

    def close(self) -> None:
        self.s3.close()
