"""Searches the weights of a merge of runs by their losses on held-out texts, one file a domain or language, or by any command.

Example, of three runs of one model:

  espalier merge search --models english=/tmp/english python=/tmp/python markup=/tmp/markup \\
      --held_out english=english.jsonl python=python.jsonl --out=/tmp/weights
  espalier merge --config=/tmp/weights/merge.yml --out=/tmp/merged

Files have rows as for espalier score. Equal weights and each model alone are tried first. `coordinate` then changes one weight at a
time to 0, 0.3, 0.5, 0.7 and 1; `random` draws weights. They are then scaled to sum to 1. A domain's loss counts as its ratio to that of the best single model there.
Among the trials whose worst domain is within --delta of the best worst one, that with the lowest mean ratio is chosen. The table
shows also the gain of leaving out each model: a positive number is a collision. --frontier shows the trials that no other dominates
in two domains, such as help and harm, and draws frontier.png; --method=random spreads them. Trials are in trials.jsonl: the same
command continues where it was. Use other texts to report the result.
All models of a linear merge are in memory at once.

--merge=FILE has the method, base and parameters of another merge than a linear one, as a YAML file of espalier merge without models:

  merge_method: ties
  base_model: /tmp/seed
  parameters: {density: 0.5}

A merge that does not divide by the sum of the weights (normalize: false, the default of task_arithmetic, dare_linear, dare_ties,
della_linear, breadcrumbs and breadcrumbs_ties) depends on that sum. The search does not scale its weights: equal weights are 1 each,
and `coordinate` begins at the best of 0.3, 0.5, 0.7 and 1 for all models.

--measure takes numbers of a judge, a reward or a suite, by a command that reads the merged {run} and writes a {json} file; --scores
names those that count. Higher ones are better, or lower ones after a -, as in NAME=-KEY, and a number counts by its gap to that of the
best single model there:

  --measure='espalier evaluate code --checkpoint={run} --problems=HumanEval.jsonl --json={json}' --scores code=pass_at_k/1
"""

import argparse
import collections
import contextlib
import dataclasses
import json
import os
import pathlib
import sys
import tempfile
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

import numpy as np

from espalier.common.storage import paths as storage_paths
from espalier.launch import cli
from espalier.launch.config import setting_flags
from espalier.launch.config.setting_flags import MANY, File, Folder
from espalier.launch.inference import row_files
from espalier.launch.inference.score import scored_row
from espalier.launch.load import load_run
from espalier.launch.load.load_run import EXAMPLE
from espalier.launch.merge import config_file, start, trials
from espalier.launch.merge.candidates import LINEAR, Candidates, Measure
from espalier.launch.merge.models import check_distinct, digests
from espalier.launch.merge.settings import MergeError
from espalier.launch.merge.trials import Trial, Trials, Weights
from espalier.model.transforms import base


@dataclasses.dataclass(frozen=True, kw_only=True)
class SearchFlags:
    """Flags of `espalier merge search`.

    Attributes:
      models: run directories of the models, whose weights are searched.
      held_out: files of held-out rows of each domain, JSON lines.
      scores: numbers of the files of --measure that count, with / between keys; lower ones are better after a -: NAME=-KEY.
      out: write the trials and the merge to this folder.
      merge: YAML file of a merge without models; by default a linear one.
      measure: command that scores a merge, with {run} and {json}; repeatable.
      lower_is_better: whether the numbers of --measure are losses, which count by ratios.
      frontier: also show the trials that no other dominates in the two domains, and draw frontier.png.
      method: how the search proposes weights.
      budget: largest number of trials of the search; equal weights, models alone and the table take a few more.
      seed: random seed of weights.
      delta: how much worse than the best the worst domain may be, as a share of the loss of the best single model there; by
        default its standard error.
      params: which parameters are used: raw, their moving average (ema), or the average where there is one (auto).
      batch_size: number of rows in a batch.
    """

    models: Annotated[Sequence[Annotated[str, "NAME=DIR"]], MANY]
    held_out: Annotated[Sequence[Annotated[str, "NAME=FILE"]], MANY] = ()
    scores: Annotated[Sequence[Annotated[str, "NAME=KEY"]], MANY] = ()
    out: Folder
    merge: File | None = None
    measure: Sequence[str] = ()
    lower_is_better: bool = False
    frontier: bool = False
    method: Literal["coordinate", "random"] = "coordinate"
    budget: int = 60
    seed: int = 0
    delta: float | None = None
    params: Literal["auto", "raw", "ema"] = "auto"
    batch_size: int = 8


def _add_flags(parser: argparse.ArgumentParser) -> None:
    names = [field.name for field in dataclasses.fields(SearchFlags)]
    setting_flags.add(parser, SearchFlags, names=names[:4])
    setting_flags.add(parser.add_argument_group("search"), SearchFlags, names=names[4:])


def run(flags: SearchFlags) -> list[str]:
    """Searches, and returns lines for the user.

    Raises:
      MergeError: models or texts that do not fit.
      LoadError, RowFileError, DamagedCheckpointError, OSError.
    """
    models, held_out = _named("models", flags.models), _named("held_out", flags.held_out)
    if len(models) < 2 or flags.budget < 1:
        raise MergeError("Give at least two --models, and a --budget of at least 1.")
    _check_measure(flags)
    candidates = _candidates(list(models.values()), flags)
    if candidates is None:
        steps = _checked([storage_paths.absolute(path) for path in models.values()])
    else:
        steps = [candidates.steps()[storage_paths.absolute(path)] for path in models.values()]
    scores = _named("scores", flags.scores)
    measure = Measure(flags.measure, scores) if flags.measure else None
    os.makedirs(flags.out, exist_ok=True)
    facts: dict[str, Any] = {
        "models": [[name, step] for name, step in zip(models, steps, strict=True)],
        "held_out": [[name, row_files.digest(path, "held_out")] for name, path in held_out.items()],
        "search": [flags.method, flags.seed, flags.delta, flags.params],
    }
    if candidates is not None:
        equal_weights = candidates.configuration([1.0] * len(models))
        facts["merge"] = [equal_weights, candidates.steps()]
    absolute = candidates is not None and candidates.absolute
    if absolute:
        facts["weights"] = "absolute"
    if measure:
        facts["measure"] = [*measure.commands, measure.keys, flags.lower_is_better]
    higher = measure is not None and not flags.lower_is_better
    with (
        _measured(candidates, measure, flags.out)
        if candidates and measure
        else _evaluator(list(models.values()), held_out, flags, candidates)
    ) as evaluate:
        path = os.path.join(flags.out, "trials.jsonl")
        tried = Trials(path, facts, evaluate, budget=flags.budget, higher=higher, absolute=absolute)
        equal, alone = trials.begin(tried, len(models))
        single = trials.best_single(alone)
        if flags.method == "random":
            trials.random(tried, len(models), seed=flags.seed)
        else:
            trials.coordinate(tried, len(models), delta=flags.delta, single=single)
        best, without = trials.best_with_table(tried, delta=flags.delta, single=single)
    table = trials.table(list(models), best, equal, alone, without)
    named = zip(models, alone, strict=True)
    result = {
        "best": _record(best),
        "equal": _record(equal),
        "alone": {name: _record(trial) for name, trial in named},
        "without": {list(models)[i]: _record(trial) for i, trial in without},
    }
    if flags.frontier:
        lower = [name for name, key in scores.items() if key.startswith("-")]
        every = list(tried.done.values())
        some = trials.frontier(every, *best.losses)
        table += ["", *trials.frontier_table(list(models), some, best, lower)]
        result["frontier"] = [
            {**_record(trial), "merge": _configuration(models, trial, candidates)} for trial in some
        ]
        path = pathlib.Path(flags.out, "frontier.png")
        trials.plot_frontier(path, every, some, best, dict(zip(models, alone, strict=True)), lower)
    written = _write(flags.out, models, best, result, candidates)
    return [*table, written, f"{len(tried.done)} trials, {tried.new} of them new"]


def _record(trial: Trial) -> dict[str, Any]:
    """Returns the JSON form of a trial."""
    return {"weights": trial.weights, "losses": trial.losses, "errors": trial.errors}


def _check_measure(flags: SearchFlags) -> None:
    """Raises MergeError unless there is one measure, and every flag has an effect."""
    if bool(flags.held_out) == bool(flags.measure):
        raise MergeError("Give either --held_out, or --measure with --scores.")
    if bool(flags.measure) != bool(flags.scores):
        raise MergeError("--measure and --scores go together: give both, or --held_out.")
    if flags.frontier and len(flags.scores or flags.held_out) != 2:
        raise MergeError("--frontier compares two numbers: give two --scores or --held_out.")
    if flags.lower_is_better and not flags.measure:
        raise MergeError(
            "--lower_is_better is of --measure: losses on --held_out are lower anyway."
        )
    if flags.lower_is_better and any("=-" in score for score in flags.scores):
        raise MergeError("--lower_is_better is of all --scores: remove it, or the - before a key.")
    if flags.measure and flags.batch_size != SearchFlags.batch_size:
        raise MergeError("--batch_size is of --held_out: the command of --measure has its own.")
    if flags.params != "auto" and (flags.merge or flags.measure):
        raise MergeError(
            f"--params={flags.params}: espalier merge reads the average of a run that has one: remove it."
        )


def _candidates(paths: Sequence[str], flags: SearchFlags) -> Candidates | None:
    """Returns the merges to search as `espalier merge` makes them; None for linear ones, which are made in memory."""
    if not flags.merge and not flags.measure:
        return None
    content = config_file.content(flags.merge) if flags.merge else LINEAR
    return Candidates(flags.merge or "--models", content, paths)


def _named(flag: str, entries: Sequence[str]) -> dict[str, str]:
    named = {}
    for entry in entries:
        name, equals, path = entry.partition("=")
        if not (name and equals and path) or name in named:
            raise MergeError(f"--{flag} {entry}: give NAME=PATH, each name once.")
        named[name] = path
    return named


def _checked(paths: Sequence[str]) -> list[str]:
    """Returns the steps of runs that can be merged."""
    entries = [{"model": path} for path in dict.fromkeys(paths)]
    merge = config_file.one({"merge_method": "linear", "models": entries}, name="--models")
    opened = start.opened(merge)
    check_distinct(merge.file, digests(opened))
    return [" ".join(map(str, opened[path].fingerprint())) for path in paths]


@contextlib.contextmanager
def _measured(candidates: Candidates, measure: Measure, out: str) -> Any:
    """Context manager: yields the function that returns numbers of weights from a command."""

    def evaluate(weights: Weights) -> Mapping[str, tuple[float, float]]:
        with tempfile.TemporaryDirectory(dir=out) as folder:
            return measure(candidates.on_disk(weights, folder), folder)

    yield evaluate


@contextlib.contextmanager
def _evaluator(
    paths: Sequence[str],
    held_out: Mapping[str, str],
    flags: SearchFlags,
    candidates: Candidates | None,
) -> Any:
    """Context manager: yields the function that returns losses of weights."""
    import jax

    from espalier.trainers.checkpoints.restore_params import restore_params
    from espalier.trainers.scoring.scoring import Scorer

    every = [] if candidates else [_params(path, flags.params) for path in paths]
    with load_run.config_of(paths[0]).load(
        paths[0], params=flags.params, encoder_decoders=True
    ) as loaded:
        rows = {
            name: [
                scored_row(loaded, row, where)
                for where, row in row_files.read(path, example=EXAMPLE, flag="held_out")
            ]
            for name, path in held_out.items()
        }
        for name, of_domain in rows.items():
            if not any(len(row.targets) for row in of_domain):
                raise MergeError(f"--held_out {name}: {held_out[name]} has no tokens: give texts.")
        size = loaded.batch_size(flags.batch_size, max(map(len, rows.values())))
        scorer = Scorer(loaded.model, loaded.params, batch_size=size, sharding=loaded.row_sharding)
        placed = loaded.params

        def merged(weights: Weights) -> Any:
            if candidates:
                return restore_params(paths[0], placed, computed=candidates.merged(weights))
            return jax.tree.map(
                lambda leaf, *leaves: jax.device_put(_mean(weights, leaves), leaf.sharding),
                placed,
                *every,
            )

        def evaluate(weights: Weights) -> dict[str, tuple[float, float]]:
            scorer.use(merged(weights))
            return {name: _loss(scorer(of_domain)) for name, of_domain in rows.items()}

        yield evaluate


def _params(path: str, params: str) -> Any:
    """Returns a run's parameters as host arrays; MergeError if a value is not finite."""
    import jax
    from flax import traverse_util

    print(f"reading {path}", file=sys.stderr, flush=True)
    with load_run.config_of(path).load(path, params=params, encoder_decoders=True) as loaded:
        arrays = jax.device_get(loaded.params)
    for name, values in traverse_util.flatten_dict(arrays, sep="/").items():
        if problem := base.not_finite(np.asarray(values)):
            raise MergeError(f"--models {path}: {name} has {problem}: use another checkpoint.")
    return arrays


def _mean(weights: Weights, leaves: Sequence[np.ndarray]) -> np.ndarray:
    """Returns the mean as `linear` computes it."""
    total = sum(
        np.float32(w) * np.asarray(x, np.float32) for w, x in zip(weights, leaves, strict=True) if w
    )
    return np.asarray(total / np.float32(sum(weights))).astype(leaves[0].dtype)


def _loss(log_probs: Sequence[np.ndarray]) -> tuple[float, float]:
    """Returns the mean loss of a token, and its standard error over rows."""
    sums = np.array([-x.sum(dtype=np.float64) for x in log_probs])
    counts = np.array([x.size for x in log_probs], np.float64)
    mean = sums.sum() / counts.sum()
    spread = np.sqrt(np.square(sums - mean * counts).sum()) / counts.sum()
    return float(mean), float(spread)


def _write(
    out: str,
    models: Mapping[str, str],
    best: Trial,
    result: Mapping[str, Any],
    candidates: Candidates | None = None,
) -> str:
    """Writes merge.yml and search.json, and returns a line on them."""
    import yaml

    config = _configuration(models, best, candidates)
    folder = pathlib.Path(out)
    (folder / "merge.yml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    (folder / "search.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    return f"weights in {folder / 'merge.yml'}"


def _configuration(
    models: Mapping[str, str], best: Trial, candidates: Candidates | None
) -> dict[str, Any]:
    """Returns the configuration of the merge with a trial's weights."""
    if candidates:
        return candidates.configuration(best.weights)
    weights: collections.Counter[str] = collections.Counter()
    for path, weight in zip(models.values(), best.weights, strict=True):
        # A model that is given twice has both weights.
        weights[storage_paths.absolute(path)] += weight
    entries = [
        {"model": path, "parameters": {"weight": weight}}
        for path, weight in weights.items()
        if weight
    ]
    return {"merge_method": "linear", "models": entries}


def _run(flags: argparse.Namespace) -> None:
    print("\n".join(run(SearchFlags(**setting_flags.given(flags, SearchFlags)))))


main = cli.command(__doc__, "merge search", _run, add_flags=_add_flags)

if __name__ == "__main__":
    raise SystemExit(main())
