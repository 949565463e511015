"""Images whose archive is on the node and whose content is not: what is read is fetched, and nothing else; by a counting proxy."""

from __future__ import annotations

import hashlib
import itertools
import json
import mmap
import os
import random
import signal
import statistics
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from zlib_ng import zlib_ng

from actors.gateway.messages import Stop
from actors.image.prefetch.program import parse
from actors.lazytree.mounts import Mount, mounts_below
from actors.lazytree.objects import Objects
from tests.actors.image.images import RunningRegistry, directory, hard_link, member, tar
from tests.actors.image.layers.tables import estargz, images, zstd_chunked
from tests.actors.image.proxy import Proxy, silent, status, throttle
from tests.actors.lazytree.harness import fork, in_child, private_bytes, wait_in_time
from tests.actors.lazytree.test_bounds import queued, wait_for
from tests.node.conftest import busybox_layer, busybox_members
from tests.node.daemon import Daemon, running

MIB = 1 << 20
FILES = 100  # of 1 MiB each, in one layer
LARGE_MIB = 100  # one file, in another one
BLOBS = "/blobs/"
READS = 1000
STUCK = 130
READY_S = 0.05


def content(number: int) -> bytes:
    """A MiB that no compression makes smaller."""
    return random.Random(number).randbytes(MIB)


def md5(*numbers: int) -> str:
    digest = hashlib.md5()
    for number in numbers:
        digest.update(content(number))
    return digest.hexdigest()


@dataclass
class Big:
    """An image of 200 MB, and archives that another daemon has built of it."""

    reference: str  # through the proxy
    archives: Path
    proxy: Proxy
    bytes: int  # of its layers in the registry


@pytest.fixture(scope="module")
def proxy(registry: RunningRegistry) -> Iterator[Proxy]:
    with Proxy(registry.address) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory, registry: RunningRegistry, proxy: Proxy) -> Big:
    repository = registry.repository("big")
    small = tar(directory("data"), *(member(f"data/{number}", content(number), mode=0o755) for number in range(FILES)))
    large = tar(member("large", b"".join(content(1000 + number) for number in range(LARGE_MIB))))
    layers = [busybox_layer(), small, large]
    blobs = [zlib_ng.compress(layer, 6, 31) for layer in layers]
    repository.push(*layers, tag="1", blobs=blobs, process={"Env": ["PATH=/bin"]})
    reference = f"{proxy.address}/big:1"
    home = tmp_path_factory.mktemp("builder")
    with running(home, reference, AERIE_IMAGE_ARCHIVE_DIR=str(home / "archives")) as builder:
        result = builder.run("true")
        assert result.exit_code == 0, result
        assert not [name for name in processes(builder) if name.startswith("image mount")]  # all of its content is here
    return Big(reference, home / "archives", proxy, sum(map(len, blobs)))


@contextmanager
def cold(tmp_path: Path, big: Big, **settings: str) -> Iterator[Daemon]:
    """A daemon that has the archive and no content."""
    big.proxy.behave()
    with running(tmp_path, big.reference, AERIE_IMAGE_ARCHIVE_DIR=str(big.archives), **settings) as daemon:
        big.proxy.forget()
        try:
            yield daemon
        finally:
            big.proxy.behave()


def processes(daemon: Daemon) -> list[str]:
    found, todo = [], [daemon.tree()]
    while todo:
        node = todo.pop()
        if node["kind"] == "process":
            found.append(node["name"])
        todo += node["children"]
    return found


def test_what_a_program_needs_is_read_ahead_of_it(tmp_path: Path, registry: RunningRegistry, proxy: Proxy) -> None:
    """Its first library is missing, so it ends before it has asked for the others; they are here soon all the same."""
    content = Path("/bin/ls").read_bytes()
    program = parse(lambda offset, size: content[offset : offset + size], "/bin/ls")
    [_, *others] = [
        next(path for place in program.directories if (path := Path(place, name)).exists()) for name in program.needed
    ]
    layer = tar(
        member("opt/program", content, mode=0o755),
        member(program.interpreter[1:], Path(program.interpreter).read_bytes(), mode=0o755),
        *(member(str(path)[1:], path.read_bytes()) for path in others),
    )
    registry.repository("program").push(layer, tag="1")
    image = Big(f"{proxy.address}/program:1", tmp_path / "archives", proxy, len(layer))
    (tmp_path / "builder").mkdir()
    with running(tmp_path / "builder", image.reference, AERIE_IMAGE_ARCHIVE_DIR=str(image.archives)) as builder:
        assert builder.run(["/opt/program"]).exit_code == 127
    (tmp_path / "node").mkdir()
    with cold(tmp_path / "node", image) as daemon:
        assert daemon.run(["/opt/program"]).exit_code == 127
        cache = daemon.state / "images/cache"
        for path in others:
            wait_for((cache / Objects.path(hashlib.sha256(path.read_bytes()).hexdigest())).exists)
        wait_for(lambda: "programs of" in daemon.command("events", "--json").stdout.decode())


def out(daemon: Daemon, script: str, **changes: Any) -> str:
    result = daemon.run(script, **changes)
    stdout, stderr = daemon.logs(result.task)
    assert result.exit_code == 0, (result, stderr, daemon.log.read_text()[-3000:])
    return stdout.decode().strip()


def moved(big: Big) -> int:
    return big.proxy.body_bytes(BLOBS)


# --- how much is moved


def test_a_task_that_touches_a_hundredth_moves_less_than_a_tenth(tmp_path: Path, big: Big) -> None:
    with cold(tmp_path, big) as daemon:
        assert out(daemon, "cat /data/7 /data/42 | md5sum").split()[0] == md5(7, 42)
        assert moved(big) < big.bytes / 10
        assert f"image mount {big.reference}" in processes(daemon)


def test_an_image_with_tables_of_contents_is_not_downloaded_to_be_known(
    tmp_path: Path, registry: RunningRegistry, proxy: Proxy
) -> None:
    """Not even the first time, by a node that has no archive of it."""
    large = b"".join(content(1000 + number) for number in range(8))
    layers = [
        zstd_chunked(*busybox_members()),
        estargz(
            directory("data"), *(member(f"data/{number}", content(number)) for number in range(20)), member("large", large)
        ),
        estargz(member("data/.wh.3"), hard_link("linked", "large"), chunk_bytes=64 << 10),
    ]
    repository = registry.repository("tabled")
    repository.push(*(layer.tar for layer in layers), tag="1", process={"Env": ["PATH=/bin"]}, **images(layers))
    proxy.behave()
    proxy.forget()
    with running(tmp_path, f"{proxy.address}/tabled:1") as daemon:
        assert out(daemon, "cat /data/7 /data/12 | md5sum; ls /data | wc -l; stat -c %h /linked").split() == [
            md5(7, 12),
            "-",
            "19",
            "2",
        ]
        assert proxy.body_bytes(BLOBS) < 8 * MIB
        assert (
            out(daemon, "cat /linked /data/4 /bin/busybox | md5sum").split()[0]
            == hashlib.md5(large + content(4) + Path("/bin/busybox").read_bytes()).hexdigest()
        )


def test_a_few_bytes_from_the_middle_of_a_large_file_move_little(tmp_path: Path, big: Big) -> None:
    with cold(tmp_path, big) as daemon:
        digest = hashlib.md5(content(1050)[: 64 << 10]).hexdigest()
        assert out(daemon, "dd if=/large bs=64k skip=800 count=1 2>/dev/null | md5sum").split()[0] == digest
        assert moved(big) < 6 * MIB


def test_two_tasks_that_read_the_same_cold_file_fetch_it_once(tmp_path: Path, big: Big) -> None:
    with cold(tmp_path, big) as daemon:
        out(daemon, "true")
        big.proxy.forget()
        big.proxy.on(BLOBS, throttle(4 * MIB))  # so that both are under way
        tasks = [daemon.submit("cat /data/1 /data/2 /data/3 /data/4 | md5sum") for _ in range(2)]
        for task in tasks:
            assert daemon.result(task).exit_code == 0
            assert daemon.logs(task)[0].split()[0].decode() == md5(1, 2, 3, 4)
        # By what came: an answer that stands still for seconds is left, and what it lacks is asked for anew.
        came = sorted(
            (exchange.path, exchange.range[0], exchange.body_bytes) for exchange in big.proxy.seen(BLOBS) if exchange.range
        )
        assert came
        for (blob, first, size), (other, second, _) in itertools.pairwise(came):
            assert blob != other or first + size <= second + (64 << 10), came  # neighbours may share a few bytes
        assert processes(daemon).count(f"image mount {big.reference}") == 1


def test_what_was_read_is_kept_and_a_later_task_needs_no_server(tmp_path: Path, big: Big) -> None:
    with cold(tmp_path, big, AERIE_IMAGE_IDLE_UNMOUNT="1s") as daemon:
        every = out(daemon, "cat /data/* /large /etc/data | md5sum; cat /bin/busybox | md5sum")
        wait_without(daemon, f"image mount {big.reference}")
        big.proxy.forget()
        assert out(daemon, "cat /data/* /large /etc/data | md5sum; cat /bin/busybox | md5sum") == every
        assert moved(big) == 0
        assert f"image mount {big.reference}" not in processes(daemon)


def wait_without(daemon: Daemon, process: str, timeout_s: float = 60.0) -> None:
    deadline = time.monotonic() + timeout_s
    while process in processes(daemon):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_cache_that_somebody_emptied_is_filled_again(tmp_path: Path, big: Big) -> None:
    with cold(tmp_path, big, AERIE_IMAGE_IDLE_UNMOUNT="0s") as daemon:
        for _ in range(2):
            out(daemon, "cat /data/* /large /bin/busybox | wc -c")
            wait_without(daemon, f"image mount {big.reference}")
            daemon.wait_released()
        assert moved(big) < big.bytes * 1.1
        for directory in (daemon.state / "images/cache").iterdir():
            if directory.is_dir():
                for file in directory.iterdir():
                    file.unlink(missing_ok=True)
        assert out(daemon, "md5sum /data/9").split()[0] == md5(9)


def test_image_mount_gives_a_lazy_root(tmp_path: Path, big: Big) -> None:
    with cold(tmp_path, big) as daemon:
        mounted = json.loads(daemon.command("image", "mount", "--json", big.reference).stdout)
        path = Path(mounted["path"])
        assert hashlib.md5((path / "data/3").read_bytes()).hexdigest() == md5(3)
        assert moved(big) < big.bytes / 10
        assert daemon.command("image", "unmount", mounted["lease"]).returncode == 0


# --- the registry goes away


@pytest.mark.parametrize("away", ["silent", "refusing"])
def test_without_the_registry_what_is_here_works_and_the_rest_says_why(tmp_path: Path, big: Big, away: str) -> None:
    with cold(tmp_path, big, AERIE_MOUNT_READ_TIMEOUT="4s") as daemon:
        out(daemon, "cat /data/7 /bin/busybox | wc -c")
        big.proxy.on("", silent() if away == "silent" else status(503))
        assert out(daemon, "md5sum /data/7").split()[0] == md5(7)
        task = daemon.submit("cat /data/90")
        shown = json.loads(daemon.command("result", "--json", "--wait", "50s", task).stdout)
        assert shown["duration_s"] < 25  # and not the 30 s that reads have otherwise
        assert (shown["state"], shown["exit_code"]) == ("stopped", 1)
        assert b"Input/output error" in daemon.logs(task)[1]
        assert "a read failed" in shown["error"] and big.reference.split("/")[0] in shown["error"], shown["error"]
        # Another task is told as well, and one that reads nothing of it is not.
        for task in [daemon.submit("cat /data/90") for _ in range(10)]:
            again = daemon.result(task)
            assert again.exit_code == 1 and again.error and "a read failed" in again.error
        assert daemon.run("md5sum /data/7").error is None
        big.proxy.behave()
        time.sleep(1)  # what failed after a long time is not tried again at once
        assert out(daemon, "md5sum /data/90").split()[0] == md5(90)


def test_a_command_that_cannot_be_fetched_says_why(tmp_path: Path, big: Big) -> None:
    with cold(tmp_path, big, AERIE_MOUNT_READ_TIMEOUT="4s") as daemon:
        out(daemon, "true")
        big.proxy.on(BLOBS, status(503))
        result = daemon.run(["/data/5"])
        assert result.exit_code != 0
        assert result.error and "a read failed" in result.error, result


def test_a_task_that_waits_for_a_silent_registry_is_stopped_at_once(tmp_path: Path, big: Big) -> None:
    with cold(tmp_path, big, AERIE_MOUNT_READ_TIMEOUT="10m") as daemon:
        out(daemon, "true")
        big.proxy.on("", silent())
        reading, executing = daemon.submit("cat /data/50"), daemon.submit(["/data/51"])
        daemon.wait_running(reading)
        wait_for(lambda: queued(lazy_layer(daemon).minor) >= 2)
        begun = time.monotonic()
        for task in (reading, executing):
            daemon.client.ask(Stop(daemon.client.number(), task, force=True), timeout_s=60)
        assert {daemon.result(task).reason for task in (reading, executing)} <= {"cancelled", None}
        assert time.monotonic() - begun < 60  # the reads have ten minutes


def test_a_daemon_that_stops_waits_for_no_registry(tmp_path: Path, big: Big) -> None:
    with cold(tmp_path, big, AERIE_DAEMON_DRAIN_TIMEOUT="1s", AERIE_MOUNT_READ_TIMEOUT="10m") as daemon:
        out(daemon, "true")
        big.proxy.on("", silent())
        daemon.wait_running(daemon.submit("cat /data/50"))
        wait_for(lambda: queued(lazy_layer(daemon).minor) >= 1)
        begun = time.monotonic()
    assert time.monotonic() - begun < 60  # the read has ten minutes


def test_an_image_is_mounted_and_unmounted_again_and_again(tmp_path: Path, big: Big) -> None:
    with cold(tmp_path, big, AERIE_IMAGE_IDLE_UNMOUNT="0s") as daemon:
        before: list[int] = []
        for number in range(12):
            assert out(daemon, f"md5sum /data/{number}").split()[0] == md5(number)
            wait_without(daemon, f"image mount {big.reference}")
            daemon.wait_released()
            before = before or held(daemon)
        wait_for(lambda: all(now <= then for now, then in zip(held(daemon), before, strict=True)))
        tasks = [daemon.submit(f"md5sum /data/{number}") for number in range(12, 24)]
        for number, task in enumerate(tasks, 12):
            assert daemon.result(task).exit_code == 0
            assert daemon.logs(task)[0].split()[0].decode() == md5(number)
        wait_without(daemon, f"image mount {big.reference}")
        daemon.wait_released()
        wait_for(lambda: not mounts_below(str(daemon.run_dir / "images")))


def held(daemon: Daemon) -> list[int]:
    """How many descriptors keeper and root supervisor have."""
    return [len(os.listdir(f"/proc/{pid}/fd")) for pid in (daemon.wait_pid("keeper"), daemon.wait_pid("root supervisor"))]


def test_an_image_is_fetched_from_where_it_was_named_last(tmp_path: Path, big: Big, registry: RunningRegistry) -> None:
    with cold(tmp_path, big, AERIE_IMAGE_IDLE_UNMOUNT="0s") as daemon:
        out(daemon, "md5sum /data/1")
        wait_without(daemon, f"image mount {big.reference}")
        big.proxy.on("", status(503))  # it was there once, and is no more
        elsewhere = f"{registry.address}/big:1"
        task = daemon.submit("until [ -e /go ]; do sleep 0.1; done; md5sum /data/2", image=elsewhere)
        daemon.wait_running(task)
        os.kill(daemon.pid_of("root supervisor"), signal.SIGKILL)
        daemon.close_client()
        with suppress(ProcessLookupError):  # it was replaced meanwhile
            os.kill(daemon.wait_pid(f"image mount {elsewhere}"), signal.SIGKILL)  # the next one knows it, too
        (daemon.run_dir / "tasks" / task / "root/go").touch()
        assert daemon.result(task).exit_code == 0
        assert daemon.logs(task)[0].split()[0].decode() == md5(2)


# --- kills


@pytest.mark.parametrize(
    ("names", "number"),
    [
        (["image mount"], signal.SIGKILL),
        (["image mount"], signal.SIGSTOP),
        (["root supervisor"], signal.SIGKILL),
        (["keeper"], signal.SIGKILL),
        (["keeper", "root supervisor"], signal.SIGKILL),
        (["image mount", "root supervisor"], signal.SIGKILL),
        (["image mount", "fork server"], signal.SIGKILL),
    ],
)
def test_a_kill_while_cold_content_is_read_costs_nothing(
    tmp_path: Path, big: Big, names: list[str], number: signal.Signals
) -> None:
    numbers = range(40)
    with cold(tmp_path, big) as daemon:
        out(daemon, "true")
        big.proxy.on(BLOBS, throttle(2 * MIB))
        names = [f"image mount {big.reference}" if name == "image mount" else name for name in names]
        task = daemon.submit(f"cd /data; for i in {' '.join(map(str, numbers))}; do md5sum $i || exit 9; done")
        journal = daemon.state / "tasks" / task / "output/journal"
        wait_for(lambda: journal.exists() and journal.stat().st_size > 0)  # it is in the middle of it
        struck: dict[str, int] = {}
        for _ in range(4 if number == signal.SIGKILL and "keeper" not in names else 2):
            time.sleep(0.3)
            struck = {name: daemon.wait_pid(name, other_than=struck.get(name, 0)) for name in names}
            for pid in struck.values():
                with suppress(ProcessLookupError):  # of two servers that took its place, this was the one that had to go
                    os.kill(pid, number)
            daemon.close_client()
            if "keeper" in names:
                daemon.start()
        big.proxy.behave()
        result = daemon.result(task)
        stdout, stderr = daemon.logs(task)
        assert (result.exit_code, result.error) == (0, None), (result, stderr, daemon.log.read_text()[-3000:])
        sums = [line.split()[0] for line in stdout.decode().splitlines()]
        assert sums == [md5(number) for number in numbers]
        assert not daemon.own_faults()


def test_what_is_read_after_keeper_and_root_supervisor_were_killed_is_kept(tmp_path: Path, big: Big) -> None:
    """The spool that they held is gone; the next server has the one from which the next root supervisor publishes."""
    with cold(tmp_path, big) as daemon:
        task = daemon.submit("until [ -e /go ]; do sleep 0.1; done; md5sum /data/12")
        daemon.wait_running(task)
        server = daemon.wait_pid(f"image mount {big.reference}")
        daemon.kill_supervisors()
        daemon.start()
        daemon.wait_pid(f"image mount {big.reference}", other_than=server)
        (daemon.run_dir / "tasks" / task / "root/go").touch()
        assert daemon.result(task).exit_code == 0
        assert daemon.logs(task)[0].split()[0].decode() == md5(12)
        wait_for((daemon.state / "images/cache" / Objects.path(hashlib.sha256(content(12)).hexdigest())).exists)


def test_take_over_under_a_task_that_reads_cold_content(tmp_path: Path, big: Big) -> None:
    with cold(tmp_path, big) as daemon:
        out(daemon, "true")
        big.proxy.on(BLOBS, throttle(2 * MIB))
        task = daemon.submit("cd /data; for i in 0 1 2 3 4 5 6 7 8 9; do md5sum $i || exit 9; done")
        journal = daemon.state / "tasks" / task / "output/journal"
        wait_for(lambda: journal.exists() and journal.stat().st_size > 0)
        pid = daemon.wait_pid(f"image mount {big.reference}")
        daemon.close_client()
        daemon.start("--take-over")
        big.proxy.behave()
        result = daemon.result(task)
        assert (result.exit_code, result.error) == (0, None)
        assert [line.split()[0] for line in daemon.logs(task)[0].decode().splitlines()] == [md5(number) for number in range(10)]
        # It was adopted, and not replaced, unless it had no processor for too long: then it was told to say where it hangs (SIGABRT).
        assert daemon.wait_pid(f"image mount {big.reference}") == pid or "killed by signal 6" in daemon.log.read_text()


def test_a_task_keeps_its_image_when_the_daemon_is_killed_and_forgets_who_leased(tmp_path: Path, big: Big) -> None:
    with cold(tmp_path, big, AERIE_IMAGE_IDLE_UNMOUNT="1s") as daemon:
        task = daemon.submit("until [ -e /go ]; do sleep 0.1; done; md5sum /data/11")
        daemon.wait_running(task)
        os.kill(daemon.pid_of("root supervisor"), signal.SIGKILL)
        daemon.close_client()
        time.sleep(3)
        assert f"image mount {big.reference}" in processes(daemon)
        (daemon.run_dir / "tasks" / task / "root/go").touch()
        assert daemon.result(task).exit_code == 0
        assert daemon.logs(task)[0].split()[0].decode() == md5(11)
        wait_without(daemon, f"image mount {big.reference}")


# --- bounds of an image's server


def lazy_layer(daemon: Daemon) -> Mount:
    [found] = [mount for mount in mounts_below(str(daemon.run_dir / "images")) if mount.kind == "fuse"]
    return found


def object_path(daemon: Daemon, data: bytes) -> str:
    return f"{lazy_layer(daemon).target}/{Objects.path(hashlib.sha256(data).hexdigest())}"


def read_at(places: Sequence[tuple[str, int]]) -> None:
    """Read 1 MiB at each place, all at once, each in a thread of its own and past the page cache; what is wrong is an exit code of 1."""
    threading.stack_size(64 << 10)
    wrong = []

    def read(path: str, offset: int) -> None:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        with mmap.mmap(-1, MIB) as room:
            if os.preadv(file, [room], offset) != MIB:
                wrong.append(offset)
        os.close(file)

    threads = [threading.Thread(target=read, args=place) for place in places]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_thousand_large_reads_at_once_take_little_memory(tmp_path: Path, big: Big) -> None:
    large = b"".join(content(1000 + number) for number in range(LARGE_MIB))
    step = (LARGE_MIB - 1) * MIB // READS // 4096 * 4096
    with cold(tmp_path, big, AERIE_MOUNT_READ_TIMEOUT="5m") as daemon:
        daemon.wait_running(daemon.submit("sleep 1000", task="sleeper"))
        pid, minor, path = daemon.wait_pid(f"image mount {big.reference}"), lazy_layer(daemon).minor, object_path(daemon, large)
        big.proxy.on(BLOBS, silent())  # until all of them wait
        readers = fork(lambda: read_at([(path, number * step) for number in range(READS)]))
        peak_bytes = 0
        try:
            wait_for(lambda: queued(minor) >= READS)
        finally:
            big.proxy.behave()
            big.proxy.hang_up()
        while os.waitid(os.P_PID, readers, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
            peak_bytes = max(peak_bytes, private_bytes(pid))
            time.sleep(0.01)
        assert wait_in_time(readers) == 0
        assert MIB < peak_bytes < 64 * MIB
        assert daemon.wait_pid(f"image mount {big.reference}") == pid  # nobody took it for hung meanwhile
        daemon.client.ask(Stop(daemon.client.number(), "sleeper", force=True), timeout_s=60)


def test_stuck_reads_delay_nobody_whose_data_is_ready(tmp_path: Path, big: Big) -> None:
    large = b"".join(content(1000 + number) for number in range(LARGE_MIB))
    with cold(tmp_path, big, AERIE_MOUNT_READ_TIMEOUT="5m") as daemon:
        daemon.wait_running(daemon.submit("cat /data/7 > /dev/null; sleep 1000", task="sleeper"))
        ready, minor = object_path(daemon, content(7)), lazy_layer(daemon).minor
        in_child(lambda: read_at([(ready, 0)]))
        big.proxy.on("", silent())
        cold_files = [(object_path(daemon, content(number)), 0) for number in range(FILES) if number != 7]
        places = cold_files + [(object_path(daemon, large), number * 3 * MIB) for number in range(STUCK - len(cold_files))]
        readers = fork(lambda: read_at(places))
        try:
            wait_for(lambda: queued(minor) >= STUCK)

            def timed() -> float:
                begun = time.monotonic()
                read_at([(ready, 0)])
                return time.monotonic() - begun

            assert any(statistics.median(in_child(lambda: [timed() for _ in range(9)])) < READY_S for _ in range(30))
        finally:
            os.kill(readers, signal.SIGKILL)
            big.proxy.behave()
            big.proxy.on("", status(404))  # their reads end at once
            big.proxy.hang_up()
            os.waitpid(readers, 0)
        daemon.client.ask(Stop(daemon.client.number(), "sleeper", force=True), timeout_s=60)
