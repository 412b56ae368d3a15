from __future__ import annotations

import http.client
import json
import threading
from contextlib import contextmanager

import pytest

from pivotune.errors import UsageError
from pivotune.explore.server import LONGEST_BODY, LONGEST_PROMPT, ExplorerServer, check_port

BODY = {"prompt": "Namba?", "english": "", "model": 0}


@contextmanager
def serving(read=lambda prompt, english, model: {"read": [prompt, english, model]}):
    server = ExplorerServer("<p>ế</p>", read, num_models=2)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.fixture(scope="module")
def server():
    with serving() as running:
        yield running


def ask(server, method="POST", path=None, body=BODY, host=None, **headers):
    """Status and content of a request; underscores in names of headers stand for dashes."""
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    sent = {"Content-Type": "application/json", "Host": host or server.hosts[0]}
    sent |= {name.replace("_", "-"): value for name, value in headers.items()}
    path = f"/{server.token}/read" if path is None else path
    connection.request(method, path, data if method == "POST" else None, sent)
    response = connection.getresponse()
    content = response.read()
    connection.close()
    return response.status, content, response.headers


def test_the_page_is_at_the_address_with_the_token(server):
    status, content, headers = ask(server, "GET", f"/{server.token}/")
    assert (status, content.decode()) == (200, "<p>ế</p>")
    assert server.address == f"http://127.0.0.1:{server.server_port}/{server.token}/"
    assert headers["Cache-Control"] == "no-store"
    assert headers["X-Frame-Options"] == "DENY"


def test_a_prompt_is_read(server):
    body = {"prompt": "Namba ế?", "english": " Which? ", "model": 1}
    status, content, _ = ask(server, body=body, Origin=f"http://{server.hosts[1]}", Sec_Fetch_Site="same-origin")
    assert (status, json.loads(content)) == (200, {"read": ["Namba ế?", "Which?", 1]})


@pytest.mark.parametrize(
    "path", ["/", "", "/read", "/wrong/read", "/{token}", "/{token}/../", "/{token}/etc/passwd", "/{token}/read/"]
)
@pytest.mark.parametrize("method", ["GET", "POST"])
def test_nothing_else_is_there(server, method, path):
    assert ask(server, method, path.format(token=server.token))[0] == 404


@pytest.mark.parametrize(
    "host", ["evil.example", "127.0.0.1", "127.0.0.1:1", "localhost.evil.example:{port}", "0.0.0.0:{port}"]
)
def test_other_hosts_are_refused(server, host):
    host = host.format(port=server.server_port)
    assert ask(server, host=host)[0] == ask(server, "GET", f"/{server.token}/", host=host)[0] == 421


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "https://127.0.0.1:{port}"}, {"Origin": "http://127.0.0.1:1"},
     {"Sec_Fetch_Site": "cross-site"}, {"Sec_Fetch_Site": "same-site"}],
)  # fmt: skip
def test_other_origins_are_refused(server, headers):
    headers = {name: value.format(port=server.server_port) for name, value in headers.items()}
    assert ask(server, **headers)[0] == 403


@pytest.mark.parametrize(
    ("body", "status", "words"),
    [
        (b"{", 400, "prompt, english and model"),
        (b"[]", 400, "prompt, english and model"),
        (b"\xff", 400, "prompt, english and model"),
        (b'{"prompt": "a", "prompt": "b", "english": "", "model": 0}', 400, "prompt, english and model"),
        ({"prompt": "a", "english": ""}, 400, "prompt, english and model"),
        ({**BODY, "prompt": 3}, 400, "the prompt is longer"),
        ({**BODY, "prompt": "a" * (LONGEST_PROMPT + 1)}, 400, "longer than 8000 characters"),
        ({**BODY, "english": "a" * (LONGEST_PROMPT + 1)}, 400, "English parallel is longer"),
        ({**BODY, "prompt": " \n"}, 400, "empty"),
        ({**BODY, "model": 2}, 400, "no model 2"),
        ({**BODY, "model": True}, 400, "no model True"),
        ({**BODY, "model": -1}, 400, "no model -1"),
    ],
)
def test_bad_bodies_are_refused(server, body, status, words):
    found, content, _ = ask(server, body=body)
    assert found == status
    assert words in json.loads(content)["error"]


def test_long_and_unmeasured_bodies_are_not_read(server):
    assert ask(server, body=b"x", Content_Length=str(LONGEST_BODY + 1))[0] == 413
    assert ask(server, body=b"x", Content_Length="9" * 50)[0] == 413
    assert ask(server, body=b"x", Content_Length="-1")[0] == 411
    assert ask(server, body=b"1\r\nx\r\n0\r\n\r\n", Transfer_Encoding="chunked")[0] == 411
    assert ask(server, Content_Type="text/plain")[0] == 415


def test_half_a_surrogate_pair_becomes_a_question_mark(server):
    assert json.loads(ask(server, body=b'{"prompt": "a\\ud800", "english": "", "model": 0}')[1])["read"][0] == "a?"


def test_one_prompt_at_a_time():
    started, go = threading.Event(), threading.Event()

    def slow(prompt, english, model):
        started.set()
        assert go.wait(20)
        return {"read": prompt}

    with serving(slow) as server:
        answers = []
        first = threading.Thread(target=lambda: answers.append(ask(server)[0]))
        first.start()
        assert started.wait(20)
        assert ask(server)[0] == 503
        assert ask(server, "GET", f"/{server.token}/")[0] == 200
        go.set()
        first.join()
        assert answers == [200]
        assert ask(server)[0] == 200


def test_a_mistake_in_a_prompt_is_a_message_and_the_next_prompt_is_read():
    def read(prompt, english, model):
        if prompt == "large":
            raise RuntimeError("out of memory")
        if prompt == "bad":
            raise UsageError("the prompt has no tokens")
        return {}

    with serving(read) as server:
        status, content, _ = ask(server, body={**BODY, "prompt": "bad"})
        assert (status, json.loads(content)) == (400, {"error": "the prompt has no tokens"})
        status, content, _ = ask(server, body={**BODY, "prompt": "large"})
        assert (status, json.loads(content)) == (500, {"error": "RuntimeError: out of memory"})
        assert ask(server)[0] == 200


def test_only_this_machine_can_connect(server):
    assert server.server_address[0] == "127.0.0.1"


def test_a_taken_port_is_one_line(server):
    with pytest.raises(UsageError, match=f"--port: {server.server_port} cannot be used"):
        check_port(server.server_port)
