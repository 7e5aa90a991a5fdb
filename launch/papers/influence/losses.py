"""Measures the queries' losses of models that were trained on parts of a corpus, and what scores predict of them.

  python -m espalier.launch.papers.influence.losses --to=DIR --corpus=CORPUS --scores=SCORES --model=MODEL half_00=RUN ...

The runs are of all halves of the corpus and of the corpora without the top documents of a method, by the names of their
files. In DIR is losses.json: linear datamodeling scores by method, how much higher the losses of the queries of a
group are without the top documents of each method than without random ones, and the losses themselves.
"""

if __name__ == "__main__":
    from espalier.launch.papers.influence import losses

    raise SystemExit(losses.main())

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from tqdm.auto import tqdm

from espalier.launch import cli
from espalier.launch.papers.influence import completions, corpus, scoring, statistics
from espalier.launch.papers.influence.small_corpus import Query

RECORD = "losses.json"
DRAWS = 50  # of random scores: one draw's agreement with the losses is chance


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return cli.run_command(__doc__, "losses", _run, add_flags=_add_flags, argv=argv)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    for name, what in (
        ("to", "folder to write"),
        ("corpus", "folder of the corpus"),
        ("scores", "folder of the scores"),
        ("model", "run of the model that was scored"),
    ):
        parser.add_argument(f"--{name}", required=True, metavar="DIR", help=what)
    parser.add_argument("runs", nargs="+", metavar="NAME=RUN", help="retrained models")


def _run(flags: argparse.Namespace) -> None:
    runs = dict(word.split("=", 1) for word in flags.runs)
    asked = corpus.read_queries(pathlib.Path(flags.corpus))
    losses = of_runs({"model": flags.model, **runs}, asked)
    halves_SN = corpus.read_halves(pathlib.Path(flags.corpus))
    with np.load(pathlib.Path(flags.scores) / scoring.SCORES) as arrays:
        scores = {method: arrays[method] for method in scoring.METHODS}
    target = pathlib.Path(flags.to)
    target.mkdir(parents=True, exist_ok=True)
    result = of_losses(losses, scores, halves_SN, asked)
    (target / RECORD).write_text(json.dumps(result) + "\n")


def of_runs(runs: Mapping[str, str], asked: Sequence[Query]) -> dict[str, np.ndarray]:
    """Returns run -> the losses [Q] of all queries; the models differ in their parameters alone."""
    from espalier.launch.load import load_run

    measure, out = None, {}
    for name, directory in tqdm(runs.items(), desc="losses", unit="run", disable=None):
        with load_run.config_of(directory).load(directory) as loaded:
            batch = completions.batch_of([completions.query_row(loaded, one) for one in asked])
            measure = measure or completions.measure(loaded.model)
            out[name] = np.asarray(measure(loaded.params, batch)[0], np.float64)
    return out


def of_losses(
    losses: Mapping[str, np.ndarray],
    scores: Mapping[str, np.ndarray],
    halves_SN: np.ndarray,
    asked: Sequence[Query],
) -> dict[str, Any]:
    """Returns {"lds", "removal", "losses"}, as JSON.

    Args:
      losses: run -> losses [Q], of the runs of `main`.
      scores: method -> scores [N, Q]; those of `scoring.RANDOM` are drawn DRAWS times.
      halves_SN: whether each half has each document.
      asked: the queries.
    """
    groups = np.array([query.group for query in asked])
    halves_SQ = np.stack([losses[name] for name in corpus.half_names()])
    removal: dict[str, dict[str, float]] = {}
    for what, wanted in scoring.REMOVED_FOR.items():
        mine_Q = np.isin(groups, wanted)
        random_Q = losses[scoring.without(scoring.RANDOM, what)]
        removal[what] = {
            method: float((losses[scoring.without(method, what)] - random_Q)[mine_Q].mean())
            for method in scoring.REMOVED_BY
        }
    rng = np.random.default_rng(0)
    draws = {str(i): rng.permutation(scores[scoring.RANDOM]) for i in range(DRAWS)}
    lds = statistics.datamodelling({**scores, **draws}, halves_SN, halves_SQ, asked)
    by_draw = [lds.pop(name) for name in draws]
    lds[scoring.RANDOM] = {
        group: float(np.mean([one[group] for one in by_draw])) for group in by_draw[0]
    }
    return {
        "lds": lds,
        "removal": removal,
        "losses": {name: scoring.by_group(values_Q, asked) for name, values_Q in losses.items()},
    }
