"""Exact match and loss of answers on reasoning, knowledge and code, for models of generated text and code.

Example, after a run of an arm in t5x_configs/experiments/code_mix/cpu/:

  espalier evaluate skills --checkpoint=runs/share_50 --json=/tmp/skills.json

Every prompt is the beginning of a document (data/code_mix/skills.py) and is continued greedily; the whole answer
must match, of a call the result at its end. The loss of an answer is its negative log-probability in nats after its
prompt, of a call that of its result directly after the sign: whether working comes first is the format of the data and
no skill. It says more than exact match where nearly all answers are right or none. No training document has these operands.
"""

import argparse
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from espalier.launch import cli
from espalier.launch.inference import row_files
from espalier.launch.load import load_run

if TYPE_CHECKING:
    from espalier.data.code_mix.skills import Problem
    from espalier.launch.load.load_run import LoadedRun


def _add_flags(parser: argparse.ArgumentParser) -> None:
    load_run.add_flags(parser)
    parser.add_argument("--json", metavar="FILE", help="write the results to this JSON file")


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
    with _loaded(checkpoint, params) as loaded:
        return score(problems, _continued(loaded, problems), _losses(loaded, problems))


def answers(checkpoint: str, *, params: str = "auto") -> list[str]:
    """Returns the answers of a checkpoint to `data.code_mix.skills.instructions`; arguments as of `evaluate`."""
    from espalier.data.code_mix import skills

    with _loaded(checkpoint, params) as loaded:
        return _continued(loaded, skills.instructions())


@contextlib.contextmanager
def _loaded(checkpoint: str, params: str) -> "Iterator[LoadedRun]":
    from espalier.data.code_mix import skills

    with load_run.config_of(checkpoint).load(checkpoint, params=params) as loaded:
        if getattr(loaded.vocabulary, "symbols", None) != skills.SYMBOLS:
            raise load_run.LoadError(
                f"{checkpoint} was trained with {loaded.vocabulary}, not on the documents of "
                "t5x_configs/data/skills.gin: give a run of t5x_configs/experiments/code_mix/cpu/."
            )
        yield loaded


def _continued(loaded: "LoadedRun", problems: Sequence["Problem"]) -> list[str]:
    """Returns the greedy continuation of each problem's prompt."""
    from espalier.launch.inference.generate import decoder_for
    from espalier.trainers.decoding.settings import Settings

    encode, decode = loaded.vocabulary.encode, loaded.vocabulary.decode
    new_tokens = 1 + max(p.working + len(p.answer) for p in problems)
    size = loaded.batch_size(len(problems), len(problems))
    decoder = decoder_for(loaded, Settings(max_new_tokens=new_tokens), batch_size=size)
    continuations = decoder([loaded.context(encode(problem.prompt)) for problem in problems])
    return [decode(continuation.tokens) for continuation in continuations]


def _losses(loaded: "LoadedRun", problems: Sequence["Problem"]) -> list[float]:
    """Returns the negative log-probability of each right answer, in nats."""
    from espalier.data.code_mix import skills
    from espalier.trainers.scoring.scoring import Row, Scorer

    encode = loaded.vocabulary.encode
    rows = []
    for problem in problems:
        sign = skills.RESULT if problem.skill == "code" else ""
        context = loaded.context(encode(problem.prompt + sign))
        rows.append(Row(context=context, targets=encode(problem.answer.removeprefix(sign))))
    size = loaded.batch_size(len(rows), len(rows))
    scorer = Scorer(loaded.model, loaded.params, batch_size=size, sharding=loaded.row_sharding)
    return [-float(log_probs.sum()) for log_probs in scorer(rows)]


def score(
    problems: Sequence["Problem"], continuations: Sequence[str], losses: Sequence[float]
) -> dict[str, Any]:
    """Returns {skill: {"exact", "loss", "problems", "by_kind": {kind: exact}, "loss_by_kind": {kind: loss}}}.

    "exact" is the share of right answers, "loss" the mean of `losses`. The kinds of knowledge are quarters of the facts,
    the most frequent facts first; the kinds of other skills are procedures, each apart on the operands that careless
    programs get wrong.
    """
    kinds: dict[str, dict[str, list[tuple[bool, float]]]] = {}
    for problem, continuation, loss in zip(problems, continuations, losses, strict=True):
        found = kinds.setdefault(problem.skill, {}).setdefault(problem.kind, [])
        found.append((problem.answered(continuation), loss))
    out = {}
    for skill, by_kind in kinds.items():
        right, nats = zip(*(one for found in by_kind.values() for one in found), strict=True)
        means = {
            kind: tuple(map(_mean, zip(*found, strict=True))) for kind, found in by_kind.items()
        }
        out[skill] = {
            **{"exact": _mean(right), "loss": _mean(nats), "problems": len(right)},
            "by_kind": {kind: exact for kind, (exact, _) in means.items()},
            "loss_by_kind": {kind: mean for kind, (_, mean) in means.items()},
        }
    return out


def _mean(values: Sequence[float]) -> float:
    return round(sum(values) / len(values), 4)


def table(scores: Mapping[str, Any]) -> str:
    """Returns exact match and loss as a table."""
    lines = []
    for name, skill in scores.items():
        kinds = ", ".join(f"{kind} {value:.3f}" for kind, value in skill["by_kind"].items())
        nats = f"{skill['loss']:.3f} nats an answer"
        lines.append(f"{name:10}{skill['exact']:6.3f} of {skill['problems']}, {nats} ({kinds})")
    return "\n".join(lines)


main = cli.command(__doc__, "evaluate skills", _run, add_flags=_add_flags)

if __name__ == "__main__":
    raise SystemExit(main())
