"""Debian's docker-registry behind proxies that misbehave: as other people's registries, mirrors and storage services do."""

from __future__ import annotations

import email.utils
import functools
import json
import os
import re
import select
import signal
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import urllib3

from actors.image.archives.archive import Archive
from actors.image.archives.builder import Build
from actors.image.errors import ContentCorrupt, RegistryBroken, RegistryUnreachable, Unauthorised
from actors.image.registry import credentials, patience
from actors.image.registry.credentials import HelperFailed, docker_login, helper_login
from actors.image.registry.login import Access, Login
from actors.image.registry.manifests import Descriptor, Platform
from actors.image.registry.mirrors import api_url, mirrors_of
from actors.image.registry.patience import Meter, Patience, Rates, retry_after_s
from actors.image.registry.reference import Reference
from actors.image.registry.repository import Registry
from actors.image.wire import BuildImage, Built
from tests.actors.image.images import PUSH_TIMEOUT_S, Repository, RunningRegistry, digest, member, tar
from tests.actors.image.proxy import (
    Exchange,
    Proxy,
    SignedStorage,
    TokenGate,
    cut,
    silent,
    stall,
    status,
    throttle,
    without_ranges,
)

BLOB = os.urandom(1 << 20)
NAME = digest(BLOB)
WHOLE = Descriptor(NAME, len(BLOB))
AMD64 = Platform("linux", "amd64")

pytestmark = pytest.mark.usefixtures("unhurried")


@pytest.fixture
def proxy(registry: RunningRegistry) -> Iterator[Proxy]:
    with Proxy(registry.address) as running:
        yield running


@pytest.fixture
def storage(registry: RunningRegistry) -> Iterator[Proxy]:
    """Another host, in front of the same registry."""
    with Proxy(registry.address) as running:
        yield running


@pytest.fixture
def image(repository: Repository) -> Repository:
    """A repository with BLOB in it, and a tagged image."""
    repository.push_blob(BLOB)
    repository.push(tar(member("a", b"1")), architecture="amd64")
    return repository


@pytest.fixture
def docker_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Writes Docker's config.json."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))

    def write(**document: object) -> None:
        (tmp_path / "config.json").write_text(json.dumps(document))

    return write


@pytest.fixture
def helper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Makes the shell script `docker-credential-test`."""
    programs = tmp_path / "bin"
    programs.mkdir()
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")

    def make(script: str) -> None:
        path = programs / "docker-credential-test"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    return make


def until(condition: Callable[[], object]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def through(proxy: Proxy, image: Repository, login: Login | None = None, **more: object) -> Registry:
    return Registry(Reference.parse(f"{proxy.address}/{image.name}"), login, **more)  # type: ignore[arg-type]


def read_all(registry: Registry) -> bytes:
    return b"".join(registry.blob(WHOLE))


def ends_of_pieces(registry: Registry) -> set[int]:
    """Read all of the blob → where its pieces ended, and so where one may go on; 0 among them."""
    got, ends = bytearray(), {0}
    for piece in registry.blob(WHOLE):
        got += piece
        ends.add(len(got))
    assert got == BLOB
    return ends


def begins_of(proxy: Proxy) -> list[int]:
    """Where the answers were to begin that the blob was asked for in."""
    return [exchange.range[0] if exchange.range else 0 for exchange in proxy.seen("/blobs/")]


def read_in_ranges(registry: Registry, count: int = 16) -> bytes:
    size = len(BLOB) // count
    return b"".join(registry.read_range(NAME, at, size) for at in range(0, len(BLOB), size))


# Tokens and credentials


@pytest.mark.parametrize("refusal", [401, 403])
def test_a_token_that_runs_out_again_and_again_is_renewed(proxy: Proxy, image: Repository, refusal: int) -> None:
    gate = TokenGate(proxy, uses=3, refusal=refusal)
    with through(proxy, image) as registry:
        assert registry.resolve(AMD64)
        assert read_in_ranges(registry) == BLOB
        assert read_all(registry) == BLOB
    assert gate.given == 6  # 18 requests that were answered


@pytest.mark.parametrize("refusal", [401, 403])
def test_a_blob_that_breaks_off_is_gone_on_with_though_the_token_has_run_out(
    proxy: Proxy, image: Repository, refusal: int
) -> None:
    with through(proxy, image) as registry:
        proxy.on("/blobs/", cut(300_000), times=1)
        gate = TokenGate(proxy, uses=0, refusal=refusal)
        pieces = registry.blob(WHOLE)
        found = next(pieces)
        gate._uses = 5
        assert found + b"".join(pieces) == BLOB


def test_what_docker_login_wrote_meanwhile_is_used_when_the_old_password_is_refused(
    proxy: Proxy, image: Repository, docker_config: Callable[..., None]
) -> None:
    gate = TokenGate(proxy, uses=4)
    gate.passwords = {"me": "old"}
    docker_config(auths={proxy.address: {"username": "me", "password": "old"}})
    with through(proxy, image) as registry:
        assert registry.read_range(NAME, 0, 10) == BLOB[:10]
        gate.passwords = {"me": "new"}
        docker_config(auths={proxy.address: {"username": "me", "password": "new"}})
        assert read_in_ranges(registry) == BLOB
        gate.passwords = {"me": "newer"}
        with pytest.raises(Unauthorised, match="refuses these credentials"):
            read_in_ranges(registry)


def test_basic_credentials_of_a_real_registry_are_renewed_in_mid_run(
    tmp_path: Path, docker_config: Callable[..., None]
) -> None:
    users = tmp_path / "htpasswd"

    def accept(password: str) -> None:
        crypt = ["perl", "-e", "print crypt($ARGV[0], q($2y$05$abcdefghijklmnopqrstuu))", password]
        users.write_text("me:" + subprocess.run(crypt, check=True, capture_output=True, text=True).stdout + "\n")
        changed = time.time() + accept.count  # the registry looks at the modification time, in whole seconds
        os.utime(users, (changed, changed))
        accept.count += 10

    accept.count = 10  # type: ignore[attr-defined]
    accept("old")
    (tmp_path / "home").mkdir()
    running = RunningRegistry(tmp_path / "home", f"auth: {{htpasswd: {{realm: r, path: {users}}}}}")
    try:
        docker_config(auths={running.address: {"username": "me", "password": "old"}})
        ask = functools.partial(urllib3.request, headers={"Authorization": Login("me", "old").basic}, timeout=PUSH_TIMEOUT_S)
        place = ask("POST", f"http://{running.address}/v2/a/blobs/uploads/").headers["Location"]
        assert ask("PUT", f"{place}&digest={NAME}", body=BLOB).status == 201
        with Registry(Reference.parse(f"{running.address}/a")) as registry:
            assert registry.read_range(NAME, 0, 10) == BLOB[:10]
            accept("new")
            docker_config(auths={running.address: {"username": "me", "password": "new"}})
            assert read_in_ranges(registry) == BLOB
            accept("newer")
            with pytest.raises(Unauthorised, match="refuses these credentials"):
                registry.read_range(NAME, 0, 10)
    finally:
        running.stop()


def test_an_identity_token_is_exchanged_for_tokens(proxy: Proxy, image: Repository, docker_config: Callable[..., None]) -> None:
    gate = TokenGate(proxy, uses=3)
    gate.passwords, gate.identity_tokens = {}, {"secret"}
    docker_config(auths={proxy.address: {"auth": "bWU6", "identitytoken": "secret"}})
    with through(proxy, image) as registry:
        assert read_in_ranges(registry, 8) == BLOB
    assert {exchange.method for exchange in proxy.seen("/token")} == {"POST"}


def test_a_registry_token_is_sent_as_it_is(proxy: Proxy, image: Repository) -> None:
    gate = TokenGate(proxy)
    gate._left["mine"] = 10
    with through(proxy, image, Login(registry_token="mine")) as registry:
        assert read_in_ranges(registry, 8) == BLOB
    assert not proxy.seen("/token")


def test_a_login_that_came_with_the_task_wins_over_dockers(
    proxy: Proxy, image: Repository, docker_config: Callable[..., None]
) -> None:
    gate = TokenGate(proxy)
    gate.passwords = {"task": "t"}
    docker_config(auths={proxy.address: {"username": "node", "password": "n"}})
    with through(proxy, image, Login("task", "t")) as registry:
        assert registry.read_range(NAME, 0, 10) == BLOB[:10]
    with through(proxy, image) as registry, pytest.raises(Unauthorised):
        registry.read_range(NAME, 0, 10)


# Credential helpers


def test_a_helper_is_asked_for_its_registry_or_for_all(
    proxy: Proxy, image: Repository, docker_config: Callable[..., None], helper: Callable[[str], None], tmp_path: Path
) -> None:
    helper(f"""[ "$1" = get ] || exit 9; read server; echo "$server" >> {tmp_path}/asked
        echo '{{"ServerURL": "x", "Username": "me", "Secret": "s"}}'""")
    gate = TokenGate(proxy)
    gate.passwords = {"me": "s"}
    for document in ({"credHelpers": {proxy.address: "test"}}, {"credsStore": "test"}):
        docker_config(**document)
        with through(proxy, image) as registry:
            assert registry.read_range(NAME, 0, 10) == BLOB[:10]
    docker_config(credsStore="other", credHelpers={"docker.io": "test"})
    assert docker_login("docker.io") == Login("me", "s")
    docker_config(credHelpers={"r.example": "test"}, auths={"q.example": {"username": "a", "password": "b"}})
    assert docker_login("q.example") == Login("a", "b")
    assert (tmp_path / "asked").read_text().split() == [proxy.address, proxy.address, "https://index.docker.io/v1/"]


def test_a_helper_is_asked_again_when_what_it_gave_has_run_out(
    proxy: Proxy, image: Repository, docker_config: Callable[..., None], helper: Callable[[str], None]
) -> None:
    give = """cat > /dev/null; echo '{"Username": "me", "Secret": "%s"}'"""
    helper(give % "first")
    docker_config(credHelpers={proxy.address: "test"})
    gate = TokenGate(proxy, uses=2)
    gate.passwords = {"me": "first"}
    with through(proxy, image) as registry:
        assert registry.read_range(NAME, 0, 10) == BLOB[:10]
        gate.passwords = {"me": "second"}
        helper(give % "second")
        assert read_in_ranges(registry) == BLOB


@pytest.mark.parametrize(
    ("script", "found"),
    [
        ("""echo '{"Username": "<token>", "Secret": "s"}'""", Login(identity_token="s")),
        ("""echo 'credentials not found in native keychain'; exit 1""", None),
        ("""echo '{"Username": "me", "Secret": ""}'""", None),
        ("echo no; exit 1", "docker-credential-test failed: no"),
        ("exit 3", "exit code 3"),
        ("echo '['", "what is not a login"),
        ("sleep 100 & sleep 100", "no answer within"),
    ],
)
def test_what_helpers_answer(
    script: str, found: Login | str | None, helper: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    if found == "no answer within":
        monkeypatch.setattr(credentials, "HELPER_TIMEOUT_S", 0.5)
    helper(script)
    begun = time.monotonic()
    if isinstance(found, str):
        with pytest.raises(HelperFailed, match=found):
            helper_login("test", "r.example")
    else:
        assert helper_login("test", "r.example") == found
    assert time.monotonic() - begun < 60


def test_a_helper_that_fails_harms_no_public_image_and_is_named_when_it_matters(
    proxy: Proxy, image: Repository, docker_config: Callable[..., None], helper: Callable[[str], None]
) -> None:
    helper("echo no keyring here >&2; exit 1")
    docker_config(credsStore="test")
    gate = TokenGate(proxy)
    with through(proxy, image) as registry:
        assert registry.read_range(NAME, 0, 10) == BLOB[:10]
    gate.passwords = {}
    for name, text in (
        ("test", "docker-credential-test failed: no keyring"),
        ("nosuch", "nosuch"),
        ("../x", "is not the name"),
    ):
        docker_config(credsStore=name)
        with through(proxy, image) as registry, pytest.raises(Unauthorised, match=text):
            registry.read_range(NAME, 0, 10)


def test_a_helper_dies_with_whoever_asked_it(helper: Callable[[str], None], tmp_path: Path) -> None:
    helper(f"echo $$ > {tmp_path}/pid.new; mv {tmp_path}/pid.new {tmp_path}/pid; exec sleep 100")
    code = "from actors.image.registry.credentials import helper_login; helper_login('test', 'r.example')"
    asker = subprocess.Popen([sys.executable, "-c", code], cwd=Path(__file__).parents[4])
    until((tmp_path / "pid").exists)
    watched = os.pidfd_open(int((tmp_path / "pid").read_text()))
    asker.send_signal(signal.SIGKILL)
    asker.wait(60)
    assert select.select([watched], [], [], 60)[0]
    os.close(watched)


def test_secrets_do_not_show() -> None:
    login = Login("me", "secret", "identity", "registry")
    assert not re.search("secret|identity|registry", f"{login} {login!r}")


# Redirects to storage services


@pytest.mark.parametrize("refusal", [400, 401, 403, 404, 410])
def test_a_signed_address_is_used_until_it_has_run_out_then_asked_for_again(
    proxy: Proxy, storage: Proxy, image: Repository, refusal: int
) -> None:
    signing = SignedStorage(proxy, storage, uses=4, refusal=refusal)
    TokenGate(proxy)
    with through(proxy, image) as registry:
        assert read_in_ranges(registry) == BLOB
    assert signing.signed == 4
    assert len(proxy.seen("/blobs/")) == 4
    assert not any("Authorization" in exchange.headers for exchange in storage.seen())


def test_a_storage_service_that_refuses_for_good_is_an_error(proxy: Proxy, storage: Proxy, image: Repository) -> None:
    signing = SignedStorage(proxy, storage, uses=0)
    with through(proxy, image) as registry, pytest.raises(Unauthorised, match="403"):
        registry.read_range(NAME, 0, 10)
    assert signing.signed == 2
    assert not proxy.seen("/token")


def test_a_blob_that_breaks_off_is_gone_on_with_by_a_new_address(proxy: Proxy, storage: Proxy, image: Repository) -> None:
    signing = SignedStorage(proxy, storage, uses=1)

    def use_up(exchange: Exchange) -> None:
        signing._left["s1"] = 0
        exchange.forward(cut_after=400_000)

    storage._commands.insert(0, [re.compile("signature=s1"), use_up, 1])
    with through(proxy, image) as registry:
        assert read_all(registry) == BLOB
    assert signing.signed == 2
    assert 0 < storage.seen("signature=s2")[-1].range[0] <= 400_000  # type: ignore[index]


def test_redirects_without_end_and_to_elsewhere_are_refused(proxy: Proxy, image: Repository) -> None:
    for location in (f"http://{proxy.address}/v2/x/blobs/again", "ftp://127.0.0.1/x", "file:///etc/passwd"):
        proxy.behave()
        proxy.on("/blobs/", status(302, Location=location))
        with through(proxy, image) as registry, pytest.raises(RegistryBroken, match="sends us"):
            registry.read_range(NAME, 0, 10)
    assert len(proxy.seen("again")) == 5


# Answers that are not what was asked for


def test_ranges_come_from_a_registry_that_knows_none(proxy: Proxy, image: Repository) -> None:
    proxy.on("/blobs/", without_ranges)
    with through(proxy, image) as registry:
        assert read_in_ranges(registry, 8) == BLOB
        proxy.behave()
        proxy.on("/blobs/", cut(500_000), times=1)
        proxy.on("/blobs/", without_ranges)
        assert read_all(registry) == BLOB


def test_a_part_of_a_range_is_gone_on_from(proxy: Proxy, image: Repository) -> None:
    def part(exchange: Exchange) -> None:
        assert exchange.range
        offset, length = exchange.range
        first = BLOB[offset : offset + min(length, 5000)]
        exchange.answer(206, first, Content_Range=f"bytes {offset}-{offset + len(first) - 1}/{len(BLOB)}")

    proxy.on("/blobs/", part)
    with through(proxy, image) as registry:
        assert registry.read_range(NAME, 1000, 12_000) == BLOB[1000:13_000]
        with pytest.raises(ContentCorrupt, match="ends before"):
            registry.read_range(NAME, len(BLOB) - 100, 101)
    assert [exchange.range for exchange in proxy.seen("/blobs/")][:3] == [(1000, 12_000), (6000, 7000), (11_000, 2000)]


def test_every_request_is_for_a_single_range(proxy: Proxy, image: Repository) -> None:
    proxy.on("/blobs/", cut(100_000), times=5)
    with through(proxy, image) as registry:
        assert read_in_ranges(registry, 4) == BLOB
        assert read_all(registry) == BLOB
    assert not any("," in exchange.headers.get("Range", "") for exchange in proxy.seen())


def test_a_blob_that_is_shorter_than_the_range_is_corrupt(proxy: Proxy, image: Repository) -> None:
    with through(proxy, image) as registry:
        for offset, length in ((len(BLOB), 1), (len(BLOB) - 1, 2)):
            with pytest.raises(ContentCorrupt, match="ends before"):
                registry.read_range(NAME, offset, length)
        proxy.on("/blobs/", status(416))
        with pytest.raises(ContentCorrupt, match="ends before byte 10"):
            registry.read_range(NAME, 10, 1)


# Too many requests


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_a_registry_that_wants_us_to_wait_is_asked_again_then_and_not_before(
    proxy: Proxy, image: Repository, form: str
) -> None:
    came: list[float] = []

    def refuse(exchange: Exchange) -> None:
        came.append(time.monotonic())
        second = int(time.time())
        # A date has whole seconds; the server's own clock is an hour ahead.
        when = email.utils.formatdate(second + 3602, usegmt=True)
        now = email.utils.formatdate(second + 3600, usegmt=True)
        headers = {"Retry_After": "2"} if form == "seconds" else {"Retry_After": when}
        exchange.handler.date_time_string = lambda: now
        exchange.answer(429, b"{}", **headers)

    proxy.on("/blobs/", refuse, times=1)
    with through(proxy, image) as registry:
        assert registry.read_range(NAME, 0, 10) == BLOB[:10]
    assert 1.9 < time.monotonic() - came[0] < 60
    assert len(proxy.seen("/blobs/")) == 2


def test_a_registry_that_wants_us_to_wait_for_too_long_is_an_error_at_once(proxy: Proxy, image: Repository) -> None:
    proxy.on("/blobs/", status(429, Retry_After="3600"))
    begun = time.monotonic()
    with through(proxy, image) as registry, pytest.raises(RegistryUnreachable, match="429.*in 3600 s"):
        registry.read_range(NAME, 0, 10)
    proxy.behave()
    proxy.on("/blobs/", status(429, Retry_After="30"))
    with through(proxy, image) as registry, pytest.raises(RegistryUnreachable, match="429.*in 30 s"):
        registry.read_range(NAME, 0, 10, timeout_s=25)
    assert time.monotonic() - begun < 20  # it has waited for neither


def test_what_retry_after_says() -> None:
    date = "Thu, 26 Nov 2026 14:00:00 GMT"
    assert retry_after_s({}) is retry_after_s({"Retry-After": "soon"}) is None
    assert retry_after_s({"Retry-After": "7"}) == 7
    assert retry_after_s({"Retry-After": "Thu, 26 Nov 2026 14:00:09 GMT", "Date": date}) == 9
    assert retry_after_s({"Retry-After": "Thu, 26 Nov 2026 13:00:00 GMT", "Date": date}) == 0
    assert retry_after_s({"Retry-After": "Thu, 26 Nov 2099 13:00:00 GMT"}) > 1e9  # type: ignore[operator]


# Slow and stalled connections


def test_a_silent_connection_is_given_up_for_another(proxy: Proxy, image: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "ANSWER_TIMEOUTS_S", (0.3, 0.6, 60.0, 60.0))
    proxy.on("/blobs/", silent(), times=2)
    with through(proxy, image) as registry:
        begun = time.monotonic()
        assert registry.read_range(NAME, 0, 10) == BLOB[:10]
        assert 0.8 < time.monotonic() - begun < 55  # nor has it waited for any answer as long as for the last
    assert len(proxy.seen("/blobs/")) == 3


def test_a_connection_that_stalls_in_the_middle_is_taken_up_where_it_stalled(
    proxy: Proxy, image: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A machine that stands for 0.3 s is taken for a registry that stalls, here, sooner than it is told to.
    monkeypatch.setattr(patience, "ANSWER_TIMEOUTS_S", (0.3, 0.3, 60.0, 60.0))
    proxy.on("/blobs/", stall(400_000), times=2)
    with through(proxy, image) as registry:
        ends = ends_of_pieces(registry)
    begins = begins_of(proxy)
    assert len(begins) >= 3
    assert set(begins) <= ends
    assert max(begins) > 0


def test_a_read_ends_within_its_time_whatever_the_registry_does(proxy: Proxy, image: Repository) -> None:
    for misbehaviour in (silent(), stall(1000), throttle(1000), status(503), status(429, Retry_After="1"), cut(10)):
        proxy.behave()
        proxy.on("/blobs/", misbehaviour)
        begun = time.monotonic()
        with through(proxy, image) as registry, pytest.raises((RegistryUnreachable, RegistryBroken)):
            registry.read_range(NAME, 0, len(BLOB), timeout_s=1)
        assert time.monotonic() - begun < 30  # and not the minute that each answer has


def test_a_straggler_is_cancelled_and_gone_on_with_on_another_connection(
    proxy: Proxy, image: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    came: list[float] = []

    def straggle(exchange: Exchange) -> None:
        came.append(time.monotonic())
        throttle(30_000)(exchange)  # half a minute for what takes others milliseconds

    def go_on(exchange: Exchange) -> None:
        came.append(time.monotonic())
        monkeypatch.setattr(patience, "SLOW_WINDOW_S", 60.0)  # if this one stops, it is the machine that does
        exchange.forward()

    with through(proxy, image) as registry:
        assert read_in_ranges(registry, 16) == BLOB  # what is known of the host now: it is fast
        proxy.forget()
        monkeypatch.setattr(patience, "SLOW_WINDOW_S", 2.0)
        proxy.on("/blobs/", straggle, times=1)
        proxy.on("/blobs/", go_on)
        assert read_all(registry) == BLOB
    first, second = proxy.seen("/blobs/")
    assert came[1] - came[0] > 2.0
    assert second.range and 0 < second.range[0] <= first.body_bytes < len(BLOB) // 2
    assert second.body_bytes == len(BLOB) - second.range[0]


def test_a_host_that_is_slow_altogether_is_left_alone(proxy: Proxy, image: Repository, monkeypatch: pytest.MonkeyPatch) -> None:
    proxy.on("/blobs/", throttle(1_000_000))
    with through(proxy, image) as registry:
        assert read_in_ranges(registry, 8) == BLOB
    assert len(proxy.seen("/blobs/")) == 8
    # As fast as it always is: by the meter alone, for a machine that stands for a moment is slower.
    monkeypatch.setattr(patience, "SLOW_WINDOW_S", 2.0)
    meter = Meter(proxy.address, Patience())
    assert all(meter.took(16 << 10, 0.0164) for _ in range(20_000))
    assert patience.SLOW_FLOOR_BYTES_PER_S != patience.RATES.slow(proxy.address) < 500_000


def test_no_more_than_a_few_connections_are_given_up_as_stragglers(
    proxy: Proxy, image: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(patience, "SLOW_WINDOW_S", 0.05)
    monkeypatch.setattr(patience, "SLOW_FLOOR_BYTES_PER_S", 1e12)
    proxy.on("/blobs/", throttle(1_000_000))
    with through(proxy, image) as registry:
        assert read_all(registry) == BLOB
    assert len(proxy.seen("/blobs/")) == 1 + patience.STRAGGLERS_MAX


def test_the_readers_own_slowness_makes_no_straggler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "SLOW_WINDOW_S", 2.0)
    rates = Rates()
    for _ in range(3):
        rates.add("h", 10 << 20, 1.0)
    meter = Meter("h", Patience(), rates)
    assert all(meter.took(1 << 20, 0.01) for _ in range(300))
    assert not all(meter.took(1 << 10, 0.1) for _ in range(30))


# Mirrors


@pytest.mark.parametrize(
    ("place", "url"),
    [
        ("docker.io", "https://registry-1.docker.io/v2/a/b"),
        ("m.example:5000", "https://m.example:5000/v2/a/b"),
        ("http://m.example/hub/", "http://m.example/v2/hub/a/b"),
        ("https://127.0.0.1:5000", "https://127.0.0.1:5000/v2/a/b"),
        ("localhost:5000/x/y", "http://localhost:5000/v2/x/y/a/b"),
    ],
)
def test_where_the_api_of_a_registry_or_mirror_is(place: str, url: str) -> None:
    assert api_url(place, "a/b") == url


def test_which_mirrors_a_registry_has() -> None:
    setting = "docker.io=https://m.example/hub ghcr.io=n.example  docker.io=10.0.0.5:5000"
    assert mirrors_of("docker.io", setting) == ["https://m.example/hub", "10.0.0.5:5000"]
    assert mirrors_of("ghcr.io", setting) == ["n.example"]
    assert mirrors_of("quay.io", setting) == mirrors_of("docker.io", "") == []


@pytest.fixture
def mirror(registry: RunningRegistry) -> Iterator[Proxy]:
    with Proxy(registry.address) as running:
        yield running


def test_a_mirror_is_asked_and_the_registry_is_not(proxy: Proxy, mirror: Proxy, image: Repository) -> None:
    with through(proxy, image, Login("me", "secret"), mirrors=[mirror.address]) as registry:
        found = registry.manifest(registry.resolve(AMD64))
        assert registry.config(found, AMD64)
        assert read_in_ranges(registry, 4) == read_all(registry) == BLOB
    assert not proxy.seen()
    assert all(exchange.path.endswith(f"?ns={proxy.address}") for exchange in mirror.seen())


def test_a_mirror_wants_its_own_login_and_is_never_shown_the_tasks(
    proxy: Proxy, mirror: Proxy, image: Repository, docker_config: Callable[..., None]
) -> None:
    gate = TokenGate(mirror)
    gate.passwords = {"mirror": "m"}
    with through(proxy, image, Login("me", "secret"), mirrors=[mirror.address]) as registry:
        assert read_in_ranges(registry, 4) == BLOB
    assert len(proxy.seen("/blobs/")) == 4
    assert [exchange.headers.get("Authorization") for exchange in mirror.seen()] == [None, None]
    docker_config(auths={mirror.address: {"username": "mirror", "password": "m"}})
    proxy.forget()
    with through(proxy, image, mirrors=[mirror.address]) as registry:
        assert read_in_ranges(registry, 4) == BLOB
    assert not proxy.seen()


def test_what_a_mirror_does_not_have_or_cannot_do_comes_from_the_next(
    proxy: Proxy, mirror: Proxy, image: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A mirror is asked twice at most; the registry may take its time.
    monkeypatch.setattr(patience, "ANSWER_TIMEOUTS_S", (0.2, 0.2, 60.0, 60.0))
    for misbehaviour in (status(404), status(500), status(403), status(416), silent(), status(302, Location="ftp://x/")):
        mirror.behave()
        mirror.forget()
        mirror.on("", misbehaviour)
        with through(proxy, image, mirrors=["127.0.0.1:1", mirror.address]) as registry:
            assert registry.manifest(registry.resolve(AMD64))
            assert read_in_ranges(registry, 4) == BLOB
            until(mirror.seen)  # it takes notice of a request when it has a processor for that


def test_a_mirror_that_breaks_off_in_a_blob_is_left_for_the_registry(
    proxy: Proxy, mirror: Proxy, image: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    for misbehaviour, answer_timeouts_s in ((cut(400_000), (60.0,) * 4), (stall(400_000), (2.0, 60.0, 60.0, 60.0))):
        monkeypatch.setattr(patience, "ANSWER_TIMEOUTS_S", answer_timeouts_s)
        mirror.behave()
        mirror.on("/blobs/", misbehaviour)
        proxy.forget()
        with through(proxy, image, mirrors=[mirror.address]) as registry:
            ends = ends_of_pieces(registry)
        begins = begins_of(proxy)
        assert begins
        assert set(begins) <= ends - {0}


def test_a_mirror_with_another_content_is_not_believed(proxy: Proxy, mirror: Proxy, image: Repository) -> None:
    with through(proxy, image) as registry:
        wanted = registry.resolve(AMD64)
    mirror.on("/manifests/sha256", status(200, b"{}"))
    with Registry(Reference.parse(f"{proxy.address}/{image.name}").pinned(wanted), mirrors=[mirror.address]) as registry:
        assert registry.manifest(wanted)
    assert len(mirror.seen("/manifests/")) == 1


def test_a_layer_that_a_mirror_has_damaged_comes_from_the_registry(
    proxy: Proxy, mirror: Proxy, repository: Repository, tmp_path: Path
) -> None:
    layer = tar(member("a", BLOB))
    manifest = repository.push(layer, blobs=[layer])
    body = json.loads(repository.blob_file(manifest["digest"]).read_bytes())["layers"][0]["digest"]
    mirror.on(f"/blobs/{body}", status(200, layer.replace(BLOB[:100], BLOB[100:200])))
    order = BuildImage(
        f"{proxy.address}/{repository.name}",
        str(tmp_path / "archives"),
        str(tmp_path / "cache"),
        access=Access(None, [mirror.address]),
        unpacked_bytes_max=len(layer) + 10_000,
    )
    built = Build(order).run()
    assert isinstance(built, Built)
    assert built.layer_bytes == len(layer)
    assert mirror.seen(body)
    assert proxy.seen(body)
    assert Archive.open(built.archive).info.digest == manifest["digest"]


def test_when_neither_mirror_nor_registry_helps_both_are_named(proxy: Proxy, mirror: Proxy, image: Repository) -> None:
    mirror.on("", status(500))
    proxy.on("", status(500))
    with through(proxy, image, mirrors=[mirror.address]) as registry:
        with pytest.raises(RegistryBroken, match=f"{proxy.address} answers 500.*nor does its mirror help.*{mirror.address}"):
            registry.resolve(AMD64)


# TLS


@pytest.fixture(scope="module")
def certificate(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Certificate and key of 127.0.0.1, signed by itself."""
    path = tmp_path_factory.mktemp("tls") / "both.pem"
    names = ["-subj", "/CN=127.0.0.1", "-addext", "subjectAltName=IP:127.0.0.1"]
    make = [
        "openssl",
        "req",
        "-x509",
        "-newkey",
        "rsa:2048",
        "-nodes",
        "-days",
        "2",
        *names,
        "-keyout",
        path,
        "-out",
        f"{path}.crt",
    ]
    subprocess.run(make, check=True, capture_output=True, timeout=300)
    path.write_bytes(path.read_bytes() + Path(f"{path}.crt").read_bytes())
    return path


@pytest.fixture
def secure(registry: RunningRegistry, certificate: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    """A mirror that is reached by HTTPS, and whose certificate is trusted."""
    monkeypatch.setenv("SSL_CERT_FILE", f"{certificate}.crt")
    with Proxy(registry.address, tls=certificate) as running:
        yield running


def test_over_tls_all_is_as_without(proxy: Proxy, secure: Proxy, image: Repository) -> None:
    with through(proxy, image, mirrors=[f"https://{secure.address}"]) as registry:
        assert registry.manifest(registry.resolve(AMD64))
        assert read_in_ranges(registry, 4) == read_all(registry) == BLOB
        secure.on("/blobs/", cut(300_000), times=1)
        assert read_all(registry) == BLOB
    assert len(proxy.seen()) == 1  # for what the mirror had broken off


def test_a_certificate_that_nobody_trusts_is_an_error_that_says_so(
    proxy: Proxy, secure: Proxy, image: Repository, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SSL_CERT_FILE")
    proxy.on("", status(500))
    with through(proxy, image, mirrors=[f"https://{secure.address}"]) as registry:
        with pytest.raises(RegistryBroken, match="nor does its mirror help.*(?i:certificate verify failed)"):
            registry.resolve(AMD64)


def test_tls_is_not_left_for_a_redirect_or_a_token(proxy: Proxy, secure: Proxy, storage: Proxy, image: Repository) -> None:
    proxy.on("", status(500))
    for location, header in (
        ("Location", f"http://{storage.address}/x"),
        ("WWW-Authenticate", f'Bearer realm="http://{storage.address}/t"'),
    ):
        secure.behave()
        secure.on("", status(307 if location == "Location" else 401, **{location: header}))
        with through(proxy, image, Login("me", "secret"), mirrors=[f"https://{secure.address}"]) as registry:
            with pytest.raises(RegistryBroken, match="not https|without TLS"):
                registry.resolve(AMD64)
    assert not storage.seen()


# Several at once, as a lazy server does


def test_threads_each_with_a_registry_of_their_own_read_what_is_there(proxy: Proxy, storage: Proxy, image: Repository) -> None:
    SignedStorage(proxy, storage, uses=5)
    TokenGate(proxy, uses=3, refusal=403)
    storage._commands.insert(0, [re.compile(""), cut(10_000), 5])
    wrong: list[object] = []

    def read() -> None:
        with through(proxy, image) as registry:
            if read_in_ranges(registry) != BLOB:
                wrong.append("bytes")

    threads = [threading.Thread(target=read) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not wrong
    assert not any(thread.is_alive() for thread in threads)
