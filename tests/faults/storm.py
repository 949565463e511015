"""A storm: processes of every kind are killed and hung at random instants under tasks that read, write and print (`model`).

    python -m tests.faults.storm [--minutes 1] [--seed 1]        (`make soak MINUTES=10 SEED=7`)

The seed gives the same faults in the same order.  The first invariant that does not hold ends it, with what was seen.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from actors.gateway.messages import Ended, Submit, Wait
from tests.actors.image.images import RunningRegistry
from tests.node.conftest import busybox_layer
from tests.node.daemon import Daemon, running

TASKS = 4  # at once
LINES = 400
CONTENT_BYTES = 4 << 20
CONMON_BYTES = 8192
KINDS = (
    "root supervisor",
    "fork server",
    "output mover",
    "syncer",
    "workspace mount",
    "conmon",
    "keeper",
    "keeper and root supervisor",
)
HUNG = ("output mover", "syncer", "workspace mount")  # those that promise a heartbeat
HANG_SHARE = 0.1
HOLDER_S = 1.5
SCRIPT = """
i=0
while [ $i -lt {lines} ]; do
  i=$((i+1)); echo out $i; echo err $i >&2
  if [ $((i % 20)) = 0 ]; then
    [ "$(md5sum < big)" = "{content}  -" ] || echo WRONG content
    [ "$(md5sum < /etc/data)" = "{image}  -" ] || echo WRONG image
    echo $i >> written || echo WRONG write
    /bin/busybox true || echo WRONG exec
    sleep 0.05
  fi
done
exit 7
"""


@dataclass
class Running:
    task: str
    workspace: str
    conmon_killed: bool = False


class Broken(Exception):
    """An invariant that did not hold."""


class Storm:
    def __init__(self, daemon: Daemon, seed: int) -> None:
        self._daemon = daemon
        self._random = random.Random(seed)
        self._running: list[Running] = []
        self._count = 0
        self.faults: Counter[str] = Counter()
        self.tasks = 0
        self._image_digest = hashlib.md5(bytes(range(256)) * 4000).hexdigest()
        self._holder_struck_s = 0.0

    def run(self, seconds: float) -> None:
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            while len(self._running) < TASKS:
                self._submit()
            time.sleep(self._random.uniform(0.0, 0.4))  # the storm's own rhythm, not a wait
            self._strike()
            self._check_ended(wait=False)
        while self._running:
            self._check_ended(wait=True)

    def _submit(self) -> None:
        self._count += 1
        name = f"storm-{self._count}"
        store = self._daemon.state / "workspaces" / name
        store.mkdir(mode=0o755)
        content = self._random.randbytes(CONTENT_BYTES)
        (store / "big").write_bytes(content)
        for path in (store, store / "big"):
            os.chown(path, 1000, 1000)
        script = SCRIPT.format(lines=LINES, content=hashlib.md5(content).hexdigest(), image=self._image_digest)
        client = self._daemon.client
        client.ask(Submit(client.number(), name, self._daemon.spec(script, workspace=name), wait=False), timeout_s=60)
        self._running.append(Running(name, name))

    def _strike(self) -> None:
        kind = self._random.choice(KINDS)
        hang = kind in HUNG and self._random.random() < HANG_SHARE
        victim = self._random.choice(self._running)
        if "keeper" in kind or "root" in kind:
            # With conmon, keeper and root supervisor dead at once nobody holds a task's pipes: not in the model.  One of the two has
            # not got them yet for a moment after the other was killed.
            careful = any(task.conmon_killed for task in self._running)
            if careful and (kind == "keeper and root supervisor" or time.monotonic() - self._holder_struck_s < HOLDER_S):
                return
            self._holder_struck_s = time.monotonic()
        names = {"workspace mount": [f"workspace mount {victim.task}"], "conmon": [f"conmon {victim.task}"]}.get(
            kind, kind.split(" and ")
        )
        try:
            pids = [self._daemon.pid_of(name) for name in names]
        except LookupError:
            return  # not there just now: not begun, ended, or being replaced
        for pid in pids:
            try:
                os.kill(pid, signal.SIGSTOP if hang else signal.SIGKILL)
            except ProcessLookupError:
                return
        self.faults[f"{kind} {'hung' if hang else 'killed'}"] += 1
        if kind == "conmon":
            victim.conmon_killed = True
        if kind.startswith("keeper") and (kind != "keeper" or self._random.random() < 0.5):
            self._daemon.start()  # else the tree's stand-in does

    def _check_ended(self, wait: bool) -> None:
        client = self._daemon.client
        for running_task in list(self._running):
            answer = client.ask(Wait(client.number(), running_task.task, 60.0 if wait else 0.0), timeout_s=120)
            if isinstance(answer, Ended):
                self._running.remove(running_task)
                self._check(running_task, answer)
                self.tasks += 1
            elif wait:
                raise Broken(f"{running_task.task} does not end: {answer}")

    def _check(self, task: Running, answer: Ended) -> None:
        result = answer.result
        if result.state != "stopped":
            raise Broken(f"{task.task}: {result}")
        stdout, stderr = self._daemon.logs(task.task)
        text = stdout.decode(errors="replace")
        if "WRONG" in text:
            raise Broken(f"{task.task} saw an error: {[line for line in text.splitlines() if 'WRONG' in line][:5]}, {result}")
        if (result.state, result.reason, result.exit_code, result.sync) != ("stopped", "exited", 7, "synced"):
            raise Broken(f"{task.task}: {result}")
        for word, stream in (("out", stdout), ("err", stderr)):
            expected = [f"{word} {number}".encode() for number in range(1, LINES + 1)]
            lines = stream.splitlines()
            missing = sum(map(len, expected)) - sum(map(len, lines))
            if lines != expected and not (task.conmon_killed and result.gaps and missing <= CONMON_BYTES):
                raise Broken(
                    f"{task.task}: {len(lines)} lines of {LINES} on {word}, gaps {result.gaps}, conmon killed: {task.conmon_killed}"
                )
        written = (self._daemon.state / "workspaces" / task.workspace / "written").read_text().split()
        if written != [str(number) for number in range(20, LINES + 1, 20)]:
            raise Broken(f"{task.task}: written {written}")


def storm(home: Path, image: str, minutes: float, seed: int) -> Storm:
    """Run one; raises Broken, or AssertionError for what is left behind."""
    with running(home, image) as daemon:
        current = Storm(daemon, seed)
        try:
            current.run(minutes * 60)
        except BaseException:
            print(
                f"seed {seed}, after {dict(current.faults)}, {current.tasks} tasks\n{daemon.log.read_text()[-6000:]}",
                file=sys.stderr,
            )
            daemon.clear_away()
            raise
    return current


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill and hang everything for a while, and see that no task notices.")
    parser.add_argument("--minutes", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="aerie-storm-", dir="/var/tmp") as name:
        home = Path(name)
        home.chmod(0o755)
        (home / "registry").mkdir()
        registry = RunningRegistry(home / "registry")
        try:
            repository = registry.repository("busybox")
            repository.push(busybox_layer(), tag="1", process={"Env": ["PATH=/bin"]})
            (home / "node").mkdir()
            done = storm(home / "node", repository.reference("1"), arguments.minutes, arguments.seed)
        finally:
            registry.stop()
    print(
        f"seed {arguments.seed}: {done.tasks} tasks, no error, nothing lost, nothing left; {sum(done.faults.values())} faults:"
    )
    for fault, count in sorted(done.faults.items()):
        print(f"  {count:5d}  {fault}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
