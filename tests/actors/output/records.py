"""Records as conmon writes them, for tests."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from hypothesis import strategies as st

from actors.output.journal import Chunk

Written = tuple[str, str, bytes, int]  # stream, F or P, text, which chunk of conmon's it came in


def record(stream: str, kind: str, text: bytes, chunk: int = 0) -> bytes:
    return b"2026-11-24T08:47:01.%09d+00:00 %b %b %b\n" % (chunk, stream.encode(), kind.encode(), text)


def journal(written: Iterable[Written]) -> bytes:
    return b"".join(record(*one) for one in written)


def streams(chunks: Iterable[Chunk]) -> dict[str, bytes]:
    """What each stream printed."""
    found = {"stdout": b"", "stderr": b"", "gap": b""}
    for chunk in chunks:
        found[chunk.stream] += chunk.data
    return found


def printed(written: Iterable[Written]) -> dict[str, bytes]:
    return streams(Chunk(stream, text + (b"\n" if kind == "F" else b"")) for stream, kind, text, _ in written)


def cut(data: bytes, cuts: Iterable[int]) -> list[bytes]:
    edges = [0, *sorted({place % (len(data) + 1) for place in cuts}), len(data)]
    return [data[start:end] for start, end in pairwise(edges)]


# What looks like a header, and the bytes that parsers trip over, more often than chance has them.
TEXTS = st.binary(max_size=30).map(lambda text: text.replace(b"\n", b"")) | st.sampled_from(
    [b"", b"\r", b"\0", b"\xff\xfe", b"F ", record("stdout", "F", b"inner")[:-1], b" stdout P "]
)
WRITTEN = st.lists(
    st.tuples(st.sampled_from(["stdout", "stderr"]), st.sampled_from("FFFP"), TEXTS, st.integers(0, 1)), max_size=12
)
CUTS = st.lists(st.integers(0, 5000), max_size=12)
