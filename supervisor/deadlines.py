"""When something has to happen next: pure.  A shell that has timers needs few, and cancels none."""

from __future__ import annotations

import math


class Deadlines:
    """One moment for each name.  `wake` says when to look (`pop_due`); looking too often does no harm."""

    def __init__(self) -> None:
        self._due_s: dict[str, float] = {}
        self._wakes_s: set[float] = set()  # that were asked for, and have not come yet

    def __contains__(self, name: str) -> bool:
        return name in self._due_s

    def set(self, name: str, due_s: float) -> None:
        if due_s < math.inf:
            self._due_s[name] = due_s

    def extend(self, name: str, due_s: float) -> None:
        """Not before `due_s`."""
        self.set(name, max(due_s, self._due_s.get(name, due_s)))

    def drop(self, name: str) -> None:
        self._due_s.pop(name, None)

    def pop_due(self, now_s: float) -> list[str]:
        """Those whose time has come.  `now_s` is at least the wake that led here."""
        self._wakes_s = {wake_s for wake_s in self._wakes_s if wake_s > now_s}
        due = [name for name, due_s in self._due_s.items() if due_s <= now_s]
        for name in due:
            del self._due_s[name]
        return due

    def wake(self, name: str | None = None) -> float | None:
        """When to look next, for `name` or for any; None when it was said already that one will look by then."""
        wanted_s = min(self._due_s.values(), default=math.inf) if name is None else self._due_s.get(name, math.inf)
        if wanted_s == math.inf or min(self._wakes_s, default=math.inf) <= wanted_s:
            return None
        self._wakes_s.add(wanted_s)
        return wanted_s
