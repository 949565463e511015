"""One course, moved by hand: how much a turn is, and what an error leaves."""

from __future__ import annotations

import os
import time
from contextlib import closing
from pathlib import Path

import pytest

from actors.output import course as course_module
from actors.output.course import TURN_BYTES, Course
from actors.output.sinks import SinkPosition
from tests.actors.output.conftest import SmallDisk
from tests.actors.output.movers import file_sink
from tests.actors.output.records import record


def test_a_turn_is_bounded(tmp_path: Path) -> None:
    """Two spills of newlines: lines as many as there can be, and the console takes its time for each."""
    for name in ("stdout.spill", "stderr.spill"):
        (tmp_path / name).write_bytes(b"\n" * 200_000)
    log = tmp_path / "task.log"
    with closing(Course("task", str(tmp_path), file_sink(log), SinkPosition())) as course:
        size_bytes, turns = 0, 0
        while course.move():
            turns += 1
            assert log.stat().st_size - size_bytes <= TURN_BYTES
            size_bytes = log.stat().st_size
    assert (size_bytes, turns) == (400_000, 8)


def test_a_slow_disk_is_waited_for_a_fifth_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(course_module, "RECORD_S", 0.01)
    monkeypatch.setattr(os, "fdatasync", lambda file: time.sleep(0.1))
    with closing(Course("task", str(tmp_path), file_sink(tmp_path / "task.log"), SinkPosition())) as course:
        (tmp_path / "stdout.spill").write_bytes(b"line\n")
        assert course.move()
        began_s = time.monotonic()
        assert course.record(began_s, at_once=False)
        took_s = time.monotonic() - began_s
        (tmp_path / "stdout.spill").write_bytes(b"line\nline\n")
        assert course.move()
        assert course.record(began_s + 0.4, at_once=False) is None
        assert course.record(began_s + 5 * took_s, at_once=False)


def test_it_goes_on_from_what_is_on_record_after_an_error(small_disk: SmallDisk, tmp_path: Path) -> None:
    lines = [b"%0100d" % number for number in range(600)]
    journal, log = tmp_path / "journal", small_disk.path / "task.log"
    with closing(Course("task", str(tmp_path), file_sink(log), SinkPosition())) as course:
        journal.write_bytes(b"".join(record("stdout", "F", line) for line in lines[:300]) + record("stderr", "P", b"part"))
        assert course.move() and not course.move()
        position = course.record(0.0, at_once=True)
        assert position == course.position != SinkPosition()
        with open(journal, "ab") as file:
            file.write(record("stderr", "F", b"ial") + b"".join(record("stdout", "F", line) for line in lines[300:]))
        small_disk.fill()
        with pytest.raises(OSError, match="No space left"):
            course.move()
        course.close()
        assert (course.position, course.dirty) == (position, False)
        small_disk.free()
        course.finishing = True
        while course.move():
            pass
        assert course.record(0.0, at_once=True) == course.position != position
        assert course.record(0.0, at_once=True) is None, "it has not moved since"
    written = [line + b"\n" for line in lines]
    assert log.read_bytes() == b"".join([*written[:300], b"partial\n", *written[300:]])
