"""What is wrong is said clearly, and nothing is left behind; the daemon goes on."""

from __future__ import annotations

import errno
import gzip
import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing
from pathlib import Path

import pytest

from actors.gateway.client import Client, RequestFailed
from actors.gateway.messages import ANSWERS, FRAME_BYTES_MAX, Ended, Failed, ListTasks, Ready, Stop, Submit, Wait
from actors.lazytree import mounts
from supervisor.frames import LENGTH, Codec, FrameBuffer
from tests.actors.image.images import RunningRegistry, digest, member, symlink, tar
from tests.node.conftest import busybox_members, own_disk
from tests.node.daemon import PATIENCE_S, Daemon, name_of, running, state_of

# --- images ---


@pytest.mark.parametrize(
    ("reference", "told"),
    [
        ("{registry}/no-such-image:1", "no-such-image"),
        ("{registry}/busybox:no-such-tag", "no-such-tag"),
        ("127.0.0.1:9/image:1", "127.0.0.1:9"),
        ("UPPER/case", "UPPER"),
        ("a b", "a b"),
    ],
)
def test_an_image_that_cannot_be_had_is_named(daemon: Daemon, registry: RunningRegistry, reference: str, told: str) -> None:
    result = daemon.run("true", image=reference.format(registry=registry.address))
    assert (result.state, result.reason, result.exit_code) == ("failed", None, None)
    assert result.error is not None and told in result.error


def test_a_blob_that_is_not_what_its_digest_says(daemon: Daemon, registry: RunningRegistry) -> None:
    repository = registry.repository("tampered")
    layer = tar(member("file", os.urandom(100_000)))
    repository.push(layer)
    blob = repository.blob_file(digest(gzip.compress(layer, 1, mtime=0)))
    content = bytearray(blob.read_bytes())
    content[len(content) // 2] ^= 1
    blob.write_bytes(content)
    result = daemon.run("true", image=repository.reference())
    assert result.state == "failed" and result.error is not None and "digest" in result.error.lower()


@pytest.mark.parametrize(
    ("name", "layer"),
    [
        ("dotdot", tar(member("../outside", b"x"))),
        ("climbing", tar(symlink("way", "/../../.."), member("way/outside", b"x"))),
    ],
)
def test_a_layer_that_climbs_out_of_the_root(daemon: Daemon, registry: RunningRegistry, name: str, layer: bytes) -> None:
    repository = registry.repository(name)
    repository.push(layer)
    result = daemon.run("true", image=repository.reference())
    assert result.state == "failed" and result.error
    assert not (daemon.state.parent / "outside").exists()


@pytest.mark.parametrize("cut", ["truncated", "corrupt"])
def test_a_broken_layer(daemon: Daemon, registry: RunningRegistry, cut: str) -> None:
    repository = registry.repository(cut)
    layer = tar(member("file", os.urandom(100_000)))
    packed = gzip.compress(layer, 1, mtime=0)
    blob = packed[: len(packed) // 2] if cut == "truncated" else packed[:1000] + os.urandom(1000) + packed[2000:]
    repository.push(layer, blobs=[blob])
    result = daemon.run("true", image=repository.reference())
    assert result.state == "failed" and result.error


def test_a_decompression_bomb_ends_within_its_bounds(tmp_path: Path, image: str, registry: RunningRegistry) -> None:
    repository = registry.repository("bomb")
    repository.push(tar(*(member(f"zeros-{number}", bytes(8 << 20)) for number in range(16))))
    with running(tmp_path, image, AERIE_IMAGE_UNPACKED_MAX="64Mi") as daemon:
        result = daemon.run("true", image=repository.reference())
        assert result.state == "failed" and result.error is not None and "bound" in result.error
        assert daemon.run("true").exit_code == 0


# --- commands ---


@pytest.mark.parametrize("runtime", ["crun", "runc"])
@pytest.mark.parametrize(
    ("command", "failure"),
    [
        (["/no/such/command"], "not_found"),
        (["no-such-command"], "not_found"),
        (["/etc/passwd"], "not_executable"),
        (["/etc"], "not_executable"),
    ],
)
def test_a_command_that_cannot_be_executed_never_ran(daemon: Daemon, runtime: str, command: list[str], failure: str) -> None:
    result = daemon.run(command, runtime=runtime)
    assert (result.state, result.reason, result.failure) == ("failed", None, failure), result
    assert result.error is not None and command[0] in result.error


# --- requests ---


@pytest.mark.parametrize(
    "changes",
    [
        {"workspace": "../up"},
        {"workspace": "a/b"},
        {"workspace": ""},
        {"memory_bytes": 1},
        {"cpu_cores": 0.0},
        {"timeout_s": -1.0},
        {"image": ""},
        {"env": {"A=B": "c"}},
    ],
)
def test_a_wrong_request_is_refused_with_its_faults(daemon: Daemon, changes: dict[str, object]) -> None:
    with pytest.raises(RequestFailed) as refused:
        daemon.submit("true", **changes)
    assert refused.value.kind == "invalid" and str(refused.value)


@pytest.mark.parametrize("task", ["../x", "a/b", "", ".", "x" * 200, "white space"])
def test_an_id_that_is_no_name_is_refused(daemon: Daemon, task: str) -> None:
    with pytest.raises(RequestFailed, match=r"\w"):
        daemon.client.ask(Submit(daemon.client.number(), task, daemon.spec("true"), wait=False))


@pytest.mark.parametrize("timeout_s", [float("nan"), float("inf"), -1.0, 1e300])
def test_a_wait_that_is_no_time_is_refused(daemon: Daemon, timeout_s: float) -> None:
    task = daemon.submit("sleep 0.2")
    with pytest.raises(RequestFailed, match="from 0 to ten years") as refused:
        daemon.client.ask(Wait(daemon.client.number(), task, timeout_s))
    assert refused.value.kind == "invalid"
    assert daemon.result(task).exit_code == 0


def test_a_full_queue_says_so(tmp_path: Path, image: str) -> None:
    with running(
        tmp_path, image, AERIE_GATEWAY_PARALLEL="1", AERIE_GATEWAY_QUEUE="2", AERIE_DAEMON_DRAIN_TIMEOUT="0s"
    ) as daemon:
        for number in range(3):
            daemon.submit(["/bin/sleep", "100"], task=f"long-{number}")
        with pytest.raises(RequestFailed) as refused:
            daemon.submit("true", task="one-too-many")
        assert refused.value.kind == "busy"


# --- the socket ---


@pytest.fixture
def raw(daemon: Daemon) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX) as connection:
        connection.settimeout(30)
        connection.connect(str(daemon.run_dir / "aerie.sock"))
        yield connection


def read_answer(connection: socket.socket) -> object:
    buffer = FrameBuffer(Codec(*ANSWERS, size_bytes_max=FRAME_BYTES_MAX))
    while True:
        for answer in buffer:
            return answer
        data = connection.recv(65536)
        assert data
        buffer.feed(data)


@pytest.mark.parametrize("sent", [b"\0\0\0\x04junk", b"GET / HTTP/1.1\r\n\r\n", LENGTH.pack(1 << 30) + b"x" * 1000])
def test_what_is_no_request_is_answered_and_the_connection_closed(daemon: Daemon, raw: socket.socket, sent: bytes) -> None:
    raw.sendall(sent)
    answer = read_answer(raw)
    assert isinstance(answer, Failed) and (answer.request, answer.kind) == (0, "invalid")
    assert raw.recv(1) == b""
    assert daemon.run("true").exit_code == 0


def test_a_client_that_dies_in_mid_answer_takes_nothing_with_it(daemon: Daemon, raw: socket.socket) -> None:
    codec = Codec(Ready, Submit, ListTasks, size_bytes_max=FRAME_BYTES_MAX)
    raw.sendall(codec.frame(Submit(1, "orphan", daemon.spec("sleep 0.3; exit 8"), wait=True)))
    for number in range(2, 300):
        raw.sendall(codec.frame(ListTasks(number)))
    raw.close()
    assert daemon.result("orphan").exit_code == 8


def test_the_socket_is_roots_alone(daemon: Daemon) -> None:
    assert (daemon.run_dir / "aerie.sock").stat().st_mode & 0o777 == 0o600


def test_more_clients_than_the_bound_are_turned_away(tmp_path: Path, image: str) -> None:
    with running(tmp_path, image, AERIE_GATEWAY_CONNECTIONS="2") as daemon:
        daemon.close_client()
        with ExitStack() as clients:
            for _ in range(2):
                clients.enter_context(closing(Client(daemon.run_dir)))
            one_too_many = clients.enter_context(closing(Client(daemon.run_dir)))
            with pytest.raises(RequestFailed, match="2 clients"):
                one_too_many.ask(Ready(1))


# --- a full disk ---

SMALL_BYTES = 64 << 20


def fill(disk: Path) -> Path:
    """Take every byte of a disk, down to the last → the file that has them."""
    ballast = disk / "ballast"
    with open(ballast, "wb", buffering=0) as file:
        for size_bytes in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size_bytes))
            except OSError as error:
                assert error.errno == errno.ENOSPC
    return ballast


def test_a_full_state_disk_takes_no_task_and_is_outlived(tmp_path: Path, image: str) -> None:
    with own_disk(tmp_path, SMALL_BYTES) as disk:
        home = disk / "home"
        home.mkdir()
        with running(home, image) as daemon:
            assert daemon.run("true").exit_code == 0
            daemon.wait_released()
            ballast = fill(disk)
            for _ in range(3):
                with pytest.raises(RequestFailed, match=f"{daemon.state} is full: free space") as refused:
                    daemon.run("true")
                assert refused.value.kind == "disk_full"
            ballast.unlink()
            assert daemon.run("echo kept > file", workspace="after").sync == "synced"
            daemon.wait_released()


def test_tasks_that_run_when_the_state_disk_fills_have_their_results(tmp_path: Path, image: str) -> None:
    with own_disk(tmp_path, SMALL_BYTES) as disk:
        home = disk / "home"
        home.mkdir()
        with running(home, image) as daemon:
            tasks = [daemon.submit("until [ -e /tmp/go ]; do sleep 0.1; done; exit 7") for _ in range(8)]
            for task in tasks:
                daemon.wait_running(task)
            fill(disk)
            for task in tasks:
                daemon.client.ask(Stop(daemon.client.number(), task, force=True), timeout_s=60)
            assert {daemon.result(task).reason for task in tasks} == {"cancelled"}
            daemon.close_client()
            os.kill(daemon.pid_of("root supervisor"), signal.SIGKILL)
            assert {daemon.result(task).reason for task in tasks} == {"cancelled"}  # they are durable
            (disk / "ballast").unlink()
            daemon.wait_released()


def test_a_disk_that_stands_still_costs_time_and_nothing_else(tmp_path: Path, image: str, registry: RunningRegistry) -> None:
    """Longer than a builder may be silent: who waits for a disk does not hang.  Nor is conmon hurried."""
    repository = registry.repository("slow")
    repository.push(tar(*busybox_members(), member("file", os.urandom(1 << 20))), process={"Env": ["PATH=/bin"]})
    (tmp_path / "node").mkdir()
    with own_disk(tmp_path, SMALL_BYTES) as disk:
        settings = {"AERIE_IMAGE_CACHE_DIR": str(disk / "cache"), "AERIE_IMAGE_FREE_MIN": "0"}
        (tmp_path / "node/daemon.log").symlink_to(disk / "log")
        with running(tmp_path / "node", image, **settings) as daemon:
            output = daemon.state / "tasks/slow/output"
            for directory in (output, disk / "output"):
                directory.mkdir(mode=0o700, parents=True)
            mounts.bind(str(disk / "output"), str(output))
            try:
                task = daemon.submit("echo begun; until [ -e /go ]; do sleep 0.05; done; echo ended; exit 7", task="slow")
                daemon.wait_printed(task, b"begun\n")
                subprocess.run(["fsfreeze", "--freeze", disk], check=True)
                try:
                    built = daemon.submit("exit 8", image=repository.reference())
                    (daemon.run_dir / "tasks" / task / "root/go").touch()
                    deadline = time.monotonic() + PATIENCE_S
                    while not {"conmon", "image builder"} <= {
                        name_of(pid) for pid in daemon.processes() if state_of(pid) == "D"
                    }:
                        assert time.monotonic() < deadline
                    os.kill(daemon.pid_of("fork server"), signal.SIGKILL)  # of which the keeper writes in the log
                    time.sleep(6.0)
                finally:
                    subprocess.run(["fsfreeze", "--unfreeze", disk], check=True)
                result = daemon.result(task)
                assert (result.exit_code, result.gaps, daemon.logs(task)[0]) == (7, 0, b"begun\nended\n")
                assert daemon.result(built).exit_code == 8
                assert "image builder of" not in daemon.log.read_text()
                daemon.wait_released()
                assert "hangs" not in daemon.log.read_text() and daemon.pid_of("keeper") == daemon.pid
            finally:
                mounts.unmount(str(output), lazily=True)


def test_an_ended_answer_is_the_same_however_often_it_is_asked(daemon: Daemon) -> None:
    client = daemon.client
    answers = []
    for _ in range(2):
        request = Submit(client.number(), "twice", daemon.spec("exit 2"), wait=True)
        answer = client.ask(request)
        assert isinstance(answer, Ended)
        answers.append(answer.result)
    assert answers[0] == answers[1]
