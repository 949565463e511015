"""What is fetched before it is asked; tables."""

from __future__ import annotations

import pytest

from actors.image.readahead import OBJECTS_MAX, SMALL_SPANS, WINDOW_MAX, Readahead

SMALL, LARGE = range(100, 110), range(200, 400)


@pytest.mark.parametrize(
    ("spans", "asked", "ahead"),
    [
        # a program, wherever it is asked for: more and more of what follows
        (SMALL, [(100, 101), (105, 106), (103, 104)], [(101, 102), (106, 108), (104, 108)]),
        (SMALL, [(109, 110)], [(110, 110)]),
        # a large file that is read on in
        (LARGE, [(200, 201), (202, 203), (205, 207)], [(201, 202), (203, 205), (207, 211)]),
        # one of which a piece is wanted here, and a piece there
        (LARGE, [(300, 301), (250, 252), (390, 391)], [(301, 301), (252, 252), (391, 391)]),
        # first here and there, then on
        (LARGE, [(300, 301), (301, 302), (303, 304)], [(301, 301), (302, 303), (304, 306)]),
        # to the end
        (LARGE, [(200, 396), (396, 397), (398, 399)], [(396, 397), (397, 399), (399, 400)]),
    ],
)
def test_what_is_fetched_along_with_what_is_missed(
    spans: range, asked: list[tuple[int, int]], ahead: list[tuple[int, int]]
) -> None:
    readahead = Readahead()
    assert [readahead.missed(7, range(*needed), spans) for needed in asked] == [range(*found) for found in ahead]


def test_who_reads_on_need_not_wait() -> None:
    readahead = Readahead()
    missed = readahead.missed(7, range(200, 201), LARGE)
    fetched = missed.stop
    windows = []
    for span in range(200, 400):
        if span >= fetched:
            pytest.fail(f"{span} was not fetched ahead")
        found = readahead.found(7, span, LARGE)
        assert found.start == fetched or not found
        fetched = max(fetched, found.stop)
        windows.append(fetched - span)
    assert max(windows) <= 2 * WINDOW_MAX
    assert not readahead.found(7, 399, LARGE)


def test_what_was_not_fetched_ahead_is_not_read_on_in() -> None:
    readahead = Readahead()
    assert 7 not in readahead
    assert not readahead.found(7, 200, LARGE)
    readahead.missed(7, range(300, 301), LARGE)
    assert 7 in readahead
    assert not readahead.found(7, 300, LARGE)
    assert not readahead.found(7, 100, LARGE)


def test_few_objects_are_remembered() -> None:
    readahead = Readahead()
    for object in range(OBJECTS_MAX + 3):
        readahead.missed(object, range(1), range(SMALL_SPANS))
    assert [object in readahead for object in (0, 2, 3, OBJECTS_MAX + 2)] == [False, False, True, True]
