"""The administrative calls (OTP: supervisor:start_child/2 and its like): what each is answered, and when it is refused.

A call returns its answer, or LATER: then who asked has one when the child has begun, or ended.  It raises Refusal, or SpecError.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, Protocol

from supervisor.children import ALIVE, AT_REST, Child, Unbegun
from supervisor.rules import (
    CountChildren,
    Counts,
    DeleteChild,
    EnsureChild,
    GetChildSpec,
    Phase,
    RestartChild,
    Row,
    StartChild,
    State,
    TerminateChild,
    WhichChildren,
)
from supervisor.spec import ChildSpec, Flags, Type, check_children

LATER: Final = object()


class Refusal(Exception):
    """Why it cannot be done."""


class Rules(Protocol):
    """What an administrator sees of a rule book (`supervision.Supervision`), and has done by it."""

    flags: Flags
    phase: Phase
    children: dict[str, Child]

    @property
    def alive(self) -> int: ...

    def add(self, spec: ChildSpec, unbegun: Unbegun) -> Child: ...

    def start_by_hand(self, child: Child, *askers: Any) -> None: ...

    def terminate(self, child: Child, asker: Any) -> bool: ...


def start_child(rules: Rules, request: StartChild, asker: Any) -> Any:
    check_children([request.spec], rules.flags)
    known = rules.children.get(request.spec.id)
    if known is not None:
        said = "has been started already" if known.state in ALIVE else "is present already"
        raise Refusal(f"{request.spec.id} {said}")
    _goes_on(rules)
    rules.start_by_hand(rules.add(request.spec, Unbegun.DISCARD), asker)
    return LATER


def ensure_child(rules: Rules, request: EnsureChild, asker: Any) -> Row:
    check_children([request.spec], rules.flags)
    _goes_on(rules)
    child = rules.children.get(request.spec.id) or rules.add(request.spec, Unbegun.RETRY)
    if child.state in AT_REST:
        rules.start_by_hand(child)
    return child.row()


def terminate_child(rules: Rules, request: TerminateChild, asker: Any) -> Any:
    return None if rules.terminate(_known(rules, request.id), asker) else LATER


def restart_child(rules: Rules, request: RestartChild, asker: Any) -> Any:
    child = _known(rules, request.id)
    _goes_on(rules)
    _is_at_rest(child)
    child.unbegun = Unbegun.KEEP
    rules.start_by_hand(child, asker)
    return LATER


def delete_child(rules: Rules, request: DeleteChild, asker: Any) -> None:
    _is_at_rest(_known(rules, request.id))
    del rules.children[request.id]


def which_children(rules: Rules, request: WhichChildren, asker: Any) -> tuple[Row, ...]:
    return tuple(child.row() for child in rules.children.values())


def count_children(rules: Rules, request: CountChildren, asker: Any) -> Counts:
    supervisors = sum(child.spec.type is Type.SUPERVISOR for child in rules.children.values())
    specs = len(rules.children)
    return Counts(specs, rules.alive, supervisors, specs - supervisors)


def get_child_spec(rules: Rules, request: GetChildSpec, asker: Any) -> ChildSpec:
    return _known(rules, request.id).spec


CALLS: Final[dict[type[Any], Callable[[Rules, Any, Any], Any]]] = {
    StartChild: start_child,
    EnsureChild: ensure_child,
    TerminateChild: terminate_child,
    RestartChild: restart_child,
    DeleteChild: delete_child,
    WhichChildren: which_children,
    CountChildren: count_children,
    GetChildSpec: get_child_spec,
}


def _known(rules: Rules, id: str) -> Child:
    child = rules.children.get(id)
    if child is None:
        raise Refusal(f"there is no child {id}")
    return child


def _goes_on(rules: Rules) -> None:
    if rules.phase is Phase.ENDING:
        raise Refusal("the supervisor ends")


def _is_at_rest(child: Child) -> None:
    if child.state not in AT_REST:
        said = "is being restarted" if child.state is State.RESTARTING else "is running"
        raise Refusal(f"{child.spec.id} {said}")
