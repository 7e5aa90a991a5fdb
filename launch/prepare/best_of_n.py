"""Keeps the best of several samples of each prompt, and makes pairs of the best and the worst.

Sampling is espalier generate's, with all of its options; this reads the file that it writes:

  espalier generate --checkpoint=RUN --inputs=prompts.jsonl --output=samples.jsonl \\
    --num_samples=8 --temperature=0.9
  espalier prepare best_of_n --inputs=samples.jsonl --reward=exact_answer --output=best.jsonl \\
    --pairs=pairs.jsonl

Samples that were cut at the maximum length are not used, because training would end them with EOS as if they
were whole; --keep_cut uses them. --output gets the best row of each prompt (the first of equals) with its
"reward", all "rewards" in the order of the samples that are used, and "best_of", their number n. The divergence
of best-of-n from the policy (without --keep_cut, from its samples that end) is at most log n - (n - 1) / n nats
(arXiv 2401.01879), which is printed.

--pairs gets {"prompt", "chosen", "rejected"} with both rewards for each prompt whose best and worst sample
differ in reward and text: data for preference learning. A round, from the sampled policy:

  espalier train --gin_file=RUN/config.gin --gin_file=t5x_configs/data/preferences.gin \\
    --gin_file=t5x_configs/runs/preference.gin --gin.INITIAL_CHECKPOINT_PATH=RUN --gin.MODEL_DIR=RUN_1 \\
    --gin.PAIRS=pairs.jsonl --gin.TOKENIZER=RUN --gin.TRAIN_STEPS=200

The next round samples RUN_1, ranks, and trains RUN_2 from it, and so on.

rewards:
  exact_answer      1 if the text is the row's answer, else 0: --answer_key, --answer_pattern
  reasoning_gym     the package's score of an answer to its problem: --answer_pattern
  checkpoint:DIR    a reward model, trained with t5x_configs/methods/preference/reward_model.gin
"""

import argparse
import dataclasses
import itertools
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.common.end_tokens import read_ends
from espalier.common.ranges import NonNegative
from espalier.launch import cli
from espalier.launch.config import setting_flags
from espalier.launch.config.setting_flags import File
from espalier.launch.inference import row_files
from espalier.launch.load import load_run

EXAMPLE = '{"prompt": "...", "sample": 0, "text": "..."}'
_OF_SAMPLES = ("sample", "ended", "text", "tokens", "logprobs", "score")

VERIFIERS = ("exact_answer", "reasoning_gym")
_CHECKPOINT = "checkpoint:"

Row = Mapping[str, Any]
Placed = Sequence[tuple[str, Row]]  # rows with their places, for errors


class RewardError(ValueError):
    """An unknown reward, or rows that cannot be rewarded or ranked."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class RewardFlags:
    """How texts are rewarded.

    Attributes:
      reward: exact_answer, reasoning_gym or checkpoint:DIR, see below.
      answer_key: key of the row's right answer.
      answer_pattern: regular expression; the answer is its last match in a text, or the first group of this match.
        Without it the whole text is the answer.
      reward_batch_size: number of texts in a batch of the reward model.
      missing_end_penalty: subtracted from the reward of a text that was cut at the maximum length, with --keep_cut.

    Raises:
      RewardError: a setting that this reward does not read.
    """

    reward: str
    answer_key: str = "answer"
    answer_pattern: str | None = None
    reward_batch_size: int = 8
    missing_end_penalty: NonNegative = 0.0

    def __post_init__(self):
        read = {
            "answer_key": self.reward == "exact_answer",
            "answer_pattern": self.reward in VERIFIERS,
            "reward_batch_size": self.reward.startswith(_CHECKPOINT),
        }
        for field in dataclasses.fields(self):
            if not read.get(field.name, True) and getattr(self, field.name) != field.default:
                raise RewardError(
                    f"--{field.name} is not read by --reward={self.reward}: remove it."
                )


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleFlags:
    """The samples, and the files of the best ones.

    Attributes:
      inputs: read the rows that espalier generate wrote to this file.
      output: write the best row of each prompt to this file.
      pairs: write the best and the worst row of each prompt to this file, as pairs.
      keep_cut: also use samples that were cut at the maximum length; training ends them with EOS as if they were whole.
    """

    inputs: File
    output: File | None = None
    pairs: File | None = None
    keep_cut: bool = False


def _add_flags(parser: argparse.ArgumentParser) -> None:
    setting_flags.add(parser.add_argument_group("samples"), SampleFlags)
    setting_flags.add(parser.add_argument_group("reward"), RewardFlags)


def _run(start: cli.Start) -> None:
    """Ranks samples with the settings of the flags.

    Raises:
      RewardError: no output is set, a penalty that has no effect, or rows that cannot be ranked.
    """
    flags = setting_flags.filled(start.flags, SampleFlags)
    if flags.output is None and flags.pairs is None:
        raise RewardError("No output is set: give --output, --pairs or both.")
    taken = {"inputs": flags.inputs}
    for flag, path in (("output", flags.output), ("pairs", flags.pairs)):
        if path:
            row_files.check_output(path, flag, compressed=True, others=taken)
            taken[flag] = path
    rows = row_files.read(flags.inputs, example=EXAMPLE)
    reward = RewardFlags(**setting_flags.given(flags, RewardFlags))
    if reward.missing_end_penalty and not flags.keep_cut:
        raise RewardError(
            "--missing_end_penalty is for samples that were cut: give --keep_cut, or remove it."
        )
    groups, cut = grouped(rows), sum(_is_cut(row) for _, row in rows)
    prompts = len(groups)
    if not flags.keep_cut:
        rows = [(where, row) for where, row in rows if not _is_cut(row)]
        groups = [whole for x in groups if (whole := [row for row in x if not _is_cut(row)])]
    if not rows:
        raise RewardError(
            "All samples in --inputs were cut at the maximum length: give --keep_cut, or sample with a larger --max_new_tokens."
        )
    values = iter(rewards_of(rows, reward, start))
    ranked = [(group, [next(values) for _ in group]) for group in groups]
    if flags.output is not None:
        row_files.write(flags.output, (best(*group) for group in ranked))
    if flags.pairs is not None:
        row_files.write(flags.pairs, filter(None, itertools.starmap(pair, ranked)))
    print(summary([its_rewards for _, its_rewards in ranked]), file=sys.stderr)
    if cut:
        without = f"and {prompts - len(groups):,} prompts without others are not used (--keep_cut uses them)"
        fate = "are used, and training ends them with EOS" if flags.keep_cut else without
        print(f"{cut:,} cut samples {fate}", file=sys.stderr)


def checkpoint_of(reward: str) -> str | None:
    """Returns the checkpoint of a reward model; None for a verifier."""
    if reward.startswith(_CHECKPOINT) and reward != _CHECKPOINT:
        return reward.removeprefix(_CHECKPOINT)
    if reward in VERIFIERS:
        return None
    raise RewardError(f"--reward={reward} must be {', '.join(VERIFIERS)} or {_CHECKPOINT}DIR.")


def rewards_of(
    rows: Placed, flags: RewardFlags, config: Callable[[], load_run.RunConfig]
) -> list[float]:
    """Returns the reward of each row of espalier generate.

    Args:
      rows: (place, row).
      flags: the reward.
      config: returns the configuration of the reward model's run; called only if the reward is a checkpoint.

    Raises:
      RewardError: a row that the reward cannot judge, or of which the reward is not finite.
      LoadError, DamagedCheckpointError, CheckpointMismatchError: the checkpoint cannot be restored.
    """
    if (checkpoint := checkpoint_of(flags.reward)) is None:
        values = [_verified(where, row, flags) for where, row in rows]
    else:
        with config().load(checkpoint, rewards=True, encoder_decoders=True) as run:
            values = _by_model(rows, run, flags.reward_batch_size)
    for (where, _), value in zip(rows, values, strict=True):
        if not math.isfinite(value):
            raise RewardError(
                f"{where}: --reward={flags.reward} gives {value}, which cannot be ranked."
            )
    cut = [_is_cut(row) for _, row in rows]
    return [v - flags.missing_end_penalty * c for v, c in zip(values, cut, strict=True)]


def _is_cut(row: Row) -> bool:
    return row.get("ended") == "length"


def check_answer(where: str, row: Row, flags: RewardFlags) -> None:
    """Raises RewardError unless a row has the right answer, if the reward reads one."""
    if flags.reward == "exact_answer" and flags.answer_key not in row:
        raise RewardError(
            f"{where}: the row has no {flags.answer_key!r}, the right answer for --reward=exact_answer, only "
            f"{', '.join(map(repr, row))}: add it, or name its key with --answer_key."
        )


def _verified(where: str, row: Row, flags: RewardFlags) -> float:
    from espalier.trainers.rewards import verifiers

    if "text" not in row:
        raise RewardError(f"{where}: no 'text', which --reward={flags.reward} reads.")
    check_answer(where, row, flags)
    key = {"key": flags.answer_key} if flags.reward == "exact_answer" else {}
    verifier = getattr(verifiers, flags.reward)
    try:
        return verifier(row["text"], row, pattern=flags.answer_pattern, **key)
    except verifiers.VerifierError as error:
        raise RewardError(f"{where}: {error}") from None


def _by_model(rows: Placed, run: Any, batch_size: int) -> list[float]:
    from espalier.trainers.rewards.base import Completion, finite_rewards
    from espalier.trainers.rewards.model_reward import ModelReward

    def completion(where: str, row: Row) -> Completion:
        prompt = row.get("prompt")
        key = "text" if isinstance(prompt, str) else "messages"
        if isinstance(prompt, list) and all(type(item) is int for item in prompt):
            key = "tokens"
        ended = row.get("ended") in ("eos", "stop")
        if "text" in row:  # encoded again, because the policy may have another vocabulary
            tokens = run.encode(row["text"], f"{where}: 'text'", as_text=True)
        else:
            tokens = run.encode(row.get("tokens"), f"{where}: 'tokens'")
            tokens = tokens[:-1] if row.get("ended") == "eos" else tokens
        if run.encodes:
            context = run.encoder_inputs({key: prompt}, where)
        else:
            context = run.context(run.tokens({key: prompt}, where))
        return Completion(prompt=context, tokens=tokens, ended=ended, info=row)

    scorer = ModelReward(
        run.model,
        run.params,
        # It is in a decoder's contexts already.
        start_token=(run.start_token or 0) if run.encodes else None,
        end_token=next(iter(read_ends(run.vocabulary_or_none)), None),
        batch_size=run.batch_size(batch_size, len(rows)),
        sharding=run.row_sharding,
    )
    completions = [completion(where, row) for where, row in rows]
    return finite_rewards(scorer, completions, macro="--reward").tolist()


def grouped(rows: Placed) -> list[list[Row]]:
    """Returns the samples of each prompt; they must be adjacent and numbered from 0.

    Raises:
      RewardError: samples of a prompt are not adjacent, or not numbered from 0.
    """
    groups: list[list[Row]] = []
    for where, row in rows:
        if row.get("sample") == 0:
            groups.append([])
        if not groups or row.get("sample") != len(groups[-1]) or "prompt" not in row:
            raise RewardError(
                f"{where}: expected the samples of each prompt side by side, numbered from 0, as espalier generate "
                f"writes them: {EXAMPLE}."
            )
        groups[-1].append(row)
    if not groups:
        raise RewardError("There are no samples in --inputs.")
    return groups


def best(group: Sequence[Row], rewards: Sequence[float]) -> dict[str, Any]:
    """Returns the row with the largest reward (the first of equals), with the rewards of the group."""
    i = int(np.argmax(rewards))
    return {**group[i], "reward": rewards[i], "rewards": list(rewards), "best_of": len(group)}


def pair(group: Sequence[Row], rewards: Sequence[float]) -> dict[str, Any] | None:
    """Returns the best and the worst sample as a row of preference data; None if reward or text are equal.

    The row also has the other columns of the prompt's row.

    Raises:
      RewardError: a sample has no text.
    """
    if not all("text" in row for row in group):
        raise RewardError("--pairs needs rows with 'text': sample a run with a VOCABULARY.")
    chosen, rejected = group[int(np.argmax(rewards))], group[int(np.argmin(rewards))]
    if max(rewards) == min(rewards) or chosen["text"] == rejected["text"]:
        return None
    prompt = chosen["prompt"]

    def answer(row: Row) -> Any:
        text = row["text"]
        return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]

    return {
        **{key: value for key, value in chosen.items() if key not in _OF_SAMPLES},
        "chosen": answer(chosen),
        "rejected": answer(rejected),
        "chosen_reward": max(rewards),
        "rejected_reward": min(rewards),
    }


def divergence_bound(n: int) -> float:
    """Upper bound in nats of KL(best-of-n || sampled policy) (arXiv 2401.01879, theorem 1)."""
    return math.log(n) - (n - 1) / n


def summary(rewards: Sequence[Sequence[float]]) -> str:
    """Returns one line on the rewards of all prompts and samples."""
    sizes = sorted({len(group) for group in rewards})
    mean = np.mean([np.mean(group) for group in rewards])
    chosen = np.mean([max(group) for group in rewards])
    ties = sum(max(group) == min(group) for group in rewards)
    bounds = ", ".join(f"best of {n} {divergence_bound(n):.3f} nats at most" for n in sizes)
    return (
        f"{len(rewards):,} prompts: mean reward {mean:.4g}, of the best {chosen:.4g}; {ties:,} prompts with equal "
        f"rewards; divergence: {bounds}"
    )


main = load_run.command(
    __doc__,
    "prepare best_of_n",
    _run,
    _add_flags,
    files=lambda flags: load_run.files_of(checkpoint_of(flags.reward), flags.gin_file),
    without_model=True,
)

if __name__ == "__main__":
    raise SystemExit(main())
