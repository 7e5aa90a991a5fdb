"""Judges by name: checkpoint:DIR, openai:URL,model=NAME and logprob:DIR, each with its settings."""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

from espalier.launch.config import setting_flags
from espalier.launch.evaluate.judges.asking import Judge, JudgeError
from espalier.launch.evaluate.judges.checkpoint import CheckpointWriter, LogProb, RewardJudge
from espalier.launch.evaluate.judges.pairwise import PairwiseJudge, Template
from espalier.launch.inference.chat_endpoint import (
    ChatEndpoint,
    EndpointError,
    Silence,
    api_key,
    check_numbers,
)
from espalier.launch.load import load_run

_NO_SETTINGS = ("config", "settings", "checkpoint", "url", "reward")


class EndpointWriter:
    """An OpenAI-compatible endpoint that writes replies, see launch/evaluate/judges/pairwise.py: several at a time.

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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """The parsed value of --judge: a kind of judge, its directory or URL, and its settings by name.

    `placeholder` is what a help text shows for the target, and `parts` are the classes whose arguments are settings.
    """

    placeholder: ClassVar[str] = "DIR"
    parts: ClassVar[tuple[type, ...]] = ()

    target: str
    settings: Mapping[str, Any]

    @property
    def checkpoint(self) -> str | None:
        """The judge's checkpoint; None for a judge without one."""
        return self.target

    def writer(self, **run: Any) -> Any:
        """Returns what writes the replies of a judge that compares; `run` is its RunConfig and the configuration's text."""
        raise NotImplementedError

    def judge(self, *, attempts: int | None, wording: Template, **run: Any) -> Judge:
        """Returns the judge; `build` describes the arguments and errors."""
        return PairwiseJudge(self.writer(**run), wording=wording, attempts=attempts or 3)


class _Checkpoint(Spec):
    parts = (CheckpointWriter,)

    def writer(self, **run):
        return CheckpointWriter(**run, checkpoint=self.target, **self.settings)


class _Endpoint(Spec):
    placeholder, parts = "URL", (EndpointWriter,)
    checkpoint = None

    def writer(self, **run):
        return EndpointWriter(self.target, **self.settings)


class _LogProb(Spec):
    parts = (LogProb, RewardJudge)

    def judge(self, *, attempts, wording, **run):
        if attempts is not None:
            what = "--attempts is for judges that reply"
            raise JudgeError(f"{what}, which logprob does not: remove it.")
        if wording.allow_ties:
            raise JudgeError("--allow_ties is for judges that compare: give margin=X with logprob.")
        settings = dict(self.settings)
        margin = settings.pop("margin", 0.0)
        reward = LogProb(**run, checkpoint=self.target, **settings)
        return RewardJudge(reward, margin=margin)


_KINDS = dict[str, type[Spec]](checkpoint=_Checkpoint, openai=_Endpoint, logprob=_LogProb)


def settings_of(kind: str) -> dict[str, setting_flags.Setting]:
    """Returns the settings of a kind of judge by name."""
    result: dict[str, setting_flags.Setting] = {}
    for part in _KINDS[kind].parts:
        names = [name for name in inspect.signature(part).parameters if name not in _NO_SETTINGS]
        result |= setting_flags.settings_of(part, names)
    return result


def usage(kind: str) -> str:
    """Returns the syntax of a kind for --judge, with defaults of its settings; a setting without one is in capitals."""
    text, optional = f"{kind}:{_KINDS[kind].placeholder}", []
    for name, setting in settings_of(kind).items():
        if setting.default is setting_flags.REQUIRED:
            text += f",{name}=NAME"
        elif setting.default is None:
            optional.append(f"{name}={name.upper()}")
        else:
            shown = f"{setting.default:g}" if setting.kind is float else setting.default
            optional.append(f"{name}={shown}")
    return f"{text}[,{','.join(optional)}]"


def help_text() -> str:
    """Returns the usage of every kind, a line each."""
    return "\n".join(map(usage, _KINDS))


def parse(text: str) -> Spec:
    """Parses the text of --judge.

    Raises:
      JudgeError: unknown kind of judge, or a setting that its kind does not have.
    """
    kind, _, rest = text.partition(":")
    target, *pairs = rest.split(",")
    if kind not in _KINDS or not target:
        raise JudgeError(f"--judge={text} is not a judge: give one of\n{help_text()}")
    known_settings = settings_of(kind)
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or name not in known_settings:
            raise JudgeError(f"--judge: {pair!r} is not a setting of this judge: {usage(kind)}")
        if name in settings:
            raise JudgeError(f"--judge sets {name} twice: give it once.")
        try:
            is_none = known_settings[name].optional and value == "none"
            settings[name] = None if is_none else known_settings[name].kind(value)
        except ValueError:
            raise JudgeError(f"--judge: {pair!r} is not a number: {usage(kind)}") from None
    for name, setting in known_settings.items():
        if setting.default is setting_flags.REQUIRED and not settings.get(name):
            raise JudgeError(f"--judge needs {name}=NAME: {usage(kind)}")
    if settings.get("params", "auto") not in load_run.PARAMS:
        raise JudgeError(
            f"--judge: params={settings['params']} must be one of {', '.join(load_run.PARAMS)}."
        )
    return _KINDS[kind](target=target, settings=settings)


def build(
    spec: Spec,
    *,
    attempts: int | None,
    wording: Template,
    config: Any = None,
    config_text: str = "",
) -> Judge:
    """Returns the judge of a spec.

    Args:
      spec: parsed value of --judge.
      attempts: number of times to ask a question before its reply counts as not understood; None for 3.
      wording: how a judge that replies is asked, and its replies are read.
      config: a load_run.RunConfig, for a judge with a checkpoint.
      config_text: the whole configuration of `config`, as text.

    Raises:
      JudgeError: a value out of range.
      FileNotFoundError, DamagedCheckpointError: there is no undamaged checkpoint.
    """
    run = {"config": config, "settings": config_text}
    return spec.judge(attempts=attempts, wording=wording, **run)
