"""Deadlines of HTTP requests: a socket that is still busy is shut down, whatever it is busy with.

A time limit of a socket begins again with every byte, so that a server can hold a request for ever: by headers of one byte
each second, or by endless `100 Continue`.
"""

import contextlib
import http.client
import socket
import threading
import time
from typing import Any

import requests.adapters
import urllib3.connection
from urllib3.connectionpool import HTTPConnectionPool, HTTPSConnectionPool
from urllib3.exceptions import NewConnectionError


class Deadlines:
    """Ends each request of a session `limit` seconds after it begins to connect."""

    def __init__(self, limit: float):
        self._limit = limit
        self._timers: dict[Any, threading.Timer] = {}
        self._thread = threading.local()
        self._pools = {
            "http": self._pool(HTTPConnectionPool, urllib3.connection.HTTPConnection),
            "https": self._pool(HTTPSConnectionPool, urllib3.connection.HTTPSConnection),
        }

    def adapter(self, **options: Any) -> requests.adapters.HTTPAdapter:
        """Returns an adapter for a session, with options of `HTTPAdapter`; it makes no retries."""
        pools = self._pools

        class Adapter(requests.adapters.HTTPAdapter):
            def init_poolmanager(self, *args: Any, **kwargs: Any) -> None:
                super().init_poolmanager(*args, **kwargs)
                self.poolmanager.pool_classes_by_scheme = pools

            def proxy_manager_for(self, proxy: str, **kwargs: Any) -> Any:
                manager = super().proxy_manager_for(proxy, **kwargs)
                manager.pool_classes_by_scheme = pools
                return manager

        return Adapter(**options)

    def passed(self) -> bool:
        """Returns whether the deadline of this thread's last request has passed."""
        return time.monotonic() >= getattr(self._thread, "deadline", float("inf"))

    def abort(self) -> None:
        """Ends all requests now."""
        for connection in tuple(self._timers):
            connection.shut_down()

    def _begin(self, connection: Any) -> None:
        if connection not in self._timers:
            self._thread.deadline = time.monotonic() + self._limit
            self._timers[connection] = timer = threading.Timer(self._limit, connection.shut_down)
            timer.daemon = True
            timer.start()

    def _end(self, connection: Any) -> None:
        if (timer := self._timers.pop(connection, None)) is not None:
            timer.cancel()

    def _pool(self, pool: type, connection: type) -> type:
        """Returns a class of pools whose connections have the deadline."""
        deadlines = self

        class Response(http.client.HTTPResponse):
            def _read_status(self) -> Any:  # again after each `100 Continue`
                if deadlines.passed():
                    raise TimeoutError("the deadline has passed")
                return super()._read_status()  # type: ignore[misc]

        class Connection(connection):
            response_class = Response
            # The same connection as `sock`, which is replaced while TLS begins.
            handle: socket.socket | None = None

            def connect(self) -> None:
                deadlines._begin(self)
                super().connect()

            def request(self, *args: Any, **kwargs: Any) -> None:
                deadlines._begin(self)
                super().request(*args, **kwargs)

            def _new_conn(self) -> socket.socket:
                sock = super()._new_conn()
                self.handle = sock.dup()
                if deadlines.passed():
                    sock.close()
                    raise NewConnectionError(self, "the deadline has passed")
                return sock

            def shut_down(self) -> None:
                if self.handle is not None:
                    with contextlib.suppress(OSError):  # the server was first
                        self.handle.shutdown(socket.SHUT_RDWR)

            def close(self) -> None:
                deadlines._end(self)
                super().close()
                if self.handle is not None:
                    self.handle.close()

        class Pool(pool):
            ConnectionCls = Connection

            def _put_conn(self, conn: Any) -> None:
                if conn is not None:
                    deadlines._end(conn)
                super()._put_conn(conn)

        return Pool
