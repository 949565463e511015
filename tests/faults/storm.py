"""A storm: processes of every kind are killed and hung, singly and in pairs, under tasks that read, write, execute and print.

    python -m tests.faults.storm [--minutes 1] [--seed 1] [--kills 200 --pairs 200]     (`make soak MINUTES=10 SEED=7`)

The seed gives the same faults in the same order.  With `--kills` it goes on until every kind was killed so often (those that live for
one piece of work a quarter of it), and so many pairs.  Before it, the FUSE processes alone have `--fuse-seconds` of one of their own
(`fuse_storm`).  The first invariant of `model` that does not hold ends it, with what was seen.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from urllib.parse import quote

from actors.gateway.client import Client
from actors.gateway.messages import CheckStorage, Ended, MountImage, PruneStorage, Request, Submit, UnmountImage, Wait
from actors.node import LISTENER
from supervisor.channel import Channel, ChannelClosed
from supervisor.keeping import FROM_KEEPER, AskState, State
from supervisor.lockfile import sign_of
from supervisor.sockets import connect_to
from tests.actors.image.images import RunningRegistry
from tests.faults import load, victims
from tests.faults.fuse_storm import fuse_storm
from tests.faults.load import Broken, Images, Task
from tests.faults.victims import SIGNALS, Fault, Process
from tests.node.daemon import Daemon, name_of, running

TASKS = 4  # at once
PAIR_S = 0.05  # between the two strikes of a pair, at most
PAUSE_S = 0.2  # between two strikes, at most
AIM_S = 0.1  # how long a runtime that is to die is waited for
BRIEF_S = 1.0  # and a process that lives for one piece of work
HANG_SHARE, PAIR_SHARE, WAIT_SHARE = 0.1, 0.25, 0.3
BRIEF_SHARE = 0.25
SMALL_IMAGES = 3
CACHE_BYTES = 40 << 20  # of images there are more, so that something is evicted now and then
TELL_S = 60.0  # between two lines on how far it is
TASK_S = 180.0  # that a task may take in all of it
# Those that nothing else can be said of than that they must be there again; the others live as long as their task or image.
RETURNING = ("keeper", victims.ROOT, "fork server", "output mover", "syncer")
STANDING = {*RETURNING, "spare"}  # of a daemon that has nothing to do; `python` is what the root supervisor calls itself

# A runtime lives for milliseconds: the program in its place has itself struck, when told to, and then is the runtime.
RUNTIME = """#!/bin/sh
for verb in create delete; do
  case " $* " in *" $verb "*)
    if mv "{orders}/$verb" "{orders}/$verb.$$" 2>/dev/null; then
      read signal pause < "{orders}/$verb.$$"; rm "{orders}/$verb.$$"
      (sleep $pause; kill -$signal $$) < /dev/null > /dev/null 2>&1 &
    fi;;
  esac
done
exec {program} "$@"
"""


@dataclass(frozen=True)
class Goal:
    """When a storm is over: after `seconds`, or when every kind was killed `kills` times and `pairs` pairs were struck."""

    seconds: float = 0.0
    kills: int = 0
    pairs: int = 0

    def of(self, kind: str) -> int:
        return int(self.kills * BRIEF_SHARE) if kind in victims.BRIEF else self.kills


@dataclass
class Tally:
    """What a storm has done, and how long what it killed was away."""

    faults: Counter[tuple[str, Fault]] = field(default_factory=Counter)
    pairs: Counter[tuple[str, ...]] = field(default_factory=Counter)
    away_s: dict[str, list[float]] = field(default_factory=dict)
    tasks: int = 0
    strikes: list[str] = field(default_factory=list)

    def strike(self, kind: str, fault: Fault, words: str) -> None:
        self.faults[kind, fault] += 1
        self.strikes.append(f"{datetime.now(UTC):%H:%M:%S.%f} {fault} {kind}: {words}")

    def line(self) -> str:
        """How far it is."""
        kills = ", ".join(f"{self.faults[kind, 'killed']} {kind}" for kind in victims.KINDS)
        return f"killed: {kills}; {sum(self.pairs.values())} pairs; {self.tasks} tasks"

    def lines(self) -> list[str]:
        table = [f"{'process':22} {'killed':>7} {'hung':>5}   back after, in ms: median, 95 %, most"]
        for kind in victims.KINDS:
            times = sorted(self.away_s.get(kind, []))
            shown = (
                ", ".join(f"{1000 * times[int(share * (len(times) - 1))]:.0f}" for share in (0.5, 0.95, 1.0)) if times else "-"
            )
            table.append(f"{kind:22} {self.faults[kind, 'killed']:7} {self.faults[kind, 'hung']:5}   {shown}")
        return [*table, f"{sum(self.pairs.values())} pairs, of {len(self.pairs)} sorts; {self.tasks} tasks"]


class Storm:
    def __init__(self, daemon: Daemon, archivist: Daemon, images: Images, orders: Path, seed: int) -> None:
        self._daemon, self._archivist, self._images, self._orders = daemon, archivist, images, orders
        self._chance = random.Random(seed)
        self._running: list[Task] = []
        self._count = 0
        self._lazy = ""
        self._small: list[str] = []
        self._server_s = -victims.AWAY_S  # when a mount's server was struck last
        self._ordered: dict[str, Fault] = {}  # of runtimes that were not called yet
        self.tally = Tally()

    # --- tasks ---

    def run(self, goal: Goal) -> None:
        end, told = time.monotonic() + goal.seconds, time.monotonic()
        while time.monotonic() < end or self._wanted(goal):
            if time.monotonic() - told > TELL_S:
                told = time.monotonic()
                print(self.tally.line(), file=sys.stderr, flush=True)
            while len(self._running) < TASKS:
                self._submit()
            time.sleep(self._chance.uniform(0.0, PAUSE_S))  # the storm's own rhythm, not a wait
            self._strike(self._choose(goal))
            self._count_orders()
            self._check_ended(wait=False)
        for verb in victims.VERBS:
            (self._orders / verb).unlink(missing_ok=True)  # a runtime may take it at this moment
        while self._running:
            self._check_ended(wait=True)
        if self._daemon.tree()["pid"] != self._daemon.pid:
            self._daemon.start()  # a stand-in keeps it, whose end nobody would wait for
        self._await_rest()

    def _submit(self) -> None:
        self._count += 1
        name = f"storm-{self._count}"
        environment = load.prepare(self._daemon, name, self._chance)
        runtime = "runc" if self._count % 3 == 0 else "crun"
        spec = self._daemon.spec(load.SCRIPT, env=environment, workspace=name, image=self._image(), runtime=runtime)
        client = self._daemon.client
        client.ask(Submit(client.number(), name, spec, wait=False), timeout_s=TASK_S)
        self._running.append(Task(name))

    def _image(self) -> str:
        """Of four tasks one needs a builder; the others have images whose archives another daemon has made: they load lazily.

        Some of these come again and again, and what of them has been evicted comes by their packs.
        """
        if self._count % 4 == 0:
            return self._images.push()
        if self._count % 4 == 3:
            if len(self._small) < SMALL_IMAGES:
                self._small.append(self._push_archived(small=True))
            return self._chance.choice(self._small)
        if self._count % 8 == 1:
            self._lazy = self._push_archived()
        return self._lazy

    def _push_archived(self, small: bool = False) -> str:
        image = self._images.push(small)
        client = self._archivist.client
        mounted = client.ask(MountImage(client.number(), image), timeout_s=TASK_S)
        client.ask(UnmountImage(client.number(), mounted.lease), timeout_s=TASK_S)
        return image

    def _check_ended(self, wait: bool) -> None:
        client = self._daemon.client
        for task in list(self._running):
            answer = client.ask(Wait(client.number(), task.name, TASK_S if wait else 0.0), timeout_s=TASK_S + 60)
            if isinstance(answer, Ended):
                self._running.remove(task)
                load.check(self._daemon, task, answer.result)
                self.tally.tasks += 1
            elif wait:
                raise Broken(f"{task.name} does not end: {answer}")

    # --- strikes ---

    def _wanted(self, goal: Goal) -> list[str]:
        """The kinds that were not killed often enough yet; all, while pairs are missing."""
        if sum(self.tally.pairs.values()) < goal.pairs:
            return list(victims.KINDS)
        return [kind for kind in victims.KINDS if self.tally.faults[kind, "killed"] < goal.of(kind)]

    def _choose(self, goal: Goal) -> Sequence[str]:
        kinds = self._wanted(goal) or victims.KINDS
        first = self._chance.choice(kinds)
        if self._chance.random() >= PAIR_SHARE:
            return (first,)
        return (first, self._chance.choice(victims.KINDS))

    def _strike(self, kinds: Sequence[str]) -> None:
        """Strike one process of each kind that is there and may be struck."""
        fragile = any(task.conmon_struck for task in self._running) or time.monotonic() - self._server_s < victims.AWAY_S
        if set(kinds) >= victims.HOLDERS:
            fragile = fragile or not self._all_served()
        if not victims.allowed(kinds, fragile, self._await_holders):
            return
        for kind in kinds:
            self._order(kind)
        struck = []
        for kind in kinds:
            if struck:
                time.sleep(self._chance.uniform(0.0, PAIR_S))
            fault: Fault = "hung" if self._chance.random() < HANG_SHARE else "killed"
            if self._hit(kind, fault):
                struck.append(kind)
                self.tally.strike(kind, fault, self._struck.words)
        if len(struck) == 2:
            self.tally.pairs[tuple(sorted(struck))] += 1
        if set(struck) & victims.HOLDERS:
            self._start_again(struck)
        if set(struck) & victims.SERVERS:
            self._server_s = time.monotonic()
        if len(struck) == 1 and self._chance.random() < WAIT_SHARE:
            self._await(struck[0])

    def _order(self, kind: str) -> None:
        """Ask for what an evictor or a checker does, as an administrator may at any time, and wait until one is there."""
        requests: dict[str, Request] = {
            "evictor": PruneStorage(1, self._chance.randrange(CACHE_BYTES)),
            "checker": CheckStorage(1),
        }
        if kind not in requests:
            return
        with Client(self._daemon.run_dir) as client:
            client.send(requests[kind])
            deadline = time.monotonic() + BRIEF_S
            while not self._find(kind) and time.monotonic() < deadline:
                pass  # looking takes long enough

    def _find(self, kind: str) -> list[Process]:
        return [process for process in victims.find(self._daemon.state) if process.kind == kind]

    def _hit(self, kind: str, fault: Fault) -> bool:
        """Strike a process of that kind → whether there was one."""
        if kind in victims.RUNTIMES:
            return self._hit_runtime(kind, fault)
        found = self._find(kind)
        if not found:
            return False  # not begun, ended, or being replaced
        victim = self._chance.choice(sorted(found, key=lambda process: process.pid))
        struck = [task for task in self._running if kind == "conmon" and f" {task.name}." in victim.words]
        for task in struck:
            task.conmon_struck = True
        self._struck, self._struck_s = victim, time.monotonic()
        try:
            os.kill(victim.pid, SIGNALS[fault])
        except ProcessLookupError:
            return False
        return True

    def _hit_runtime(self, kind: str, fault: Fault) -> bool:
        """Order that the next runtime that is called with this verb is struck at its work → whether one was, within AIM_S.

        Else the order stands: `_count_orders`.
        """
        verb = kind.rsplit(maxsplit=1)[-1]
        if kind in self._ordered:
            return False
        self._struck = Process(kind, 0, verb)
        unnamed = self._orders / f".{verb}"
        unnamed.write_text(f"{SIGNALS[fault].name[3:]} {self._chance.uniform(0.0, 0.02):.4f}\n")
        unnamed.rename(self._orders / verb)
        deadline = time.monotonic() + AIM_S
        while (self._orders / verb).exists():
            if time.monotonic() > deadline:
                self._ordered[kind] = fault
                return False
            time.sleep(0.01)  # a file that vanishes tells nobody but who watches; this is the storm's own rhythm
        return True

    def _count_orders(self) -> None:
        for kind, fault in list(self._ordered.items()):
            verb = kind.rsplit(maxsplit=1)[-1]
            if not (self._orders / verb).exists():
                del self._ordered[kind]
                self.tally.strike(kind, fault, verb)

    def _start_again(self, struck: Sequence[str]) -> None:
        """A keeper is stood in for by the tree, unless that was struck as well: then who started the daemon does it again."""
        if "keeper" in struck and (victims.ROOT in struck or self._chance.random() < 0.5):
            self._daemon.start()

    def _await_holders(self) -> None:
        """Wait until keeper and root supervisor have found each other: then each has what the other one holds."""
        deadline = time.monotonic() + TASK_S
        while not (self._daemon.tree() and LISTENER in self._held()):
            if time.monotonic() > deadline:
                raise Broken("keeper and root supervisor do not find each other")

    def _all_served(self) -> bool:
        """Whether every mount has a server now, as far as the keeper knows: on a slow disk one may be away for longer than AWAY_S."""
        state = self._keeper_state()
        served = self._daemon.run_dir / "served"
        living = {process.pid for process in victims.find(self._daemon.state) if process.kind in victims.SERVERS}
        return state is not None and all(
            sign_of(served / f"{quote(name, safe='')}.lock").pid in living for name in state.standing
        )

    def _held(self) -> list[str]:
        """What the keeper holds; nothing while there is none, or before a new one was told."""
        state = self._keeper_state()
        return [] if state is None else state.names

    def _keeper_state(self) -> State | None:
        connection = connect_to(self._daemon.run_dir / "keeper.sock", socket.SOCK_SEQPACKET, TASK_S)
        if connection is None:
            return None
        with connection:
            channel = Channel(connection, FROM_KEEPER)
            try:
                channel.send(AskState())
                state, _ = channel.receive(TASK_S)
            except ChannelClosed:
                return None
        assert isinstance(state, State)
        return state

    def _await(self, kind: str) -> None:
        """Wait until what was struck is there again, and the daemon answers."""
        if kind not in RETURNING:
            return
        victim: Process = self._struck
        deadline = time.monotonic() + TASK_S
        while True:
            try:
                if self._daemon.pid_of(kind) != victim.pid:
                    break
            except LookupError:
                pass
            if time.monotonic() > deadline:
                raise Broken(f"{kind} (it was {victim.pid}) does not come back")
        self.tally.away_s.setdefault(kind, []).append(time.monotonic() - self._struck_s)

    # --- what is left ---

    def _await_rest(self) -> None:
        """Wait until the daemon has nothing to do: then nothing is held or kept for anybody, and the accounts are right."""
        deadline = time.monotonic() + TASK_S
        while left := self._left():
            if time.monotonic() > deadline:
                raise Broken(f"the daemon has nothing to do, and there is still: {left}")
        cache = self._daemon.state / "images/cache"
        # An evictor may have begun since, for it is looked now and then how full the cache is.
        while not (found := load.accounts(cache)) == (there := load.taken_bytes(cache)) <= CACHE_BYTES:
            if time.monotonic() > deadline:
                raise Broken(f"objects take {there} bytes, their accounts say {found}, and there may be {CACHE_BYTES}")
            time.sleep(0.1)
        # What writers that were killed have left half written is removed by the next one.
        self._push_archived()
        if half_written := list(Path(self._daemon.environment["AERIE_IMAGE_ARCHIVE_DIR"]).glob(".*")):
            raise Broken(f"left beside the archives: {half_written}")

    def _left(self) -> list[str]:
        names = [name_of(pid) for pid in self._daemon.processes()]
        left = [f"process {name}" for name in names if name and not any(name == known[:15] for known in (*STANDING, "python"))]
        left += [f"held {name}" for name in self._held() if name != LISTENER]
        return left + [f"hold {path.name}" for path in (self._daemon.state / "images/cache/holds").iterdir()]


def storm(home: Path, registry: RunningRegistry, goal: Goal, seed: int) -> Tally:
    """Run one in the directory `home`; raises Broken, or AssertionError for what is left behind."""
    orders, programs = home / "orders", home / "bin"
    for directory in (orders, programs, home / "node", home / "archivist"):
        directory.mkdir()
    for name in ("crun", "runc"):
        (programs / name).write_text(RUNTIME.format(orders=orders, program=shutil.which(name)))
        (programs / name).chmod(0o755)
    images = Images(registry.repository("storm"), random.Random(seed))
    shared = {"AERIE_IMAGE_ARCHIVE_DIR": str(home / "archives"), "AERIE_IMAGE_IDLE_UNMOUNT": "2s"}
    node = {
        "AERIE_MOUNT_SYNC_INTERVAL": "500ms",  # kills meet syncs of running tasks
        "AERIE_IMAGE_PREFETCH": "trace",
        "AERIE_IMAGE_CACHE_MAX": str(CACHE_BYTES),
        "AERIE_IMAGE_FREE_MIN": "0",
        "PATH": f"{programs}:{os.environ['PATH']}",
    }
    with running(home / "archivist", "", **shared) as archivist, running(home / "node", "", **shared, **node) as daemon:
        current = Storm(daemon, archivist, images, orders, seed)
        try:
            current.run(goal)
            code, left, faults = daemon.stop(), daemon.leavings_after_stop(), daemon.own_faults()
            if code or left or faults:
                raise Broken(f"the daemon ended with {code}, left {left}, and says {faults}")
        except BaseException:
            tell(current.tally, seed, daemon)
            daemon.clear_away()
            raise
    return current.tally


def tell(tally: Tally, seed: int, daemon: Daemon) -> None:
    print("\n".join([f"seed {seed}:", *tally.lines(), *tally.strikes, daemon.log.read_text()]), file=sys.stderr)


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill and hang everything for a while, and see that no task notices.")
    parser.add_argument("--minutes", type=float, default=0.0)
    parser.add_argument("--kills", type=int, default=0, help="of each kind, at least")
    parser.add_argument("--pairs", type=int, default=0)
    parser.add_argument("--fuse-seconds", type=float, default=20.0, help="0: no storm over the FUSE processes alone")
    parser.add_argument("--seed", type=int, default=1)
    arguments = parser.parse_args()
    goal = Goal(arguments.minutes * 60, arguments.kills, arguments.pairs)
    with tempfile.TemporaryDirectory(prefix="aerie-storm-", dir="/var/tmp") as name:
        home = Path(name)
        home.chmod(0o755)
        (home / "registry").mkdir()
        registry = RunningRegistry(home / "registry")
        began = time.monotonic()
        try:
            if arguments.fuse_seconds:
                print(fuse_storm(home / "fuse", registry, arguments.fuse_seconds, arguments.seed).line(), flush=True)
            tally = storm(home, registry, goal, arguments.seed)
        finally:
            registry.stop()
    print(f"seed {arguments.seed}, {(time.monotonic() - began) / 60:.1f} min: no error, nothing lost, nothing left")
    print("\n".join(tally.lines()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
