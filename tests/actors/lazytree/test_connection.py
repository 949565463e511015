"""The connection of a living server, found when nobody else holds it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from actors.lazytree import connection

SERVER = """
import os, sys
from supervisor.lockfile import take_place
lock = take_place(sys.argv[1])
first = os.open("/dev/fuse", os.O_RDWR)
os.dup2(first, 200)
os.close(first)
print(flush=True)
while True:
    for descriptor in [os.open("/dev/null", os.O_RDONLY) for _ in range(150)]:
        os.close(descriptor)
"""


def test_it_is_found_while_its_server_opens_and_closes_files(tmp_path: Path) -> None:
    lock = tmp_path / "image.lock"
    connection.write_init_request(lock, b"init")
    with subprocess.Popen([sys.executable, "-c", SERVER, lock], stdout=subprocess.PIPE) as server:
        try:
            assert server.stdout and server.stdout.readline() == b"\n"
            for _ in range(300):
                found = connection.collect(lock)
                assert found is not None
                descriptor, init_request = found
                assert (os.readlink(f"/proc/self/fd/{descriptor}"), init_request) == ("/dev/fuse", b"init")
                os.close(descriptor)
        finally:
            server.kill()
    assert connection.collect(lock) is None
