"""A model of OTP's supervisor.erl (stdlib): synchronous, without pauses, too simple to be wrong.

It is written after the original's functions (handle_start_child, do_restart, restart, terminate_children, add_restart), and shares no
code with ours.  Starts and stops are done when they return; `begins` scripts what comes of them.
"""

from __future__ import annotations

from typing import Any

from supervisor.exits import Cause, Exit
from supervisor.spec import AutoShutdown, ChildSpec, Flags, Restart
from supervisor.strategy import Strategy


class Stop(Exception):
    """The supervisor ends."""


class Otp:
    def __init__(self, specs: list[ChildSpec], flags: Flags, begins: dict[str, list[Any]]) -> None:
        self.flags = flags
        self.begins = begins
        self.log: list[str] = []
        self.specs: dict[str, ChildSpec] = {}
        self.states: dict[str, str] = {}
        self.down = False
        self.now_s = 0.0
        self._restarts: list[float] = []
        for spec in specs:
            self.specs[spec.id], self.states[spec.id] = spec, "down"
        for spec in specs:
            if self._start(spec) == "error":
                self.states[spec.id] = "down"
                self._end()
                return
            if self.states[spec.id] == "down" and (spec.restart is Restart.TEMPORARY or self._is_dynamic()):
                self._forget(spec.id)

    def _start(self, spec: ChildSpec) -> str:
        self.log.append(f"start {spec.id}")
        outcome = self.begins[spec.id].pop(0) if self.begins[spec.id] else True
        if outcome is not True:
            self.log.append(f"down {spec.id}")
        self.states[spec.id] = "running" if outcome is True else "down"
        return "ok" if outcome is True or outcome.cause is Cause.NORMAL else "error"

    def _stop(self, id: str) -> None:
        if self.states[id] == "running":
            self.log += [f"tell {id}", f"down {id}"]
            self.states[id] = "down"

    def _forget(self, id: str) -> None:
        del self.specs[id], self.states[id]

    def _end(self) -> None:
        for id in reversed(list(self.specs)):
            self._stop(id)
        self.down = True

    def _is_dynamic(self) -> bool:
        return self.flags.strategy is Strategy.DYNAMIC

    # handle_info({'EXIT', …})

    def exits(self, id: str, exit: Exit) -> None:
        self.log.append(f"down {id}")
        spec = self.specs[id]
        self.states[id] = "down"
        try:
            if spec.restart is Restart.PERMANENT or (spec.restart is Restart.TRANSIENT and not exit.good):
                self._restart(id)
            else:
                if spec.restart is Restart.TEMPORARY or self._is_dynamic():
                    self._forget(id)
                self._auto_shutdown(spec)
        except Stop:
            self._end()

    def _auto_shutdown(self, spec: ChildSpec) -> None:
        if not spec.significant:
            return
        others = [id for id, other in self.specs.items() if other.significant and id != spec.id]
        if self.flags.auto_shutdown is AutoShutdown.ANY_SIGNIFICANT:
            raise Stop
        if self.flags.auto_shutdown is AutoShutdown.ALL_SIGNIFICANT and all(self.states[id] == "down" for id in others):
            raise Stop

    def _restart(self, id: str) -> None:
        while True:  # try_again_restart
            self._restarts = [moment for moment in self._restarts if moment >= self.now_s - self.flags.period_s]
            self._restarts.append(self.now_s)
            if len(self._restarts) > self.flags.intensity:
                self.states[id] = "down"
                raise Stop
            order = list(self.specs)
            if self.flags.strategy is Strategy.ONE_FOR_ALL:
                group = order
            elif self.flags.strategy is Strategy.REST_FOR_ONE:
                group = order[order.index(id) :]
            else:
                group = [id]
            for other in reversed(group):
                self._stop(other)
                if self.specs[other].restart is Restart.TEMPORARY:
                    self._forget(other)
            failed = self._start_group([other for other in group if other in self.specs])
            if failed is None:
                return
            id = failed

    def _start_group(self, group: list[str]) -> str | None:
        for id in group:
            self.states[id] = "restarting"
        for number, id in enumerate(group):
            if self._start(self.specs[id]) == "error":
                for other in [id, *group[number:]]:
                    self.states[other] = "restarting"
                return id
            if self.states[id] == "down" and self._is_dynamic():
                self._forget(id)
        return None

    # handle_call

    def start_child(self, spec: ChildSpec) -> bool:
        if spec.id in self.specs:
            return False
        self.specs[spec.id] = spec
        good = self._start(spec) == "ok"
        if not good or (self.states[spec.id] == "down" and (spec.restart is Restart.TEMPORARY or self._is_dynamic())):
            self._forget(spec.id)
        return good

    def terminate_child(self, id: str) -> bool:
        if id not in self.specs:
            return False
        self._stop(id)
        self.states[id] = "down"
        if self.specs[id].restart is Restart.TEMPORARY or self._is_dynamic():
            self._forget(id)
        return True

    def restart_child(self, id: str) -> bool:
        return id in self.specs and self.states[id] == "down" and self._start(self.specs[id]) == "ok"

    def delete_child(self, id: str) -> bool:
        if id not in self.specs or self.states[id] != "down":
            return False
        self._forget(id)
        return True

    def end(self) -> None:
        self._end()
