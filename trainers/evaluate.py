"""Held-out loss per task: summed over every token or image once, divided once."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding

from espalier.common.bars import Bar
from espalier.trainers.batches import Stream, global_batch
from espalier.trainers.hooks import Hook, HookInterruptedError
from espalier.trainers.objectives.base import Batch
from espalier.trainers.step import Metrics
from espalier.trainers.train_state import TrainState


class EvalStream(Stream, Protocol):
    """A finite stream over one task split; rows past its end weigh nothing."""

    name: str
    num_steps: int  # in an order that makes any first part of them a fair sample of the split
    # UTF-8 bytes of text per target token of the whole split, for bits per byte; 0 if unknown.
    bytes_per_token: float


def evaluate(
    eval_step: Callable[[Any, Batch, Any], Metrics],
    params: Any,
    stream: EvalStream,
    sharding: NamedSharding,
    *,
    variables: Any = None,
    max_steps: int | None = None,
    stop: Callable[[int], bool] = lambda batches: False,
    unit: str = "tokens",
) -> dict[str, float]:
    """Averages the objective's scalar metrics over a split.

    Args:
      eval_step: compiled (params, batch, variables) -> metrics.
      sharding: of input arrays.
      variables: the other collections of the state, such as batch statistics.
      max_steps: batches to read at most; None for the whole split.
      stop: called with the index of each batch before it is read; True interrupts.
      unit: unit of the loss, 'tokens', 'images' or 'pairs'.

    Returns:
      The metrics per unit, the number of units, and for a 'loss' in nats per token also 'perplexity'
      and, where the split's text size is known, 'bits_per_byte' (by the whole split's bytes per token,
      so with `max_steps` an estimate).

    Raises:
      HookInterruptedError: `stop` returned True.
    """
    steps = stream.num_steps if max_steps is None else min(max_steps, stream.num_steps)
    late: Metrics = {}
    totals: dict[str, np.ndarray] = {}

    def collect(metrics: Metrics) -> None:
        for name, pair in jax.device_get(metrics).items():
            if np.ndim(pair[0]) == 0:
                # float64 on the host: many batches are added up.
                totals[name] = totals.get(name, np.zeros(2)) + np.asarray(pair, np.float64)

    for step in Bar(range(steps), desc=f"eval {stream.name}", unit="batch", leave=False):
        if stop(step):
            raise HookInterruptedError(f"evaluation of {stream.name} interrupted at batch {step}")
        metrics = eval_step(params, global_batch(stream, step, sharding), variables)
        collect(late)  # one step late, so that reading never waits for the device
        late = metrics
    collect(late)
    # Some metrics are of one kind of example, and a split may have none of that kind.
    weighted = {name: pair for name, pair in totals.items() if name == "loss" or pair[1]}
    result = {name: float(total / weight) for name, (total, weight) in weighted.items()}
    if "loss" in totals:
        result[unit] = float(totals["loss"][1])
    if "loss" in totals and unit == "tokens":
        result["perplexity"] = math.exp(min(result["loss"], 700.0))
        if stream.bytes_per_token:
            result["bits_per_byte"] = result["loss"] / math.log(2) / stream.bytes_per_token
    return result


@dataclasses.dataclass(kw_only=True)
class Evaluation(Hook):
    """The evaluation hook: held-out metrics of each stream, as 'eval/<task>/<metric>'.

    Attributes:
      every: updates between evaluations.
      streams: one per task.
      eval_step, sharding, max_steps, stop, unit: see `evaluate`; an abandoned evaluation leaves no result.
    """

    every: int
    eval_step: Callable[[Any, Batch, Any], Metrics]
    streams: tuple[EvalStream, ...]
    sharding: NamedSharding
    max_steps: int | None = None
    stop: Callable[[int], bool] = lambda batches: False
    unit: str = "tokens"
    results: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)
    prefix = "eval/"

    def __call__(
        self, step: int, state: TrainState, metrics: Mapping[str, float]
    ) -> Mapping[str, float]:
        del metrics
        results = {}
        for stream in self.streams:
            values = evaluate(
                self.eval_step,
                state.released_params,
                stream,
                self.sharding,
                variables=state.variables,
                max_steps=self.max_steps,
                stop=self.stop,
                unit=self.unit,
            )
            results.update({f"eval/{stream.name}/{name}": v for name, v in values.items()})
        self.results[step] = results
        return results
