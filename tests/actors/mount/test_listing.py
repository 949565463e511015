"""The store's listing, as a sync finds it again, and the one way in which stores are opened."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from actors.mount.listing import Entry, make_listing_durable, open_beneath, read_listing
from tests.actors.mount.conftest import OLD_NS, Workspace, write


def test_a_listing_that_is_not_whole_is_an_error(workspace: Workspace, store: Path) -> None:
    write(store / "a", "a")
    workspace.index()
    make_listing_durable(str(workspace.directory))
    path = workspace.directory / "listing"
    content = path.read_bytes()
    status = (store / "a").stat()
    assert read_listing(str(workspace.directory)) == {
        b"a": Entry(status.st_mode, OLD_NS, (status.st_ino, 1, OLD_NS)),
    }
    for broken in (b"", content[:-1], b"\0" * len(content), content + b"x"):
        path.write_bytes(broken)
        with pytest.raises(msgspec.MsgspecError):
            read_listing(str(workspace.directory))


def test_no_link_is_followed_out_of_a_directory(tmp_path: Path) -> None:
    write(tmp_path / "secret", "SECRET")
    (tmp_path / "d/e").mkdir(parents=True)
    os.symlink("..", tmp_path / "d/e/up")
    os.symlink(tmp_path / "secret", tmp_path / "d/link")
    os.symlink("e", tmp_path / "d/inside")
    directory = os.open(tmp_path / "d", os.O_RDONLY)
    for path in (
        b"../secret",
        b"e/../../secret",
        b"link",
        b"e/up",
        b"inside/up",
        b"inside/x",
        bytes(tmp_path / "secret"),
        b"e/up/link",
    ):
        with pytest.raises(OSError, match="(Invalid cross-device link|Too many levels of symbolic links)"):
            os.close(open_beneath(directory, path, os.O_RDONLY))
    opened = open_beneath(directory, b"link", os.O_PATH)  # of the link itself one may ask
    assert os.readlink(b"", dir_fd=opened) == bytes(tmp_path / "secret")
    os.close(opened)
    os.close(directory)
