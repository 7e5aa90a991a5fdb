"""A client against servers that send too much, too slowly, or nothing."""

import contextlib
import socket
import threading
import time

import pytest

from launch.inference import chat_endpoint
from launch.inference.chat_endpoint import ChatEndpoint, EndpointError, Silence, api_key

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"


@contextlib.contextmanager
def serving(write):
    """Yields the URL of a server that calls `write` with each connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def run():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection, contextlib.suppress(OSError):
                        connection.recv(1 << 16)
                        write(connection)

        threading.Thread(target=run, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"


def dripping(connection):
    """One byte at a time, each before the time limit between bytes."""
    connection.sendall(HEAD)
    for _ in range(100):
        connection.sendall(b" ")
        time.sleep(0.1)


def endless(connection):
    connection.sendall(HEAD)
    while True:
        connection.sendall(b"x" * (1 << 16))


def cut(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{")


def ask(url, **settings):
    endpoint = ChatEndpoint(
        url, model="m", key=None, owner="the test", **{"timeout": 0.4, "retries": 0, **settings}
    )
    began = time.monotonic()
    ((_, reply),) = endpoint.ask_each([{"messages": []}])
    return reply, time.monotonic() - began


@pytest.mark.parametrize(
    ("write", "reason"),
    [
        (dripping, "takes more than 0.4 s"),
        (endless, "more than 1,000,000 bytes"),
        (cut, "connection lost"),
        (lambda connection: None, "connection lost"),
        (lambda connection: time.sleep(1), "no byte within 0.4 s"),
    ],
)
def test_a_reply_is_bounded_in_time_and_size(monkeypatch, write, reason):
    monkeypatch.setattr(chat_endpoint, "_MAX_REPLY_BYTES", 1_000_000)
    with serving(write) as url:
        reply, seconds = ask(url)
    assert isinstance(reply, Silence) and reason in reply.reason
    assert seconds < 5


def test_a_key_is_of_a_variable_or_a_file(monkeypatch, tmp_path):
    monkeypatch.setenv("A_KEY", " one ")
    (tmp_path / "key").write_text("two\n")
    assert api_key("A_KEY") == "one" and api_key(None, str(tmp_path / "key")) == "two"
    assert api_key(None) is None
    for variable, file, message in (
        ("NO_SUCH", None, "is not set"),
        (None, str(tmp_path / "none"), "cannot be read"),
        (None, str(tmp_path / "empty"), "is empty"),
        (None, str(tmp_path / "odd"), "characters that API keys do not have"),
    ):
        (tmp_path / "empty").write_text("")
        (tmp_path / "odd").write_text("a\x00b")
        with pytest.raises(EndpointError, match=message):
            api_key(variable, file)
