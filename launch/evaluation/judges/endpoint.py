"""An OpenAI-compatible chat-completions endpoint as the writer of a judge's replies."""

import os
import threading
import urllib.parse
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

import requests
import urllib3.exceptions
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from launch.evaluation.judges.base import JudgeError
from launch.evaluation.judges.pairwise import Silence

_PATH = "/chat/completions"
# HTTP statuses after which a request is repeated.
_BUSY = (408, 429, 500, 502, 503, 504)
_LONGEST_WAIT_S = 120
# HTTP statuses after which every other question would fail too.
_HOPELESS = {
    401: "It rejects the API key: give key_env=NAME, an environment variable with a valid one.",
    403: "It rejects the API key, which may not be valid for this model.",
    404: "The address or the model does not exist: the URL must end with the version, such as "
    "https://host/v1, and model=NAME must be one of the endpoint's.",
}
# Maximum characters of an endpoint's text in an error.
_QUOTED = 300


class EndpointWriter:
    """Asks over HTTP, several requests at a time; see launch/evaluation/judges/pairwise.py.

    Args:
      url: URL of the API, such as https://host/v1.
      model: name of a model of the endpoint.
      key_env: environment variable that holds the API key; None to send none.
      max_tokens: maximum tokens of a reply; None for the endpoint's default.
      temperature: temperature of the first attempt; None for the endpoint's default in all attempts.
      timeout: seconds to connect, and seconds without a byte of the reply.
      retries: retries of a request that the endpoint is too busy for or cannot serve now.
      concurrency: requests at a time.

    Raises:
      JudgeError: a malformed URL, a number out of range, or a variable that is not set.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        key_env: str | None = None,
        max_tokens: int | None = 512,
        temperature: float | None = 0.0,
        timeout: float = 120.0,
        retries: int = 6,
        concurrency: int = 8,
    ):
        _check_url(url)
        for name, value, least in (
            ("max_tokens", max_tokens, 1),
            ("timeout", timeout, 0.001),
            ("retries", retries, 0),
            ("concurrency", concurrency, 1),
            ("temperature", temperature, 0),
        ):
            if value is not None and not least <= value < float("inf"):
                raise JudgeError(f"{name}={value} of --judge must be at least {least}, and finite.")
        self._key = _key(key_env)
        self._url = url.rstrip("/").removesuffix(_PATH) + _PATH
        self._model = model
        self._max_tokens = max_tokens
        self._temperature = temperature
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
        self.name = f"openai:{url},model={model}"
        self.identity = {
            "kind": "openai",
            "url": self._url,
            "model": model,
            "max_tokens": max_tokens,
            "temperature": temperature,
        }

    def write(
        self, prompts: Sequence[str], *, temperature: float, seed: int
    ) -> Iterator[tuple[int, str | Silence]]:
        hopeless: list[JudgeError] = []
        ended = threading.Event()

        def ask(prompt: str) -> str | Silence | None:
            return None if ended.is_set() else self._ask(prompt, temperature, seed)

        with ThreadPoolExecutor(self._concurrency) as pool:
            try:
                asked = {pool.submit(ask, prompt): i for i, prompt in enumerate(prompts)}
                for future in as_completed(asked):
                    try:
                        reply = future.result()
                    except JudgeError as error:
                        # Requests in flight have been paid for, so their replies are awaited.
                        ended.set()
                        hopeless.append(error)
                        continue
                    if reply is not None:
                        yield asked[future], reply
            finally:
                ended.set()
        if hopeless:
            raise hopeless[0]

    def _ask(self, prompt: str, temperature: float, seed: int) -> str | Silence:
        body: dict[str, Any] = {
            "model": self._model,
            "messages": [{"role": "user", "content": prompt}],
            "seed": seed,
        }
        if self._temperature is not None:
            body["temperature"] = self._temperature + temperature
        if self._max_tokens is not None:
            body["max_tokens"] = self._max_tokens
        try:
            response = self._session.post(
                self._url,
                json=body,
                timeout=self._timeout_s,
                auth=self._authorise,
                allow_redirects=False,
            )
        except requests.Timeout as error:
            if isinstance(error, requests.ConnectTimeout):
                raise self._unreachable(error) from None
            return Silence(reason=f"no byte within {self._timeout_s:g} s")
        except requests.RequestException as error:
            if _not_connected(error):
                raise self._unreachable(error) from None
            return Silence(reason=self._clean(f"connection lost: {error}"))
        if response.status_code in _HOPELESS:
            raise JudgeError(
                f"{self.name} answers {self._status(response)}. {_HOPELESS[response.status_code]}"
            )
        if not response.ok or response.is_redirect:
            return Silence(reason=self._status(response))
        return self._content(response)

    def _content(self, response: requests.Response) -> str | Silence:
        try:
            text = response.json()["choices"][0]["message"]["content"]
        except requests.JSONDecodeError:
            return Silence(reason="the reply is not JSON, or cut short")
        except (KeyError, IndexError, TypeError):
            return Silence(reason="the reply has no choices[0].message.content")
        # A refusal has no content: it is a reply with an empty text.
        return text if isinstance(text, str) else ""

    def _authorise(self, request: Any) -> Any:
        """Adds the key to a request. Without an `auth`, requests would send a password from ~/.netrc."""
        if self._key is not None:
            request.headers["Authorization"] = f"Bearer {self._key}"
        return request

    def _unreachable(self, error: Exception) -> JudgeError:
        reason = _reason(error) or error
        return JudgeError(
            self._clean(
                f"{self.name} cannot be reached: {reason}. Start it, or correct the URL. Earlier "
                "replies are saved: repeat the command to continue."
            )
        )

    def _status(self, response: requests.Response) -> str:
        text = " ".join(response.text.split())
        return self._clean(
            f"HTTP {response.status_code} {response.reason}: {text[:_QUOTED]}".strip()
        )

    def _clean(self, text: str) -> str:
        """Returns an endpoint's text without the key, which it may quote in its errors."""
        return text if self._key is None else text.replace(self._key, "***")


def _check_url(url: str) -> None:
    parts = urllib.parse.urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise JudgeError(f"{url} of --judge is not a URL: give one such as https://host/v1.")
    if parts.username or parts.password or parts.query or parts.fragment:
        raise JudgeError(
            "The URL of --judge has a user, a password or a query, which would be written to files: "
            "put the key into an environment variable and give key_env=NAME."
        )


def _key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise JudgeError(
            f"The environment variable {variable} of key_env is not set: export {variable}=... with "
            "the API key."
        )
    if not key.isascii() or not key.isprintable():
        raise JudgeError(
            f"The environment variable {variable} of key_env has characters that API keys do not have."
        )
    return key


def _not_connected(error: requests.RequestException) -> bool:
    """Returns whether there was no connection at all, so that the next request would fail too."""
    return isinstance(
        error, requests.exceptions.SSLError | requests.exceptions.ProxyError
    ) or isinstance(_reason(error), urllib3.exceptions.NewConnectionError)


def _reason(error: Exception) -> Any:
    """Returns the error of urllib3 that caused an error of requests, if known."""
    return getattr(error.args[0] if error.args else None, "reason", None)
