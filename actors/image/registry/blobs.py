"""The body of a blob's answer: the bytes that were asked for, and no others, from a connection that keeps moving."""

from __future__ import annotations

import re
import time
from collections.abc import Generator

import urllib3
from urllib3.exceptions import HTTPError

from actors.image.registry.patience import Meter

PIECE_BYTES = 256 << 10  # of a blob handed on at once, at most
_CONTENT_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+|\*)")


class Straggling(HTTPError):
    """The body comes much slower than others from the same host: another connection is worth a try."""


def range_header(offset: int, length: int | None) -> dict[str, str]:
    """Headers that ask for `length` bytes from `offset`, None: for all that follow.  A single range: many registries know no more."""
    if not offset and length is None:
        return {}
    return {"Range": f"bytes={offset}-{'' if length is None else offset + length - 1}"}


def content_range(response: urllib3.BaseHTTPResponse) -> tuple[int, int | None] | None:
    """First byte and the whole blob's size (None: not told) that a 206 announces; None when it announces nothing of the sort."""
    match = _CONTENT_RANGE.fullmatch(response.headers.get("Content-Range", ""))
    return (int(match[1]), None if match[3] == "*" else int(match[3])) if match else None


def receive(response: urllib3.BaseHTTPResponse, skip: int, meter: Meter) -> Generator[bytes, None, None]:
    """What is left of the body after `skip` bytes, in pieces as they come.  Left half way, it closes the connection.

    Raises urllib3's HTTPError for a connection that breaks or stalls, Straggling among them.
    """
    try:
        while True:
            begun = time.monotonic()
            # Not read(), which comes back when it has all, or when *nothing* has come for the time-out: a trickle is neither.
            piece = response.read1(PIECE_BYTES, decode_content=False)
            waited_s = time.monotonic() - begun  # the reader's own time is not the registry's
            if not piece:
                break
            if skip >= len(piece):
                skip -= len(piece)
            else:
                yield piece[skip:]
                skip = 0
            if not meter.took(len(piece), waited_s):
                raise Straggling("it sends much slower than it did before")
    except BaseException:
        response.close()
        raise
    meter.ended()
    response.release_conn()
