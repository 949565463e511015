from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.output.lines import LINE_BYTES_MAX, LineSplitter
from tests.actors.output.records import CUTS, cut

# Runs long enough that lines come on both sides of the bound, and exactly on it.
RUNS = st.integers(0, 3 * LINE_BYTES_MAX) | st.integers(LINE_BYTES_MAX - 2, LINE_BYTES_MAX + 2)
DATA = st.lists(st.sampled_from([b"\n", b"\r", b"\0\xff", b"a\n"]) | RUNS.map(lambda size: b"x" * size), max_size=8).map(
    b"".join
)


@given(DATA, CUTS)
def test_lines_are_the_same_wherever_the_data_is_cut(data: bytes, cuts: list[int]) -> None:
    splitter = LineSplitter()
    lines = [line for piece in cut(data, cuts) for line in splitter.feed(piece)] + splitter.flush()
    whole = LineSplitter()
    assert lines == whole.feed(data) + whole.flush()
    assert b"".join(lines) == data
    assert all(0 < len(line) <= LINE_BYTES_MAX for line in lines)
    for line in lines[:-1]:
        assert line.find(b"\n") == (len(line) - 1 if line.endswith(b"\n") else -1)
        assert line.endswith(b"\n") or len(line) == LINE_BYTES_MAX


@given(DATA, CUTS)
def test_a_new_splitter_goes_on_from_the_rest(data: bytes, cuts: list[int]) -> None:
    lines, rest = [], b""
    for piece in cut(data, cuts):
        splitter = LineSplitter(rest)
        lines += splitter.feed(piece)
        rest = splitter.rest
        assert len(rest) <= LINE_BYTES_MAX
    whole = LineSplitter()
    assert lines + LineSplitter(rest).flush() == whole.feed(data) + whole.flush()


def test_a_carriage_return_ends_no_line() -> None:
    assert LineSplitter().feed(b"a\rb\r\nc\n") == [b"a\rb\r\n", b"c\n"]


def test_flush_gives_the_partial_line_once() -> None:
    splitter = LineSplitter()
    assert splitter.feed(b"one\ntwo") == [b"one\n"]
    assert splitter.flush() == [b"two"]
    assert splitter.flush() == []


@pytest.mark.alone
def test_a_line_that_comes_byte_by_byte_is_not_copied_each_time() -> None:
    splitter, began_s = LineSplitter(), time.process_time()
    for _ in range(100_000):
        splitter.feed(b"\r 10 %    ")
    assert time.process_time() - began_s < 2
