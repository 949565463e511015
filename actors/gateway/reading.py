"""The commands that look at the daemon and its tasks, and the few that end something: a request, and its answer shown."""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec

from actors.gateway.client import ANSWER_TIMEOUT_S, Client, NoDaemon, readable, wait_connect
from actors.gateway.messages import (
    EXIT_NOT_ENDED,
    CheckStorage,
    Ended,
    ImageMounted,
    Images,
    IsReady,
    Listed,
    ListImages,
    ListTasks,
    LogDirectory,
    Logs,
    MountImage,
    PruneStorage,
    Ready,
    ShowStorage,
    StillRunning,
    Stop,
    StorageChecked,
    StoragePruned,
    StorageShown,
    TaskResult,
    Tree,
    TreeNode,
    TreeShown,
    UnmountImage,
    Wait,
)
from actors.gateway.submitting import progress_line
from actors.layout import Layout
from actors.quantities import format_bytes
from actors.settings import Settings
from supervisor.events import Event, read_events

PRUNED_BYTES_MAX = 1 << 60
MOUNT_TIMEOUT_S = 86400.0  # building an image may take long and has a bound of its own


def wait(arguments: argparse.Namespace, settings: Settings) -> int:
    deadline: float = time.monotonic() + arguments.timeout

    def left_s() -> float:
        return max(0.0, deadline - time.monotonic())

    while True:
        connection = wait_connect(Path(settings.run.dir), deadline)
        with Client(settings.run.dir, left_s(), connection) as client:
            request = Ready(client.number())
            client.send(request)
            answer = client.receive(left_s(), request.request)
            if isinstance(answer, IsReady):
                if arguments.json:
                    show_json({"pid": answer.pid})
                return 0
            # It is stopping: when it hangs up, the next one is waited for.
            if answer is None or not readable(client, deadline):
                error = f"the daemon takes no tasks within {arguments.timeout:g} s: `run.py tree` and its log may say why"
                raise NoDaemon(error)


def ps(arguments: argparse.Namespace, settings: Settings) -> int:
    client = Client(settings.run.dir)
    # By task: a daemon that was started again in the middle of the list has begun it anew.
    listed = (answer.result for answer in client.answers(ListTasks(client.number())) if isinstance(answer, Listed))
    results = list({result.task: result for result in listed}.values())
    if arguments.json:
        show_json(results)
    else:
        rows = [
            (row.task, row.state, row.reason or "-", _code(row), row.sync, row.created_at[:19] + "Z", _duration(row.duration_s))
            for row in results
        ]
        show_table(("TASK", "STATE", "REASON", "EXIT", "SYNC", "CREATED", "DURATION"), rows)
    return 0


def result(arguments: argparse.Namespace, settings: Settings) -> int:
    client = Client(settings.run.dir)
    answer = client.ask(Wait(client.number(), arguments.task, arguments.wait), arguments.wait + ANSWER_TIMEOUT_S)
    assert isinstance(answer, Ended | StillRunning)
    show_result(answer.result, arguments.json)
    return 0 if isinstance(answer, Ended) else EXIT_NOT_ENDED


def stop(arguments: argparse.Namespace, settings: Settings) -> int:
    client = Client(settings.run.dir)
    answer = client.ask(Stop(client.number(), arguments.task, arguments.force), timeout_s=None)
    assert isinstance(answer, Ended)
    if arguments.json:
        show_json(answer.result)
    return 0


def logs(arguments: argparse.Namespace, settings: Settings) -> int:
    from actors.gateway.following import follow, json_shower, show_bytes, show_present

    show = json_shower() if arguments.json else show_bytes
    client = Client(settings.run.dir)
    place = client.ask(Logs(client.number(), arguments.task))
    assert isinstance(place, LogDirectory)
    if place.ended or not arguments.follow:
        show_present(Path(place.path), place.ended, show)
    else:
        request = Wait(client.number(), arguments.task, None)
        client.send(request)
        follow(client, request.request, Path(place.path), show, progress_line())
    return 0


def tree(arguments: argparse.Namespace, settings: Settings) -> int:
    client = Client(settings.run.dir)
    answer = client.ask(Tree(client.number()))
    assert isinstance(answer, TreeShown)
    if arguments.json:
        show_json(answer.keeper)
    else:
        print("\n".join(draw(answer.keeper)))
    return 0


def events(arguments: argparse.Namespace, settings: Settings) -> int:
    """Read from the log itself: it is there when no daemon is."""
    rows = list(read_events(Layout(Path(settings.state.dir), Path(settings.run.dir)).events))[-arguments.last :]
    if arguments.json:
        show_json(rows)
    else:
        show_table(("TIME", "SUPERVISOR", "CHILD", "WHAT", "CAUSE", "AGAIN", "TEXT"), [_event(row) for row in rows])
    return 0


def image_ls(arguments: argparse.Namespace, settings: Settings) -> int:
    client = Client(settings.run.dir)
    answer = client.ask(ListImages(client.number()))
    assert isinstance(answer, Images)
    if arguments.json:
        show_json(answer.images)
    else:
        rows = [
            (row.image, row.digest[:19], format_bytes(row.unpacked_bytes), row.path or "-", " ".join(row.leases) or "-")
            for row in answer.images
        ]
        show_table(("IMAGE", "DIGEST", "UNPACKED", "PATH", "LEASES"), rows)
    return 0


def image_usage(arguments: argparse.Namespace, settings: Settings) -> int:
    client = Client(settings.run.dir)
    answer = client.ask(ShowStorage(client.number()))
    assert isinstance(answer, StorageShown)
    use = answer.usage
    if arguments.json:
        show_json(use)
        return 0
    unlinked = f"; of it {format_bytes(use.unlinked_bytes)} removed, but still in use" if use.unlinked_bytes else ""
    print(f"content:   {format_bytes(use.cache_bytes)} of {format_bytes(use.cache_bytes_max)}{unlinked}")
    print(f"archives:  {format_bytes(use.archive_bytes)} of {format_bytes(use.archive_bytes_max)}, {use.archives} of them")
    print(f"free:      {format_bytes(use.free_bytes)}; at least {format_bytes(use.free_bytes_min)} stay so")
    if use.short:
        print(f"too full:  {use.short}")
    return 0


def image_check(arguments: argparse.Namespace, settings: Settings) -> int:
    client = Client(settings.run.dir)
    answer = client.ask(CheckStorage(client.number()), timeout_s=MOUNT_TIMEOUT_S)
    assert isinstance(answer, StorageChecked)
    found = answer.checked
    if arguments.json:
        show_json({"objects": found.objects, "damaged": found.damaged, "repaired": found.repaired, "texts": found.texts})
    else:
        print(f"{found.objects} objects; {found.damaged} were damaged, of which {found.repaired} are right again")
        print("".join(f"{text}\n" for text in found.texts), end="")
    return 0


def image_prune(arguments: argparse.Namespace, settings: Settings) -> int:
    client = Client(settings.run.dir)
    answer = client.ask(PruneStorage(client.number(), min(int(arguments.size), PRUNED_BYTES_MAX)), timeout_s=MOUNT_TIMEOUT_S)
    assert isinstance(answer, StoragePruned)
    pruned = answer.pruned
    if arguments.json:
        show_json({"objects": pruned.objects, "freed_bytes": pruned.freed_bytes, "kept": pruned.kept})
    else:
        print(f"{pruned.objects} objects are gone, {format_bytes(pruned.freed_bytes)} are free again")
        if pruned.kept:
            print(f"kept: {pruned.kept}")
    return 0


def image_mount(arguments: argparse.Namespace, settings: Settings) -> int:
    client = Client(settings.run.dir)
    show_progress = progress_line()
    try:
        answer = client.ask(MountImage(client.number(), arguments.image), MOUNT_TIMEOUT_S, show_progress)
    finally:
        show_progress("")
    assert isinstance(answer, ImageMounted)
    if arguments.json:
        show_json({"lease": answer.lease, "path": answer.path, "digest": answer.digest})
    else:
        print(f"{answer.path}\nlease {answer.lease}: give it back with `run.py image unmount {answer.lease}`")
    return 0


def image_unmount(arguments: argparse.Namespace, settings: Settings) -> int:
    client = Client(settings.run.dir)
    client.ask(UnmountImage(client.number(), arguments.lease))
    return 0


# --- showing --------------------------------------------------------------------------------------------------------------


def show_json(value: Any) -> None:
    print(msgspec.json.encode(value).decode())


def show_result(shown: TaskResult, as_json: bool) -> None:
    if as_json:
        show_json(shown)
        return
    for name, value in msgspec.structs.asdict(shown).items():
        if value not in (None, [], 0) or (name == "exit_code" and value == 0):
            print(f"{name + ':':13}{', '.join(value) if isinstance(value, list) else value}")


def show_table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> None:
    """Columns under their heads, as wide as they need to be."""
    table = [heads, *rows]
    widths = [max(len(row[column]) for row in table) for column in range(len(heads))]
    for row in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def draw(node: TreeNode, own: str = "", below: str = "") -> Iterator[str]:
    """The lines of a tree; `own` is what stands before the node itself, `below` what stands before everything under it."""
    restarts = f", {node.restarts} restarts" if node.restarts else ""
    pid = f" {node.pid}" if node.kind == "process" and node.pid else ""
    yield f"{own}{node.name}  ({node.kind}{pid}, {node.state}{restarts})"
    for child in node.children:
        last = child is node.children[-1]
        yield from draw(child, below + ("└─ " if last else "├─ "), below + ("   " if last else "│  "))


def _event(row: Event) -> tuple[str, ...]:
    at = datetime.fromtimestamp(row.at_s, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
    again = "-" if row.pause_s is None else f"in {row.pause_s:.3g}s"
    return at, row.supervisor, row.child, row.what, row.cause, again, " ".join(row.text.split())


def _code(shown: TaskResult) -> str:
    if shown.signal is not None:
        return f"signal {shown.signal}"
    return "-" if shown.exit_code is None else str(shown.exit_code)


def _duration(duration_s: float | None) -> str:
    return "-" if duration_s is None else f"{duration_s:.1f}s"
