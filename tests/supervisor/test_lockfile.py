"""One holder at a time, known by its pid, and none as soon as it has ended."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from supervisor.lockfile import LockFile, Sign, evict, holder_of, sign_of, take_place


def test_nobody_holds_a_new_lock(tmp_path: Path) -> None:
    assert holder_of(tmp_path / "lock") == 0


def test_the_holder_is_known_and_a_second_one_refused(tmp_path: Path) -> None:
    first, second = LockFile(tmp_path / "lock"), LockFile(tmp_path / "lock")
    assert first.acquire()
    assert holder_of(tmp_path / "lock") == os.getpid()
    assert not second.acquire()
    first.close()
    assert holder_of(tmp_path / "lock") == 0
    assert second.acquire()
    second.close()


def test_a_killed_holder_holds_nothing(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        LockFile(tmp_path / "lock").acquire()
        os.write(writer, b".")
        signal.pause()
    os.read(reader, 1)
    assert holder_of(tmp_path / "lock") == pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    assert holder_of(tmp_path / "lock") == 0
    os.close(reader)
    os.close(writer)


def test_a_holder_that_hangs_is_evicted(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        LockFile(tmp_path / "lock").acquire()
        os.write(writer, b".")
        os.kill(os.getpid(), signal.SIGSTOP)
    os.read(reader, 1)
    evict(tmp_path / "lock")
    assert holder_of(tmp_path / "lock") == 0
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    evict(tmp_path / "lock")  # nobody holds it: nothing to do
    os.close(reader)
    os.close(writer)


def test_beats_are_seen_by_any_number_of_watchers(tmp_path: Path) -> None:
    assert sign_of(tmp_path / "lock") == Sign(0, 0)
    lock = LockFile(tmp_path / "lock")
    lock.acquire()
    assert [sign_of(tmp_path / "lock") for _ in range(2)] == [Sign(os.getpid(), 0)] * 2
    for _ in range(12):
        lock.beat()
    assert [sign_of(tmp_path / "lock") for _ in range(2)] == [Sign(os.getpid(), 12)] * 2
    assert holder_of(tmp_path / "lock") == os.getpid()
    lock.close()
    again = LockFile(tmp_path / "lock")
    again.acquire()
    assert sign_of(tmp_path / "lock") == Sign(os.getpid(), 0)  # nothing is left of the earlier holder's
    again.close()


def test_the_newest_takes_the_place_of_whoever_holds_it(tmp_path: Path) -> None:
    holders = []
    for _ in range(3):
        reader, writer = os.pipe()
        pid = os.fork()
        if pid == 0:
            take_place(tmp_path / "lock")
            os.write(writer, b".")
            os.kill(os.getpid(), signal.SIGSTOP)
        os.read(reader, 1)
        assert holder_of(tmp_path / "lock") == pid
        for earlier in holders:
            assert os.waitstatus_to_exitcode(os.waitpid(earlier, 0)[1]) == -signal.SIGKILL
        holders = [pid]
        os.close(reader)
        os.close(writer)
    take_place(tmp_path / "lock").close()
    assert os.waitstatus_to_exitcode(os.waitpid(holders[0], 0)[1]) == -signal.SIGKILL


def test_a_lock_that_somebody_only_looks_at_can_be_taken(tmp_path: Path) -> None:
    path, lookers = tmp_path / "lock", []
    for _ in range(3):
        pid = os.fork()
        if pid == 0:
            while True:
                holder_of(path)
        lookers.append(pid)
    try:
        for _ in range(1000):
            lock, other = LockFile(path), LockFile(path)
            assert lock.acquire()
            assert not other.acquire()
            other.close()
            lock.close()
    finally:
        for looker in lookers:
            os.kill(looker, signal.SIGKILL)
            os.waitpid(looker, 0)
