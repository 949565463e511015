"""Processes that a keeper starts and finds."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from supervisor.lockfile import holder_of, sign_of
from supervisor.parts import BACKOFF_S, Part, how
from supervisor.pidfd import is_stopped
from supervisor.pulse import BEGIN_S, LOOK_S, SILENCE_S

HOLDS_LOCK = (
    "import sys, time; from pathlib import Path; from supervisor.lockfile import LockFile\n"
    "LockFile(Path(sys.argv[1])).acquire(); print('held', flush=True); time.sleep(60)"
)


def wait_for(part: Part) -> None:
    assert select.select([part.pidfd], [], [], 60)[0]


def test_a_part_that_ends_at_once_is_due_after_longer_and_longer_pauses(tmp_path: Path) -> None:
    part = Part("part", tmp_path / "lock", ["/bin/sh", "-c", "exit 7"])
    for number in range(len(BACKOFF_S) + 2):
        assert part.start() is False
        assert part.restarts == number
        wait_for(part)
        before = time.monotonic()
        assert part.ended() == 7
        pause_s = BACKOFF_S[min(number, len(BACKOFF_S) - 1)]
        assert before + pause_s <= part.due_s <= time.monotonic() + pause_s
        assert (part.running, part.pid) == (False, 0)


def test_a_part_that_cannot_be_started_is_due_again(tmp_path: Path) -> None:
    part = Part("part", tmp_path / "lock", [str(tmp_path / "none")])
    for pause_s in BACKOFF_S[:3]:
        before = time.monotonic()
        with pytest.raises(FileNotFoundError):
            part.start()
        assert before + pause_s <= part.due_s <= time.monotonic() + pause_s
        assert (part.running, part.restarts) == (False, -1)


def test_a_part_that_runs_already_is_found_by_its_lock(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    other = subprocess.Popen([sys.executable, "-c", HOLDS_LOCK, str(lock)], stdout=subprocess.PIPE)
    assert other.stdout is not None
    assert other.stdout.readline() == b"held\n"
    part = Part("part", lock, ["/bin/false"])
    assert part.start() is True
    assert part.pid == other.pid == holder_of(lock)
    part.signal(signal.SIGKILL)
    wait_for(part)
    assert part.ended() == -signal.SIGKILL
    other.stdout.close()
    other.returncode = -signal.SIGKILL  # reaped by `ended`, being a child of this process


def test_how_somebody_else_s_child_has_ended_is_known(tmp_path: Path) -> None:
    """It was started by a keeper that is dead, and is reaped by who adopted it."""
    lock = tmp_path / "lock"
    parent = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import subprocess, sys; subprocess.run([sys.executable, '-c', *sys.argv[1:]])",
            HOLDS_LOCK,
            str(lock),
        ],
        stdout=subprocess.PIPE,
    )
    assert parent.stdout is not None
    assert parent.stdout.readline() == b"held\n"
    part = Part("part", lock, ["/bin/false"])
    assert part.start() is True
    part.signal(signal.SIGTERM)
    wait_for(part)
    parent.communicate(timeout=60)
    assert part.ended() in (-signal.SIGTERM, None)  # None: before Linux 6.15


@pytest.mark.parametrize(("ignore", "code"), [("", -signal.SIGTERM), ("trap '' TERM;", -signal.SIGKILL)])
def test_a_part_is_stopped_and_killed_when_that_takes_too_long(tmp_path: Path, ignore: str, code: int) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    part = Part("part", tmp_path / "lock", ["/bin/sh", "-c", f"{ignore} echo ready > {fifo}; exec sleep 60"])
    part.start()
    assert fifo.read_text() == "ready\n"
    assert part.stop(0.1) == code
    assert not part.running


def test_how_it_ended_is_said_in_words() -> None:
    assert [how(code) for code in (0, 3, -9, None)] == ["exit code 0", "exit code 3", "killed by signal 9", "how is not known"]


def test_a_part_that_somebody_stops_before_its_first_beat_hangs(tmp_path: Path) -> None:
    """It is not given the time that one may take to begin on a busy machine."""
    part = Part("part", tmp_path / "lock", ["/bin/sh", "-c", "kill -STOP $$; exec sleep 60"])
    began_s = time.monotonic()  # from then on it has not beaten, however long it takes until it is stopped
    part.start()
    try:
        deadline = time.monotonic() + 60
        while not is_stopped(part.pidfd):
            assert time.monotonic() < deadline
        moments_s = [number * LOOK_S for number in range(int(5 / LOOK_S))]
        assert next(second for second in moments_s if part.look(began_s + second)) >= SILENCE_S
    finally:
        part.signal(signal.SIGKILL)
        wait_for(part)
        assert part.ended() == -signal.SIGKILL


def test_a_part_whose_lock_somebody_has_deleted_does_not_hang_for_that(tmp_path: Path) -> None:
    lock = tmp_path / "lock"
    part = Part("part", lock, [sys.executable, "-c", HOLDS_LOCK, str(lock)])
    part.start()
    try:
        deadline = time.monotonic() + 60
        while sign_of(lock).pid != part.pid:
            assert time.monotonic() < deadline
            time.sleep(0.01)
        assert not part.look(time.monotonic())
        lock.unlink()
        began_s = time.monotonic()
        assert not any(part.look(began_s + second) for second in range(int(2 * BEGIN_S)))
    finally:
        part.signal(signal.SIGKILL)
        wait_for(part)
        part.ended()
