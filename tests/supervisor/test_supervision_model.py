"""The rule book in any order of events: where nothing takes time it does what OTP does; where things take time it stays safe."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from supervisor.exits import NORMAL, STOPPED, Cause, Exit
from supervisor.rules import DeleteChild, EnsureChild, RestartChild, StartChild, State, TerminateChild
from supervisor.spec import AutoShutdown, Budget, ChildSpec, Flags, Restart
from supervisor.strategy import Strategy
from tests.supervisor.otp import Otp
from tests.supervisor.rulebook import CRASH, LATER, SHUTDOWN, World, child

NAMES = "abcde"
FAILS = Exit(Cause.CRASH, "no")


@st.composite
def specs(draw: Any, significant: bool) -> list[ChildSpec]:
    found = []
    for name in NAMES[: draw(st.integers(0, 4))]:
        restart = draw(st.sampled_from(Restart))
        counts = significant and restart is not Restart.PERMANENT and draw(st.booleans())
        found.append(child(name, restart, significant=counts, shutdown_s=draw(st.sampled_from([1.0, 5.0]))))
    return found


flags = st.builds(
    Flags,
    strategy=st.sampled_from(Strategy),
    intensity=st.integers(0, 4),
    period_s=st.integers(1, 5),
    backoff_s=st.just((0.0,)),
    auto_shutdown=st.sampled_from(AutoShutdown),
)
ids = st.sampled_from(NAMES)
exits = st.sampled_from([NORMAL, SHUTDOWN, CRASH])
happenings = st.one_of(
    st.tuples(st.just("exits"), ids, exits),
    st.tuples(st.just("begins"), ids, st.lists(st.sampled_from([True, NORMAL, FAILS]), max_size=3)),
    st.tuples(st.sampled_from(["start", "terminate", "restart", "delete"]), ids, st.sampled_from(Restart)),
    st.tuples(st.just("passes"), st.just(""), st.integers(0, 3)),
)

CALLS = {"terminate": TerminateChild, "restart": RestartChild, "delete": DeleteChild}


@settings(max_examples=400)
@given(st.data(), flags, st.dictionaries(ids, st.lists(st.sampled_from([True, NORMAL, FAILS]), max_size=2)))
def test_it_does_what_otp_does(data: st.DataObject, flags: Flags, begins: dict[str, list[Any]]) -> None:
    children = data.draw(specs(significant=flags.auto_shutdown is not AutoShutdown.NEVER))
    otp = Otp(children, flags, {name: list(begins.get(name, [])) for name in NAMES})
    ours = World(*children, flags=flags, begin=False)
    ours.begins.update({name: list(begins.get(name, [])) for name in NAMES})
    ours.begin()
    for what, id, value in data.draw(st.lists(happenings, max_size=25)):
        compare(otp, ours)
        if otp.down:
            return
        match what:
            case "exits" if id in ours.alive:
                otp.exits(id, value)
                ours.exits(id, value)
            case "begins":
                otp.begins[id] = list(value)
                ours.begins[id] = list(value)
            case "passes":
                otp.now_s += value
                ours.passes(value)
            case "start":
                assert otp.start_child(child(id, value)) == is_good(ours.call(StartChild(child(id, value))))
            case "terminate" | "restart" | "delete":
                assert getattr(otp, f"{what}_child")(id) == is_good(ours.call(CALLS[what](id)))
    compare(otp, ours)
    otp.end()
    ours.end()
    compare(otp, ours)


def is_good(answer: Any) -> bool:
    return not isinstance(answer, ValueError)


def compare(otp: Otp, ours: World) -> None:
    """A dynamic supervisor's children are told to end all at once; all else has one order."""
    theirs, mine = list(otp.log), list(ours.log)
    if otp.down and otp.flags.strategy is Strategy.DYNAMIC:
        theirs, mine = sorted(theirs), sorted(mine)
    assert mine == theirs
    assert (ours.down is not None) == otp.down
    if not otp.down:
        assert {id: state.value for id, state in ours.states().items()} == otp.states


# --- where things take time ---

slow_flags = st.builds(
    Flags,
    strategy=st.sampled_from(Strategy),
    intensity=st.one_of(st.none(), st.integers(0, 6)),
    period_s=st.integers(1, 10),
    backoff_s=st.sampled_from([(0.0,), (0.0, 1.0), (2.0,)]),
    start_timeout_s=st.sampled_from([1.0, 3.0]),
    auto_shutdown=st.sampled_from(AutoShutdown),
)
outcomes = st.sampled_from([True, True, LATER, FAILS, NORMAL])
slow_happenings = st.one_of(
    st.tuples(st.just("exits"), ids, exits),
    st.tuples(st.just("begun"), ids, st.none()),
    st.tuples(st.just("hangs"), ids, st.none()),
    st.tuples(st.just("begins"), ids, st.lists(outcomes, max_size=4)),
    st.tuples(st.just("ends"), ids, st.sampled_from([STOPPED, LATER, CRASH])),
    st.tuples(st.just("start"), ids, st.sampled_from([StartChild, EnsureChild])),
    st.tuples(st.sampled_from(["terminate", "restart", "delete"]), ids, st.none()),
    st.tuples(st.just("passes"), st.just(""), st.floats(0, 4)),
)


@settings(max_examples=400)
@given(st.data(), slow_flags, st.lists(slow_happenings, max_size=40))
def test_it_stays_safe_and_comes_to_rest(data: st.DataObject, flags: Flags, happenings: list[Any]) -> None:
    """`World` fails on a second incarnation, a word to a dead one, a second answer."""
    children = [
        ChildSpec(spec.id, spec.start, spec.restart, spec.shutdown_s, significant=spec.significant, budgets=budgets)
        for spec in data.draw(specs(significant=flags.auto_shutdown is not AutoShutdown.NEVER))
        for budgets in [data.draw(st.sampled_from([{}, {Cause.CRASH: Budget(1, 5.0)}, {Cause.START: Budget(0, 5.0)}]))]
    ]
    world = World(*children, flags=flags)
    for what, id, value in happenings:
        happen(world, what, id, value, data.draw(st.sampled_from(Restart)))
        if world.down is None:
            assert_sound(world)
    # From now on all goes well: what waits is answered, what is to run runs, and nothing else does.
    world.begins.clear()
    world.ends.clear()
    for id in list(world.alive):
        if world.states().get(id) is State.STARTING if world.down is None else False:
            world.begun(id)
    world.passes(100.0)
    assert len(world.answers) == world._asked
    if world.down is None:
        assert_sound(world)
        assert world.up
        assert set(world.states().values()) <= {State.RUNNING, State.DOWN, State.FAILED}
        world.take()
        world.end()
        order = [line.removeprefix("tell ") for line in world.take() if line.startswith("tell")]
        known = list(world.rules.children)
        assert order == [id for id in reversed(known) if id in order]
    assert world.down is not None
    assert not world.alive


def happen(world: World, what: str, id: str, value: Any, restart: Restart) -> None:
    match what:
        case "exits" if id in world.alive:
            world.exits(id, value)
        case "begun" if id in world.alive:
            world.begun(id)
        case "hangs" if id in world.alive:
            world.hangs(id)
        case "begins":
            world.begins[id] = list(value)
        case "ends":
            world.ends[id] = value
        case "start":
            world.ask(value(child(id, restart)))
        case "terminate" | "restart" | "delete":
            world.ask(CALLS[what](id))
        case "passes":
            world.passes(value)


def assert_sound(world: World) -> None:
    """What the rule book believes is what is."""
    alive = {State.STARTING, State.RUNNING, State.STOPPING, State.KILLING}
    assert {id for id, state in world.states().items() if state in alive} == set(world.alive)
    for id, row in world.rows().items():
        assert row.state not in alive or row.generation == world.alive[id]
        assert (id in world.forgotten) == (row.state in (State.DOWN, State.FAILED))
