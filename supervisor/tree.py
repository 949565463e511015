"""quick tree"""
from __future__ import annotations
from typing import Any
import pykka
from loguru import logger
from supervisor.actor import Actor, Exited, System
from supervisor.spec import ChildSpec, Restart
from dataclasses import dataclass
@dataclass(frozen=True)
class _Again:
    id: str
class Supervisor(Actor):
    def __init__(self, system: System, name: str, children: tuple[ChildSpec, ...] = ()) -> None:
        super().__init__(system, name)
        self._specs = {c.id: c for c in children}
        self.children: dict[str, Any] = {}
        self.restarts: dict[str, int] = {}
    def on_begin(self) -> None:
        for spec in list(self._specs.values()):
            self.start_child(spec)
    def start_child(self, spec: ChildSpec) -> None:
        if spec.id in self.children:
            return
        self._specs[spec.id] = spec
        n = self.restarts.get(spec.id, -1) + 1
        self.restarts[spec.id] = n
        actor = spec.start()
        actor.generation = n
        actor.supervisor = self.mailbox
        self.children[spec.id] = actor
        pykka.ActorRegistry.register(actor.actor_ref)
        actor._start_actor_loop()
    def on_message(self, message: Any) -> Any:
        match message:
            case Exited(name, generation, error):
                if name in self.children and self.children[name].generation != generation:
                    return
                self.children.pop(name, None)
                spec = self._specs.get(name)
                if spec and (spec.restart is Restart.PERMANENT or (spec.restart is Restart.TRANSIENT and error)):
                    self.after(0.0 if self.restarts[name] < 3 else 1.0, _Again(name))
                else:
                    self._specs.pop(name, None); self.restarts.pop(name, None)
            case _Again(id) if id in self._specs:
                self.start_child(self._specs[id])
    def snapshot(self):
        out = []
        for name, a in sorted(self.children.items()):
            out.append(a.snapshot() if isinstance(a, Supervisor) else {"name": name, "kind": "actor", "pid": None, "state": "running", "restarts": self.restarts.get(name, 0), "children": []})
        return {"name": self.name, "kind": "supervisor", "pid": None, "state": "running", "restarts": 0, "children": out}
