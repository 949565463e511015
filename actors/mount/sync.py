"""The sync of one task's workspace: read staging, merge, carry out, until nothing is left to do; and know it again when killed.

The order within a batch of steps is what makes it safe at any instant:

    prepare     everything to be published lies, durable, under a private name; renamed files as links, so that nothing
                hangs on their old names
    intent      written to the journal, durable: what the store will have where
    carry out   under the store's lock: removals, from the leaves up; then the rest, from the root down
    settle      the names are durable; the journal says which steps were done

A step that finds the store not as it was decided on is left undone, and everything is read and decided again.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, field

import msgspec

from actors.mount import staging
from actors.mount.journal import JOURNAL, Batch, Journal, Move, Result, settle
from actors.mount.listing import Bounds, Entry, TreeTooLarge, read_listing
from actors.mount.merge import plan, plan_move, plan_while_running
from actors.mount.publish import Publisher
from actors.mount.steps import Action, Conflict, Known, Plan, Step
from actors.mount.store import Store

BATCH_STEPS_MAX = 256
BATCH_BYTES_MAX = 64 << 20
ROUNDS_MAX = 10
ROUNDS_RUNNING_MAX = 2  # there will be another sync
MOVES_MAX = 1000  # directories renamed as a whole: each is looked at again for every later one

SYNCED, CONFLICT, SYNC_FAILED = "synced", "conflict", "sync_failed"


@dataclass
class Outcome:
    """How a sync ended; `error` says why when it failed.  `settled`: nothing was left that the next one could do."""

    outcome: str = SYNCED
    conflicts: list[Conflict] = field(default_factory=list)
    skipped: list[tuple[bytes, str]] = field(default_factory=list)
    error: str = ""
    files: int = 0
    written_bytes: int = 0
    settled: bool = False


class NotSettling(Exception):
    """Store or staging changed again and again while it was being synced."""


def sync(store: str, directory: str, task: str, bounds: Bounds, running: bool = False) -> Outcome:
    """Merge what is staged in the task's `directory` into the directory `store`.  Raises nothing that the outcome can say."""
    outcome = Outcome()
    try:
        with ExitStack() as closing_all:
            upper = os.open(os.path.join(directory, staging.UPPER), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            closing_all.callback(os.close, upper)
            if not os.listdir(upper) and not os.path.exists(os.path.join(directory, JOURNAL)):
                outcome.settled = True
                return outcome
            journal = closing_all.enter_context(closing(Journal(directory)))
            opened = closing_all.enter_context(closing(Store(store, task, upper)))
            listing = read_listing(directory)
            publisher = closing_all.enter_context(closing(Publisher(opened, upper, listing if running else None)))
            _Sync(listing, journal, opened, publisher, upper, task, bounds, running, outcome).run()
    except (OSError, TreeTooLarge, NotSettling, msgspec.MsgspecError) as error:
        outcome.outcome, outcome.error = SYNC_FAILED, str(error)
    return outcome


@dataclass
class _Sync:
    listing: dict[bytes, Entry]
    journal: Journal
    store: Store
    publisher: Publisher
    upper: int
    task: str
    bounds: Bounds
    running: bool
    outcome: Outcome

    def run(self) -> None:
        self.known = Known.listed(self.listing)
        self.replay()
        for _ in range(ROUNDS_RUNNING_MAX if self.running else ROUNDS_MAX):
            self.outcome.settled = self.round()
            if self.outcome.settled:
                break
        else:
            if not self.running:
                raise NotSettling(f"the workspace or the store changed {ROUNDS_MAX} times while it was synced")
        if not self.running:
            self.store.clean()
        self.outcome.conflicts = list(self.known.conflicts.values())
        if self.outcome.conflicts:
            self.outcome.outcome = CONFLICT

    def replay(self) -> None:
        """Know what earlier syncs did, also one that was killed before it could say so."""
        intent = None
        for batch in self.journal.batches:
            if batch.settled:
                settle(self.known, batch)
            intent = None if batch.settled else batch
        if intent is not None:
            with self.store.lock():
                results = [result for result in intent.results if self.store.look(result.where) == result.reached]
                moves = [move for move in intent.moves if self.store.directory_inode(move.new) == move.inode]
            self.settle(intent, results, moves)
        self.journal.compact(self.listing, self.known)

    def round(self) -> bool:
        """Read, decide and carry out once; False when something was not as it had been decided on."""
        staged = staging.read(self.upper, self.listing, self.bounds)
        self.outcome.skipped = staged.skipped
        self.store.forget()
        spares = self.store.recover()
        if not self.running:
            for new, listed in sorted(staged.renamed.items()):
                self.move(staged.tree, self.known.present_path(listed), new)
        decided = plan(self.known, staged.tree, self.store, self.task, spares)
        if self.running:
            decided = plan_while_running(decided, self.known, staged.tree)
        done = True
        going = {step.where for step in decided.removals}.union(spares.values())
        for steps in _batches(decided):
            done &= self.carry_out(steps, decided.conflicts, going)
        self.settle_undone(decided, staged.tree)
        return done

    def move(self, tree: dict[bytes, Entry], old: bytes, new: bytes) -> None:
        """Rename the store's directory `old` as a whole, if that is what the task did and nobody's work is touched by it."""
        if len(self.known.moves) >= MOVES_MAX:
            return
        missing = plan_move(self.known, tree, self.store, old, new)
        if missing:
            self.carry_out(missing, [], set())
        if missing is not None:
            with self.store.lock():
                self.store.forget()
                inode = self.store.directory_inode(old)
                if inode is not None and plan_move(self.known, tree, self.store, old, new) == []:
                    intent = Batch(False, moves=[Move(old, new, inode)])
                    self.journal.append(intent)
                    if self.publisher.move(old, new):
                        self.publisher.sync_names()
                        self.settle(intent, [], intent.moves)
                    self.store.forget()

    def carry_out(self, steps: list[Step], conflicts: list[Conflict], going: set[bytes]) -> bool:
        """Do a batch of steps; False when some were left undone."""
        attempts = [self.publisher.prepare(step, step.source in going) for step in steps]
        prepared = [ready for ready in attempts if ready is not None]
        self.publisher.sync_prepared()
        results = [Result(ready.step.of, ready.step.where, ready.wanted, ready.reached) for ready in prepared]
        beside = [(conflict.path, conflict.beside, conflict.reason) for conflict in conflicts if conflict.beside]
        wheres = {step.where for step in steps}
        intent = Batch(False, results, conflicts=[conflict for conflict in beside if conflict[1] in wheres])
        self.journal.append(intent)
        with self.store.lock():
            done = [result for ready, result in zip(prepared, results, strict=True) if self.publisher.carry_out(ready)]
        self.publisher.sync_names()
        self.settle(intent, done, [])
        for result in done:
            if result.wanted is not None and result.wanted.staged and result.wanted.content is not None:
                self.outcome.files += 1
                self.outcome.written_bytes += result.wanted.content[1]
        return len(done) == len(steps)

    def settle(self, intent: Batch, results: list[Result], moves: list[Move]) -> None:
        wheres = {result.where for result in results}
        batch = Batch(True, results, moves, [conflict for conflict in intent.conflicts if conflict[1] in wheres])
        self.journal.append(batch)
        settle(self.known, batch)

    def settle_undone(self, decided: Plan, tree: dict[bytes, Entry]) -> None:
        """Know what needs nothing done: the store has it already, or keeps what it has."""
        kept = [conflict for conflict in decided.conflicts if not conflict.beside]
        paths = {conflict.path for conflict in kept}
        results = []
        for path, where in decided.settled:
            # What a conflict was about stays what it was: were the store's version taken for known, a later change would
            # overwrite it.
            reached = self.known.theirs.get(where) if path in paths else self.store.get(where)
            results.append(Result(path, where, tree.get(path), reached))
        if results:
            conflicts = [(conflict.path, conflict.beside, conflict.reason) for conflict in kept]
            batch = Batch(True, results, [], conflicts)
            self.journal.append(batch)
            settle(self.known, batch)


def _batches(decided: Plan) -> Iterator[list[Step]]:
    """All that changes names, for a renamed file must be linked before its old name goes; then the uploads, in portions."""
    structure = [*decided.removals, *(step for step in decided.steps if step.action is not Action.PUT)]
    if structure:
        yield structure
    portion: list[Step] = []
    size_bytes = 0
    for step in decided.steps:
        if step.action is Action.PUT and step.wanted is not None and step.wanted.content is not None:
            portion.append(step)
            size_bytes += step.wanted.content[1]
            if len(portion) >= BATCH_STEPS_MAX or size_bytes >= BATCH_BYTES_MAX:
                yield portion
                portion, size_bytes = [], 0
    if portion:
        yield portion
