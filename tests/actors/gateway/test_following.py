from __future__ import annotations

import json
import os
import threading
from pathlib import Path

import pytest

from actors.gateway.arrival import watch_nearest
from actors.gateway.client import Client, RequestFailed
from actors.gateway.following import follow, json_shower, show_bytes, show_present, write
from actors.gateway.messages import Ended, Failed, Progress, Wait
from actors.output.journal import Chunk
from tests.actors.gateway.scripted import Connection, ScriptedDaemon, result

TIME = b"2026-01-01T00:00:00.000000000+00:00"


def record(stream: str, data: bytes) -> bytes:
    """A record of conmon's journal."""
    kind, text = (b"F", data[:-1]) if data.endswith(b"\n") else (b"P", data)
    return b" ".join((TIME, stream.encode(), kind, text)) + b"\n"


class Shown:
    """What has been shown so far, by stream."""

    def __init__(self) -> None:
        self.streams = {"stdout": b"", "stderr": b""}
        self.some = threading.Event()

    def __call__(self, chunks: object) -> None:
        for chunk in chunks:  # type: ignore[attr-defined]
            self.streams[chunk.stream] += chunk.data
            self.some.set()


def test_output_is_shown_while_it_is_written_and_whole_at_the_end(tmp_path: Path) -> None:
    journal, shown = tmp_path / "output" / "journal", Shown()
    journal.parent.mkdir()

    def script(connection: Connection) -> None:
        connection.request()
        connection.answer(Progress(1, "preparing"))
        journal.write_bytes(record("stdout", b"first\n"))
        assert shown.some.wait(60), "it is shown before the task has ended"
        with journal.open("ab") as file:
            file.write(record("stderr", b"oops\n") + record("stdout", b"no newline"))
        connection.answer(Ended(1, result("t", exit_code=3)))

    daemon = ScriptedDaemon(tmp_path / "run", script)
    told: list[str] = []
    with Client(tmp_path / "run") as client:
        client.send(Wait(client.number(), "t", None))
        ended = follow(client, 1, journal.parent, shown, told.append)
    daemon.join()
    assert (ended.exit_code, told) == (3, ["preparing"])
    assert shown.streams == {"stdout": b"first\nno newline", "stderr": b"oops\n"}


def test_a_directory_that_is_made_when_the_tasks_turn_comes_is_found(tmp_path: Path) -> None:
    directory, shown = tmp_path / "tasks" / "t" / "output", Shown()

    def script(connection: Connection) -> None:
        connection.request()
        directory.mkdir(parents=True)
        (directory / "journal").write_bytes(record("stdout", b"late\n"))
        assert shown.some.wait(60)
        connection.answer(Ended(1, result("t")))

    daemon = ScriptedDaemon(tmp_path / "run", script)
    with Client(tmp_path / "run") as client:
        client.send(Wait(client.number(), "t", None))
        follow(client, 1, directory, shown, lambda text: None)
    daemon.join()
    assert shown.streams["stdout"] == b"late\n"


def test_a_task_that_never_had_its_turn_has_no_output(tmp_path: Path) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.answer(Ended(1, result("t", "failed", error="no such image")))

    daemon = ScriptedDaemon(tmp_path / "run", script)
    with Client(tmp_path / "run") as client:
        client.send(Wait(client.number(), "t", None))
        ended = follow(client, 1, tmp_path / "missing" / "output", Shown(), lambda text: None)
    daemon.join()
    assert ended.error == "no such image"
    show_present(tmp_path / "missing", True, Shown())


def test_a_refusal_ends_the_following(tmp_path: Path) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.answer(Failed(1, "unknown_task", "forgotten"))

    daemon = ScriptedDaemon(tmp_path / "run", script)
    with Client(tmp_path / "run") as client, pytest.raises(RequestFailed, match="forgotten"):
        client.send(Wait(client.number(), "t", None))
        follow(client, 1, tmp_path, Shown(), lambda text: None)
    daemon.join()


class Vanishing(type(Path())):  # type: ignore[misc]
    """A directory that is removed as soon as somebody has seen it."""

    def is_dir(self) -> bool:
        there: bool = super().is_dir()
        if there:
            self.rmdir()
        return there


def test_a_task_whose_output_is_removed_just_now_has_none(tmp_path: Path) -> None:
    (tmp_path / "output").mkdir()

    def script(connection: Connection) -> None:
        connection.request()
        connection.answer(Ended(1, result("t")))

    daemon = ScriptedDaemon(tmp_path / "run", script)
    with Client(tmp_path / "run") as client:
        client.send(Wait(client.number(), "t", None))
        assert follow(client, 1, Vanishing(tmp_path / "output"), Shown(), lambda text: None).exit_code == 0
    daemon.join()
    (tmp_path / "output").mkdir()
    show_present(Vanishing(tmp_path / "output"), True, Shown())


def test_bytes_go_to_the_stream_they_came_from_and_gaps_to_none(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    show_bytes(
        [
            Chunk("stdout", b"a\xff"),
            Chunk("stdout", b"\0b"),
            Chunk("stderr", b"e"),
            Chunk("gap", b"lost"),
            Chunk("stdout", b"c"),
        ]
    )
    assert capfdbinary.readouterr() == (b"a\xff\0bc", b"e")


def test_json_shows_gaps_and_joins_characters_that_were_cut(capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    show = json_shower()
    euro = "€".encode()
    show([Chunk("stdout", euro[:1]), Chunk("stderr", b"\xff"), Chunk("stdout", euro[1:]), Chunk("gap", b"8 KiB")])
    rows = [json.loads(row) for row in capfdbinary.readouterr()[0].splitlines()]
    assert rows == [
        {"stream": "stdout", "text": ""},
        {"stream": "stderr", "text": "�"},
        {"stream": "stdout", "text": "€"},
        {"stream": "gap", "text": "8 KiB"},
    ]


def test_everything_is_written_to_a_pipe_that_takes_it_in_pieces() -> None:
    reading, writing = os.pipe()
    data = os.urandom(1 << 20)
    writer = threading.Thread(target=lambda: (write(writing, data), os.close(writing)))
    writer.start()
    with os.fdopen(reading, "rb") as file:
        assert file.read() == data
    writer.join()


def test_something_is_watched_however_much_of_the_path_is_missing(tmp_path: Path) -> None:
    for missing in (tmp_path, tmp_path / "a", tmp_path / "a/b/c"):
        with watch_nearest(missing) as signs:
            assert not signs.read(timeout=0)
            (tmp_path / f"for {missing.name}").mkdir()
            assert signs.read(timeout=1000)


def test_a_file_in_the_way_is_not_watched_but_what_it_lies_in(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with watch_nearest(tmp_path / "file" / "below") as signs:
        (tmp_path / "file").unlink()
        (tmp_path / "file").mkdir()
        assert signs.read(timeout=1000)
