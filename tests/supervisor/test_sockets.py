"""Sockets that appear when they listen."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from supervisor.sockets import connect_to, listen_at

ADDRESS_BYTES_MAX = 107  # sun_path of unix(7), with a zero at its end


@pytest.mark.parametrize("name", ["aerie.sock", "forkserver.sock"])
def test_an_address_may_be_as_long_as_the_kernel_takes(tmp_path: Path, name: str) -> None:
    directory = tmp_path / ("x" * (ADDRESS_BYTES_MAX - len(f"{tmp_path}//{name}")))
    directory.mkdir()
    path = directory / name
    assert len(os.fsencode(path)) == ADDRESS_BYTES_MAX
    with listen_at(path, socket.SOCK_SEQPACKET) as listener:
        connection = connect_to(path, socket.SOCK_SEQPACKET, 0)
        assert connection is not None
        with connection, listener.accept()[0] as accepted:
            connection.send(b"heard")
            assert accepted.recv(10) == b"heard"
        assert os.listdir(directory) == [name]
