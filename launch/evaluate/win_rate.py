"""Win rates of several systems by a judge of their answers, with intervals.

Example, on two files of espalier generate from the same prompts:

  espalier evaluate win_rate --a=text.jsonl --b=code.jsonl --out=/tmp/win_rate \\
    --judge=openai:https://host/v1,model=NAME,key_env=API_KEY

Rows are matched by "id" if all have one, else by prompt. A comparing judge sees both orders of the answers;
disagreement is a tie, and identical answers are a tie without a question. Missing or unreadable replies are
requested again, and finally counted as invalid, outside all shares.

With --opponents each of --systems is judged against each opponent, and only that: checkpoints of a run against stored
answers of fixed systems, for example. A table has their rates by opponent and the mean. A new checkpoint or opponent adds
its own questions to those in --out.

With --by_language every row has a "language", which espalier generate copies from its prompts (espalier prepare
arena_prompts writes such prompts): the judge then prefers answers in it, and a table and languages.png have the rates by
language. A rate at equal length is what a logistic regression on the answers' difference in length predicts for none.

--out gets judgements.jsonl, summary.json and win_rates.png. Replies are appended to judgements.jsonl at once:
a restarted command continues there, and another judge, pair or prompt adds only new questions. A checkpoint as
judge is configured as in espalier generate.

judges:
  checkpoint:DIR           a run, step or Hugging Face directory: its model writes the comparison
  openai:URL,model=NAME    a chat-completions endpoint; key_env=VARIABLE names the variable with its key
  logprob:DIR              scores each answer by its mean log-probability under a model

their settings, with defaults ("none" for max_tokens or temperature leaves them to the endpoint):
"""

import argparse
import dataclasses
import pathlib
import sys
from collections.abc import Sequence
from typing import Annotated, Any

from espalier.common import files
from espalier.common.ranges import Size
from espalier.launch import cli
from espalier.launch.config import setting_flags
from espalier.launch.evaluate.judges import answers, asking, shares, spec
from espalier.launch.evaluate.judges.answers import System
from espalier.launch.evaluate.judges.asking import Judge, JudgeError
from espalier.launch.evaluate.judges.pairwise import Template
from espalier.launch.load import load_run

JUDGEMENTS, SUMMARY, PLOT = "judgements.jsonl", "summary.json", "win_rates.png"
LANGUAGES_PLOT = "languages.png"
Answers = Annotated[str, "[NAME=]FILE"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class WinRateFlags:
    """Answers, which are rows of espalier generate, and how they are judged.

    Attributes:
      a: file with the answers of the first system.
      b: file with the answers of the second system.
      systems: answers of two systems or more, each against each, instead of --a and --b.
      opponents: answers of one system or more that each of --systems, of which one is enough, is judged against.
      judge: which judge compares the answers, see below.
      out: write the results to this folder.
      attempts: maximum attempts to get a readable reply (default 3).
      allow_ties: let the judge answer with a tie; by default only disagreeing orders are ties.
      by_language: judge in the "language" of each row, and show rates by language.
    """

    a: Answers | None = None
    b: Answers | None = None
    systems: Annotated[Sequence[Answers], setting_flags.MANY] | None = None
    opponents: Annotated[Sequence[Answers], setting_flags.MANY] | None = None
    judge: Annotated[str, "KIND:WHERE"]
    out: setting_flags.Folder
    attempts: Size | None = None
    allow_ties: bool = False
    by_language: bool = False


def _add_flags(parser: argparse.ArgumentParser) -> None:
    setting_flags.add(parser, WinRateFlags)


def _files(flags: argparse.Namespace) -> dict[str, str]:
    """Returns the files of answers by the names of their systems, opponents last.

    Raises:
      JudgeError: flags that exclude each other, or two systems of the same name.
    """
    pair = (flags.a, flags.b)
    if flags.systems is not None and pair != (None, None) or flags.systems is None and None in pair:
        raise JudgeError("Give either --a=FILE and --b=FILE, or --systems with two files or more.")
    if flags.opponents and flags.systems is None:
        raise JudgeError("--opponents needs --systems=FILE, and not --a and --b.")
    paths: dict[str, str] = {}
    for text in [*(flags.systems or pair), *(flags.opponents or ())]:
        name, equals, path = text.partition("=")
        if not equals:
            name, path = pathlib.Path(text).stem, text
        if name in paths:
            raise JudgeError(
                f"{paths[name]} and {path} both have the name {name!r}: name them, such as NAME={path}."
            )
        paths[name] = path
    return paths


def _default_files(flags: argparse.Namespace) -> Sequence[str]:
    """Returns the gin files read before the user's: the configuration of the judge's checkpoint, if it has one.

    Raises:
      JudgeError: --judge is not a judge.
      LoadError, FileNotFoundError: see load_run.files_of.
    """
    return load_run.files_of(spec.parse(flags.judge).checkpoint, flags.gin_file)


def _run(start: cli.Start) -> None:
    """Judges with the settings of the flags.

    Raises:
      JudgeError: flags, answers or a judge that cannot be used.
    """
    flags = setting_flags.filled(start.flags, WinRateFlags)
    chosen = spec.parse(flags.judge)
    systems = answers.read(_files(flags), by_language=flags.by_language)
    opponents = len(flags.opponents or ())
    answers.pairs(systems, opponents=opponents)  # reports errors before a model is loaded
    judge = spec.build(
        chosen,
        attempts=flags.attempts,
        wording=Template(allow_ties=flags.allow_ties),
        config=None if chosen.checkpoint is None else start(),
        config_text=start.config.text,
    )
    win_rates(systems, judge, out=flags.out, opponents=opponents)


def win_rates(
    systems: Sequence[System], judge: Judge, *, out: str, opponents: int = 0
) -> dict[str, Any]:
    """Judges the answers of every two systems; prints tables and writes all files of `out`.

    With `opponents` the last systems are fixed opponents of the others, see `answers.pairs`.

    Returns:
      The content of summary.json: 'judge', 'systems', 'pairs' and, of answers with languages, 'languages' as in
      launch/evaluate/judges/shares.py, with opponents 'opponents' as in `shares.against`, and counts of the questions.

    Raises:
      JudgeError: answers that do not match, or a judge that cannot be reached.
    """
    pairs = answers.pairs(systems, opponents=opponents)
    folder = pathlib.Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JudgeError(
            f"--out={out} cannot be created: {error}. Choose another folder."
        ) from None
    with asking.Journal.opened(folder / JUDGEMENTS) as journal:
        outcomes, tally = asking.judge_pairs(judge, pairs, journal)
    prompts = len(systems[0].answers)
    starts = range(0, len(pairs), prompts)
    summary: dict[str, Any] = {
        "judge": {"name": judge.name, **judge.identity},
        "prompts": prompts,
        "systems": {system.name: shares.system_summary(system) for system in systems},
        "pairs": [
            shares.pair_summary(pairs[i : i + prompts], outcomes[i : i + prompts]) for i in starts
        ],
        "questions": tally.summary(),
    }
    if opponents:
        summary["opponents"] = shares.against(pairs, outcomes, prompts=prompts, opponents=opponents)
    languages = [answer.language for answer in systems[0].answers]
    if any(languages):
        summary["languages"] = [
            shares.by_language(pairs[i : i + prompts], outcomes[i : i + prompts], languages)
            for i in starts
        ]
        shares.plot_languages(summary["languages"], folder / LANGUAGES_PLOT)
    files.write_json(folder / SUMMARY, summary, synced=False)  # counted again from the answers
    shares.plot(summary, folder / PLOT)
    shares.print_tables(summary)
    if opponents:
        shares.print_opponents(summary["opponents"])
    if any(languages):
        shares.print_languages(summary["languages"])
    print(f"{tally}; {folder / SUMMARY}", file=sys.stderr)
    asked = [outcome.verdict for outcome in outcomes if not outcome.identical]
    if asked and set(asked) == {None}:
        print(
            f"warning: the judge gave no verdict that could be read on any of {len(asked):,} pairs, so nothing was measured: "
            f"read its replies in {folder / JUDGEMENTS}, and give a judge that follows instructions, or logprob:DIR, which "
            "compares log-probabilities and writes nothing.",
            file=sys.stderr,
        )
    return summary


_KINDS = "\n".join(f"  {line}" for line in spec.help_text().splitlines())
main = load_run.command(
    *(f"{__doc__}{_KINDS}\n", "evaluate win_rate", _run, _add_flags),
    files=_default_files,
    without_model=True,
)

if __name__ == "__main__":
    raise SystemExit(main())
