"""The registry client against Debian's docker-registry, and against HTTP servers that do what a test wants done."""

from __future__ import annotations

import base64
import functools
import gzip
import hashlib
import json
import platform as host
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import urllib3

from actors.image.errors import (
    ContentCorrupt,
    ImageError,
    ImageUnknown,
    PlatformMissing,
    RegistryBroken,
    RegistryUnreachable,
    Unauthorised,
    Unsupported,
)
from actors.image.registry import patience
from actors.image.registry.challenges import BasicChallenge, BearerChallenge, parse_challenge, parse_token
from actors.image.registry.credentials import docker_login
from actors.image.registry.login import Login
from actors.image.registry.manifests import Descriptor, Index, Manifest, Platform, choose, parse_config, parse_manifest
from actors.image.registry.reference import Reference
from actors.image.registry.repository import Registry
from tests.actors.image.images import OCI, Repository, RunningRegistry, digest, member, tar
from tests.actors.image.proxy import Proxy

AMD64 = Platform("linux", "amd64")
BLOB = bytes(range(256)) * 4096  # 1 MiB
LAYER = tar(member("a", b"1"))

pytestmark = pytest.mark.usefixtures("unhurried")


def descriptor(**fields: Any) -> dict[str, Any]:
    return {"digest": "sha256:" + "0" * 64, "size": 1, "mediaType": f"{OCI}.layer.v1.tar", **fields}


# What stands in a manifest, an index, a config


@pytest.mark.parametrize(
    ("document", "error", "text"),
    [
        (b"", RegistryBroken, "not an image manifest"),
        (b"<html>", RegistryBroken, "not an image manifest"),
        (b"[]", RegistryBroken, "not an image manifest"),
        ({"schemaVersion": 1, "fsLayers": []}, Unsupported, "schema version 1"),
        ({"schemaVersion": 2}, RegistryBroken, "neither"),
        ({"config": descriptor()}, RegistryBroken, "neither"),
        ({"config": descriptor(), "layers": [], "manifests": []}, RegistryBroken, "at once"),
        ({"config": descriptor(), "layers": [descriptor(digest="sha256:../../x")]}, RegistryBroken, "not a sha256"),
        ({"config": descriptor(), "layers": [descriptor(digest="sha512:" + "0" * 128)]}, Unsupported, "not a sha256"),
        ({"config": descriptor(size=-1), "layers": []}, RegistryBroken, "of -1 bytes"),
        ({"config": descriptor(), "layers": [descriptor(size="1")]}, RegistryBroken, "not an image manifest"),
        ({"config": descriptor(), "layers": [descriptor(mediaType="application/vnd.helm.chart")]}, Unsupported, "of type"),
        ({"config": descriptor(), "layers": [descriptor(mediaType=f"{OCI}.layer.v1.tar+encrypted")]}, Unsupported, "of type"),
        ({"manifests": [descriptor(digest="x")]}, RegistryBroken, "not a sha256"),
    ],
)  # fmt: skip
def test_a_document_that_is_no_manifest_is_refused(document: Any, error: type[ImageError], text: str) -> None:
    body = document if isinstance(document, bytes) else json.dumps(document).encode()
    with pytest.raises(error, match=text):
        parse_manifest(body, "name")


def test_manifests_and_indexes_of_docker_and_oci_are_known_by_their_fields() -> None:
    docker = "application/vnd.docker.image.rootfs.diff.tar.gzip"
    manifest = {
        "schemaVersion": 2,
        "config": descriptor(),
        "layers": [descriptor(mediaType=docker), descriptor()],
        "annotations": None,
    }
    found = parse_manifest(json.dumps(manifest).encode(), "name")
    assert isinstance(found, Manifest)
    assert [layer.media_type for layer in found.layers] == [docker, f"{OCI}.layer.v1.tar"]
    found = parse_manifest(json.dumps({"schemaVersion": 2, "manifests": [descriptor(platform=None)]}).encode(), "name")
    assert isinstance(found, Index)


def index(*platforms: str, attestations: bool = True) -> Index:
    """An index of these platforms, the digest of each made of its place."""
    manifests = [
        Descriptor(f"sha256:{place:064}", 1, f"{OCI}.manifest.v1+json", Platform(*text.split("/")) if text else None)
        for place, text in enumerate(platforms)
    ]
    if attestations:
        manifests.insert(0, Descriptor("sha256:" + "a" * 64, 1, platform=Platform("unknown", "unknown")))
        manifests.append(Descriptor("sha256:" + "b" * 64, 1, annotations={"vnd.docker.reference.type": "attestation-manifest"}))
    return Index(manifests)


@pytest.mark.parametrize(
    ("platform", "there", "chosen"),
    [
        ("linux/amd64", ["linux/arm64", "linux/amd64"], 1),
        ("linux/amd64", ["windows/amd64", "linux/amd64/v3", "linux/amd64"], 2),
        ("linux/amd64", ["linux/amd64", "linux/amd64"], 0),
        ("linux/amd64/v3", ["linux/amd64", "linux/amd64/v3"], 1),
        ("linux/arm64/v8", ["linux/arm64/v9", "linux/arm64", "linux/arm64/v8"], 2),
        ("linux/arm64/v8", ["linux/arm64/v9", "linux/arm64"], 1),
        ("linux/arm/v7", ["linux/arm/v5", "linux/arm/v6"], 1),
        ("linux/arm/v6", ["linux/arm/v7", "linux/arm/v5"], 1),
        ("linux/amd64", [""], 0),
        ("linux/amd64", ["linux/arm64"], None),
        ("linux/amd64", ["linux/amd64/v3"], None),
        ("linux/amd64", ["", ""], None),
        ("linux/arm/v6", ["linux/arm/v7"], None),
        ("linux/amd64", [], None),
    ],
)
def test_the_manifest_for_a_platform_is_chosen(platform: str, there: list[str], chosen: int | None) -> None:
    if chosen is not None:
        assert choose(index(*there), Platform.parse(platform), "name").digest == f"sha256:{chosen:064}"
        return
    with pytest.raises(PlatformMissing) as caught:
        choose(index(*there), Platform.parse(platform), "name")
    assert platform in str(caught.value)
    assert all(name in str(caught.value) for name in there)
    assert "unknown" not in str(caught.value)


@pytest.mark.parametrize(
    ("machine", "platform"),
    [("x86_64", "linux/amd64"), ("aarch64", "linux/arm64/v8"), ("armv7l", "linux/arm/v7"), ("riscv64", "linux/riscv64")],
)
def test_this_machines_platform(machine: str, platform: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "machine", lambda: machine)
    assert str(Platform.own()) == platform


def test_a_platform_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in ("", "linux", "linux/", "linux/arm/v7/x"):
        with pytest.raises(Unsupported):
            Platform.parse(text)
    monkeypatch.setattr(host, "machine", lambda: "vax")
    with pytest.raises(Unsupported, match="vax"):
        Platform.own()


def test_a_config_must_fit_manifest_and_platform() -> None:
    manifest = Manifest(Descriptor("sha256:" + "0" * 64, 1), [Descriptor("sha256:" + "1" * 64, 1)])
    rootfs = {"type": "layers", "diff_ids": ["sha256:" + "2" * 64]}
    good = {"os": "linux", "architecture": "amd64", "rootfs": rootfs, "config": {"Env": ["A=1"], "Entrypoint": None}}
    process = parse_config(json.dumps(good).encode(), manifest, AMD64, "name").config
    assert process and (process.env, process.entrypoint, process.cmd) == (["A=1"], None, None)
    assert parse_config(json.dumps({"rootfs": rootfs}).encode(), manifest, AMD64, "name").config is None
    for change, error in (
        ({"architecture": "arm64"}, PlatformMissing),
        ({"os": "windows"}, PlatformMissing),
        ({"rootfs": {"type": "layers", "diff_ids": []}}, RegistryBroken),
        ({"rootfs": {"type": "layers", "diff_ids": ["md5:1"]}}, Unsupported),
        ({"rootfs": None}, RegistryBroken),
        ({"config": {"Env": "A=1"}}, RegistryBroken),
    ):
        with pytest.raises(error):
            parse_config(json.dumps(good | change).encode(), manifest, AMD64, "name")


# Challenges and credentials


@pytest.mark.parametrize(
    ("headers", "challenge"),
    [
        (['Bearer realm="https://a/t",service="s",scope="x:y:pull"'], BearerChallenge("https://a/t", "s", "x:y:pull")),
        (['bearer Realm="https://a.example/t"'], BearerChallenge("https://a.example/t", "", "default")),
        (['Basic realm="r"'], BasicChallenge()),
        (['Basic realm="r"', 'Bearer realm="https://a.example/t"'], BearerChallenge("https://a.example/t", "", "default")),
        (["Negotiate"], None),
        (['Bearer realm=""'], None),
        ([], None),
    ],
)  # fmt: skip
def test_challenges(headers: list[str], challenge: BearerChallenge | BasicChallenge | None) -> None:
    assert parse_challenge(headers, "default") == challenge


def test_tokens() -> None:
    assert parse_token(b'{"token": "a", "access_token": "b"}') == "a"
    assert parse_token(b'{"access_token": "b", "expires_in": 60}') == "b"
    assert [parse_token(body) for body in (b"{}", b"[]", b"no", b'{"token": 1}')] == [None] * 4
    assert (
        BearerChallenge("https://a/t?x=1", "s", "repository:a/b:pull").url()
        == "https://a/t?x=1&service=s&scope=repository%3Aa%2Fb%3Apull"
    )


def test_what_docker_login_left_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    auth = base64.b64encode(b"me:pass:word").decode()
    auths = {
        "r.example:5000": {"auth": auth},
        "https://index.docker.io/v1/": {"auth": auth},
        "b.example": {"auth": "?"},
        "c.example": {},
    }
    assert docker_login("r.example:5000") is None
    (tmp_path / "config.json").write_text(json.dumps({"auths": auths}))
    assert docker_login("r.example:5000") == docker_login("docker.io") == Login("me", "pass:word")
    assert [docker_login(name) for name in ("r.example", "b.example", "c.example")] == [None] * 3
    (tmp_path / "config.json").write_text("{")
    assert docker_login("r.example:5000") is None


# Against the real one


def opened(repository: Repository, tag: str = "latest") -> Registry:
    return Registry(Reference.parse(repository.reference(tag)))


def test_a_tag_and_a_digest_lead_to_the_same_image(repository: Repository) -> None:
    pushed = repository.push(LAYER, process={"Cmd": ["a"]}, architecture="amd64")
    with opened(repository) as registry:
        assert registry.resolve(AMD64) == pushed["digest"]
        manifest = registry.manifest(pushed["digest"])
        config = registry.config(manifest, AMD64)
        assert config.config and config.config.cmd == ["a"]
        assert config.rootfs.diff_ids == [digest(LAYER)]
        assert gzip.decompress(b"".join(registry.blob(manifest.layers[0]))) == LAYER
    pinned = Reference.parse(repository.reference()).pinned(pushed["digest"])
    with Registry(pinned) as registry:
        assert registry.resolve(AMD64) == pushed["digest"]


def test_an_index_is_resolved_by_platform(repository: Repository) -> None:
    entries = []
    for architecture in ("arm64", "amd64"):
        pushed = repository.push(tar(member(architecture)), architecture=architecture, tag=architecture)
        entries.append(pushed | {"platform": {"os": "linux", "architecture": architecture}})
    repository.push_document({"schemaVersion": 2, "mediaType": f"{OCI}.index.v1+json", "manifests": entries}, "latest")
    with opened(repository) as registry:
        assert registry.resolve(Platform("linux", "arm64", "v8")) == entries[0]["digest"]
        assert registry.resolve(AMD64) == entries[1]["digest"]
        with pytest.raises(PlatformMissing, match="linux/s390x; the registry has: linux/amd64, linux/arm64"):
            registry.resolve(Platform("linux", "s390x"))


def test_an_image_that_skopeo_copied_is_found(repository: Repository, tmp_path: Path) -> None:
    repository.push(LAYER, architecture="amd64")
    copy = ["skopeo", "copy", "-q", "--src-tls-verify=false", "--dest-tls-verify=false"]
    source, target = (f"docker://{repository.reference(tag)}" for tag in ("latest", "docker"))
    subprocess.run([*copy, "--format=v2s2", source, target], check=True, timeout=300)
    with opened(repository, "docker") as registry:
        manifest = registry.manifest(registry.resolve(AMD64))
        assert manifest.layers[0].media_type == "application/vnd.docker.image.rootfs.diff.tar.gzip"
        assert registry.config(manifest, AMD64).rootfs.diff_ids == [digest(LAYER)]


def test_an_unknown_image_is_named(repository: Repository) -> None:
    with opened(repository, "nosuch") as registry, pytest.raises(ImageUnknown, match=f"{repository.name}:nosuch"):
        registry.resolve(AMD64)
    repository.push(LAYER)
    with opened(repository, "nosuch") as registry, pytest.raises(ImageUnknown, match=f"{repository.name}:nosuch"):
        registry.resolve(AMD64)


def test_ranges_are_read(repository: Repository) -> None:
    blob = repository.push_blob(BLOB)["digest"]
    with opened(repository) as registry:
        assert registry.read_range(blob, 0, 1) == BLOB[:1]
        assert registry.read_range(blob, 1000, 100_000) == BLOB[1000:101_000]
        assert registry.read_range(blob, len(BLOB) - 5, 5) == BLOB[-5:]
        for offset, length in ((len(BLOB) - 5, 6), (len(BLOB), 1), (len(BLOB) + 10, 1)):
            with pytest.raises(ContentCorrupt, match="ends before"):
                registry.read_range(blob, offset, length)
        with pytest.raises(RegistryBroken, match="has lost"):
            registry.read_range("sha256:" + "0" * 64, 0, 1)


def test_a_tampered_manifest_or_config_is_noticed(repository: Repository) -> None:
    pushed = repository.push(tar(member("tampered")))  # content that no other test's image shares
    file = repository.blob_file(pushed["digest"])
    good = file.read_bytes()
    config = json.loads(good)["config"]["digest"]
    repository.blob_file(config).write_bytes(repository.blob_file(config).read_bytes().replace(b"linux", b"minix"))
    with opened(repository) as registry, pytest.raises(ContentCorrupt, match=config):
        registry.config(registry.manifest(pushed["digest"]), AMD64)
    file.write_bytes(good.replace(b"schemaVersion", b"schemaversion"))
    with opened(repository) as registry, pytest.raises(ContentCorrupt, match=pushed["digest"]):
        registry.manifest(pushed["digest"])


# Through a proxy that misbehaves


def through(proxy: Proxy, repository: Repository, **access: Any) -> Registry:
    return Registry(Reference.parse(f"{proxy.address}/{repository.name}"), **access)


def test_a_range_moves_no_more_than_it_is_long(registry: RunningRegistry, repository: Repository) -> None:
    blob = repository.push_blob(BLOB)["digest"]
    with Proxy(registry.address) as proxy, through(proxy, repository) as client:
        assert client.read_range(blob, 1000, 5000) == BLOB[1000:6000]
        assert proxy.body_bytes("/blobs/") == 5000
        assert [exchange.range for exchange in proxy.seen("/blobs/")] == [(1000, 5000)]


# Against servers that do what a test wants

Answer = Callable[[BaseHTTPRequestHandler], None]


@contextmanager
def server(answer: Answer) -> Iterator[str]:
    """An HTTP server on loopback whose every GET is `answer`'s; its address."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            answer(self)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    running = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"127.0.0.1:{running.server_port}"
    finally:
        running.shutdown()
        thread.join()
        running.server_close()


def reply(request: BaseHTTPRequestHandler, status: int, body: bytes = b"", **headers: str) -> None:
    request.send_response(status)
    for key, value in headers.items():
        request.send_header(key.replace("_", "-"), value)
    request.send_header("Content-Length", str(len(body)))
    request.end_headers()
    request.wfile.write(body)


def read_blob(registry: Registry) -> bytes:
    return b"".join(registry.blob(Descriptor(digest(BLOB), len(BLOB))))


def test_a_token_is_fetched_used_and_renewed_when_it_has_run_out() -> None:
    asked: list[str] = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        asked.append(request.path)
        if request.path.startswith("/token"):
            reply(request, 200, json.dumps({"token": f"t{sum('token' in path for path in asked)}"}).encode())
        elif request.headers["Authorization"] == "Bearer t1" and asked.count("/v2/a/blobs/sha256:" + "0" * 64) < 3:
            reply(request, 200, b"first")
        elif request.headers["Authorization"] == "Bearer t2":
            reply(request, 200, b"second")
        elif request.headers["Authorization"]:
            reply(request, 403)  # with no challenge, as some registries say that a token has run out
        else:
            realm = f'Bearer realm="http://{request.headers["Host"]}/token",service="s",scope="repository:a:pull"'
            reply(request, 401, b"{}", WWW_Authenticate=realm)

    with server(answer) as address, Registry(Reference.parse(f"{address}/a")) as registry:
        blob = Descriptor("sha256:" + "0" * 64, 5)
        assert b"".join(registry.blob(blob)) == b"first"
        assert b"".join(registry.blob(blob)) == b"second"
    assert asked[1] == "/token?service=s&scope=repository%3Aa%3Apull"


def test_a_password_is_sent_only_when_it_is_asked_for() -> None:
    sent: list[str | None] = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        sent.append(request.headers["Authorization"])
        if request.headers["Authorization"] == Login("me", "secret").basic:
            reply(request, 200, BLOB)
        else:
            reply(request, 401, WWW_Authenticate='Basic realm="r"')

    with server(answer) as address:
        reference = Reference.parse(f"{address}/a")
        with Registry(reference, Login("me", "secret")) as registry:
            assert read_blob(registry) == BLOB
        assert sent == [None, Login("me", "secret").basic]
        with (
            Registry(reference, Login("me", "wrong")) as registry,
            pytest.raises(Unauthorised, match="refuses these credentials"),
        ):
            read_blob(registry)
        with Registry(reference) as registry, pytest.raises(Unauthorised, match=r"refuses anonymous access .*docker login"):
            read_blob(registry)


@pytest.mark.parametrize(
    ("status", "error"), [(401, Unauthorised), (403, Unauthorised), (404, RegistryBroken), (200, RegistryBroken)]
)
def test_a_token_server_that_refuses_is_the_registrys_refusal(status: int, error: type[ImageError]) -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        realm = f'Bearer realm="http://{request.headers["Host"]}/token"'
        reply(request, 401 if request.path.startswith("/v2/") else status, WWW_Authenticate=realm)

    with server(answer) as address, Registry(Reference.parse(f"{address}/a")) as registry, pytest.raises(error):
        read_blob(registry)


def test_a_redirect_to_another_host_does_not_carry_the_authorisation() -> None:
    storage: list[dict[str, str]] = []

    def store(request: BaseHTTPRequestHandler) -> None:
        storage.append(dict(request.headers))
        start = int(request.headers["Range"].removeprefix("bytes=").split("-")[0])
        reply(request, 206, BLOB[start : start + 10], Content_Range=f"bytes {start}-{start + 9}/{len(BLOB)}")

    def answer(request: BaseHTTPRequestHandler) -> None:
        if request.headers["Authorization"]:
            reply(request, 307, Location=f"http://{other}{request.path}")
        else:
            reply(request, 401, WWW_Authenticate='Basic realm="r"')

    with server(store) as other, server(answer) as address:
        with Registry(Reference.parse(f"{address}/a"), Login("me", "secret")) as registry:
            assert registry.read_range(digest(BLOB), 100, 10) == BLOB[100:110]
    assert len(storage) == 1
    assert "Authorization" not in storage[0]
    assert storage[0]["Range"] == "bytes=100-109"


def test_a_refusal_by_another_host_is_no_challenge() -> None:
    tokens = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        if request.path.startswith("/token"):
            tokens.append(request.path)
        reply(request, 401, WWW_Authenticate=f'Bearer realm="http://{request.headers["Host"]}/token"')

    def redirect(request: BaseHTTPRequestHandler) -> None:
        reply(request, 302, Location=f"http://{other}/elsewhere")

    with server(answer) as other, server(redirect) as address, Registry(Reference.parse(f"{address}/a")) as registry:
        with pytest.raises(Unauthorised):
            read_blob(registry)
    assert tokens == []


def test_a_registry_without_ranges_sends_all_and_the_part_is_taken() -> None:
    with server(lambda request: reply(request, 200, BLOB)) as address, Registry(Reference.parse(f"{address}/a")) as registry:
        assert registry.read_range(digest(BLOB), 1000, 600_000) == BLOB[1000:601_000]


@pytest.mark.parametrize("content_range", [None, "bytes 0-9/100", "bytes */100", "items 100-109/200"])
def test_another_range_than_was_asked_for_is_refused(content_range: str | None) -> None:
    headers = {"Content_Range": content_range} if content_range else {}
    with server(lambda request: reply(request, 206, bytes(10), **headers)) as address:
        with Registry(Reference.parse(f"{address}/a")) as registry, pytest.raises(RegistryBroken, match="another range"):
            registry.read_range(digest(BLOB), 100, 10)


@pytest.mark.parametrize("ranges", [True, False])
def test_a_connection_that_breaks_is_taken_up_where_it_broke(ranges: bool) -> None:
    asked: list[str | None] = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        wanted = request.headers["Range"]
        asked.append(wanted)
        start = int(wanted.removeprefix("bytes=").rstrip("-")) if wanted and ranges else 0
        request.send_response(206 if wanted and ranges else 200)
        if wanted and ranges:
            request.send_header("Content-Range", f"bytes {start}-{len(BLOB) - 1}/{len(BLOB)}")
        request.send_header("Content-Length", str(len(BLOB) - start))
        request.end_headers()
        request.wfile.write(BLOB[start : 300_000 * len(asked)])
        request.close_connection = True

    with server(answer) as address, Registry(Reference.parse(f"{address}/a")) as registry:
        assert read_blob(registry) == BLOB
    assert asked[0] is None
    assert len(asked) == 4


def test_a_connection_that_breaks_without_any_progress_is_given_up() -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", str(len(BLOB)))
        request.end_headers()
        request.close_connection = True

    with server(answer) as address, Registry(Reference.parse(f"{address}/a")) as registry:
        with pytest.raises(RegistryUnreachable, match=address):
            read_blob(registry)


@pytest.mark.parametrize(
    ("status", "error"), [(500, RegistryBroken), (503, RegistryBroken), (429, RegistryUnreachable), (418, RegistryBroken)]
)
def test_errors_of_the_registry_are_told_after_a_few_attempts(status: int, error: type[ImageError]) -> None:
    asked = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        asked.append(request.path)
        reply(request, status, Retry_After="0")

    with server(answer) as address, Registry(Reference.parse(f"{address}/a")) as registry:
        with pytest.raises(error, match=str(status)):
            registry.resolve(AMD64)
    assert len(asked) == (1 if status == 418 else 4)


def test_what_passes_is_waited_for() -> None:
    asked = []

    def answer(request: BaseHTTPRequestHandler) -> None:
        asked.append(request.path)
        reply(request, 503 if len(asked) < 3 else 200, BLOB, Retry_After="0")

    with server(answer) as address, Registry(Reference.parse(f"{address}/a")) as registry:
        assert read_blob(registry) == BLOB


def test_a_registry_that_is_not_there_is_named() -> None:
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{nobody.getsockname()[1]}"
        with Registry(Reference.parse(f"{address}/a")) as registry, pytest.raises(RegistryUnreachable, match=address) as caught:
            registry.resolve(AMD64)
    assert "refused" in str(caught.value)
    assert "0x" not in str(caught.value)


def test_a_registry_that_is_silent_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "ANSWER_TIMEOUTS_S", (0.1,) * 4)
    done = threading.Event()

    def answer(request: BaseHTTPRequestHandler) -> None:
        done.wait(60)

    with server(answer) as address, Registry(Reference.parse(f"{address}/a")) as registry:
        with pytest.raises(RegistryUnreachable, match="timed out"):
            registry.resolve(AMD64)
        done.set()


def test_other_hosts_are_reached_by_https_only(monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []

    def request(self: urllib3.PoolManager, method: str, url: str, **rest: Any) -> None:
        opened.append(url)
        raise urllib3.exceptions.HTTPError("not in a test")

    monkeypatch.setattr(urllib3.PoolManager, "request", request)
    for text, url in {
        "ubuntu:22.04": "https://registry-1.docker.io/v2/library/ubuntu/manifests/22.04",
        "r.example:5000/a/b": "https://r.example:5000/v2/a/b/manifests/latest",
        "localhost:5000/a": "http://localhost:5000/v2/a/manifests/latest",
        "[::1]:5000/a": "http://[::1]:5000/v2/a/manifests/latest",
    }.items():
        with Registry(Reference.parse(text)) as registry, pytest.raises(RegistryUnreachable):
            registry.resolve(AMD64)
        assert opened.pop() == url


def test_a_manifest_without_end_is_not_read_to_its_end() -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.end_headers()
        try:
            while True:
                request.wfile.write(bytes(1 << 20))
        except ConnectionError:
            request.close_connection = True

    with server(answer) as address, Registry(Reference.parse(f"{address}/a")) as registry:
        with pytest.raises(RegistryBroken, match="more than"):
            registry.resolve(AMD64)


def test_a_manifest_is_checked_against_what_the_registry_announces() -> None:
    body = json.dumps({"config": descriptor(), "layers": []}).encode()
    right = "sha256:" + hashlib.sha256(body).hexdigest()
    for announced, good in ((right, True), ("", True), ("sha512:abc", True), ("sha256:" + "0" * 64, False)):
        answer = functools.partial(reply, status=200, body=body, Docker_Content_Digest=announced)
        with server(answer) as address, Registry(Reference.parse(f"{address}/a")) as registry:
            if good:
                assert registry.resolve(AMD64) == right
            else:
                with pytest.raises(ContentCorrupt, match="damaged"):
                    registry.resolve(AMD64)
