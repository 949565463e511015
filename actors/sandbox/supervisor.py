"""The Sandbox supervisor: one SandboxActor to a task, and the seed's SandboxManager for whoever asks."""

from __future__ import annotations

import time
from functools import partial
from typing import Any

import msgspec

from actors.gateway.messages import TaskSpec
from actors.sandbox import messages
from actors.sandbox.actor import SandboxActor
from actors.sandbox.host import SandboxHost
from actors.services import Services, sandbox_name
from supervisor.answers import Answer, Deferred
from supervisor.spec import ChildSpec, Flags, Restart
from supervisor.strategy import Strategy
from supervisor.tree import Supervisor, System


class SandboxSupervisor(Supervisor):
    """Dynamic: a child for each sandbox, which is restarted until all that the sandbox had is given back."""

    def __init__(self, system: System, name: str, services: Services) -> None:
        super().__init__(system, name, flags=Flags(intensity=None, strategy=Strategy.DYNAMIC))
        self._services = services
        self._host = SandboxHost(services.layout)
        self._running: dict[str, list[Deferred]] = {}

    def on_message(self, message: Any) -> Any:
        match message:
            case messages.RunTask(task, spec):
                self._start(task, spec, manual=False)
                reply = self.deferred()
                self._running.setdefault(task, []).append(reply)
                return reply
            case messages.CreateSandbox(task, spec):
                return self._create(task, spec)
            case messages.ListSandboxes():
                return self._list()
            case _ if isinstance(message, messages.TO_ONE):
                return self._hand_on(message)
            case _:
                answer = super().on_message(message)
                self._tell_released()
                return answer
        return None

    def _tell_released(self) -> None:
        """Answer for the tasks whose sandbox has ended for good."""
        for task in [task for task in self._running if sandbox_name(task) not in self.children]:
            for reply in self._running.pop(task):
                reply.set(messages.TaskReleased(task))

    def _start(self, task: str, spec: TaskSpec, manual: bool) -> None:
        name, services, host, system = sandbox_name(task), self._services, self._host, self.system
        self.ensure_child(
            ChildSpec(
                name,
                lambda: SandboxActor(system, name, services, host, task, spec, manual),
                Restart.TRANSIENT,
                progress_s=services.settings.daemon.progress_timeout_s,
            )
        )

    def _create(self, task: str, spec: TaskSpec) -> Any:
        """A sandbox that nobody submitted as a task: its row is written here, for recovery goes by it."""
        reply = self.deferred()
        (count,) = self._services.store.read("SELECT count(*) FROM tasks WHERE task = ?", task)[0]
        if count or sandbox_name(task) in self.children:
            reply.set_exception(ValueError(f"sandbox {task!r} exists already: choose another id, or delete it first"))
            return reply
        recorded = self._services.store.write(
            (
                """INSERT INTO tasks (task, number, spec, boot_id, accepted_at)
                VALUES (?, (SELECT coalesce(max(number), 0) + 1 FROM tasks), ?, ?, ?)""",
                (task, msgspec.msgpack.encode(spec), self._services.boot_id, time.time()),
            )
        )
        recorded.result()
        self._start(task, spec, manual=True)
        return self._hand_on(messages.GetSandbox(task))

    def _hand_on(self, message: Any) -> Any:
        """Ask the sandbox; its answer is ours."""
        reply = self.deferred()
        name = sandbox_name(message.task)
        if name not in self.children:
            reply.set_exception(ValueError(f"no sandbox {message.task!r}"))
            return reply

        def answered(answer: Any) -> None:
            if isinstance(answer, Answer):
                reply.set(answer.value)
            else:
                reply.set_exception(ValueError(answer.error))

        self.system.request(name, message, answered)
        return reply

    def _list(self) -> Any:
        reply = self.deferred()
        names = list(self.children)
        states: list[messages.SandboxState] = []
        left = set(names)

        def answered(name: str, answer: Any) -> None:
            left.discard(name)
            if isinstance(answer, Answer):
                states.append(answer.value)
            if not left:
                reply.set(messages.SandboxList(sorted(states, key=lambda state: state.created_at)))

        for name in names:
            task = name.removeprefix("sandbox ")
            self.system.request(name, messages.GetSandbox(task), partial(answered, name))
        if not names:
            reply.set(messages.SandboxList([]))
        return reply
