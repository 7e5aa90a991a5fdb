"""The stages of the recipe that train nothing: prompts by cluster, arbitrage, merging, and indicators by round.

launch/papers/aya_expanse/recipe.py calls it; RECIPE is its recipe.yaml:

  python -m espalier.launch.papers.aya_expanse.stage prompts --recipe=RECIPE --to=DIR
  python -m espalier.launch.papers.aya_expanse.stage arbitrage --recipe=RECIPE --prompts=DIR --runs A B --to=DIR
  python -m espalier.launch.papers.aya_expanse.stage merge --recipe=RECIPE --runs A B --to=RUN
  python -m espalier.launch.papers.aya_expanse.stage rounds --recipe=RECIPE --runs A B C --to=DIR

Indicators of over-optimisation by language are what a reward and an independent judge say of the models of each round. The reward
that a policy is trained on rises by construction. It is trusted as long as a judge that the policy is not trained on agrees, answers
do not only become longer, and they stay in their language.
"""

import argparse
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.common import tables
from espalier.data.aya_expanse import prompts as prompt_rows
from espalier.data.languages import table
from espalier.data.text.documents import DataError
from espalier.launch import cli
from espalier.launch.aya_expanse import arbitrage
from espalier.launch.aya_expanse.arbitrage_rewards import Rewards
from espalier.launch.aya_expanse.teachers import SamplingFlags
from espalier.launch.papers.aya_expanse import recipe as recipes
from espalier.launch.papers.aya_expanse import win_rates
from espalier.launch.papers.aya_expanse.recipe import Recipe
from espalier.launch.prepare.best_of_n import RewardFlags

ALL = "all.jsonl"
INDICATORS = "rounds"
_PAGE = """\
{indicators}
Win rates in per cent, with 95 % intervals over prompts; judge: {judge}; opponent: {opponent}; prompts without an answer of
both models, which count for neither: {unanswered}.

{win_rates}"""


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return cli.run_command(
        __doc__, "papers.aya_expanse.stage", _run, add_flags=_add_flags, argv=argv
    )


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stage", choices=tuple(_STAGES))
    parser.add_argument("--recipe", required=True, metavar="FILE", help="the recipe, a YAML file")
    parser.add_argument(
        "--runs", nargs="+", default=[], metavar="DIR", help="run directories of the models"
    )
    parser.add_argument("--prompts", metavar="DIR", help="folder that the stage `prompts` wrote")
    parser.add_argument(
        "--to", required=True, metavar="DIR", help="write the results to this folder"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of sampling (default 0)")


def _run(flags: argparse.Namespace) -> None:
    _STAGES[flags.stage](recipes.read(flags.recipe), flags, pathlib.Path(flags.to))


def _prompts(recipe: Recipe, flags: argparse.Namespace, to: pathlib.Path) -> None:
    """Writes the prompts of the recipe's origins, all and by cluster."""
    placed = [
        (where, row)
        for where, row in _rows(recipe.prompts)
        if recipe.origin == "both" or row.get("origin", "native") == recipe.origin
    ]
    rows = [row for _, row in placed]
    known = set(map(_language, rows))
    for cluster in recipe.clusters:
        languages = recipe.languages(cluster)
        if missing := [tag for tag in languages if table.code_of(tag) not in known]:
            raise recipes.RecipeError(
                f"{recipe.prompts}: no prompt of origin {recipe.origin} in {', '.join(missing)}: add prompts, or leave the languages "
                "out of 'clusters' and 'shared'."
            )
    _check_clusters(recipe, placed)
    _write(to / ALL, rows)
    _by_cluster(recipe, rows, to, "")
    if recipe.opponent is not None and os.path.isfile(recipe.opponent):  # before hours of training
        win_rates.stored(recipe.opponent, prompt_rows.read(_rows(recipe.held_out)))


def _arbitrage(recipe: Recipe, flags: argparse.Namespace, to: pathlib.Path) -> None:
    """Routes the prompts to the runs and the further teachers, and writes the rows and the pairs of each cluster."""
    import yaml

    prompts = pathlib.Path(flags.prompts or "") / ALL
    more = []
    if recipe.teachers is not None:
        more = yaml.safe_load(pathlib.Path(recipe.teachers).read_text("utf-8"))["teachers"]
    teachers = [*_teachers(recipe, list(map(_name, flags.runs)), flags.runs), *more]
    arbitrage.write(*_asked(recipe, teachers, str(prompts), to, recipe.reward, seed=flags.seed))
    for name in ("sft", "pairs"):
        path = to / f"{name}.jsonl"
        _by_cluster(recipe, [row for _, row in _rows(str(path))], to, f"{name}_")


def _merge(recipe: Recipe, flags: argparse.Namespace, to: pathlib.Path) -> None:
    """Averages the runs, by espalier merge: with equal weights, or with those of a search."""
    import yaml

    from espalier.launch.merge import __main__ as merge

    models = [{"model": run, "parameters": {"weight": 1.0}} for run in flags.runs]
    to.parent.mkdir(parents=True, exist_ok=True)
    config = to.with_name(f"{to.name}.merge.yml")
    config.write_text(yaml.safe_dump({"merge_method": "linear", "models": models}), "utf-8")
    if recipe.dev or recipe.measure:
        config = _searched(recipe, flags.runs, to.with_name(f"{to.name}.search"), flags.seed)
    if status := merge.main([f"--config={config}", f"--out={to}"]):
        raise SystemExit(status)


def _searched(recipe: Recipe, runs: Sequence[str], to: pathlib.Path, seed: int) -> pathlib.Path:
    """Returns the configuration with the weights of a search, whose trials and leave-one-out table stay in a folder."""
    from espalier.launch.merge import search

    languages = dict.fromkeys(code for x in recipe.clusters for code in recipe.languages(x))
    dev = [
        f"{code}={pathlib.Path(recipe.dev, f'{code}.jsonl')}" for code in languages if recipe.dev
    ]
    settings = search.SearchFlags(
        models=[f"{number}_{_name(run)}={run}" for number, run in enumerate(runs)],
        held_out=dev,
        measure=(recipe.measure,) if recipe.measure else (),
        scores=recipe.scores,
        out=str(to),
        budget=recipe.trials,
        seed=seed,
    )
    table = search.run(settings)
    (to / "table.txt").write_text("\n".join([*table, ""]), "utf-8")
    print("\n".join(table))
    return to / "merge.yml"


def _rounds(recipe: Recipe, flags: argparse.Namespace, to: pathlib.Path) -> None:
    """Compares the runs, in the order of the rounds, on the held-out prompts."""

    names = [f"{number}_{_name(run)}" for number, run in enumerate(flags.runs)]
    judge = recipe.judge or recipe.reward
    teachers, by_kind = _teachers(recipe, names, flags.runs), []
    for kind in dict.fromkeys((judge, recipe.reward)):  # the files of the last one stay
        asked = _asked(recipe, teachers, recipe.held_out, to, kind, temperature=0.0)
        by_kind.append(arbitrage.write(*asked)["table"])
    rows = indicators(names, by_kind[-1], by_kind[0])
    judge_text = judge
    if judge == recipe.reward:  # it cannot rise while it falls
        judge_text += " (the policy's own reward, which cannot show over-optimisation)"
        rows = [{**row, "over_optimised": None} for row in rows]
    _, prompts, routed = asked
    answers = routed.all_answers
    compared = [(name, names[0]) for name in names[1:]]
    if recipe.opponent is not None:
        own = _opponent(recipe, prompts, to)
        answers = [{**one, **other} for one, other in zip(answers, own, strict=True)]
        compared += [(name, win_rates.OPPONENT) for name in names]
    rewards = Rewards(RewardFlags(reward=judge), to)
    rates = [win_rates.between(a, b, prompts, answers, rewards) for a, b in compared]
    page = _PAGE.format(
        indicators=markdown(rows),
        judge=judge_text,
        opponent=recipe.opponent or "none",
        unanswered=max((one["unanswered"] for one in rates), default=0),
        win_rates=win_rates.markdown(rates),
    )
    made = {
        "indicators": rows,
        "judge": judge,
        "opponent": recipe.opponent,
        "win_rates": rates,
    }
    (to / f"{INDICATORS}.json").write_text(json.dumps(made, indent=1) + "\n", "utf-8")
    (to / f"{INDICATORS}.md").write_text(page, "utf-8")
    print(page, end="")


def _opponent(
    recipe: Recipe, prompts: Sequence[Any], to: pathlib.Path
) -> Sequence[Mapping[str, Any]]:
    """Returns the opponent's answers to the held-out prompts: stored ones of a file, or those of a model that is asked like the others."""
    from espalier.launch.load import hf_checkpoint

    where = str(recipe.opponent)
    if os.path.isfile(where):
        return win_rates.stored(where, prompts)
    kind = "hf" if hf_checkpoint.is_hf(where) else "checkpoint"
    teacher = {"name": win_rates.OPPONENT, kind: where, "batch_size": recipe.batch_size}
    folder = to / win_rates.OPPONENT
    return _asked(recipe, [teacher], recipe.held_out, folder, None, temperature=0.0)[2].all_answers


def _teachers(recipe: Recipe, names: Sequence[str], runs: Sequence[str]) -> list[dict[str, Any]]:
    """Returns runs as entries of a pool."""
    return [
        {"name": name, "checkpoint": run, "batch_size": recipe.batch_size}
        for name, run in zip(names, runs, strict=True)
    ]


def _asked(
    recipe: Recipe,
    teachers: Sequence[Mapping[str, Any]],
    prompts: str,
    to: pathlib.Path,
    reward: str | None,
    *,
    temperature: float = 0.8,
    seed: int = 0,
) -> tuple[arbitrage.ArbitrageFlags, list[Any], Any]:
    """Returns the settings, prompts and answers of `arbitrage.route` for a pool of teachers, whose answers have a reward."""
    import yaml

    to.mkdir(parents=True, exist_ok=True)
    pool = to / "pool.yaml"
    pool.write_text(yaml.safe_dump({"teachers": list(teachers)}, sort_keys=False), "utf-8")
    settings = arbitrage.ArbitrageFlags(
        pool=str(pool),
        prompts=prompts,
        out=str(to),
        form=recipe.form,
        keep_cut=recipe.keep_cut,
        language_of=recipe.language_of,
    )
    sampling = SamplingFlags(max_tokens=recipe.max_new_tokens, temperature=temperature, seed=seed)
    routed = arbitrage.route(
        settings,
        sampling=sampling,
        reward=None if reward is None else RewardFlags(reward=reward),
        language_of=arbitrage.function_named(recipe.language_of),
    )
    return settings, *routed


def _name(run: str) -> str:
    """Returns the arm of a run of a sweep, in runs/ARM/seed0 or, if it is made, runs/ARM/seed0/made."""
    path = pathlib.Path(run)
    path = path.parent if path.name == "made" else path
    return path.parent.name if path.name.startswith("seed") else path.name


def _rows(path: str) -> list[tuple[str, Mapping[str, Any]]]:
    from espalier.data.aya_expanse.prompts import EXAMPLE
    from espalier.launch.inference import row_files

    return row_files.read(path, example=EXAMPLE, flag="prompts")


def _write(path: pathlib.Path, rows: Sequence[Mapping[str, Any]]) -> None:
    from espalier.launch.inference import row_files

    if not rows:
        raise ValueError(f"{path} would have no row: add prompts, or change the recipe.")
    path.parent.mkdir(parents=True, exist_ok=True)
    row_files.write(str(path), rows)


def _by_cluster(
    recipe: Recipe, rows: Sequence[Mapping[str, Any]], to: pathlib.Path, prefix: str
) -> None:
    for cluster in recipe.clusters:
        codes = set(map(table.code_of, recipe.languages(cluster)))
        own = [row for row in rows if _language(row) in codes]
        _write(to / f"{prefix}{cluster}.jsonl", own)


def _check_clusters(recipe: Recipe, rows: Sequence[tuple[str, Mapping[str, Any]]]) -> None:
    """Raises RecipeError for a row of a language that no cluster has: teachers would answer it, and nothing would read the answers."""
    codes = {table.code_of(tag) for x in recipe.clusters for tag in recipe.languages(x)}
    for where, row in rows:
        unknown = recipe.language_of is not None and row.get("language") is None
        if not unknown and _language(row) not in codes:
            raise recipes.RecipeError(
                f"{where}: the language {row.get('language')!r} is in no cluster of the recipe: add it to 'clusters' or 'shared', or "
                "remove the row."
            )


def _language(row: Mapping[str, Any]) -> str:
    return table.code_of(str(row.get("language")))


_STAGES = {"prompts": _prompts, "arbitrage": _arbitrage, "merge": _merge, "rounds": _rounds}


WRONG_LANGUAGE, CUT = "wrong language", "cut"


def indicators(
    rounds: Sequence[str], reward: Sequence[Mapping[str, Any]], judge: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Returns a row for each language and round.

    Args:
      rounds: names of the models, as teachers of a pool, from the first to the last.
      reward, judge: rows of `outputs.table` of the same answers, rewarded by the policy's reward and by the judge.

    Returns:
      Rows with 'language', 'round', 'reward' and 'judge' (means), 'new_tokens' (mean), 'wrong_language' and 'cut' (shares
      of the answers), and 'over_optimised': whether the reward rose from the round before while the judge's fell; None in
      the first round.

    Raises:
      DataError: a round has no row in a language.
    """
    by_reward, by_judge = (
        {(row["language"], row["teacher"]): row for row in rows} for rows in (reward, judge)
    )
    made = []
    for language in dict.fromkeys(row["language"] for row in reward):
        before: dict[str, Any] | None = None
        for name in rounds:
            try:
                own, judged = by_reward[language, name], by_judge[language, name]
            except KeyError:
                raise DataError(f"There is no answer of {name!r} in {language!r}") from None
            row = {
                "language": language,
                "round": name,
                "reward": own["reward"],
                "judge": judged["reward"],
                "new_tokens": own["new_tokens"],
                "wrong_language": own.get(WRONG_LANGUAGE, 0) / own["asked"],
                "cut": own.get(CUT, 0) / own["asked"],
                "over_optimised": None,
            }
            if before is not None:
                values = [x[key] for key in ("reward", "judge") for x in (before, row)]
                if None not in values:
                    rose, fell = values[1] > values[0], values[3] < values[2]
                    row["over_optimised"] = rose and fell
            made.append(row)
            before = row
    return made


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the indicators as a table in Markdown."""
    titles = list(rows[0]) if rows else []
    header = [title.replace("_", " ") for title in titles]
    cells = ([_cell(row[title]) for title in titles] for row in rows)
    return "\n".join(tables.markdown(header, cells)) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else f"{value:.4g}"


if __name__ == "__main__":
    raise SystemExit(main())
