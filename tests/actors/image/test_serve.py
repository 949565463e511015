"""An image mount: a forked server on a real FUSE connection, content from a real registry, its parent played by the test."""

from __future__ import annotations

import errno
import itertools
import json
import os
import random
import select
import signal
import threading
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec
import pytest

from actors.image.registry.login import Access, Login
from actors.image.serve import serve
from actors.image.wire import Completed, LoginFound, LoginWanted, ServeImage, Taken
from actors.lazytree import mounts
from actors.lazytree.objects import Objects
from actors.lazytree.server import AGAIN_S
from actors.lazytree.wire import Progress, ReadFailed, Ready
from supervisor.channel import Channel, ChannelTimeout
from supervisor.frames import Codec, Message
from supervisor.isolation import Isolation
from tests.actors.image.images import Repository, RunningRegistry, member, tar
from tests.actors.image.lazy.image import Image, damaged
from tests.actors.image.proxy import Proxy, TokenGate, silent, status, throttle
from tests.actors.lazytree.harness import fork, fork_server, in_child, private_bytes
from tests.actors.lazytree.test_bounds import queued, wait_for

pytestmark = pytest.mark.usefixtures("unhurried")

MIB = 1 << 20
SAYS = Codec(Ready, Progress, ReadFailed, Completed, LoginWanted)


def noise(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


BIG = noise(MIB) * 100  # as much as it says: a mebibyte is far beyond deflate's window
FILES = {"big": BIG, "other": noise(7 * MIB, 1), "small": noise(9000, 2), "program": noise(40_000, 3)}


NOBODY = Access()


class Mount:
    """The LAZY layer of an image, and its servers one after another."""

    def __init__(
        self,
        home: Path,
        image: Image,
        read_timeout_s: float = 60.0,
        access: Access = NOBODY,
        isolation: Isolation | None = None,
    ) -> None:
        self.image = image
        self._isolation = isolation
        self.path = home / "lazy"
        self.path.mkdir()
        self._fuse = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
        self._connection = mounts.mount_fuse(str(self.path), self._fuse)
        self._order = ServeImage(
            archive=image.path,
            reference=str(image.reference),
            objects=image.objects_directory,
            init_request=self._connection.init_request,
            read_timeout_s=read_timeout_s,
            access=access,
        )
        self.pid = 0
        self.serve()
        mounts.tune_fuse(self._connection.minor)

    def serve(self, **fields: Any) -> None:
        """`fields` of its order, from now on."""
        self._order = msgspec.structs.replace(self._order, **fields)
        order = msgspec.structs.replace(self._order, replacement=bool(self.pid))
        descriptors = [self._fuse, self.image.spool]
        if self._isolation:
            process = self._isolation.start("server", "actors.image.serve:serve", order, SAYS, descriptors)
            self.channel, self.pid, self._pidfd = process.channel, process.pid, process.pidfd
        else:
            self.channel, end = Channel.pair(SAYS)

            def run() -> None:
                self.channel.close()
                serve(end, descriptors, Codec(ServeImage).encode(order))

            self.pid = fork(run)
            self._pidfd = os.pidfd_open(self.pid)
            end.close()
        self.next(Ready)

    def next(self, kind: type[Message], timeout_s: float = 60.0) -> Message:
        """What the server says next of that kind."""
        deadline = time.monotonic() + timeout_s
        while True:
            message, _ = self.channel.receive(max(0.01, deadline - time.monotonic()))
            if isinstance(message, kind):
                return message

    def publish(self, wanted: set[int]) -> None:
        """Be the parent until these are published."""
        while wanted:
            message = self.next(Completed)
            assert isinstance(message, Completed)
            wanted = wanted - set(taken := self.image.publish(*message.rows))
            self.channel.send(Taken(taken))

    def kill(self) -> None:
        with suppress(ProcessLookupError):  # it has ended, for its mount is gone, and was reaped
            signal.pidfd_send_signal(self._pidfd, signal.SIGKILL)
        assert select.select([self._pidfd], [], [], 60)[0]
        if not self._isolation:  # else the fork server's to reap
            os.waitpid(self.pid, 0)
        os.close(self._pidfd)
        self.channel.close()

    def idle(self) -> None:
        """Wait until the kernel waits for nothing more, be it read ahead."""
        wait_for(lambda: queued(self._connection.minor) == 0)

    def file(self, content: bytes) -> Path:
        return self.path / Objects.path(self.image.table.row(self.image.find(len(content))).key)

    def read(self, content: bytes, offset: int = 0, size: int | None = None) -> None:
        """Read a part of a file, which must be what it was."""
        path = self.file(content)

        def read() -> bool:
            with open(path, "rb", buffering=0) as file:
                file.seek(offset)
                end = len(content) if size is None else offset + size
                while file.tell() < end:
                    at = file.tell()
                    if file.read(min(MIB, end - at)) != content[at : min(at + MIB, end)]:
                        return False
            return True

        assert in_child(read, 100.0)

    def close(self) -> None:
        mounts.abort_fuse(str(self.path), self._connection.minor)
        mounts.unmount(str(self.path), lazily=True)
        os.close(self._fuse)
        self.kill()


@pytest.fixture(scope="module")
def proxy(registry: RunningRegistry) -> Iterator[Proxy]:
    with Proxy(registry.address) as proxy:
        yield proxy


@pytest.fixture(scope="module")
def pushed(registry: RunningRegistry) -> Repository:
    repository = registry.repository("lazymount")
    layer = tar(*(member(name, content) for name, content in FILES.items()))
    packer = zlib.compressobj(1, zlib.DEFLATED, 31)
    repository.push(layer, blobs=[packer.compress(layer) + packer.flush()])
    return repository


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory, pushed: Repository, proxy: Proxy) -> Iterator[Image]:
    with closing(Image(tmp_path_factory.mktemp("built"), pushed, proxy)) as image:
        yield image


@pytest.fixture
def isolation(tmp_path: Path) -> Iterator[Isolation]:
    with fork_server(tmp_path / "forks", "actors.image.serve") as isolation:
        yield isolation


@pytest.fixture
def mount(tmp_path: Path, built: Image, proxy: Proxy) -> Iterator[Callable[..., Mount]]:
    """Makes mounts of the image, none of whose content is here."""
    proxy.behave()
    proxy.hang_up()
    proxy.settle()
    proxy.forget()
    with ExitStack() as stack:

        def make(**fields: Any) -> Mount:
            image = stack.enter_context(closing(built.elsewhere(tmp_path)))
            return stack.enter_context(closing(Mount(tmp_path, image, **fields)))

        yield make
        proxy.behave()


def test_64_kib_in_the_middle_of_100_mb_move_less_than_6_mb(mount: Callable[..., Mount]) -> None:
    mounted = mount()
    mounted.read(BIG, 50_123_456, 65_536)
    assert 0 < mounted.image.moved_bytes() < 6_000_000
    print(mounted.image.moved_bytes())


def test_two_tasks_that_read_the_same_cold_file_fetch_it_once(mount: Callable[..., Mount], proxy: Proxy) -> None:
    mounted = mount()
    proxy.on("/blobs/", throttle(30e6))
    content = FILES["other"]
    path = mounted.file(content)

    def read() -> None:
        assert path.read_bytes() == content

    children = [fork(read) for _ in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    ranges = mounted.image.ranges()
    assert all(stop <= begin + 1 for (_, stop), (begin, _) in itertools.pairwise(ranges))
    assert mounted.image.moved_bytes() < len(content) * 1.5


def test_what_was_read_whole_is_published_and_its_place_is_free(mount: Callable[..., Mount]) -> None:
    mounted = mount()
    for name in ("other", "small", "program"):
        mounted.read(FILES[name])
    mounted.publish({mounted.image.find(len(FILES[name])) for name in ("other", "small", "program")})
    for name in ("other", "small", "program"):
        key = mounted.image.table.row(mounted.image.find(len(FILES[name]))).key
        assert (Path(mounted.image.objects_directory) / Objects.path(key)).read_bytes() == FILES[name]
    deadline = time.monotonic() + 60
    while os.fstat(mounted.image.spool).st_blocks * 512 > 3 * MIB:  # what is left is of the file that was not read whole
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_what_nobody_takes_is_said_again(mount: Callable[..., Mount], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.image.serve.SAY_AGAIN_S", 0.2)
    mounted = mount()
    mounted.read(FILES["small"])
    first = mounted.next(Completed)
    assert mounted.next(Completed) == first
    assert isinstance(first, Completed)
    mounted.channel.send(Taken(first.rows))
    deadline = time.monotonic() + 60
    with pytest.raises(ChannelTimeout):
        while time.monotonic() < deadline:  # what it had said before it heard of that
            mounted.next(Completed, 1.0)


def test_a_replacement_goes_on_with_the_spool_of_the_one_before(mount: Callable[..., Mount], proxy: Proxy) -> None:
    mounted = mount()
    mounted.read(BIG, 3 * MIB, 2 * MIB)
    mounted.read(FILES["small"])
    mounted.idle()
    mounted.kill()
    proxy.settle()
    proxy.forget()
    mounted.serve()
    assert in_child(lambda: os.system("echo 1 > /proc/sys/vm/drop_caches")) == 0
    mounted.read(BIG, 3 * MIB, 2 * MIB)
    mounted.read(FILES["small"])
    assert mounted.image.ranges() == []
    said = mounted.next(Completed)
    assert isinstance(said, Completed)
    assert mounted.image.find(len(FILES["small"])) in said.rows


def test_a_server_killed_in_the_middle_of_a_fetch_is_no_error(mount: Callable[..., Mount], proxy: Proxy) -> None:
    mounted = mount()
    proxy.on("/blobs/", throttle(2e6))
    content = FILES["other"]
    path = mounted.file(content)

    def read() -> None:
        assert path.read_bytes() == content

    reader = fork(read)
    for _ in range(3):
        time.sleep(0.3)
        mounted.kill()
        mounted.serve()
    proxy.behave()
    assert os.waitpid(reader, 0)[1] == 0


def test_damaged_content_is_eio_with_the_reason_and_never_bytes(mount: Callable[..., Mount], proxy: Proxy) -> None:
    mounted = mount()
    proxy.on("/blobs/", damaged)
    content = FILES["other"]
    path = mounted.file(content)

    def read() -> int:
        """Read it by the mebibyte → how many of them are an error; all others are right."""
        errors = 0
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            for at in range(0, len(content), MIB):
                try:
                    data = os.pread(file.fileno(), MIB, at)
                except OSError as error:
                    assert error.errno == errno.EIO
                    data = b""
                assert data == content[at : at + len(data)]
                errors += len(data) < MIB
        return errors

    assert in_child(read, 100.0)
    failed = mounted.next(ReadFailed)
    assert isinstance(failed, ReadFailed)
    assert "is damaged" in failed.reason
    proxy.behave()
    time.sleep(1.1 * AGAIN_S)  # for so long what took long to fail is not tried again
    mounted.read(content)


def test_a_registry_that_is_away_is_eio_within_the_time_and_what_is_here_is_read(
    mount: Callable[..., Mount], proxy: Proxy
) -> None:
    mounted = mount()
    mounted.read(FILES["small"])
    mounted.kill()
    mounted.serve(read_timeout_s=1.0)
    proxy.on("/blobs/", silent())
    path = mounted.file(FILES["other"])
    begin = time.monotonic()
    with pytest.raises(OSError, match="Input/output error"):
        in_child(path.read_bytes)
    assert time.monotonic() - begin < 30.0  # the registry would be silent for longer
    assert mounted.next(ReadFailed)
    mounted.read(FILES["small"])
    proxy.behave()
    proxy.on("/blobs/", status(401))
    mounted.read(FILES["small"])


def test_a_thousand_reads_at_once_take_little_memory(mount: Callable[..., Mount], isolation: Isolation) -> None:
    mounted = mount(isolation=isolation, read_timeout_s=300.0)
    path = mounted.file(BIG)
    most = 0

    def read() -> None:
        with open(path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
            for number in range(100):
                os.posix_fadvise(file.fileno(), number * MIB, MIB, os.POSIX_FADV_WILLNEED)
            for number in range(100):
                assert os.pread(file.fileno(), MIB, number * MIB) == BIG[number * MIB : (number + 1) * MIB]

    readers = [fork(read) for _ in range(10)]
    while readers:
        most = max(most, private_bytes(mounted.pid))
        pid, code = os.waitpid(readers[0], os.WNOHANG)
        if pid:
            assert code == 0
            readers.pop(0)
        time.sleep(0.02)
    assert MIB < most < 64 * MIB


@pytest.mark.parametrize("brought", [True, False])
def test_credentials_that_run_out_are_renewed_while_the_image_is_mounted(
    mount: Callable[..., Mount], proxy: Proxy, brought: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server may read no file of root's any more; its parent may."""
    registry = f"{proxy.address}"
    gate = TokenGate(proxy)
    gate.passwords = {"me": "old"}
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    if not brought:
        (tmp_path / "config.json").write_text(json.dumps({"auths": {registry: {"username": "me", "password": "old"}}}))
    mounted = mount(access=Access(Login("me", "old")) if brought else NOBODY)
    mounted.read(BIG, 0, 100_000)

    gate.passwords = {"me": "new"}
    gate.revoke()
    said: list[Message] = []

    def parent(found: LoginFound, done: threading.Event) -> None:
        """Answer whenever it is asked, which may be twice: of two fetches at once."""
        while not done.is_set():
            try:
                said.append(mounted.next(Message, 0.05))
            except ChannelTimeout:
                continue
            if isinstance(said[-1], LoginWanted):
                mounted.channel.send(found)

    @contextmanager
    def answering(found: LoginFound) -> Iterator[None]:
        said.clear()
        thread = threading.Thread(target=parent, args=(found, done := threading.Event()))
        thread.start()
        try:
            yield
        finally:
            done.set()
            thread.join()

    with answering(LoginFound(registry, Login("me", "new"))):
        mounted.read(BIG, 30 * MIB, 100_000)
    assert LoginWanted(registry) in said
    mounted.read(BIG, 60 * MIB, 100_000)

    gate.passwords = {"me": "newer"}
    gate.revoke()

    with (
        answering(LoginFound(registry, None, "docker-credential-x failed: no keyring")),
        pytest.raises(OSError, match="Input/output error"),
    ):
        mounted.read(BIG, 90 * MIB, 100_000)
    failed = next((message for message in said if isinstance(message, ReadFailed)), None) or mounted.next(ReadFailed)
    assert isinstance(failed, ReadFailed)
    assert "refuses these credentials (401) (docker-credential-x failed: no keyring)" in failed.reason
