"""What an end is called, and of processes the real ones."""

from __future__ import annotations

import subprocess

import pytest

from supervisor.exits import NORMAL, STOPPED, Cause, Exit, of_code


def test_which_ends_are_good() -> None:
    assert {cause for cause in Cause if Exit(cause).good} == {Cause.NORMAL, Cause.SHUTDOWN}


@pytest.mark.parametrize(
    ("script", "exit"),
    [
        ("exit 0", Exit(Cause.NORMAL, "exit code 0")),
        ("exit 3", Exit(Cause.CRASH, "exit code 3")),
        ("exit 139", Exit(Cause.CRASH, "exit code 139")),  # what a shell would call a segmentation fault
        ("kill -9 $$", Exit(Cause.KILLED, "killed by signal 9")),
        ("kill -11 $$", Exit(Cause.KILLED, "killed by signal 11")),
    ],
)
def test_the_end_of_a_process(script: str, exit: Exit) -> None:
    assert of_code(subprocess.run(["/bin/sh", "-c", script], check=False).returncode) == exit


def test_an_end_that_nobody_can_know_is_no_good_one() -> None:
    assert not of_code(None).good


def test_an_end_has_a_text() -> None:
    assert [str(exit) for exit in (NORMAL, STOPPED, Exit(Cause.HUNG))] == ["normal", "stopped", "hung"]
