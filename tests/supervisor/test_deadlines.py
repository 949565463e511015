"""Nobody's time is missed, and few timers are asked for, whatever is set and dropped."""

from __future__ import annotations

import heapq
import math

from hypothesis import given
from hypothesis import strategies as st

from supervisor.deadlines import Deadlines

names = st.sampled_from("abc")
steps = st.lists(
    st.one_of(
        st.tuples(st.just("set"), names, st.integers(0, 20)),
        st.tuples(st.just("extend"), names, st.integers(0, 20)),
        st.tuples(st.just("drop"), names, st.just(0)),
        st.tuples(st.just("pass"), st.just(""), st.integers(0, 8)),
    ),
    max_size=60,
)


@given(steps)
def test_each_comes_in_its_time_and_only_then(steps: list[tuple[str, str, int]]) -> None:
    """`model`: what is due when.  The timers are kept as a shell does, which can cancel none."""
    deadlines, model, timers, now = Deadlines(), dict[str, float](), list[float](), 0.0

    def wake(name: str | None) -> None:
        if (due := deadlines.wake(name)) is not None:
            heapq.heappush(timers, due)

    for what, name, value in steps:
        match what:
            case "set":
                model[name] = now + value
                deadlines.set(name, now + value)
                wake(name)
            case "extend":
                model[name] = max(model.get(name, 0.0), now + value)
                deadlines.extend(name, now + value)
                wake(name)
            case "drop":
                model.pop(name, None)
                deadlines.drop(name)
            case "pass":
                until = now + value
                while timers and timers[0] <= until:
                    now = max(now, heapq.heappop(timers))
                    due = deadlines.pop_due(now)
                    assert {name: model.pop(name) for name in due} == dict.fromkeys(due, now)
                    wake(None)
                now = until
                assert all(due > now for due in model.values())
        assert {name for name in "abc" if name in deadlines} == set(model)


def test_what_is_never_due_needs_no_timer() -> None:
    deadlines = Deadlines()
    deadlines.set("a", math.inf)
    assert "a" not in deadlines
    assert deadlines.wake() is None


def test_a_thousand_short_pauses_beside_a_long_time_need_few_timers() -> None:
    """As a child that is started again and again does: a pause, a start that has a time-out, and no more."""
    deadlines, now, timers = Deadlines(), 0.0, list[float]()
    for _ in range(1000):
        deadlines.set("a", now + 30.0)
        timers += [due] if (due := deadlines.wake("a")) is not None else []
        deadlines.drop("a")
        deadlines.set("a", now + 0.05)
        timers += [due] if (due := deadlines.wake("a")) is not None else []
        now += 0.05
        assert deadlines.pop_due(now) == ["a"]
        timers = [due for due in timers if due > now]
        assert len(timers) <= 2
