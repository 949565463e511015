"""The daemon's tree as `run.py tree` shows it: the keeper, what it keeps, the actors, and the processes each looks after."""

from __future__ import annotations

import os
from typing import Any

from actors.gateway.messages import TreeNode
from actors.services import Services
from supervisor.tree import System


def draw_tree(system: System, services: Services) -> TreeNode:
    """The whole tree as of now.  It asks the keeper, so it must not be called in an actor's thread."""
    state = services.descriptors.keeper_state()
    assert system.root is not None
    actors = _actor(system.root.snapshot(), services, os.getpid())
    root_restarts = state.root_restarts if state else 0
    root = TreeNode("root supervisor", "process", os.getpid(), "running", max(0, root_restarts), [actors])
    children = [root]
    if state and state.fork_server_pid:
        restarts = max(0, state.fork_server_restarts)
        children.append(TreeNode("fork server", "process", state.fork_server_pid, "running", restarts, []))
    return TreeNode("keeper", "process", state.pid if state else None, "running" if state else "restarting", 0, children)


def _actor(node: dict[str, Any], services: Services, pid: int) -> TreeNode:
    processes = [
        TreeNode(row.name, "process", row.pid, "running", row.restarts, []) for row in services.processes.of(node["name"])
    ]
    children = [_actor(child, services, pid) for child in node["children"]]
    return TreeNode(node["name"], node["kind"], pid, node["state"], node["restarts"], children + processes)
