"""Whether an image could be fetched again now: asked of a real registry, behind a proxy that misbehaves."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from actors.cache import sources
from actors.cache.sources import Sources
from actors.lazytree.trees import TreeSource
from tests.actors.image.images import RunningRegistry, digest, member, tar
from tests.actors.image.proxy import Proxy, silent, status


def test_what_a_registry_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path))
    monkeypatch.setattr(sources, "ANSWER_S", 30.0)  # of those who answer
    registry = RunningRegistry(tmp_path)
    layers = [tar(member("a", b"1" * 5000)), tar(member("b", b"2" * 5000))]
    registry.repository("sources").push(*layers, blobs=layers, media_type="application/vnd.oci.image.layer.v1.tar")
    with Proxy(registry.address) as proxy:

        def source(*more: str, private: bool = False) -> TreeSource:
            return TreeSource(f"{proxy.address}/sources:latest", [*map(digest, layers), *more], private=private)

        assert Sources("").has(source())
        assert proxy.seen("/blobs/")
        assert not Sources("").has(source("sha256:" + "0" * 64))  # a layer was deleted
        for answer, private, expected in ((404, False, False), (401, False, False), (401, True, True), (503, False, False)):
            proxy.on("/blobs/", status(answer))
            asked = Sources("")
            assert asked.has(source(private=private)) is expected, (answer, private)
            assert bool(asked.refusals) is not expected
            proxy.behave()
        # One that is silent is waited for once, whatever it has of ours; and a workspace asks nobody.
        monkeypatch.setattr(sources, "ANSWER_S", 0.3)
        proxy.on("", silent())
        questions: list[float] = []
        asked = Sources("", lambda: questions.append(time.monotonic()))
        assert not asked.has(source()) and not asked.has(source())
        assert asked.has(TreeSource(store="/somewhere"))
        assert len(questions) == 1 and time.monotonic() - questions[0] < 30  # it would be silent for an hour
    assert not Sources("").has(TreeSource("not a reference", ["sha256:1"]))
    registry.stop()
