"""Frames: the gzip members or zstd frames of a layer whose table of contents is known, and which was never read as a whole.

Where a byte stands in the decompressed layer is what objects' places, spans and the spool are about, and what nobody knows who has not
decompressed it: between files there are headers of any length.  So places are given out here, as if each file had one header of one
record: whatever else comes out of a frame behind what is known to be in it belongs to nobody.  No I/O.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import itemgetter
from typing import NamedTuple

from actors.image.layers.inflate import SPAN_BYTES
from actors.image.layers.tar import RECORD_BYTES, shown
from actors.image.layers.toc import TOC_BYTES_MAX, Chunk, Listed, TocUnusable

# What comes out of a frame before its last chunk's end: a chunk, mostly; many small files, as eStargz' --min-chunk-size has them; a table.
FRAME_BYTES_MAX = TOC_BYTES_MAX + (1 << 20)
# Of an entry, on average; twice its content's size besides, and there is no tar that has room for so much.
HEADER_BYTES_MAX = 16 << 10
UNLISTED_BYTES_MAX = 8 << 20  # compressed, between two frames: headers of entries without content


class Frame(NamedTuple):
    """It begins at byte `first` of the compressed layer, and what comes out of it at byte `begin` of the other one."""

    first: int
    begin: int


class Layout(NamedTuple):
    """`spans`: the frames in their order, in groups of about a span.  `size_bytes`: of the decompressed layer, as it is made up."""

    spans: list[list[Frame]]
    size_bytes: int


def lay_out(listed: Sequence[Listed], stop: int) -> Layout:
    """Give each file its place (`entry.offset`).  `stop`: where the last frame ends, at most.

    Raises TocUnusable for what is in no order in which a layer's files can be: one behind another in a tar.
    """
    frames: list[Frame] = []
    used = 0  # all before it is somebody's
    last: tuple[Listed | None, int] = (None, 0)  # what was placed last, and how many chunks of it
    for first, inner, number, chunk, file in _in_layer(listed):
        name = file.entry.name
        if number and last != (file, number):
            raise TocUnusable(f"the chunks of {shown(name)} do not lie one behind another")
        if not frames or first != frames[-1].first:
            if frames:
                _check_gap(frames[-1], used, first)
            frames.append(Frame(first, used if number else _apart(used)))
        begin = frames[-1].begin
        place = begin + inner
        if number:
            is_right = place == used
        else:
            file.entry.offset = place
            is_right = place % RECORD_BYTES == 0 and place >= (_apart(used) if used else RECORD_BYTES)
        used = place + chunk.size
        if not is_right or not first + inner or first >= stop or used - begin > FRAME_BYTES_MAX:
            raise TocUnusable(f"{shown(name)} lies where no file of a layer can lie")
        last = (file, number + 1)
    if frames:
        _check_gap(frames[-1], used, stop)
    if used > sum(2 * file.entry.stored + HEADER_BYTES_MAX for file in listed):
        raise TocUnusable(f"its table has {used} bytes of files, most of which are nobody's")
    return Layout(_grouped(frames), _apart(used) if frames else 0)


def _in_layer(listed: Sequence[Listed]) -> list[tuple[int, int, int, Chunk, Listed]]:
    """The chunks as they lie in the layer: frame, place in it, number in its file."""
    chunks = [(chunk.first, chunk.inner, number, chunk, file) for file in listed for number, chunk in enumerate(file.chunks)]
    chunks.sort(key=itemgetter(0, 1, 2))
    return chunks


def _apart(used: int) -> int:
    """Where the next file's content is at the earliest: its header is before it, at a whole record."""
    return used + -used % RECORD_BYTES + RECORD_BYTES


def _check_gap(frame: Frame, used: int, following: int) -> None:
    """What is not compressed at all is hardly longer than what comes out; more than that is not in the table."""
    size = used - frame.begin
    if following - frame.first > size + size // 64 + UNLISTED_BYTES_MAX:
        raise TocUnusable("not all of the layer is in its table of contents")


def _grouped(frames: Sequence[Frame]) -> list[list[Frame]]:
    groups: list[list[Frame]] = []
    for frame in frames:
        if groups:
            head = groups[-1][0]
            if frame.begin - head.begin < SPAN_BYTES and frame.first - head.first < SPAN_BYTES:
                groups[-1].append(frame)
                continue
        groups.append([frame])
    return groups
