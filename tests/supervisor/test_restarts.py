"""Intensity and backoff, against models that are too slow and too simple to be wrong."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from supervisor.restarts import Backoff, Window, exponential

# Whole numbers, so that a moment lies exactly on the edge of a period often.
gaps = st.lists(st.integers(0, 12), max_size=60)


@given(gaps, st.integers(0, 6), st.integers(1, 20))
def test_a_window_counts_what_lies_in_its_period(gaps: list[int], intensity: int, period_s: int) -> None:
    window, now, all_restarts = Window(intensity, period_s), 0, []
    for gap in gaps:
        now += gap
        all_restarts.append(now)
        window, too_many = window.add(now)
        in_period = [moment for moment in all_restarts if now - moment <= period_s]  # as in OTP the edge counts
        assert too_many == (len(in_period) > intensity)
        assert list(window.restarts) == in_period  # and nothing older is kept


@given(gaps)
def test_an_intensity_of_nought_allows_no_restart(gaps: list[int]) -> None:
    assert Window(0, 5).add(sum(gaps))[1]


def test_a_window_is_a_value() -> None:
    window = Window(1, 5)
    window.add(1.0)
    assert window == Window(1, 5)


lives = st.lists(st.tuples(st.integers(0, 20), st.integers(0, 10)), max_size=40)


@given(st.lists(st.floats(0, 10), min_size=1, max_size=6), st.integers(1, 10), lives)
def test_pauses_are_taken_in_turn_the_last_one_again_and_again(
    pauses_s: list[float], reset_s: int, lives: list[tuple[int, int]]
) -> None:
    """`lives`: how long each incarnation lived, and how long after its end the next one was started."""
    backoff, now, in_a_row = Backoff(pauses_s, reset_s), 0, 0
    for lived_s, between_s in lives:
        backoff = backoff.started(now)
        now += lived_s
        if lived_s > reset_s:
            in_a_row = 0
        backoff, pause_s = backoff.ended(now)
        assert pause_s == (pauses_s + [pauses_s[-1]] * len(lives))[in_a_row]
        in_a_row += 1
        now += between_s


@given(st.floats(0.01, 1), st.floats(1, 100), st.floats(1.5, 4))
def test_exponential_pauses_grow_up_to_their_bound(first_s: float, max_s: float, factor: float) -> None:
    none, *pauses_s = exponential(first_s, max_s, factor)
    assert (none, pauses_s[0], pauses_s[-1]) == (0.0, first_s, max_s)
    for shorter_s, longer_s in itertools.pairwise(pauses_s):
        assert longer_s == min(shorter_s * factor, max_s)


@given(st.floats(0, 1), st.floats(0, 1))
def test_jitter_makes_a_pause_longer_and_never_shorter(jitter: float, chance: float) -> None:
    _, pause_s = Backoff((2.0,), 10.0, jitter=jitter).ended(0.0, chance)
    assert 2.0 <= pause_s <= 2.0 * (1 + jitter)
    assert pause_s == 2.0 * (1 + jitter * chance)
