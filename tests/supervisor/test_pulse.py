"""When a process is taken for hung: signs and moments in, signals out."""

from __future__ import annotations

import signal
from functools import partial
from operator import lt

import pytest

from supervisor.lockfile import Sign
from supervisor.pulse import BEGIN_S, DISK_S, DUMP_S, LATE_S, LOOK_S, SILENCE_S, Pulse

PID = 7


def watch(pulse: Pulse, beats_until_s: float, until_s: float) -> list[tuple[float, int]]:
    """Look every LOOK_S while it beats every half second until `beats_until_s` → what was to be sent, and when."""
    found = []
    for number in range(int(until_s / LOOK_S) + 1):
        moment = number * LOOK_S
        sent = pulse.look(Sign(PID, 1 + int(2 * min(moment, beats_until_s))), moment)
        if sent is not None:
            found.append((moment, int(sent)))
    return found


def test_who_beats_is_let_live() -> None:
    assert watch(Pulse(PID, 0.0), 1000, 1000) == []


def test_who_is_silent_is_told_to_say_where_it_is_and_then_killed() -> None:
    (aborted_s, first), (killed_s, second) = watch(Pulse(PID, 0.0), 10, 16)[:2]
    assert (first, second) == (signal.SIGABRT, signal.SIGKILL)
    assert 10 + SILENCE_S <= aborted_s <= 10 + SILENCE_S + 3 * LOOK_S
    assert DUMP_S <= killed_s - aborted_s <= 2 * LOOK_S


def test_within_five_seconds_it_is_over() -> None:
    assert watch(Pulse(PID, 0.0), 10, 15)[-1][1] == signal.SIGKILL


def test_a_beat_at_the_last_moment_counts() -> None:
    pulse = Pulse(PID, 0.0)
    assert watch(pulse, 0, SILENCE_S) == []
    assert pulse.look(Sign(PID, 2), SILENCE_S + LOOK_S) is None
    assert pulse.look(Sign(PID, 2), SILENCE_S + 2 * LOOK_S) is None


@pytest.mark.parametrize("sign", [Sign(0, 0), Sign(PID, 0), Sign(6, 1000)])
def test_who_has_not_beaten_once_has_more_time(sign: Sign) -> None:
    """Nobody has the lock yet, or it has and only begins, or there is still what an earlier holder wrote."""
    pulse = Pulse(PID, 0.0)
    moments = [number * LOOK_S for number in range(int((BEGIN_S + 2) / LOOK_S))]
    found = [moment for moment in moments if pulse.look(sign, moment) == signal.SIGABRT]
    assert BEGIN_S <= found[0] <= BEGIN_S + 3 * LOOK_S


def test_who_is_stopped_has_no_more_time_to_begin_than_others_to_beat() -> None:
    pulse = Pulse(PID, 0.0)
    moments = [number * LOOK_S for number in range(int((SILENCE_S + 2) / LOOK_S))]
    found = [moment for moment in moments if pulse.look(Sign(PID, 0), moment, stopped=True) == signal.SIGABRT]
    assert SILENCE_S <= found[0] <= SILENCE_S + 3 * LOOK_S


def test_who_was_stopped_for_a_moment_goes_on_beginning() -> None:
    pulse = Pulse(PID, 0.0)
    moments = [number * LOOK_S for number in range(int(BEGIN_S / LOOK_S))]
    assert not any(pulse.look(Sign(PID, 0), moment, stopped=int(moment / LOOK_S) % 5 == 0) for moment in moments)


def test_who_waits_for_a_disk_has_time_but_not_for_ever() -> None:
    def first_sent_s(disk_until_s: float) -> float:
        pulse, moments = Pulse(PID, 0.0), [number * LOOK_S for number in range(int(2 * DISK_S / LOOK_S))]
        return next(now for now in moments if pulse.look(Sign(PID, 1), now, waits_for_disk=partial(lt, now, disk_until_s)))

    assert 20 <= first_sent_s(20) <= 20 + SILENCE_S + 3 * LOOK_S
    assert DISK_S <= first_sent_s(1000) <= DISK_S + 3 * SILENCE_S


@pytest.mark.parametrize("slept_s", [LATE_S + LOOK_S, 100.0])
def test_who_did_not_look_for_long_begins_to_count_anew(slept_s: float) -> None:
    """The machine was suspended, or the one who looks was stopped."""
    pulse = Pulse(PID, 0.0)
    assert pulse.look(Sign(PID, 1), LOOK_S) is None
    assert pulse.look(Sign(PID, 1), slept_s + LOOK_S) is None
    assert pulse.look(Sign(PID, 1), slept_s + 2 * LOOK_S) is None
    assert pulse.look(Sign(PID, 1), slept_s + 3 * LOOK_S) is None
