"""Standing orders: the same in the keeper and in the root supervisor, each with the process that is under it just now.

Both may start a process under an order at the same time, and learn of each other's later.  Which of two is the one, both decide by
the same rule, and so agree: a living one before a dead one; of two that live the root supervisor's.  The other one is killed.
"""

from __future__ import annotations

import os
import signal
from dataclasses import dataclass

from supervisor.keeping import StandingOrder
from supervisor.pidfd import has_ended, same_process, signal_process


@dataclass(frozen=True, slots=True, eq=False)
class Standing:
    """A process under a standing order; both descriptors are this object's."""

    order: StandingOrder
    pidfd: int
    channel: int

    @property
    def ended(self) -> bool:
        return has_ended(self.pidfd)

    def close(self) -> None:
        os.close(self.pidfd)
        os.close(self.channel)

    def end(self) -> None:
        """Kill the process, and close.  Closed alone, it would go on in nobody's care, and hold what another one is to have."""
        signal_process(self.pidfd, signal.SIGKILL)
        self.close()


class Orders:
    """Orders by name.  `ours_first`: of two living processes the one that is here already is kept, and not the newcomer."""

    def __init__(self, ours_first: bool) -> None:
        self._ours_first = ours_first
        self._standing: dict[str, Standing] = {}

    def get(self, name: str) -> Standing | None:
        return self._standing.get(name)

    def names(self) -> list[str]:
        return sorted(self._standing.copy())

    def put(self, name: str, newcomer: Standing) -> bool:
        """Take the newcomer, unless another one is the one → whether it was taken.  The one that is not is closed, and killed."""
        present = self._standing.get(name)
        if present is not None:
            if same_process(present.pidfd, newcomer.pidfd):
                newcomer.close()
                return False
            if not present.ended and (self._ours_first or newcomer.ended):
                newcomer.end()
                return False
            present.end()
        self._standing[name] = newcomer
        return True

    def dismiss(self, name: str) -> None:
        """Forget the order, and end its process."""
        standing = self._standing.pop(name, None)
        if standing is not None:
            standing.end()
