"""Layers fetched ahead of who unpacks them, by a thread; through a proxy to a real registry."""

from __future__ import annotations

import random
import time
from collections.abc import Iterator

import pytest

from actors.image.errors import ContentCorrupt, RegistryBroken
from actors.image.layers.download import PIECES_MAX, Download
from actors.image.registry.manifests import Descriptor
from actors.image.registry.reference import Reference
from actors.image.registry.repository import Registry
from tests.actors.image.images import Repository
from tests.actors.image.proxy import Proxy, silent, status

pytestmark = pytest.mark.usefixtures("unhurried")

LAYERS = [random.Random(number).randbytes(size) for number, size in enumerate((3 << 20, 100, 40 << 20))]


@pytest.fixture
def proxy(repository: Repository) -> Iterator[Proxy]:
    with Proxy(repository.registry.address) as started:
        yield started


@pytest.fixture
def registry(repository: Repository, proxy: Proxy) -> Registry:
    digest = repository.push(blobs=LAYERS, diff_ids=["sha256:" + "0" * 64] * len(LAYERS))["digest"]
    opened = Registry(Reference.parse(f"{proxy.address}/{repository.name}@{digest}"))
    opened.manifest(digest)
    return opened


def layers(registry: Registry) -> list:  # type: ignore[type-arg]
    assert registry.reference.digest
    return registry.manifest(registry.reference.digest).layers


def test_layers_come_in_their_order_each_to_its_end(registry: Registry) -> None:
    with Download(registry, layers(registry)) as download:
        assert [b"".join(download.next_layer()) for _ in LAYERS] == LAYERS


def test_it_runs_ahead_but_not_far(registry: Registry, proxy: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    fetch, fetched = registry.blob, []

    def counted(layer: Descriptor) -> Iterator[bytes]:
        for piece in fetch(layer):
            fetched.append(len(piece))
            yield piece

    monkeypatch.setattr(registry, "blob", counted)
    with Download(registry, layers(registry)) as download:
        first = next(iter(download.next_layer()))
        assert LAYERS[0].startswith(first)
        deadline = time.monotonic() + 60
        while not download._came.full() and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(0.2)
        assert download._came.full()
        assert len(first) < proxy.body_bytes("/blobs/")
        # The first, those that wait, and one that has no place yet; what the kernel has taken ahead is its own affair.
        assert len(fetched) <= 1 + PIECES_MAX + 1
        assert max(fetched) <= 256 << 10
        with pytest.raises(ContentCorrupt):  # who unpacks it gives up, and asks the registry again when this is over
            with Download(registry, []):
                raise ContentCorrupt("x")


def test_what_the_registry_refuses_is_raised_where_the_layer_is_read(registry: Registry, proxy: Proxy) -> None:
    wanted = layers(registry)
    proxy.on(wanted[1].digest, status(404))
    with pytest.raises(RegistryBroken), Download(registry, wanted) as download:
        assert b"".join(download.next_layer()) == LAYERS[0]
        list(download.next_layer())


def test_a_build_that_is_over_does_not_wait_for_a_registry_that_is_silent(registry: Registry, proxy: Proxy) -> None:
    wanted = layers(registry)
    proxy.on("/blobs/", silent())
    begun = time.monotonic()
    with pytest.raises(TimeoutError), Download(registry, wanted):
        raise TimeoutError
    assert time.monotonic() - begun < 45  # before it would first ask again


def test_after_damage_the_registry_is_free_again(registry: Registry) -> None:
    with pytest.raises(ContentCorrupt), Download(registry, layers(registry)) as download:
        next(iter(download.next_layer()))
        raise ContentCorrupt("damaged")
    assert not download._thread.is_alive()
    with Download(registry, layers(registry)) as download:
        assert b"".join(download.next_layer()) == LAYERS[0]
        assert [b"".join(download.next_layer()) for _ in LAYERS[1:]] == LAYERS[1:]
