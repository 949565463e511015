"""A container's control group, on whatever a host has: cgroup v2, v1, or both.

Where each hierarchy is mounted is read from the mount table, never assumed.  A *hybrid* host has v1 controllers, a named
hierarchy (systemd's) and a v2 tree without controllers: the runtimes put a container into all of them, v2's `cgroup.kill` works
there, and limits and counters are v1's.  A container is gone only when it is empty in every hierarchy.

Nothing on PyPI fits: cgroupspy and cgroups know v1 alone, others want to be asked for limits, which are the runtime's here.

Formats: mountinfo from proc_pid_mountinfo(5), cgroup from cgroups(7), v1 from the kernel's cgroup-v1/{cgroups,memory}.rst, v2
from cgroup-v2.rst.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import select
import signal
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from supervisor.pidfd import has_ended, open_pidfd, signal_process

ROOT: Final = Path("/sys/fs/cgroup")  # where crun, runc and runsc look, and nowhere else
NEEDED: Final = ("memory", "cpu", "pids")


@dataclass(frozen=True)
class Hierarchy:
    """A mounted tree of groups.  `controllers` of v1 only: v2 has them by group."""

    root: Path
    unified: bool
    controllers: tuple[str, ...] = ()


def hierarchies(mountinfo: str) -> tuple[Hierarchy, ...]:
    """The hierarchies at or below ROOT, from the text of /proc/self/mountinfo, each once."""
    found: dict[Path, Hierarchy] = {}
    for line in mountinfo.splitlines():
        before, _, after = line.partition(" - ")
        place = Path(before.split(" ")[4])
        kind, _, super_options = after.split(" ", 2)
        if kind in ("cgroup", "cgroup2") and (place == ROOT or ROOT in place.parents):
            # A v1 hierarchy's controllers are among its options: rw,cpu,cpuacct; or rw,name=systemd.
            named = tuple(option for option in super_options.split(",") if option not in ("rw", "ro"))
            found[place] = Hierarchy(place, kind == "cgroup2", () if kind == "cgroup2" else named)
    return tuple(found.values())


def mounted() -> tuple[Hierarchy, ...]:
    """The hierarchies of this host."""
    return hierarchies(Path("/proc/self/mountinfo").read_text())


def faults(
    found: Sequence[Hierarchy], self_cgroup: str, unified_controllers: str, plain_directories: Sequence[str]
) -> list[str]:
    """What of the host's control groups would make containers fail, each with its cure; empty when all is well.

    `self_cgroup`: the text of /proc/self/cgroup.  `unified_controllers`: of cgroup.controllers at the root of the v2 hierarchy.
    `plain_directories`: directories in ROOT in which nothing is mounted.
    """
    v1 = {name for hierarchy in found if not hierarchy.unified for name in hierarchy.controllers}
    v2 = set(unified_controllers.split())
    if not found:
        return [f"no control groups are mounted at {ROOT}: mount -t cgroup2 cgroup2 {ROOT}"]
    texts = []
    if v1:
        for name in sorted(v2):
            # crun: "cgroups in hybrid mode not supported, drop all controllers from cgroupv2"
            texts.append(
                f"the controller {name} is cgroup v2's while others are v1's, with which crun creates no container: "
                f"mkdir -p {ROOT}/{name} && mount -t cgroup -o {name} cgroup {ROOT}/{name}"
            )
        for line in self_cgroup.splitlines():
            name = line.split(":", 2)[1].removeprefix("name=")
            if name in plain_directories:
                # crun makes its directories in there, and cannot remove them again
                texts.append(
                    f"{ROOT}/{name} is a plain directory, and would be taken for the hierarchy {name}: rmdir {ROOT}/{name}"
                )
    for name in NEEDED:
        if name not in v1 | v2:
            texts.append(f"the control group controller {name} is missing: boot without cgroup_disable={name}")
    return texts


def host_faults() -> list[str]:
    """`faults` of this host."""
    found = mounted()
    places = {hierarchy.root for hierarchy in found}
    unified = next((hierarchy.root for hierarchy in found if hierarchy.unified), None)
    controllers = "" if unified is None else (unified / "cgroup.controllers").read_text()
    plain = [entry.name for entry in ROOT.iterdir() if entry.is_dir() and entry not in places] if ROOT not in places else []
    return faults(found, Path("/proc/self/cgroup").read_text(), controllers, plain)


@functools.cache
def _own_procs() -> Path | None:
    """The file through which this process moves to where it is already, in the v2 hierarchy; None where there is none.

    Looked for once: nobody moves the daemon while it runs, and if somebody did, only time would be lost.
    """
    for hierarchy in mounted():
        if hierarchy.unified:
            own = next(line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines() if line.startswith("0::"))
            return hierarchy.root / own.lstrip("/") / "cgroup.procs"
    return None


def expect_moves() -> None:
    """Make the kernel ready to move a process into a group; takes some milliseconds, and nothing changes.

    The first such move after a while waits for an RCU grace period (cgroup_threadgroup_rwsem is made for many readers): 8 ms of
    the 18 of a `crun create`, measured; those in the next 15 ms find it done.  To move this process where it is already does
    the waiting, while the monitor and the runtime are still being started.
    """
    procs = _own_procs()
    if procs is not None:
        # Only time is lost where this is refused: a v2 group between others may take no process, not even its own.
        with contextlib.suppress(OSError):
            procs.write_text("0")


class Cgroup:
    """The group at `path` (as in `linux.cgroupsPath`) in every hierarchy.  One that is not there is empty."""

    def __init__(self, path: str, found: Sequence[Hierarchy] | None = None) -> None:
        self.path = path
        self._hierarchies = mounted() if found is None else found

    @functools.cached_property
    def directories(self) -> list[Path]:
        return [hierarchy.root / self.path.lstrip("/") for hierarchy in self._hierarchies]

    @functools.cached_property
    def _accounts(self) -> list[Path]:
        """Where its memory is counted."""
        return [
            directory
            for hierarchy, directory in zip(self._hierarchies, self.directories, strict=True)
            if hierarchy.unified or "memory" in hierarchy.controllers
        ]

    def processes(self) -> set[int]:
        """The pids in the group and below it."""
        found: set[int] = set()
        for directory in self.directories:
            for group in _groups(directory):
                found.update(map(int, _text(f"{group}/cgroup.procs").split()))
        return found

    def is_empty(self) -> bool:
        return not self.processes()

    def oom_kills(self) -> int:
        """How many processes of the group the OOM killer has killed; ask before the group is removed."""
        return self._memory("memory.oom_control", "memory.events", "oom_kill")

    def peak_memory_bytes(self) -> int | None:
        """The most memory it has had at once; None when the kernel does not tell (v2 before 5.19) or the group is gone."""
        for directory in self._accounts:
            for name in ("memory.max_usage_in_bytes", "memory.peak"):
                text = _text(directory / name)
                if text:
                    return int(text)
        return None

    def kill(self, timeout_s: float) -> None:
        """SIGKILL to all in the group and below it, until none is left.  Raises TimeoutError.

        v2's `cgroup.kill`, on a hybrid host too, is one write that no fork escapes.  Each process is also killed by itself: there may
        be no such file, and a runtime need not have put a process into the v2 tree of a hybrid host.
        """
        deadline = time.monotonic() + timeout_s
        while living := self._open_processes():
            try:
                self._kill_at_once()
                for pidfd in living:
                    signal_process(pidfd, signal.SIGKILL)
                _wait_for_ends(living, deadline)
            finally:
                for pidfd in living:
                    os.close(pidfd)

    def remove_if_empty(self) -> bool:
        """Remove it, unless a process is in it or a group is below it → whether it is gone, in every hierarchy.

        rmdir(2) looks for itself, and finds nobody as good as always; to ask each of a dozen hierarchies first takes four times as long.
        """
        try:
            for directory in self.directories:
                with contextlib.suppress(FileNotFoundError):
                    os.rmdir(directory)
        except OSError as error:
            if error.errno != errno.EBUSY:
                raise
            return False
        return True

    def remove(self) -> None:
        """Remove the group and those below it.  Raises OSError (EBUSY) when a process is in it."""
        if not self.remove_if_empty():
            for directory in self.directories:
                for group in _groups(directory):
                    with contextlib.suppress(FileNotFoundError):
                        os.rmdir(group)

    def _memory(self, v1: str, v2: str, key: str) -> int:
        for directory in self._accounts:
            for name in (v1, v2):
                for line in _text(directory / name).splitlines():
                    if line.startswith(f"{key} "):
                        return int(line.split()[1])
        return 0

    def _open_processes(self) -> list[int]:
        """A pidfd of each process that has not ended."""
        opened = {}
        for pid in self.processes():
            with contextlib.suppress(ProcessLookupError):
                opened[pid] = open_pidfd(pid)
        if not opened:
            return []
        # The pid may have become another process's before it was opened.  If it is listed still, it was this group's; if it was
        # another's and is the group's again, the other has ended and takes no harm.
        listed = self.processes()
        living = []
        for pid, pidfd in opened.items():
            if pid in listed and not has_ended(pidfd):
                living.append(pidfd)
            else:
                os.close(pidfd)
        return living

    def _kill_at_once(self) -> None:
        for hierarchy in self._hierarchies:
            if hierarchy.unified:
                # No such group in this tree; or no such file: Linux before 5.14, a threaded group.
                with contextlib.suppress(FileNotFoundError, PermissionError):
                    (hierarchy.root / self.path.lstrip("/") / "cgroup.kill").write_text("1")


def _groups(directory: Path) -> Iterator[str]:
    """The group's directory and all below it, the deepest first; nothing when it is not there."""
    try:
        links = os.stat(directory).st_nlink
    except FileNotFoundError:
        return
    if links == 2:  # as good as always; each walk would be a dozen calls, in each of a dozen hierarchies
        yield str(directory)
    else:
        for place, _, _ in os.walk(directory, topdown=False):
            yield place


def _text(path: Path | str) -> str:
    """Of a file of the group's; nothing when the group, or its file, is not there (any more)."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return ""
    try:
        content = b""
        while piece := os.read(descriptor, 1 << 16):  # without the four calls that open() makes besides
            content += piece
        return content.decode()
    except OSError as error:
        if error.errno == errno.ENODEV:  # the group was removed between open and read
            return ""
        raise
    finally:
        os.close(descriptor)


def _wait_for_ends(pidfds: Sequence[int], deadline: float) -> None:
    waiting = select.poll()
    for pidfd in pidfds:
        waiting.register(pidfd, select.POLLIN)
    left = len(pidfds)
    while left:
        remaining_s = deadline - time.monotonic()
        if remaining_s <= 0:
            raise TimeoutError("processes of a control group do not end, killed as they are")
        for pidfd, _ in waiting.poll(remaining_s * 1000):
            waiting.unregister(pidfd)
            left -= 1
