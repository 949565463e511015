"""A proxy in front of a real registry (or S3 server): it counts what passes, and misbehaves on command.

    with Proxy(registry.address) as proxy:
        proxy.on("/blobs/", status(429, Retry_After="1"), times=2)  # the next two requests for blobs
        ... f"{proxy.address}/{repository.name}" ...
        assert proxy.body_bytes("/blobs/") < 1000

Without a command it passes everything on.  Of several commands for a path the first one given that has requests left is obeyed.
"""

from __future__ import annotations

import base64
import functools
import http.client
import json
import re
import socket
import ssl
import threading
import time
import types
import urllib.parse
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

PIECE_BYTES = 16 << 10
HOP_BY_HOP = {"connection", "keep-alive", "transfer-encoding", "te", "trailer", "upgrade", "proxy-authorization"}


@dataclass
class Exchange:
    """One request, and how it was answered."""

    method: str
    path: str  # with the query
    headers: dict[str, str]
    status: int = 0
    body_bytes: int = 0  # of the answer, as far as it was sent
    handler: Any = field(default=None, repr=False)
    proxy: Any = field(default=None, repr=False)

    @functools.cached_property
    def body(self) -> bytes:
        """Of the request."""
        length = int(self.headers.get("Content-Length", 0))
        return bytes(self.handler.rfile.read(length)) if length else b""

    @property
    def range(self) -> tuple[int, int] | None:
        """Offset and length of the range asked for; the length of an open one is 0."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        return (int(asked[1]), int(asked[2]) - int(asked[1]) + 1 if asked[2] else 0) if asked else None

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        """Answer here and now; `_` in a header's name is `-`."""
        # What is left of a request would be taken for the next one, and closing on it resets the connection, answer and all.
        _ = self.body
        self.status = status
        self.handler.send_response(status)
        for name, value in headers.items():
            self.handler.send_header(name.replace("_", "-"), value)
        self.handler.send_header("Content-Length", str(len(body)))
        self.handler.end_headers()
        if self.method != "HEAD":
            self._send(body)

    def forward(
        self, without: tuple[str, ...] = (), cut_after: int | None = None, pace: Callable[[int], None] | None = None
    ) -> None:
        """Pass the request on, `without` some headers, and the answer back: all of it, or `cut_after` so many bytes.

        `pace(sent)` is called before each piece of the answer with the bytes sent before it, and may wait.
        """
        upstream = http.client.HTTPConnection(self.proxy.upstream, timeout=60)
        try:
            dropped = {name.lower() for name in without} | HOP_BY_HOP
            headers = {name: value for name, value in self.headers.items() if name.lower() not in dropped}
            upstream.request(self.method, self.path, self.body or None, headers)
            answer = upstream.getresponse()
            self.status = answer.status
            self.handler.send_response(answer.status, answer.reason)
            for name, value in answer.getheaders():
                if name.lower() not in HOP_BY_HOP:
                    self.handler.send_header(name, value)
            bodiless = self.method == "HEAD" or answer.status in (204, 304) or answer.getheader("Content-Length") is not None
            if not bodiless:
                self.handler.close_connection = True
                self.handler.send_header("Connection", "close")
            self.handler.end_headers()
            while True:
                if pace:
                    pace(self.body_bytes)
                size = PIECE_BYTES if cut_after is None else min(PIECE_BYTES, cut_after - self.body_bytes)
                if size <= 0:
                    self.handler.close_connection = True
                    self.handler.connection.shutdown(socket.SHUT_RDWR)
                    return
                if not (piece := answer.read(size)):
                    if answer.length:  # it has announced more than it sent, and closed
                        self.handler.close_connection = True
                    return
                self._send(piece)
        finally:
            upstream.close()

    def _send(self, piece: bytes) -> None:
        with self.proxy.lock:
            self.body_bytes += len(piece)  # before it is sent: who has received it finds it counted
        self.handler.wfile.write(piece)


Action = Callable[[Exchange], None]


class Proxy:
    """It listens on a loopback port as long as its context lasts.  `exchanges` are all that came, in the order of their coming.

    `tls`: it speaks TLS, with the certificate and key in this file.
    """

    def __init__(self, upstream: str, tls: Path | None = None) -> None:
        self.upstream = upstream
        self.lock = threading.Lock()
        self.exchanges: list[Exchange] = []
        self.closing = threading.Event()  # what an action waits for besides its own time
        self.behaving = threading.Event()  # what one that is only slow waits for; the one of its beginning
        self.hung_up = threading.Event()  # and who is silent
        self._commands: list[list[Any]] = []  # pattern, action, requests left (None: any number)
        self._connected: dict[int, Any] = {}  # the connections that were accepted and have not ended: their other ends
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            timeout = 60
            # Head and body leave in two writes; with Nagle's algorithm the second waits for the client's delayed ACK.
            disable_nagle_algorithm = True

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except OSError:
                    self.close_connection = True  # the client went away, or the proxy cut it off

            def do_GET(self) -> None:
                proxy._take(self)

            def do_HEAD(self) -> None:
                proxy._take(self)

            def do_PUT(self) -> None:
                proxy._take(self)

            def do_POST(self) -> None:
                proxy._take(self)

            def do_DELETE(self) -> None:
                proxy._take(self)

            def log_message(self, format: str, *args: Any) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            request_queue_size = 128

            def process_request(self, request: Any, client_address: Any) -> None:
                with proxy.lock:
                    proxy._connected[id(request)] = client_address
                super().process_request(request, client_address)

            def shutdown_request(self, request: Any) -> None:
                super().shutdown_request(request)
                with proxy.lock:
                    proxy._connected.pop(id(request), None)

        self._server = Server(("127.0.0.1", 0), Handler)
        if tls is not None:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(tls)
            # The handshake is each connection's own thread's business.
            self._server.socket = context.wrap_socket(self._server.socket, server_side=True, do_handshake_on_connect=False)
        self.address = f"127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01})

    def __enter__(self) -> Proxy:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> None:
        self.closing.set()
        self.behave()
        self.hang_up()
        self._server.shutdown()
        self._thread.join()
        self._server.server_close()

    def on(self, pattern: str, action: Action, times: int | None = None) -> None:
        """Do `action` with the next `times` requests (None: all) whose path has the regular expression `pattern`."""
        with self.lock:
            self._commands.append([re.compile(pattern), action, times])

    def behave(self) -> None:
        """Forget all commands; who is only slow goes on at full speed."""
        with self.lock:
            self._commands.clear()
            self.behaving.set()
            self.behaving = threading.Event()

    def hang_up(self) -> None:
        """Break the connections on which something is silent."""
        with self.lock:
            self.hung_up.set()
            self.hung_up = threading.Event()

    def seen(self, pattern: str = "") -> list[Exchange]:
        """The exchanges whose path has the regular expression `pattern`."""
        with self.lock:
            return [exchange for exchange in self.exchanges if re.search(pattern, exchange.path)]

    def body_bytes(self, pattern: str = "") -> int:
        """The bytes of all answers' bodies to such requests, sent so far."""
        return sum(exchange.body_bytes for exchange in self.seen(pattern))

    def forget(self) -> None:
        """Count from zero."""
        with self.lock:
            self.exchanges.clear()

    def settle(self, timeout_s: float = 60.0) -> None:
        """Wait until nobody is connected: all who were have been killed, and what they asked for until then has been taken note of."""
        deadline = time.monotonic() + timeout_s
        with socket.create_connection(self._server.server_address[:2]) as last:  # who came before it is accepted before it
            while last.getsockname() not in self._connections():
                assert time.monotonic() < deadline
                time.sleep(0.001)
        while self._connections():
            assert time.monotonic() < deadline, self._connections()
            time.sleep(0.001)

    def _connections(self) -> list[Any]:
        with self.lock:
            return list(self._connected.values())

    def _take(self, handler: BaseHTTPRequestHandler) -> None:
        exchange = Exchange(handler.command, handler.path, dict(handler.headers), handler=handler, proxy=self)
        with self.lock:
            self.exchanges.append(exchange)
            action: Action = Exchange.forward
            for command in self._commands:
                if command[2] != 0 and command[0].search(handler.path):
                    action = command[1]
                    if command[2] is not None:
                        command[2] -= 1
                    break
        action(exchange)


def status(code: int, body: bytes = b"", **headers: str) -> Action:
    """Answer so, whatever was asked."""
    return lambda exchange: exchange.answer(code, body, **headers)


def cut(after_bytes: int) -> Action:
    """Break the connection after so many bytes of the body."""
    return lambda exchange: exchange.forward(cut_after=after_bytes)


def stall(after_bytes: int, time_s: float = 3600.0) -> Action:
    """Send so many bytes of the body, then nothing for so long, or until the proxy closes."""

    def act(exchange: Exchange) -> None:
        def pace(sent: int) -> None:
            if sent >= after_bytes:
                exchange.proxy.closing.wait(time_s)

        exchange.forward(pace=pace)

    return act


def held(after_bytes: int, go_on: threading.Event) -> Action:
    """Send so many bytes of the body, and the rest when that is told."""
    return lambda exchange: exchange.forward(pace=lambda sent: go_on.wait() if sent >= after_bytes else None)


def silent(time_s: float = 3600.0) -> Action:
    """Take the request and say nothing for so long, or until the proxy hangs up."""

    def act(exchange: Exchange) -> None:
        exchange.proxy.hung_up.wait(time_s)
        exchange.handler.close_connection = True

    return act


def hang_up(exchange: Exchange) -> None:
    """Take the request and break the connection."""
    exchange.handler.close_connection = True


def throttle(bytes_per_s: float) -> Action:
    """Send the body no faster than that, a piece at a time, until the proxy behaves."""

    def act(exchange: Exchange) -> None:
        begin, behaving = time.monotonic(), exchange.proxy.behaving

        def pace(sent: int) -> None:
            behaving.wait(max(0.0, begin + sent / bytes_per_s - time.monotonic()))

        exchange.forward(pace=pace)

    return act


def without_ranges(exchange: Exchange) -> None:
    """Answer with the whole blob, as a registry that knows no ranges does."""
    exchange.forward(without=("Range",))


class TokenGate:
    """A registry that wants tokens, and the server that gives them, at /token of the same proxy.

    Each token is good for `uses` requests; then it is refused as `refusal` says: 401 with a challenge, or 403 without one, as some
    registries do.  `passwords` (user → password) are accepted, None: anybody; and `identity_tokens`, for POST.
    """

    def __init__(self, proxy: Proxy, uses: int = 1 << 30, refusal: int = 401) -> None:
        self.passwords: dict[str, str] | None = None
        self.identity_tokens: set[str] = set()
        self.given = 0  # tokens
        self._uses = uses
        self._refusal = refusal
        self._left: dict[str, int] = {}
        self._lock = threading.Lock()
        proxy.on("^/token", self._give)
        proxy.on("^/v2/", self._check)

    def revoke(self) -> None:
        """Every token has run out."""
        with self._lock:
            self._left.clear()

    def _give(self, exchange: Exchange) -> None:
        if exchange.method == "POST":
            form = dict(urllib.parse.parse_qsl(exchange.body.decode()))
            known = form["grant_type"] == "refresh_token" and form["refresh_token"] in self.identity_tokens
        elif self.passwords is None:
            known = True
        else:
            user, _, password = (
                base64.b64decode(exchange.headers.get("Authorization", "").removeprefix("Basic ")).decode().partition(":")
            )
            known = user in self.passwords and self.passwords[user] == password
        if not known:
            exchange.answer(401, b'{"details": "incorrect username or password"}')
            return
        with self._lock:
            self.given += 1
            token = f"token-{self.given}"
            self._left[token] = self._uses
        exchange.answer(200, json.dumps({"token": token, "expires_in": 60}).encode())

    def _check(self, exchange: Exchange) -> None:
        token = exchange.headers.get("Authorization", "").removeprefix("Bearer ")
        with self._lock:
            good = self._left.get(token, 0) > 0
            if good:
                self._left[token] -= 1
        if good:
            exchange.forward(without=("Authorization",))
        elif token and self._refusal == 403:
            exchange.answer(403, b"{}")
        else:
            scope = ":".join(("repository", exchange.path.removeprefix("/v2/").partition("/")[0], "pull"))
            realm = f'Bearer realm="http://{exchange.proxy.address}/token",service="test",scope="{scope}"'
            exchange.answer(401, b"{}", WWW_Authenticate=realm)


class SignedStorage:
    """Makes `front` redirect requests for blobs to `storage`, by addresses that are good for `uses` requests, then answer `refusal`.

    As at S3, a request with a signature and an Authorization header is refused.
    """

    def __init__(self, front: Proxy, storage: Proxy, uses: int = 1 << 30, refusal: int = 403) -> None:
        self.signed = 0
        self._storage = storage
        self._uses = uses
        self._refusal = refusal
        self._left: dict[str, int] = {}
        self._lock = threading.Lock()
        front.on("/blobs/", self._redirect)
        storage.on("", self._serve)

    def _redirect(self, exchange: Exchange) -> None:
        with self._lock:
            self.signed += 1
            signature = f"s{self.signed}"
            self._left[signature] = self._uses
        exchange.answer(307, Location=f"http://{self._storage.address}{exchange.path}?signature={signature}")

    def _serve(self, exchange: Exchange) -> None:
        signature = exchange.path.partition("?signature=")[2]
        with self._lock:
            good = self._left.get(signature, 0) > 0
            if good:
                self._left[signature] -= 1
        if "Authorization" in exchange.headers:
            exchange.answer(400, b"<Code>InvalidArgument</Code>")
        elif good:
            exchange.forward()
        else:
            exchange.answer(self._refusal, b"<Code>AccessDenied</Code><Message>Request has expired</Message>")
