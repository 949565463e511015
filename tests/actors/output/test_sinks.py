from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from loguru import logger

from actors.output.sinks import ConsoleSink, FileSink, faults
from actors.sandbox.messages import Sink
from tests.actors.output.conftest import SmallDisk


@pytest.fixture
def logged() -> Iterator[list[str]]:
    lines: list[str] = []
    number = logger.add(lambda message: lines.append(message.record["message"]), format="{message}", filter="actors.output")
    yield lines
    logger.remove(number)


def test_a_file_is_cut_to_what_is_on_record(tmp_path: Path) -> None:
    path = tmp_path / "logs" / "task.log"
    sink = FileSink(str(path), 0)
    sink.take([("stdout", b"one\n"), ("stderr", b"two\n")])
    assert sink.make_durable() == 8
    sink.take([("stdout", b"not recorded\n")])
    sink.close()
    again = FileSink(str(path), 8)
    again.take([("stderr", b"three\n")])
    assert again.make_durable() == 14
    again.close()
    assert path.read_bytes() == b"one\ntwo\nthree\n"


def test_a_file_that_somebody_shortened_gets_no_hole(tmp_path: Path) -> None:
    (tmp_path / "task.log").write_bytes(b"one\n")
    sink = FileSink(str(tmp_path / "task.log"), 1000)
    sink.take([("stdout", b"two\n")])
    assert sink.make_durable() == 8
    sink.close()
    assert (tmp_path / "task.log").read_bytes() == b"one\ntwo\n"


def test_what_a_full_disk_did_not_take_is_cut_off_by_the_next(small_disk: SmallDisk) -> None:
    (small_disk.path / "fill").write_bytes(bytes(1 << 19))
    lines = [("stdout", b"%07d\n" % number) for number in range(1 << 17)]  # 1 MiB, half of which has room
    sink = FileSink(str(small_disk.path / "task.log"), 0)
    sink.take(lines[:10])
    length_bytes = sink.make_durable()
    with pytest.raises(OSError, match="No space left"):
        sink.take(lines[10:])
    sink.close()
    assert (small_disk.path / "task.log").stat().st_size == 1 << 19
    again = FileSink(str(small_disk.path / "task.log"), length_bytes)
    again.take(lines[10:20])
    assert again.make_durable() == 160
    again.close()
    assert (small_disk.path / "task.log").read_bytes() == b"".join(line for _, line in lines[:20])


@pytest.mark.parametrize(("name", "error"), [("directory", "directory"), ("file/below", "file"), ("pipe", "Invalid argument")])
def test_a_file_that_cannot_be_opened_costs_no_descriptor(tmp_path: Path, name: str, error: str) -> None:
    (tmp_path / "directory").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").touch()
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(100):
        with pytest.raises(OSError, match=error):
            FileSink(str(tmp_path / name), 0)
    assert len(os.listdir("/proc/self/fd")) < before + 50, "one each time; a few may be other threads'"


def test_the_console_shows_a_line_as_a_line(logged: list[str]) -> None:
    lines = [b"plain\n", b"tab\t\xe2\x82\xac\n", b"no end", b"\x1b[2J\rforged\xff\0\n", b"\n", b"<red>{0}\n"]
    ConsoleSink("a-task").take([("stderr", line) for line in lines])
    assert logged == [
        "a-task stderr: plain",
        "a-task stderr: tab\t€",
        "a-task stderr: no end",
        r"a-task stderr: \x1b[2J\x0dforged\xff\x00",
        "a-task stderr: ",
        "a-task stderr: <red>{0}",
    ]


def test_a_file_begins_empty(tmp_path: Path) -> None:
    (tmp_path / "task.log").write_bytes(b"of somebody, or of a mover that was killed before anything was on record\n")
    sink = FileSink(str(tmp_path / "task.log"), 0)
    sink.take([("stdout", b"one\n")])
    assert sink.make_durable() == 4
    sink.close()
    assert (tmp_path / "task.log").read_bytes() == b"one\n"


@pytest.mark.parametrize(
    ("sinks", "taken", "told"),
    [
        ([Sink("console"), Sink("file", "/logs/a"), Sink("file", "/logs/b")], ["/logs/c"], []),
        ([Sink("file", "/logs/a"), Sink("file", "/logs//./a")], [], ["/logs/a: output goes there already"]),
        ([Sink("file", "/logs/a")], ["/logs/../logs/a"], ["/logs/a: output goes there already"]),
        ([Sink("file", "logs/a")], [], ["'logs/a' is no absolute path"]),
        ([Sink("file"), Sink("file", "/a\0b")], [], ["'' is no absolute path", "is no absolute path"]),
        ([Sink("pigeon")], [], ["no sink of the kind 'pigeon'"]),
    ],
)
def test_what_is_wrong_with_a_choice_of_sinks(sinks: list[Sink], taken: list[str], told: list[str]) -> None:
    found = faults(sinks, taken)
    assert len(found) == len(told) and all(expected in text for expected, text in zip(told, found, strict=True))
