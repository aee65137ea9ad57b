"""A proxy before an S3 server that injects network faults into answers, chosen by a seed."""

import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal[
    "cut",  # the connection is reset after some bytes of the body
    "end early",  # fewer bytes than Content-Length says, and a clean end
    "wrong length",  # fewer bytes, and a Content-Length that agrees with them
    "silence",  # some bytes, then nothing more while the connection stays open
    "delay",  # all bytes, late
    "flip",  # one byte differs
    "500",  # S3's InternalError
    "503",  # S3's SlowDown
    "bad gateway",  # a load balancer's HTML
]

_MOST_IN_A_ROW = 4
_ERRORS: dict[str, tuple[int, str]] = {"500": (500, "InternalError"), "503": (503, "SlowDown")}


@dataclass
class FaultyProxy:
    """Relays requests to `upstream`; a fraction `rate` of the answers to `methods` gets `fault`.

    A rate below 1 spares at least each fifth answer to a request that is repeated: else, by chance,
    all repetitions could fail.
    """

    upstream: str
    fault: Fault
    rate: float
    seed: int = 0
    silence_s: float = 60.0
    """How long a silent connection stays open."""
    injected: int = 0
    """How often the fault happened."""
    methods: frozenset[str] = frozenset({"GET"})
    in_body: Callable[[int], None] = lambda sent: None
    """Called in the middle of each body that is not empty, with the bytes sent so far."""
    endpoint: str = field(init=False)
    ending: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._random = random.Random(f"{self.fault}/{self.seed}")
        self._lock = threading.Lock()
        self._in_a_row: Counter[str] = Counter()

    def draw(self, method: str, request: str) -> random.Random | None:
        """A generator for the details of one answer's fault; None for an answer without fault."""
        with self._lock:
            is_spared = self.rate < 1 and self._in_a_row[request] == _MOST_IN_A_ROW
            if method not in self.methods or self._random.random() >= self.rate or is_spared:
                self._in_a_row[request] = 0
                return None
            self._in_a_row[request] += 1
            self.injected += 1
            return random.Random(self._random.random())


@contextmanager
def running(proxy: FaultyProxy) -> Iterator[FaultyProxy]:
    """`proxy`, listening at its `endpoint`."""

    class Handler(_Relay):
        pass

    Handler.proxy = proxy
    server = _Server(("127.0.0.1", 0), Handler)
    proxy.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,))
    thread.start()
    try:
        yield proxy
    finally:
        proxy.ending.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False  # a client may keep its connection

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that disconnects is no error."""


class _Relay(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    proxy: FaultyProxy

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 the base's name
        pass

    def relay(self) -> None:
        status, headers, body = self._ask()
        request = f"{self.command} {self.path} {self.headers.get('range')}"
        drawn = self.proxy.draw(self.command, request)
        fault = self.proxy.fault if drawn is not None else None
        if fault in _ERRORS or fault == "bad gateway":
            status, headers, body = _error(fault)
        length = int(headers.get("content-length", len(body)))
        sent = len(body)
        if drawn is not None and body:
            if fault in {"cut", "end early", "wrong length", "silence"}:
                sent = drawn.randrange(len(body))
                length = sent if fault == "wrong length" else length
            elif fault == "delay":
                time.sleep(drawn.uniform(0.05, 0.5))
            elif fault == "flip":
                place = drawn.randrange(len(body))
                body = (
                    body[:place]
                    + bytes([body[place] ^ 1 << drawn.randrange(8)])
                    + body[place + 1 :]
                )
        self.send_response_only(status)
        for name, value in {**headers, "content-length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        self.wfile.write(body[: sent // 2])
        if sent:
            self.wfile.flush()
            self.proxy.in_body(sent // 2)
        self.wfile.write(body[sent // 2 : sent])
        if fault == "cut" or (fault == "end early" and sent < length):
            self._hang_up(abruptly=fault == "cut")
        elif fault == "silence":
            self.proxy.ending.wait(self.proxy.silence_s)
            self._hang_up(abruptly=True)

    do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = relay  # noqa: N815 the base's names

    def _ask(self) -> tuple[int, dict[str, str], bytes]:
        """The server's answer; a bad gateway when there is none."""
        address = urlsplit(self.proxy.upstream)
        body = self.rfile.read(int(self.headers.get("content-length", 0)))
        connection = http.client.HTTPConnection(address.hostname or "", address.port, timeout=60)
        try:
            connection.putrequest(
                self.command, self.path, skip_host=True, skip_accept_encoding=True
            )
            for name, value in self.headers.items():
                if name.lower() not in {"expect", "connection"}:
                    connection.putheader(name, value)
            connection.endheaders(body or None)
            answer = connection.getresponse()
            data = answer.read()
            unwanted = {"transfer-encoding", "connection", "keep-alive"}
            headers = {name.lower(): value for name, value in answer.getheaders()}
            return answer.status, {k: v for k, v in headers.items() if k not in unwanted}, data
        except (OSError, http.client.HTTPException):
            return _error("bad gateway")
        finally:
            connection.close()

    def _hang_up(self, *, abruptly: bool) -> None:
        self.wfile.flush()
        self.close_connection = True
        if abruptly:  # a reset: data still in flight is dropped
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        else:
            self.connection.shutdown(socket.SHUT_WR)


def _error(fault: str | None) -> tuple[int, dict[str, str], bytes]:
    if fault not in _ERRORS:
        return 502, {"content-type": "text/html"}, b"<html><h1>502 Bad Gateway</h1></html>"
    status, code = _ERRORS[fault]
    body = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
    return status, {"content-type": "application/xml"}, body.encode()
