"""The SandboxActor of one task: carries out what `states` says, and tells the gateway.

It owns the task's decisions.  Container, conmon, pipes, mounts and lock belong to the keeper and the store: an actor that is
started again builds its `Life` from what it sees (`recovery`) and goes on.
"""

from __future__ import annotations

import os
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import msgspec
from loguru import logger

from actors.gateway.messages import Failure, Sync, TaskResult, TaskSpec
from actors.image import messages as images
from actors.image.archives.trace import workload_of
from actors.mount import messages as mounting
from actors.output import messages as output
from actors.output.sinks import faults
from actors.sandbox import attempt as making
from actors.sandbox import bundle, conmon, ending, messages
from actors.sandbox.attempt import HELD, Attempt, held
from actors.sandbox.host import SandboxHost
from actors.sandbox.record import Record
from actors.sandbox.recovery import Found, look
from actors.sandbox.runtimes import ContainerError, CreateError
from actors.sandbox.states import Effect, Fact, Life, Phase, begin, step
from actors.sandbox.watching import CONMON_ENDED, Seen, Watching
from actors.services import GATEWAY, IMAGES, MOUNTS, OUTPUT, Services
from actors.settings import Settings
from supervisor.actor import Actor
from supervisor.answers import Answer, Deferred, Refused, Worked, WorkFailed, refusal
from supervisor.tree import System

CREATE_AGAIN_S = (0.0, 0.05, 0.2, 0.5, 1.0)  # before a task's container is created once more, after it failed so often
RETRY_S = 1.0  # before something that must be done, and failed, is tried again


AGAIN = {
    "image released": Effect.RELEASE_IMAGE,
    "workspace released": Effect.RELEASE_WORKSPACE,
    "output drained": Effect.FINISH_OUTPUT,
}


class SandboxActor(Actor):
    """Messages: those of `messages` to one sandbox.  `manual`: it waits for StartSandbox and DeleteSandbox."""

    def __init__(
        self, system: System, name: str, services: Services, host: SandboxHost, task: str, spec: TaskSpec, manual: bool = False
    ) -> None:
        super().__init__(system, name)
        self._services = services
        self._host = host
        self._task = task
        self._spec = spec
        self._layout = services.layout.task(task)
        asked = frozenset() if manual else frozenset({Fact.START_ASKED, Fact.DELETE_ASKED})
        self._life = Life(Phase.PREPARING, asked)
        self._attempt: Attempt | None = None
        self._watching = Watching(self, services, task)
        self._rootfs: images.RootfsReady | None = None
        self._sinks: list[messages.Sink] = []
        self._record = Record(task, time.time())
        self._result: TaskResult | None = None
        self._requests: dict[int, str] = {}
        self._choosing: list[Deferred] = []
        self._creations_failed = 0
        self._making_workspace = self._remove_workspace = False

    # --- life ---

    def on_begin(self) -> None:
        found = look(self._services, self._task, lambda number: self._host.attempt(self._task, number, self._spec.runtime))
        self._services.recovered.found(self._task, found.how)
        self._take(found)
        self._life, effects = begin(self._life.facts | found.facts, found.phase)
        if found.phase is not Phase.PREPARING:
            logger.info("task {} goes on where it was: {}", self._task, found.phase.name.lower())
        self._watching.begin()
        self._carry_out(effects)
        for fact in found.seen:
            self._know(fact)
        self._tell_state()

    def _take(self, found: Found) -> None:
        self._attempt = self._host.attempt(self._task, found.attempt, self._spec.runtime)
        self._record = found.record
        self._result = found.result
        self._sinks = found.sinks

    def on_end(self, reason: object) -> None:
        self._watching.end()

    def on_message(self, message: Any) -> Any:
        match message:
            case messages.StopSandbox(_, cause, force):
                return self._ask_to_end(cause, force)
            case messages.StartSandbox():
                self._know(Fact.START_ASKED)
            case messages.DeleteSandbox(_, force):
                return self._delete_asked(force)
            case messages.SetOutput(_, sinks):
                if Fact.START_ASKED in self._life.facts:
                    return refusal(f"sandbox {self._task} has been started: its output can only be chosen before")
                return self._choose_sinks(sinks)
            case messages.GetSandbox():
                pass
            case messages.ReadFailed(_, reason):
                self._record.note(f"a read failed: {reason}")
            case ("conmon is late",):
                if Fact.OUTPUT_WHOLE not in self._life.facts:
                    self._watching.end_conmon(conmon.LAST_OUTPUT_S)
            case ("grace is over",):
                self._know(Fact.KILL_ASKED)
            case ("time is over",):
                self._check_clock()
            case ("new attempt",) if self._life.facts & {Fact.STOP_ASKED, Fact.KILL_ASKED}:
                self._know(Fact.FAILED)
            case ("new attempt",):
                # On record before anything of it exists.
                assert self._attempt
                self._attempt = self._host.attempt(self._task, self._attempt.number + 1, self._spec.runtime)
                self._write("attempt", "UPDATE tasks SET attempt = ? WHERE task = ?", self._attempt.number)
            case ("again", effect):
                self._carry_out([effect])
            case Worked(key, value):
                self._worked(key, value)
            case WorkFailed(key, error):
                self._work_failed(key, error)
            case Answer(number, value) if number in self._requests:
                self._answered(self._requests.pop(number), value)
            case Refused(number, error) if number in self._requests:
                self._refused(self._requests.pop(number), error)
            case _:
                self._saw(self._watching.take(message))
        return self._state() if isinstance(message, messages.TO_ONE) else None

    def _know(self, fact: Fact) -> None:
        before = self._life.phase
        self._life, effects = step(self._life, fact)
        if self._life.phase is not before and self._life.phase in (Phase.CREATING, Phase.RUNNING):
            self._tell_state()
        self._carry_out(effects)
        if self._life.phase is Phase.GONE and before is not Phase.GONE:
            # Nobody need wait for this mark: a daemon that does not find it gives back once more what is gone.
            self._write("released", "UPDATE tasks SET released = ? WHERE task = ?", 1)
            self.finish()

    def _carry_out(self, effects: list[Effect]) -> None:
        for effect in effects:
            getattr(self, f"_{effect.name.lower()}")()

    # --- effects ---

    def _lease_image(self) -> None:
        wanted = images.PrepareRootfs(
            f"task/{self._task}",
            self._spec.image,
            login=self._spec.login,
            workload=workload_of(self._spec.command),
            program=self._spec.command[0] if self._spec.command else "",
        )
        self._request("image", IMAGES, wanted)

    def _mount_workspace(self) -> None:
        if self._spec.workspace is None:
            self._making_workspace = True
            self.work("workspace", self._make_empty_workspace)
        else:
            self._request("workspace", MOUNTS, mounting.MountWorkspace(self._task, self._spec.workspace))

    def _make_empty_workspace(self) -> str:
        settings = self._services.settings.sandbox
        self._layout.staging.mkdir(mode=0o755, parents=True, exist_ok=True)
        os.chown(self._layout.staging, settings.uid, settings.gid)
        return str(self._layout.staging)

    def _create(self) -> None:
        assert self._attempt and self._rootfs
        task = bundle.Task(
            hostname=self._task[:63],
            image=self._rootfs.config,
            command=tuple(self._spec.command),
            env=self._spec.env,
            limits=bundle.Limits(self._spec.memory_bytes, self._spec.cpu_cores, self._services.settings.sandbox.pids),
            bundle=self._layout.bundle,
            root=self._layout.root,
            workspace=self._layout.staging if self._spec.workspace is None else self._layout.workspace,
            cgroup=self._attempt.cgroup.path,
            uid=self._services.settings.sandbox.uid,
            gid=self._services.settings.sandbox.gid,
            files_max=self._host.files_max,
            oom_score_adj=self._host.oom_score_adj,
        )
        self.work("created", making.create, self._attempt, self._rootfs, task, self._host.filter, dict(os.environ))

    def _record_intent(self) -> None:
        self._write(
            "intended", "UPDATE tasks SET intended_at = ?, boot_id = ? WHERE task = ?", time.time(), self._services.boot_id
        )

    def _start(self) -> None:
        assert self._attempt
        self._record.started_at, self._record.started_boot_s = time.time(), time.clock_gettime(time.CLOCK_BOOTTIME)
        marks = (self._record.started_at, self._record.started_boot_s)
        self._write("started", "UPDATE tasks SET started_at = ?, started_boot_s = ? WHERE task = ?", *marks)
        self.work("start", conmon.start, self._attempt.container, making.CREATE_TIMEOUT_S, self._hold_gate)

    def _hold_gate(self, descriptor: int) -> None:
        self._services.descriptors.keep({held("gate", self._task): os.dup(descriptor)})

    def _drop_gate(self) -> None:
        if self._services.descriptors.get(held("gate", self._task)) is not None:
            self._services.descriptors.drop(held("gate", self._task))

    def _watch_clock(self) -> None:
        self._check_clock()
        if sinks := self._sinks_wanted():
            self._request("output followed", OUTPUT, output.FollowOutput(self._task, sinks))

    def _check_clock(self) -> None:
        """Time-outs count on the boot-time clock, which goes on while the machine sleeps; the timer's does not."""
        if self._spec.timeout_s is None or self._record.started_boot_s is None or self._life.phase is not Phase.RUNNING:
            return
        left_s = self._record.started_boot_s + self._spec.timeout_s - time.clock_gettime(time.CLOCK_BOOTTIME)
        if left_s > 0:
            self.after(left_s, ("time is over",))
        else:
            self._ask_to_end("timeout", False)

    def _drain_output(self) -> None:
        self.after(conmon.LAST_OUTPUT_S, ("conmon is late",))

    def _sync(self) -> None:
        if self._rootfs is None or len(self._rootfs.data) > 1:
            # Content was fetched as it was read: if that failed, the reason is to be in the record, which is made after this.
            self._request("reads heard", IMAGES, images.HearReads())
        else:
            self._sync_workspace()

    def _sync_workspace(self) -> None:
        if self._spec.workspace is None or Fact.WORKSPACE not in self._life.facts:
            self._know(Fact.SYNCED)
        else:
            self._request("synced", MOUNTS, mounting.SyncWorkspace(self._task))

    def _record_result(self) -> None:
        if self._result is None:
            self._result = self._conclude()
        self._write(
            "recorded",
            "UPDATE tasks SET result = ?, finished_at = ? WHERE task = ?",
            msgspec.msgpack.encode(self._result),
            time.time(),
        )

    def _delete(self) -> None:
        assert self._attempt
        self._watching.forget()
        self.work("deleted", making.undo, self._attempt, self._services.removal)

    def _release_workspace(self) -> None:
        if self._making_workspace:
            self._remove_workspace = True  # once it is made: in another order it would stay
        elif self._spec.workspace is None:
            self.work("workspace released", self._services.removal.remove, self._layout.workspace_home)
        else:
            keep = self._record.sync == "sync_failed"
            self._request("workspace released", MOUNTS, mounting.UnmountWorkspace(self._task, keep))

    def _finish_output(self) -> None:
        """Let the sinks have all of it.  Followed once more first: after a restart nobody may have followed it yet."""
        sinks = self._sinks_wanted()
        if not sinks or not self._layout.output.exists():  # nobody wants it, or it never came so far that it could print
            self._know(Fact.OUTPUT_DRAINED)
            return
        self._request("output followed", OUTPUT, output.FollowOutput(self._task, sinks))
        self._request("output drained", OUTPUT, output.FinishOutput(self._task))

    def _release_image(self) -> None:
        self._request("image released", IMAGES, images.ReleaseRootfs(f"task/{self._task}"))

    def _terminate(self) -> None:
        assert self._attempt
        grace_s = self._services.settings.sandbox.stop_grace_s
        self.after(grace_s, ("grace is over",))
        self.work("terminated", self._attempt.terminate, self._watching.copy())

    def _kill(self) -> None:
        assert self._attempt
        self.work("killed", self._attempt.kill, self._watching.copy())

    # --- what becomes known ---

    def _worked(self, key: Any, value: Any) -> None:
        match key:
            case "workspace":
                self._workspace_is_made()
                self._know(Fact.WORKSPACE)
            case "created":
                self._services.descriptors.keep({held(kind, self._task): number for kind, number in value.items()})
                self._watching.begin()
                self._know(Fact.CREATED)
            case "undone":
                self.after(CREATE_AGAIN_S[self._creations_failed - 1], ("new attempt",))
            case "attempt":
                self._create()
            case "intended":
                self._know(Fact.INTENDED)
            case "start":
                self._drop_gate()
                self._know(Fact.STARTED)
            case "terminated" if value:
                self._know(Fact.KILL_ASKED)  # nobody is there who would hear SIGTERM
            case "recorded":
                assert self._result
                self.request(GATEWAY, messages.TaskEnded(self._result))  # a gateway that is being started again gets it then
                self._know(Fact.RECORDED)
            case "deleted":
                self._services.descriptors.drop(*(held(kind, self._task) for kind in HELD))
                self._drop_gate()  # of a daemon that was killed at the start
                self._know(Fact.DELETED)
            case "workspace released":
                self._know(Fact.WORKSPACE_RELEASED)
            case "sinks":
                self._choosing.pop(0).set(self._state())
            case "stop", force:
                self._end(force)
            case "started" | "killed" | "released":
                pass

    def _workspace_is_made(self) -> None:
        self._making_workspace = False
        if self._remove_workspace:
            self._release_workspace()

    def _work_failed(self, key: Any, error: Exception) -> None:
        if key == "workspace":
            self._workspace_is_made()
        match key:
            case "created" if self._may_create_again(error):
                logger.warning("task {}: {}; it is created again", self._task, error)
                self._creations_failed += 1
                assert self._attempt
                self.work("undone", making.undo, self._attempt, self._services.removal)
            case "created" | "start" | "workspace" | "undone" | "attempt":
                self._fail(str(error), error.kind if isinstance(error, CreateError) else "other")
            case "intended":
                self._fail(f"the start could not be recorded: {error}", "other")
            case "recorded":
                # Disk full, most likely: the result exists nowhere else, so it is tried until it is durable.
                logger.error("the result of task {} could not be recorded, trying again: {}", self._task, error)
                self.after(RETRY_S, ("again", Effect.RECORD_RESULT))
            case "sinks":
                self._choosing.pop(0).set_exception(error)
            case "stop", force:
                logger.error("that task {} is to end could not be recorded: {}", self._task, error)
                self._end(force)
            case "deleted":
                logger.error("task {} could not be undone, trying again: {}", self._task, error)
                self.after(RETRY_S, ("again", Effect.DELETE))
            case "workspace released":
                logger.error("the workspace of task {} could not be put aside, trying again: {}", self._task, error)
                self.after(RETRY_S, ("again", Effect.RELEASE_WORKSPACE))
            case _:
                logger.error("task {}: {}: {}", self._task, key, error)

    def _answered(self, what: str, value: Any) -> None:
        match what:
            case "image":
                self._rootfs = value
                self._know(Fact.IMAGE)
            case "workspace":
                self._know(Fact.WORKSPACE)
            case "pumped":
                self._record.gaps = value.gaps
                self._know(Fact.OUTPUT_WHOLE)
            case "reads heard":
                self._sync_workspace()
            case "synced":
                self._synced(value.outcome, value.conflicts, value.error, value.skipped)
            case "workspace released":
                self._know(Fact.WORKSPACE_RELEASED)
            case "image released":
                self._know(Fact.IMAGE_RELEASED)
            case "output drained":
                self._know(Fact.OUTPUT_DRAINED)

    def _refused(self, what: str, error: str) -> None:
        match what:
            case "image" | "workspace":
                self._fail(error, "other")
            case "reads heard":
                self._sync_workspace()
            case "synced":
                self._synced("sync_failed", [], error, [])
            case "pumped":
                logger.error("the pipes of task {} could not be taken over, trying again: {}", self._task, error)
                self.after(RETRY_S, CONMON_ENDED)
            case "output followed":
                pass  # "output drained" is refused with it
            case _:
                # Of what must be given back nothing may be forgotten.
                logger.error("task {}: {}, trying again: {}", self._task, what, error)
                self.after(RETRY_S, ("again", AGAIN[what]))

    def _may_create_again(self, error: Exception) -> bool:
        """Whether a creation failed for no fault of the task's: conmon or the runtime was killed at it, most likely.

        Nothing of the task's own has run, so it costs only time.  What it was is not always said, hence a few times and no more.
        """
        return (
            isinstance(error, ContainerError | ProcessLookupError)
            and not (isinstance(error, CreateError) and error.kind != "other")
            and self._creations_failed < len(CREATE_AGAIN_S)
            and not self._life.facts & {Fact.STOP_ASKED, Fact.KILL_ASKED}
        )

    def _fail(self, error: str, kind: Failure) -> None:
        self._record.fail(error, kind)
        self._know(Fact.FAILED)

    def _synced(self, outcome: Sync, conflicts: list[str], error: str | None, skipped: list[str]) -> None:
        self._record.sync, self._record.conflicts, self._record.sync_error = outcome, conflicts, error
        self._record.skipped = skipped
        self._know(Fact.SYNCED)

    def _ask_to_end(self, cause: ending.Cause, force: bool) -> Any:
        if self._record.stop_cause is None and Fact.ENDED not in self._life.facts:
            self._record.stop_cause = cause
        # On record before it is acted upon, or a daemon that is killed in between would not know why its task has ended; and whatever
        # the task is doing, for who asked may be gone by then.
        self._write(("stop", force), "UPDATE tasks SET stop_cause = ? WHERE task = ?", self._record.stop_cause)
        return self._state()

    def _end(self, force: bool) -> None:
        self._know(Fact.STOP_ASKED)
        if force:
            self._know(Fact.KILL_ASKED)

    def _delete_asked(self, force: bool) -> Any:
        if self._life.phase.value < Phase.REPORTING.value:
            if not force:
                return refusal(f"sandbox {self._task} has not ended: stop it first, or delete it with force")
            self._ask_to_end("cancelled", True)
        self._know(Fact.DELETE_ASKED)
        return self._state()

    def _saw(self, seen: Seen | None) -> None:
        match seen:
            case Seen.CONTAINER_ENDED:
                self._record.ended_at = time.time()
                self._know(Fact.ENDED)
            case Seen.OUTPUT_WHOLE:
                self._know(Fact.OUTPUT_WHOLE)
            case Seen.PIPES_LEFT:
                self._request("pumped", OUTPUT, output.PumpOutput(self._task))

    # --- results ---

    def _conclude(self) -> TaskResult:
        """The result, from everything that is known by now."""
        status = self._watching.status(self._record.status)
        ended = Fact.ENDED in self._life.facts
        refused = self._attempt.exec_refused(status) if self._attempt and ended and status is not None else None
        if refused is not None:
            self._record.fail(str(refused), refused.kind)
        oom_kills = self._attempt.cgroup.oom_kills() if self._attempt and ended else 0
        return self._record.conclude(ended and refused is None, status, oom_kills, time.time())

    def _state_now(self) -> TaskResult:
        """The result as it stands; how it ended only once that is durable."""
        if self._result is not None and Fact.RECORDED in self._life.facts:
            return self._result
        running = Fact.STARTED in self._life.facts
        return self._record.present("running" if running else "pending" if self._life.phase is Phase.PREPARING else "creating")

    def _tell_state(self) -> None:
        self.system.tell(GATEWAY, messages.TaskChanged(self._state_now()))

    def _state(self) -> messages.SandboxState:
        now = self._state_now()
        return messages.SandboxState(
            now.task,
            now.state,
            self._watching.pid,
            now.exit_code,
            now.error,
            None,
            now.created_at,
            now.started_at,
            now.finished_at,
        )

    # --- small things ---

    def _choose_sinks(self, sinks: list[messages.Sink]) -> Deferred:
        rows = self._services.store.read(
            "SELECT sinks FROM tasks WHERE released = 0 AND sinks IS NOT NULL AND task <> ?", self._task
        )
        others = [sink for (chosen,) in rows for sink in msgspec.msgpack.decode(chosen, type=list[messages.Sink])]
        if wrong := faults(sinks, [sink.path for sink in others if sink.path]):
            return refusal("\n".join(wrong))
        self._sinks = list(sinks)
        self._choosing.append(self.deferred())
        self._write("sinks", "UPDATE tasks SET sinks = ? WHERE task = ?", msgspec.msgpack.encode(self._sinks))
        return self._choosing[-1]

    def _sinks_wanted(self) -> list[messages.Sink]:
        return self._sinks or default_sinks(self._services.settings, self._task)

    def _request(self, what: str, name: str, message: Any) -> None:
        self._requests[self.request(name, message)] = what

    def _write(self, key: Any, sql: str, *values: Any) -> None:
        """Write a mark to the store; `key` becomes known when it is durable."""
        mailbox = self.mailbox

        def done(future: Future[None]) -> None:
            error = future.exception()
            mailbox(Worked(key, None) if error is None else WorkFailed(key, error))  # type: ignore[arg-type]

        self._services.store.write((sql, (*values, self._task))).add_done_callback(done)


def default_sinks(settings: Settings, task: str) -> list[messages.Sink]:
    """Where the lines of a task go that says nothing of it."""
    sinks = [messages.Sink("console")] if settings.output.console else []
    if settings.output.file_dir:
        sinks.append(messages.Sink("file", str(Path(settings.output.file_dir) / f"{task}.log")))
    return sinks
