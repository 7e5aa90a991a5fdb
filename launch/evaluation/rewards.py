"""Flags of commands that reward texts, and the rewards they name.

exact_answer      1 where the text is the row's answer: --answer_key, --answer_pattern
reasoning_gym     the package's score of an answer to its problem: --answer_pattern
checkpoint:DIR    a reward model, trained with methods/preference/reward_model.gin
"""

import argparse
import contextlib
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from launch.config import setting_flags
from launch.run import load_run

OWN_CONFIG = "t5x_configs/runs/load_run.gin"
VERIFIERS = ("exact_answer", "reasoning_gym")
_CHECKPOINT = "checkpoint:"

# (place, row) pairs of launch.generate -> one reward per row.
RowReward = Callable[[Sequence[tuple[str, Mapping[str, Any]]]], Sequence[float]]


class RewardError(ValueError):
    """An unknown reward, or rows that it cannot judge."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardSettings:
    """How texts are rewarded.

    Attributes:
      reward: exact_answer, reasoning_gym or checkpoint:DIR, see below.
      answer_key: key of the row's right answer.
      answer_pattern: regular expression; its last match in a text, or the first group of it, is the answer. Without it
        all of the text is.
      reward_batch_size: texts at a time.
      missing_end_penalty: is taken off the reward of a text that was cut at the longest length.
    """

    reward: str
    answer_key: str = "answer"
    answer_pattern: str | None = None
    reward_batch_size: int = 8
    missing_end_penalty: float = 0.0


def add_flags(parser: argparse.ArgumentParser) -> None:
    """Adds the flags."""
    setting_flags.add(parser.add_argument_group("reward"), RewardSettings)


def default_files(flags: argparse.Namespace) -> Sequence[str]:
    """Returns the gin files read before the user's: the configuration of the reward model, if --reward is one.

    Raises:
      RewardError: --reward is not a reward.
      LoadError, FileNotFoundError: see load_run.default_files.
    """
    checkpoint = _checkpoint(flags.reward)
    if checkpoint is None:
        return [OWN_CONFIG]
    of_run = argparse.Namespace(checkpoint=checkpoint, gin_file=flags.gin_file)
    return load_run.default_files(of_run, own=OWN_CONFIG)


@contextlib.contextmanager
def opened(start: Any) -> Iterator[RowReward]:
    """Yields the reward that the flags name.

    Raises:
      LoadError, DamagedCheckpointError, CheckpointMismatchError: the checkpoint cannot be restored.
    """
    settings = RewardSettings(**setting_flags.given(start.flags, RewardSettings))
    checkpoint = _checkpoint(settings.reward)
    if checkpoint is None:
        yield _penalised(_of_verifier(settings), settings.missing_end_penalty)
        return
    with start().load(checkpoint, rewards=True) as run:
        yield _penalised(_of_model(run, settings.reward_batch_size), settings.missing_end_penalty)


def _checkpoint(text: str) -> str | None:
    if text.startswith(_CHECKPOINT) and text != _CHECKPOINT:
        return text.removeprefix(_CHECKPOINT)
    if text in VERIFIERS:
        return None
    raise RewardError(f"--reward={text} is none of {', '.join(VERIFIERS)}, {_CHECKPOINT}DIR.")


def _of_verifier(settings: RewardSettings) -> RowReward:
    from trainers.rewards import verifiers

    options: dict[str, Any] = {"pattern": settings.answer_pattern}
    if settings.reward == "exact_answer":
        options["key"] = settings.answer_key
    verifier = getattr(verifiers, settings.reward)

    def reward(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[float]:
        values = []
        for where, row in rows:
            if "text" not in row:
                raise RewardError(f"{where}: no 'text', which --reward={settings.reward} reads.")
            try:
                values.append(verifier(row["text"], row, **options))
            except verifiers.VerifierError as error:
                raise RewardError(f"{where}: {error}") from None
        return values

    return reward


def _of_model(run: Any, batch_size: int) -> RowReward:
    from trainers.rewards.base import Completion
    from trainers.rewards.model_reward import ModelReward

    def completion(where: str, row: Mapping[str, Any]) -> Completion:
        prompt = row.get("prompt")
        key = "text" if isinstance(prompt, str) else "messages"
        if isinstance(prompt, list) and all(type(item) is int for item in prompt):
            key = "tokens"
        ended = row.get("ended") == "eos"
        if "text" in row:  # encoded again, because the policy may have another vocabulary
            tokens = run.encode(row["text"], f"{where}: 'text'")
        else:
            tokens = run.encode(row.get("tokens"), f"{where}: 'tokens'")
            tokens = tokens[:-1] if ended else tokens
        context = run.context(run.tokens({key: prompt}, where))
        return Completion(prompt=context, tokens=tokens, ended=ended, info=row)

    def reward(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[float]:
        scorer = ModelReward(
            run.model,
            run.params,
            start_token=None,  # already in the contexts
            end_token=next(iter(run.eos_ids), None),
            batch_size=run.batch_size(batch_size, len(rows)),
            sharding=run.row_sharding,
        )
        return scorer([completion(where, row) for where, row in rows]).tolist()

    return reward


def _penalised(reward: RowReward, penalty: float) -> RowReward:
    def penalised(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[float]:
        pairs = zip(reward(rows), rows, strict=True)
        return [value - penalty * (row.get("ended") == "length") for value, (_, row) in pairs]

    return penalised
