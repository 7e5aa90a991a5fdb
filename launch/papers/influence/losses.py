"""Measures the queries' losses of models that were trained on parts of a corpus, and what scores predict of them.

  python -m espalier.launch.papers.influence.losses halves --to=DIR --corpus=CORPUS --scores=SCORES half_00=RUN ...
  python -m espalier.launch.papers.influence.losses removals --to=DIR --corpus=CORPUS without_fact_ekfac=RUN ...

The runs have the names of their files: all halves of the corpus, or all corpora without the top documents of a method. In DIR is
losses.json: for halves, the linear datamodeling scores by method; for removals, how much higher the logarithm of the loss of
the queries is without the top documents of each method than without random ones; and the losses themselves.
"""

if __name__ == "__main__":
    from espalier.launch.papers.influence import losses

    raise SystemExit(losses.main())

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence

import numpy as np
from tqdm.auto import tqdm

from espalier.launch import cli
from espalier.launch.papers.influence import completions, corpus, scoring, statistics
from espalier.launch.papers.influence.small_corpus import Query

RECORD = "losses.json"
KINDS = HALVES, REMOVALS = ("halves", "removals")
DRAWS = 50  # of random scores: one draw's agreement with the losses is chance


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return cli.run_command(__doc__, "losses", _run, add_flags=_add_flags, argv=argv)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=KINDS, help="what the models were trained on")
    parser.add_argument(
        "--to", required=True, metavar="DIR", help="write the results to this folder"
    )
    parser.add_argument(
        "--corpus", required=True, metavar="DIR", help="read the corpus from this folder"
    )
    parser.add_argument(
        "--scores", metavar="DIR", help="read the scores for kind halves from this folder"
    )
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="NAME=RUN",
        help="names and run directories of the retrained models",
    )


def _run(flags: argparse.Namespace) -> None:
    source, target = pathlib.Path(flags.corpus), pathlib.Path(flags.to)
    if (flags.kind == HALVES) != (flags.scores is not None):
        raise ValueError(f"--scores is for {HALVES}, which need it, and for nothing else.")
    asked = corpus.read_queries(source)
    losses = of_runs(dict(word.split("=", 1) for word in flags.runs), asked)
    if flags.kind == HALVES:
        with np.load(pathlib.Path(flags.scores) / scoring.SCORES) as arrays:
            scores = {method: arrays[method] for method in scoring.METHODS}
        found = {"lds": of_halves(losses, scores, corpus.read_halves(source), asked)}
    else:
        found = {"removal": of_removals(losses, asked)}
    by_source = {name: scoring.by_source(values_Q, asked) for name, values_Q in losses.items()}
    target.mkdir(parents=True, exist_ok=True)
    (target / RECORD).write_text(json.dumps({**found, "losses": by_source}) + "\n")


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


def of_halves(
    losses: Mapping[str, np.ndarray],
    scores: Mapping[str, np.ndarray],
    halves_SN: np.ndarray,
    asked: Sequence[Query],
) -> dict[str, dict[str, float]]:
    """Returns method -> linear datamodeling score of all queries and of each group.

    Args:
      losses: name of a half -> losses [Q] of the model that was trained on it.
      scores: method -> scores [N, Q]; those of `scoring.RANDOM` are drawn DRAWS times.
      halves_SN: whether each half has each document.
      asked: the queries.
    """
    halves_SQ = np.stack([losses[name] for name in corpus.half_names()])
    rng = np.random.default_rng(0)
    draws = {str(i): rng.permutation(scores[scoring.RANDOM]) for i in range(DRAWS)}
    lds = statistics.datamodelling({**scores, **draws}, halves_SN, halves_SQ, asked)
    by_draw = [lds.pop(name) for name in draws]
    means = {group: float(np.mean([one[group] for one in by_draw])) for group in by_draw[0]}
    return {**lds, scoring.RANDOM: means}


def of_removals(
    losses: Mapping[str, np.ndarray], asked: Sequence[Query]
) -> dict[str, dict[str, float]]:
    """Returns what was removed -> method -> log of the queries' mean loss over that without random documents.

    The loss without random documents is the mean over the draws; each source of queries counts alike.

    Args:
      losses: name of a corpus -> losses [Q] of the model that was trained on it.
      asked: the queries.
    """
    out: dict[str, dict[str, float]] = {}
    for what, removal in scoring.REMOVED_FOR.items():

        def by_source(method: str, what: str = what) -> dict[str, float]:
            return scoring.by_source(losses[scoring.without(method, what)], asked)

        draws = [by_source(name) for name in scoring.RANDOMS]
        random = {source: np.mean([one[source] for one in draws]) for source in draws[0]}
        out[what] = {}
        for method in (*scoring.REMOVED_BY, *scoring.RANDOMS):
            found = by_source(method)
            ratios = [np.log(found[source] / random[source]) for source in removal.asked]
            out[what][method] = float(np.mean(ratios))
    return out
