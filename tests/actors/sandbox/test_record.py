"""What a result says, from what is known of a task."""

from __future__ import annotations

from actors.sandbox.record import CONFLICTS_MAX, NOTES_MAX, Record


def test_before_the_end_nothing_of_the_end_is_shown() -> None:
    record = Record("t", 0.0, started_at=1.0, sync="synced", gaps=3)
    record.note("a read failed")
    shown = record.present("running")
    assert (shown.state, shown.reason, shown.error, shown.sync, shown.gaps, shown.finished_at) == (
        "running",
        None,
        None,
        "none",
        0,
        None,
    )
    assert shown.started_at == "1970-01-01T00:00:01.000000Z"
    assert record.present("creating").started_at is None


def test_a_task_that_ran() -> None:
    record = Record("t", 0.0, started_at=1.0, ended_at=3.5, sync="conflict", conflicts=["a"], gaps=1)
    result = record.conclude(True, 7 << 8, 0, now=9.0)
    assert (result.state, result.reason, result.exit_code, result.duration_s) == ("stopped", "exited", 7, 2.5)
    assert (result.sync, result.conflicts, result.gaps, result.finished_at) == (
        "conflict",
        ["a"],
        1,
        "1970-01-01T00:00:03.500000Z",
    )


def test_a_task_that_never_ran_says_why_and_the_first_reason_counts() -> None:
    record = Record("t", 0.0, started_at=1.0)
    record.fail("no such command", "not_found")
    record.fail("and then this", "other")
    result = record.conclude(False, None, 0, now=2.0)
    assert (result.state, result.reason, result.error, result.failure) == ("failed", None, "no such command", "not_found")
    assert result.started_at is None and result.duration_s is None


def test_a_task_whose_end_nobody_knows_is_lost() -> None:
    result = Record("t", 0.0, started_at=1.0).conclude(True, None, 0, now=2.0)
    assert (result.state, result.reason, result.failure) == ("failed", "lost", None)


def test_notes_and_the_syncs_failure_are_told_and_bounded() -> None:
    record = Record("t", 0.0, started_at=1.0, sync="sync_failed", sync_error="no space")
    for number in range(2 * NOTES_MAX):
        record.note(f"note {number}")
        record.note(f"note {number}")
    record.conflicts = [str(number) for number in range(2 * CONFLICTS_MAX)]
    result = record.conclude(True, 0, 0, now=2.0)
    assert result.error is not None and result.error.count("note") == NOTES_MAX and result.error.endswith("no space")
    assert len(result.conflicts) == CONFLICTS_MAX
