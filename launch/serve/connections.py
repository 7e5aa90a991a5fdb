"""Connections of the server: which names of it are answered, and how long the head of a request may take."""

import ipaddress
import re
import urllib.parse
from collections.abc import Callable, Collection
from typing import Any

import h11
import uvicorn
from starlette.datastructures import Headers
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from espalier.launch.serve.requests import RequestError

_NAME = re.compile(r"(?:\[(?P<address>[^]]+)\]|(?P<name>[^][@:]+))(?::\d+)?")
_HEAD_S = 10.0  # seconds in which the head of a request must arrive
_SHUTDOWN_S = 30  # for requests in progress


def config(app: Callable[..., Any], *, host: str, port: int, log_level: str = "info") -> Any:
    """Returns the configuration of uvicorn for an ASGI application."""
    return uvicorn.Config(
        app,
        host=host,
        port=port,
        http=_Protocol,
        log_level=log_level,
        timeout_graceful_shutdown=_SHUTDOWN_S,
        server_header=False,
    )


class _Protocol(H11Protocol):
    """HTTP/1.1 by h11; closes a connection on which the head of a request is not complete in time."""

    _timer: Any = None

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watch_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._watch_head()

    def _watch_head(self) -> None:
        is_waiting = self.conn.their_state is h11.IDLE
        if is_waiting and self._timer is None:
            self._timer = self.loop.call_later(_HEAD_S, self._too_late)
        elif not is_waiting and self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _too_late(self) -> None:
        self._timer = None
        if self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.transport.close()


class Hosts:
    """ASGI middleware that answers requests only to names of this machine, and from pages of these names.

    A page of another site can give its own name the address 127.0.0.1, so that the browser lets it read answers; its
    requests have that name as Host and as Origin.

    Args:
      allowed: names besides those of the loopback device.
    """

    def __init__(self, app: Callable[..., Any], *, allowed: Collection[str]):
        self._app, self._allowed = app, {name.lower() for name in allowed}

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http":
            headers = Headers(scope=scope)
            named = {"Host": f"//{headers.get('host', '')}"}
            if (origin := headers.get("origin")) is not None:
                named["Origin"] = origin
            for header, url in named.items():
                if not self._is_allowed(url):
                    message = f"The {header} {url.removeprefix('//')[:100]!r} is not a name of this server: see --allowed_host."
                    error = RequestError(message, status=403)
                    await JSONResponse(error.body, status_code=403)(scope, receive, send)
                    return
        await self._app(scope, receive, send)

    def _is_allowed(self, url: str) -> bool:
        try:
            match = _NAME.fullmatch(urllib.parse.urlsplit(url).netloc)
        except ValueError:
            return False
        if match is None:
            return False
        name = (match["name"] or match["address"]).lower()
        if name == "localhost" or name in self._allowed:
            return True
        try:
            return ipaddress.ip_address(name).is_loopback
        except ValueError:
            return False
