"""Archives shared through a real S3 server: built once, pulled checked, and nobody's failure but a delay."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from backports import zstd

from actors.image.archives import bucket as bucket_module
from actors.image.archives import fleet
from actors.image.archives.archive import VERSION, Archive, archive_path
from actors.image.archives.fleet import BucketAway, Lease, Next, SharedArchive, decide
from actors.image.wire import Bucket, BuildImage, Built, Progress, Shared
from supervisor.frames import Message
from tests.actors.image.builders import TIMEOUT_S, Builder, Node
from tests.actors.image.images import Repository, RunningRegistry, member, tar
from tests.actors.image.proxy import Exchange, Proxy, cut, hang_up, silent, stall, status, throttle
from tests.actors.image.s3 import CREDENTIALS, SERVERS, RunningS3

CONTENT = random.Random(2).randbytes(2 << 20)
LEASE_S, RENEW_S, LOOK_S = 5.0, 0.5, 0.2  # a node that stands for four seconds, as a busy machine may, keeps its lease

pytestmark = pytest.mark.usefixtures("unhurried")


@pytest.fixture(scope="module", params=SERVERS)
def s3(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningS3]:
    running = RunningS3(tmp_path_factory.mktemp("s3"), request.param)
    yield running
    running.stop()


@pytest.fixture
def bucket(s3: RunningS3, request: pytest.FixtureRequest) -> Bucket:
    name = "".join(letter for letter in request.node.name.lower() if letter.isalnum())
    return s3.bucket(f"b{abs(hash(name)) % 10**10}-{name[:40]}")


@pytest.fixture(autouse=True)
def hurry(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leases that end soon, and credentials as boto3's chain finds them."""
    for name, value in {"LEASE_S": LEASE_S, "RENEW_S": RENEW_S, "LOOK_S": LOOK_S}.items():
        monkeypatch.setattr(fleet, name, value)
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("AWS_PROFILE", raising=False)


@pytest.fixture
def image(repository: Repository) -> Repository:
    """An image of two layers, which no other test's registry traffic is about."""
    salt = repository.name.encode()
    repository.push(tar(member("a", CONTENT), member("salt", salt)), tar(member("b", b"2")), blobs=None)
    return repository


@pytest.fixture
def proxy(registry: RunningRegistry) -> Iterator[Proxy]:
    with Proxy(registry.address) as running:
        yield running


@pytest.fixture
def make(tmp_path: Path, proxy: Proxy, image: Repository, bucket: Bucket) -> Callable[..., tuple[Node, BuildImage]]:
    """Makes a node, and its order for the image: lazy, in the fleet, through the proxy."""

    def node(name: str, **changes: Any) -> tuple[Node, BuildImage]:
        made = Node(tmp_path / name)
        fields = {"lazy": True, "bucket": bucket, **changes}
        return made, made.order(f"{proxy.address}/{image.name}", **fields)

    return node


Make = Callable[..., tuple[Node, BuildImage]]


def outcome(said: list[Message]) -> tuple[Built, Shared]:
    """The two last words of a builder in a fleet."""
    built = [message for message in said if isinstance(message, Built)]
    assert len(built) == 1, said[-1]
    assert isinstance(said[-1], Shared), said[-1]
    return built[0], said[-1]


def ended(order: BuildImage) -> tuple[Built, Shared]:
    return outcome(Builder(order).messages())


def layer_bytes(proxy: Proxy) -> int:
    """Bytes of layers that left the registry; configs are small."""
    return sum(exchange.body_bytes for exchange in proxy.seen("/blobs/") if exchange.body_bytes > 10_000)


# Which is next


@pytest.mark.parametrize(
    ("archive", "lease", "what"),
    [
        (True, None, Next.PULL),
        (True, Lease("e", 0.0), Next.PULL),
        (True, Lease("e", 1e6), Next.PULL),
        (False, None, Next.CLAIM),
        (False, Lease("e", 0.0), Next.WAIT),
        (False, Lease("e", LEASE_S), Next.WAIT),
        (False, Lease("e", LEASE_S + 1), Next.TAKE_OVER),
        (False, Lease("e", -5.0), Next.WAIT),
    ],
)
def test_what_a_node_does_next(archive: bool, lease: Lease | None, what: Next) -> None:
    assert decide(archive, lease) is what


# Built once


def test_what_one_node_has_built_the_next_one_pulls(s3: RunningS3, bucket: Bucket, proxy: Proxy, make: Make) -> None:
    _first, order = make("first")
    built, shared = ended(order)
    assert shared == Shared(True)
    assert built.complete
    assert built.layer_bytes > len(CONTENT)
    name = built.digest.replace(":", "-")
    assert s3.keys(bucket) == [f"fleet/archives/v{VERSION}/{name}.aerie.zst"]
    proxy.forget()

    second, order = make("second")
    pulled, shared = ended(order)
    assert shared == Shared(False)
    assert (pulled.digest, pulled.layer_bytes, pulled.complete) == (built.digest, 0, False)
    assert layer_bytes(proxy) == 0
    assert Path(pulled.archive).read_bytes() == Path(built.archive).read_bytes()
    assert [path.name for path in second.archives.iterdir()] == [f"{name}.aerie"]
    assert second.objects() == []
    assert len(s3.keys(bucket)) == 1


def test_an_image_by_another_name_is_the_same_and_a_tag_that_moved_is_another(
    s3: RunningS3, bucket: Bucket, proxy: Proxy, registry: RunningRegistry, image: Repository, make: Make, tmp_path: Path
) -> None:
    built, _ = ended(make("first")[1])
    other = registry.repository(f"{image.name}-other")
    other.push(tar(member("a", CONTENT), member("salt", image.name.encode())), tar(member("b", b"2")), tag="named")
    node = Node(tmp_path / "second")
    pulled, _ = ended(node.order(other.reference("named"), lazy=True, bucket=bucket))
    assert (pulled.digest, pulled.layer_bytes) == (built.digest, 0)

    image.push(tar(member("a", b"moved")))
    moved, shared = ended(make("third")[1])
    assert moved.digest != built.digest
    assert moved.layer_bytes > 0
    assert shared.pushed
    assert len(s3.keys(bucket)) == 2


def test_of_many_nodes_at_once_one_builds(s3: RunningS3, bucket: Bucket, proxy: Proxy, make: Make) -> None:
    proxy.on("/blobs/", throttle(1.5e6))
    orders = [make(f"node{number}")[1] for number in range(4)]
    outcomes = [outcome(said) for said in in_parallel(orders)]
    assert sum(shared.pushed for _, shared in outcomes) == 1
    assert sum(built.layer_bytes > 0 for built, _ in outcomes) == 1
    assert layer_bytes(proxy) < 1.5 * len(CONTENT)
    assert len({Path(built.archive).read_bytes() for built, _ in outcomes}) == 1
    assert len(s3.keys(bucket)) == 1  # and no lease


def in_parallel(orders: list[BuildImage]) -> list[list[Message]]:
    builders = [Builder(order) for order in orders]
    said: list[list[Message]] = [[] for _ in orders]

    def listen(number: int) -> None:
        said[number] = builders[number].messages()

    threads = [threading.Thread(target=listen, args=(number,)) for number in range(len(orders))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return said


def test_a_node_that_builds_for_longer_than_a_lease_keeps_it(proxy: Proxy, make: Make) -> None:
    proxy.on("/blobs/", throttle(len(CONTENT) / (1.5 * LEASE_S)))
    first = Builder(make("first")[1])
    reading(first)
    second = Builder(make("second")[1])
    said = second.messages()
    assert any(isinstance(message, Progress) and message.phase == "waiting for another node" for message in said)
    assert outcome(said)[0].layer_bytes == 0
    assert outcome(first.messages())[1] == Shared(True)


def reading(builder: Builder) -> None:
    """Wait until it reads layers."""
    while not (isinstance(said := builder.channel.receive(TIMEOUT_S)[0], Progress) and said.phase == "reading layers"):
        pass


def test_a_dead_nodes_lease_passes_on(s3: RunningS3, bucket: Bucket, proxy: Proxy, make: Make) -> None:
    proxy.on("/blobs/", throttle(100_000), times=3)
    first = Builder(make("first")[1])
    reading(first)
    os.kill(first.pid, signal.SIGKILL)
    first.wait()
    [key] = s3.keys(bucket)
    assert key.split("/")[1] == "leases"
    renewed = s3.client.head_object(Bucket=bucket.name, Key=key)["LastModified"].timestamp()
    proxy.behave()
    outcomes = [outcome(said) for said in in_parallel([make(f"node{number}")[1] for number in range(3)])]
    assert LEASE_S < time.time() - renewed < 180
    assert sum(built.layer_bytes > 0 for built, _ in outcomes) == 1
    assert [key.split("/")[1] for key in s3.keys(bucket)] == ["archives"]


def test_the_nodes_own_clock_does_not_matter(
    s3: RunningS3, bucket: Bucket, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = SharedArchive(bucket, "sha256:" + "1" * 64)
    assert held._write_lease(IfNoneMatch="*")
    now = time.time
    monkeypatch.setattr(time, "time", lambda: now() + 600)  # S3 itself refuses more than 15 minutes
    other = SharedArchive(bucket, "sha256:" + "1" * 64)
    lease = other._find_lease()
    assert lease is not None
    assert -1 <= lease.age_s < 300
    assert not other._write_lease(IfNoneMatch="*")
    assert not other._write_lease(IfMatch='"another"')
    other.close()
    held.close()
    assert s3.keys(bucket) == []


def test_a_build_that_fails_gives_its_lease_back(s3: RunningS3, bucket: Bucket, proxy: Proxy, make: Make) -> None:
    node, order = make("first", unpacked_bytes_max=1000)
    assert node.failed(order.reference, lazy=True, bucket=bucket, unpacked_bytes_max=1000).kind == "bounds"
    assert s3.keys(bucket) == []
    assert ended(make("second")[1])[1].pushed


def test_a_lease_that_was_lost_nevertheless_does_no_harm(
    s3: RunningS3, bucket: Bucket, proxy: Proxy, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "LEASE_S", 2.0)
    proxy.on("/blobs/", throttle(1e6))
    first = Builder(make("first")[1])
    reading(first)
    os.kill(first.pid, signal.SIGSTOP)  # a node that sleeps
    time.sleep(3.0)
    second = Builder(make("second")[1])
    reading(second)
    os.kill(first.pid, signal.SIGCONT)
    outcomes = [outcome(builder.messages()) for builder in (first, second)]
    assert [built.layer_bytes > 0 for built, _ in outcomes] == [True, True]
    assert sum(shared.pushed for _, shared in outcomes) == 1
    assert [shared.problem for _, shared in outcomes] == ["", ""]
    assert [key.split("/")[1] for key in s3.keys(bucket)] == ["archives"]


def test_a_lease_that_is_just_being_renewed_is_given_back(s3: RunningS3, bucket: Bucket, tmp_path: Path) -> None:
    def state() -> str:
        [key] = s3.keys(bucket)
        return str(s3.client.head_object(Bucket=bucket.name, Key=key)["ETag"])

    def answer_late(exchange: Exchange) -> None:
        send = exchange.handler.send_response
        exchange.handler.send_response = lambda *answer: (time.sleep(2 * RENEW_S), send(*answer))
        exchange.forward()

    with Proxy(s3.address) as proxy:
        shared = SharedArchive(Bucket(bucket.name, "fleet", f"http://{proxy.address}", "us-east-1"), "sha256:" + "4" * 64)
        assert shared.obtain(str(tmp_path), [], lambda: None) is None
        proxy.on("leases/", lambda exchange: answer_late(exchange) if exchange.method == "PUT" else exchange.forward())
        claimed, deadline = state(), time.monotonic() + 60
        while state() == claimed:
            assert time.monotonic() < deadline
        shared.close()
    assert s3.keys(bucket) == []


def test_what_a_node_has_already_is_pushed_too(s3: RunningS3, bucket: Bucket, make: Make) -> None:
    _node, order = make("first", bucket=None)
    assert isinstance(Builder(order).messages()[-1], Built)
    built, shared = ended(make("first")[1])
    assert built.layer_bytes == 0
    assert shared == Shared(True)
    assert len(s3.keys(bucket)) == 1


def test_an_image_that_is_to_be_complete_is_read_here_and_shared(s3: RunningS3, bucket: Bucket, make: Make) -> None:
    for name, pushed in (("first", True), ("second", False)):
        built, shared = ended(make(name, lazy=False)[1])
        assert built.complete
        assert built.layer_bytes > len(CONTENT)
        assert shared == Shared(pushed)
    assert len(s3.keys(bucket)) == 1


# What is in the bucket


@pytest.mark.parametrize("damage", ["bit", "cut", "empty", "garbage", "another image's", "other layers"])
def test_a_damaged_archive_in_the_bucket_is_replaced(
    damage: str, s3: RunningS3, bucket: Bucket, registry: RunningRegistry, image: Repository, make: Make, tmp_path: Path
) -> None:
    built, _ = ended(make("first")[1])
    [key] = s3.keys(bucket)
    good = s3.read(bucket, key)
    if damage == "another image's":
        registry.repository(f"{image.name}-other").push(tar(member("x", b"1")))
        other = Node(tmp_path / "other").built(f"{registry.address}/{image.name}-other")
        bad = zstd.compress(Path(other.archive).read_bytes())
    elif damage == "other layers":
        layer = Archive.open(built.archive).info.layers[0].digest.encode()
        bad = zstd.compress(resealed(zstd.decompress(good).replace(layer, b"sha256:" + b"5" * 64)))
    else:
        middle = len(good) // 2
        bad = {
            "bit": good[:middle] + bytes([good[middle] ^ 1]) + good[middle + 1 :],
            "cut": good[:-1],
            "empty": b"",
            "garbage": b"x" * 10_000,
        }[damage]
    s3.write(bucket, key, bad)
    node, order = make("second")
    again, shared = ended(order)
    assert again.layer_bytes > 0
    assert shared == Shared(True)
    assert s3.read(bucket, key) == good
    assert len(list(node.archives.iterdir())) == 1


def resealed(archive: bytes) -> bytes:
    import hashlib

    return archive[:-32] + hashlib.sha256(archive[:-32]).digest()


def test_an_archive_of_many_parts(s3: RunningS3, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bucket_module, "PART_BYTES", 5 << 20)
    path = tmp_path / "archive"
    path.write_bytes(random.Random(3).randbytes((12 << 20) + 7))
    shared = SharedArchive(bucket, "sha256:" + "2" * 64)
    assert shared.push(str(path))
    assert not shared.push(str(path))
    [key] = s3.keys(bucket)
    assert zstd.decompress(s3.read(bucket, key)) == path.read_bytes()
    assert "Uploads" not in s3.client.list_multipart_uploads(Bucket=bucket.name)
    with open(tmp_path / "back", "w+b") as file:
        assert shared._download(file)
    assert (tmp_path / "back").read_bytes() == path.read_bytes()
    shared.close()


def test_an_upload_that_fails_leaves_nothing(
    s3: RunningS3, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(bucket_module, "PART_BYTES", 5 << 20)
    path = tmp_path / "archive"
    path.write_bytes(random.Random(4).randbytes(12 << 20))
    with Proxy(s3.address) as proxy:
        proxy.on("partNumber=2", status(400, b"<Error><Code>EntityTooSmall</Code></Error>"))
        shared = SharedArchive(Bucket(bucket.name, "fleet", f"http://{proxy.address}", "us-east-1"), "sha256:" + "3" * 64)
        with pytest.raises(BucketAway, match="EntityTooSmall"):
            shared.push(str(path))
        shared.close()
    assert s3.keys(bucket) == []
    assert "Uploads" not in s3.client.list_multipart_uploads(Bucket=bucket.name)


def test_prefixes_and_versions_do_not_mix() -> None:
    digest = "sha256:" + "a" * 64
    keys = {}
    for prefix in ("", "/", "a", "a/b/"):
        shared = SharedArchive(Bucket("b", prefix, "http://127.0.0.1:1", "r"), digest)
        keys[prefix] = (shared._key, shared._lease_key)
        shared.close()
    name = digest.replace(":", "-")
    assert keys[""] == keys["/"] == (f"archives/v{VERSION}/{name}.aerie.zst", f"leases/v{VERSION}/{name}")
    assert keys["a"][0] == f"a/archives/v{VERSION}/{name}.aerie.zst"
    assert keys["a/b/"][1] == f"a/b/leases/v{VERSION}/{name}"


# The bucket is away


@pytest.mark.parametrize("trouble", ["nobody there", "no such bucket", "refused", "silent", "broken", "busy"])
def test_a_bucket_that_is_away_costs_a_node_nothing_but_a_remark(
    trouble: str, s3: RunningS3, bucket: Bucket, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bucket_module, "CLIENT", bucket_module.CLIENT | {"connect_timeout": 0.5, "read_timeout": 0.5})
    with Proxy(s3.address) as proxy:
        troubles = {"refused": status(403), "silent": silent(), "broken": hang_up, "busy": status(503)}
        if trouble in troubles:
            proxy.on("", troubles[trouble])
        address = "127.0.0.1:1" if trouble == "nobody there" else proxy.address
        name = "nosuchbucket" if trouble == "no such bucket" else bucket.name
        begun = time.monotonic()
        node, order = make("first", bucket=Bucket(name, "fleet", f"http://{address}", "us-east-1"))
        built, shared = ended(order)
    assert built.complete
    assert not shared.pushed
    assert f"bucket {name}" in shared.problem
    assert time.monotonic() - begun < 120  # what is silent would be so for an hour
    assert Archive.open(archive_path(str(node.archives), built.digest))


def test_without_credentials_a_node_works_for_itself(make: Make, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        monkeypatch.setenv(name, str(tmp_path / "nosuch"))
    built, shared = ended(make("first")[1])
    assert built.complete
    assert "credentials" in shared.problem


def test_a_bucket_that_goes_away_in_mid_pull_costs_a_build(s3: RunningS3, bucket: Bucket, make: Make) -> None:
    ended(make("first")[1])
    half = len(s3.read(bucket, s3.keys(bucket)[0])) // 2
    for misbehaviour in (cut(half), stall(half, 1.0)):
        with Proxy(s3.address) as proxy:
            pattern = "archives/"
            proxy.on(
                pattern, lambda exchange, act=misbehaviour: exchange.forward() if exchange.method == "HEAD" else act(exchange)
            )  # type: ignore[misc]
            bad = Bucket(bucket.name, "fleet", f"http://{proxy.address}", "us-east-1")
            built, shared = ended(make(f"second{id(proxy)}", bucket=bad)[1])
        assert Archive.open(built.archive).info.digest == built.digest
        assert not shared.pushed


def test_a_kill_at_any_instant_leaves_a_bucket_that_the_next_node_can_use(
    s3: RunningS3, bucket: Bucket, make: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet, "LEASE_S", 1.0)
    begun = time.monotonic()
    ended(make("whole", bucket=s3.bucket(f"{bucket.name[:50]}-0"))[1])
    whole_s = time.monotonic() - begun
    for share in range(1, 8):
        fresh = s3.bucket(f"{bucket.name[:50]}-{share}")
        builder = Builder(make(f"killed{share}", bucket=fresh)[1])
        # Not a wait for something: a kill at an instant that nobody chose.
        time.sleep(whole_s * share / 7)
        os.kill(builder.pid, signal.SIGKILL)
        builder.wait()
        _built, shared = ended(make(f"next{share}", bucket=fresh)[1])
        assert shared.problem == ""
        assert [key.split("/")[1] for key in s3.keys(fresh)] == ["archives"]
