"""How the content of an image comes to this node: as it is read, by a pack first, or all of it at once.  Pure.

What is known is what a trace says: how much of the image a start reads, and how fast its registry sends.  Reading lazily moves more than is
read, for spans do not end where files do, and whoever reads waits a round trip for most of them; pulling everything moves all
of it, at full speed.  Where nothing is known an image is read lazily: that is seldom much worse than the best, and a pull can be.
"""

from __future__ import annotations

from enum import Enum, auto
from typing import Literal, NamedTuple

from actors.image.archives.trace import BLOCK_BYTES, Trace

ROUND_TRIP_S = 0.03  # of a fetch that somebody waits for: a guess, with what registry and node take for one
FETCH_BYTES = 512 << 10  # decompressed, of one fetch
LAZY_EXCESS = 1.8  # bytes moved for each that is read: 12 MB for 6.9 with Debian's Python
FILLED_BYTES_PER_S = 100e6  # decompressed: what one processor inflates, hashes and writes
PACK_SHARE_MAX = 0.7  # of an image; a larger pack is no better than all of it
MEASURED_BYTES_MIN = 1 << 20  # fewer say nothing about bandwidth
BANDWIDTH_GUESS = 12.5e6  # bytes a second
FILL_BYTES_PER_S = 16 << 20  # behind a start, compressed: a sixth of a gigabit
FILL_PARALLEL, PULL_PARALLEL = 1, 4
FILL_DELAY_S = 3.0


class How(Enum):
    LAZY = auto()
    PACK = auto()
    PULL = auto()


class Sizes(NamedTuple):
    """Of an image: its layers, and what is in its files."""

    compressed_bytes: int
    unpacked_bytes: int


class Plan(NamedTuple):
    """How it comes.  `fill_…`: as in `wire.ServeImage`."""

    how: How
    fill_parallel: int = 0
    fill_bytes_per_s: int = 0
    fill_delay_s: float = 0.0


def plan(prefetch: Literal["off", "trace", "full"], sizes: Sizes, trace: Trace | None, has_pack: bool) -> Plan:
    """What to do for a task whose workload has that trace, if any, and a pack or none (that is known of)."""
    how = choose(sizes, trace, has_pack) if prefetch != "off" else How.LAZY
    if how is How.PULL:
        return Plan(how, PULL_PARALLEL)
    if prefetch == "full":
        return Plan(how, FILL_PARALLEL, FILL_BYTES_PER_S, FILL_DELAY_S)
    return Plan(how)


def choose(sizes: Sizes, trace: Trace | None, has_pack: bool) -> How:
    if trace is None:
        return How.PACK if has_pack else How.LAZY
    share = read_share(sizes, trace)
    if has_pack and share <= PACK_SHARE_MAX:
        return How.PACK
    if has_pack or pull_s(sizes, trace) <= lazy_s(sizes, trace):
        return How.PULL
    return How.LAZY


def read_share(sizes: Sizes, trace: Trace) -> float:
    """How much of the image a start reads, of 1."""
    return min(1.0, len(trace.blocks) * BLOCK_BYTES / max(1, sizes.unpacked_bytes))


def bandwidth(trace: Trace) -> float:
    """Bytes a second, as measured when the trace was recorded, or guessed."""
    if trace.fetched_bytes < MEASURED_BYTES_MIN or trace.fetching_s <= 0:
        return BANDWIDTH_GUESS
    return trace.fetched_bytes / trace.fetching_s


def lazy_s(sizes: Sizes, trace: Trace) -> float:
    """How long the reads of a start take, about, when each is fetched as it comes."""
    moved_bytes = min(1.0, LAZY_EXCESS * read_share(sizes, trace)) * sizes.compressed_bytes
    fetches = len(trace.blocks) * BLOCK_BYTES / FETCH_BYTES
    return moved_bytes / bandwidth(trace) + fetches * ROUND_TRIP_S


def pull_s(sizes: Sizes, trace: Trace) -> float:
    """How long it takes, about, until everything is here."""
    return max(sizes.compressed_bytes / bandwidth(trace), sizes.unpacked_bytes / FILLED_BYTES_PER_S) + 2 * ROUND_TRIP_S
