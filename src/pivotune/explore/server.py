"""A local page on which prompts are typed: one process, one prompt at a time, nothing but this page and its answers.

Other programs and web pages of this machine cannot use it: the address holds a random token, and requests that name another
host (DNS rebinding) or come from another origin are refused. No file is ever read for a request.
"""

from __future__ import annotations

import json
import secrets
import socket
import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from pivotune.errors import UsageError
from pivotune.text.json_text import parse_json

LONGEST_BODY = 64 * 1024  # bytes
LONGEST_PROMPT = 8_000  # characters
_TIMEOUT = 30  # seconds for a request to arrive
_HEADERS = {
    "Cache-Control": "no-store",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Content-Security-Policy": "frame-ancestors 'none'",
}

# From prompt, English parallel ('' for none) and the place of the answering model to JSON values.
Read = Callable[[str, str, int], dict[str, Any]]


class _RefusedError(Exception):
    def __init__(self, status: HTTPStatus, message: str) -> None:
        super().__init__(message)
        self.status = status


class ExplorerServer(ThreadingHTTPServer):
    """Serves `page` and answers prompts with `read` on 127.0.0.1.

    Args:
        port: 0 for a free one.
        num_models: models that a prompt may name.
    """

    daemon_threads = True

    def __init__(self, page: str, read: Read, *, num_models: int = 1, port: int = 0) -> None:
        self.page, self.read, self.num_models = page.encode("utf-8"), read, num_models
        self.token, self.busy = secrets.token_urlsafe(24), threading.Lock()
        super().__init__(("127.0.0.1", port), _Handler)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Print nothing about a browser that went away."""
        if not isinstance(sys.exc_info()[1], ConnectionError | TimeoutError):
            super().handle_error(request, client_address)

    @property
    def hosts(self) -> tuple[str, ...]:
        return tuple(f"{name}:{self.server_port}" for name in ("127.0.0.1", "localhost"))

    @property
    def address(self) -> str:
        return f"http://{self.hosts[0]}/{self.token}/"


def check_port(port: int) -> None:
    """Refuse a port that cannot be opened, before a model is loaded."""
    try:
        socket.create_server(("127.0.0.1", port)).close()
    except OSError as error:
        advice = "choose another, or 0 for a free one"
        raise UsageError(f"--port: {port} cannot be used ({error.strerror}); {advice}") from error


class _Handler(BaseHTTPRequestHandler):
    server: ExplorerServer
    timeout = _TIMEOUT
    server_version, sys_version = "pivotune", ""

    def do_GET(self) -> None:
        self._respond("", "text/html; charset=utf-8", lambda: self.server.page)

    def do_POST(self) -> None:
        self._respond("read", "application/json", self._answer)

    def _respond(self, name: str, kind: str, make: Callable[[], bytes]) -> None:
        status = HTTPStatus.OK
        try:
            self._check_sender()
            if not secrets.compare_digest(self.path.encode(), f"/{self.server.token}/{name}".encode()):
                message = "nothing is here; open the whole address that the terminal shows"
                raise _RefusedError(HTTPStatus.NOT_FOUND, message)
            content = make()
        except _RefusedError as refused:
            status, kind, content = refused.status, "application/json", _json({"error": str(refused)})
        self.send_response(status)
        for header, value in {**_HEADERS, "Content-Type": kind, "Content-Length": str(len(content))}.items():
            self.send_header(header, value)
        self.end_headers()
        self.wfile.write(content)

    def _check_sender(self) -> None:
        if self.headers.get_all("Host") not in [[host] for host in self.server.hosts]:
            raise _RefusedError(HTTPStatus.MISDIRECTED_REQUEST, "this page is at 127.0.0.1 only")
        is_own = self.headers.get("Origin") in (None, *(f"http://{host}" for host in self.server.hosts))
        if not is_own or self.headers.get("Sec-Fetch-Site", "none") not in ("none", "same-origin"):
            raise _RefusedError(HTTPStatus.FORBIDDEN, "requests of other pages are refused")

    def _answer(self) -> bytes:
        prompt, english, model = self._fields()
        if not self.server.busy.acquire(blocking=False):
            raise _RefusedError(HTTPStatus.SERVICE_UNAVAILABLE, "another prompt is being read; try again after it")
        try:
            return _json(self.server.read(prompt, english, model))
        except UsageError as error:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, str(error)) from error
        except Exception as error:  # the page stays usable, out of memory for one
            raise _RefusedError(HTTPStatus.INTERNAL_SERVER_ERROR, f"{type(error).__name__}: {error}") from error
        finally:
            self.server.busy.release()

    def _fields(self) -> tuple[str, str, int]:
        """Return prompt, English parallel and model of a JSON body."""
        # Only a page of this origin may send JSON without asking first, so that no form of another page reaches the model.
        if self.headers.get_content_type() != "application/json":
            raise _RefusedError(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the body is not JSON")
        length = self.headers.get("Content-Length", "")
        if not (length.isascii() and length.isdecimal()) or self.headers.get("Transfer-Encoding"):
            raise _RefusedError(HTTPStatus.LENGTH_REQUIRED, "the request has no length")
        if len(length) > 9 or int(length) > LONGEST_BODY:
            raise _RefusedError(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"the request is longer than {LONGEST_BODY} bytes")
        try:
            body = parse_json(self.rfile.read(int(length)).decode())
            prompt, english, model = body["prompt"], body["english"], body["model"]
        except (ValueError, KeyError, TypeError) as error:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "the body needs prompt, english and model") from error
        for name, text in (("prompt", prompt), ("English parallel", english)):
            if not isinstance(text, str) or len(text) > LONGEST_PROMPT:
                raise _RefusedError(HTTPStatus.BAD_REQUEST, f"the {name} is longer than {LONGEST_PROMPT} characters")
        if not prompt.strip():
            raise _RefusedError(HTTPStatus.BAD_REQUEST, "the prompt is empty")
        if type(model) is not int or not 0 <= model < self.server.num_models:
            raise _RefusedError(HTTPStatus.BAD_REQUEST, f"there is no model {model!r}")
        # Half of a surrogate pair is no character, and tokenizers fail on it.
        return (*(text.encode(errors="replace").decode() for text in (prompt, english.strip())), model)

    def log_message(self, format: str, *args: Any) -> None:
        """Print nothing: the address holds the token, and prompts are private."""


def _json(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()
