"""The Mount supervisor: one MountActor to a task with a workspace, and the seed's MountManager for whoever asks."""

from __future__ import annotations

from typing import Any

from loguru import logger

from actors.lazytree import mounts
from actors.mount import messages
from actors.mount.actor import MountActor, unmount_tree
from actors.services import Services, mount_name
from supervisor.answers import Answer, Deferred, Worked, WorkFailed
from supervisor.spec import ChildSpec, Flags, Restart
from supervisor.strategy import Strategy
from supervisor.tree import Supervisor, System


class MountSupervisor(Supervisor):
    """Dynamic, beside the one static child, the syncer's actor."""

    def __init__(self, system: System, name: str, services: Services, children: tuple[ChildSpec, ...]) -> None:
        super().__init__(system, name, children, Flags(intensity=None, strategy=Strategy.DYNAMIC))
        self._services = services
        self._cleaning: list[Any] = []

    def on_begin(self) -> Deferred:
        """Look after what is mounted already: nobody asks for a workspace again while its task runs."""
        up = super().on_begin()
        layout = self._services.layout
        mounted = {mount.target for mount in mounts.mounts_below(str(layout.run / "tasks"))}
        for task in layout.known_tasks():
            if str(layout.task(task).workspace) in mounted:
                self._start(task)
        return up

    def on_message(self, message: Any) -> Any:
        match message:
            case messages.MountWorkspace(task, _) | messages.SyncWorkspace(task):
                self._start(task)
                return self._hand_on(task, message, None)
            case messages.UnmountWorkspace(task, _):
                # Started for it if need be: what an earlier run left of this task is removed by the same steps.
                self._start(task)
                return self._hand_on(task, message, messages.Unmounted())
            case messages.MountPath(task):
                return self._hand_on(task, message, messages.Path(""))
            case messages.ActiveMounts():
                return messages.Count(len(self._tasks()))
            case messages.CleanupStale(active):
                return self._clean(set(active))
            case messages.CleanupAll():
                return self._clean(set())
            case Worked("clean", count):
                self._cleaning.pop(0).set(messages.Count(count))
            case WorkFailed("clean", error):
                self._cleaning.pop(0).set_exception(error)
            case _:
                return super().on_message(message)
        return None

    def _tasks(self) -> set[str]:
        return {name.removeprefix("mount ") for name in self.children if name.startswith("mount ")}

    def _start(self, task: str) -> None:
        name, services, system = mount_name(task), self._services, self.system
        self.ensure_child(
            ChildSpec(
                name,
                lambda: MountActor(system, name, services, task),
                Restart.TRANSIENT,
                progress_s=services.settings.daemon.progress_timeout_s,
            )
        )

    def _hand_on(self, task: str, message: Any, absent: Any) -> Any:
        """Ask the task's MountActor; its answer is ours.  `absent`: the answer when there is none."""
        if mount_name(task) not in self.children:
            return absent
        reply = self.deferred()

        def answered(answer: Any) -> None:
            if isinstance(answer, Answer):
                reply.set(answer.value)
            elif absent is not None:
                reply.set(absent)
            else:
                reply.set_exception(ValueError(answer.error))

        self.system.request(mount_name(task), message, answered)
        return reply

    def _clean(self, active: set[str]) -> Any:
        """Unmount what belongs to none of `active`: by its actor where it has one, here where an earlier run left it."""
        ours = self._tasks()
        for task in ours - active:
            self.system.request(mount_name(task), messages.UnmountWorkspace(task, True), lambda answer: None)
        reply = self.deferred()
        self._cleaning.append(reply)
        self.work("clean", clean_stale, self._services, active | ours)
        return reply


def clean_stale(services: Services, keep: set[str]) -> int:
    """Remove the workspace mounts of tasks that are not in `keep` → of how many tasks.  Staging directories stay."""
    count = 0
    for task in services.layout.known_tasks() - keep:
        layout = services.layout.task(task)
        if any(mounts.mounts_below(str(place)) for place in (layout.workspace, layout.workspace_lazy, layout.workspace_meta)):
            logger.warning("an earlier run left the workspace of task {} mounted; it is unmounted", task)
            unmount_tree(services, task, keep_staging=True)
            count += 1
    return count
