"""The three-way merge: what was, what the task made of it, and what the store is now, become steps.  No I/O.

*What was* is `Known`, two views of one moment: `ours`, the workspace as it was last dealt with (at first META's listing), and
`theirs`, what the store had for it then.  A path at which the task's tree still is what `ours` says is left alone.  Every other
one is decided by what it is now in the store, and `DECISIONS` is the whole of that:

                     the store still has      the store already has     the store has
                     what was                 what the task made        something else
    removed          remove                   nothing                   keep theirs, conflict
    described        set mode and time        nothing                   keep theirs, conflict
    written          publish                  nothing                   publish beside it, conflict

*Described* means same content, other mode or time.  *Written* is new content, a symbolic link, a directory, or the content of a
file of META under another name.  Directories have no content: two of them are the same, and one goes only when everything in it
goes; one in which others have put something stays, which is no conflict.  Where a directory is wanted and others have put
something else, what the task put into it goes into a directory beside it.  A mode is the task's where the task changed it,
otherwise the store's.

A directory that the task renamed, and in which nobody changed anything, is renamed as a whole before all this (`plan_move`).
"""

from __future__ import annotations

import enum
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field

from actors.mount.listing import Entry, Version
from actors.mount.staging import parent
from actors.mount.steps import Action, Conflict, Known, Plan, Step, View, conflict_name, is_directory, same_version


class Ours(enum.Enum):
    """What the task did to a path."""

    REMOVED = enum.auto()
    DESCRIBED = enum.auto()
    WRITTEN = enum.auto()


class Theirs(enum.Enum):
    """What the store has at that path by now."""

    WAS = enum.auto()
    SAME = enum.auto()
    OTHER = enum.auto()


class Decision(enum.Enum):
    REMOVE = enum.auto()
    DESCRIBE = enum.auto()
    PUBLISH = enum.auto()
    NOTHING = enum.auto()
    KEEP = enum.auto()
    BESIDE = enum.auto()


DECISIONS = {
    (Ours.REMOVED, Theirs.WAS): Decision.REMOVE,
    (Ours.REMOVED, Theirs.SAME): Decision.NOTHING,
    (Ours.REMOVED, Theirs.OTHER): Decision.KEEP,
    (Ours.DESCRIBED, Theirs.WAS): Decision.DESCRIBE,
    (Ours.DESCRIBED, Theirs.SAME): Decision.NOTHING,
    (Ours.DESCRIBED, Theirs.OTHER): Decision.KEEP,
    (Ours.WRITTEN, Theirs.WAS): Decision.PUBLISH,
    (Ours.WRITTEN, Theirs.SAME): Decision.NOTHING,
    (Ours.WRITTEN, Theirs.OTHER): Decision.BESIDE,
}


def plan(known: Known, tree: Mapping[bytes, Entry], view: View, task: str, spares: Mapping[Version, bytes]) -> Plan:
    """What is to be done to make the store follow `tree`.

    `spares`: where else in the store the content of META's files is to be found, by version.
    """
    return _Planner(known, tree, view, task, spares).run()


def plan_while_running(whole: Plan, known: Known, tree: Mapping[bytes, Entry]) -> Plan:
    """The part of a plan that may be carried out while the task goes on.

    The task may still read, from the store, what META lists and staging has only metadata of: nothing of that may be removed,
    renamed, described or replaced yet.
    """
    needed = {
        entry.content for path, entry in tree.items() if not entry.staged and entry.content and known.ours.get(path) != entry
    }
    put_off = {step.where for step in whole.removals}
    steps = []
    for step in whole.steps:
        replaced = step.expected.content if step.expected else None
        blocked = step.where in put_off or parent(step.where) in put_off or (replaced is not None and replaced in needed)
        if blocked or step.action in (Action.LINK, Action.DESCRIBE):
            put_off.add(step.where)
        else:
            steps.append(step)
    undecided = {conflict.path for conflict in whole.conflicts if not conflict.beside}
    settled = [(path, where) for path, where in whole.settled if path not in undecided]
    return Plan([], steps, settled, [conflict for conflict in whole.conflicts if conflict.beside])


def plan_move(known: Known, tree: Mapping[bytes, Entry], view: View, old: bytes, new: bytes) -> list[Step] | None:
    """The directories to make before the store's directory `old` can be renamed to `new`; None when that must not be done.

    It may be when the task left nothing at `old`, nobody has anything at `new`, and everything below `old` is what it was.
    """
    if old in tree or new in known.theirs or view.get(new) is not None:
        return None
    missing, up = [], parent(new)
    while up and view.get(up) is None and up not in known.theirs:
        missing.append(Step(Action.MKDIR, up, up, tree[up], None, tree[up].mode))
        up = parent(up)
    if up and not is_directory(view.get(up)):
        return None
    waiting = [old]
    while waiting:
        path = waiting.pop()
        now = view.get(path)
        if now is None or not same_version(now, known.theirs.get(path)):
            return None
        if is_directory(now):
            waiting += view.children(path)
        elif path == old:
            return None
    return missing[::-1]


@dataclass
class _Planner:
    known: Known
    tree: Mapping[bytes, Entry]
    view: View
    task: str
    spares: Mapping[Version, bytes]
    plan: Plan = field(default_factory=Plan)
    going: set[bytes] = field(default_factory=set)  # in the store
    made: dict[bytes, bytes] = field(default_factory=dict)  # directories of the workspace: where they are in the store
    taken: set[bytes] = field(default_factory=set)  # names beside others that this plan uses
    _sources: dict[Version, dict[bytes, None]] = field(default_factory=dict)  # paths, in order

    def run(self) -> Plan:
        ours = self.known.ours
        paths = {path for path, entry in self.tree.items() if (was := ours.get(path)) is not entry and was != entry}
        paths.update(path for path in ours if path not in self.tree)
        changed = sorted(paths)  # a directory sorts before what is in it
        for path in reversed(changed):
            self.clear(path, self.tree.get(path))
        for path in changed:
            if path in self.tree:
                self.place(path, self.tree[path])
        return self.plan

    def clear(self, path: bytes, wanted: Entry | None) -> None:
        """Plan to remove what the store has at `path`, if the task removed it, or made it a directory or the reverse."""
        now = self.view.get(path)
        if wanted is not None and (now is None or is_directory(now) == is_directory(wanted)):
            return
        same = now is None
        theirs = Theirs.SAME if same else Theirs.WAS if same_version(now, self.known.theirs.get(path)) else Theirs.OTHER
        if wanted is None and self.withdraw(path) and path not in self.known.theirs:
            self.conflict(path, b"", "")  # made by both, and removed by the task: theirs was never the task's business
            return
        match DECISIONS[Ours.REMOVED, theirs]:
            case Decision.REMOVE if not is_directory(now) or self.going.issuperset(self.view.children(path)):
                self.going.add(path)
                self.plan.removals.append(Step(Action.REMOVE, path, path, None, now))
            case Decision.KEEP if wanted is None:
                self.conflict(path, b"", "removed by the task, changed in the store")
            case _ if wanted is None:
                self.plan.settled.append((path, path))

    def place(self, path: bytes, wanted: Entry) -> None:
        """Plan for what the task has at `path`."""
        if is_directory(wanted):
            self.directory(path)
            return
        where = self.where(path)
        now, before = self.now(where), self.known.ours.get(path)
        only_described = (
            where == path and before is not None and same_version(wanted, before) and wanted.staged == before.staged
        )
        theirs = self.compare(where, path, now, wanted)
        match DECISIONS[Ours.DESCRIBED if only_described else Ours.WRITTEN, theirs]:
            case Decision.DESCRIBE:
                self.describe(where, path, wanted, now)
            case Decision.PUBLISH:
                self.publish(where, path, wanted, now)
            case Decision.BESIDE:
                beside = self.free_name(path, where)
                if self.publish(beside, path, wanted, self.now(beside)):
                    self.conflict(path, beside, "changed by the task and in the store")
            case Decision.KEEP:
                self.conflict(path, b"", "described by the task, changed in the store")
            case Decision.NOTHING if wanted.staged and where == path and self.withdraw(path):
                self.conflict(path, b"", "")
            case Decision.NOTHING if wanted.staged:
                self.plan.settled.append((path, where))
            case Decision.NOTHING:  # a link made by a sync that was killed before it came to mode and time
                self.describe(where, path, wanted, now)

    def compare(self, where: bytes, path: bytes, now: Entry | None, wanted: Entry) -> Theirs:
        if now is None and where in self.going:
            return Theirs.WAS
        if is_directory(now):  # it was not to be cleared away
            return Theirs.OTHER
        if same_version(now, self.known.theirs.get(where)):
            return Theirs.WAS
        if now is None or stat.S_IFMT(now.mode) != stat.S_IFMT(wanted.mode):
            return Theirs.OTHER
        if not wanted.staged:
            return Theirs.SAME if same_version(now, wanted) else Theirs.OTHER
        assert now.content is not None and wanted.content is not None
        same = now.content[1] == wanted.content[1] and self.view.same_content(where, path)
        return Theirs.SAME if same else Theirs.OTHER

    def describe(self, where: bytes, path: bytes, wanted: Entry, now: Entry | None) -> None:
        mode = self.mode(path, wanted, now)
        if now is not None and (now.mode, now.mtime_ns) != (mode, wanted.mtime_ns):
            self.plan.steps.append(Step(Action.DESCRIBE, where, path, wanted, now, mode))
        else:
            self.plan.settled.append((path, where))

    def mode(self, path: bytes, wanted: Entry, now: Entry | None) -> int:
        """The mode that `wanted` gets where the store has `now`."""
        before = self.known.ours.get(path)
        if before is None or now is None or before.mode != wanted.mode or stat.S_IFMT(now.mode) != stat.S_IFMT(wanted.mode):
            return wanted.mode
        return now.mode

    def directory(self, path: bytes) -> bytes:
        """Plan for the workspace's directory `path` to exist; returns where it is in the store."""
        if not path or path in self.made:
            return self.made.get(path, path)
        where = self.where(path)
        wanted = self.tree[path]
        now = self.now(where)
        if now is not None and not is_directory(now):
            beside = self.free_name(path, where, directory=True)
            self.conflict(path, beside, "a directory of the task, something else in the store")
            where, now = beside, self.now(beside)
        self.made[path] = where
        if now is None:
            self.plan.steps.append(Step(Action.MKDIR, where, path, wanted, None, wanted.mode))
        elif wanted != self.known.ours.get(path):
            if path in self.known.ours:
                self.describe(where, path, wanted, now)
            else:
                self.plan.settled.append((path, where))  # made by both: theirs stays as it is
        return where

    def where(self, path: bytes) -> bytes:
        """Where in the store the workspace's `path` belongs, its directories being planned for."""
        up = parent(path)
        place = self.directory(up)
        return path if place == up else place + b"/" + path[len(up) :].lstrip(b"/")

    def now(self, where: bytes) -> Entry | None:
        return None if where in self.going else self.view.get(where)

    def publish(self, where: bytes, path: bytes, wanted: Entry, expected: Entry | None) -> bool:
        """Plan to put the task's version at `where`; False, with a conflict, when there is nothing to take its content from."""
        mode = self.mode(path, wanted, expected)
        if wanted.staged:
            step = Step(Action.PUT, where, path, wanted, expected, mode)
        elif wanted.target is not None:
            step = Step(Action.SYMLINK, where, path, wanted, expected, mode)
        else:
            assert wanted.content is not None
            source = self.source(wanted.content)
            if source is None:
                self.conflict(path, b"", "a file renamed or linked by the task, whose content is no longer in the store")
                return False
            step = Step(Action.LINK, where, path, wanted, expected, mode, *source)
        self.plan.steps.append(step)
        return True

    def source(self, content: Version) -> tuple[bytes, Version] | None:
        """Where the store still has the content that META lists as that version, and what its version is by now."""
        if not self._sources:
            for tree in (self.known.ours, self.tree):
                for path, entry in tree.items():
                    if entry.content is not None and not entry.staged:
                        self._sources.setdefault(entry.content, {})[path] = None
        for path in self._sources.get(content, ()):
            now, ours = self.view.get(path), self.known.ours.get(path)
            if now is None or now.content is None:
                continue
            # A file that was renamed and given another time has another version; the content is that of the old one.
            again = ours is not None and ours.content == content and same_version(now, self.known.theirs.get(path))
            if now.content == content or again:
                return path, now.content
        spare = self.spares.get(content)
        return None if spare is None else (spare, content)

    def free_name(self, path: bytes, where: bytes, directory: bool = False) -> bytes:
        """A name beside `where` that is nobody's, or was given to the same conflict before and is still as it was left."""
        earlier = self.known.conflicts.get(path)
        if earlier is not None and earlier.beside not in self.taken:
            now = self.view.get(earlier.beside)
            if now is not None and is_directory(now) == directory and same_version(now, self.known.theirs.get(earlier.beside)):
                self.taken.add(earlier.beside)
                return earlier.beside
        number = 1
        while True:
            name = conflict_name(where, self.task, number)
            # The task may have made a file of that name itself: it is in the tree, or was synced, and is not ours to use.
            if name not in self.taken and name not in self.tree and self.view.get(name) is None:
                self.taken.add(name)
                return name
            number += 1

    def withdraw(self, path: bytes) -> bool:
        """Plan to remove what an earlier sync, of the running task, put beside `path`; False when there was no such conflict.

        What others have changed there stays.
        """
        earlier = self.known.conflicts.get(path)
        if earlier is None or not earlier.beside:
            return False
        beside, now = earlier.beside, self.view.get(earlier.beside)
        left = now is not None and not is_directory(now) and same_version(now, self.known.theirs.get(beside))
        if left and beside not in self.tree:
            self.plan.removals.append(Step(Action.REMOVE, beside, beside, None, now))
        return True

    def conflict(self, path: bytes, beside: bytes, reason: str) -> None:
        self.plan.conflicts.append(Conflict(path, beside, reason))
        if not beside:
            self.plan.settled.append((path, path))
