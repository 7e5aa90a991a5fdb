"""The stages of the small experiment that train nothing: requests, the pool's answers by routing, merges, and their searches.

launch/papers/aya_expanse/experiment.py calls it:

  python -m espalier.launch.papers.aya_expanse.small_stage requests --seed=90 --to=DIR
  python -m espalier.launch.papers.aya_expanse.small_stage pool --requests=DIR --runs A B C --seed=90 --to=DIR
  python -m espalier.launch.papers.aya_expanse.small_stage search --requests=DIR --runs A B C --seed=90 --to=DIR
  python -m espalier.launch.papers.aya_expanse.small_stage merge --runs A B C --to=RUN
  python -m espalier.launch.papers.aya_expanse.small_stage strength --requests=DIR --base=DIR --method=ties --runs A B C --to=RUN
"""

import argparse
import collections
import json
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch import cli
from espalier.launch.papers.aya_expanse import lexicon, small_pool
from espalier.launch.papers.aya_expanse.small_pool import write

# Requests of each split in every language; those of online rounds are of the pool's split, and not of the pool.
TUNING, POOL, ONLINE, DEV = 2000, 600, 400, 48
OUTSIDE = 0.1  # share of the requests in other languages that a cluster's teacher sees
BUDGET = 60  # trials of the search
# How far a merge goes from the experts' shared start: shares of the sum of their updates. One over their number is the mean.
STRENGTHS = (0.2, 1 / 3, 0.6, 1.0)
STRENGTH = "strength.json"
_BATCH = 64


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    name = "papers.aya_expanse.small_stage"
    return cli.run_command(__doc__, name, _run, add_flags=_add_flags, argv=argv)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stage", choices=tuple(_STAGES))
    parser.add_argument("--requests", metavar="DIR", help="folder that the stage `requests` wrote")
    parser.add_argument(
        "--runs", nargs="+", default=[], metavar="DIR", help="run directories of the models"
    )
    parser.add_argument(
        "--base", metavar="DIR", help="run that the models of `strength` started from"
    )
    parser.add_argument(
        "--method", default="linear", help="merge method of espalier merge (default linear)"
    )
    parser.add_argument(
        "--to", required=True, metavar="DIR", help="write the results to this folder"
    )
    parser.add_argument(
        "--seed", type=int, default=0, help="random seed of requests and draws (default 0)"
    )


def _run(flags: argparse.Namespace) -> None:
    _STAGES[flags.stage](flags, pathlib.Path(flags.to))


def _requests(flags: argparse.Namespace, to: pathlib.Path) -> None:
    """Writes the teachers' data by cluster, the pool's prompts, and texts for the search."""
    rng = np.random.default_rng(flags.seed)
    tuning = lexicon.requests("tuning", TUNING, flags.seed)
    for name, codes in lexicon.FAMILIES.items():
        own = (*codes, lexicon.SHARED)
        seen = [row for row in tuning if row["language"] in own or rng.random() < OUTSIDE]
        write(to / f"teacher_{name}.jsonl", map(small_pool.answered, seen))
    prompts = lexicon.requests("pool", POOL + ONLINE, flags.seed)
    asked = POOL * len(lexicon.LANGUAGES)
    write(to / "pool.jsonl", prompts[:asked])
    online = prompts[asked:]
    write(to / "online.jsonl", online)
    for name, codes in lexicon.FAMILIES.items():
        cluster = lexicon.of_languages(online, (*codes, lexicon.SHARED))
        write(to / f"online_{name}.jsonl", cluster)
    dev = lexicon.requests("dev", DEV, flags.seed)
    for code in lexicon.LANGUAGES:
        rows = lexicon.of_languages(dev, [code])
        texts = [{"text": row["prompt"], "targets": row["answer"]} for row in rows]
        write(to / f"dev_{code}.jsonl", texts)


def _pool(flags: argparse.Namespace, to: pathlib.Path) -> None:
    prompts = pathlib.Path(flags.requests) / "pool.jsonl"
    runs = dict(zip(lexicon.FAMILIES, flags.runs, strict=True))
    small_pool.answer(prompts, runs, to, seed=flags.seed)


def _search(flags: argparse.Namespace, to: pathlib.Path) -> None:
    """Searches the weights of a merge, whose trials, weights and table stay in the folder."""
    from espalier.launch.merge import search

    dev = [f"{code}={_dev(flags.requests, code)}" for code in lexicon.LANGUAGES]
    models = [f"{number}_{_arm(run)}={run}" for number, run in enumerate(flags.runs)]
    settings = search.SearchFlags(
        models=models, held_out=dev, out=str(to), budget=BUDGET, batch_size=_BATCH, seed=flags.seed
    )
    print("\n".join(search.run(settings)))


def _arm(run: str) -> str:
    """Returns the name of the arm of a run in runs/ARM/seed0."""
    return pathlib.Path(run).parent.name


def _dev(requests: str, code: str) -> pathlib.Path:
    return pathlib.Path(requests) / f"dev_{code}.jsonl"


def _merge(flags: argparse.Namespace, to: pathlib.Path) -> None:
    """Merges runs with equal weights; a run that is given twice has twice the weight."""
    counts = collections.Counter(flags.runs)
    _merged(to, flags.method, dict(counts), flags.base if flags.method in _OF_UPDATES else None)


def _strength(flags: argparse.Namespace, to: pathlib.Path) -> None:
    """Merges runs, and goes as far from their shared start in the direction of the merge as the development set says."""
    direction = to.with_name(f"{to.name}.direction")
    shutil.rmtree(direction, ignore_errors=True)  # of a command that was stopped
    _merge(flags, direction)
    lengths = {share: share * len(set(flags.runs)) for share in STRENGTHS}
    losses = dict(zip(lengths, _losses(flags, direction, list(lengths.values())), strict=True))
    best = min(losses, key=lambda share: losses[share])
    _merged(to, "task_arithmetic", {str(direction): lengths[best]}, flags.base)
    found = {"losses": [[share, loss] for share, loss in losses.items()], "best": best}
    (to / STRENGTH).write_text(json.dumps(found) + "\n", "utf-8")


def _losses(flags: argparse.Namespace, direction: pathlib.Path, lengths: Sequence[float]) -> Any:
    """Yields the mean loss over languages, in nats per token of development answers, so far from the start to a run and beyond."""
    import jax

    from espalier.launch.inference import row_files
    from espalier.launch.inference.score import scored_row
    from espalier.launch.load import load_run
    from espalier.trainers.scoring.scoring import Scorer

    with load_run.config_of(str(direction)).load(str(direction)) as run:
        end = jax.device_get(run.params)
    with load_run.config_of(flags.base).load(flags.base) as run:
        rows = {
            code: [
                scored_row(run, row, where)
                for where, row in row_files.read(
                    str(_dev(flags.requests, code)), example="{}", flag="requests"
                )
            ]
            for code in lexicon.LANGUAGES
        }
        start = jax.device_get(run.params)
        scorer = Scorer(run.model, run.params, batch_size=_BATCH, sharding=run.row_sharding)
        for length in lengths:
            moved = jax.tree.map(lambda a, b, w=length: a + w * (b - a), start, end)
            scorer.use(
                jax.tree.map(lambda x, at: jax.device_put(x, at.sharding), moved, run.params)
            )
            yield float(np.mean([-np.concatenate(scorer(some)).mean() for some in rows.values()]))


_OF_UPDATES = ("ties", "task_arithmetic")  # methods that merge what runs have changed of a base


def _merged(to: pathlib.Path, method: str, weights: Mapping[str, float], base: str | None) -> None:
    """Merges runs with these weights by espalier merge."""
    import yaml

    from espalier.launch.merge import __main__ as merge

    models = [{"model": run, "parameters": {"weight": float(w)}} for run, w in weights.items()]
    config: dict[str, Any] = {"merge_method": method, "models": models}
    if base is not None:
        config |= {"base_model": base}
    if method == "ties":
        config |= {"parameters": {"density": 0.5}}
    to.parent.mkdir(parents=True, exist_ok=True)
    path = to.with_name(f"{to.name}.merge.yml")
    path.write_text(yaml.safe_dump(config), "utf-8")
    if status := merge.main([f"--config={path}", f"--out={to}"]):
        raise SystemExit(status)


def read(folder: pathlib.Path, name: str) -> Any:
    """Returns the content of a JSON file that a stage wrote; None without one."""
    path = folder / name
    return json.loads(path.read_bytes()) if path.exists() else None


_STAGES = {
    "requests": _requests,
    "pool": _pool,
    "search": _search,
    "merge": _merge,
    "strength": _strength,
}

if __name__ == "__main__":
    raise SystemExit(main())
