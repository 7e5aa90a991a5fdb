"""Flags of commands that reward texts, and the rewards.

exact_answer      1 if the text is the row's answer, else 0: --answer_key, --answer_pattern
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
      answer_pattern: regular expression; the answer is its last match in a text, or the first group of this match.
        Without it the whole text is the answer.
      reward_batch_size: texts at a time.
      missing_end_penalty: subtracted from the reward of a text that was cut at the maximum length.
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
      LoadError, FileNotFoundError: see load_run.files_of.
    """
    return load_run.files_of(_checkpoint(flags.reward), flags.gin_file)


@contextlib.contextmanager
def opened(start: Any) -> Iterator[RowReward]:
    """Yields the reward of the flags.

    Raises:
      LoadError, DamagedCheckpointError, CheckpointMismatchError: the checkpoint cannot be restored.
    """
    settings = RewardSettings(**setting_flags.given(start.flags, RewardSettings))
    checkpoint = _checkpoint(settings.reward)
    with contextlib.ExitStack() as stack:
        if checkpoint is None:
            reward = _of_verifier(settings)
        else:
            run = stack.enter_context(start().load(checkpoint, rewards=True))
            reward = _of_model(run, settings.reward_batch_size)

        def penalised(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[float]:
            values = zip(reward(rows), rows, strict=True)
            penalty = settings.missing_end_penalty
            return [value - penalty * (row.get("ended") == "length") for value, (_, row) in values]

        yield penalised


def _checkpoint(text: str) -> str | None:
    if text.startswith(_CHECKPOINT) and text != _CHECKPOINT:
        return text.removeprefix(_CHECKPOINT)
    if text in VERIFIERS:
        return None
    raise RewardError(f"--reward={text} must be {', '.join(VERIFIERS)} or {_CHECKPOINT}DIR.")


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
