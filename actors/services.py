"""What every actor of the node may use: things with one owner each, made by `node` before the tree starts."""

from __future__ import annotations

from dataclasses import dataclass

from actors.layout import Layout
from actors.recovered import Recovered
from actors.removal import Removal
from actors.settings import Settings
from supervisor.descriptors import Descriptors
from supervisor.isolation import Isolation
from supervisor.processes import ProcessTable
from supervisor.reserve import Reserve
from supervisor.store import Store
from supervisor.watch import Watcher

# The names under which actors are found.
CACHE, IMAGES, MOUNTS, SANDBOXES = "cache", "images", "mounts", "sandboxes"
OUTPUT, GATEWAY, SYNCER = "output", "gateway", "syncer"


def sandbox_name(task: str) -> str:
    return f"sandbox {task}"


def mount_name(task: str) -> str:
    return f"mount {task}"


@dataclass(frozen=True)
class Services:
    settings: Settings
    layout: Layout
    store: Store
    reserve: Reserve
    descriptors: Descriptors
    isolation: Isolation
    watcher: Watcher
    processes: ProcessTable
    recovered: Recovered
    removal: Removal
    boot_id: str
