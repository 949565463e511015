"""Where a sandbox stands, found out from what can be seen: the store's row, held descriptors, the runtime, files.

A SandboxActor always starts with this look; for a new task there is nothing to see.  What decides:

    the row has a result                     the task has ended: give back what it had
    no intent on record                      its command cannot have been started: begin anew
    another boot's intent                    nobody can know how it ended: it is lost
    its process is there                     adopt it; the runtime says whether the command was started
    its process has ended, and is held       the kernel knows its wait status
    no process, and conmon writes its end    it has ended; code 128 + n leaves open whether by signal n or by itself
    no process, and none was ever let go     begin anew
    its process waits, and is not held       begin anew
    no process, and nothing is held          nobody can know how it ended: it is lost

"Begin anew" is safe because a container's first process waits for the runtime's `start`, and that is only ever called after the
intent is durable and by the holder of the descriptors: a creation that was cut short is undone and made again, as a new attempt.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import msgspec

from actors.gateway.messages import TaskResult
from actors.recovered import How
from actors.sandbox import attempt as making
from actors.sandbox import conmon
from actors.sandbox.attempt import Attempt, held
from actors.sandbox.messages import Sink
from actors.sandbox.record import Record
from actors.sandbox.runtimes import ContainerError
from actors.sandbox.states import Fact, Phase
from actors.services import Services

CREATED = frozenset({Fact.IMAGE, Fact.WORKSPACE, Fact.CREATED, Fact.INTENDED})
STARTED = CREATED | {Fact.START_ASKED, Fact.STARTED}
SIGNALLED = 128
LOST = "nobody can know how it ended: {}; its output and workspace up to then are kept. Run it again if that is safe"


@dataclass
class Found:
    """What was seen: the phase to go on in, the facts known there, and those to be told one by one afterwards."""

    attempt: int
    record: Record
    phase: Phase = Phase.PREPARING
    facts: frozenset[Fact] = frozenset()
    seen: list[Fact] = field(default_factory=list)
    sinks: list[Sink] = field(default_factory=list)
    result: TaskResult | None = None

    @property
    def how(self) -> How:
        """In a word, for the account of a start."""
        if self.record.error is not None:
            return "lost"
        if self.phase is Phase.PREPARING:
            return "begun anew"
        return "finished" if Fact.ENDED in self.facts else "adopted"


def look(services: Services, task: str, attempt_of: Callable[[int], Attempt]) -> Found:
    """See where a task's sandbox stands; what was half made, and cannot be gone on with, is undone.  Blocks."""
    [row] = services.store.read(
        "SELECT attempt, accepted_at, intended_at, started_at, started_boot_s, stop_cause, result, boot_id, sinks "
        "FROM tasks WHERE task = ?",
        task,
    )
    number, accepted_at, intended_at, started_at, started_boot_s, stop_cause, result, boot_id, sinks = row
    record = Record(task, accepted_at, started_at, started_boot_s, stop_cause=stop_cause, gaps=len(gaps(services, task)))
    found = Found(number, record, sinks=msgspec.msgpack.decode(sinks, type=list[Sink]) if sinks else [])
    attempt = attempt_of(number)
    if result is not None:
        found.result = msgspec.msgpack.decode(result, type=TaskResult)
        record.sync = found.result.sync
        found.phase = Phase.REPORTING
        found.facts = STARTED | {Fact.ENDED, Fact.OUTPUT_WHOLE, Fact.SYNCED, Fact.RECORDED}
        return found
    if intended_at is None:
        return _anew(services, task, found, attempt)
    if boot_id != services.boot_id:
        return _lost(found, "the machine was started again while it ran")
    is_held = services.descriptors.get(held("container", task)) is not None
    if not is_held and conmon.waits(attempt.container):
        # Nobody was told that it is created.  Its conmon may be in the midst of that, and ends without a word, and without reading
        # the container's pipes, when it finds that nobody listens.
        return _anew(services, task, found, attempt)
    if not is_held and not _collect(services, task, attempt):
        is_created = conmon.is_created(attempt.container)
        if is_created:
            conmon.wait_written(attempt.container, conmon.LAST_OUTPUT_S)  # nobody else knows how it ended
        if (code := conmon.exit_code(attempt.container)) is not None:
            _mark_start(services, task, record, intended_at)
            return _ended(found, code)
        # The gate may have been opened before the mark of the start was durable.
        if is_created and (started_at is not None or conmon.gate_is_gone(attempt.container)):
            _mark_start(services, task, record, intended_at)
            return _lost(found, "its process and everybody who watched it were killed")
        return _anew(services, task, found, attempt)
    # Its start was meant, and where there is a gate that tells whether it happened: the runtime need not be asked, 4 ms for each task.
    is_through = started_at is not None and conmon.gate_is_gone(attempt.container)
    state = None if is_through else conmon.state(attempt.container, timeout_s=10.0)
    if state is not None and state.status == "created":
        found.phase, found.facts = Phase.CREATED, CREATED
    else:
        found.phase, found.facts = Phase.RUNNING, STARTED
        _mark_start(services, task, record, intended_at)
    if stop_cause is not None:
        found.seen.append(Fact.STOP_ASKED)
    return found


def _mark_start(services: Services, task: str, record: Record, intended_at: float) -> None:
    """Its command runs and the mark of its start is missing, which is written beside it: the start was meant a moment before."""
    if record.started_at is None:
        now_boot_s = time.clock_gettime(time.CLOCK_BOOTTIME)
        record.started_at, record.started_boot_s = intended_at, now_boot_s - max(0.0, time.time() - intended_at)
        marks = (record.started_at, record.started_boot_s, task)
        services.store.write(("UPDATE tasks SET started_at = ?, started_boot_s = ? WHERE task = ?", marks)).result()


def _anew(services: Services, task: str, found: Found, attempt: Attempt) -> Found:
    """Nothing of the task's own has run: remove what an earlier daemon had begun to make."""
    if found.record.stop_cause is not None:
        found.seen.append(Fact.STOP_ASKED)
    if attempt.layout.durable.exists() or attempt.layout.volatile.exists():
        making.undo(attempt, services.removal)
        services.descriptors.drop(*(held(kind, task) for kind in making.HELD))
        found.attempt += 1
        services.store.write(("UPDATE tasks SET attempt = ? WHERE task = ?", (found.attempt, task))).result()
    return found


def _ended(found: Found, code: int) -> Found:
    """It ended while nobody of the daemon lived.  conmon has written its last output before it wrote down the code."""
    found.record.status = code << 8
    if SIGNALLED < code <= SIGNALLED + signal.NSIG:
        found.record.status = code - SIGNALLED
        found.record.note(f"it ended while the daemon was down; it may have ended itself with exit code {code}")
    found.phase, found.facts = Phase.RUNNING, STARTED | {Fact.ENDED, Fact.OUTPUT_WHOLE}
    return found


def _lost(found: Found, why: str) -> Found:
    found.record.error = LOST.format(why)
    # What it wrote is brought back all the same: it is the user's, whatever became of the task.
    found.phase, found.facts = Phase.SYNCING, STARTED | {Fact.ENDED, Fact.OUTPUT_WHOLE}
    return found


def _collect(services: Services, task: str, attempt: Attempt) -> bool:
    """Collect again what keeper and root supervisor held, from conmon, which has outlived both; False when its container has ended."""
    created = conmon.find(attempt.container)
    if created is None:
        return False
    try:
        descriptors = making.descriptors_of(created)
    except (ContainerError, ProcessLookupError):
        if conmon.find(attempt.container) is not None:
            raise
        return False  # it ended just now
    services.descriptors.keep({held(kind, task): number for kind, number in descriptors.items()})
    return True


def gaps(services: Services, task: str) -> list[dict[str, object]]:
    """The gap records of a task's output."""
    path = services.layout.task(task).output / "gaps"
    if not os.path.exists(path):
        return []
    with open(path) as file:
        return [json.loads(line) for line in file]
