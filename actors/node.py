"""The node on one screen: what the root supervisor's process is made of, in which order it starts, and how it ends.

    root (one_for_one)
     ├─ output                  OutputActor: journals → console, files
     ├─ cache                   CacheActor: what is kept of images and workspaces, and what goes
     ├─ images                  ImageActor: image → lease on a mounted root
     ├─ mounts                  Mount supervisor, dynamic
     │   ├─ syncer              the actor of the syncer process
     │   └─ mount TASK          MountActor, one to a task with a workspace
     ├─ sandboxes               Sandbox supervisor, dynamic
     │   └─ sandbox TASK        SandboxActor, one to a task
     └─ gateway                 GatewayActor: where tasks come from; last to start, first to stop

Starting is recovery: every actor looks what is there and goes on.  This process may be killed at any instant; the keeper starts it
again and gives it what it held.
"""

from __future__ import annotations

import faulthandler
import gc
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from loguru import logger

from actors.cache.actor import CacheActor
from actors.cleaning import begun_tasks, clean_up, forget_another_boot
from actors.gateway.actor import Drain, GatewayActor
from actors.gateway.local import listen
from actors.gateway.messages import SOCKET_NAME
from actors.image.actor import ImageActor
from actors.image.messages import CloseImages
from actors.layout import Layout, spread
from actors.mount.messages import CleanupAll
from actors.mount.supervisor import MountSupervisor
from actors.mount.syncer import SyncerActor
from actors.output.actor import OutputActor
from actors.records import MIGRATIONS
from actors.recovered import Recovered
from actors.removal import Removal
from actors.sandbox.supervisor import SandboxSupervisor
from actors.services import CACHE, GATEWAY, IMAGES, MOUNTS, OUTPUT, SANDBOXES, SYNCER, Services
from actors.settings import Settings, load_settings
from supervisor.actor import Stop
from supervisor.descriptors import Descriptors
from supervisor.events import Event, EventLog
from supervisor.isolation import Isolation
from supervisor.keeper import EXIT_REFUSES
from supervisor.lockfile import LockFile
from supervisor.notify import notify
from supervisor.processes import ProcessTable
from supervisor.reserve import Reserve
from supervisor.spec import ChildSpec, Type
from supervisor.store import SchemaTooNew, Store
from supervisor.tree import Supervisor, System
from supervisor.watch import Watcher

LISTENER = "listener/gateway"
STOP_TIMEOUT_S = 30.0
RESERVE_BYTES = 8 << 20  # for the results of all tasks that may run at once, twice: in SQLite's log, and in the database


def main(argv_of: Callable[..., list[str]]) -> int:
    """Be the root supervisor → the exit code: 0 after a drain, EXIT_REFUSES when starting again would not help.

    `argv_of`: how a process of the daemon is started, by its name and arguments.
    """
    logger.remove()
    logger.add(
        sys.stderr, format="{time:YYYY-MM-DDTHH:mm:ss.SSS} {level} {message}", level="INFO", backtrace=False, diagnose=False
    )
    faulthandler.enable()  # SIGABRT, which the keeper sends to a root supervisor that hangs, tells where
    asked_to_end = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: asked_to_end.set())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal's ^C is for the keeper
    settings = load_settings()
    layout = Layout(Path(settings.state.dir), Path(settings.run.dir))
    lock = LockFile(layout.run / "root.lock")
    if not lock.acquire():
        return 1  # another one lives; the keeper finds it by this lock
    try:
        watcher = Watcher()
        watcher.every_beat(lock.beat)
        watcher.start()
        layout.state.mkdir(mode=0o711, parents=True, exist_ok=True)
        events = EventLog(layout.events).append
        services = gather(settings, layout, argv_of("stand-in", str(settings.daemon.drain_timeout_s)), watcher, events)
    except SchemaTooNew as error:
        logger.error("{}", error)
        return EXIT_REFUSES
    for left in services.isolation.end_orphans():
        logger.error("{}", left)
    forget_another_boot(services)
    clean_up(services)
    services.recovered.await_tasks(*begun_tasks(services))
    system = System(events, end_for)
    tree = root(system, services, ended=asked_to_end.set)
    tree.launch(next(system.generations), None)
    tree.begun.wait()
    services.recovered.begun()
    # The main process is the keeper, who may be another one than the manager started.
    notify(f"READY=1\nMAINPID={services.descriptors.welcome.pid}")
    if services.descriptors.welcome.draining:
        asked_to_end.set()
    # A collection looks at what tasks have left, and not each time at all that was loaded.
    gc.collect()
    gc.freeze()
    asked_to_end.wait()
    if tree.gone.is_set():
        logger.error("the tree could not be mended from within; this process ends, and the keeper starts another")
        return 1
    drain(system, services, tree)
    return 0


def gather(
    settings: Settings, layout: Layout, stand_in_argv: list[str], watcher: Watcher, events: Callable[[Event], None]
) -> Services:
    """Everything that the actors share.  Raises SchemaTooNew, OSError."""
    for directory in (
        layout.state / "tasks",
        layout.workspaces,
        layout.run,
        layout.run / "tasks",
        layout.processes,
        layout.runtimes,
        layout.served,
    ):
        directory.mkdir(mode=0o711, parents=True, exist_ok=True)
    for directory in (layout.state / "tasks", layout.run / "tasks", layout.workspaces):
        spread(directory)
    descriptors = Descriptors(layout.run / "keeper.sock", stand_in_argv, watcher, events)
    descriptors.connect()
    reserve = Reserve(layout.reserve, RESERVE_BYTES)
    reserve.hold()
    return Services(
        settings=settings,
        layout=layout,
        store=Store(str(layout.database), MIGRATIONS, reserve.release),
        reserve=reserve,
        descriptors=descriptors,
        isolation=Isolation(str(layout.run / "forkserver.sock"), layout.processes),
        watcher=watcher,
        processes=ProcessTable(),
        recovered=Recovered(),
        removal=Removal((layout.state, layout.run)),
        boot_id=Path("/proc/sys/kernel/random/boot_id").read_text().strip(),
    )


class Root(Supervisor):
    """The top of the tree: when it ends, the process has nothing left to do."""

    def __init__(self, system: System, children: tuple[ChildSpec, ...], ended: Callable[[], None]) -> None:
        super().__init__(system, "root", children)
        self._ended = ended

    def on_end(self, reason: str | None) -> None:
        super().on_end(reason)
        self.gone.set()
        self._ended()


def root(system: System, services: Services, ended: Callable[[], None]) -> Root:
    """The tree.  `ended` is called when it is no more."""
    progress_s = services.settings.daemon.progress_timeout_s
    syncer = (ChildSpec(SYNCER, lambda: SyncerActor(system, SYNCER, services), progress_s=progress_s),)
    children = (
        ChildSpec(OUTPUT, lambda: OutputActor(system, OUTPUT, services), progress_s=progress_s),
        ChildSpec(CACHE, lambda: CacheActor(system, CACHE, services), progress_s=progress_s),
        ChildSpec(IMAGES, lambda: ImageActor(system, IMAGES, services), progress_s=progress_s),
        ChildSpec(
            MOUNTS, lambda: MountSupervisor(system, MOUNTS, services, syncer), type=Type.SUPERVISOR, progress_s=progress_s
        ),
        ChildSpec(
            SANDBOXES, lambda: SandboxSupervisor(system, SANDBOXES, services), type=Type.SUPERVISOR, progress_s=progress_s
        ),
        ChildSpec(GATEWAY, lambda: GatewayActor(system, GATEWAY, services, gateway_listener(services)), progress_s=progress_s),
    )
    tree = system.root = Root(system, children, ended)
    return tree


def gateway_listener(services: Services) -> socket.socket:
    """The gateway's socket, which the keeper holds: who connects while this process is started again waits in its backlog."""
    held = services.descriptors.get(LISTENER)
    if held is None:
        held = listen(services.layout.run / SOCKET_NAME).detach()
        services.descriptors.keep({LISTENER: held})
    return socket.socket(fileno=os.dup(held))


def end_for(name: str) -> None:
    """End this process for an actor that hangs, for a thread cannot be killed; the keeper starts another one, which adopts all there is."""
    logger.error("{} hangs: this process ends, and the keeper starts another", name)
    os._exit(1)


def drain(system: System, services: Services, tree: Root) -> None:
    """Take no more tasks, let the running ones end, give everything back."""
    timeout_s = services.settings.daemon.drain_timeout_s
    logger.info("draining: running tasks have {:g} s", timeout_s)
    notify("STOPPING=1")
    began = time.monotonic()
    system.ask(GATEWAY, Drain(timeout_s), timeout_s=timeout_s + services.settings.sandbox.stop_grace_s + STOP_TIMEOUT_S)
    system.ask(MOUNTS, CleanupAll(), timeout_s=STOP_TIMEOUT_S)
    system.ask(IMAGES, CloseImages(), timeout_s=services.settings.image.build_timeout_s + STOP_TIMEOUT_S)
    tree.mailbox(Stop())
    tree.gone.wait(STOP_TIMEOUT_S)
    if not services.removal.finish(STOP_TIMEOUT_S):
        logger.warning("what tasks have left is not all deleted yet: the next daemon goes on with it")
    services.store.close()
    services.descriptors.drop(*services.descriptors.names())
    (services.layout.run / SOCKET_NAME).unlink(missing_ok=True)
    logger.info("drained after {:.1f} s", time.monotonic() - began)
