"""What is fetched before it is asked; tables."""

from __future__ import annotations

import pytest

from actors.image.lazy.readahead import OBJECTS_MAX, SMALL_SPANS, WINDOW_MAX, Neighbours, Readahead

SMALL, LARGE = range(100, 110), range(200, 400)


@pytest.mark.parametrize(
    ("spans", "asked", "ahead"),
    [
        # a program: what follows, and all of it when something else of it is wanted
        (SMALL, [(100, 101), (105, 106), (103, 104)], [(101, 102), (100, 110), (100, 110)]),
        (SMALL, [(105, 106), (100, 102)], [(106, 107), (100, 110)]),
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


@pytest.mark.parametrize(
    ("asked", "ahead"),
    [
        ([(1, 17)], [[]]),
        ([(1, 17), (1, 18), (1, 17)], [[], [], []]),  # one object alone says nothing
        ([(1, 17), (2, 19), (3, 20)], [[], [(16, 24)], []]),
        ([(1, 15), (2, 16)], [[], []]),  # of two groups
        # where one group is wanted, those beside it are when something of one is
        ([(1, 17), (2, 19), (3, 24)], [[], [(16, 24)], [(24, 32), (32, 40)]]),
        ([(1, 17), (2, 19), (3, 33)], [[], [(16, 24)], [(32, 40), (40, 48), (24, 32)]]),
        ([(1, 17), (2, 19), (3, 2)], [[], [(16, 24)], [(0, 8), (8, 16)]]),
        ([(1, 17), (2, 19), (3, 50)], [[], [(16, 24)], []]),
    ],
)
def test_what_is_fetched_where_two_small_files_were_missed(
    asked: list[tuple[int, int]], ahead: list[list[tuple[int, int]]]
) -> None:
    neighbours = Neighbours()
    found = [neighbours.missed(3, object, span) for object, span in asked]
    assert found == [[range(*wanted) for wanted in group] for group in ahead]
    assert neighbours.missed(4, 77, asked[-1][1]) == []  # another layer


def test_few_objects_are_remembered() -> None:
    readahead = Readahead()
    for object in range(OBJECTS_MAX + 3):
        readahead.missed(object, range(1), range(SMALL_SPANS))
    assert [object in readahead for object in (0, 2, 3, OBJECTS_MAX + 2)] == [False, False, True, True]
