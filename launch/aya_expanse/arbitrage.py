"""Makes training data of the answers of a pool of teachers: per prompt, the answer that a reward likes best (arbitrage).

Example, with teachers.yaml as in data/aya_expanse/pool.py and prompts with "prompt", "language" and "answer":

  espalier prepare arbitrage --pool=teachers.yaml --prompts=prompts.jsonl --routing=reward \\
    --reward=exact_answer --out=/tmp/arbitrage

--out gets sft.jsonl (rows for t5x_configs/data/chat.gin, with the teacher, settings, tokens, cost and reward of each
answer), pairs.jsonl (best against worst answer, for t5x_configs/data/preferences.gin; equal rewards make no pair), table.md
and summary.json (share chosen, mean reward and cost by language and teacher). Every answer is written to
completions.jsonl on arrival, so that a command that was stopped, or is repeated with another routing or reward, requests
only what it lacks. A teacher that fails is reported, and the others go on.

routings (arXiv 2408.14960):
  single    --teacher for all prompts
  random    a uniform draw among the teachers
  fixed     the pool's "fixed": a teacher for each language
  reward    all teachers answer; the answer with the largest reward is kept
  learned   all teachers answer a --subset of the prompts; a classifier of prompts, trained on softmax(reward / --tau),
            chooses one teacher for each of the others; with --router, an earlier one for all
  fusion    all teachers but --fuser answer, and the fuser writes one answer out of theirs
  translated  --teacher answers the row's "english", the prompt in English, and --translator translates its answer
With --per=language reward and learned choose the teacher with the largest mean reward in each language.

rewards:
  exact_answer, reasoning_gym, checkpoint:DIR   as in espalier prepare best_of_n
  judge:SPEC                                    as --judge of espalier evaluate win_rate: every two answers are compared
"""

import argparse
import dataclasses
import importlib
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

from espalier.common.ranges import Size
from espalier.launch import cli
from espalier.launch.aya_expanse.teachers import SamplingFlags
from espalier.launch.config import setting_flags
from espalier.launch.prepare.best_of_n import RewardFlags

Routing = Literal["single", "random", "fixed", "reward", "learned", "fusion", "translated"]

SFT, PAIRS, TABLE, SUMMARY = "sft.jsonl", "pairs.jsonl", "table.md", "summary.json"
COMPLETIONS = "completions.jsonl"


class ArbitrageError(ValueError):
    """Settings that exclude each other, or a pool without any answer."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class ArbitrageFlags:
    """What is made, of what.

    Attributes:
      pool: YAML file that lists the teachers.
      prompts: file of JSON lines with "prompt" and "language".
      out: folder of the outputs, and of the answers of earlier starts.
      routing: how the teacher of a prompt is chosen, see below.
      per: whether routing by reward, or learned, chooses for each prompt or for each language.
      teacher: the teacher of --routing=single, and of the English answers of --routing=translated.
      fuser: the teacher that writes one answer out of the others' for --routing=fusion.
      translator: the teacher that translates for --routing=translated.
      subset: share of the prompts that all teachers answer for --routing=learned.
      router: the router.npz of an earlier start for --routing=learned, instead of a subset.
      tau: temperature of the rewards that the router learns; 0 for the best teacher alone.
      languages: languages to read, such as tr,uk (default all).
      per_language: number of prompts of each language (default all).
      language_of: package.module:function that returns the code of a text's language, or None if it cannot tell. Answers in
        another language than their prompt are not used. If the function has an attribute "languages", prompts in other
        languages are refused.
      keep_cut: also use answers that were cut at the maximum length; training ends them with EOS as if they were whole.
      form: form of the written rows: conversations, or texts with "prompt" and "completion".
      attempts: requests of an answer that does not come, in one start.
    """

    pool: str
    prompts: str
    out: str
    routing: Routing = "reward"
    per: Literal["prompt", "language"] = "prompt"
    teacher: str | None = None
    fuser: str | None = None
    translator: str | None = None
    subset: float = 0.2
    router: str | None = None
    tau: float = 0.1
    languages: str | None = None
    per_language: Size | None = None
    language_of: str | None = None
    keep_cut: bool = False
    form: Literal["messages", "prompt"] = "messages"
    attempts: Size = 2

    def __post_init__(self):
        if (self.teacher is None) == (self.routing in ("single", "translated")):
            raise ArbitrageError("--teacher=NAME goes with --routing=single and translated.")
        if (self.fuser is None) == (self.routing == "fusion"):
            raise ArbitrageError("--fuser=NAME goes with --routing=fusion.")
        if (self.translator is None) == (self.routing == "translated"):
            raise ArbitrageError("--translator=NAME goes with --routing=translated.")
        if self.per == "language" and self.routing not in ("reward", "learned"):
            raise ArbitrageError("--per=language is for --routing=reward and learned.")
        if self.router is not None and (self.routing, self.per) != ("learned", "prompt"):
            raise ArbitrageError("--router=FILE is for --routing=learned with --per=prompt.")
        if not 0 < self.subset < 1:
            raise ArbitrageError(f"--subset={self.subset} must be between 0 and 1.")


def _add_flags(parser: argparse.ArgumentParser) -> None:
    setting_flags.add(parser, ArbitrageFlags)
    setting_flags.add(parser.add_argument_group("answers"), SamplingFlags())
    group = parser.add_argument_group("reward")
    setting_flags.add(group, RewardFlags, optional=True)


def _run(flags: argparse.Namespace) -> None:
    settings = ArbitrageFlags(**setting_flags.given(flags, ArbitrageFlags))
    reward = setting_flags.given(flags, RewardFlags)
    if reward and "reward" not in reward:
        raise ArbitrageError(f"--{next(iter(reward))} is for a reward: give --reward.")
    if reward.get("missing_end_penalty") and not settings.keep_cut:
        raise ArbitrageError(
            "--missing_end_penalty is for cut answers: give --keep_cut, or remove it."
        )
    learns = settings.routing == "learned" and settings.router is None
    if not reward and (learns or settings.routing == "reward"):
        raise ArbitrageError(f"--routing={settings.routing} needs --reward.")
    for name in setting_flags.given(flags, ArbitrageFlags, ("subset", "tau")):
        if not learns:
            raise ArbitrageError(f"--{name} is for --routing=learned without --router: remove it.")
    sampling = setting_flags.given(flags, SamplingFlags)
    if sampling.get("temperature") == 0 and "top_p" in sampling:
        raise ArbitrageError("--top_p has no effect with --temperature=0: remove one of them.")
    arbitrage(
        settings,
        sampling=SamplingFlags(**sampling),
        reward=RewardFlags(**reward) if reward else None,
        language_of=function_named(settings.language_of),
    )


def function_named(name: str | None) -> Callable[[str], str | None] | None:
    """Returns the function package.module:function."""
    if name is None:
        return None
    module, _, function = name.partition(":")
    try:
        return getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise ArbitrageError(
            f"--language_of={name} is no function package.module:function that can be imported: {error}."
        ) from None


def arbitrage(
    settings: ArbitrageFlags,
    *,
    sampling: SamplingFlags,
    reward: RewardFlags | None = None,
    language_of: Callable[[str], str | None] | None = None,
) -> dict[str, Any]:
    """Requests, rewards and routes answers; writes the files of --out and prints the table.

    Args:
      sampling: of the answers.
      reward: None for no rewards, and no pairs.
      language_of: returns the code of a text's language, or None if it cannot tell; None to check no language.

    Returns:
      The content of summary.json.

    Raises:
      ArbitrageError, DataError and others: settings, a pool or prompts that cannot be used, or no answer.
    """
    prompts, routed = route(settings, sampling=sampling, reward=reward, language_of=language_of)
    return write(settings, prompts, routed)


def route(
    settings: ArbitrageFlags,
    *,
    sampling: SamplingFlags,
    reward: RewardFlags | None = None,
    language_of: Callable[[str], str | None] | None = None,
) -> tuple[list[Any], Any]:
    """Returns the prompts and their `route.Routed`: all answers, their rewards, and the chosen ones. See `arbitrage`."""
    from espalier.data.aya_expanse import pool as pools
    from espalier.data.aya_expanse import prompts as prompt_rows
    from espalier.launch.aya_expanse import arbitrage_rewards, completions
    from espalier.launch.aya_expanse.route import Router
    from espalier.launch.inference import row_files
    from espalier.launch.prepare import best_of_n

    pool = pools.read(settings.pool)
    if reward is not None:
        arbitrage_rewards.check(reward)
    rows = row_files.read(settings.prompts, example=prompt_rows.EXAMPLE, flag="prompts")
    languages = None if settings.languages is None else settings.languages.split(",")
    prompts = prompt_rows.read(
        rows, language_of=language_of, languages=languages, per_language=settings.per_language
    )
    _check_form(settings, prompts)
    _check_languages(settings, prompts, getattr(language_of, "languages", None))
    if reward is not None:
        placed = dict(rows)
        for prompt in prompts:
            best_of_n.check_answer(prompt.where, placed[prompt.where], reward)
    out = pathlib.Path(settings.out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ArbitrageError(f"--out={out} cannot be created: {error}. Choose another.") from None
    with completions.Store.opened(out / COMPLETIONS) as store:
        router = Router(
            settings,
            pool,
            store,
            sampling=sampling,
            rewards=None if reward is None else arbitrage_rewards.Rewards(reward, out),
            language_of=language_of,
        )
        return prompts, router(prompts)


def _check_form(settings: ArbitrageFlags, prompts: Sequence[Any]) -> None:
    for prompt in prompts:
        if settings.form == "prompt" and not isinstance(prompt.prompt, str):
            raise ArbitrageError(f"{prompt.where}: messages need --form=messages.")


def _check_languages(
    settings: ArbitrageFlags, prompts: Sequence[Any], known: Sequence[str] | None
) -> None:
    """Raises ArbitrageError for a prompt in a language that the function of --language_of says it does not know."""
    from espalier.data.aya_expanse.prompts import UNKNOWN, same_language

    for prompt in prompts if known is not None else ():
        if prompt.language == UNKNOWN or any(same_language(prompt.language, x) for x in known):
            continue
        raise ArbitrageError(
            f"{prompt.where}: --language_of={settings.language_of} does not know the language {prompt.language!r}, only "
            f"{', '.join(known)}, so that no answer would be used: name a function that knows it, leave the language out of "
            "--languages, or remove --language_of."
        )


def write(settings: ArbitrageFlags, prompts: Sequence[Any], routed: Any) -> dict[str, Any]:
    """Writes what `route` returned to the files of --out, and prints the table; see `arbitrage`."""
    from espalier.data.aya_expanse import outputs
    from espalier.launch.inference import row_files

    out = pathlib.Path(settings.out)
    version = {"reward_version": routed.reward_version} if routed.reward_version else {}
    rows, pairs = [], []
    for p, prompt in enumerate(prompts):
        answers, rewards = routed.answers[p], routed.rewards[p]
        if (name := routed.chosen[p]) is not None:
            about = {"reward": rewards.get(name), **version} if version else {}
            rows.append(outputs.sft_row(prompt, name, answers[name], form=settings.form, **about))
        pair = outputs.pair_row(prompt, answers, rewards, form=settings.form, **version)
        if pair is not None:
            pairs.append(pair)
    if not rows:
        reasons = "; ".join(
            f"{name}: {asked['failed'] or asked['silent'] or asked['dropped']}"
            for name, asked in routed.teachers.items()
        )
        raise ArbitrageError(f"There is no answer to any prompt. {reasons}.")
    row_files.write(str(out / SFT), rows)
    if pairs:
        row_files.write(str(out / PAIRS), pairs)
    else:  # of an earlier start
        (out / PAIRS).unlink(missing_ok=True)
    table = outputs.table(
        prompts, routed.chosen, routed.all_answers, routed.rewards, routed.fates, routed.names
    )
    summary = {
        "settings": dataclasses.asdict(settings),
        "prompts": len(prompts),
        "rows": len(rows),
        "pairs": len(pairs),
        **version,
        "cost": _sum(
            answer["cost"] for by_name in routed.all_answers for answer in by_name.values()
        ),
        "teachers": routed.teachers,
        "table": table,
    }
    (out / SUMMARY).write_text(json.dumps(summary, indent=1, ensure_ascii=False) + "\n", "utf-8")
    text = outputs.markdown(table)
    (out / TABLE).write_text(text, "utf-8")
    print(text, end="")
    _report(summary, out)
    return summary


def _sum(costs: Any) -> float | None:
    values = list(costs)
    return None if None in values else float(sum(values))


def _report(summary: Mapping[str, Any], out: pathlib.Path) -> None:
    for name, asked in summary["teachers"].items():
        for reason, count in asked["silent"].items():
            print(
                f"warning: {name}: {count:,} requests without an answer: {reason}", file=sys.stderr
            )
    cost = "unknown" if summary["cost"] is None else f"{summary['cost']:.4g}"
    print(
        f"{out / SFT}: {summary['rows']:,} rows of {summary['prompts']:,} prompts, {summary['pairs']:,} pairs; "
        f"cost {cost}",
        file=sys.stderr,
    )


main = cli.command(__doc__, "prepare arbitrage", _run, add_flags=_add_flags)

if __name__ == "__main__":
    raise SystemExit(main())
