"""A real keeper with test programs as its parts: what it holds, restarts, reaps, and how it ends and is replaced."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from supervisor.channel import Channel, ChannelClosed
from supervisor.isolation import Isolation
from supervisor.keeper import EXIT_FAILED, EXIT_REFUSES, EXIT_RUNNING
from supervisor.keeping import TO_KEEPER, Drop, Hello, Keep, Kept, KeptAll, Welcome
from supervisor.lockfile import sign_of
from supervisor.pidfd import pid_of
from tests.supervisor.daemons_under_test import Daemon
from tests.supervisor.descendants import ends, kill
from tests.supervisor.processes_under_test import FROM_CHILD, Say
from tests.supervisor.programs_under_test import ENTRIES, Put, Remove, argv


def isolated(daemon: Daemon, entry: str = "echo") -> tuple[int, int, Channel]:
    isolation = Isolation(str(daemon.directory / "forkserver.sock"))
    process = isolation.start(entry, f"{ENTRIES}:{entry}", Say("hello"), FROM_CHILD, timeout_s=60.0)
    return process.pid, process.pidfd, process.channel


# --- what it holds and restarts ---


def test_a_keeper_starts_its_parts(daemon: Daemon) -> None:
    keeper = daemon.start()
    held = daemon.ask()
    assert (held.keeper, held.stand_in, held.texts) == (keeper.pid, False, {})
    pid, pidfd, channel = isolated(daemon)
    assert channel.receive(60)[0].text == "hello"
    state = daemon.state()
    assert (state.pid, state.stand_in, state.root_restarts, state.fork_server_restarts) == (keeper.pid, False, 0, 0)
    assert Path(f"/proc/{keeper.pid}/comm").read_text() == "keeper\n"
    channel.close()
    assert ends(pid, 60)
    os.close(pidfd)


def test_what_is_held_outlives_the_root_supervisor(daemon: Daemon) -> None:
    daemon.start()
    before = daemon.ask(Put({"a": "one", "b": "two", "c": "three"}, {"a": b"data of a", "b": b"data of b"}))
    before = daemon.ask(Remove(["b", "none"]))
    for restarts in (1, 2, 3):
        kill(before.pid)
        after = daemon.ask()
        assert after.pid != before.pid
        assert (after.texts, after.data) == ({"a": "one", "c": "three"}, {"a": b"data of a"})
        state = daemon.kept("a", "c")
        assert (state.root_restarts, state.fork_server_restarts) == (restarts, 0)
        before = after
    assert daemon.log().count("root supervisor (pid") == 3
    assert "has ended, killed by signal 9; it is started again" in daemon.log()


def test_what_was_put_in_the_moment_of_death_is_held(daemon: Daemon) -> None:
    """What lies in a socket's queue when its sender dies is still read."""
    daemon.start()
    for number in range(3):
        kill(daemon.ask(Put({f"file {number}": str(number)})).pid)
    assert daemon.ask().texts == {f"file {number}": str(number) for number in range(3)}


def test_the_fork_server_is_started_again_and_its_processes_live_on(daemon: Daemon) -> None:
    daemon.start()
    root = daemon.ask().pid
    pid, pidfd, channel = isolated(daemon)
    channel.receive(60)
    server = daemon.state().fork_server_pid
    wait_for_spare(server)
    kill(server)
    second_pid, second_pidfd, second = isolated(daemon)  # waits for the next one
    assert second.receive(60)[0].text == "hello"
    channel.send(Say("still there?"))
    assert channel.receive(60)[0].text == "still there?"
    state = daemon.state()
    assert state.fork_server_restarts == 1
    assert state.fork_server_pid not in (server, 0)
    assert daemon.ask().pid == root
    for end, number, descriptor in ((channel, pid, pidfd), (second, second_pid, second_pidfd)):
        end.close()
        assert ends(number, 60)
        os.close(descriptor)


def test_orphans_are_reaped(daemon: Daemon) -> None:
    """Processes whose fork server died, and which end later."""
    daemon.start()
    pid, pidfd, channel = isolated(daemon, "outlive")
    kill(daemon.state().fork_server_pid)
    kill(pid)
    for _ in range(2):  # the second answer comes a round after it has heard of the end
        daemon.state()
    assert pid_of(pidfd) is None
    os.close(pidfd)
    channel.close()


def test_a_part_that_cannot_be_started_is_tried_again_and_nothing_is_lost(daemon: Daemon, tmp_path: Path) -> None:
    daemon.start("keeper-of-nothing")
    assert daemon.state().root_restarts == -1
    (tmp_path / "new").write_text("#!/bin/sh\nexec " + " ".join(argv("root", tmp_path)) + "\n")
    (tmp_path / "new").chmod(0o700)
    (tmp_path / "new").rename(tmp_path / "program")
    assert daemon.ask().texts == {}
    assert daemon.state().root_restarts == 0
    assert "root supervisor cannot be started, it is tried again: [Errno 2]" in daemon.log()


# --- clients that it cannot trust ---


def test_garbage_costs_its_sender_the_connection(daemon: Daemon) -> None:
    daemon.start()
    daemon.ask(Put({"a": "one"}))
    for garbage in (b"garbage", TO_KEEPER.encode(Keep(["b"])), TO_KEEPER.encode(Keep(["b"], {"b": b"x" * 20_000}))):
        channel = daemon.connect("keeper.sock")
        channel.socket.send(garbage)
        with pytest.raises(ChannelClosed):
            channel.receive(60)
        channel.close()
    assert daemon.kept("a").root_restarts == 0
    assert "a client of the keeper broke the protocol: 1 names came with 0 descriptors" in daemon.log()


def test_what_another_client_holds_and_drops_is_handed_out(daemon: Daemon) -> None:
    keeper = daemon.start()
    daemon.ask(Put({"a": "one"}))
    daemon.kept("a")
    client = daemon.connect("keeper.sock")
    client.send(Keep(["b"]), [0])
    client.send(Drop(["a", "none"]))
    client.send(Hello())
    assert client.receive(60) == (Welcome(keeper.pid, False, False), [])
    kept, (copy,) = client.receive(60)
    assert kept == Kept(["b"])
    assert client.receive(60) == (KeptAll(), [])
    os.close(copy)
    client.close()


# --- the end ---


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_drains_and_ends_it_with_success(daemon: Daemon, number: int, tmp_path: Path) -> None:
    keeper = daemon.start()
    root = daemon.ask().pid
    server = daemon.state().fork_server_pid
    keeper.send_signal(number)
    assert keeper.wait(60) == 0
    assert (tmp_path / "drained").exists()
    assert ends(root, 0) and ends(server, 0)
    assert not (tmp_path / "keeper.sock").exists() and not (tmp_path / "forkserver.sock").exists()


def test_it_ends_after_all_that_were_killed_when_it_drained(daemon: Daemon) -> None:
    """SIGKILL does not end at once who waits for a disk."""
    keeper = daemon.start()
    daemon.ask()
    pid, pidfd, channel = isolated(daemon, "outlive")
    keeper.terminate()
    killing = threading.Timer(0.5, os.kill, (pid, signal.SIGKILL))
    killing.start()
    assert keeper.wait(60) == 0
    assert ends(pid, 0)
    killing.join()
    os.close(pidfd)
    channel.close()


def test_a_drain_that_takes_too_long_is_gone_on_with_by_another_root_supervisor(daemon: Daemon, tmp_path: Path) -> None:
    keeper = daemon.start()
    daemon.ask()
    (tmp_path / "stubborn").touch()
    keeper.terminate()
    assert keeper.wait(60) == 0
    assert (tmp_path / "drained").exists()
    assert "the drain takes too long" in daemon.log()


def test_who_has_the_place_drains_when_another_one_was_told_to(daemon: Daemon, tmp_path: Path) -> None:
    """Two were started at once, by a stand-in and by the keeper that took its place: that one's own is still waiting when it is told."""
    (tmp_path / "program").write_text("#!/bin/sh\nexec sleep 60\n")
    (tmp_path / "program").chmod(0o700)
    keeper = daemon.start("keeper-of-nothing")
    daemon.state(lambda state: state.root_restarts == 0)
    with subprocess.Popen(argv("root", tmp_path)):
        daemon.ask()
        keeper.send_signal(signal.SIGTERM)
        assert keeper.wait(60) == 0
    assert (tmp_path / "drained").exists()
    assert "the drain takes too long" not in daemon.log()


def test_a_root_supervisor_that_dies_while_it_drains_is_started_again_to_go_on_with_it(daemon: Daemon, tmp_path: Path) -> None:
    keeper = daemon.start()
    root = daemon.ask().pid
    os.kill(root, signal.SIGSTOP)  # so that it is certainly killed before it could have drained
    keeper.terminate()
    kill(root)
    assert keeper.wait(60) == 0
    assert (tmp_path / "drained").exists()


def test_a_root_supervisor_that_refuses_ends_it(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "exit").write_text(str(EXIT_REFUSES))
    keeper = daemon.start()
    assert keeper.wait(60) == EXIT_FAILED


def test_a_root_supervisor_that_ends_by_itself_is_started_again(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "exit").write_text("0")  # success, which nobody asked it for
    daemon.start()
    daemon.ask()
    assert daemon.state().root_restarts == 1
    assert "has ended, exit code 0; it is started again" in daemon.log()


# --- two of them ---


def test_there_is_one_keeper_to_a_directory(daemon: Daemon) -> None:
    first = daemon.start()
    root = daemon.ask(Put({"a": "one"})).pid
    second = daemon.start()
    assert second.wait(60) == EXIT_RUNNING
    assert f"already running, pid {first.pid}: stop it first, or say --take-over" in daemon.log()
    third = daemon.start("stand-in")
    assert third.wait(60) == EXIT_RUNNING
    assert (daemon.state().pid, daemon.ask().pid, daemon.ask().texts) == (first.pid, root, {"a": "one"})


def test_a_keeper_that_is_only_beginning_is_waited_for(daemon: Daemon) -> None:
    """It has the lock and does not listen yet."""
    first = subprocess.Popen(
        ["flock", str(daemon.directory / "keeper.lock"), "sh", "-c", "echo; read line"], stdin=-1, stdout=-1
    )
    assert first.stdout and first.stdin and first.stdout.read(1)
    (daemon.directory / "keeper.lock").write_text(str(first.pid))
    second = daemon.start()
    with pytest.raises(subprocess.TimeoutExpired):
        second.wait(0.5)
    first.communicate(b"\n")
    assert daemon.state().pid == second.pid


def test_a_keeper_takes_over_and_everything_below_it_is_new_but_what_is_held_and_what_runs(daemon: Daemon) -> None:
    first = daemon.start()
    before = daemon.ask(Put({"a": "one"}, {"a": b"data"}))
    server = daemon.state().fork_server_pid
    pid, pidfd, channel = isolated(daemon)
    channel.receive(60)
    second = daemon.start("take-over")
    assert first.wait(60) == 0
    assert ends(before.pid, 60) and ends(server, 60)
    after = daemon.ask()
    assert after.pid != before.pid
    assert (after.keeper, after.stand_in, after.texts, after.data) == (second.pid, False, {"a": "one"}, {"a": b"data"})
    assert after.descriptors == before.descriptors
    channel.send(Say("still there?"))
    assert channel.receive(60)[0].text == "still there?"
    state = daemon.state()
    assert (state.pid, state.names) == (second.pid, ["a"])
    assert state.fork_server_pid != server
    assert "a stand-in takes its place" not in daemon.log()
    channel.close()
    assert ends(pid, 60)
    os.close(pidfd)
    second.terminate()
    assert second.wait(60) == 0


def test_a_keeper_that_takes_over_where_nobody_is_just_starts(daemon: Daemon) -> None:
    keeper = daemon.start("take-over")
    assert daemon.ask().keeper == keeper.pid


def test_a_keeper_and_its_root_supervisor_are_killed_together(daemon: Daemon) -> None:
    """Nobody is left to stand in; the next keeper that somebody starts finds the fork server, and starts a root supervisor."""
    first = daemon.start()
    root = daemon.ask(Put({"a": "one"})).pid
    pid, pidfd, channel = isolated(daemon)
    channel.receive(60)
    server = daemon.state().fork_server_pid
    os.kill(root, signal.SIGSTOP)  # lest it be faster than this test
    kill(first.pid)
    kill(root)
    second = daemon.start()
    after = daemon.ask()
    assert (after.keeper, after.texts) == (second.pid, {})  # all its holders died
    assert daemon.state().fork_server_pid == server
    channel.send(Say("still there?"))
    assert channel.receive(60)[0].text == "still there?"
    channel.close()
    assert ends(pid, 60)
    os.close(pidfd)


def test_parts_have_nothing_of_who_started_the_keeper(daemon: Daemon, tmp_path: Path) -> None:
    """Descriptors that are inherited by accident would keep a pipe or a mount of somebody else's alive."""
    reader, writer = os.pipe()
    with open(tmp_path / "log", "ab") as log:
        keeper = subprocess.Popen(argv("keeper", tmp_path), stdin=subprocess.DEVNULL, stderr=log, pass_fds=[writer])
    daemon.started.append(keeper)
    pipe = os.readlink(f"/proc/self/fd/{reader}")
    for pid in (daemon.ask().pid, daemon.state().fork_server_pid):
        opened = opened_by(pid)
        assert opened and pipe not in opened
    os.close(reader)
    os.close(writer)


def test_a_log_that_cannot_be_written_costs_nothing(daemon: Daemon, tmp_path: Path) -> None:
    with open("/dev/full", "wb") as full:
        keeper = subprocess.Popen(argv("keeper", tmp_path), stdin=subprocess.DEVNULL, stderr=full)
    daemon.started.append(keeper)
    before = daemon.ask(Put({"a": "one"}))
    kill(before.pid)  # of which the keeper writes a line
    after = daemon.ask()
    assert (after.keeper, after.texts) == (keeper.pid, {"a": "one"})


# --- who hangs ---


def test_a_root_supervisor_that_hangs_is_replaced(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "beats").touch()
    daemon.start()
    before = daemon.ask(Put({"a": "one"}))
    wait_for_beat(tmp_path / "root.lock")
    os.kill(before.pid, signal.SIGSTOP)
    daemon.state(lambda state: state.root_restarts == 1)
    after = daemon.ask()
    assert (after.pid != before.pid, after.texts) == (True, {"a": "one"})
    assert f"root supervisor (pid {before.pid}) hangs; it is ended" in daemon.log()


def test_a_fork_server_that_hangs_is_replaced(daemon: Daemon, tmp_path: Path) -> None:
    daemon.start()
    server = daemon.state(lambda state: state.fork_server_pid > 0).fork_server_pid
    wait_for_beat(tmp_path / "forkserver.lock")
    os.kill(server, signal.SIGSTOP)
    daemon.state(lambda state: state.fork_server_pid not in (0, server))
    assert f"fork server (pid {server}) hangs; it is ended" in daemon.log()


def test_a_keeper_that_hangs_is_stood_in_for(daemon: Daemon, tmp_path: Path) -> None:
    keeper = daemon.start()
    root = daemon.ask(Put({"a": "one"})).pid
    wait_for_beat(tmp_path / "keeper.lock")
    os.kill(keeper.pid, signal.SIGSTOP)
    assert keeper.wait(60) == -signal.SIGKILL
    state = daemon.state(lambda state: state.names == ["a"])
    assert (state.stand_in, daemon.ask().pid) == (True, root)


def test_a_keeper_that_hangs_with_its_root_supervisor_is_taken_the_place_of(daemon: Daemon, tmp_path: Path) -> None:
    (tmp_path / "beats").touch()
    first = daemon.start()
    root = daemon.ask(Put({"a": "one"})).pid
    for name in ("keeper.lock", "root.lock"):
        wait_for_beat(tmp_path / name)
    for pid in (first.pid, root):
        os.kill(pid, signal.SIGSTOP)
    second = daemon.start("impatient")
    assert first.wait(60) == -signal.SIGKILL
    daemon.state(lambda state: state.pid == second.pid and state.root_restarts == 1)
    assert daemon.ask().pid != root


def wait_for_spare(server: int) -> None:
    """Until the fork server has one that has closed its copy of the lock: a server that was started before that would end again."""
    deadline = time.monotonic() + 60
    while True:
        for pid in Path(f"/proc/{server}/task/{server}/children").read_text().split():
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                name, opened = Path(f"/proc/{pid}/comm").read_text(), opened_by(int(pid))
                if name == "spare\n" and not any("lock" in path for path in opened):
                    return
        assert time.monotonic() < deadline


def opened_by(pid: int) -> set[str]:
    opened = set()
    for name in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # it has just closed that
            opened.add(os.readlink(f"/proc/{pid}/fd/{name}"))
    return opened


def wait_for_beat(lock: Path) -> None:
    deadline = time.monotonic() + 60
    while not sign_of(lock).beats:
        assert time.monotonic() < deadline
