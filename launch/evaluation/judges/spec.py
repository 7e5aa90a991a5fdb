"""Judges by name: checkpoint:DIR, openai:URL,model=NAME and logprob:DIR, each with its settings."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from launch.evaluation.judges.base import Judge, JudgeError
from launch.evaluation.judges.template import Template

_KINDS = {
    "checkpoint": "checkpoint:DIR[,params=auto,max_tokens=128,batch_size=8]",
    "openai": "openai:URL,model=NAME[,key_env=VARIABLE,max_tokens=512,temperature=0,timeout=120,"
    "retries=6,concurrency=8]",
    "logprob": "logprob:DIR[,params=auto,batch_size=8,margin=0]",
}
HELP = "\n".join(_KINDS.values())


def _or_none(kind: Callable[[str], Any]) -> Callable[[str], Any]:
    return lambda text: None if text == "none" else kind(text)


_SETTINGS: Mapping[str, Mapping[str, Callable[[str], Any]]] = {
    "checkpoint": {"params": str, "max_tokens": int, "batch_size": int},
    "openai": {
        "model": str,
        "key_env": str,
        "max_tokens": _or_none(int),
        "temperature": _or_none(float),
        "timeout": float,
        "retries": int,
        "concurrency": int,
    },
    "logprob": {"params": str, "batch_size": int, "margin": float},
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Spec:
    """A judge as --judge names it.

    Attributes:
      kind: of judge.
      target: a directory or a URL.
      settings: by name.
    """

    kind: str
    target: str
    settings: Mapping[str, Any]

    @property
    def checkpoint(self) -> str | None:
        """The checkpoint that judges; None where none does."""
        return None if self.kind == "openai" else self.target


def parse(text: str) -> Spec:
    """A judge from the text of --judge.

    Raises:
      JudgeError: it names no judge, or a setting that its kind has not.
    """
    kind, _, rest = text.partition(":")
    target, *pairs = rest.split(",")
    if kind not in _KINDS or not target:
        raise JudgeError(f"--judge={text} names no judge: expected one of\n{HELP}")
    settings: dict[str, Any] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or name not in _SETTINGS[kind]:
            raise JudgeError(f"--judge: {pair!r} is no setting of this judge: {_KINDS[kind]}")
        if name in settings:
            raise JudgeError(f"--judge: {name} is given twice.")
        try:
            settings[name] = _SETTINGS[kind][name](value)
        except ValueError:
            raise JudgeError(f"--judge: {pair!r} is not a number: {_KINDS[kind]}") from None
    if kind == "openai" and not settings.get("model"):
        raise JudgeError(f"--judge names no model of the endpoint: {_KINDS[kind]}")
    if settings.get("params", "auto") not in ("auto", "raw", "ema"):
        raise JudgeError(f"--judge: params={settings['params']} is none of auto, raw, ema.")
    return Spec(kind=kind, target=target, settings=settings)


def build(
    spec: Spec, *, attempts: int, allow_ties: bool, config: Any = None, config_text: str = ""
) -> Judge:
    """The judge of a spec.

    Args:
      spec: which one.
      attempts: times that a question is asked before its reply counts as not understood.
      allow_ties: whether a judge that compares may call answers equally good.
      config: a load_run.RunConfig where a checkpoint judges.
      config_text: the whole configuration that it is from.

    Raises:
      JudgeError: a value out of range.
      FileNotFoundError, DamagedCheckpointError: there is no good checkpoint.
    """
    if attempts < 1:
        raise JudgeError(f"--attempts={attempts} must be at least 1.")
    if allow_ties and spec.kind == "logprob":
        raise JudgeError("--allow_ties is of judges that compare: give margin=X to logprob.")
    # Weights take long to import and endpoints need none.
    from launch.evaluation.judges.pairwise import PairwiseJudge

    settings = dict(spec.settings)
    if spec.kind == "openai":
        from launch.evaluation.judges.endpoint import EndpointWriter

        if "timeout" in settings:
            settings["timeout_s"] = settings.pop("timeout")
        writer: Any = EndpointWriter(spec.target, **settings)
    else:
        of_run: dict[str, Any] = {"settings": config_text, "checkpoint": spec.target}
        if spec.kind == "logprob":
            from launch.evaluation.judges.log_prob import LogProb
            from launch.evaluation.judges.reward import RewardJudge

            margin = settings.pop("margin", 0.0)
            return RewardJudge(LogProb(config, **of_run, **settings), margin=margin)
        from launch.evaluation.judges.checkpoint import CheckpointWriter

        writer = CheckpointWriter(config, **of_run, **settings)
    return PairwiseJudge(writer, wording=Template(allow_ties=allow_ties), attempts=attempts)
