"""What the fork server makes of clients that it cannot trust, and of its own children and end."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from supervisor.channel import Channel, ChannelClosed
from supervisor.forkprotocol import ANSWERS, REQUESTS, Fork, Forked, ForkFailed
from supervisor.frames import Codec
from supervisor.sockets import connect_to
from tests.supervisor.processes_under_test import FROM_CHILD, TO_CHILD, Say
from tests.supervisor.programs_under_test import ENTRIES, argv


@pytest.fixture
def client(tmp_path: Path, fork_server: subprocess.Popen[bytes]) -> Iterator[Channel]:
    client = connect(tmp_path)
    yield client
    client.close()


def connect(directory: Path, codec: Codec = ANSWERS) -> Channel:
    connection = connect_to(directory / "forkserver.sock", socket.SOCK_SEQPACKET, 60)
    assert connection is not None
    return Channel(connection, codec)


def fork(client: Channel, entry: str) -> tuple[Forked, int, socket.socket]:
    """Ask for a process → the answer, its pidfd, our end of its channel."""
    here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with there:
        client.send(Fork(entry, f"{ENTRIES}:{entry}", TO_CHILD.encode(Say("hello"))), [there.fileno()])
    answer, descriptors = client.receive(60)
    assert isinstance(answer, Forked)
    return answer, descriptors[0], here


def assert_serves(client: Channel) -> None:
    _, pidfd, end = fork(client, "echo")
    end.close()
    assert select.select([pidfd], [], [], 60)[0]
    os.close(pidfd)


@pytest.mark.parametrize("garbage", [b"garbage", b"\xc1", b"\x80", b"x" * (200 << 10)], ids=["text", "byte", "map", "too long"])
def test_garbage_is_refused_and_the_next_request_is_served(client: Channel, garbage: bytes) -> None:
    client.socket.send(garbage)
    answer, _ = client.receive(60)
    assert isinstance(answer, ForkFailed) and answer.error
    assert_serves(client)


def test_a_request_without_a_channel_is_refused(client: Channel) -> None:
    client.send(Fork("a", f"{ENTRIES}:echo", b""))
    assert client.receive(60) == (ForkFailed(f"a: {ENTRIES}:echo is no entry, or it came without a channel"), [])


def test_more_descriptors_than_are_allowed_are_refused(client: Channel) -> None:
    client.send(Fork("a", f"{ENTRIES}:echo", b""), [1] * 65)
    answer, _ = client.receive(60)
    assert isinstance(answer, ForkFailed) and "more bytes or descriptors than are allowed" in answer.error
    assert_serves(client)


def test_a_client_that_reads_no_answers_holds_nobody_up(client: Channel, tmp_path: Path) -> None:
    rude = connect(tmp_path)
    rude.socket.settimeout(60)
    for _ in range(2000):  # its answers are more than its socket takes
        rude.socket.send(b"garbage")
    assert_serves(client)
    rude.close()


def test_a_client_that_hangs_up_before_its_answer_is_no_loss(client: Channel, tmp_path: Path) -> None:
    for _ in range(10):
        hasty, (here, there) = connect(tmp_path, REQUESTS), socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        hasty.send(Fork("hasty", f"{ENTRIES}:echo", TO_CHILD.encode(Say(""))), [there.fileno()])
        for end in (here, there, hasty):
            end.close()
    assert_serves(client)


def test_children_are_reaped(client: Channel, fork_server: subprocess.Popen[bytes]) -> None:
    pids = []
    for _ in range(3):
        answer, pidfd, end = fork(client, "outlive")
        pids.append(answer.pid)
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        assert select.select([pidfd], [], [], 60)[0]
        os.close(pidfd)
        end.close()
    assert_serves(client)  # a round later at the latest
    assert_serves(client)
    children = Path(f"/proc/{fork_server.pid}/task/{fork_server.pid}/children").read_text().split()
    assert not {str(pid) for pid in pids} & set(children)


def test_sigterm_ends_it_and_none_of_its_children(client: Channel, fork_server: subprocess.Popen[bytes]) -> None:
    _, pidfd, end = fork(client, "outlive")
    fork_server.terminate()
    assert fork_server.wait(60) == 0
    assert not select.select([pidfd], [], [], 0)[0]
    with pytest.raises(ChannelClosed):
        client.receive(60)
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    assert select.select([pidfd], [], [], 60)[0]
    os.close(pidfd)
    end.close()


def test_a_terminal_s_interrupt_does_not_end_it(client: Channel, fork_server: subprocess.Popen[bytes]) -> None:
    fork_server.send_signal(signal.SIGINT)
    assert_serves(client)


def test_there_is_one_to_a_lock(client: Channel, tmp_path: Path) -> None:
    second = subprocess.run(argv("fork-server", tmp_path), timeout=60, check=False, capture_output=True)
    assert (second.returncode, second.stderr) == (0, b"")
    assert_serves(client)  # it has not taken the first one's place


# --- the spare: forked before anybody asks, and what is asked for next ---


def spare_of(server: subprocess.Popen[bytes], other_than: int = 0) -> int:
    """Wait for the spare → its pid."""
    deadline = time.monotonic() + 60
    while True:
        for pid in map(int, Path(f"/proc/{server.pid}/task/{server.pid}/children").read_text().split()):
            with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has just ended
                if pid != other_than and Path(f"/proc/{pid}/comm").read_text() == "spare\n":
                    return pid
        assert time.monotonic() < deadline


def test_the_spare_becomes_what_is_asked_for_and_another_is_forked(
    client: Channel, fork_server: subprocess.Popen[bytes]
) -> None:
    for _ in range(3):
        spare = spare_of(fork_server)
        answer, pidfd, end = fork(client, "echo")
        channel = Channel(end, FROM_CHILD)
        report, _ = channel.receive(60)
        assert answer.pid == spare == report.pid == report.session
        assert report.name == "echo"
        # Nothing of the fork server's: its lock would not be given back while this process lives.
        assert not [path for path in report.descriptors.values() if "lock" in path or "eventpoll" in path]
        assert len([path for path in report.descriptors.values() if path.startswith("socket:")]) == 1
        spare_of(fork_server, other_than=spare)
        channel.close()
        assert select.select([pidfd], [], [], 60)[0]
        os.close(pidfd)


def test_a_killed_spare_is_no_loss(client: Channel, fork_server: subprocess.Popen[bytes]) -> None:
    for fault in (signal.SIGKILL, signal.SIGTERM):
        spare = spare_of(fork_server)
        os.kill(spare, fault)
        spare_of(fork_server, other_than=spare)
        assert_serves(client)


def test_many_at_once_have_one_spare_and_are_all_served(tmp_path: Path, fork_server: subprocess.Popen[bytes]) -> None:
    clients = [connect(tmp_path) for _ in range(5)]
    spare_of(fork_server)
    os.kill(fork_server.pid, signal.SIGSTOP)
    ends = []
    for client in clients:
        here, there = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with there:
            client.send(Fork("echo", f"{ENTRIES}:echo", TO_CHILD.encode(Say("hello"))), [there.fileno()])
        ends.append(Channel(here, FROM_CHILD))
    os.kill(fork_server.pid, signal.SIGCONT)
    pids = set()
    for client, end in zip(clients, ends, strict=True):
        answer, (pidfd,) = client.receive(60)
        report, _ = end.receive(60)
        assert report.pid == answer.pid
        pids.add(answer.pid)
        end.close()
        client.close()
        assert select.select([pidfd], [], [], 60)[0]
        os.close(pidfd)
    assert len(pids) == 5


def test_the_spare_ends_with_the_fork_server(fork_server: subprocess.Popen[bytes], client: Channel) -> None:
    spare = spare_of(fork_server)
    fork_server.send_signal(signal.SIGTERM)
    assert fork_server.wait(60) == 0
    assert not Path(f"/proc/{spare}").exists()  # before, and reaped: nothing is left when the daemon has ended


def test_the_spare_ends_when_the_fork_server_is_killed(fork_server: subprocess.Popen[bytes], client: Channel) -> None:
    spare = os.pidfd_open(spare_of(fork_server))
    fork_server.kill()
    assert select.select([spare], [], [], 60)[0]
    os.close(spare)
