"""How an image's content comes, by what a trace says; a table."""

from __future__ import annotations

from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as some

from actors.image.archives.trace import BLOCK_BYTES, BLOCKS_MAX, Block, Trace
from actors.image.prefetch.policy import (
    BANDWIDTH_GUESS,
    FILL_BYTES_PER_S,
    How,
    Plan,
    Sizes,
    bandwidth,
    choose,
    lazy_s,
    plan,
    pull_s,
    read_share,
)

MB = 1_000_000
DEBIAN = Sizes(83 * MB, 210 * MB)
SLOW, FAST = 12.5e6, 1e9  # bytes a second


def trace(read_bytes: int, bytes_per_s: float = SLOW) -> Trace:
    return Trace([Block(0, number) for number in range(read_bytes // BLOCK_BYTES)], 10 * MB, 10 * MB / bytes_per_s)


@pytest.mark.parametrize(
    ("sizes", "known", "has_pack", "how"),
    [
        (DEBIAN, None, False, How.LAZY),
        (DEBIAN, None, True, How.PACK),  # another node's, in the same directory
        (DEBIAN, trace(14 * MB), False, How.LAZY),
        (DEBIAN, trace(14 * MB), True, How.PACK),
        (DEBIAN, trace(100 * MB), False, How.PULL),  # half of it, fetch by fetch, takes longer than all of it
        (DEBIAN, trace(100 * MB), True, How.PACK),
        (DEBIAN, trace(160 * MB), True, How.PULL),
        (DEBIAN, trace(14 * MB, FAST), False, How.LAZY),
        (DEBIAN, trace(100 * MB, FAST), False, How.PULL),  # round trips are all that counts
        (Sizes(2 * MB, 5 * MB), trace(2 * MB), False, How.PULL),
        (Sizes(8_000 * MB, 20_000 * MB), trace(300 * MB), False, How.LAZY),
        (Sizes(0, 0), trace(0), False, How.LAZY),
    ],
)
def test_the_cheapest_way_is_chosen(sizes: Sizes, known: Trace | None, has_pack: bool, how: How) -> None:
    assert choose(sizes, known, has_pack) is how


@pytest.mark.parametrize(
    ("prefetch", "known", "has_pack", "expected"),
    [
        ("off", trace(160 * MB), True, Plan(How.LAZY)),
        ("trace", None, False, Plan(How.LAZY)),
        ("trace", trace(14 * MB), True, Plan(How.PACK)),
        ("trace", trace(160 * MB), True, Plan(How.PULL, 4)),
        ("full", None, False, Plan(How.LAZY, 1, FILL_BYTES_PER_S, 3.0)),
        ("full", trace(14 * MB), True, Plan(How.PACK, 1, FILL_BYTES_PER_S, 3.0)),
        ("full", trace(160 * MB), False, Plan(How.PULL, 4)),
    ],
)
def test_what_is_filled_is_what_the_setting_says(
    prefetch: Literal["off", "trace", "full"], known: Trace | None, has_pack: bool, expected: Plan
) -> None:
    assert plan(prefetch, DEBIAN, known, has_pack) == expected


def test_bandwidth_is_what_was_measured_if_it_was() -> None:
    assert bandwidth(Trace([], 4 * MB, 2.0)) == 2 * MB
    assert bandwidth(Trace([], 4000, 2.0)) == bandwidth(Trace([], 4 * MB, 0.0)) == BANDWIDTH_GUESS


@given(some.integers(0, BLOCKS_MAX), some.integers(0, 1 << 40), some.integers(0, 1 << 41), some.floats(0, 1e6), some.booleans())
def test_the_more_is_read_the_less_lazily(blocks: int, compressed: int, unpacked: int, seconds: float, has_pack: bool) -> None:
    sizes = Sizes(compressed, unpacked)
    known = Trace([Block(0, 0)] * blocks, 10 * MB, seconds)
    assert 0 <= read_share(sizes, known) <= 1
    assert lazy_s(sizes, known) >= 0 and pull_s(sizes, known) > 0
    order = [How.LAZY, How.PACK, How.PULL]
    fewer = Trace(known.blocks[: blocks // 2], known.fetched_bytes, known.fetching_s)
    assert order.index(choose(sizes, fewer, has_pack)) <= order.index(choose(sizes, known, has_pack))
