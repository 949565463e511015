"""An actor of a real daemon that makes no progress: its process says where it hangs, and is replaced; the tasks do not notice."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator

import pytest

from tests.actors.image.images import RunningRegistry
from tests.faults.armed_daemon import ArmedDaemon
from tests.faults.scenarios import BEGIN, PRINT, READY, check_ended
from tests.node.daemon import PATIENCE_S
from tests.node.test_tasks import stop, wait_for_output

PROGRESS_S = 2.0


@pytest.fixture(scope="module")
def daemon(tmp_path_factory: pytest.TempPathFactory, image: str, registry: RunningRegistry) -> Iterator[ArmedDaemon]:
    settings = {"AERIE_DAEMON_PROGRESS_TIMEOUT": str(PROGRESS_S), "AERIE_GATEWAY_PARALLEL": "4"}
    started = ArmedDaemon(tmp_path_factory.mktemp("hung"), image, registry, **settings)
    started.start()
    yield started
    assert started.stop() == 0
    assert started.leavings_after_stop() == []


@pytest.mark.parametrize(
    ("task", "supervisor", "actor", "point", "where"),
    [
        ("one", "root", "images", "symlink RUN/leases/task/TASK", "in take"),
        (
            "two",
            "sandboxes",
            "sandbox two",
            "after keep attempt/TASK conmon/TASK container/TASK stderr/TASK stdout/TASK",
            "in _worked",
        ),
    ],
)
def test_an_actor_that_hangs_is_dumped_and_replaced_and_costs_no_task_anything(
    daemon: ArmedDaemon, task: str, supervisor: str, actor: str, point: str, where: str
) -> None:
    other = f"beside-{task}"
    daemon.submit(f"echo x >> ran; trap 'cat ran; exit 9' TERM; {READY}", task=other)
    wait_for_output(daemon, other, b"ready\n")
    root = daemon.wait_pid("root supervisor")
    logged = len(daemon.log.read_bytes())
    began = time.monotonic()
    with daemon.killed_at(task, point, hangs=True):
        daemon.submit(BEGIN + PRINT, task=task)
        check_ended(daemon, daemon.result(task))
    assert time.monotonic() - began >= PROGRESS_S
    successor = daemon.wait_pid("root supervisor")
    assert successor != root

    dump = daemon.log.read_bytes()[logged:].decode()
    assert "(most recent call first)" in dump and where in dump
    hung = (supervisor, actor, "hung", "hung", f"makes no progress for {PROGRESS_S:g} s")
    deadline = time.monotonic() + PATIENCE_S
    while True:
        told = events(daemon)
        followed = heirs(told, root)
        if hung in told and successor in followed and "exit code 1" in followed.values():
            break
        assert time.monotonic() < deadline, told

    result = stop(daemon, other)
    assert (result.reason, result.exit_code, result.gaps) == ("cancelled", 9, 0)
    assert daemon.logs(other)[0] == b"ready\nx\n"
    daemon.quiet()


def heirs(told: list[tuple[str, ...]], root: int) -> dict[int, str]:
    """Who came in this root supervisor's place, and in that one's, and why: on a slow disk another actor may make no progress as well."""
    found: dict[int, str] = {}
    for supervisor, child, what, _, text in told:
        replaced = re.fullmatch(r"pid (\d+) in place of (\d+): (.*)", text)
        is_restart = (supervisor, child, what) == ("keeper", "root supervisor", "started")
        if is_restart and replaced and int(replaced[2]) == (list(found) or [root])[-1]:
            found[int(replaced[1])] = replaced[3]
    return found


def events(daemon: ArmedDaemon) -> list[tuple[str, ...]]:
    shown = json.loads(daemon.command("events", "--json", "-n", "1000").stdout)
    return [tuple(event[field] for field in ("supervisor", "child", "what", "cause", "text")) for event in shown]
