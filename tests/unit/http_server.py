"""A real HTTP server on this machine for tests: it answers as a function says, and remembers what it was asked."""

import asyncio
import json
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from rewards.http import HTTPReward
from rewards.remote import Limits

QUICK = Limits(timeout=20.0, attempts=4, first_wait=0.01, longest_wait=0.5, rest=30.0)
SECRET = "secret-that-nobody-may-see-0123456789"


@dataclass(frozen=True)
class Asked:
    """One request."""

    path: str
    body: Any
    headers: dict[str, str]
    number: int
    """How many came before it."""


@dataclass(frozen=True)
class Say:
    """An answer: anything but text or bytes is sent as JSON."""

    body: Any = None
    status: int = 200
    headers: dict[str, str] = field(default_factory=dict)
    hang: bool = False
    """Never answer."""


class Server(ThreadingHTTPServer):
    """Its address, what it was asked, and how many requests were under way at once."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, answer: Callable[[Asked], Any]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.answer, self.lock, self.closing = answer, threading.Lock(), threading.Event()
        self.asked: list[Asked] = []
        self.under_way = self.most_under_way = 0

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # a client that gave up
            super().handle_error(request, client_address)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    @property
    def bodies(self) -> list[Any]:
        return [asked.body for asked in self.asked]


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def do_POST(self) -> None:
        server = self.server
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if len(content) < int(self.headers["Content-Length"]):  # the client gave up while it was sending
            self.close_connection = True
            return
        body = json.loads(content)
        with server.lock:
            asked = Asked(self.path, body, dict(self.headers), len(server.asked))
            server.asked.append(asked)
            server.under_way += 1
            server.most_under_way = max(server.most_under_way, server.under_way)
        try:
            answer = server.answer(asked)
        finally:
            with server.lock:
                server.under_way -= 1
        self._send(answer if isinstance(answer, Say) else Say(answer))

    def _send(self, say: Say) -> None:
        if say.hang:
            self.server.closing.wait(60)
            self.close_connection = True
            return
        content = say.body if isinstance(say.body, bytes) else json.dumps(say.body).encode()
        content = say.body.encode() if isinstance(say.body, str) else content
        self.send_response(say.status)
        for name, value in {**say.headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: Any) -> None:
        del format, args


@contextmanager
def serving(answer: Callable[[Asked], Any]) -> Iterator[Server]:
    """A server on a free port of the loopback, gone afterwards.

    Args:
        answer: What to say to a request: a `Say`, or the body of one. It runs in a thread of its own, and may wait.
    """
    server = Server(answer)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.shutdown()
        server.server_close()
        thread.join()


def lengths(asked: Asked) -> dict[str, Any]:
    """OpenRLHF's answer: the length of each query."""
    return {"rewards": [float(len(query)) for query in asked.body["query"]]}


def ask(reward: HTTPReward, completions: list[str], prompts: list[str] | None = None, **arguments: Any) -> list[Any]:
    """What a reward over HTTP says of completions."""
    prompts = [f"p{place} " for place in range(len(completions))] if prompts is None else prompts
    return asyncio.run(reward(prompts=prompts, completions=completions, **arguments))
