"""Before anything is started: what an earlier boot left is forgotten, and what is nobody's is ended and removed."""

from __future__ import annotations

import shutil
from contextlib import closing
from pathlib import Path

from loguru import logger

from actors.layout import TaskLayout
from actors.lazytree import mounts, trees
from actors.lazytree.objects import Objects
from actors.lazytree.trees import Trees
from actors.mount.actor import hold_name
from actors.mount.syncer import waits_for_later
from actors.removal import Removal
from actors.sandbox.host import SandboxHost
from actors.sandbox.orphans import clean_orphans
from actors.services import Services

COUNT_S = 60.0  # for another daemon that is at the same


def forget_another_boot(services: Services) -> None:
    """At the first start in this boot: nothing that was held, leased or only half on the disk counts any more."""
    store, layout = services.store, services.layout
    mark = layout.state / "boot"
    again = mark.exists() and mark.read_text() == services.boot_id
    Path(services.settings.image.cache_dir).mkdir(mode=0o755, parents=True, exist_ok=True)
    if removed := take_stock(services.settings.image.cache_dir, services.boot_id, again):
        logger.warning("{} objects that a power cut may have torn are removed", removed)
    if again:
        return
    store.write(("DELETE FROM leases", ())).result()
    shutil.rmtree(layout.leases, ignore_errors=True)
    mark.write_text(services.boot_id)


def take_stock(cache_dir: str, boot_id: str, running: bool = False) -> int:
    """Once in a boot: remove objects that a power cut may have torn, and count the others → how many are removed.

    By whichever of the daemons that share them is first: when the others start, something may be mounted already.  So it may be when this
    daemon was `running` before in this boot, and did not count, for it was an older version, or the disk was full: nothing is removed.
    """
    mark = Path(cache_dir) / "boot"
    counted = mark.read_text() if mark.exists() else ""
    if counted == boot_id:
        return 0
    removed = 0
    with closing(Objects(cache_dir)) as objects, trees.evicting(objects.descriptor, COUNT_S):
        if running:
            objects.count()
        elif not mark.exists() or mark.read_text() != boot_id:
            removed = objects.forget_unsynced()
            if removed:
                for tree in trees.trees(objects.descriptor):
                    trees.no_longer_whole(objects.descriptor, tree.name)
        unnamed = mark.with_name(".boot")
        try:
            unnamed.write_text(boot_id)
            unnamed.rename(mark)
        except OSError as error:  # a full disk: the next start counts again
            logger.warning("{}: {}", mark, error)
    return removed


def begun_tasks(services: Services) -> tuple[list[str], int]:
    """The tasks that an earlier daemon had begun and not seen to their end; and how many only wait."""
    rows = services.store.read("SELECT task, intended_at IS NOT NULL OR result IS NOT NULL FROM tasks WHERE released = 0")
    begun = [task for task, begun in rows if begun]
    return begun, len(rows) - len(begun)


def clean_up(services: Services) -> None:
    """Before anything is started: end and remove what belongs to no task that is to be gone on with."""
    store, layout, recovered = services.store, services.layout, services.recovered
    attempts = dict(store.read("SELECT task, attempt FROM tasks WHERE released = 0"))
    known = {task for (task,) in store.read("SELECT task FROM tasks")}
    living = {f"{task}.{number}" for task, number in attempts.items()}
    for kind, count in clean_orphans(services, SandboxHost(layout), living).items():
        recovered.cleaned(kind, count)
    for task in layout.known_tasks() - attempts.keys():
        recovered.cleaned("mount", unmount_all(layout.task(task)))
        recovered.cleaned("directory", remove_all(layout.task(task), task in known, services.removal))
    sweep_holds(services, set(attempts))


def sweep_holds(services: Services, tasks: set[str]) -> None:
    """Give back the holds on content of trees that are not mounted any more, and of no task that goes on."""
    settings = services.settings
    if not Path(settings.image.cache_dir).is_dir():
        return
    kept = {hold_name(task) for task in tasks}
    kept |= {Path(mount.target).name for mount in mounts.mounts_below(settings.image.mount_dir)}
    with closing(Objects(settings.image.cache_dir)) as objects:
        held = Trees(objects.descriptor, settings.run.dir)
        for name in held.holds():
            if name not in kept:
                held.release(name)


def unmount_all(layout: TaskLayout) -> int:
    """Unmount everything of a task's → how many mounts there were.  Who waits for a dead server of one gets an error."""
    found = mounts.mounts_below(str(layout.volatile))
    for mount in found:
        if mount.kind == "fuse":
            mounts.abort_fuse(mount.target, mount.minor)
        mounts.unmount(mount.target, lazily=True)
    return len(found)


def remove_all(layout: TaskLayout, known: bool, removal: Removal) -> int:
    """Remove the directories of a task that is over, but what waits to be synced, and the output of one that is known → how many."""
    doomed = []
    if not mounts.mounts_below(str(layout.volatile)):  # they would go with it, for whoever is on one
        doomed.append(layout.volatile)
    if not waits_for_later(layout.workspace_home):
        doomed.append(layout.workspace_home if known else layout.durable)
    removed = 0
    for directory in doomed:
        if directory.exists():
            try:
                removal.remove(directory)
                removed += 1
            except OSError as error:  # no reason not to start: the next daemon tries again
                logger.error("{} could not be put aside: {}", directory, error)
    return removed
