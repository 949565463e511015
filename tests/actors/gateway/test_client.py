from __future__ import annotations

import contextlib
import os
import shutil
import socket
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest

from actors.gateway import client as client_module
from actors.gateway.client import (
    ANSWER_TIMEOUT_S,
    Client,
    ClientError,
    NoDaemon,
    NotPermitted,
    RequestFailed,
    connect,
    readable,
    wait_connect,
)
from actors.gateway.messages import (
    FRAME_BYTES_MAX,
    Accepted,
    Done,
    Ended,
    Failed,
    ImageMounted,
    IsReady,
    Listed,
    ListTasks,
    Logs,
    MountImage,
    Progress,
    Ready,
    Submit,
    Wait,
)
from supervisor.frames import FrameError
from tests.actors.gateway.scripted import CODEC, SPEC, Connection, ScriptedDaemon, result

Opened = Callable[..., Client]


@pytest.fixture
def opened() -> Iterator[Opened]:
    """Opens clients, and closes them after the test."""
    with contextlib.ExitStack() as clients:
        yield lambda run_dir, **options: clients.enter_context(Client(run_dir, **options))


def test_no_daemon_says_how_to_start_one(tmp_path: Path) -> None:
    with pytest.raises(NoDaemon, match=r"run.py daemon") as caught:
        Client(tmp_path / "nowhere")
    assert caught.value.exit_code == 69


def test_a_socket_that_a_dead_daemon_left_is_no_daemon(opened: Opened, tmp_path: Path) -> None:
    daemon = ScriptedDaemon(tmp_path / "run", lambda connection: None)
    opened(tmp_path / "run").close()
    daemon.join()
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(tmp_path / "run" / "aerie.sock"))
    with pytest.raises(NoDaemon):
        connect(tmp_path / "run")


def test_a_file_where_a_directory_should_be_is_no_daemon(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for run_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(NoDaemon):
            connect(run_dir)
        with pytest.raises(NoDaemon):
            wait_connect(run_dir, time.monotonic())


@pytest.mark.parametrize("call", [connect, lambda run_dir: wait_connect(run_dir, time.monotonic())])
def test_a_socket_of_somebody_elses_is_said_so(tmp_path: Path, call: Callable[[Path], socket.socket]) -> None:
    tmp_path.chmod(0o700)
    os.seteuid(65534)
    try:
        with pytest.raises(NotPermitted, match="root") as caught:
            call(tmp_path / "run")
    finally:
        os.seteuid(0)
    assert caught.value.exit_code == 77


@pytest.mark.parametrize("timeout_s", [30 * 86400, 1e40])
def test_a_time_out_may_be_longer_than_poll_takes(opened: Opened, tmp_path: Path, timeout_s: float) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.answer(IsReady(1, 42))

    daemon = ScriptedDaemon(tmp_path / "run", script)
    assert opened(tmp_path / "run").ask(Ready(1), timeout_s) == IsReady(1, 42)
    daemon.join()


def test_nothing_to_read_is_said_when_the_time_is_over_and_not_before() -> None:
    ours, theirs = socket.socketpair()
    with ours, theirs:
        deadline = time.monotonic() + 0.05
        assert not readable(ours, deadline)
        assert time.monotonic() >= deadline
        theirs.close()
        assert readable(ours, None)


def test_a_request_and_its_answer(opened: Opened, tmp_path: Path) -> None:
    def script(connection: Connection) -> None:
        assert connection.request() == Ready(1)
        connection.answer(IsReady(1, 42))

    daemon = ScriptedDaemon(tmp_path / "run", script)
    assert opened(tmp_path / "run").ask(Ready(1)) == IsReady(1, 42)
    daemon.join()


def test_a_refusal_carries_kind_text_and_exit_code(opened: Opened, tmp_path: Path) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.answer(Failed(1, "unknown_task", "no task 'x'"))

    daemon = ScriptedDaemon(tmp_path / "run", script)
    with pytest.raises(RequestFailed, match="no task 'x'") as caught:
        opened(tmp_path / "run").ask(Wait(1, "x", 0))
    assert (caught.value.kind, caught.value.exit_code) == ("unknown_task", 4)
    daemon.join()


def test_a_list_is_answered_piece_by_piece(opened: Opened, tmp_path: Path) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.answer(Listed(1, result("a")), Listed(1, result("b")), Done(1))

    daemon = ScriptedDaemon(tmp_path / "run", script)
    answers = list(opened(tmp_path / "run").answers(ListTasks(1)))
    assert answers == [Listed(1, result("a")), Listed(1, result("b")), Done(1)]
    daemon.join()


def test_progress_is_told_on_the_way_to_the_answer(opened: Opened, tmp_path: Path) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.answer(Progress(1, "1 of 2"), Progress(1, "2 of 2"), ImageMounted(1, "l", "/x", "sha256:0"))

    daemon = ScriptedDaemon(tmp_path / "run", script)
    told: list[str] = []
    answer = opened(tmp_path / "run").ask(MountImage(1, "busybox"), progress=told.append)
    assert (answer, told) == (ImageMounted(1, "l", "/x", "sha256:0"), ["1 of 2", "2 of 2"])
    daemon.join()


def test_answers_to_other_requests_are_kept_for_later(opened: Opened, tmp_path: Path) -> None:
    def script(connection: Connection) -> None:
        first, second = connection.request(), connection.request()
        assert (first, second) == (Submit(1, "t", SPEC, True), Logs(2, "t"))
        connection.answer(Accepted(1, "t"), Ended(1, result("t")), Failed(2, "unknown_task", "gone"))
        with pytest.raises(EOFError):
            connection.request()

    daemon = ScriptedDaemon(tmp_path / "run", script)
    client = opened(tmp_path / "run")
    client.send(Submit(client.number(), "t", SPEC, True))
    with pytest.raises(RequestFailed):
        client.ask(Logs(client.number(), "t"))
    assert [client.receive(0), client.receive(0), client.receive(0)] == [Accepted(1, "t"), Ended(1, result("t")), None]
    client.close()
    daemon.join()


def test_an_answer_in_pieces_of_one_byte(opened: Opened, tmp_path: Path) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        for byte in CODEC.frame(IsReady(1, 42)):
            connection.socket.sendall(bytes([byte]))

    daemon = ScriptedDaemon(tmp_path / "run", script)
    assert opened(tmp_path / "run").ask(Ready(1)) == IsReady(1, 42)
    daemon.join()


def test_nothing_in_time_is_said_so(opened: Opened, tmp_path: Path) -> None:
    asked, done = threading.Event(), threading.Event()

    def script(connection: Connection) -> None:
        connection.request()
        asked.set()
        done.wait(60)

    daemon = ScriptedDaemon(tmp_path / "run", script)
    client = opened(tmp_path / "run")
    with pytest.raises(ClientError, match="not answered within"):
        client.ask(Ready(1), timeout_s=0.05)
    assert client.receive(0) is None
    done.set()
    daemon.join()
    assert asked.is_set()


def test_a_request_over_the_bound_is_not_sent(opened: Opened, tmp_path: Path) -> None:
    def script(connection: Connection) -> None:
        with pytest.raises(EOFError):
            connection.request()

    daemon = ScriptedDaemon(tmp_path / "run", script)
    client = opened(tmp_path / "run")
    with pytest.raises(FrameError, match="at most"):
        client.send(Logs(1, "x" * (FRAME_BYTES_MAX + 1)))
    client.close()
    daemon.join()


@pytest.mark.parametrize(
    "garbage",
    [
        struct.pack(">I", 3) + b"\xc1\xc1\xc1",
        struct.pack(">I", 1 << 30),
        struct.pack(">I", 1) + b"\x01",
        b"HTTP/1.1 400 Bad Request\r\n",
    ],
)
def test_a_daemon_that_breaks_the_protocol_is_an_error_and_no_traceback(opened: Opened, tmp_path: Path, garbage: bytes) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.socket.sendall(garbage)

    daemon = ScriptedDaemon(tmp_path / "run", script)
    with pytest.raises(ClientError, match="another version"):
        opened(tmp_path / "run").ask(Ready(1))
    daemon.join()


def test_what_the_daemon_could_not_read_is_the_clients_failure(opened: Opened, tmp_path: Path) -> None:
    def script(connection: Connection) -> None:
        connection.request()
        connection.answer(Failed(0, "invalid", "not a message that is understood here"))

    daemon = ScriptedDaemon(tmp_path / "run", script)
    with pytest.raises(RequestFailed, match="not a message"):
        opened(tmp_path / "run").ask(Ready(1))
    daemon.join()


# --- a daemon that goes away ---


def test_a_request_whose_answer_was_lost_is_sent_again(opened: Opened, tmp_path: Path) -> None:
    def dies(connection: Connection) -> None:
        assert connection.request() == Submit(1, "t", SPEC, True)
        connection.answer(Accepted(1, "t"))

    def lives(connection: Connection) -> None:
        assert connection.request() == Submit(1, "t", SPEC, True)
        connection.answer(Accepted(1, "t"), Ended(1, result("t")))

    daemon = ScriptedDaemon(tmp_path / "run", dies, lives)
    answers = list(opened(tmp_path / "run").answers(Submit(1, "t", SPEC, True)))
    assert answers == [Accepted(1, "t"), Accepted(1, "t"), Ended(1, result("t"))]
    daemon.join()


def test_the_half_of_an_answer_that_arrived_is_forgotten(opened: Opened, tmp_path: Path) -> None:
    def dies(connection: Connection) -> None:
        connection.request()
        connection.socket.sendall(struct.pack(">I", 100) + b"half")

    def lives(connection: Connection) -> None:
        connection.request()
        connection.answer(IsReady(1, 42))

    daemon = ScriptedDaemon(tmp_path / "run", dies, lives)
    assert opened(tmp_path / "run").ask(Ready(1)) == IsReady(1, 42)
    daemon.join()


def test_only_what_is_unanswered_is_sent_again(opened: Opened, tmp_path: Path) -> None:
    def dies(connection: Connection) -> None:
        assert [connection.request().request for _ in range(3)] == [1, 2, 3]
        connection.answer(Ended(2, result("b")))

    def lives(connection: Connection) -> None:
        assert [connection.request().request for _ in range(2)] == [1, 3]
        connection.answer(Ended(3, result("c")), Ended(1, result("a")))

    daemon = ScriptedDaemon(tmp_path / "run", dies, lives)
    client = opened(tmp_path / "run")
    for task in "abc":
        client.send(Wait(client.number(), task, None))
    answers = [client.receive(60) for _ in range(3)]
    assert answers == [Ended(2, result("b")), Ended(3, result("c")), Ended(1, result("a"))]
    daemon.join()


def test_a_mount_is_not_asked_for_twice(opened: Opened, tmp_path: Path) -> None:
    def dies(connection: Connection) -> None:
        connection.request()

    def lives(connection: Connection) -> None:
        with pytest.raises(EOFError):
            connection.request()

    daemon = ScriptedDaemon(tmp_path / "run", dies, lives)
    client = opened(tmp_path / "run")
    with pytest.raises(RequestFailed, match="image ls"):
        client.ask(MountImage(1, "busybox"))
    client.close()
    daemon.join()


def test_a_daemon_that_is_started_later_is_found(opened: Opened, tmp_path: Path) -> None:
    run_dir = tmp_path / "above" / "run"

    def dies(connection: Connection) -> None:
        connection.request()

    def lives(connection: Connection) -> None:
        connection.request()
        connection.answer(IsReady(1, 42))

    (tmp_path / "above").mkdir()
    first = ScriptedDaemon(run_dir, dies)
    client = opened(run_dir)
    answers: list[object] = []
    asking = threading.Thread(target=lambda: answers.append(client.ask(Ready(1))), daemon=True)
    asking.start()
    first.join()
    shutil.rmtree(tmp_path / "above")  # so that directories are missing, too
    (tmp_path / "above").mkdir()
    second = ScriptedDaemon(run_dir, lives)
    asking.join(60)
    second.join()
    assert answers == [IsReady(1, 42)]


def test_a_daemon_that_was_away_for_long_has_its_time_to_answer(
    opened: Opened, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    away_s = 0.0

    def wait_long(run_dir: Path, deadline: float) -> socket.socket:
        nonlocal away_s
        away_s = ANSWER_TIMEOUT_S + 10
        return wait_connect(run_dir, deadline)

    monkeypatch.setattr(client_module, "time", SimpleNamespace(monotonic=lambda: time.monotonic() + away_s))
    monkeypatch.setattr(client_module, "wait_connect", wait_long)

    def dies(connection: Connection) -> None:
        connection.request()

    def lives(connection: Connection) -> None:
        connection.request()
        time.sleep(0.2)
        connection.answer(IsReady(1, 42))

    daemon = ScriptedDaemon(tmp_path / "run", dies, lives)
    assert opened(tmp_path / "run").ask(Ready(1)) == IsReady(1, 42)
    daemon.join()


def test_a_daemon_that_does_not_come_back_is_said_so(opened: Opened, tmp_path: Path) -> None:
    def dies(connection: Connection) -> None:
        connection.request()

    daemon = ScriptedDaemon(tmp_path / "run", dies)
    client = opened(tmp_path / "run", patience_s=0.1)
    with pytest.raises(NoDaemon):
        client.ask(Ready(1))
    daemon.join()
