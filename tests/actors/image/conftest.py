from __future__ import annotations

from collections.abc import Iterator

import pytest

from actors.image.registry import credentials, patience
from actors.image.registry import repository as client
from tests.actors.image.images import Repository, RunningRegistry


@pytest.fixture(scope="session")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningRegistry]:
    """One registry for all tests that do not stop it; each uses a repository of its own."""
    running = RunningRegistry(tmp_path_factory.mktemp("registry"))
    yield running
    running.stop()


@pytest.fixture
def repository(registry: RunningRegistry, request: pytest.FixtureRequest) -> Repository:
    """A repository that no other test uses."""
    return registry.repository("".join(letter for letter in request.node.name.lower() if letter.isalnum())[:100])


@pytest.fixture(autouse=True)
def anonymous(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Whatever `docker login` left on this machine is none of these tests' business."""
    monkeypatch.setenv("DOCKER_CONFIG", str(tmp_path_factory.getbasetemp()))


@pytest.fixture(autouse=True)
def unknown_hosts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of any host's speed: its port may have been another's, which was faster."""
    monkeypatch.setattr(patience.RATES, "_by_host", {})


@pytest.fixture
def unhurried(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is asked for twice because this machine stood still for some seconds.

    For tests that count requests and bytes, or that tell who waits from who has asked again.
    """
    monkeypatch.setattr(patience, "CONNECT_TIMEOUT_S", 60.0)
    monkeypatch.setattr(patience, "ANSWER_TIMEOUTS_S", (60.0,) * patience.ATTEMPTS)
    monkeypatch.setattr(patience, "SLOW_WINDOW_S", 600.0)
    monkeypatch.setattr(client, "MIRROR_TIMEOUT_S", 120.0)
    monkeypatch.setattr(credentials, "HELPER_TIMEOUT_S", 60.0)
