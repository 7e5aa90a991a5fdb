"""An OpenAI-compatible chat-completions endpoint as the writer of a judge's replies."""

from collections.abc import Iterator, Sequence
from typing import Any

from espalier.launch.evaluate.judges.base import JudgeError
from espalier.launch.inference.chat_endpoint import (
    ChatEndpoint,
    EndpointError,
    Silence,
    api_key,
    check_numbers,
)


class EndpointWriter:
    """Asks over HTTP, several requests at a time; see launch/evaluate/judges/pairwise.py.

    Args:
      url: URL of the API, such as https://host/v1.
      model: name of a model of the endpoint.
      key_env: environment variable that holds the API key; None to send none.
      max_tokens: maximum tokens of a reply; None for the endpoint's default.
      temperature: temperature of the first attempt; None for the endpoint's default in all attempts.
      timeout: seconds of a request, from connecting to the last byte of its reply.
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
        try:
            check_numbers("--judge", max_tokens=(max_tokens, 1), temperature=(temperature, 0))
            self._endpoint = ChatEndpoint(
                url,
                model=model,
                key=api_key(key_env),
                timeout=timeout,
                retries=retries,
                concurrency=concurrency,
                owner="--judge",
            )
        except EndpointError as error:
            raise JudgeError(str(error)) from None
        self._max_tokens = max_tokens
        self._temperature = temperature
        self.name = self._endpoint.name
        self.identity = {
            "kind": "openai",
            "url": self._endpoint.url,
            "model": model,
            "max_tokens": max_tokens,
            "temperature": temperature,
        }

    def write(
        self, prompts: Sequence[str], *, temperature: float, seed: int
    ) -> Iterator[tuple[int, str | Silence]]:
        bodies = [self._body(prompt, temperature, seed) for prompt in prompts]
        try:
            for i, reply in self._endpoint.ask_each(bodies):
                yield i, reply if isinstance(reply, Silence) else reply.text
        except EndpointError as error:
            raise JudgeError(str(error)) from None

    def _body(self, prompt: str, temperature: float, seed: int) -> dict[str, Any]:
        body: dict[str, Any] = {"messages": [{"role": "user", "content": prompt}], "seed": seed}
        if self._temperature is not None:
            body["temperature"] = self._temperature + temperature
        if self._max_tokens is not None:
            body["max_tokens"] = self._max_tokens
        return body
