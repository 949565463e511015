"""Traces: what tasks of one image and command read at their start, in the order of their first asking.

A trace is made of *blocks* of BLOCK_BYTES of the image's objects, by the object's row in the archive's table, which is the same in every
archive of an image's digest.  It lies beside the archive, one file to a *workload* (`workload_of`):

    sha256-….WORKLOAD.trace    magic, version; bytes fetched from the registry and the seconds that took; blocks; sha256 of all before

It is a hint: what cannot be read as one is treated as if it were not there.  No I/O but `load`, `save`, `workloads`.
"""

from __future__ import annotations

import hashlib
import os
import re
import struct
from array import array
from collections.abc import Sequence
from typing import NamedTuple

from actors.image.archives.archive import save_beside

BLOCK_BYTES = 64 << 10
BLOCKS_MAX = 16_384  # of one trace: 1 GiB, and 128 KiB of blocks
WINDOW_S = 30.0  # what is read later is not a task's start
TRACES_MAX = 64  # of one image
_MAGIC = b"AERIETRC"
_VERSION = 1
_HEAD = struct.Struct("<8sIIQd")
_CHECKSUM_BYTES = 32


class TraceInvalid(Exception):
    """The bytes are no trace; the text says why."""


class Block(NamedTuple):
    """BLOCK_BYTES of an object, or what is left of it there."""

    row: int
    block: int


class Trace(NamedTuple):
    """`blocks` in the order wanted.  `fetched_bytes` came from the registry in `fetching_s` meanwhile: what a trace knows of bandwidth."""

    blocks: Sequence[Block]
    fetched_bytes: int = 0
    fetching_s: float = 0.0


def workload_of(command: Sequence[str]) -> str:
    """What tells the tasks of one image apart, for its traces: a name of 16 letters for a command."""
    return hashlib.sha256(b"\0".join(os.fsencode(word) for word in command)).hexdigest()[:16]


def encode(trace: Trace) -> bytes:
    """Raises ValueError for a trace with too many blocks."""
    if len(trace.blocks) > BLOCKS_MAX:
        raise ValueError(f"a trace of {len(trace.blocks)} blocks; at most {BLOCKS_MAX} are allowed")
    body = _HEAD.pack(_MAGIC, _VERSION, len(trace.blocks), trace.fetched_bytes, trace.fetching_s) + pack_blocks(trace.blocks)
    return body + hashlib.sha256(body).digest()


def decode(data: bytes) -> Trace:
    """Raises TraceInvalid."""
    body, checksum = data[:-_CHECKSUM_BYTES], data[-_CHECKSUM_BYTES:]
    if len(body) < _HEAD.size or hashlib.sha256(body).digest() != checksum:
        raise TraceInvalid("damaged, or not all of a trace")
    magic, version, count, fetched_bytes, fetching_s = _HEAD.unpack_from(body)
    if (magic, version) != (_MAGIC, _VERSION) or count > BLOCKS_MAX:
        raise TraceInvalid(f"not a trace of version {_VERSION}")
    blocks = unpack_blocks(body[_HEAD.size :])
    if len(blocks) != count:
        raise TraceInvalid(f"{len(blocks)} blocks where {count} were announced")
    return Trace(blocks, fetched_bytes, fetching_s)


def pack_blocks(blocks: Sequence[Block]) -> bytes:
    return array("I", [number for block in blocks for number in block]).tobytes()


def unpack_blocks(data: bytes) -> list[Block]:
    """Raises TraceInvalid for what is no whole number of blocks."""
    if len(data) % 8:
        raise TraceInvalid("half a block")
    numbers = array("I", data)
    return [Block(*pair) for pair in zip(numbers[::2], numbers[1::2], strict=True)]


def trace_path(directory: str, digest: str, workload: str) -> str:
    """Where the trace of a workload of the image `digest` lies."""
    return os.path.join(directory, f"{digest.replace(':', '-')}.{workload}.trace")


def load(directory: str, digest: str, workload: str) -> Trace | None:
    """The trace; None when there is none that can be read.  Raises OSError for anything but its absence."""
    try:
        with open(trace_path(directory, digest, workload), "rb") as file:
            return decode(file.read(_HEAD.size + 8 * BLOCKS_MAX + _CHECKSUM_BYTES + 1))
    except (FileNotFoundError, TraceInvalid):
        return None


def save(directory: str, digest: str, workload: str, trace: Trace) -> None:
    """Put the trace beside the archive, whole and durable or not at all; of an image's traces the oldest go.  Raises OSError."""
    save_beside(trace_path(directory, digest, workload), [encode(trace)])
    older = sorted(workloads(directory, digest), key=lambda found: _written_at(trace_path(directory, digest, found)))
    for found in older[:-TRACES_MAX]:
        forget(directory, digest, found)


def forget(directory: str, digest: str, workload: str) -> None:
    """Remove a workload's trace.  Raises OSError."""
    try:
        os.unlink(trace_path(directory, digest, workload))
    except FileNotFoundError:
        pass  # another daemon was faster


def workloads(directory: str, digest: str) -> set[str]:
    """The workloads that have a trace.  Raises OSError."""
    pattern = re.compile(re.escape(digest.replace(":", "-")) + r"\.([0-9a-f]{16})\.trace")
    return {found[1] for name in os.listdir(directory) if (found := pattern.fullmatch(name))}


def _written_at(path: str) -> float:
    try:
        return os.stat(path).st_mtime
    except FileNotFoundError:
        return 0.0
