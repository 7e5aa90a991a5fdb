"""A client of OpenAI-compatible chat-completions endpoints: several requests at a time, with limits of time and size."""

import dataclasses
import json
import os
import pathlib
import queue
import random
import threading
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import requests
import urllib3.exceptions
from urllib3.util import Retry

from espalier.launch.inference.deadlines import Deadlines

_PATH = "/chat/completions"
# HTTP statuses after which a request is repeated.
_BUSY = (408, 429, 500, 502, 503, 504)
_LONGEST_WAIT_S = 120
# HTTP statuses after which every other request would fail too.
_HOPELESS = {
    401: "It rejects the API key: give key_env=NAME, an environment variable with a valid one.",
    403: "It rejects the API key, which may not be valid for this model.",
    404: "The address or the model does not exist: the URL must end with the version, such as "
    "https://host/v1, and model=NAME must be one of the endpoint's.",
    501: "It does not answer conversations.",
}
# Maximum characters of an endpoint's text in an error.
_QUOTED = 300
# Values of finish_reason of a text that is not whole.
_CUT = ("length", "max_tokens", "content_filter")
_MAX_REPLY_BYTES = 16_000_000
_SHORTEST_SECRET = 8  # characters of a key


class EndpointError(ValueError):
    """An endpoint that cannot be used: other requests would fail too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Silence:
    """A request without an answer.

    Attributes:
      reason: why there is none.
      refused: whether the endpoint has replied that it does not serve the request.
    """

    reason: str
    refused: bool = False


@dataclasses.dataclass(frozen=True, kw_only=True)
class ChatReply:
    """A reply.

    Attributes:
      text: the answer; empty for a refusal.
      ended: why it ended: "length" if it was cut, "stop" otherwise, or what the endpoint says.
      prompt_tokens, new_tokens: numbers of tokens, None if the endpoint does not send them.
    """

    text: str
    ended: str = "stop"
    prompt_tokens: int | None = None
    new_tokens: int | None = None


class _Session(requests.Session):
    """A session that does not read redirects: `requests` reads their whole bodies, though they are not followed."""

    def get_redirect_target(self, resp: requests.Response) -> None:
        return None


class ChatEndpoint:
    """Asks over HTTP, several requests at a time, the first alone.

    Args:
      url: URL of the API, such as https://host/v1.
      model: name of a model of the endpoint.
      key: the API key, see `api_key`; None to send none.
      timeout: seconds of a request, from connecting to the last byte of its reply.
      retries: retries of a request that the endpoint is too busy for or cannot serve now.
      concurrency: requests at a time.
      owner: what names the endpoint, such as a flag, for errors.

    Raises:
      EndpointError: a malformed URL, or a number out of range.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        key: str | None,
        timeout: float = 120.0,
        retries: int = 6,
        concurrency: int = 8,
        owner: str,
    ):
        check_url(url, owner)
        check_numbers(
            owner, timeout=(timeout, 0.001), retries=(retries, 0), concurrency=(concurrency, 1)
        )
        self.url = url.rstrip("/").removesuffix(_PATH) + _PATH
        self.model = model
        self.name = f"openai:{url},model={model}"
        self._key = key
        self._timeout_s = timeout
        self._retries = retries
        self._concurrency = concurrency
        self._deadlines = Deadlines(timeout)
        self._running: set[threading.Event] = set()
        self._closed = False
        self._session = _Session()
        adapter = self._deadlines.adapter(pool_maxsize=concurrency)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, adapter)

    def close(self) -> None:
        """Ends all requests; `ask_each` yields no further replies and sends nothing."""
        self._closed = True
        for ended in tuple(self._running):
            ended.set()
        self._deadlines.abort()

    def ask_each(
        self, bodies: Sequence[Mapping[str, Any]], *, patience: int | None = None
    ) -> Iterator[tuple[int, ChatReply | Silence]]:
        """Yields (index, reply) of every request, in the order in which they finish.

        Args:
          bodies: the parameters of each request, besides the model: `messages` and others of the API.
          patience: number of requests in a row without an answer after which further ones are not sent; None for no limit.

        Raises:
          EndpointError: further requests would fail too; the replies to requests in flight are yielded before. The first
            two requests are refused for the same reason, for example.
        """
        hopeless: list[Exception] = []
        todo = enumerate(bodies)
        replies: queue.SimpleQueue[tuple[int, ChatReply | Silence] | None] = queue.SimpleQueue()
        ended, heard, lock = threading.Event(), threading.Event(), threading.Lock()
        in_a_row, refusal = 0, None

        def end(error: Exception) -> None:
            hopeless.append(error)
            ended.set()

        # Whoever gets a reply decides whether to go on: the consumer of the replies may be far behind.
        def note(reply: ChatReply | Silence) -> None:
            nonlocal in_a_row, refusal
            in_a_row = in_a_row + 1 if isinstance(reply, Silence) else 0
            refused = reply.reason if isinstance(reply, Silence) and reply.refused else None
            if refused is not None and refused == refusal and not heard.is_set():
                end(EndpointError(f"{self.name} refuses every request: {refused}"))
            elif isinstance(reply, Silence) and in_a_row == patience:
                end(
                    EndpointError(
                        f"{self.name} has given no answer to {in_a_row} requests in a row: {reply.reason}"
                    )
                )
            if refused is None or refusal is not None:
                heard.set()
            refusal = refused

        def work() -> None:
            while not ended.is_set():
                with lock:
                    job = next(todo, None)
                if job is None:
                    break
                i, body = job
                try:
                    reply = self._ask(body, ended)
                except Exception as error:  # whoever waits for the replies must know
                    # Requests in flight have been paid for, so their replies are awaited.
                    end(error)
                    break
                with lock:
                    note(reply)
                replies.put((i, reply))

        def worker(is_first: bool) -> None:
            try:
                while not (is_first or heard.is_set() or ended.is_set()):
                    heard.wait(0.1)
                work()
            finally:
                if is_first:
                    heard.set()
                replies.put(None)

        # Daemons, because a thread that still looks up a name would keep the command from ending.
        workers = [
            threading.Thread(target=worker, args=(not k,), daemon=True)
            for k in range(0 if self._closed else min(self._concurrency, len(bodies)))
        ]
        self._running.add(ended)
        try:
            for thread in workers:
                thread.start()
            left = len(workers)
            while left:
                if (reply := replies.get()) is None:
                    left -= 1
                elif not self._closed:
                    yield reply
        finally:
            ended.set()
            self._running.discard(ended)
            self._deadlines.abort()
        if hopeless and not self._closed:
            raise hopeless[0]

    def _ask(self, body: Mapping[str, Any], ended: threading.Event) -> ChatReply | Silence:
        """Asks until there is a reply, no retry is left, or `ended` is set."""
        for retry in range(self._retries + 1):
            reply, wait = self._ask_once(body)
            if wait is None or retry == self._retries:
                break
            pause = 0.5 * 2**retry + random.uniform(0, 0.5)
            if ended.wait(min(wait or pause, _LONGEST_WAIT_S)):
                break
        if isinstance(reply, EndpointError):
            raise reply
        return reply

    def _ask_once(
        self, body: Mapping[str, Any]
    ) -> tuple[ChatReply | Silence | EndpointError, float | None]:
        """Returns the reply or what there is in its place, and the seconds before a retry: 0 if any, None for no retry.

        Raises:
          EndpointError: further requests would fail too.
        """
        try:
            response = self._session.post(
                self.url,
                json={"model": self.model, **body},
                timeout=self._timeout_s,
                auth=self._authorise,
                allow_redirects=False,
                stream=True,
            )
            with response:
                status = response.status_code
                if status in _HOPELESS:
                    raise EndpointError(
                        f"{self.name} answers {self._status(response)}. {_HOPELESS[status]}"
                    )
                if status in _BUSY:
                    return Silence(reason=self._status(response)), _retry_after(response)
                if not response.ok or response.is_redirect:
                    refused = 400 <= status < 500
                    return Silence(reason=self._status(response), refused=refused), None
                content = self._content(response)
        except (requests.RequestException, urllib3.exceptions.HTTPError, OSError) as error:
            if _not_connected(error):
                return self._unreachable(error), 0.0
            content = Silence(reason=self._clean(f"connection lost: {error}"))
        if self._deadlines.passed():
            content = Silence(reason=f"no whole reply within {self._timeout_s:g} s")
        return content if isinstance(content, Silence) else self._reply(content), None

    def _content(self, response: requests.Response) -> bytes | Silence:
        """Returns the body of a response, or why it is not read to its end."""
        parts, size = [], 0
        while part := response.raw.read1(1 << 16, decode_content=True):
            parts.append(part)
            size += len(part)
            if size > _MAX_REPLY_BYTES:
                return Silence(reason=f"the reply has more than {_MAX_REPLY_BYTES:,} bytes")
            if self._deadlines.passed():
                break
        return b"".join(parts)

    def _authorise(self, request: Any) -> Any:
        """Adds the key to a request. Without an `auth`, requests would send a password from ~/.netrc."""
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _unreachable(self, error: Exception) -> EndpointError:
        reason = _reason(error) or error
        return EndpointError(
            self._clean(
                f"{self.name} cannot be reached: {reason}. Start it, or correct the URL. Earlier "
                "replies are saved: repeat the command to continue."
            )
        )

    def _status(self, response: requests.Response) -> str:
        content = self._content(response)
        text = "" if isinstance(content, Silence) else content.decode("utf-8", "replace")
        text = " ".join(text[: 10 * _QUOTED].split())
        return self._clean(
            f"HTTP {response.status_code} {response.reason}: {text[:_QUOTED]}".strip()
        )

    def _clean(self, text: str) -> str:
        """Returns an endpoint's text without the key, which it may quote."""
        return text if self._key is None else text.replace(self._key, "***")

    def _reply(self, content: bytes) -> ChatReply | Silence:
        """Returns the reply in the body of a response, without the key unless that is so short that it may be a word."""
        try:
            row = json.loads(content)
        except (ValueError, RecursionError):
            return Silence(reason="the reply is not JSON, or cut short")
        try:
            choice = row["choices"][0]
            text = choice["message"]["content"]
        except (KeyError, IndexError, TypeError):
            return Silence(reason="the reply has no choices[0].message.content")
        if not isinstance(text, str | None):
            return Silence(reason="the content of the reply is no text")
        usage = row.get("usage")
        usage = usage if isinstance(usage, dict) else {}

        def count(name: str) -> int | None:
            value = usage.get(name)
            return value if type(value) is int and 0 <= value < 2**53 else None

        ended = choice.get("finish_reason")
        ended = "length" if ended in _CUT else ended
        is_word = len(self._key or "") < _SHORTEST_SECRET
        clean = (lambda part: part) if is_word else self._clean
        return ChatReply(
            # A refusal has no content: it is a reply with an empty text.
            text=clean(text or ""),
            ended=clean(ended)[:100] if isinstance(ended, str) else "stop",
            prompt_tokens=count("prompt_tokens"),
            new_tokens=count("completion_tokens"),
        )


def check_numbers(owner: str, **numbers: tuple[float | None, float]) -> None:
    """Raises EndpointError if a number, given with its minimum, is below it or not finite; None is no number."""
    for name, (value, least) in numbers.items():
        if value is not None and not least <= value < float("inf"):
            raise EndpointError(f"{name}={value} of {owner} must be at least {least}, and finite.")


def check_url(url: str, owner: str) -> None:
    """Raises EndpointError unless `url` is that of an API, without anything secret in it."""
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise EndpointError(f"{url} of {owner} is not a URL: give one such as https://host/v1.")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise EndpointError(
            f"The URL of {owner} has a user, a password or a query, which would be written to files: "
            "put the key into an environment variable and give key_env=NAME."
        )


def api_key(variable: str | None, file: str | None = None) -> str | None:
    """Returns the API key in an environment variable or a file; None if neither is named.

    Raises:
      EndpointError: there is no key, or it has characters that keys do not have.
    """
    if variable is not None:
        key, where = os.environ.get(variable, "").strip(), f"The environment variable {variable}"
        if not key:
            raise EndpointError(
                f"{where} of key_env is not set: export {variable}=... with the API key."
            )
        where += " of key_env"
    elif file is not None:
        where = f"The file {file} of key_file"
        try:
            key = pathlib.Path(file).read_text("utf-8").strip()
        except (OSError, ValueError) as error:
            raise EndpointError(f"{where} cannot be read: {error}.") from None
        if not key:
            raise EndpointError(f"{where} is empty: write the API key into it.")
    else:
        return None
    if not key.isascii() or not key.isprintable():
        raise EndpointError(f"{where} has characters that API keys do not have.")
    return key


def _not_connected(error: Exception) -> bool:
    """Returns whether there was no connection at all, so that the next request would fail too."""
    kinds = (requests.ConnectTimeout, requests.exceptions.SSLError, requests.exceptions.ProxyError)
    return isinstance(error, kinds) or isinstance(
        _reason(error), urllib3.exceptions.NewConnectionError
    )


def _reason(error: Exception) -> Any:
    """Returns the error of urllib3 that caused an error of requests, if known."""
    return getattr(error.args[0] if error.args else None, "reason", None)


def _retry_after(response: requests.Response) -> float:
    """Returns the seconds that an endpoint asks to wait, 0 if it does not."""
    try:
        return max(Retry().parse_retry_after(response.headers.get("Retry-After", "0")), 0.0)
    except (urllib3.exceptions.InvalidHeader, ValueError, OverflowError):
        return 0.0
