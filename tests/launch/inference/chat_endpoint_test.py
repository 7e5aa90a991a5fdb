"""A client against servers that send too much, too slowly, or nothing."""

import contextlib
import json
import re
import socket
import threading
import time

import pytest

from espalier.launch.inference import chat_endpoint
from espalier.launch.inference.chat_endpoint import ChatEndpoint, EndpointError, Silence, api_key

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n\r\n"


def read_request(connection):
    """To its end: a connection that is closed with unread bytes is reset, and its reply may be lost."""
    head = b""
    while b"\r\n\r\n" not in head and (part := connection.recv(1 << 16)):
        head += part
    head, _, body = head.partition(b"\r\n\r\n")
    left = int(re.search(rb"(?i)content-length: (\d+)", head)[1]) - len(body)
    while left > 0 and (part := connection.recv(left)):
        left -= len(part)


@contextlib.contextmanager
def serving(write):
    """Yields the URL of a server that calls `write` with each connection."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def run():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection, contextlib.suppress(OSError):
                        read_request(connection)
                        write(connection)

        threading.Thread(target=run, daemon=True).start()
        yield f"http://127.0.0.1:{server.getsockname()[1]}/v1"


def dripping(connection):
    """One byte at a time, each before the time limit between bytes."""
    connection.sendall(HEAD)
    for _ in range(100):
        connection.sendall(b" ")
        time.sleep(0.1)


def slow_status(connection):
    for byte in b"HTTP/1.1 200 " + b"O" * 100:
        connection.sendall(bytes([byte]))
        time.sleep(0.1)


def slow_headers(connection):
    connection.sendall(b"HTTP/1.1 200 OK\r\n")
    for _ in range(100):
        connection.sendall(b"X")
        time.sleep(0.1)


def continuing(connection):
    while True:
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n" * 100)


def continuing_slowly(connection):
    while True:
        connection.sendall(b"HTTP/1.1 100 Continue\r\n\r\n")
        time.sleep(0.1)


def endless(connection):
    connection.sendall(HEAD)
    while True:
        connection.sendall(b"x" * (1 << 16))


def endless_redirect(connection):
    connection.sendall(b"HTTP/1.1 302 Found\r\nLocation: http://[\xff\r\n\r\n")
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
        (dripping, "no whole reply within 0.4 s"),
        (slow_status, "no whole reply within 0.4 s"),
        (slow_headers, "no whole reply within 0.4 s"),
        (continuing, "no whole reply within 0.4 s"),
        (continuing_slowly, "no whole reply within 0.4 s"),
        (endless, "more than 1,000,000 bytes"),
        (endless_redirect, "HTTP 302 Found"),
        (cut, "connection lost"),
        (lambda connection: None, "connection lost"),
        (lambda connection: time.sleep(1), "no whole reply within 0.4 s"),
    ],
)
def test_a_reply_is_bounded_in_time_and_size(monkeypatch, write, reason):
    monkeypatch.setattr(chat_endpoint, "_MAX_REPLY_BYTES", 1_000_000)
    with serving(write) as url:
        reply, seconds = ask(url)
    assert isinstance(reply, Silence) and reason in reply.reason
    assert seconds < 5


def answering(*replies):
    """Returns what sends one reply (status line, body) after the other, the last for ever; and the list of requests."""
    left, asked = list(replies), []

    def write(connection):
        asked.append(1)
        status, content = left.pop(0) if len(left) > 1 else left[0]
        head = f"HTTP/1.1 {status}\r\nContent-Length: {len(content)}\r\nConnection: close\r\n\r\n"
        connection.sendall(head.encode() + content)

    return write, asked


def reply_of(text):
    return "200 OK", json.dumps({"choices": [{"message": {"content": text}}]}).encode()


@pytest.mark.parametrize(
    ("message", "reason", "ended"),
    [
        ({"content": "whole"}, "stop", "stop"),
        ({"content": "begun"}, "length", "length"),
        ({"content": "begun"}, "content_filter", "length"),
        ({"content": None, "refusal": "No."}, "stop", "stop"),
        ({"content": [{"type": "text", "text": "parts"}]}, "stop", None),
    ],
)
def test_a_reply_that_is_cut_or_no_text_is_neither_whole_nor_empty(message, reason, ended):
    content = json.dumps({"choices": [{"message": message, "finish_reason": reason}]}).encode()
    with serving(answering(("200 OK", content))[0]) as url:
        ((_, reply),) = endpoint_of(url).ask_each([{"messages": []}])
    if ended is None:
        assert isinstance(reply, Silence) and "no text" in reply.reason
    else:
        assert (reply.text, reply.ended) == (message["content"] or "", ended)


def endpoint_of(url, **settings):
    return ChatEndpoint(url, **{"model": "m", "key": None, "owner": "the test", **settings})


def test_what_is_refused_for_one_reason_is_not_asked_again_and_again():
    write, asked = answering(("400 Bad Request", b"no chat template"))
    with serving(write) as url:
        replies = endpoint_of(url).ask_each([{"messages": []}] * 50, patience=16)
        assert next(replies)[1].refused
        with pytest.raises(EndpointError, match="refuses every request: HTTP 400 .*no chat templ"):
            list(replies)
    assert len(asked) == 2
    # One prompt can be too long, or several, each in its own words; and a model without a chat template says so.
    write, asked = answering(
        ("400 Bad Request", b"9 tokens"), ("400 Bad Request", b"8 tokens"), reply_of("fine")
    )
    with serving(write) as url:
        replies = [reply for _, reply in endpoint_of(url).ask_each([{"messages": []}] * 9)]
    assert sum(isinstance(reply, Silence) for reply in replies) == 2 and len(asked) == 9
    write, asked = answering(("501 Not Implemented", b"no chat template"))
    with serving(write) as url, pytest.raises(EndpointError, match="no chat template"):
        list(endpoint_of(url).ask_each([{"messages": []}] * 50))
    assert len(asked) == 1


def test_a_busy_endpoint_is_asked_again():
    write, asked = answering(("503 Busy", b""), ("429 Slow", b""), reply_of("fine"))
    with serving(write) as url:
        ((_, reply),) = endpoint_of(url).ask_each([{"messages": []}])
    assert reply.text == "fine" and len(asked) == 3
    with serving(answering(("503 Busy", b"tomorrow"))[0]) as url:
        ((_, reply),) = endpoint_of(url, retries=1).ask_each([{"messages": []}])
    assert "HTTP 503 Busy: tomorrow" in reply.reason and not reply.refused


@pytest.mark.parametrize(
    "wait", ["9" * 5000, "Mon, 31 Dec 999999999999 00:00:00 GMT"], ids=["digits", "date"]
)
def test_a_pause_that_is_no_number_loses_no_request(wait):
    head = f"HTTP/1.1 503 Busy\r\nRetry-After: {wait}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
    with serving(lambda connection: connection.sendall(head.encode())) as url:
        replies = dict(endpoint_of(url, retries=0).ask_each([{"messages": []}] * 3))
    assert sorted(replies) == [0, 1, 2] and "HTTP 503 Busy" in replies[2].reason


def test_an_error_of_a_thread_reaches_who_waits_for_replies(monkeypatch):
    endpoint = endpoint_of("http://127.0.0.1:9/v1")
    monkeypatch.setattr(endpoint, "_ask_once", lambda body: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(endpoint.ask_each([{"messages": []}] * 3))


@pytest.mark.parametrize("status", [b"HTTP/1.1 503 Busy\r\nRetry-After: 60\r\n\r\n", b""])
def test_who_stops_reading_replies_does_not_wait_for_them(status):
    """Neither for a reply that does not come nor for the pause before a retry."""
    arrived = threading.Event()

    def write(connection):
        connection.sendall(status)
        arrived.set()
        if not status:
            time.sleep(20)

    with serving(write) as url:
        endpoint = endpoint_of(url, timeout=20.0)
        threading.Timer(0.5, lambda: (arrived.wait(10), endpoint.close())).start()
        began = time.monotonic()
        assert list(endpoint.ask_each([{"messages": []}] * 20)) == []
        assert list(endpoint.ask_each([{"messages": []}])) == []
        assert time.monotonic() - began < 10


def test_a_reply_does_not_have_the_key():
    for key, text in (("sk-1234567", "your key is ***"), ("none", "your key is none")):
        write, _ = answering(reply_of(f"your key is {key}"))
        with serving(write) as url:
            ((_, reply),) = endpoint_of(url, key=key).ask_each([{"messages": []}])
        assert reply.text == text


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
