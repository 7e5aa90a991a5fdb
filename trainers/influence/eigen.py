"""The second stage of a fit: every covariance is decomposed on one device of the mesh, and only its process reads it.

Shapes: L layers, E experts, n blocks of size s.
"""

import concurrent.futures
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from espalier.common.bars import Bar
from espalier.trainers.checkpoints import agreement
from espalier.trainers.influence import files, kronecker, spread

Unit = tuple[str, tuple[int, ...]]  # a site, and the index [L, E, n] of its covariances
_SIDES = ("a", "s")
_DEVICE = "device"  # of this process, without a mesh


def write(
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
            (path, index)
            for path in sorted(by_site)
            for index in np.ndindex(by_site[path]["a"].shape[:-2])
        ]
        layout: dict[str, Any] = {}
        for path in sorted(by_site):
            for side in _SIDES:
                shape = by_site[path][side].shape
                layout |= {f"{path}:q{side}": (stored, shape)}
                layout |= {f"{path}:l{side}": (np.float64, shape[:-1])}

        def decompose(unit: Unit, device: Any) -> dict[str, np.ndarray]:
            path, (*lead, block) = unit
            index = (*lead, slice(block, block + 1))
            own = {side: by_site[path][side][index] for side in _SIDES}
            own["count"] = by_site[path]["count"][tuple(lead)]
            result = kronecker.eigendecomposition(own, name=path, dtype=dtype, eigh=_eigh(device))
            return {name: x.astype(layout[f"{path}:{name}"][0]) for name, x in result.items()}

        def empty(unit: Unit) -> dict[str, np.ndarray]:
            path, index = unit
            names = ("qa", "la", "qs", "ls")
            wanted = {name: layout[f"{path}:{name}"] for name in names}
            return {n: np.empty((1, *s[len(index) :]), d) for n, (d, s) in wanted.items()}

        def pieces() -> Iterator[tuple[str, int, np.ndarray]]:
            with Bar(total=len(units), desc="eigenvectors", unit="matrix") as progress:
                for (path, index), result in _shared(units, devices or [_DEVICE], decompose, empty):
                    for name, values in result.items():
                        lead = layout[f"{path}:{name}"][1][: len(index)]
                        at = int(np.ravel_multi_index(index, lead)) * values.size
                        yield f"{path}:{name}", at, values
                    progress.update(1)

        files.write_pieces(folder, layout, pieces(), {})


def _shared(
    units: Sequence[Unit],
    devices: Sequence[Any],
    work: Callable[[Unit, Any], Mapping[str, np.ndarray]],
    empty: Callable[[Unit], Mapping[str, np.ndarray]],
) -> Iterator[tuple[Unit, Mapping[str, np.ndarray]]]:
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
            errors = [_error(future) for future in begun if future is not None]
            failed = [error for one in agreement.gather(errors) for error in one if error]
            if failed:  # on every process: one that went on would wait for the others
                raise kronecker.FactorError(failed[0])
            for i, (unit, device) in enumerate(zip(group, devices, strict=False)):
                future, begun[i] = begun[i], None  # memory of a result that is sent is free
                result = empty(unit) if future is None else future.result()
                yield unit, {n: spread.sent(x, owner(device)) for n, x in result.items()}


def _error(future: concurrent.futures.Future[Any]) -> str:
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
