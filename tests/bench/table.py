"""The rows of the bench's one table."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from tabulate import tabulate


@dataclass(frozen=True)
class Row:
    """`ratio`: ours over the floor's, or over the bound where there is no floor.  `met`: None where nothing is asked for."""

    work: str
    floor: str
    ours: str
    ratio: float
    goal: str
    met: bool | None


def at_most(work: str, ours: float, floor: float, goal: float, unit: str = "ms") -> Row:
    """A figure that must not be more than `goal` times the floor's."""
    ratio = ours / floor
    return Row(work, shown(floor, unit), shown(ours, unit), ratio, f"at most {goal:g} x", ratio <= goal)


def at_least(work: str, ours: float, floor: float, goal: float, unit: str) -> Row:
    """A rate that must be at least `goal` times the floor's."""
    ratio = ours / floor
    return Row(work, shown(floor, unit), shown(ours, unit), ratio, f"at least {goal:g} x", ratio >= goal)


def as_fast(work: str, ours_ms: float, floor_ms: float, goal: float | None) -> Row:
    """A time, as a speed: the ratio is the floor's time over ours, and at least `goal`; None asks for nothing."""
    ratio = floor_ms / ours_ms
    met = None if goal is None else ratio >= goal
    return Row(work, shown(floor_ms), shown(ours_ms), ratio, "" if goal is None else f"{goal:g} x as fast", met)


def within(work: str, ours: float, bound: float, unit: str) -> Row:
    """A figure without a floor, and the most that it may be."""
    return Row(work, "", shown(ours, unit), ours / bound, f"at most {bound:g} {unit}", ours <= bound)


def shown(value: float, unit: str = "ms") -> str:
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 or unit != "ms" else 2
    return f"{value:.{digits}f}{unit if unit.startswith('/') else ' ' + unit}"


def percentile(values: Sequence[float], part: float) -> float:
    return sorted(values)[min(len(values) - 1, int(len(values) * part))]


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def table(rows: Sequence[Row]) -> str:
    met = {True: "yes", False: "NO", None: "-"}
    return tabulate(
        [(row.work, row.floor, row.ours, f"{row.ratio:.2f}", row.goal, met[row.met]) for row in rows],
        headers=["work", "floor", "ours", "ratio", "goal", "met"],
        disable_numparse=True,
    )


def as_json(rows: Sequence[Row]) -> str:
    return json.dumps([asdict(row) for row in rows], indent=2)
