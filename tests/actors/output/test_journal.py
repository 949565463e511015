"""The journal's parser against records made by the rule, and against conmon's own."""

from __future__ import annotations

import time

import pytest
from hypothesis import given, settings

from actors.output.journal import Journal
from tests.actors.output.conmon import Conmon
from tests.actors.output.records import CUTS, WRITTEN, Written, cut, journal, printed, record, streams


@given(WRITTEN, CUTS)
def test_a_stream_is_the_same_wherever_the_journal_is_cut(written: list[Written], cuts: list[int]) -> None:
    data, parser, chunks = journal(written), Journal(), []
    for piece in cut(data, cuts):
        chunks += parser.feed(piece)
    assert streams(chunks) == printed(written)
    assert parser.position == len(data)
    assert parser.torn() is None


@given(WRITTEN, CUTS)
def test_a_new_parser_goes_on_at_the_position(written: list[Written], cuts: list[int]) -> None:
    data, position, chunks = journal(written), 0, []
    for end in [*sorted(place % (len(data) + 1) for place in cuts), len(data)]:
        parser = Journal(position)
        chunks += parser.feed(data[position:end])
        position = parser.position
    assert streams(chunks) == printed(written)


@given(WRITTEN)
@settings(max_examples=30)
def test_a_journal_torn_anywhere_gives_a_beginning_of_each_stream(written: list[Written]) -> None:
    data = journal(written)
    whole = printed(written)
    for end in range(len(data)):
        parser = Journal()
        chunks = parser.feed(data[:end])
        torn = parser.torn()
        found = streams([*chunks, torn] if torn else chunks)
        assert whole["stdout"].startswith(found["stdout"])
        assert whole["stderr"].startswith(found["stderr"])
        assert parser.position == data[:end].rfind(b"\n") + 1


def test_a_torn_record_keeps_its_text() -> None:
    parser = Journal()
    assert parser.feed(record("stderr", "F", b"whole") + record("stdout", "F", b"torn \r\0")[:-1]) == [("stderr", b"whole\n")]
    assert parser.torn() == ("stdout", b"torn \r\0")


def test_what_is_no_record_is_left_out() -> None:
    junk = [b"\n", b"\0\0\0\n", b"no record\n", b"2026 stdin F x\n", b"2026 stdout X x\n", b"a b stdout F x\n"]
    data = b"".join(line + record("stdout", "F", b"%d" % number) for number, line in enumerate(junk))
    parser = Journal()
    assert streams(parser.feed(data))["stdout"] == b"0\n1\n2\n3\n4\n5\n"
    assert parser.position == len(data)


def test_neighbours_of_one_stream_are_one_chunk() -> None:
    data = b"".join(record("stdout", "F", b"%d" % number, number // 3) for number in range(9)) + record("stderr", "P", b"x")
    assert Journal().feed(data) == [("stdout", b"".join(b"%d\n" % number for number in range(9))), ("stderr", b"x")]


@pytest.mark.alone
def test_a_hundred_megabytes_take_about_a_second() -> None:
    block = b"".join(record("stdout", "F", b"x" * 80, number) for number in range(8000))  # no two in one chunk: the slow case

    def took_s() -> float:
        parser, began_s = Journal(), time.process_time()
        for _ in range(20):
            parser.feed(block)
        return (time.process_time() - began_s) * 100e6 / parser.position

    assert any(took_s() < 4 for _ in range(3))  # 1 s on the machine it was written on


def test_what_conmon_writes(conmon: Conmon) -> None:
    conmon.run(
        r"""printf 'a\0b\r\n\n'; printf '\377\376 no utf-8\n'; printf 'err' >&2; sleep 0.05; printf 'P'; sleep 0.05; printf 'F\n'
        head -c 100000 /dev/zero; printf '\nlast'; echo ' end' >&2"""
    )
    parser = Journal()
    found = streams(parser.feed(conmon.journal.read_bytes()))
    assert found["stdout"] == b"a\0b\r\n\n\xff\xfe no utf-8\nPF\n" + bytes(100000) + b"\nlast"
    assert found["stderr"] == b"err end\n"
    assert parser.position == conmon.journal.stat().st_size
