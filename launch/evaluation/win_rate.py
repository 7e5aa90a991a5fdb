"""Which of several systems gives the better answers, as a judge sees it: win rates with intervals.

Example, on two files of launch.generate from the same prompts:

  python -m launch.evaluate win_rate --a=text.jsonl --b=code.jsonl --out=/tmp/win_rate \\
    --judge=openai:https://host/v1,model=NAME,key_env=API_KEY

Rows belong together by "id" if all have one, else by prompt. A judge that compares is asked about both
orders of the answers; disagreement is a tie, identical answers are one without asking. A reply that
cannot be read or does not come is asked for again, and in the end counted as invalid: in no share.

--out gets judgements.jsonl, summary.json and win_rates.png. Replies are kept in judgements.jsonl as they
come: stopped at any time, the same command goes on from there, and another judge, pair or prompt asks
only what is new. A checkpoint as judge is configured as in launch.generate.

judges:
  checkpoint:DIR           a run or step directory: its model writes the comparison
  openai:URL,model=NAME    a chat-completions endpoint; key_env=VARIABLE says where its key is
  logprob:DIR              scores each answer by its mean log-probability under a model

their settings, with defaults ("none" for max_tokens or temperature leaves them to the endpoint):
  checkpoint:  params=auto,max_tokens=128,batch_size=8
  openai:      max_tokens=512,temperature=0,timeout=120,retries=6,concurrency=8
  logprob:     params=auto,batch_size=8,margin=0
"""

if __name__ == "__main__":
    from launch import cli
    from launch.evaluation import flags as judge_flags

    def start_run(start):
        from launch.evaluation import win_rate

        win_rate.run(start)

    raise SystemExit(
        cli.main(
            __doc__,
            entry="launch.run.load_run:RunConfig",
            command="evaluate win_rate",
            extra_flags=judge_flags.add,
            run=start_run,
            default_files=judge_flags.default_files,
            unused={"MODEL": "None", "VOCABULARY": "None"},
        )
    )

import pathlib
import sys
from collections.abc import Sequence
from typing import Any

from data.cache import cache_dir
from launch.evaluation import flags
from launch.evaluation.judges import answers, asking, journal, screen, shares, spec
from launch.evaluation.judges.answers import System
from launch.evaluation.judges.base import Judge, JudgeError

JUDGEMENTS, SUMMARY, PLOT = "judgements.jsonl", "summary.json", "win_rates.png"


def run(start: Any) -> None:
    """Judges as the flags say.

    Raises:
      JudgeError: flags, answers or a judge that cannot be used.
    """
    given = start.flags
    chosen = spec.parse(given.judge)
    systems = answers.read(flags.files(given))
    answers.pairs(systems)  # what is wrong with them is said before a model is made
    judge = spec.build(
        chosen,
        attempts=given.attempts,
        allow_ties=given.allow_ties,
        config=None if chosen.checkpoint is None else start(),
        config_text=start.config.text,
    )
    win_rates(systems, judge, out=given.out)


def win_rates(systems: Sequence[System], judge: Judge, *, out: str) -> dict[str, Any]:
    """Judges the answers of every two systems; prints tables and writes all files of `out`.

    Args:
      systems: with answers to the same prompts.
      judge: decides.
      out: directory, which is made.

    Returns:
      The content of summary.json: 'judge', 'systems' and 'pairs' as in launch/evaluation/judges/shares.py, and
      what was asked.

    Raises:
      JudgeError: answers that do not belong together, or a judge that cannot be asked.
    """
    pairs = answers.pairs(systems)
    folder = pathlib.Path(out)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise JudgeError(f"--out={out} cannot be made: {error}. Choose another folder.") from None
    with journal.opened(folder / JUDGEMENTS) as kept:
        outcomes, tally = asking.judge_pairs(judge, pairs, kept)
    prompts = len(systems[0].answers)
    summary = {
        "judge": {"name": judge.name, **judge.identity},
        "prompts": prompts,
        "systems": {system.name: shares.system_summary(system) for system in systems},
        "pairs": [
            shares.pair_summary(pairs[i : i + prompts], outcomes[i : i + prompts])
            for i in range(0, len(pairs), prompts)
        ],
        "questions": tally.summary(),
    }
    cache_dir.write_json(folder / SUMMARY, summary)
    screen.plot(summary, folder / PLOT)
    screen.print_tables(summary)
    print(f"{tally}; {folder / SUMMARY}", file=sys.stderr)
    return summary
