"""How a task's end is called, and how one is made to end."""

from __future__ import annotations

import itertools
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from actors.sandbox import ending
from actors.sandbox.ending import LADDER, Cause, Ending, Step, conclude, ladder, may_ignore_sigterm

KILLED, SEGFAULT, SYSCALL, TERMINATED = int(signal.SIGKILL), int(signal.SIGSEGV), int(signal.SIGSYS), int(signal.SIGTERM)
CORE_DUMPED = 0x80


def exited(code: int) -> int:
    return code << 8


@pytest.mark.parametrize(
    ("status", "stop_cause", "oom_kills", "expected"),
    [
        (exited(0), None, 0, ("exited", 0, None)),
        (exited(3), None, 0, ("exited", 3, None)),
        (exited(139), None, 0, ("exited", 139, None)),
        (exited(255), None, 0, ("exited", 255, None)),
        (SEGFAULT, None, 0, ("signalled", None, 11)),
        (SEGFAULT | CORE_DUMPED, None, 0, ("signalled", None, 11)),
        (KILLED, None, 0, ("signalled", None, 9)),
        (KILLED, None, 1, ("oom", None, 9)),
        (exited(1), None, 1, ("oom", 1, None)),
        (exited(137), None, 3, ("oom", 137, None)),
        (exited(0), None, 3, ("exited", 0, None)),
        (KILLED, "cancelled", 0, ("cancelled", None, 9)),
        (TERMINATED, "timeout", 0, ("timeout", None, 15)),
        (exited(0), "cancelled", 0, ("cancelled", 0, None)),
        (KILLED, "timeout", 1, ("timeout", None, 9)),
        (None, "cancelled", 0, ("cancelled", None, None)),
    ],
)
def test_a_task_that_ran(
    status: int | None, stop_cause: Cause | None, oom_kills: int, expected: tuple[str, int | None, int | None]
) -> None:
    end = conclude(ran=True, status=status, stop_cause=stop_cause, oom_kills=oom_kills)
    assert (end.state, end.reason, end.exit_code, end.signal) == ("stopped", *expected)


def test_nobody_can_know() -> None:
    assert conclude(ran=True, status=None, stop_cause=None, oom_kills=0) == Ending("failed", "lost", error=ending.LOST)
    assert conclude(ran=True, status=None, stop_cause=None, oom_kills=0, error="why").error == "why"


def test_a_task_that_never_ran() -> None:
    assert conclude(ran=False, status=None, stop_cause=None, oom_kills=0, error="why") == Ending("failed", None, error="why")
    assert conclude(ran=False, status=None, stop_cause="cancelled", oom_kills=0) == Ending(
        "failed", None, error=ending.NEVER_RAN
    )
    # the status is that of a container whose command was never started
    assert conclude(ran=False, status=KILLED, stop_cause=None, oom_kills=0, error="why").exit_code is None


@pytest.mark.parametrize(
    ("status", "stop_cause", "oom_kills", "words"),
    [
        (exited(0), None, 0, None),
        (exited(1), None, 0, None),
        (SEGFAULT, None, 0, None),
        (exited(0), "cancelled", 0, None),
        (SYSCALL, None, 0, "system call"),
        (KILLED, "timeout", 0, "--timeout"),
        (KILLED, None, 1, "OOM killer ended it: give it a higher limit with --memory"),
        (exited(1), None, 1, "OOM killer ended a process of its"),
        (None, "timeout", 0, "exit code is not known"),
    ],
)
def test_what_went_wrong_and_what_to_do(
    status: int | None, stop_cause: Cause | None, oom_kills: int, words: str | None
) -> None:
    error = conclude(ran=True, status=status, stop_cause=stop_cause, oom_kills=oom_kills).error
    assert error is None if words is None else error is not None and words in error


def test_errors_are_joined() -> None:
    error = conclude(ran=True, status=KILLED, stop_cause="timeout", oom_kills=0, error="a read failed").error
    assert error == f"{ending.TIMED_OUT}; a read failed"


def test_every_end_has_either_a_code_or_a_signal() -> None:
    causes: tuple[Cause | None, ...] = (None, "cancelled", "timeout")
    for status, cause, oom_kills in itertools.product(
        [exited(code) for code in range(256)] + list(range(1, 65)), causes, (0, 1)
    ):
        end = conclude(ran=True, status=status, stop_cause=cause, oom_kills=oom_kills)
        assert (end.exit_code is None) != (end.signal is None)
        assert (end.reason in ("cancelled", "timeout")) == (cause is not None)


# --- the ladder ---


def status_text(caught: int, blocked: int = 0, ignored: int = 0) -> str:
    return f"Name:\tSigCgt: x\nSigPnd:\t{0:016x}\nSigBlk:\t{blocked:016x}\nSigIgn:\t{ignored:016x}\nSigCgt:\t{caught:016x}\n"


TERM_BIT = 1 << 14


@pytest.mark.parametrize(
    ("caught", "blocked", "ignored", "dropped"),
    [
        (0, 0, 0, True),
        (TERM_BIT, 0, 0, False),
        (0, TERM_BIT, 0, False),  # waits for it with sigwait or signalfd
        (0, 0, TERM_BIT, True),
        (~TERM_BIT & (1 << 64) - 1, 0, 0, True),
        ((1 << 64) - 1, 0, 0, False),
    ],
)
def test_who_hears_sigterm(caught: int, blocked: int, ignored: int, dropped: bool) -> None:
    assert may_ignore_sigterm(status_text(caught, blocked, ignored)) is dropped


@pytest.mark.parametrize(
    ("script", "dropped"),
    [
        ("", True),
        ("signal.signal(signal.SIGTERM, print)", False),
        ("signal.signal(signal.SIGTERM, signal.SIG_IGN)", True),
        ("signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])", False),
    ],
)
def test_real_processes(script: str, dropped: bool) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", f"import signal; {script}; print(flush=True); input()"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout
    process.stdout.readline()
    text = Path(f"/proc/{process.pid}/status").read_text()
    process.communicate(b"\n", timeout=60)
    assert may_ignore_sigterm(text) is dropped


def test_the_ladder_is_whole_and_ends_with_a_kill() -> None:
    assert set(LADDER) == set(itertools.product((True, False), repeat=2))
    assert all(steps[-1] is Step.KILL for steps in LADDER.values())


@pytest.mark.parametrize(
    ("force", "caught", "others", "steps"),
    [
        (True, TERM_BIT, True, [Step.KILL]),
        (True, 0, False, [Step.KILL]),
        (False, 0, False, [Step.KILL]),
        (False, TERM_BIT, False, [Step.TERMINATE, Step.WAIT, Step.KILL]),
        (False, 0, True, [Step.TERMINATE, Step.WAIT, Step.KILL]),
        (False, TERM_BIT, True, [Step.TERMINATE, Step.WAIT, Step.KILL]),
    ],
)
def test_ladder(force: bool, caught: int, others: bool, steps: list[Step]) -> None:
    assert list(ladder(force, status_text(caught), others)) == steps
