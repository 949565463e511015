"""Before anything is started: what an earlier boot left is forgotten, and what is nobody's is ended and removed."""

from __future__ import annotations

import shutil
from pathlib import Path

from loguru import logger

from actors.layout import TaskLayout
from actors.lazytree import mounts
from actors.lazytree.objects import Objects
from actors.mount.syncer import waits_for_later
from actors.sandbox.host import SandboxHost
from actors.sandbox.orphans import clean_orphans
from actors.services import Services


def forget_another_boot(services: Services) -> None:
    """At the first start in this boot: nothing that was held, leased or only half on the disk counts any more."""
    store, layout = services.store, services.layout
    mark = layout.state / "boot"
    if mark.exists() and mark.read_text() == services.boot_id:
        return
    Path(services.settings.image.cache_dir).mkdir(mode=0o755, parents=True, exist_ok=True)
    objects = Objects(services.settings.image.cache_dir)
    if removed := objects.forget_unsynced():
        logger.warning("{} objects that a power cut may have torn are removed", removed)
        store.write(("UPDATE contents SET complete = 0", ())).result()
    objects.close()
    store.write(("DELETE FROM leases", ())).result()
    shutil.rmtree(layout.leases, ignore_errors=True)
    mark.write_text(services.boot_id)


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
        recovered.cleaned("directory", remove_all(layout.task(task), task in known))


def unmount_all(layout: TaskLayout) -> int:
    """Unmount everything of a task's → how many mounts there were.  Who waits for a dead server of one gets an error."""
    found = mounts.mounts_below(str(layout.volatile))
    for mount in found:
        if mount.kind == "fuse":
            mounts.abort_fuse(mount.minor)
        mounts.unmount(mount.target, lazily=True)
    return len(found)


def remove_all(layout: TaskLayout, known: bool) -> int:
    """Remove the directories of a task that is over, but what waits to be synced, and the output of one that is known → how many."""
    doomed = []
    if not mounts.mounts_below(str(layout.volatile)):  # rmtree would go through a mount, and remove what is on it
        doomed.append(layout.volatile)
    if not waits_for_later(layout.workspace_home):
        doomed.append(layout.workspace_home if known else layout.durable)
    present = [directory for directory in doomed if directory.exists()]
    for directory in present:
        shutil.rmtree(directory, ignore_errors=True)
    return len(present)
