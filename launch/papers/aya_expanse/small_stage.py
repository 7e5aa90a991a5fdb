"""The stages of the small experiment that train nothing: requests, the pool's answers by routing, and the search of weights.

launch/papers/aya_expanse/experiment.py calls it:

  python -m espalier.launch.papers.aya_expanse.small_stage requests --seed=90 --to=DIR
  python -m espalier.launch.papers.aya_expanse.small_stage pool --requests=DIR --runs A B C --seed=90 --to=DIR
  python -m espalier.launch.papers.aya_expanse.small_stage search --requests=DIR --runs A B C --seed=90 --to=DIR
  python -m espalier.launch.papers.aya_expanse.small_stage merge --method=ties --base=DIR --runs A B C --to=RUN
  python -m espalier.launch.papers.aya_expanse.small_stage searched --search=DIR --to=RUN
"""

import argparse
import collections
import json
import pathlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from espalier.launch import cli
from espalier.launch.papers.aya_expanse import lexicon, small_pool
from espalier.launch.papers.aya_expanse.small_pool import write

# Requests of each split in every language.
TUNING, POOL, DEV = 2000, 800, 24
OUTSIDE = 0.1  # share of the requests in other languages that a cluster's teacher sees
ONLINE = 30  # requests of each language in online rounds
BUDGET = 60  # trials of the search


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    name = "papers.aya_expanse.small_stage"
    return cli.run_command(__doc__, name, _run, add_flags=_add_flags, argv=argv)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("stage", choices=tuple(_STAGES))
    parser.add_argument("--requests", metavar="DIR", help="what `requests` wrote")
    parser.add_argument("--search", metavar="DIR", help="what `search` wrote")
    parser.add_argument("--runs", nargs="+", default=[], metavar="DIR", help="runs of the models")
    parser.add_argument("--base", metavar="DIR", help="base of methods that need one")
    parser.add_argument("--method", default="linear", help="merge_method of launch.merge")
    parser.add_argument("--to", required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--seed", type=int, default=0, help="of requests and draws")


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
    prompts = lexicon.requests("pool", POOL, flags.seed)
    write(to / "pool.jsonl", prompts)
    online = prompts[: ONLINE * len(lexicon.LANGUAGES)]
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

    dev = [f"{c}={pathlib.Path(flags.requests) / f'dev_{c}.jsonl'}" for c in lexicon.LANGUAGES]
    models = [f"{number}_{_arm(run)}={run}" for number, run in enumerate(flags.runs)]
    settings = search.SearchFlags(
        models=models, held_out=dev, out=str(to), budget=BUDGET, batch_size=64, seed=flags.seed
    )
    print("\n".join(search.run(settings)))


def _arm(run: str) -> str:
    """Returns the name of the arm of a run in runs/ARM/seed0."""
    return pathlib.Path(run).parent.name


def _merge(flags: argparse.Namespace, to: pathlib.Path) -> None:
    """Merges runs with equal weights; a run that is given twice has twice the weight."""
    import yaml

    counts = collections.Counter(flags.runs)
    models = [{"model": run, "parameters": {"weight": float(n)}} for run, n in counts.items()]
    config: dict[str, Any] = {"merge_method": flags.method, "models": models}
    if flags.base is not None:
        config |= {"base_model": flags.base, "parameters": {"density": 0.5}}
    to.parent.mkdir(parents=True, exist_ok=True)
    path = to.with_name(f"{to.name}.merge.yml")
    path.write_text(yaml.safe_dump(config), "utf-8")
    _merged(path, to)


def _searched(flags: argparse.Namespace, to: pathlib.Path) -> None:
    """Merges with the weights that were found."""
    _merged(pathlib.Path(flags.search) / "merge.yml", to)


def _merged(config: pathlib.Path, to: pathlib.Path) -> None:
    from espalier.launch.merge import __main__ as merge

    if status := merge.main([f"--config={config}", f"--out={to}"]):
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
    "searched": _searched,
}

if __name__ == "__main__":
    raise SystemExit(main())
