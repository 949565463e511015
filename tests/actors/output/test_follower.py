"""Reading an output directory: any position, any moment."""

from __future__ import annotations

import os
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from actors.output.follower import Follower, Position, Reader
from actors.output.journal import Chunk
from tests.actors.output.records import WRITTEN, Written, journal, printed, record, streams

GAP = b'{"time":"2026-11-24T08:47:02+00:00","reason":"killed","bytes_max":8192}\n'


def read_all(follower: Follower) -> list[Chunk]:
    chunks = []
    while more := follower.read():
        chunks += more
    return chunks


@given(WRITTEN, st.binary(max_size=40), st.binary(max_size=40), st.integers(0, 49), st.integers(1, 60))
@settings(max_examples=60, deadline=None)
def test_a_reader_at_any_position_goes_on_exactly(written: list[Written], out: bytes, err: bytes, torn: int, step: int) -> None:
    """Journal, torn record, gap and spills, by a new reader for each read."""
    with TemporaryDirectory() as name:
        directory = Path(name)
        last = record("stdout", "F", b"torn")[:torn]
        (directory / "journal").write_bytes(journal(written) + last)
        (directory / "gaps").write_bytes(GAP)
        (directory / "stdout.spill").write_bytes(out)
        (directory / "stderr.spill").write_bytes(err)
        position, chunks, positions = Position(), [], [(Position(), 0)]
        while True:
            with closing(Reader(directory, position)) as reader:
                more = reader.read(step)
                position = reader.position
            if not more:
                break
            chunks += more
            positions.append((position, len(chunks)))
        expected = printed(written)
        whole = streams(chunks)
        assert whole == {
            "stdout": expected["stdout"] + last[45:] + out,
            "stderr": expected["stderr"] + err,
            "gap": GAP,
        }
        for position, seen in positions:
            with closing(Reader(directory, position)) as reader:
                assert streams([*chunks[:seen], *reader.finish()]) == whole


def test_the_directory_grows(tmp_path: Path) -> None:
    with closing(Follower(tmp_path)) as follower:
        assert follower.read() == []
        assert not follower.wait(0)
        with open(tmp_path / "journal", "ab", buffering=0) as file:
            assert follower.wait(60), "the journal was made"
            file.write(record("stdout", "F", b"one") + b"2026-11")
            assert follower.wait(60)
            assert follower.read() == [("stdout", b"one\n")]
            assert not follower.wait(0), "what was read wakes nobody"
            file.write(record("stdout", "P", b"two")[7:])
            assert follower.wait(60)
            assert follower.read() == [("stdout", b"two")]
        (tmp_path / "stderr.spill").write_bytes(b"more")
        assert follower.wait(60)
        assert follower.read() == [("stderr", b"more")]
        assert follower.position == Position(journal=(tmp_path / "journal").stat().st_size, stderr=4)


def test_a_record_is_torn_only_when_nobody_writes_any_more(tmp_path: Path) -> None:
    (tmp_path / "journal").write_bytes(record("stdout", "F", b"half")[:-1])
    with closing(Follower(tmp_path)) as follower:
        assert follower.read() == []
        assert follower.finish() == [("stdout", b"half")]
        assert follower.finish() == []


def test_a_pump_that_begins_between_two_looks_changes_no_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """conmon writes its last records, is killed, and the pump begins, all after the journal was found at its end."""
    first, last = record("stdout", "F", b"first"), record("stdout", "F", b"last")
    (tmp_path / "journal").write_bytes(first + last[:47])
    pread = os.pread

    def pread_and_then(descriptor: int, size_bytes: int, offset: int) -> bytes:
        data = pread(descriptor, size_bytes, offset)
        if not data and not (tmp_path / "gaps").exists():
            with open(tmp_path / "journal", "ab") as file:
                file.write(last[47:])
            (tmp_path / "gaps").write_bytes(GAP)
            (tmp_path / "stdout.spill").write_bytes(b"spilled")
        return data

    with closing(Follower(tmp_path)) as follower:
        assert follower.read() == [("stdout", b"first\n")]
        monkeypatch.setattr(os, "pread", pread_and_then)
        assert streams(read_all(follower) + read_all(follower)) == {"stdout": b"last\nspilled", "stderr": b"", "gap": GAP}


def test_no_descriptor_is_left_when_there_is_no_directory(tmp_path: Path) -> None:
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(100):
        with pytest.raises(FileNotFoundError):
            Follower(tmp_path / "missing")
    assert len(os.listdir("/proc/self/fd")) < before + 50, "one each time; a few may be other threads'"
