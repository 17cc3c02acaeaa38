"""An HTTP proxy between S3 clients and an S3 server that injects faults of the network; for tests and rehearsals.

Each request meets a fault with a given probability: an error 500, a 503 SlowDown, a connection reset before or after
the server acted, a stall, a truncated body, or a flipped bit in the body. Faults are drawn from a seed in the order
requests arrive, and counted by kind. Limits: plain HTTP to one server; requests with a Content-Length.
"""

import contextlib
import http.client
import random
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Self
from urllib.parse import urlsplit

FAULTS = ("error_500", "slow_down", "reset", "reset_after", "stall", "truncate")
_ERROR = "<?xml version='1.0' encoding='UTF-8'?><Error><Code>{code}</Code><Message>injected</Message></Error>"
_HOP_HEADERS = {"connection", "keep-alive", "transfer-encoding", "expect", "content-length"}


class FaultProxy:
    """A running proxy: clients use its `endpoint_url` instead of the server's; `faults` counts by kind."""

    def __init__(
        self,
        server_url: str,
        probability: float = 0.05,
        kinds: Sequence[str] = FAULTS,
        seed: int = 0,
        stall_s: float = 30.0,
    ):
        """stall_s: how long a stalled request is left without an answer before its connection is closed."""
        unknown = set(kinds) - {*FAULTS, "flip"}
        if unknown:
            raise ValueError(f"kinds: {sorted(unknown)}: choose from {', '.join((*FAULTS, 'flip'))}")
        self.probability, self.kinds, self.stall_s = probability, tuple(kinds), stall_s
        self.faults: Counter[str] = Counter()
        self.num_requests = 0
        self.refusal: tuple[int, str, dict[str, str]] | None = None
        """(status, S3 error code, headers) answered to every request instead of forwarding it."""
        self.conditional_puts = "forwarded"
        """forwarded; "ignored": their If-None-Match is lost on the way; "refused": they are answered with 501."""
        self._upstream = urlsplit(server_url).netloc
        self._random = random.Random(seed)
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._server = _Server(("127.0.0.1", 0), _Handler)
        self._server.proxy = self
        self.endpoint_url = f"http://127.0.0.1:{self._server.server_port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self._thread.start()

    @property
    def num_faults(self) -> int:
        """How many requests have met a fault so far."""
        return self.faults.total()

    def stop(self) -> None:
        """Ends the proxy; stalled connections are closed."""
        self._stopped.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def draw(self, has_body_back: bool) -> str | None:
        """The fault of the next request, if any; counted."""
        with self._lock:
            self.num_requests += 1
            if self._random.random() >= self.probability:
                return None
            kinds = [kind for kind in self.kinds if has_body_back or kind not in ("truncate", "flip")]
            if not kinds:
                return None
            kind = self._random.choice(kinds)
            self.faults[kind] += 1
            return kind

    def flip(self, body: bytes) -> bytes:
        """The body with one bit changed."""
        place = self._random.randrange(len(body))
        return body[:place] + bytes([body[place] ^ 1 << self._random.randrange(8)]) + body[place + 1 :]

    def stall(self) -> None:
        """Silence, until it is over or the proxy stops."""
        self._stopped.wait(self.stall_s)


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128
    proxy: FaultProxy

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore clients that close the connection."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: _Server

    def _serve(self) -> None:
        proxy = self.server.proxy
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if proxy.refusal is not None:
            status, code, headers = proxy.refusal
            self._answer(status, headers, b"" if self.command == "HEAD" else _ERROR.format(code=code).encode())
            return
        if proxy.conditional_puts == "refused" and self.headers.get("If-None-Match"):
            self._answer(501, {}, _ERROR.format(code="NotImplemented").encode())
            return
        fault = proxy.draw(has_body_back=self.command == "GET")
        if fault == "stall":
            proxy.stall()
        if fault in ("stall", "reset"):
            self._reset()
        elif fault in ("error_500", "slow_down"):
            status, code = (500, "InternalError") if fault == "error_500" else (503, "SlowDown")
            self._answer(status, {}, b"" if self.command == "HEAD" else _ERROR.format(code=code).encode())
        else:
            self._forward(body, fault)

    do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _serve

    def _forward(self, body: bytes, fault: str | None) -> None:
        proxy = self.server.proxy
        headers = {name: value for name, value in self.headers.items() if name.lower() not in _HOP_HEADERS}
        headers["Content-Length"] = str(len(body))
        if proxy.conditional_puts == "ignored":
            headers = {name: value for name, value in headers.items() if name.lower() != "if-none-match"}
        with contextlib.closing(http.client.HTTPConnection(proxy._upstream, timeout=60)) as upstream:
            upstream.request(self.command, self.path, body, headers)
            answer = upstream.getresponse()
            data = answer.read()
        if fault == "reset_after":
            self._reset()
            return
        back = {name: value for name, value in answer.getheaders() if name.lower() not in _HOP_HEADERS}
        if fault == "flip" and data and answer.status in (200, 206):
            data = proxy.flip(data)
        length = answer.getheader("Content-Length") if self.command == "HEAD" else str(len(data))
        cut = len(data) // 2 if fault == "truncate" else len(data)
        self._answer(answer.status, back, data[:cut], length)
        if cut < len(data):
            self.wfile.flush()
            time.sleep(0.01)  # let the part arrive, so that the client sees a short body and not only a reset
            self.close_connection = True

    def _answer(self, status: int, headers: dict[str, str], data: bytes, length: str | None = None) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", length if length is not None else str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _reset(self) -> None:
        # Linger 0: closing sends RST instead of FIN.
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.close()

    def log_message(self, format: str, *args: Any) -> None:
        """Silent: faults are counted, not printed."""
