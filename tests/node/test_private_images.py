"""Images that not every task may have, and mirrors: through a proxy in front of a real registry."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from actors.image.registry.login import Login
from actors.lazytree.mounts import Mount, mounts_below
from tests.actors.image.images import RunningRegistry
from tests.actors.image.proxy import Proxy, TokenGate
from tests.node.conftest import busybox_layer
from tests.node.daemon import Daemon, running


@pytest.fixture
def proxy(registry: RunningRegistry) -> Iterator[Proxy]:
    with Proxy(registry.address) as started:
        yield started


def test_a_task_with_a_login_runs_on_a_private_image_and_one_without_does_not(
    daemon: Daemon, proxy: Proxy, image: str, tmp_path: Path
) -> None:
    gate = TokenGate(proxy)
    gate.passwords = {"me": "right"}
    private = f"{proxy.address}/{image.partition('/')[2]}"
    refused = daemon.run("true", image=private)
    assert refused.state == "failed"
    assert "refuses anonymous access" in (refused.error or "")

    login = Login("me", "right")
    assert daemon.run("true", image=private, login=login).exit_code == 0
    asked = len(proxy.seen())
    assert daemon.run("true", image=private, login=login).exit_code == 0
    assert len(proxy.seen()) == asked  # what the tag names is known for a while, to this login

    # The image is on the node now, and still it is not for everybody who knows its name.
    assert "refuses anonymous access" in (daemon.run("true", image=private).error or "")
    assert "refuses these credentials" in (daemon.run("true", image=private, login=Login("me", "wrong")).error or "")

    file = tmp_path / "login.json"
    file.write_text(json.dumps({"username": "me", "password": "right"}))
    done = daemon.command("submit", "--wait", "--login", str(file), private, "--", "echo", "mine")
    assert (done.returncode, done.stdout) == (0, b"mine\n"), done.stderr
    assert "right" not in daemon.log.read_text()


def test_a_registry_that_is_away_is_not_missed_by_who_was_let_in_before(
    tmp_path: Path, registry: RunningRegistry, image: str
) -> None:
    with Proxy(registry.address) as proxy, running(tmp_path, image, AERIE_IMAGE_RESOLVE_INTERVAL="0s") as daemon:
        gate = TokenGate(proxy)
        gate.passwords = {"me": "right"}
        private = f"{proxy.address}/{image.partition('/')[2]}"
        assert daemon.run("true", image=private, login=Login("me", "right")).exit_code == 0
        proxy._server.server_close()  # nobody is there any more
        assert daemon.run("true", image=private, login=Login("me", "right")).exit_code == 0
        assert "cannot be reached" in (daemon.run("true", image=private).error or "")


def test_mirrors_serve_what_their_registry_does_not(tmp_path: Path, registry: RunningRegistry, image: str) -> None:
    registry.repository("elsewhere").push(busybox_layer(), tag="1", process={"Env": ["PATH=/bin"]})
    with (
        Proxy(registry.address) as proxy,
        running(
            tmp_path, image, AERIE_IMAGE_MIRRORS=f"registry.invalid=127.0.0.1:9 registry.invalid=http://{proxy.address}"
        ) as daemon,
    ):
        result = daemon.run("true", image="registry.invalid/elsewhere:1")
        assert (result.state, result.exit_code) == ("stopped", 0), result
        assert proxy.seen("ns=registry.invalid")
        assert "registry.invalid" in (daemon.run("true", image="registry.invalid/nosuch:1").error or "")


def test_dockers_credentials_are_renewed_while_an_image_is_mounted(
    tmp_path: Path, registry: RunningRegistry, image: str
) -> None:
    def docker_config(password: str) -> None:
        auths = {proxy.address: {"username": "me", "password": password}}
        (tmp_path / "config.json").write_text(json.dumps({"auths": auths}))

    homes = [tmp_path / "1", tmp_path / "2"]
    for home in homes:
        home.mkdir()
    shared = {"AERIE_IMAGE_ARCHIVE_DIR": str(tmp_path / "archives"), "DOCKER_CONFIG": str(tmp_path)}
    with Proxy(registry.address) as proxy:
        docker_config("old")
        private = f"{proxy.address}/{image.partition('/')[2]}"
        with running(homes[0], private, **shared) as daemon:
            assert daemon.run("true").exit_code == 0  # it has built the archive
        gate = TokenGate(proxy)
        gate.passwords = {"me": "old"}
        with running(homes[1], private, **shared) as daemon:
            assert daemon.run("true").exit_code == 0
            [lazy] = lazy_mounts(daemon)
            gate.passwords = {"me": "new"}
            gate.revoke()
            docker_config("new")
            result = daemon.run("md5sum /etc/data")
            assert result.exit_code == 0, result
            assert hashlib.md5(bytes(range(256)) * 4000).hexdigest().encode() in daemon.logs(result.task)[0]
            assert lazy_mounts(daemon) == [lazy]


def lazy_mounts(daemon: Daemon) -> list[Mount]:
    return [mount for mount in mounts_below(str(daemon.run_dir / "images")) if mount.kind == "fuse"]
