"""The local bridge: the daemon's end of the Unix socket that `run.py` speaks to.

One thread moves frames; what they say is decided by the GatewayActor, to which each request goes as `FromClient`.  The bridge
remembers the requests that have had no last answer: a GatewayActor that is started again gets them once more, and each of
them may be asked twice (`messages`).  A client that dies loses its answers and nothing else; one that sends what is not a
request, or does not read what it asked for, is told so and let go.
"""

from __future__ import annotations

import selectors
import socket
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from loguru import logger

from actors.gateway.messages import FRAME_BYTES_MAX, REQUESTS, Answer, Failed, Request, is_last
from supervisor.frames import Codec, FrameBuffer, FrameError
from supervisor.sockets import listen_at

UNSENT_BYTES_MAX = 16 << 20  # answers that a client does not read


def listen(path: Path) -> socket.socket:
    """The gateway's socket, for root only."""
    return listen_at(path, socket.SOCK_STREAM)


@dataclass
class Client:
    number: int
    connection: socket.socket
    incoming: FrameBuffer
    unsent: bytearray = field(default_factory=bytearray)
    open_requests: dict[int, Request] = field(default_factory=dict)
    closing: bool = False  # as soon as everything is sent


class LocalBridge:
    """Serves `listener` from `start` to `stop`.  `arrived(client, request)` is called in the bridge's thread, and must only tell.

    `send`, `again` and `stop` may be called from any thread.
    """

    def __init__(self, listener: socket.socket, clients_max: int, arrived: Callable[[int, Request], None]) -> None:
        self._listener = listener
        self._clients_max = clients_max
        self._arrived = arrived
        self._codec = Codec(*REQUESTS, size_bytes_max=FRAME_BYTES_MAX)
        self._clients: dict[int, Client] = {}
        self._lock = threading.Lock()
        self._selector = selectors.DefaultSelector()
        self._waker, self._wake = socket.socketpair()
        self._next = 1
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="local bridge", daemon=True)

    def start(self) -> None:
        for end in (self._listener, self._waker, self._wake):
            end.setblocking(False)
        self._selector.register(self._listener, selectors.EVENT_READ, self._accept)
        self._selector.register(self._waker, selectors.EVENT_READ, lambda: self._waker.recv(4096))
        self._thread.start()

    def send(self, client: int, answer: Answer) -> None:
        """Send an answer to a client; to one that is gone, nothing happens."""
        with self._lock:
            peer = self._clients.get(client)
            if peer is None or peer.closing:
                return
            if is_last(answer, peer.open_requests.get(answer.request)):
                peer.open_requests.pop(answer.request, None)
            peer.unsent += self._codec.frame(answer)
        self._wake_up()

    def open_requests(self) -> list[tuple[int, Request]]:
        """Requests without a last answer, oldest first: what a GatewayActor that starts has to answer."""
        with self._lock:
            return [(client.number, request) for client in self._clients.values() for request in client.open_requests.values()]

    def stop(self) -> None:
        """Send what is left, as far as clients take it, and close."""
        self._stopping = True
        self._wake_up()
        self._thread.join(2.0)

    def _wake_up(self) -> None:
        try:
            self._wake.send(b".")
        except BlockingIOError:
            pass  # it is about to wake up already

    # --- in the bridge's thread ---

    def _run(self) -> None:
        while True:
            self._flush()
            if self._stopping:
                break
            for key, events in self._selector.select():
                if isinstance(key.data, Client):
                    self._serve(key.data, events)
                else:
                    key.data()
        for client in list(self._clients.values()):
            self._close(client)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except BlockingIOError:
            return
        connection.setblocking(False)
        client = Client(self._next, connection, FrameBuffer(self._codec))
        self._next += 1
        self._selector.register(connection, selectors.EVENT_READ, client)
        with self._lock:
            full = len(self._clients) >= self._clients_max
            self._clients[client.number] = client
        if full:
            self._turn_away(client, "busy", f"{self._clients_max} clients are connected, which is the bound; try again later")

    def _serve(self, client: Client, events: int) -> None:
        if not events & selectors.EVENT_READ:
            return  # writable: the next round flushes
        try:
            data = client.connection.recv(1 << 16)
        except BlockingIOError:
            return
        except ConnectionError:
            data = b""
        if not data:
            self._close(client)
            return
        if client.closing:
            return  # what a client says after it was turned away is not heard
        client.incoming.feed(data)
        try:
            for request in client.incoming:
                with self._lock:
                    client.open_requests[request.request] = request
                self._arrived(client.number, request)
        except FrameError as error:
            self._turn_away(client, "invalid", str(error))

    def _turn_away(self, client: Client, kind: str, error: str) -> None:
        self.send(client.number, Failed(0, kind, error))  # type: ignore[arg-type]  # a literal at each caller
        with self._lock:
            client.closing = True

    def _flush(self) -> None:
        with self._lock:
            clients = list(self._clients.values())
        for client in clients:
            with self._lock:
                try:
                    sent = client.connection.send(client.unsent) if client.unsent else 0
                except BlockingIOError:
                    sent = 0
                except ConnectionError:
                    sent, client.closing = len(client.unsent), True
                del client.unsent[:sent]
                left = len(client.unsent)
            if left > UNSENT_BYTES_MAX:
                logger.warning("a client does not read its answers ({} bytes wait): it is let go", left)
            if left > UNSENT_BYTES_MAX or (client.closing and not left):
                self._close(client)
            else:
                events = selectors.EVENT_READ | (selectors.EVENT_WRITE if left else 0)
                if self._selector.get_key(client.connection).events != events:
                    self._selector.modify(client.connection, events, client)

    def _close(self, client: Client) -> None:
        with self._lock:
            if self._clients.pop(client.number, None) is None:
                return
        self._selector.unregister(client.connection)
        client.connection.close()
