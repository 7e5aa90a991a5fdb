"""Judges by name: checkpoint:DIR, openai:URL,model=NAME and logprob:DIR, each with its settings."""

import dataclasses
import inspect
from collections.abc import Mapping
from typing import Any

from launch.config import setting_flags
from launch.evaluation.judges.base import Judge, JudgeError
from launch.evaluation.judges.checkpoint import CheckpointWriter
from launch.evaluation.judges.endpoint import EndpointWriter
from launch.evaluation.judges.pairwise import PairwiseJudge
from launch.evaluation.judges.reward import LogProb, RewardJudge
from launch.evaluation.judges.template import Template
from launch.run import load_run

# Kind -> (placeholder of its target, classes whose arguments are its settings).
_KINDS: Mapping[str, tuple[str, tuple[type, ...]]] = {
    "checkpoint": ("DIR", (CheckpointWriter,)),
    "openai": ("URL", (EndpointWriter,)),
    "logprob": ("DIR", (LogProb, RewardJudge)),
}
_NO_SETTINGS = ("config", "settings", "checkpoint", "url", "reward")


def settings_of(kind: str) -> dict[str, setting_flags.Setting]:
    """Returns the settings of a kind of judge by name."""
    result: dict[str, setting_flags.Setting] = {}
    for part in _KINDS[kind][1]:
        names = [name for name in inspect.signature(part).parameters if name not in _NO_SETTINGS]
        result |= setting_flags.settings_of(part, names)
    return result


def usage(kind: str) -> str:
    """Returns the syntax of a kind for --judge, with defaults of its settings; a setting without one is in capitals."""
    text, optional = f"{kind}:{_KINDS[kind][0]}", []
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


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """The parsed value of --judge: the kind of judge, its directory or URL, and its settings by name."""

    kind: str
    target: str
    settings: Mapping[str, Any]

    @property
    def checkpoint(self) -> str | None:
        """The judge's checkpoint; None for a judge without one."""
        return None if self.kind == "openai" else self.target


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
    if kind == "openai" and not settings.get("model"):
        raise JudgeError(f"--judge needs model=NAME: {usage(kind)}")
    if settings.get("params", "auto") not in load_run.PARAMS:
        raise JudgeError(
            f"--judge: params={settings['params']} must be one of {', '.join(load_run.PARAMS)}."
        )
    return Spec(kind=kind, target=target, settings=settings)


def build(
    spec: Spec, *, attempts: int | None, allow_ties: bool, config: Any = None, config_text: str = ""
) -> Judge:
    """Returns the judge of a spec.

    Args:
      spec: parsed value of --judge.
      attempts: number of times to ask a question before its reply counts as not understood; None for 3.
      allow_ties: whether a judge that compares may call answers equally good.
      config: a load_run.RunConfig, for a judge with a checkpoint.
      config_text: the whole configuration of `config`, as text.

    Raises:
      JudgeError: a value out of range.
      FileNotFoundError, DamagedCheckpointError: there is no undamaged checkpoint.
    """
    if attempts is not None and attempts < 1:
        raise JudgeError(f"--attempts={attempts} must be at least 1.")
    if attempts is not None and spec.kind == "logprob":
        raise JudgeError("--attempts is for judges that reply, which logprob does not: remove it.")
    if allow_ties and spec.kind == "logprob":
        raise JudgeError("--allow_ties is for judges that compare: give margin=X with logprob.")
    settings = dict(spec.settings)
    writer: Any
    if spec.kind == "openai":
        writer = EndpointWriter(spec.target, **settings)
    elif spec.kind == "checkpoint":
        writer = CheckpointWriter(config, settings=config_text, checkpoint=spec.target, **settings)
    else:
        margin = settings.pop("margin", 0.0)
        reward = LogProb(config, settings=config_text, checkpoint=spec.target, **settings)
        return RewardJudge(reward, margin=margin)
    return PairwiseJudge(writer, wording=Template(allow_ties=allow_ties), attempts=attempts or 3)
