"""A slow link, as a process of its own: everything that passes it shares one bandwidth and takes its time.

    python -m tests.bench.link PORT=HOST:PORT …      listens on 127.0.0.1:PORT for what goes to HOST:PORT

Half of a round trip is added to every byte in flight, each way; a whole one to a new connection, as its handshake would take.  The
bandwidth is one for all connections, and one for each direction.  Bytes are counted per port; SIGUSR1 prints the counts, and how many
connections there were, as a line of JSON, and begins anew.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import subprocess
import sys
from collections import Counter
from types import TracebackType

ROUND_TRIP_S = 0.020
BYTES_PER_S = 100e6 / 8
PIECE_BYTES = 16 << 10
SLACK_S = 0.008  # 100 kB of a connection wait at the link
IN_FLIGHT_MAX = 64  # pieces of one direction of a connection: four times what the link itself holds


class Direction:
    """One direction of the link: whoever sends waits for those who were there before."""

    def __init__(self) -> None:
        self._free_at = 0.0

    def passed(self, size_bytes: int) -> float:
        """When the last of so many bytes, sent now, has left."""
        now = asyncio.get_running_loop().time()
        self._free_at = max(now, self._free_at) + size_bytes / BYTES_PER_S
        return self._free_at


class Link:
    def __init__(self) -> None:
        self._down, self._up = Direction(), Direction()
        self._bytes: Counter[str] = Counter()
        self._connections: Counter[str] = Counter()

    async def serve(self, port: int, host: str, host_port: int) -> None:
        async def connected(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            self._connections[str(port)] += 1
            await asyncio.sleep(ROUND_TRIP_S)
            try:
                there_reader, there_writer = await asyncio.open_connection(host, host_port)
            except OSError:
                writer.close()
                return
            ways = (self._carry(reader, there_writer, self._up, ""), self._carry(there_reader, writer, self._down, str(port)))
            await asyncio.gather(*ways)

        await asyncio.start_server(connected, "127.0.0.1", port, backlog=256)

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: Direction, counted: str) -> None:
        flying: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(IN_FLIGHT_MAX)
        loop = asyncio.get_running_loop()

        async def arrive() -> None:
            while True:
                at, piece = await flying.get()
                await asyncio.sleep(at - loop.time())
                if not piece:
                    return
                writer.write(piece)
                await writer.drain()

        arriving = asyncio.create_task(arrive())
        try:
            while piece := await reader.read(PIECE_BYTES):
                left_at = way.passed(len(piece))
                self._bytes[counted] += len(piece)
                await flying.put((left_at + ROUND_TRIP_S / 2, piece))
                # The next piece queues behind those of others; early enough for the link not to stand idle when this wakes up late.
                await asyncio.sleep(left_at - loop.time() - SLACK_S)
            await flying.put((loop.time() + ROUND_TRIP_S / 2, b""))
            await arriving
        except OSError:
            pass
        finally:
            arriving.cancel()
            with contextlib.suppress(OSError):
                writer.close()

    def report(self) -> None:
        ports = {port: [self._bytes[port], self._connections[port]] for port in self._connections | self._bytes if port}
        print(json.dumps(ports), flush=True)
        self._bytes.clear()
        self._connections.clear()


class RunningLink:
    """The process: a context.  `ports` → where each leads ("HOST:PORT")."""

    def __init__(self, ports: dict[int, str]) -> None:
        self._command = [sys.executable, "-m", "tests.bench.link", *(f"{port}={there}" for port, there in ports.items())]

    def __enter__(self) -> RunningLink:
        self._process = subprocess.Popen(self._command, stdout=subprocess.PIPE, text=True)
        assert self._process.stdout
        assert self._process.stdout.readline() == "ready\n"
        return self

    def counted(self) -> dict[int, tuple[int, int]]:
        """By port: bytes that came from there, and connections, since the last time this was asked."""
        self._process.send_signal(signal.SIGUSR1)
        assert self._process.stdout
        return {int(port): tuple(found) for port, found in json.loads(self._process.stdout.readline()).items()}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._process.terminate()
        self._process.wait(10)
        assert self._process.stdout
        self._process.stdout.close()


async def main() -> None:
    link = Link()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, link.report)
    for argument in sys.argv[1:]:
        port, _, there = argument.partition("=")
        host, _, host_port = there.rpartition(":")
        await link.serve(int(port), host, int(host_port))
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    asyncio.run(main())
