"""A root supervisor or an isolated process that is killed between any two durable operations of a task's life: the task ends as if it
had not been.

`failpoints` has the table of these operations, `armed` how they are seen, `scenarios` and `keeping` the lives.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from itertools import count
from pathlib import Path

import pytest

from actors.gateway.messages import Stop
from tests.actors.image.images import RunningRegistry
from tests.faults import keeping
from tests.faults.armed_daemon import ArmedDaemon
from tests.faults.failpoints import IN_A_ROW, KEEPER_TOO, WITH_KEEPER_IN_A_ROW, killed_at, known, operations
from tests.faults.scenarios import BEGIN, IN_A_ROW_SCENARIOS, PRINT, READY, SCENARIOS, Kill, check_ended
from tests.faults.test_kills import strike
from tests.node.test_tasks import stop, wait_for_output

numbers = count(1)


class Shared:
    """One daemon for all tests here, and another one after a test that failed."""

    def __init__(self, homes: Iterator[Path], image: str, registry: RunningRegistry) -> None:
        self._homes, self._image, self._registry = homes, image, registry
        self._daemon: ArmedDaemon | None = None
        self.seen: set[str] = set()

    def get(self) -> ArmedDaemon:
        if self._daemon is None:
            self._daemon = ArmedDaemon(next(self._homes), self._image, self._registry)
            self._daemon.start()
        return self._daemon

    def spoil(self) -> None:
        if self._daemon is not None:
            self._daemon.close_client()
            self._daemon.clear_away()
            self._daemon.reap()
            self._daemon = None

    def end(self) -> None:
        if self._daemon is not None:
            assert self._daemon.stop() == 0
            assert self._daemon.leavings_after_stop() == []


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, image: str, registry: RunningRegistry) -> Iterator[Shared]:
    made = Shared((tmp_path_factory.mktemp("armed") for _ in count()), image, registry)
    yield made
    made.end()


def run(shared: Shared, scenario: Callable[[ArmedDaemon, str, Kill], None], *points: str, keeper: bool = False) -> None:
    daemon, task = shared.get(), f"task-{next(numbers)}"
    try:
        scenario(daemon, task, lambda about: daemon.killed_at(about, *points, keeper=keeper))
        daemon.quiet()
        shared.seen.update(name for name in daemon.reached(task) if "task-" not in name)
    except BaseException:
        shared.spoil()
        raise


@pytest.mark.parametrize(("scenario", "point"), list(killed_at()))
def test_killed_at(shared: Shared, scenario: str, point: str) -> None:
    run(shared, SCENARIOS[scenario], point)


@pytest.mark.parametrize(
    ("scenario", "point"), [(scenario, point) for scenario, points in KEEPER_TOO.items() for point in points]
)
def test_killed_with_its_keeper_at(shared: Shared, scenario: str, point: str) -> None:
    run(shared, SCENARIOS[scenario], point, keeper=True)


def test_a_stop_is_on_record_before_the_task_hears_of_it(shared: Shared) -> None:
    """Else a task that ends at once, under a daemon that is killed at that moment, was not stopped but has ended by itself."""
    daemon, task = shared.get(), f"task-{next(numbers)}"
    daemon.submit(f"trap 'echo bye; exit 9' TERM; {READY}", task=task)
    wait_for_output(daemon, task, b"ready\n")
    with daemon.killed_at(task, "commit UPDATE tasks.stop_cause cancelled TASK", hangs=True):
        daemon.client.send(Stop(daemon.client.number(), task, False))
    time.sleep(0.2)
    assert b"bye" not in (daemon.state / "tasks" / task / "output/journal").read_bytes()
    strike(daemon, "root supervisor")
    daemon.close_client()
    result = stop(daemon, task)
    assert (result.reason, result.exit_code) == ("cancelled", 9)
    daemon.quiet()


@pytest.mark.parametrize("scenario", IN_A_ROW_SCENARIOS)
def test_killed_again_while_it_recovers(shared: Shared, scenario: str) -> None:
    run(shared, IN_A_ROW_SCENARIOS[scenario], *IN_A_ROW[scenario])


def test_killed_again_with_its_keeper_while_it_recovers(shared: Shared) -> None:
    [(scenario, points)] = WITH_KEEPER_IN_A_ROW.items()
    run(shared, IN_A_ROW_SCENARIOS[scenario], *points, keeper=True)


def test_killed_again_and_again_at_its_first_start_and_in_its_drain(
    tmp_path: Path, image: str, registry: RunningRegistry, shared: Shared
) -> None:
    daemon = ArmedDaemon(tmp_path, image, registry)
    try:
        with daemon.killed_at("task-one", *IN_A_ROW["the first start"]):
            daemon.start()
            check_ended(daemon, daemon.result(daemon.submit(BEGIN + PRINT, task="task-one")))
        daemon.submit(f"trap 'exit 9' TERM; {READY}", task="task-two")
        wait_for_output(daemon, "task-two", b"ready\n")
        with daemon.killed_at("task-two", *IN_A_ROW["a drain"]):
            assert daemon.stop() == 0
        assert daemon.leavings_after_stop() == []
        shared.seen.update(name for name in daemon.reached("task-one", "task-two") if "task-" not in name)
    finally:
        daemon.close_client()
        daemon.clear_away()
        daemon.reap()


def test_killed_again_and_again_while_content_is_prefetched_repaired_and_evicted(
    tmp_path: Path, image: str, registry: RunningRegistry, shared: Shared
) -> None:
    daemon = ArmedDaemon(tmp_path, image, registry, **keeping.SETTINGS)
    try:
        daemon.start()
        for scenario, live in keeping.SCENARIOS.items():
            task = f"task-{next(numbers)}"
            live(daemon, task, lambda about, scenario=scenario: daemon.killed_at(about, *IN_A_ROW[scenario]))
            shared.seen.update(name for name in daemon.reached(task) if "task-" not in name)
        assert daemon.stop() == 0
        assert daemon.leavings_after_stop() == []
    finally:
        daemon.close_client()
        daemon.clear_away()
        daemon.reap()


def test_every_durable_operation_is_in_the_table(shared: Shared) -> None:
    """The last one here: what was seen in all the others."""
    missing = operations(shared.seen) - known()
    assert not missing, f"give each of these a place in the table of failpoints: {sorted(missing)}"
