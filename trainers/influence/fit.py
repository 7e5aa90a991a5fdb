"""Fits EK-FAC factors in three stages, each of which is on disk once it is done and continues after a stop.

covariances: sums of a a^T and g g^T over the tokens of all documents.
eigen:       their eigenvectors and eigenvalues.
squares:     the corrected eigenvalues, from a second pass with labels of other draws.

Labels are drawn by document and position, and sums are saved between windows of documents, so that a continued fit equals
an uninterrupted one bit for bit.
"""

import contextlib
import dataclasses
import functools
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from espalier.common.bars import Bar
from espalier.trainers.checkpoints import agreement
from espalier.trainers.influence import documents, eigen, files, kronecker, spread
from espalier.trainers.influence.backward import backward
from espalier.trainers.influence.consumers import Consumer, Covariances, Squares
from espalier.trainers.influence.kronecker import Precision
from espalier.trainers.influence.settings import FitSettings
from espalier.trainers.influence.sites import Site, select
from espalier.trainers.scoring.scoring import Row

STAGES = ("covariances", "eigen", "squares")
SAVE_SECONDS = 300.0  # between two saves of an unfinished sum
_PARTIAL = ".partial"
UNFINISHED = (f"covariances{_PARTIAL}", f"squares{_PARTIAL}")  # folders of unfinished sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class Reader:
    """How a model reads documents.

    Attributes:
      model, params: a language model and its parameters.
      batch_size: rows of a batch.
      sharding: sharding of a batch's rows; calls must be within its mesh. None on one device.
    """

    model: Any
    params: Any
    batch_size: int
    sharding: NamedSharding | None = None
    _programs: dict[Any, Any] = dataclasses.field(default_factory=dict, init=False, repr=False)

    @property
    def whole(self) -> NamedSharding | None:
        """The sharding of results, which every device has whole."""
        return None if self.sharding is None else NamedSharding(self.sharding.mesh, PartitionSpec())

    def compiled(self, sites: Mapping[str, Site], consumer: Consumer) -> Callable[..., Any]:
        """Returns `backward` of the sites, compiled: called with (params, inputs, batch, key)."""

        def run(params: Any, inputs: Any, batch: Any, key: Any) -> Any:
            return backward(self.model, sites, consumer, params, inputs, batch, key=key)

        out_shardings: Any = self.whole
        if consumer.matrices and self.sharding is not None:
            zeros = {p: functools.partial(consumer.zeros, site, 1, 1) for p, site in sites.items()}
            shapes = {p: jax.eval_shape(make) for p, make in zeros.items()}
            out_shardings = (spread.shardings(self.sharding.mesh, shapes), self.whole)
        key = (tuple(sites), consumer)
        return self._programs.setdefault(key, jax.jit(run, out_shardings=out_shardings))

    def place(self, arrays: Any) -> Any:
        return documents.placed(arrays, self.sharding)

    def place_spread(self, arrays: Any) -> Any:
        """Returns sums, eigenvectors and queries, arrays or tensors of files, on the devices, which have a part of each."""

        def place(x: Any) -> jax.Array:
            if self.sharding is None:
                return jax.device_put(np.asarray(x))
            # Each process reads its own parts. `device_put` would compare the whole array between processes.
            own = spread.sharding(self.sharding.mesh, x.shape)
            return jax.make_array_from_callback(x.shape, own, lambda index: x[index])

        return jax.tree.map(place, arrays)

    def batches(self, rows: Sequence[Row], first: int) -> Any:
        return documents.batches(
            rows, first=first, batch_size=self.batch_size, limit=self.model.max_length
        )


def fit(
    reader: Reader,
    folder: pathlib.Path,
    read_documents: Callable[[], Iterable[Row]],
    settings: FitSettings,
    *,
    total: int | None = None,
    saved: Callable[[], None] = lambda: None,
) -> None:
    """Fits all stages that `folder` does not have yet.

    Args:
      reader: model and batches.
      folder: folder of the stages.
      read_documents: returns the documents from the first on, and the same ones at each call.
      total: their number, for progress and remaining time.
      saved: called after each stage.

    Raises:
      SiteError: modules that cannot be tapped.
      FactorError: there are no tokens, or a covariance is not finite.
    """
    sites = select(reader.model, reader.params, settings.modules)
    sums = functools.partial(_sums, reader, read_documents, settings, total=total)
    if not files.exists(folder / "covariances"):
        consumer = Covariances(settings.blocks, settings.sum_dtype)
        result, count = sums(sites, consumer, {}, folder / "covariances", stage=0)
        files.write(folder / "covariances", files.named(result), count)
        saved()
    if not files.exists(folder / "eigen"):
        wide = np.dtype(settings.sum_dtype)
        eigen.write(
            *(folder / "covariances", folder / "eigen"),
            devices=None if reader.sharding is None else [*reader.sharding.mesh.devices.flat],
            dtype=wide,
            stored=jnp.bfloat16 if settings.factor_dtype == "bfloat16" else wide,
        )
        saved()
    if not files.exists(folder / "squares"):
        with files.opened(folder / "eigen") as (tensors, _):
            kinds = files.by_site(tensors)
            inputs = reader.place_spread({p: {n: kinds[p][n] for n in ("qa", "qs")} for p in sites})
        squares = Squares(settings.blocks, settings.sum_dtype, settings.precision)
        result, count = sums(sites, squares, inputs, folder / "squares", stage=1)

        def mean(part: np.ndarray) -> np.ndarray:
            return (part.astype(np.float64) / count["documents"]).astype(part.dtype)

        files.write(folder / "squares", files.named(result), count, finish=mean)
        saved()
    for stage in STAGES:
        # Only now: a stop before a stage is written would lose its sum.
        files.remove(_partial(folder / stage))


def _partial(target: pathlib.Path) -> pathlib.Path:
    """Returns the folder of a stage's unfinished sum."""
    return target.with_name(f"{target.name}{_PARTIAL}")


def _sums(
    reader: Reader,
    read_documents: Callable[[], Iterable[Row]],
    settings: FitSettings,
    sites: Mapping[str, Site],
    consumer: Consumer,
    inputs: Mapping[str, Any],
    target: pathlib.Path,
    *,
    stage: int,
    total: int | None,
) -> tuple[dict[str, dict[str, Any]], dict[str, int]]:
    """Returns sums of a consumer's results over all documents, by site and kind, and the numbers of documents and tokens."""
    key = None
    if settings.labels == "sampled":
        key = jax.random.fold_in(jax.random.key(settings.seed), stage)
    run = reader.compiled(sites, consumer)
    add = jax.jit(lambda x, y: jax.tree.map(jnp.add, x, y), donate_argnums=0)
    partial = _partial(target)
    state, counts = None, {"read": 0, "documents": 0, "tokens": 0}
    if files.exists(partial):
        with files.opened(partial) as (tensors, record):
            state = reader.place_spread(files.by_site(tensors))
        counts = {name: record[name] for name in counts}
    saved = time.monotonic()
    rows = iter(read_documents())
    skipped = sum(1 for _ in zip(range(counts["read"]), rows, strict=False))
    with Bar(desc=target.name, unit="document", total=total, initial=skipped) as progress:
        for window in documents.windows(rows, reader.batch_size):
            for indices, arrays in reader.batches(window, counts["read"]):
                results, nll_BT = run(reader.params, inputs, reader.place(arrays), key)
                results = {
                    path: kinds if isinstance(kinds, Mapping) else {"squares": kinds}
                    for path, kinds in results.items()
                }
                state = results if state is None else add(state, results)
                counts["documents"] += len(indices)
                counts["tokens"] += int(arrays["decoder_loss_weights"].sum())
                progress.update(len(indices))
            counts["read"] += len(window)
            # All processes save together, so they follow the clock of the first.
            due = agreement.gather(time.monotonic() - saved > SAVE_SECONDS)[0]
            if due and state is not None:
                files.write(partial, files.named(state), counts)
                saved = time.monotonic()
    if state is None:
        raise kronecker.FactorError(
            "The documents have no token to predict: give documents of two tokens or more."
        )
    return state, counts


def read_curvature(
    folder: pathlib.Path,
    sites: Mapping[str, Site],
    strategy: kronecker.Strategy,
    damping: kronecker.Damping,
    *,
    reader: Reader | None = None,
    precision: Precision = "highest",
) -> kronecker.Curvature:
    """Returns the curvature of fitted stages, split over the devices of a reader's mesh; `precision` is of its rotations.

    Raises:
      StageError: a stage is missing or damaged.
    """
    with contextlib.ExitStack() as stack:

        def opened(stage: str) -> dict[str, dict[str, files.Tensor]]:
            return files.by_site(stack.enter_context(files.opened(folder / stage))[0])

        vectors, squares = opened("eigen"), None
        if strategy == "ekfac":
            squares = {path: kinds["squares"] for path, kinds in opened("squares").items()}
        wide = next(iter(vectors.values()))["qa"].dtype == np.float64
        on_mesh = reader is not None and reader.sharding is not None
        return kronecker.Curvature.of(
            *(sites, vectors, squares, damping),
            dtype=np.float64 if wide else np.float32,
            place=reader.place_spread if reader is not None and on_mesh else np.asarray,
            precision=precision,
        )


def tokens_of_experts(folder: pathlib.Path, sites: Mapping[str, Site]) -> dict[str, list[int]]:
    """Returns the fewest and most tokens of an expert, by site of experts."""
    with files.opened(folder / "covariances") as (tensors, _):
        own = {p: tensors[f"{p}:count"] for p, s in sites.items() if s.experts is not None}
        counts = {path: np.asarray(count) for path, count in own.items()}
    return {p: [math.floor(c.min()), math.floor(c.max())] for p, c in counts.items()}
