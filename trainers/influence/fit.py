"""Fits EK-FAC factors in three stages, each of which is on disk once it is done and continues after a stop.

covariances: sums of a a^T and g g^T over the tokens of all documents.
eigen:       their eigenvectors and eigenvalues; every covariance is decomposed on one device of the mesh, and only its process
             reads it.
squares:     the corrected eigenvalues, from a second pass with labels of other draws.

Labels are drawn by document and position, and sums are saved between windows of documents, so that a continued fit equals
an uninterrupted one bit for bit.

Shapes: L layers, E experts, n blocks of size s.
"""

import concurrent.futures
import contextlib
import functools
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from espalier.common.bars import Bar
from espalier.trainers.checkpoints import agreement
from espalier.trainers.influence import files, kronecker, spread
from espalier.trainers.influence.consumers import Consumer, Covariances, Squares
from espalier.trainers.influence.documents import Reader, windows
from espalier.trainers.influence.kronecker import Precision
from espalier.trainers.influence.settings import FitSettings
from espalier.trainers.influence.sites import Site, select
from espalier.trainers.scoring.scoring import Row

STAGES = ("covariances", "eigen", "squares")
SAVE_SECONDS = 300.0  # between two saves of an unfinished sum
_PARTIAL = ".partial"
UNFINISHED = (f"covariances{_PARTIAL}", f"squares{_PARTIAL}")  # folders of unfinished sums
_Unit = tuple[
    str, str, tuple[int, ...]
]  # a site, a side, and the index [L, E, n] of its covariance
_SIDES = ("a", "s")
_DEVICE = "device"  # of this process, without a mesh


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
        write_eigen(
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
        for window in windows(rows, reader.batch_size):
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
    """Returns the curvature of fitted stages, rotated in `precision` and split over the devices of a reader's mesh.

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


def write_eigen(
    covariances: pathlib.Path,
    folder: pathlib.Path,
    *,
    devices: Sequence[Any] | None,
    dtype: Any,
    stored: Any,
) -> None:
    """Writes eigenvectors `qa`, `qs` and eigenvalues `la`, `ls` of the covariances in a folder. Every process must call it.

    Args:
      covariances: folder of the first stage.
      folder: folder to write.
      devices: of the mesh, of all processes in one order; None without a mesh.
      dtype, stored: dtype that eigenvectors are rounded to, and then that of the file; eigenvalues are float64.

    Raises:
      FactorError: a covariance is not finite.
    """
    with files.opened(covariances) as (tensors, _):
        by_site = files.by_site(tensors)
        units = [
            (path, side, index)
            for path in sorted(by_site)
            for side in _SIDES
            for index in np.ndindex(by_site[path][side].shape[:-2])
        ]
        layout: dict[str, Any] = {}
        for path in sorted(by_site):
            for side in _SIDES:
                shape = by_site[path][side].shape
                layout |= {f"{path}:q{side}": (stored, shape)}
                layout |= {f"{path}:l{side}": (np.float64, shape[:-1])}

        def decompose(unit: _Unit, device: Any) -> dict[str, np.ndarray]:
            path, side, (*lead, block) = unit
            own = {side: by_site[path][side][(*lead, slice(block, block + 1))]}
            own["count"] = by_site[path]["count"][tuple(lead)]
            result = kronecker.eigendecomposition(own, name=path, dtype=dtype, eigh=_eigh(device))
            return {name: x.astype(layout[f"{path}:{name}"][0]) for name, x in result.items()}

        def empty(unit: _Unit) -> dict[str, np.ndarray]:
            path, side, index = unit
            wanted = {name: layout[f"{path}:{name}"] for name in (f"q{side}", f"l{side}")}
            return {n: np.empty((1, *s[len(index) :]), d) for n, (d, s) in wanted.items()}

        def pieces() -> Iterator[tuple[str, int, np.ndarray]]:
            with Bar(total=len(units), desc="eigenvectors", unit="matrix") as progress:
                for (path, _, index), result in _shared_out(
                    units, devices or [_DEVICE], decompose, empty
                ):
                    for name, values in result.items():
                        lead = layout[f"{path}:{name}"][1][: len(index)]
                        at = int(np.ravel_multi_index(index, lead)) * values.size
                        yield f"{path}:{name}", at, values
                    progress.update(1)

        files.write_pieces(folder, layout, pieces(), {})


def _shared_out(
    units: Sequence[_Unit],
    devices: Sequence[Any],
    work: Callable[[_Unit, Any], Mapping[str, np.ndarray]],
    empty: Callable[[_Unit], Mapping[str, np.ndarray]],
) -> Iterator[tuple[_Unit, Mapping[str, np.ndarray]]]:
    """Yields every unit with its result, in order, on every process, whichever process did the work.

    As many units are worked on at a time as there are devices, for their memory.
    """
    own = jax.process_index()

    def owner(device: Any) -> int:
        return own if device is _DEVICE else device.process_index

    mine = sum(owner(device) == own for device in devices)
    with concurrent.futures.ThreadPoolExecutor(max(1, mine)) as threads:
        for first in range(0, len(units), len(devices)):
            group = units[first : first + len(devices)]
            begun = [
                threads.submit(work, unit, device) if owner(device) == own else None
                for unit, device in zip(group, devices, strict=False)
            ]
            errors = [_factor_error(future) for future in begun if future is not None]
            failed = [error for one in agreement.gather(errors) for error in one if error]
            if failed:  # on every process: one that went on would wait for the others
                raise kronecker.FactorError(failed[0])
            for i, (unit, device) in enumerate(zip(group, devices, strict=False)):
                future, begun[i] = begun[i], None  # memory of a result that is sent is free
                result = empty(unit) if future is None else future.result()
                yield unit, {n: spread.sent(x, owner(device)) for n, x in result.items()}


def _factor_error(future: concurrent.futures.Future[Any]) -> str:
    """Waits for work, and returns its FactorError as text; raises any other error."""
    try:
        future.result()
    except kronecker.FactorError as error:
        return str(error)
    return ""


def _eigh(device: Any) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
    """Returns what decomposes symmetric matrices [n, s, s] in float64 on a device; TPUs, which have none, leave it to their host."""
    if device is _DEVICE or device.platform == "tpu":
        return np.linalg.eigh

    def eigh(stack: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        # Within the mesh of all devices, a program cannot be on one of them.
        with jax.enable_x64(True), jax.set_mesh(Mesh(np.array([device]), ("one",))):
            values, vectors = jnp.linalg.eigh(jax.device_put(stack, device))
            return np.asarray(values), np.asarray(vectors)

    return eigh
