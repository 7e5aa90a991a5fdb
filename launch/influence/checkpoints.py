"""Several checkpoints of one run: each is fitted and scored by itself, and then their scores are added.

With the learning rates as weights and the method `identity`, the sum is TracIn's (Pruthi et al., arXiv 2002.08484); by default it is
the mean.

Shapes: N documents, Q queries, K checkpoints.
"""

import dataclasses
import itertools
import json
import math
import pathlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.common.storage import paths
from espalier.launch.config.setting_flags import Names
from espalier.launch.inference import row_files
from espalier.launch.influence import outputs
from espalier.launch.load.load_run import LoadError

# Of the record of one checkpoint's scores.
_OWN = ("model", "factors", "notes", "sha256", "record_sha256")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Several:
    """Which checkpoints are used.

    Attributes:
      checkpoints: several checkpoints of one run, with commas, instead of --checkpoint: factors and scores of each, named as its
        folder is.
      checkpoint_weights: what the scores of each are multiplied by before they are added, such as its learning rate; with commas
        (default: their mean).

    Raises:
      LoadError: two have the same name, there is only one, or weights do not fit.
    """

    checkpoints: Names | None = None
    checkpoint_weights: Names | None = None

    def __post_init__(self):
        if self.checkpoints is None:
            if self.checkpoint_weights is not None:
                raise LoadError(
                    "--checkpoint_weights are of several checkpoints: add --checkpoints=DIR,DIR, or remove it."
                )
            return
        names = self.names
        for name in names:
            if not name or names.count(name) > 1:
                raise LoadError(
                    f"--checkpoints={','.join(self.checkpoints)}: each folder must have a name of its own, and {name!r} is not."
                )
        if len(names) < 2:
            raise LoadError(f"--checkpoints={names[0]} is one checkpoint: give it as --checkpoint.")
        if len(self.weights) != len(names) or not all(
            math.isfinite(w) and w > 0 for w in self.weights
        ):
            raise LoadError(
                f"--checkpoint_weights={','.join(self.checkpoint_weights or ())} must be {len(names)} numbers above 0, one for each "
                "checkpoint."
            )

    @property
    def names(self) -> list[str]:
        return [path.rstrip("/").rpartition("/")[2] for path in self.checkpoints or ()]

    @property
    def weights(self) -> list[float]:
        """The weights; empty for texts that are no numbers."""
        if self.checkpoint_weights is None:
            return [1 / len(self.names)] * len(self.names)
        try:
            return [float(text) for text in self.checkpoint_weights]
        except ValueError:
            return []

    def folders(self, factors: str) -> list[str]:
        """Returns the folder of each checkpoint's factors."""
        return [paths.join(factors, name) for name in self.names]

    def scores(self, out: str) -> list[str]:
        """Returns the file of each checkpoint's scores, beside `out`."""
        return [f"{out}.{name}" for name in self.names]


def score_each(
    score: Callable[..., None], several: Several, factors: str | None, out: str, *, top: int
) -> None:
    """Scores documents by each checkpoint, and then adds the scores up.

    Args:
      score: `score` of launch/influence/score.py, called with the arguments that name a checkpoint and its files.
      several: the checkpoints.
      factors: folder that `fit` wrote for them; None without.
      out, top: see `add_up`.
    """
    assert several.checkpoints is not None
    if not paths.is_remote(out):
        outputs.check_earlier(out, _record(several), out)  # before hours of work
    fitted = several.folders(factors) if factors else [None] * len(several.checkpoints)
    places = [*zip(several.checkpoints, fitted, several.scores(out), strict=True)]
    for checkpoint, folder, path in places[:-1]:
        score(checkpoint=checkpoint, factors=folder, out=path)

    def finish(documents: Any) -> None:
        count = add_up(several, out, top=top, texts=documents.texts)
        if count:
            print(f"{count:,} documents have the scores of {len(places)} checkpoints: {out}")

    checkpoint, folder, path = places[-1]
    score(checkpoint=checkpoint, factors=folder, out=path, finish=finish)


def add_up(
    several: Several,
    out: str,
    *,
    top: int,
    texts: Callable[[Collection[int]], Iterable[Mapping[str, Any]]],
) -> int:
    """Writes the sums of the checkpoints' scores to `out`, in the form of `score`, and returns the number of documents.

    A row also has `by_checkpoint` [K, Q], the scores before they are multiplied by the weights.

    Args:
      several: the checkpoints, whose scores are beside `out`.
      out: write the scores to this file of JSON lines.
      top: see `score`.
      texts: returns {"document": number, "text": text} of documents that come without a text.

    Raises:
      LoadError: scores of different queries, documents or settings, or `out` is another file.
      RowFileError: scores are damaged or not complete.
    """
    from espalier.trainers.checkpoints import agreement
    from espalier.trainers.influence import queries

    parts = [outputs.local_scores(path) for path in several.scores(out)]
    sets, records = zip(
        *(queries.load(pathlib.Path(outputs.queries_folder(path))) for path in parts), strict=True
    )
    shared = [{k: v for k, v in record.items() if k not in _OWN} for record in records]
    for path, record in zip(parts, shared, strict=True):
        if names := sorted(name for name in record if record[name] != shared[0].get(name)):
            raise LoadError(
                f"{path} has scores of other {', '.join(names)} than {parts[0]}: delete one of them, and score again."
            )
    weights_K, writer = np.asarray(several.weights), agreement.is_primary()
    with outputs.opened(out, beside=True) as (path, push):
        folder = pathlib.Path(outputs.queries_folder(path))
        outputs.check_earlier(path, _record(several), out)
        total = queries.QuerySet(
            inputs={},
            nats=_mean([one.nats for one in sets], weights_K),
            norms=_mean([one.norms for one in sets], weights_K),
            kept=np.min([one.kept for one in sets], 0),
            pearson=np.min([one.pearson for one in sets], 0),
        )
        models = [record.get("model") for record in records]
        queries.save(folder, total, {**shared[0], **_record(several), "models": models})
        count = 0
        if writer:
            count = sum(1 for _ in outputs.read_rows(parts[0]))
            row_files.write(path, _sums(parts, weights_K))
            outputs.write_top(path, top=top)
            tops = outputs.read_top(path)
            shown = {i for chosen in outputs.shown(tops, top) for i in chosen}
            row_files.write(outputs.texts_file(path), texts(shown))
        push()
    return count


def _record(several: Several) -> dict[str, Any]:
    return {"checkpoints": several.names, "checkpoint_weights": several.weights}


def _mean(values: Sequence[np.ndarray], weights_K: np.ndarray) -> np.ndarray:
    return np.average(np.stack(values), axis=0, weights=weights_K)


def _sums(parts: Sequence[str], weights_K: np.ndarray) -> Iterator[dict[str, Any]]:
    """Yields the rows of scores that are added up."""
    for number, rows in enumerate(itertools.zip_longest(*map(outputs.read_rows, parts)), 1):
        if None in rows:
            short = parts[rows.index(None)]
            raise row_files.RowFileError(
                f"{short} is not complete, it has {number - 1:,} rows: run the same `espalier influence score` command again, and it "
                "writes the rest."
            )
        summed = {**rows[0], "scores": _sum([row["scores"] for row in rows], weights_K)}
        summed.pop("norm", None)
        if all(row.get("norm") is not None for row in rows):
            summed["norm"] = _sum([row["norm"] for row in rows], weights_K)
        if rows[0].get("layers"):
            summed["layers"] = {
                name: _sum([row["layers"][name] for row in rows], weights_K)
                for name in rows[0]["layers"]
            }
        yield {**summed, "by_checkpoint": [row["scores"] for row in rows]}


def _sum(values: Sequence[Any], weights_K: np.ndarray) -> Any:
    return np.tensordot(weights_K, np.asarray(values, np.float64), 1).tolist()


def first(several: Several, checkpoint: str | None) -> str:
    """Returns the checkpoint whose configuration a command reads: the only one, or the first of several of one model.

    Raises:
      LoadError: there is none, both flags are given, or the checkpoints record different models.
    """
    if several.checkpoints is None:
        if checkpoint is None:
            raise LoadError("Give --checkpoint=DIR, or several as --checkpoints=DIR,DIR.")
        return checkpoint
    if checkpoint is not None:
        raise LoadError("Give either --checkpoint=DIR or --checkpoints=DIR,DIR.")
    models = [_model_of(checkpoint) for checkpoint in several.checkpoints]
    for path, model in zip(several.checkpoints, models, strict=True):
        if model != models[0]:
            raise LoadError(
                f"--checkpoints: {path} records another model than {several.checkpoints[0]}: give checkpoints of one run."
            )
    return several.checkpoints[0]


def _model_of(checkpoint: str) -> Any:
    """Returns the recorded description of a checkpoint's model."""
    from espalier.launch.config import model_file
    from espalier.launch.load import load_run

    recorded = (x for x in load_run.files_of(checkpoint) if x.endswith(model_file.NAME))
    return [json.loads(pathlib.Path(path).read_text("utf-8")) for path in recorded]
