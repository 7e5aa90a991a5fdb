"""The row about requests to a server of a model: values of any kind, half characters, other sites, heads that never end."""

import contextlib
import functools
import http.client
import itertools
import json
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from tests.faults import program
from tests.faults.table import Bench, Case, Row, Silent, Unclear

_VALUES = (None, True, -1, 0, 1.5, 10**400, float("nan"), "", "\ud800", "x" * 100_000, [], [[]], {})
_VALUES += ([None], ["\ud800"], {"a": "\ud800"}, [0.5], [-1], [2**40], "\0", [{}], [["\ud800"]])
_COMPLETION = {"model": "m", "prompt": "x", "max_tokens": 1}
_CHAT = {"model": "m", "messages": [{"role": "user", "content": "x"}], "max_tokens": 1}
_OPTIONS = ("temperature", "top_p", "n", "seed", "stop", "stream", "user")
_OPTIONS += ("logprobs", "logit_bias", "presence_penalty", "stream_options", "best_of", "\ud800")
_HOSTS = ("evil.example", "127.0.0.1.evil.example", "localhost.evil.example", "evil.example:80", "")
_HOSTS += (
    "127.0.0.1@evil.example",
    "[::1].evil.example",
    "0x7f000001.evil.example",
    "[",
    "10.0.0.1",
)
_HEADS = (
    b"",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nX: y\r\n",
    b"GET /health HTTP/1.1\r\nX: " + b"y" * 20_000,
    b"GET /health HTTP/9.9\r\n\r\n",
    b"\0" * 1000,
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nZZ\r\n",
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1\r\nContent-Length: 2\r\n\r\n",
)
_HEAD_S = 30.0  # by when a connection without a whole head has ended


@contextlib.contextmanager
def _served(bench: Bench) -> Iterator[int]:
    """Yields the port of a server in a thread of this process."""
    import dataclasses

    import uvicorn

    from espalier.launch.load import load_run
    from espalier.launch.serve import app, connections
    from espalier.launch.serve.engine import Engine
    from espalier.launch.serve.requests import Limits

    run = str(program.half_way(bench))
    config = dataclasses.replace(load_run.config_of(run), chat_template="command")
    limits = Limits(max_tokens=8, max_prompt_tokens=100, max_body_bytes=4_000_000)
    with Engine(config, checkpoint=run, limits=limits) as engine:
        made = app.make_app(engine, model="m", limits=limits)
        settings = connections.config(made, host="127.0.0.1", port=0, log_level="critical")
        with settings.bind_socket() as bound:
            server = uvicorn.Server(settings)
            thread = threading.Thread(target=lambda: server.run(sockets=[bound]))
            thread.start()
            while thread.is_alive() and not server.started:  # until then, connections are refused
                time.sleep(0.01)
            try:
                yield bound.getsockname()[1]
            finally:
                server.should_exit = True
                thread.join()


def _post(port: int, path: str, body: Any, headers: Mapping[str, str] | None = None) -> int:
    """Returns the status of a reply, which is JSON."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    connection.request(
        "POST", f"/v1/{path}", content, {"Content-Type": "application/json", **(headers or {})}
    )
    reply = connection.getresponse()
    text = reply.read()
    if reply.status >= 500 or reply.status == 200 and not text:
        raise Unclear(f"status {reply.status} for {content[:200]!r}: {text[:300]!r}")
    if reply.status != 200:
        json.loads(text)["error"]["message"]
    return reply.status


def _values(path: str, plain: Mapping[str, Any], bench: Bench) -> int:
    fields = [*plain, *_OPTIONS]
    bodies = [{**plain, field: value} for field in fields for value in _VALUES]
    if "messages" in plain:
        parts = ("role", "content", "name", "tool_calls", "\ud800")
        bodies += [
            {**plain, "messages": [{"role": "user", "content": "x", part: value}]}
            for part, value in itertools.product(parts, _VALUES)
        ]
    broken = [b"", b"[", b"null", b"[1]", b'"x"', b"\xff", b"[" * 100_000, b'{"prompt": 1e999}']
    with _served(bench) as port:
        for body in (*bodies, *broken):
            _post(port, path, body)
        if (status := _post(port, path, plain)) != 200:
            raise Silent(f"the server answers {status} afterwards")
    return len(bodies) + len(broken)


def _hosts(bench: Bench) -> int:
    with _served(bench) as port:
        if _post(port, "completions", _COMPLETION, {"Host": "localhost"}) != 200:
            raise Unclear("localhost is refused")
        for name, header in itertools.product(_HOSTS, ("Host", "Origin")):
            value = f"http://{name}" if header == "Origin" else name
            if _post(port, "completions", _COMPLETION, {header: value}) == 200:
                raise Silent(f"{header}: {value} is answered")
    return 2 * len(_HOSTS)


def _heads(bench: Bench) -> int:
    """Connections whose heads do not end are closed, also many of them, and the server answers meanwhile."""
    with _served(bench) as port, contextlib.ExitStack() as stack:
        opened = []
        for head in _HEADS * 20:
            one = stack.enter_context(
                socket.create_connection(("127.0.0.1", port), timeout=_HEAD_S)
            )
            with contextlib.suppress(OSError):
                one.sendall(head)
            opened.append(one)
        if _post(port, "completions", _COMPLETION) != 200:
            raise Silent("others are not answered")
        end = time.monotonic() + _HEAD_S
        for one in opened:
            one.settimeout(max(0.1, end - time.monotonic()))
            with contextlib.suppress(ConnectionError):
                try:
                    while one.recv(4096):
                        pass
                except TimeoutError:
                    raise Silent(f"a connection is open after {_HEAD_S} s") from None
    return len(opened)


def _sizes(bench: Bench) -> int:
    """Prompts that are too long are refused quickly, whatever their characters."""
    texts = [letter * 1_000_000 for letter in ("a", " ", "\u4e2d", "\U0001f600")]
    with _served(bench) as port:
        for text in texts:
            bodies = {
                "completions": {**_COMPLETION, "prompt": text},
                "chat/completions": {**_CHAT, "messages": [{"role": "user", "content": text}]},
            }
            for path, body in bodies.items():
                began = time.monotonic()
                if _post(port, path, body) == 200:
                    raise Silent(f"a prompt of {len(text)} characters is answered")
                if (seconds := time.monotonic() - began) > 5:
                    raise Unclear(f"a prompt of {len(text)} x {text[0]!r} took {seconds:.0f} s")
    return 2 * len(texts)


def _cases(seed: int) -> Iterator[Case]:
    del seed
    for path, plain in {"completions": _COMPLETION, "chat/completions": _CHAT}.items():
        act = functools.partial(_values, path, plain)
        yield Case(f"any value of any field of {path}", act, own_process=True)
    for name, run in {"names": _hosts, "heads": _heads, "sizes": _sizes}.items():
        yield Case(f"{name} of requests", run, own_process=True)


ROWS = (
    Row(
        32,
        "requests to the server: any value of any field, half characters, other sites, open heads",
        "an answer, or a status 4xx with a reason; the server still answers",
        _cases,
        sample=2,
    ),
)
