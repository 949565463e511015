"""The root supervisor's half of what is held: whoever of the two is killed, the other has everything."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from supervisor.channel import Channel
from supervisor.descriptors import Descriptors, KeeperLost
from supervisor.held import DATA_BYTES_MAX
from supervisor.keeping import TO_KEEPER, Drop, Hello, Keep, Kept, KeptAll, Welcome, Yielded
from supervisor.sockets import listen_at
from supervisor.watch import Watcher
from tests.supervisor.daemons_under_test import Daemon
from tests.supervisor.descendants import ends, kill
from tests.supervisor.programs_under_test import Put, Remove, argv


def test_a_stand_in_takes_a_dead_keeper_s_place(daemon: Daemon) -> None:
    first = daemon.start()
    before = daemon.ask(Put({"a": "one", "b": "two"}, {"a": b"data"}))
    server = daemon.fork_server()
    kill(first.pid)
    state = daemon.kept("a", "b")
    assert (state.stand_in, state.fork_server_pid) == (True, server)
    after = daemon.ask()
    assert (after.pid, after.texts, after.data) == (before.pid, before.texts, before.data)
    assert (after.keeper, after.stand_in) == (state.pid, True)


def test_stand_ins_take_each_other_s_place(daemon: Daemon) -> None:
    daemon.start()
    root = daemon.ask(Put({"a": "one"})).pid
    before = daemon.kept("a").pid
    for _ in range(4):  # as soon as each listens, or when it holds all
        kill(before)
        before = daemon.state(lambda state, before=before: state.pid != before).pid  # type: ignore[misc]
    held = daemon.ask(Put({"b": "two"}))
    assert (held.pid, held.texts) == (root, {"a": "one", "b": "two"})
    assert daemon.kept("a", "b").stand_in


def test_a_stand_in_starts_the_root_supervisor_again(daemon: Daemon) -> None:
    first = daemon.start()
    before = daemon.ask(Put({"a": "one"}, {"a": b"data"}))
    kill(first.pid)
    daemon.ask(Put({"b": "two"}))  # there is no keeper meanwhile: the next one gets it
    stand_in = daemon.kept("a", "b").pid
    kill(before.pid)
    after = daemon.ask()
    assert after.pid != before.pid
    assert (after.keeper, after.texts, after.data) == (stand_in, {"a": "one", "b": "two"}, {"a": b"data"})


def test_a_stand_in_starts_the_fork_server_again_and_drains(daemon: Daemon, tmp_path: Path) -> None:
    first = daemon.start()
    root = daemon.ask(Put({"a": "one"})).pid
    kill(first.pid)
    stand_in = daemon.kept("a")
    kill(stand_in.fork_server_pid)
    assert daemon.state(lambda state: state.fork_server_pid not in (0, stand_in.fork_server_pid)).pid == stand_in.pid
    os.kill(stand_in.pid, signal.SIGTERM)
    assert ends(stand_in.pid, 60) and ends(root, 60)
    assert (tmp_path / "drained").exists()


def test_a_keeper_that_somebody_starts_takes_a_stand_in_s_place(daemon: Daemon) -> None:
    first = daemon.start()
    before = daemon.ask(Put({"a": "one"}))
    server = daemon.fork_server()
    kill(first.pid)
    stand_in = daemon.kept("a").pid
    second = daemon.start()
    assert ends(stand_in, 60)
    state = daemon.state()
    assert (state.pid, state.stand_in, state.fork_server_pid, state.names) == (second.pid, False, server, ["a"])
    after = daemon.ask()
    assert (after.pid, after.texts) == (before.pid, {"a": "one"})
    kill(before.pid)  # the new one is who starts it again
    assert daemon.ask().texts == {"a": "one"}
    assert daemon.log().count("a stand-in takes its place") == 1


@pytest.mark.parametrize(("count", "size_bytes"), [(100, 0), (100, 1000), (12, DATA_BYTES_MAX)])
def test_many_are_handed_over_whoever_dies(daemon: Daemon, count: int, size_bytes: int) -> None:
    first = daemon.start()
    texts = {f"file {number:03}": str(number) for number in range(count)}
    data = {name: bytes([number]) * size_bytes for number, name in enumerate(texts)} if size_bytes else {}
    before = daemon.ask(Put(texts, data))
    kill(before.pid)
    assert daemon.ask().texts == texts
    kill(first.pid)
    daemon.kept(*texts)
    held = daemon.ask(Put({"last": "x"}))
    assert (held.texts, held.data) == (texts | {"last": "x"}, data)
    daemon.kept(*texts, "last")
    kill(held.pid)
    after = daemon.ask()
    assert (after.texts, after.data) == (held.texts, data)
    assert after.descriptors == held.descriptors


def test_more_data_than_is_allowed_is_refused_and_costs_nothing(daemon: Daemon) -> None:
    daemon.start()
    held = daemon.ask(Put({"a": "one"}, {"a": b"x" * (DATA_BYTES_MAX + 1)}))
    assert (held.error, held.texts) == ("a: 16385 bytes of data; at most 16384 are allowed", {})
    assert daemon.ask(Remove(["a"])).error == ""
    assert daemon.state().root_restarts == 0


def test_where_there_is_no_keeper_there_is_no_state(tmp_path: Path, watcher: Watcher) -> None:
    descriptors = Descriptors(tmp_path / "keeper.sock", ["/bin/false"], watcher)
    assert descriptors.keeper_state() is None


def test_a_stand_in_that_cannot_be_started_is_an_error_of_who_connects(tmp_path: Path, watcher: Watcher) -> None:
    with pytest.raises(FileNotFoundError):
        Descriptors(tmp_path / "keeper.sock", [str(tmp_path / "no program")], watcher).connect()


def test_a_stand_in_that_ends_at_once_is_not_waited_for(
    tmp_path: Path, watcher: Watcher, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("supervisor.descriptors.KEEPER_S", 120.0)  # which no machine takes to end it
    began = time.monotonic()
    with pytest.raises(KeeperLost, match="no keeper listens on .*, and none could be started"):
        Descriptors(tmp_path / "keeper.sock", ["/bin/false"], watcher).connect()
    assert time.monotonic() - began < 60


# --- with a keeper that this test plays, message by message ---


class Played:
    """A keeper of one connection after another."""

    def __init__(self, directory: Path) -> None:
        self._listener = listen_at(directory / "keeper.sock", socket.SOCK_SEQPACKET)
        self._listener.settimeout(60)
        self.channel: Channel | None = None

    def greet(self, holds: dict[str, int], pid: int = 1) -> None:
        """Take the next connection, hear its greeting, and hand over what is held, as the process `pid`."""
        if self.channel is not None:
            self.channel.close()
        connection, _ = self._listener.accept()
        self.channel = Channel(connection, TO_KEEPER)
        assert self.hear() == Hello(notes=True)
        self.channel.send(Welcome(pid, False, False))
        if holds:
            self.channel.send(Kept(list(holds)), list(holds.values()))
        self.channel.send(KeptAll())

    def hear(self) -> Any:
        assert self.channel is not None
        message, descriptors = self.channel.receive(60)
        for descriptor in descriptors:
            os.close(descriptor)
        return message

    def close(self) -> None:
        self._listener.close()
        if self.channel is not None:
            self.channel.close()


@pytest.fixture
def played(tmp_path: Path, daemon: Daemon) -> Iterator[Played]:
    """A root supervisor, with this test in its keeper's place."""
    played = Played(tmp_path)
    with open(tmp_path / "log", "ab") as log:
        daemon.started.append(subprocess.Popen(argv("root", tmp_path), stdin=subprocess.DEVNULL, stderr=log))
    yield played
    daemon.end()
    played.close()


def test_what_changed_while_a_keeper_took_another_s_place_is_as_the_root_supervisor_says(
    played: Played, daemon: Daemon
) -> None:
    files = {name: os.memfd_create(name) for name in ("stays", "dropped", "replaced")}
    played.greet(files)
    assert set(daemon.ask().texts) == {"stays", "dropped", "replaced"}
    before = daemon.ask(Put({"replaced": "new"})).descriptors
    assert played.hear() == Keep(["replaced"])
    daemon.ask(Remove(["dropped"]))
    assert played.hear() == Drop(["dropped"])
    assert played.channel is not None
    played.channel.send(Yielded())
    played.greet(files)  # the next keeper was handed all of it before these two words were said
    assert played.hear() == Keep(["replaced", "stays"])
    assert played.hear() == Drop(["dropped"])
    held = daemon.ask()
    assert held.texts == {"stays": "", "replaced": "new"}
    assert held.descriptors == before - 1
    for descriptor in files.values():
        os.close(descriptor)


def test_a_keeper_that_yields_is_not_stood_in_for(played: Played, daemon: Daemon, tmp_path: Path) -> None:
    played.greet({})
    assert played.channel is not None
    played.channel.send(Yielded())
    (tmp_path / "keeper.sock").unlink()  # as if the other one did not listen yet
    played.close()
    held = daemon.ask(Put({"a": "one"}))  # meanwhile there is nobody
    assert held.texts == {"a": "one"}
    next_keeper = Played(tmp_path)
    next_keeper.greet({})
    assert next_keeper.hear() == Keep(["a"])
    assert "stand-in" not in daemon.log()
    daemon.end()
    next_keeper.close()


def test_a_keeper_that_dies_while_it_hands_over_is_no_keeper(played: Played, daemon: Daemon, tmp_path: Path) -> None:
    played.greet({"a": (file := os.memfd_create("a"))})
    assert daemon.ask().texts == {"a": ""}
    assert played.channel is not None
    played.channel.close()
    connection, _ = played._listener.accept()  # it comes back at once, greets…
    half = Channel(connection, TO_KEEPER)
    assert half.receive(60) == (Hello(notes=True), [])
    half.send(Welcome(1, False, False))
    half.close()  # …and is left alone
    played.greet({})
    assert played.hear() == Keep(["a"])
    assert daemon.ask().texts == {"a": ""}
    assert f"the keeper on {tmp_path}/keeper.sock does not hand over: ChannelClosed; trying again" in daemon.log()
    os.close(file)


def test_a_keeper_that_dies_while_it_hands_over_for_the_first_time_costs_no_root_supervisor(
    played: Played, daemon: Daemon, tmp_path: Path
) -> None:
    """It is the only one who could start another keeper."""
    connection, _ = played._listener.accept()
    half = Channel(connection, TO_KEEPER)
    assert half.receive(60) == (Hello(notes=True), [])
    half.send(Welcome(1, False, False))
    half.close()
    played.greet({"a": (file := os.memfd_create("a"))})
    held = daemon.ask()
    assert (held.pid, held.texts) == (daemon.started[-1].pid, {"a": ""})
    assert "Traceback" not in daemon.log()
    os.close(file)


@pytest.fixture
def patient(daemon: Daemon) -> None:
    daemon.patient()


@pytest.mark.usefixtures("patient")  # so that it is waited for however long its end takes
def test_a_keeper_is_stood_in_for_when_it_has_ended_and_not_when_its_socket_has(
    played: Played, daemon: Daemon, tmp_path: Path
) -> None:
    """The kernel closes what a killed process had one after the other: its lock may be held for a while after that."""
    held = "import fcntl, sys; lock = open(sys.argv[1], 'w'); fcntl.flock(lock, 2); print(flush=True); sys.stdin.read()"
    holder = [sys.executable, "-c", held, str(tmp_path / "keeper.lock")]
    with subprocess.Popen(holder, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as keeper:
        assert keeper.stdin is not None and keeper.stdout is not None
        assert keeper.stdout.readline()
        played.greet({}, keeper.pid)
        assert daemon.ask(Put({"a": "one"})).error == ""
        played.close()
        time.sleep(0.5)  # a stand-in is there after half of that
        keeper.stdin.close()
    assert daemon.kept("a").stand_in
    assert daemon.log().count("a stand-in takes its place") == 1


def test_a_keeper_that_yields_is_not_stood_in_for_when_it_is_found_once_more_before_it_has_ended(
    played: Played, daemon: Daemon, tmp_path: Path
) -> None:
    played.greet({})
    assert played.channel is not None
    played.channel.send(Yielded())
    played.channel.close()
    connection, _ = played._listener.accept()  # its listener was still there
    (tmp_path / "keeper.sock").unlink()
    played.close()
    connection.close()
    time.sleep(0.5)  # a stand-in would be there after half of that
    next_keeper = Played(tmp_path)
    next_keeper.greet({})
    assert daemon.ask(Put({"a": "one"})).texts == {"a": "one"}
    assert next_keeper.hear() == Keep(["a"])
    assert "stand-in" not in daemon.log()
    daemon.end()
    next_keeper.close()
