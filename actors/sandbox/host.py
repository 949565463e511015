"""What sandboxes need of this host, found once: runtimes, control groups, the system call filter."""

from __future__ import annotations

import hashlib
import resource
import threading
from pathlib import Path

from actors.layout import Layout
from actors.sandbox import bundle, cgroup, seccomp
from actors.sandbox.attempt import Attempt
from actors.sandbox.runtimes import Runtime, find

FILTER = Path(__file__).resolve().parents[2] / "conf" / "seccomp.json"


class SandboxHost:
    """Thread-safe.  Raises RuntimeMissing when a runtime is asked for that is not on the host, SeccompError for a broken filter."""

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._runtimes: dict[str, Runtime] = {}
        self._lock = threading.Lock()
        self._hierarchies = cgroup.mounted()
        section = seccomp.load(FILTER)
        self._filter = bundle.Filter(section, seccomp.compile_filter(section))
        # What is inherited can always be lowered, the one, and raised, the other; for more this process need not have the right.
        self.files_max = min(resource.getrlimit(resource.RLIMIT_NOFILE)[1], bundle.FILES_MAX)
        self.oom_score_adj = int(Path("/proc/self/oom_score_adj").read_text())
        # Daemons that live side by side have groups of their own.
        self._parent = f"/aerie-{hashlib.sha256(str(layout.state).encode()).hexdigest()[:8]}"

    def attempt(self, task: str, number: int, runtime: str) -> Attempt:
        group = cgroup.Cgroup(f"{self._parent}/{task}.{number}", self._hierarchies)
        return Attempt(self._layout.task(task), number, self.runtime(runtime), group)

    def runtime(self, name: str) -> Runtime:
        with self._lock:
            if name not in self._runtimes:
                self._runtimes[name] = find(name, self._layout.runtimes / name)
            return self._runtimes[name]

    @property
    def filter(self) -> bundle.Filter:
        return self._filter

    def groups(self) -> set[str]:
        """The containers that have a control group, by their ids."""
        places = [directory for directory in cgroup.Cgroup(self._parent, self._hierarchies).directories if directory.is_dir()]
        return {group.name for place in places for group in place.iterdir() if group.is_dir()}
