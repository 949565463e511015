from __future__ import annotations

import contextlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from actors.gateway.batch import LINE_BYTES_MAX, Batch, Lines, identified, refusal, task_of
from actors.gateway.client import Client
from actors.gateway.messages import Accepted, Ended, Failed, Submit
from actors.gateway.submitting import UsageError
from actors.image.registry.login import Login
from actors.settings import SandboxSection
from tests.actors.gateway.scripted import PATIENCE_S, Connection, ScriptedDaemon, result

DEFAULTS = SandboxSection()


def line(**fields: Any) -> bytes:
    return json.dumps({"image": "busybox", "command": ["true"], **fields}).encode() + b"\n"


# --- lines ---


def cut(*pieces: bytes) -> list[tuple[int, bytes | None]]:
    lines = Lines()
    return [found for piece in (*pieces, b"") for found in lines.feed(piece)]


def test_lines_are_numbered_and_blank_ones_left_out() -> None:
    assert cut(b"a\n\n  \nb\nlast") == [(1, b"a"), (4, b"b"), (5, b"last")]


def test_nothing_is_no_line() -> None:
    assert cut() == []
    assert cut(b"\n") == []


@given(st.lists(st.binary(max_size=12)))
def test_lines_do_not_depend_on_how_they_arrive(pieces: list[bytes]) -> None:
    assert cut(*(piece for piece in pieces if piece)) == cut(*([whole] if (whole := b"".join(pieces)) else []))


def test_a_line_over_the_bound_is_one_bad_line() -> None:
    long = b"x" * (LINE_BYTES_MAX + 1)
    assert cut(b"a\n" + long + b"\nb\n") == [(1, b"a"), (2, None), (3, b"b")]
    assert cut(long, long, b"\nb") == [(1, None), (2, b"b")]
    assert cut(long) == [(1, None)]


def test_a_line_over_the_bound_is_not_kept() -> None:
    lines = Lines()
    for _ in range(5):
        list(lines.feed(b"x" * LINE_BYTES_MAX))
    assert len(lines._rest) <= LINE_BYTES_MAX


# --- tasks ---


def test_a_line_may_have_a_login() -> None:
    assert task_of(line(login={"username": "me", "password": "s"}), DEFAULTS)[1].login == Login("me", "s")
    assert task_of(line(), DEFAULTS)[1].login is None
    with pytest.raises(UsageError, match="login: it must be") as caught:
        task_of(line(login={"user": "secret"}), DEFAULTS)
    assert "secret" not in str(caught.value)


def test_a_line_becomes_a_task_with_the_defaults() -> None:
    task, spec = task_of(line(id="b1"), DEFAULTS)
    assert task == "b1"
    assert (spec.memory_bytes, spec.cpu_cores, spec.timeout_s, spec.runtime, spec.workspace) == (
        512 << 20,
        1.0,
        None,
        "crun",
        None,
    )


def test_limits_are_texts_or_numbers() -> None:
    texts, numbers = line(memory="1Gi", cpu="500m", timeout="1m"), line(memory=1 << 30, cpu=0.5, timeout=60)
    assert task_of(texts, DEFAULTS)[1] == task_of(numbers, DEFAULTS)[1]


def test_each_task_without_an_id_gets_its_own() -> None:
    assert task_of(line(), DEFAULTS)[0] != task_of(line(), DEFAULTS)[0]


@pytest.mark.parametrize(
    ("bad", "word"),
    [
        (b"", "not a task"),
        (b"not json", "not a task"),
        (b"[]", "not a task"),
        (b"\xff\xfe", "not a task"),
        (b"[" * 100_000, "not a task"),
        (b'{"image": "x"}', "command"),
        (line(extra=1), "extra"),
        (line(command="true"), "command"),
        (line(env=["A=B"]), "env"),
        (line(env={"A": 1}), "env"),
        (line(runtime="podman"), "runtime"),
        (line(memory="12QB"), "memory"),
        (line(memory=1e300), "memory"),
        (line(memory=0.5), "memory"),
        (line(timeout=-1), "timeout"),
        (line(cpu=True), "cpu"),
        (line(id="a/b"), "id"),
        (line(id=""), "id"),
        (line(workspace="../x"), "workspace"),
        (line(command=["a\0b"]), "NUL"),
        (b'{"image": "x", "command": ["\\ud800"]}', "not a task"),
    ],
)
def test_a_bad_line_says_what_is_wrong_with_it(bad: bytes, word: str) -> None:
    with pytest.raises(UsageError, match=word):
        task_of(bad, DEFAULTS)


def test_the_id_of_a_bad_line_is_told_when_there_is_one() -> None:
    assert identified(line(id="b1", memory="12QB")) == "b1"
    assert [identified(bad) for bad in (None, b"not json", b"[]", line(id=5))] == [None] * 4


def test_a_refusal_has_every_field_of_a_result() -> None:
    assert set(refusal(3, None, "x")) == {*type(result("t")).__struct_fields__, "line"}
    assert refusal(3, "b1", "x")["error"] == "line 3: x"


# --- a batch ---


@pytest.fixture
def source() -> Iterator[tuple[int, int]]:
    ends = os.pipe()
    pipe = os.fstat(ends[0])
    yield ends
    for end in ends:
        # The test may have closed it, and its number may be somebody else's by now.
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(end), pipe):
                os.close(end)


def run(tmp_path: Path, reading: int, parallel: int) -> list[dict[str, Any]]:
    with Client(tmp_path / "run") as client:
        return list(Batch(client, reading, parallel, DEFAULTS).run())


def test_results_come_as_tasks_end_and_never_more_than_n_are_open(tmp_path: Path, source: tuple[int, int]) -> None:
    def script(connection: Connection) -> None:
        first, second = connection.request(), connection.request()
        connection.answer(Accepted(first.request, first.task), Accepted(second.request, second.task))
        connection.socket.settimeout(0.2)
        with pytest.raises(TimeoutError):
            connection.request()  # the third waits for a place
        connection.socket.settimeout(PATIENCE_S)
        connection.answer(Ended(second.request, result(second.task)))
        third = connection.request()
        connection.answer(Ended(third.request, result(third.task)), Ended(first.request, result(first.task)))

    daemon = ScriptedDaemon(tmp_path / "run", script)
    os.write(source[1], b"".join(line(id=f"b{number}") for number in range(3)))
    os.close(source[1])
    results = run(tmp_path, source[0], 2)
    assert [(row["task"], row["line"]) for row in results] == [("b1", 2), ("b2", 3), ("b0", 1)]
    daemon.join()


def test_a_bad_line_has_a_result_and_ends_nothing(tmp_path: Path, source: tuple[int, int]) -> None:
    def script(connection: Connection) -> None:
        request = connection.request()
        connection.answer(Ended(request.request, result(request.task)))
        request = connection.request()
        connection.answer(Failed(request.request, "conflict", "other content"))

    daemon = ScriptedDaemon(tmp_path / "run", script)
    os.write(source[1], b"no task\n" + line(id="good") + line(id="bad", memory="x") + line(id="taken"))
    os.close(source[1])
    results = sorted(run(tmp_path, source[0], 1), key=lambda row: row["line"])
    assert [(row["line"], row["task"], row["state"]) for row in results] == [
        (1, None, "failed"), (2, "good", "stopped"), (3, "bad", "failed"), (4, "taken", "failed"),
    ]  # fmt: skip
    assert results[3]["error"] == "line 4: other content"
    daemon.join()


def test_a_result_is_given_out_while_the_input_is_still_open(tmp_path: Path, source: tuple[int, int]) -> None:
    def script(connection: Connection) -> None:
        for _ in range(2):
            request = connection.request()
            connection.answer(Ended(request.request, result(request.task)))

    daemon = ScriptedDaemon(tmp_path / "run", script)
    with Client(tmp_path / "run") as client:
        results = Batch(client, source[0], 4, DEFAULTS).run()
        os.write(source[1], line(id="first"))
        assert next(results)["task"] == "first"
        os.write(source[1], line(id="second"))
        assert next(results)["task"] == "second"
        os.close(source[1])
        assert list(results) == []
    daemon.join()


def test_a_full_queue_is_tried_again_when_a_task_has_ended(tmp_path: Path, source: tuple[int, int]) -> None:
    def script(connection: Connection) -> None:
        first, second = connection.request(), connection.request()
        connection.answer(Failed(second.request, "busy", "the queue is full"))
        connection.answer(Ended(first.request, result(first.task)))
        again = connection.request()
        assert (again.task, again.request) == (second.task, second.request)
        connection.answer(Ended(again.request, result(again.task)))

    daemon = ScriptedDaemon(tmp_path / "run", script)
    os.write(source[1], line(id="b1") + line(id="b2"))
    os.close(source[1])
    assert [row["task"] for row in run(tmp_path, source[0], 2)] == ["b1", "b2"]
    daemon.join()


def test_a_queue_that_others_fill_is_an_error_of_that_line(tmp_path: Path, source: tuple[int, int]) -> None:
    def script(connection: Connection) -> None:
        connection.answer(Failed(connection.request().request, "busy", "the queue is full"))

    daemon = ScriptedDaemon(tmp_path / "run", script)
    os.write(source[1], line(id="b1"))
    os.close(source[1])
    assert "queue is full" in run(tmp_path, source[0], 2)[0]["error"]
    daemon.join()


def test_a_restart_of_the_daemon_loses_and_doubles_nothing(tmp_path: Path, source: tuple[int, int]) -> None:
    def dies(connection: Connection) -> None:
        first, second = connection.request(), connection.request()
        connection.answer(Accepted(first.request, first.task), Ended(second.request, result(second.task)))

    def lives(connection: Connection) -> None:
        request = connection.request()
        assert isinstance(request, Submit)
        connection.answer(Accepted(request.request, request.task), Ended(request.request, result(request.task)))

    daemon = ScriptedDaemon(tmp_path / "run", dies, lives)
    os.write(source[1], line(id="b1") + line(id="b2"))
    os.close(source[1])
    assert sorted(row["task"] for row in run(tmp_path, source[0], 2)) == ["b1", "b2"]
    daemon.join()


def test_a_file_is_read_no_further_than_needed(tmp_path: Path) -> None:
    file = tmp_path / "tasks"
    file.write_bytes(line(id="b") * 20_000)
    descriptor = os.open(file, os.O_RDONLY)
    arrived, seen = threading.Event(), threading.Event()

    def script(connection: Connection) -> None:
        request = connection.request()
        arrived.set()
        seen.wait(60)
        connection.answer(Ended(request.request, result(request.task)))

    daemon = ScriptedDaemon(tmp_path / "run", script)
    with Client(tmp_path / "run") as client:
        running = threading.Thread(target=next, args=(Batch(client, descriptor, 1, DEFAULTS).run(),))
        running.start()
        assert arrived.wait(60)
        assert os.lseek(descriptor, 0, os.SEEK_CUR) < 1 << 17
        seen.set()
        running.join(60)
        daemon.join()
    os.close(descriptor)
