"""A small store of objects for measurements: as much of S3 as readers ask for, with a latency before each answer.

moto answers some hundred requests a second on one core, and would be what is measured. This server answers thousands:
GET, with a range, and HEAD of objects that are files of a folder (FOLDER/BUCKET/KEY, links too). It lists nothing.

  python -m tests.benchmarks.range_store FOLDER --latency 0.05

prints its address, and serves until its input ends.
"""

import argparse
import asyncio
import functools
import os
import re
import sys
import urllib.parse

_RANGE = re.compile(rb"\r\nrange: *bytes=(\d+)-(\d*)", re.IGNORECASE)


class _Connection(asyncio.Protocol):
    def __init__(self, folder: str, latency: float):
        self._folder, self._latency = folder, latency
        self._read = b""

    def connection_made(self, transport) -> None:
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        self._read += data
        while (end := self._read.find(b"\r\n\r\n")) >= 0:
            head, self._read = self._read[: end + 2], self._read[end + 4 :]
            asyncio.get_running_loop().call_later(self._latency, self._answer, head)

    def _answer(self, head: bytes) -> None:
        method, target, _ = head.split(b" ", 2)
        path = urllib.parse.unquote(target.decode().partition("?")[0]).strip("/")
        try:
            file, size, tag = _opened(_real(os.path.join(self._folder, path)))
        except OSError:
            body = b"<Error><Code>NoSuchKey</Code><Message>NoSuchKey</Message></Error>"
            self._send(b"404 Not Found", b"Content-Type: application/xml\r\n", len(body), body)
            return
        begin, end, status, more = 0, size, b"200 OK", b""
        if wanted := _RANGE.search(head):
            begin, end = int(wanted[1]), min(size, int(wanted[2] or size) + 1)
            status, more = (
                b"206 Partial Content",
                b"Content-Range: bytes %d-%d/%d\r\n" % (begin, end - 1, size),
            )
        body = os.pread(file, end - begin, begin) if method == b"GET" else b""
        self._send(status, more + tag, end - begin, body)

    def _send(self, status: bytes, headers: bytes, size: int, body: bytes) -> None:
        if not self._transport.is_closing():
            head = b"HTTP/1.1 %s\r\n%sContent-Length: %d\r\n\r\n" % (status, headers, size)
            self._transport.writelines([head, body])


@functools.cache
def _real(path: str) -> str:
    return os.path.realpath(path)


@functools.cache
def _opened(path: str) -> tuple[int, int, bytes]:
    """Returns the descriptor of a file, its size, and the headers of its version."""
    file = os.open(path, os.O_RDONLY)
    status = os.fstat(file)
    if not os.path.isfile(path):
        raise FileNotFoundError(path)
    tag = b'ETag: "%x-%x"\r\nLast-Modified: Mon, 01 Jan 2024 00:00:00 GMT\r\n' % (
        status.st_ino,
        status.st_size,
    )
    return file, status.st_size, tag


async def _serve(folder: str, latency: float) -> None:
    loop = asyncio.get_running_loop()
    server = await loop.create_server(
        lambda: _Connection(folder, latency), "127.0.0.1", 0, backlog=4096
    )
    print(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await loop.run_in_executor(None, sys.stdin.read)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("folder")
    parser.add_argument("--latency", type=float, default=0.0)
    flags = parser.parse_args()
    asyncio.run(_serve(flags.folder, flags.latency))
