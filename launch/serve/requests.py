"""Reads the bodies of requests: JSON of the OpenAI API, as completions to make.

Every parameter of the API is either used, without effect on the text, or refused unless its value changes nothing. An
unknown parameter is an error with the nearest name. Limits say what one request, and all requests together, may cost.
"""

import dataclasses
import json
import secrets
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.common import spelling
from espalier.trainers.decoding.settings import Draw

# Characters of a text for each token that a prompt may have: a longer text is not encoded.
CHARACTERS_OF_TOKEN = 32
# Parameters that change no text.
_ABOUT = ("user", "metadata", "store", "service_tier", "stream_options", "safety_identifier")
_ABOUT += ("prompt_cache_key", "parallel_tool_calls", "model")
_COMMON = ("max_tokens", "temperature", "top_p", "n", "seed", "stop", "stream", "logprobs")
# Parameters that the model's decoding lacks -> values that mean that they are not used.
_UNUSED: Mapping[str, tuple[Any, ...]] = {
    "frequency_penalty": (0, None),
    "presence_penalty": (0, None),
    "logit_bias": ({}, None),
    "top_logprobs": (0, None),
    "tools": ([], None),
    "tool_choice": ("none", None),
    "functions": ([], None),
    "response_format": ({"type": "text"}, None),
    "modalities": (["text"], None),
    "best_of": (1, None),
    "echo": (False, None),
    "suffix": ("", None),
}
_CHAT, _TEXT = ("messages", "max_completion_tokens"), ("prompt",)
_MAX_STOPS, _MAX_STOP_CHARACTERS = 16, 256
_DEFAULT_TOKENS = 16  # of a completion of a text, as in the API
_MAX_MESSAGES = 1024
# Types of errors by their status.
_KINDS = {400: "invalid_request_error", 401: "authentication_error", 429: "rate_limit_error"}
_ROLES = ("system", "developer", "user", "assistant", "tool")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Limits:
    """Limits of a server.

    Attributes:
      max_tokens: maximum new tokens of a completion.
      max_prompt_tokens: maximum tokens of a prompt.
      max_completions: maximum completions of a request: its prompts times n.
      max_body_bytes: maximum size of a request.
      max_queue: maximum completions that wait; further requests get the status 429.
      timeout: seconds from a request's arrival to its last token; later it is ended with the status 504.
      batch_size: completions that are generated at a time.
    """

    max_tokens: int = 1024
    max_prompt_tokens: int = 8192
    max_completions: int = 64
    max_body_bytes: int = 4_000_000
    max_queue: int = 256
    timeout: float = 600.0
    batch_size: int = 8

    def __post_init__(self):
        for field in dataclasses.fields(self):
            value, least = getattr(self, field.name), 1 if type(field.default) is int else 0.001
            if not least <= value < float("inf"):
                raise ValueError(f"--{field.name}={value} must be at least {least}, and finite.")
        if self.max_completions > self.max_queue:
            raise ValueError(
                f"--max_completions={self.max_completions} would never fit into --max_queue={self.max_queue}: raise it."
            )


class RequestError(ValueError):
    """A request that cannot be served.

    Attributes:
      param: the parameter at fault, or None.
      code: a word for programs, or None.
      status: HTTP status.
    """

    def __init__(
        self, message: str, *, param: str | None = None, code: str | None = None, status: int = 400
    ):
        super().__init__(message)
        self.param, self.code, self.status = param, code, status

    @property
    def body(self) -> dict[str, Any]:
        """The body of the reply."""
        kind = "server_error" if self.status >= 500 else _KINDS.get(self.status, _KINDS[400])
        return {
            "error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}
        }


@dataclasses.dataclass(frozen=True, kw_only=True)
class Asked:
    """A request.

    Attributes:
      rows: the prompts, as rows of `espalier generate`.
      max_tokens: maximum new tokens; None for the most that the server allows.
      samples: completions of each prompt.
      stream: whether text is sent as soon as it is final.
      usage: whether a stream ends with the number of tokens.
      log_probs: whether to send the log-probabilities of the tokens.
    """

    rows: Sequence[Mapping[str, Any]]
    chat: bool
    max_tokens: int | None
    samples: int
    temperature: float
    top_p: float
    seed: int
    stops: Sequence[str]
    stream: bool
    usage: bool
    log_probs: bool

    def draw(self, index: int, sample: int) -> Draw:
        """Returns the draw of a prompt's sample, as `espalier generate` makes it for a row and --num_samples."""
        settings = {"temperature": self.temperature, "top_p": self.top_p}
        return Draw(seed=self.seed, index=index, sample=sample, **settings)


def read(body: bytes, *, chat: bool, model: str, limits: Limits) -> Asked:
    """Returns the request in a body.

    Args:
      chat: whether it is a request for an answer to messages, else for the continuation of texts.
      model: name of the served model.

    Raises:
      RequestError: malformed JSON, or a parameter that is unknown, not supported or out of range.
    """
    row = _parsed(body)
    _check_names(row, chat=chat)
    if row.get("model") != model:
        raise RequestError(
            f"The model {_shown(row.get('model'))} is not served here; 'model' must be {model!r}.",
            param="model",
            code="model_not_found",
            status=404,
        )
    samples = _integer(row, "n", 1, most=limits.max_completions)
    rows = [{"messages": _messages(row)}] if chat else _prompts(row)
    if len(rows) * samples > limits.max_completions:
        raise RequestError(
            f"{len(rows)} prompts times n = {samples} are more than {limits.max_completions} completions.",
            param="n",
        )
    tokens = _max_tokens(row, chat=chat, most=limits.max_tokens)
    seed = _integer(row, "seed", None, least=-(2**63), most=2**63 - 1)
    temperature = _number(row, "temperature", 1.0, least=0.0, most=100.0)
    top_p = _number(row, "top_p", 1.0, least=1e-6, most=1.0)
    if temperature == 0 and top_p < 1:
        raise RequestError(
            "'top_p' has no effect with 'temperature': 0, which chooses the most probable token: remove one of them.",
            param="top_p",
        )
    return Asked(
        rows=rows,
        chat=chat,
        max_tokens=tokens,
        samples=1 if samples is None else samples,
        temperature=temperature,
        top_p=top_p,
        seed=secrets.randbits(32) if seed is None else seed % 2**32,
        stops=_stops(row),
        stream=_truth(row, "stream"),
        usage=_sends_usage(row),
        log_probs=_log_probs(row, chat=chat),
    )


def _parsed(body: bytes) -> dict[str, Any]:
    try:
        row = json.loads(body)
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise RequestError(
            "The body is not valid Unicode: it has half of a surrogate pair."
        ) from None
    except (ValueError, RecursionError) as error:
        raise RequestError(f"The body is not JSON: {_shown(str(error))}.") from None
    if not isinstance(row, dict):
        raise RequestError("The body is not a JSON object.")
    return row


def _check_names(row: Mapping[str, Any], *, chat: bool) -> None:
    own = _CHAT if chat else _TEXT
    known = (*_ABOUT, *_COMMON, *_UNUSED, *own)
    for name, value in row.items():
        if name not in known:
            raise RequestError(
                f"The parameter {_shown(name)} is unknown; {spelling.nearest(name[:100], known)}",
                param=name[:100],
            )
        if name in _UNUSED and value not in _UNUSED[name]:
            raise RequestError(
                f"'{name}' is not supported: this server draws with temperature and top_p, and returns texts. Remove it.",
                param=name,
                code="unsupported_parameter",
            )
    if own[0] not in row:
        raise RequestError(f"'{own[0]}' is missing.", param=own[0])


def _messages(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    messages = row["messages"]
    if not isinstance(messages, list) or not messages:
        raise RequestError("'messages' must be a list of messages.", param="messages")
    if len(messages) > _MAX_MESSAGES:
        raise RequestError(
            f"'messages' has {len(messages)} messages; {_MAX_MESSAGES} are the most.",
            param="messages",
        )
    return [_message(message, i) for i, message in enumerate(messages)]


def _message(message: Any, i: int) -> dict[str, Any]:
    where = f"messages[{i}]"
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise RequestError(f"'{where}' must be an object with a 'role'.", param="messages")
    if message["role"] not in _ROLES:
        raise RequestError(
            f"'{where}.role' is {_shown(message['role'])}; it must be one of {', '.join(_ROLES)}.",
            param="messages",
        )
    for name, value in message.items():
        if name not in ("role", "content") and value not in (None, []):
            raise RequestError(
                f"'{where}' has {_shown(name)}, which this server does not give to the model: remove it.",
                param="messages",
                code="unsupported_parameter",
            )
    content = message.get("content")
    if isinstance(content, list):
        content = "".join(_part(part, where) for part in content)
    if not isinstance(content, str):
        raise RequestError(f"'{where}.content' must be a text.", param="messages")
    return {"role": message["role"], "content": content}


def _part(part: Any, where: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return part["text"]
    raise RequestError(
        f"'{where}.content' has a part that is not a text: this server reads only texts.",
        param="messages",
    )


def _prompts(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    prompt = row["prompt"]
    several = isinstance(prompt, list) and bool(prompt) and type(prompt[0]) is not int
    rows = []
    for each in prompt if several else [prompt]:
        if isinstance(each, str):
            rows.append({"text": each})
        elif isinstance(each, list) and all(type(id) is int for id in each):
            rows.append({"tokens": each})
        else:
            raise RequestError(
                "'prompt' must be a text, a list of token ids, or a list of one of these.",
                param="prompt",
            )
    return rows


def _max_tokens(row: Mapping[str, Any], *, chat: bool, most: int) -> int | None:
    if not chat:
        return _integer(row, "max_tokens", min(_DEFAULT_TOKENS, most), most=most)
    old, new = (_integer(row, name, None, most=most) for name in ("max_tokens", _CHAT[1]))
    if None not in (old, new) and old != new:
        raise RequestError(
            f"'max_tokens' is {old} and '{_CHAT[1]}' is {new}: remove the former, which is its older name.",
            param="max_tokens",
        )
    return old if new is None else new


def _stops(row: Mapping[str, Any]) -> tuple[str, ...]:
    stop = row.get("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(s, str) and s for s in stops):
        raise RequestError("'stop' must be a text, or a list of texts.", param="stop")
    if len(stops) > _MAX_STOPS or any(len(s) > _MAX_STOP_CHARACTERS for s in stops):
        raise RequestError(
            f"'stop' may have {_MAX_STOPS} texts of {_MAX_STOP_CHARACTERS} characters.",
            param="stop",
        )
    return tuple(stops)


def _log_probs(row: Mapping[str, Any], *, chat: bool) -> bool:
    value = row.get("logprobs")
    if chat:
        return _truth(row, "logprobs")
    if value is None:
        return False
    if type(value) is int and value == 0:
        return True
    raise RequestError(
        "'logprobs' must be 0: the log-probabilities of the chosen tokens, without alternatives.",
        param="logprobs",
        code="unsupported_parameter",
    )


def _sends_usage(row: Mapping[str, Any]) -> bool:
    options, param = row.get("stream_options"), "stream_options"
    if options is None:
        return False
    if not isinstance(options, dict):
        raise RequestError("'stream_options' must be an object.", param=param)
    if not _truth(row, "stream"):
        raise RequestError("'stream_options' has no effect without 'stream': true.", param=param)
    if any(value and name != "include_usage" for name, value in options.items()):
        raise RequestError("'stream_options' may have 'include_usage' alone.", param=param)
    return _truth(options, "include_usage")


def _integer(
    row: Mapping[str, Any], name: str, default: int | None, *, least: int = 1, most: int
) -> Any:
    value = row.get(name)
    if value is None:
        return default
    if type(value) is not int or not least <= value <= most:
        raise RequestError(
            f"'{name}' is {_shown(value)}; it must be a whole number from {least} to {most}.",
            param=name,
        )
    return value


def _number(
    row: Mapping[str, Any], name: str, default: float, *, least: float, most: float
) -> float:
    value = row.get(name)
    if value is None:
        return default
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if not number or not least <= value <= most:  # NaN is not within
        raise RequestError(
            f"'{name}' is {_shown(value)}; it must be a number from {least:g} to {most:g}.",
            param=name,
        )
    return float(value)


def _truth(row: Mapping[str, Any], name: str) -> bool:
    value = row.get(name)
    if value is not None and not isinstance(value, bool):
        raise RequestError(f"'{name}' must be true or false.", param=name)
    return bool(value)


def _shown(value: Any) -> str:
    """Returns a value for a message, which it must not fill."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
