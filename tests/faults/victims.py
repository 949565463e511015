"""Whom a storm may strike: the kinds of process, where each is found from outside, and which strikes the fault model allows.

Found in /proc, not by asking the daemon: it may be down just then, which is when the next strike is worth most.  A process is the
daemon's when AERIE_STATE_DIR in its environment says so, and the task's own when it lives in another PID namespace.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal

Fault = Literal["killed", "hung"]
SIGNALS: Final[dict[Fault, signal.Signals]] = {"killed": signal.SIGKILL, "hung": signal.SIGSTOP}

COMMS: Final = {
    "keeper": "keeper",
    "fork server": "fork server",
    "image mount": "image mount",
    "workspace mount": "workspace mount",
    "image builder": "image builder",
    "image prefetcher": "image prefetcher",
    "evictor": "evictor",
    "checker": "checker",
    "output mover": "output mover",
    "syncer": "syncer",
    "conmon": "conmon",
}
ROOT: Final = "root supervisor"
VERBS: Final = ("create", "delete")  # crun and runc are started without executing them (`actors.sandbox.gate`)
BRIEF: Final = (
    "image builder",
    "image prefetcher",
    "evictor",
    "checker",
)  # live for one piece of work, and only when there is some
RUNTIMES: Final = tuple(f"runtime at {verb}" for verb in VERBS)
KINDS: Final = (*COMMS, ROOT, *RUNTIMES)
HOLDERS: Final = frozenset({"keeper", ROOT})
SERVERS: Final = frozenset({"image mount", "workspace mount"})
HELD: Final = SERVERS | {"conmon"}  # hold what holders hold as well, while they live
AWAY_S: Final = 8.0  # how long a mount's server may be away, when the fork server hangs as well


@dataclass(frozen=True)
class Process:
    """A process of the daemon: `words` is its comm and its arguments."""

    kind: str
    pid: int
    words: str


def find(state: Path) -> list[Process]:
    """Every process of the daemon whose state directory that is, but the runtimes', which live for milliseconds."""
    mark = f"AERIE_STATE_DIR={state}".encode()
    found: dict[int, tuple[Process, int]] = {}  # with its parent's pid
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        try:
            if mark not in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0"):
                continue
            comm = Path(f"/proc/{entry}/comm").read_text().strip()
            arguments = Path(f"/proc/{entry}/cmdline").read_bytes().split(b"\0")
            status = Path(f"/proc/{entry}/status").read_text()
        except OSError:
            continue  # it has ended
        fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
        if len(fields["NSpid"].split()) == 1 and (kind := kind_of(comm, arguments)):
            words = f"{comm} {os.fsdecode(b' '.join(arguments))}"
            found[int(entry)] = Process(kind, int(entry), words), int(fields["PPid"])
    # Who has just been forked, and has not executed its program yet, or named itself, looks like its parent.
    return [each for each, parent in found.values() if parent not in found or found[parent][0].kind != each.kind]


def kind_of(comm: str, arguments: list[bytes]) -> str | None:
    """What kind of process that is; None when it is none that is struck, such as a client."""
    if b"process" in arguments and b"root" in arguments:
        return ROOT
    return next((kind for kind, name in COMMS.items() if comm.startswith(name[:15])), None)


def allowed(kinds: Iterable[str], fragile: bool, holders_back: Callable[[], None]) -> bool:
    """Whether the fault model allows that `kinds` are struck together now.

    What a task needs of the kernel, its pipes and mounts, is held by keeper, root supervisor and conmon or server, and any of them is
    enough.  `fragile`: a conmon or a server is dead somewhere.  `holders_back` waits until keeper and root supervisor both hold
    everything: one that was started again has not got it at once, and if the other one dies before, or has been stopped and is not
    replaced yet, nobody is left who would start anything.
    """
    struck = set(kinds)
    if struck >= HOLDERS:
        return not fragile
    if struck & (HELD | HOLDERS):
        holders_back()
    return True
