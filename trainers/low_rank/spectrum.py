"""Singular values of factorised matrices during a run, which show the effect of low rank and its decay.

The effective step size is the learning rate divided by |W|_F^2; it matters for a layer before a normalisation. The
effective rank is |W|_* / |W|_2 (Kamalakara et al., arXiv 2209.13569).
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from espalier.common import files
from espalier.common.ranges import Size
from espalier.model.low_rank import factors, lowrank_conv
from espalier.trainers import trainable
from espalier.trainers.checkpoints import state_tree
from espalier.trainers.hooks import Hook, RunContext
from espalier.trainers.telemetry import metric_writers
from espalier.trainers.train_state import TrainState

FILE = "spectra.jsonl"


@dataclasses.dataclass(kw_only=True)
class Spectrum(Hook):
    """A hook that appends singular values to `spectra.jsonl` in the run's directory.

    Its metrics, 'spectrum/effective_rank', 'effective_step', 'frobenius', 'operator' and 'nuclear', are means over all
    matrices; each matrix of a stack counts by itself.

    Attributes:
      run: context of the run, passed by `espalier train`.
      every: updates between readings; there is also one before the first update and one after the last.
      kernels: path patterns of dense kernels to include. A convolution is treated as the matrix [h I, w O] of
        model/low_rank/lowrank_conv.py.

    Raises:
      ValueError: the model has no such matrices, or a pattern matches no kernel.
    """

    run: RunContext
    every: Size = 100
    kernels: Sequence[str] = ()
    at_start = True
    prefix = "spectrum/"

    def __post_init__(self):
        flat = state_tree.flatten(self.run.program.abstract_state.params)
        kernels = [name for name in flat if name.endswith("/kernel") and flat[name].ndim >= 2]
        patterns = {
            p: trainable.expression(p, what="pattern of Spectrum.kernels") for p in self.kernels
        }
        matches = {p: [x for x in kernels if regex.fullmatch(x)] for p, regex in patterns.items()}
        for pattern, names in matches.items():
            if not names:
                raise ValueError(
                    f"spectrum.Spectrum.kernels: {pattern!r} matches no kernel; {len(kernels)} paths look like "
                    f"{', '.join(kernels[:3])}."
                )
        dense = [name for name in kernels if any(name in names for names in matches.values())]
        if not dense and not factors.find_factors(self.run.program.abstract_state.params):
            raise ValueError(
                "spectrum.Spectrum: the model has no factorised matrices. Set `kernels` to patterns of dense ones, "
                "such as '.*/(query|up)/kernel', or empty its slot: hooks.named.spectrum = None."
            )

        convolutions = self.run.program.recipe.inputs_spec.unit == "images"

        def read(params: Any) -> dict[str, jax.Array]:
            flat = state_tree.flatten(params)
            values = {
                factor.path: factors.singular_values(
                    flat[f"{factor.path}/u"], flat[f"{factor.path}/v"]
                )
                for factor in factors.find_factors(params)
            }
            for name in dense:
                kernel = flat[name]
                if convolutions and kernel.ndim == 4:
                    kernel = lowrank_conv.matrix_of(kernel, "spatial")
                values[name.removesuffix("/kernel")] = factors.singular_values_of(kernel)
            return values

        everywhere = NamedSharding(self.run.program.mesh, PartitionSpec())
        self._read = jax.jit(read, out_shardings=everywhere)
        self._last: int | None = None  # the step of the last reading

    def __call__(
        self, step: int, state: TrainState, metrics: Mapping[str, float]
    ) -> Mapping[str, float]:
        del metrics
        values = jax.device_get(self._read(state.params))
        rate = self.run.learning_rate(step)
        layers = {name: array.reshape(-1, array.shape[-1]) for name, array in values.items()}
        if self.run.writer:
            self._write(step, rate, layers)
        each = [row for rows in layers.values() for row in rows]
        return {f"spectrum/{name}": value for name, value in summary(each, rate).items()}

    def _write(self, step: int, rate: float, layers: Mapping[str, np.ndarray]) -> None:
        path = pathlib.Path(self.run.path, FILE)
        # The file may have readings after the checkpoint from which the run resumed, or to which it has been rolled back.
        if (self._last is None or step <= self._last) and path.exists():
            end = min(step, self.run.step + 1) if self._last is None else step
            lines = [line for line in read(self.run.path) if line["step"] < end]
            text = "".join(json.dumps(line) + "\n" for line in lines)
            files.write(path, text, synced=True)  # the readings are nowhere else
        self._last = step
        values = {name: rows.tolist() for name, rows in layers.items()}
        line = {"step": step, "learning_rate": rate, "layers": values}
        files.append(path, json.dumps(line) + "\n", synced=False)  # as rows of metrics


def read(run: str | os.PathLike) -> list[dict[str, Any]]:
    """Returns the readings of a run: 'step', 'learning_rate' and 'layers', path -> singular values of each matrix.

    Raises:
      FileNotFoundError: the run did not use this hook.
    """
    return metric_writers.read_jsonl(os.path.join(run, FILE))


def summary(spectra: Sequence[np.ndarray], rate: float) -> dict[str, float]:
    """Returns means over matrices of statistics of their singular values.

    The effective step uses the mean squared norm, because the step of a single matrix is unbounded as its norm decays
    to 0.
    """
    squares = np.array([np.square(row).sum() for row in spectra])
    return {
        "effective_rank": float(
            np.mean([factors.effective_rank(jnp.asarray(row)) for row in spectra])
        ),
        "effective_step": float(rate / max(squares.mean(), 1e-30)),
        "frobenius": float(np.sqrt(squares).mean()),
        "operator": float(np.mean([row.max() for row in spectra])),
        "nuclear": float(np.mean([row.sum() for row in spectra])),
    }
