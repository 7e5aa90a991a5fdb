"""The row about endpoints of teachers and judges that never end, say nothing, or say too much."""

import functools
import gzip
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

from tests.faults.table import Bench, Case, Row, Silent, Unclear

_KEY = "k3y-of-the-user-0123456789"  # pragma: allowlist secret
_TIMEOUT, _RETRIES, _ASKED = 1.5, 1, 4
# All requests, retries and their pauses; a pause between retries is a second or two.
_SECONDS = 25.0
Send = Callable[[bytes], None]


def _json(text: Any, **choice: Any) -> bytes:
    choices = [{"message": {"content": text}, "finish_reason": "stop", **choice}]
    return json.dumps({"choices": choices}).encode()


def _reply(body: bytes, status: str = "200 OK", *headers: str) -> Callable[[Send, bytes], None]:
    head = [f"HTTP/1.1 {status}", "Content-Type: application/json", f"Content-Length: {len(body)}"]
    content = "\r\n".join([*head, *headers, "", ""]).encode() + body
    return lambda send, request: send(content)


def _endless(first: bytes, part: bytes, pause: float) -> Callable[[Send, bytes], None]:
    def act(send: Send, request: bytes) -> None:
        send(first)
        end = time.monotonic() + 60
        while time.monotonic() < end:
            send(part)
            time.sleep(pause)

    return act


def _echo(status: str) -> Callable[[Send, bytes], None]:
    """Sends back what the request said, its key too."""

    def act(send: Send, request: bytes) -> None:
        text = request.split(b"\r\n\r\n")[0].decode("latin-1")
        _reply(_json(text) if status == "200 OK" else text.encode(), status)(send, request)

    return act


_OK = b"HTTP/1.1 200 OK\r\n"
_MODES: dict[str, Callable[[Send, bytes], None]] = {
    "endless 100 Continue": _endless(b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 50, 0.01),
    "a status line by letters": _endless(b"", b"H", 0.2),
    "a header by letters": _endless(_OK, b"X", 0.2),
    "headers without end": _endless(_OK, b"X-A: b\r\n" * 100, 0.01),
    "a body by letters": _endless(_OK + b"Content-Length: 100000\r\n\r\n", b" ", 0.2),
    "chunks without end": _endless(
        _OK + b"Transfer-Encoding: chunked\r\n\r\n", b"1000\r\n" + b" " * 4096 + b"\r\n", 0.001
    ),
    "a chunk of 2^60 bytes": _endless(
        _OK + b"Transfer-Encoding: chunked\r\n\r\n1000000000000000\r\n", b" ", 0.2
    ),
    "silence": _endless(b"", b"", 0.2),
    "nothing at all": lambda send, request: None,
    "half a reply": lambda send, request: send(_OK + b"Content-Length: 100\r\n\r\n{"),
    "no HTTP": lambda send, request: send(b"GARBAGE\r\n\r\n"),
    "5,000 headers": lambda send, request: send(
        _OK + b"".join(b"X-%d: y\r\n" % i for i in range(5000)) + b"\r\n"
    ),
    "a header of 1 MB": lambda send, request: send(_OK + b"X: " + b"a" * 10**6 + b"\r\n\r\n"),
    "400": _reply(b'{"error": "no"}', "400 Bad Request"),
    "401": _reply(b"no", "401 Unauthorized"),
    "404": _reply(b"", "404 Not Found"),
    "429": _reply(b"", "429 Too Many", "Retry-After: 1"),
    "500": _reply(b"", "500 Oops"),
    "a redirect to a file": _reply(b"", "307 Moved", "Location: file:///etc/passwd"),
    "a redirect to itself": _reply(b"", "307 Moved", "Location: /v1/chat/completions"),
    "a gzip bomb": _reply(gzip.compress(bytes(200_000_000), 1), "200 OK", "Content-Encoding: gzip"),
    "thirty gzips": _reply(
        functools.reduce(lambda x, _: gzip.compress(x), range(30), b"x"),
        "200 OK",
        "Content-Encoding: " + ", ".join(["gzip"] * 30),
    ),
    "the key in an answer": _echo("200 OK"),
    "the key in an error": _echo("400 Bad Request"),
    "the key in a refusal": _echo("401 Unauthorized"),
    "no UTF-8": _reply(b"\xff\xfe\x00"),
    "200,000 brackets": _reply(b"[" * 200_000),
    "a number of 5,000 digits": _reply(b'{"choices": [{"message": {"content": "x"}}], "n": ' + b"9" * 5000 + b"}"),
    "half a character": _reply(_json("\ud800x")),
    "choices that are none": _reply(b'{"choices": {"0": 1}}'),
    "a message that is none": _reply(b'{"choices": [{"message": null}]}'),
    "a content of parts": _reply(_json(["x"])),
    "a reason that is a list": _reply(_json("x", finish_reason=["length"])),
    "usage of infinity": _reply(_json("x")[:-1] + b', "usage": {"prompt_tokens": 1e400, "completion_tokens": -5}}'),
    "control characters": _reply(_json("\x1b[2J\x1b]0;t\x07 \u202e \x00")),
}  # fmt: skip


def _serve(mode: str) -> socket.socket:
    """Returns the listening socket of an endpoint, whose threads end with this process."""
    listening = socket.create_server(("127.0.0.1", 0))

    def answer(connection: socket.socket) -> None:
        with connection:
            connection.settimeout(60)
            request = b""
            try:
                while b"\r\n\r\n" not in request:
                    request += connection.recv(65_536)
                _MODES[mode](connection.sendall, request)
            except OSError:
                pass  # the client has gone

    def accept() -> None:
        while True:
            try:
                connection, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(connection,), daemon=True).start()

    threading.Thread(target=accept, daemon=True).start()
    return listening


def _cases(seed: int) -> Iterator[Case]:
    del seed
    for mode in _MODES:
        yield Case(f"an endpoint with {mode}", functools.partial(_ask, mode), own_process=True)


def _ask(mode: str, bench: Bench) -> int:
    """Every request ends in time with a reply, a silence or one error, and none has the key."""
    from espalier.launch.inference.chat_endpoint import ChatEndpoint, EndpointError

    del bench
    began, texts = time.monotonic(), []
    with _serve(mode) as listening:
        url = f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        endpoint = ChatEndpoint(
            url, model="m", key=_KEY, timeout=_TIMEOUT, retries=_RETRIES, concurrency=2, owner="--x"
        )
        body = {"messages": [{"role": "user", "content": "x"}]}
        try:
            texts = [repr(reply) for _, reply in endpoint.ask_each([body] * _ASKED)]
        except EndpointError as error:
            texts = [str(error)]
        finally:
            endpoint.close()
    if (seconds := time.monotonic() - began) > _SECONDS:
        raise Unclear(f"{_ASKED} requests took {seconds:.0f} s with a timeout of {_TIMEOUT} s")
    if not texts or any(_KEY in text for text in texts):
        raise Silent(f"the key is in {texts}" if texts else "no request has a result")
    if long := [text for text in texts if len(text) > 20_000]:
        raise Unclear(f"a result of {len(long[0])} characters")
    return _ASKED


ROWS = (
    Row(
        33,
        "endpoints of teachers and judges that never end, say nothing, or say too much",
        "a result for each request within its time; the key is nowhere",
        _cases,
        sample=4,
    ),
)
