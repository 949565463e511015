"""A LAZY mount without a server: what it is told is what libfuse tells, and its first server has what was asked meanwhile."""

from __future__ import annotations

import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import msgspec
import pyfuse3
import pytest
import trio

from actors.lazytree import greeting, mounts
from actors.mount.serve import serve
from tests.actors.lazytree.harness import Server, Tree, in_child

FILES = {"there": b"there" * 1000, "missing": b"missing" * 1000}


@pytest.fixture
def tree(tmp_path: Path) -> Iterator[Tree]:
    made = Tree(tmp_path, FILES)
    with made.objects.create() as file:
        file.write(FILES["there"])
        made.objects.publish(file, made.keys["there"])
    yield made
    made.close()


def greet(tree: Tree) -> None:
    os.write(tree.fuse, greeting.init_reply(tree.connection.init_request))
    with greeting.answering(tree.fuse):
        in_child(tree.mount)


def serve_greeted(tree: Tree) -> None:
    tree.servers.append(Server(serve, tree.fuse, msgspec.structs.replace(tree.order, replacement=True)))


def start_reading(tree: Tree, name: str) -> tuple[threading.Thread, list[bytes]]:
    read: list[bytes] = []
    reader = threading.Thread(target=lambda: read.append(in_child(Path(tree.merged, name).read_bytes)))
    reader.start()
    time.sleep(0.2)
    assert not read
    return reader, read


def reply_of_libfuse(init_request: bytes) -> bytes:
    class Nothing(pyfuse3.Operations):
        supports_dot_lookup = False

    async def answer() -> bytes:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(pyfuse3.main, 1, 2)
            await trio.lowlevel.wait_readable(ours)
            nursery.cancel_scope.cancel()
        return ours.recv(4096)

    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    descriptor = theirs.detach()
    os.set_blocking(descriptor, False)
    pyfuse3.init(Nothing(), f"/dev/fd/{descriptor}", set())
    ours.send(init_request)
    return trio.run(answer)


def test_init_is_answered_as_libfuse_answers_it(tree: Tree) -> None:
    request = tree.connection.init_request
    ours, theirs = greeting.init_reply(request), in_child(lambda: reply_of_libfuse(request))
    fields = struct.Struct("<IiQ IIII HHII HHI")
    names = "length error unique major minor read_ahead flags background congested max_write time_gran pages alignment more"
    told, expected = (dict(zip(names.split(), fields.unpack_from(reply), strict=True)) for reply in (ours, theirs))
    told["minor"] = expected["minor"]  # newer ones changed nothing that is used here
    assert told == expected


def test_a_tree_is_mounted_and_read_from_objects_without_a_server(tree: Tree) -> None:
    greet(tree)
    assert in_child(lambda: Path(tree.merged, "there").read_bytes()) == FILES["there"]


def test_who_asks_before_there_is_a_server_is_answered_by_the_first(tree: Tree) -> None:
    greet(tree)
    reader, read = start_reading(tree, "missing")
    serve_greeted(tree)
    reader.join(60)
    assert read == [FILES["missing"]]


def test_what_was_read_and_not_answered_is_sent_again_to_the_first(tree: Tree) -> None:
    greet(tree)
    with greeting.answering(tree.fuse):
        reader, read = start_reading(tree, "missing")
    serve_greeted(tree)
    reader.join(60)
    assert read == [FILES["missing"]]


def test_a_connection_that_is_aborted_meanwhile_ends_the_answering(tree: Tree) -> None:
    os.write(tree.fuse, greeting.init_reply(tree.connection.init_request))
    began = time.monotonic()
    with greeting.answering(tree.fuse):
        mounts.abort_fuse(tree.lazy, tree.connection.minor)
        time.sleep(0.1)
    assert time.monotonic() - began < 60
