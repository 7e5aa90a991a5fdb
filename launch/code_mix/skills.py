"""Exact match on reasoning, knowledge and code, for models of generated text and code.

Example, after a run of an arm in t5x_configs/experiments/code_mix/cpu/:

  espalier evaluate skills --checkpoint=runs/share_50 --json=/tmp/skills.json

Every prompt is the beginning of a document (data/code_mix/skills.py) and is continued greedily; the whole answer
must match, of a call the result at its end. No training document has these operands.
"""

import argparse
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from espalier.launch import cli
from espalier.launch.inference import row_files
from espalier.launch.load import load_run

if TYPE_CHECKING:
    from espalier.data.code_mix.skills import Problem


def _add_flags(parser: argparse.ArgumentParser) -> None:
    load_run.add_flags(parser)
    parser.add_argument("--json", metavar="FILE", help="file for the results")


def _run(flags: argparse.Namespace) -> None:
    if flags.json:
        row_files.check_output(flags.json, "json")
    scores = evaluate(flags.checkpoint, params=flags.params)
    print(table(scores))
    if flags.json:
        row_files.write_json(flags.json, scores)


def evaluate(checkpoint: str, *, params: str = "auto") -> dict[str, Any]:
    """Returns `score` of a checkpoint; one batch for all skills, so that models of one shape share compiled programs.

    Args:
      checkpoint: run or step directory.
      params: see launch/load/load_run.py.

    Raises:
      LoadError: the run was not trained on documents of data/code_mix/skills.py.
    """
    from espalier.data.code_mix import skills

    problems = [problem for skill in skills.SKILLS for problem in skills.problems(skill)]
    return score(problems, _continued(checkpoint, problems, params))


def answers(checkpoint: str, *, params: str = "auto") -> list[str]:
    """Returns the answers of a checkpoint to `data.code_mix.skills.instructions`; arguments as of `evaluate`."""
    from espalier.data.code_mix import skills

    return _continued(checkpoint, skills.instructions(), params)


def _continued(checkpoint: str, problems: Sequence["Problem"], params: str) -> list[str]:
    """Returns the greedy continuation of each problem's prompt."""
    from espalier.data.code_mix import skills
    from espalier.launch.inference.generate import decoder_for
    from espalier.trainers.decoding.settings import Settings

    with load_run.config_of(checkpoint).load(checkpoint, params=params) as loaded:
        encode, decode = loaded.vocabulary.encode, loaded.vocabulary.decode
        if getattr(loaded.vocabulary, "symbols", None) != skills.SYMBOLS:
            raise load_run.LoadError(
                f"{checkpoint} was trained with {loaded.vocabulary}, not on the documents of "
                "t5x_configs/data/skills.gin: give a run of t5x_configs/experiments/code_mix/cpu/."
            )
        new_tokens = 1 + max(p.working + len(p.answer) for p in problems)
        size = loaded.batch_size(len(problems), len(problems))
        decoder = decoder_for(loaded, Settings(max_new_tokens=new_tokens), batch_size=size)
        continuations = decoder([loaded.context(encode(problem.prompt)) for problem in problems])
    return [decode(continuation.tokens) for continuation in continuations]


def score(problems: Sequence["Problem"], continuations: Sequence[str]) -> dict[str, Any]:
    """Returns {skill: {"exact", "problems", "by_kind": {kind: exact}}}, with shares of right answers.

    The kinds of knowledge are quarters of the facts, the most frequent facts first; the kinds of other skills are
    procedures, each apart on the operands that careless programs get wrong.
    """
    right: dict[str, dict[str, list[bool]]] = {}
    for problem, continuation in zip(problems, continuations, strict=True):
        kinds = right.setdefault(problem.skill, {})
        kinds.setdefault(problem.kind, []).append(problem.answered(continuation))
    out = {}
    for skill, kinds in right.items():
        every = [answered for answers in kinds.values() for answered in answers]
        by_kind = {kind: _mean(answers) for kind, answers in kinds.items()}
        out[skill] = {"exact": _mean(every), "problems": len(every), "by_kind": by_kind}
    return out


def _mean(answers: Sequence[bool]) -> float:
    return round(sum(answers) / len(answers), 4)


def table(scores: Mapping[str, Any]) -> str:
    """Returns exact match as a table."""
    lines = []
    for name, skill in scores.items():
        kinds = ", ".join(f"{kind} {value:.3f}" for kind, value in skill["by_kind"].items())
        lines.append(f"{name:10}{skill['exact']:6.3f} of {skill['problems']} ({kinds})")
    return "\n".join(lines)


main = cli.command(__doc__, "evaluate skills", _run, add_flags=_add_flags)

if __name__ == "__main__":
    raise SystemExit(main())
