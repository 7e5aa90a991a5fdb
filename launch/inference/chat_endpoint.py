"""A client of OpenAI-compatible chat-completions endpoints: several requests at a time, with limits of time and size."""

import dataclasses
import json
import os
import pathlib
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import requests
import urllib3.exceptions
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

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
}
# Maximum characters of an endpoint's text in an error.
_QUOTED = 300
_MAX_REPLY_BYTES = 16_000_000


class EndpointError(ValueError):
    """An endpoint that cannot be used: other requests would fail too."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Silence:
    """The reason that no reply came."""

    reason: str


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


class ChatEndpoint:
    """Asks over HTTP, several requests at a time.

    Args:
      url: URL of the API, such as https://host/v1.
      model: name of a model of the endpoint.
      key: the API key, see `api_key`; None to send none.
      timeout: seconds to connect, seconds without a byte of the reply, and seconds from its first byte to its last.
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
        self._concurrency = concurrency
        self._session = requests.Session()
        # A request that times out is not repeated here, because a repetition counts as another attempt.
        again = Retry(
            total=retries,
            read=False,
            redirect=False,
            status_forcelist=_BUSY,
            allowed_methods=("POST",),
            backoff_factor=0.5,
            backoff_max=_LONGEST_WAIT_S,
            backoff_jitter=0.5,
            raise_on_status=False,
            retry_after_max=_LONGEST_WAIT_S,
        )
        adapter = HTTPAdapter(max_retries=again, pool_maxsize=concurrency)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, adapter)

    def ask_each(
        self, bodies: Sequence[Mapping[str, Any]], *, patience: int | None = None
    ) -> Iterator[tuple[int, ChatReply | Silence]]:
        """Yields (index, reply) of every request, in the order in which they finish.

        Args:
          bodies: the parameters of each request, besides the model: `messages` and others of the API.
          patience: number of requests in a row without a reply after which further ones are not sent; None for no limit.

        Raises:
          EndpointError: further requests would fail too; the replies to requests in flight are yielded before.
        """
        hopeless: list[EndpointError] = []
        ended = threading.Event()
        lock, in_a_row = threading.Lock(), 0

        # Whoever gets a reply decides whether to go on: the consumer of the replies may be far behind.
        def ask(body: Mapping[str, Any]) -> ChatReply | Silence | None:
            nonlocal in_a_row
            if ended.is_set():
                return None
            try:
                reply = self._ask(body)
            except EndpointError as error:
                # Requests in flight have been paid for, so their replies are awaited.
                hopeless.append(error)
                ended.set()
                return None
            with lock:
                in_a_row = in_a_row + 1 if isinstance(reply, Silence) else 0
                if isinstance(reply, Silence) and in_a_row == patience:
                    hopeless.append(
                        EndpointError(
                            f"{self.name} has not replied to {in_a_row} requests in a row: {reply.reason}"
                        )
                    )
                    ended.set()
            return reply

        with ThreadPoolExecutor(self._concurrency) as pool:
            try:
                asked = {pool.submit(ask, body): i for i, body in enumerate(bodies)}
                for future in as_completed(asked):
                    if (reply := future.result()) is not None:
                        yield asked[future], reply
            finally:
                ended.set()
        if hopeless:
            raise hopeless[0]

    def _ask(self, body: Mapping[str, Any]) -> ChatReply | Silence:
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
                if response.status_code in _HOPELESS:
                    raise EndpointError(
                        f"{self.name} answers {self._status(response)}. {_HOPELESS[response.status_code]}"
                    )
                if not response.ok or response.is_redirect:
                    return Silence(reason=self._status(response))
                content = self._content(response)
        except requests.Timeout as error:
            if isinstance(error, requests.ConnectTimeout):
                raise self._unreachable(error) from None
            return Silence(reason=f"no byte within {self._timeout_s:g} s")
        except requests.RequestException as error:
            if _not_connected(error):
                raise self._unreachable(error) from None
            return Silence(reason=self._clean(f"connection lost: {error}"))
        except (urllib3.exceptions.HTTPError, OSError) as error:  # while the body is read
            if isinstance(error, urllib3.exceptions.ReadTimeoutError | TimeoutError):
                return Silence(reason=f"no byte within {self._timeout_s:g} s")
            return Silence(reason=self._clean(f"connection lost: {error}"))
        return content if isinstance(content, Silence) else _reply(content)

    def _content(self, response: requests.Response) -> bytes | Silence:
        """Returns the body of a response, or why it is not read to its end."""
        parts, size, began = [], 0, time.monotonic()
        while part := response.raw.read1(1 << 16, decode_content=True):
            parts.append(part)
            size += len(part)
            if size > _MAX_REPLY_BYTES:
                return Silence(reason=f"the reply has more than {_MAX_REPLY_BYTES:,} bytes")
            if time.monotonic() - began > self._timeout_s:
                return Silence(reason=f"the reply takes more than {self._timeout_s:g} s")
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
        """Returns an endpoint's text without the key, which it may quote in its errors."""
        return text if self._key is None else text.replace(self._key, "***")


def _reply(content: bytes) -> ChatReply | Silence:
    """Returns the reply in the body of a response."""
    try:
        row = json.loads(content)
    except (ValueError, RecursionError):
        return Silence(reason="the reply is not JSON, or cut short")
    try:
        choice = row["choices"][0]
        text = choice["message"]["content"]
    except (KeyError, IndexError, TypeError):
        return Silence(reason="the reply has no choices[0].message.content")
    usage = row.get("usage")
    usage = usage if isinstance(usage, dict) else {}

    def count(name: str) -> int | None:
        value = usage.get(name)
        return value if type(value) is int and 0 <= value < 2**53 else None

    ended = choice.get("finish_reason")
    return ChatReply(
        # A refusal has no content: it is a reply with an empty text.
        text=text if isinstance(text, str) else "",
        ended=ended[:100] if isinstance(ended, str) else "stop",
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


def _not_connected(error: requests.RequestException) -> bool:
    """Returns whether there was no connection at all, so that the next request would fail too."""
    return isinstance(
        error, requests.exceptions.SSLError | requests.exceptions.ProxyError
    ) or isinstance(_reason(error), urllib3.exceptions.NewConnectionError)


def _reason(error: Exception) -> Any:
    """Returns the error of urllib3 that caused an error of requests, if known."""
    return getattr(error.args[0] if error.args else None, "reason", None)
