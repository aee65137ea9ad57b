"""A proxy in front of an API server or a Ray dashboard that fails as told."""

from __future__ import annotations

import http.client
import json
import ssl
import threading
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Literal
from urllib.parse import urlsplit

Fault = Literal["answer", "drop before", "drop after", "cut"]


@dataclass
class Rule:
    """`times` requests of `method` whose URL holds `part` suffer `fault`, after the next `skip`.

    answer: `status` instead of the server's; drop before: the connection breaks and the server
    never hears of it; drop after: it does, and the answer is lost; cut: the answer breaks off after
    `after_bytes`. An answer of 410 to a watch comes as an event, as real servers send it.
    """

    method: str
    part: str
    fault: Fault
    status: int = 500
    times: int = 1
    after_bytes: int = 200
    retry_after: str = ""
    skip: int = 0


@dataclass
class FaultyProxy:
    """Plain HTTP on loopback, relayed to `upstream` with the caller's token."""

    upstream: str
    rules: list[Rule] = field(default_factory=list)
    rewrite: tuple[str, str] = ("", "")
    """What of each path is asked of the server as what."""
    zone: str = ""
    """Where the nodes are, as `+02:00`: the times in logs are those of there."""
    injected: list[Rule] = field(default_factory=list)

    def __enter__(self) -> FaultyProxy:
        self._http = _Server(self)
        self.url = f"http://127.0.0.1:{self._http.server_port}"
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.shutdown()
        self._http.server_close()

    def take(self, method: str, url: str) -> Rule | None:
        for rule in self.rules:
            if rule.times > 0 and rule.method == method and rule.part in url:
                if rule.skip:
                    rule.skip -= 1
                    continue
                rule.times -= 1
                self.injected.append(rule)
                return rule
        return None


class _Handler(BaseHTTPRequestHandler):
    server: _Server

    def do_GET(self) -> None:
        self._relay()

    def do_POST(self) -> None:
        self._relay()

    def do_PUT(self) -> None:
        self._relay()

    def do_DELETE(self) -> None:
        self._relay()

    def _relay(self) -> None:
        rule = self.server.proxy.take(self.command, self.path)
        with suppress(OSError, http.client.HTTPException):
            if rule is not None and rule.fault == "answer":
                self._refuse(rule)
            elif rule is None or rule.fault != "drop before":
                self._pass_on(rule)
            self.close_connection = True

    def _refuse(self, rule: Rule) -> None:
        status = {
            "kind": "Status",
            "apiVersion": "v1",
            "status": "Failure",
            "code": rule.status,
            "message": f"injected {rule.status}",
            "reason": "Injected",
        }
        expired_watch = rule.status == 410 and "watch=true" in self.path
        body = {"type": "ERROR", "object": status} if expired_watch else status
        data = json.dumps(body).encode() + b"\n"
        self.send_response(200 if expired_watch else rule.status)
        self.send_header("Content-Length", str(len(data)))
        if rule.retry_after:
            self.send_header("Retry-After", rule.retry_after)
        self.end_headers()
        self.wfile.write(data)

    def _pass_on(self, rule: Rule | None) -> None:
        upstream = self._ask()
        try:
            self._answer(upstream.getresponse(), rule)
        finally:
            upstream.close()

    def _answer(self, response: http.client.HTTPResponse, rule: Rule | None) -> None:
        if rule is not None and rule.fault == "drop after":
            response.read()
            return
        self.send_response(response.status)
        for name, value in response.getheaders():
            if name.lower() not in {"transfer-encoding", "connection", "content-length"}:
                self.send_header(name, value)
        if rule is not None:  # a promise that is not kept
            self.send_header("Content-Length", str(rule.after_bytes + 100_000))
        self.end_headers()
        sent = 0
        while data := self._read(response):
            if rule is not None and sent + len(data) >= rule.after_bytes:
                self.wfile.write(data[: rule.after_bytes - sent])
                return
            self.wfile.write(data)
            self.wfile.flush()
            sent += len(data)

    def _read(self, response: http.client.HTTPResponse) -> bytes:
        zone = self.server.proxy.zone
        if not zone or "/log?" not in self.path:
            return response.read1(65536)
        stamp, _, text = response.readline().partition(b" ")
        if not text:
            return stamp
        there = datetime.fromisoformat(f"2000-01-01T00:00:00{zone}").tzinfo
        seconds, _, fraction = stamp.decode().rstrip("Z").partition(".")
        moment = datetime.fromisoformat(f"{seconds}+00:00").astimezone(there)
        return f"{moment:%Y-%m-%dT%H:%M:%S}.{fraction}{zone} ".encode() + text

    def _ask(self) -> http.client.HTTPConnection:
        proxy = self.server.proxy
        target = urlsplit(proxy.upstream)
        host, port = str(target.hostname), target.port
        if target.scheme == "https":
            trust = ssl._create_unverified_context()
            upstream: http.client.HTTPConnection = http.client.HTTPSConnection(
                host, port, context=trust, timeout=60
            )
        else:
            upstream = http.client.HTTPConnection(host, port, timeout=60)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        headers = {k: v for k, v in self.headers.items() if k.lower() != "host"}
        path = self.path.replace(*proxy.rewrite) if proxy.rewrite[0] else self.path
        upstream.request(self.command, path, body or None, headers)
        return upstream

    def log_message(self, *_: object) -> None:
        pass


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, proxy: FaultyProxy) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.proxy = proxy
