"""A local server that speaks as an OpenAI-compatible one does, and as one that is late, busy, broken or silly."""

import json
import math
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

Reply = tuple[int, dict[str, str], bytes]


class Request(NamedTuple):
    """What the server was asked."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]

    @property
    def question(self) -> str:
        text: str = self.body["messages"][0]["content"]
        return text


def reply(text: str, logprobs: list[dict[str, float]] | None = None) -> Reply:
    """A reply of the model; `logprobs` are probabilities of the likeliest tokens at each place."""
    choice: dict[str, Any] = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
    if logprobs is not None:
        choice["logprobs"] = {
            "content": [
                {
                    "token": next(iter(place)),
                    "top_logprobs": [{"token": token, "logprob": math.log(p)} for token, p in place.items()],
                }
                for place in logprobs
            ]
        }
    return 200, {"Content-Type": "application/json"}, json.dumps({"choices": [choice]}).encode()


def fault(status: int, text: str = "", **headers: str) -> Reply:
    return status, {name.replace("_", "-"): value for name, value in headers.items()}, text.encode()


class Server:
    """The address, what was asked so far, and how many were served at once at most."""

    def __init__(self, answer: Callable[[Request], Reply]) -> None:
        self.answer = answer
        self.requests: list[Request] = []
        self.most = 0
        self._now = 0
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                request = Request(self.path, dict(self.headers), body)
                with outer._lock:
                    outer.requests.append(request)
                    outer._now += 1
                    outer.most = max(outer.most, outer._now)
                try:
                    status, headers, content = outer.answer(request)
                finally:
                    with outer._lock:
                        outer._now -= 1
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)

            def log_message(self, *arguments: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    @contextmanager
    def running(self) -> Iterator["Server"]:
        thread = threading.Thread(target=self._http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self._http.shutdown()
            thread.join()
            self._http.server_close()
