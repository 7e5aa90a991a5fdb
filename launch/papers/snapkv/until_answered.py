"""Ends the training of a retrieval model when it answers held-out prompts.

Shapes: E prompts, T prompt length, A answer tokens, X = T + A - 1.
"""

import dataclasses
import os
from collections.abc import Mapping, Sequence

import jax
import numpy as np

from espalier.common.ranges import Fraction, Seed, Size
from espalier.launch.papers.snapkv import retrieval
from espalier.trainers.hooks import Hook, RunContext
from espalier.trainers.telemetry import metric_writers
from espalier.trainers.train_state import TrainState


@dataclasses.dataclass(kw_only=True)
class UntilAnswered(Hook):
    """A hook: 'answers/<question>_<lines>', the share of prompts of a kind that are answered exactly.

    It ends the run when the shares of all kinds are at least `share`.

    Attributes:
      run: set by `espalier train`.
      kinds: numbers of lines and positions of the question, such as ((12, 'last'), (12, 'first')).
      share: of exact answers of each kind at which the run ends.
      prompts: of each kind.
      seed: of the prompts, which differ from those of other seeds.
      every: updates between evaluations.
    """

    run: RunContext
    kinds: Sequence[tuple[Size, retrieval.Question]]
    share: Fraction = 0.95
    prompts: Size = 128
    seed: Seed = 12345
    every: Size = 100
    prefix = "answers/"
    ended = False

    def __post_init__(self):
        model = self.run.program.recipe.model
        self._drawn = {}
        for lines, question in self.kinds:
            rng = np.random.default_rng((self.seed, lines))
            context = retrieval.draw_lines(rng, self.prompts, lines)
            self._drawn[question, lines] = retrieval.draw_prompts(rng, context, question)

        def right(params, tokens_EX, answers_EA):
            answer = answers_EA.shape[1]
            best_EA = model.apply({"params": params}, tokens_EX)[:, -answer:].argmax(-1)
            return (best_EA == answers_EA).all(1).mean()

        # A finished run that starts again is finished.
        metrics = os.path.join(self.run.path, "metrics.jsonl")
        rows = metric_writers.rows_in_force(metrics) if os.path.exists(metrics) else []
        last = {k: v for row in rows if row["step"] == self.run.step for k, v in row.items()}
        self.ended = min(last.get(self._name(*kind), -1.0) for kind in self._drawn) >= self.share

        # A greedy answer is right exactly if every token of it is, after the right ones before it.
        self._right = jax.jit(right)

    def __call__(
        self, step: int, state: TrainState, metrics: Mapping[str, float]
    ) -> Mapping[str, float]:
        del step, metrics
        shares = {}
        for (question, lines), drawn in self._drawn.items():
            tokens_EX = np.concatenate([drawn.tokens_ET, drawn.answers_EA[:, :-1]], axis=1)
            share = self._right(state.released_params, tokens_EX, drawn.answers_EA)
            shares[self._name(question, lines)] = float(share)
        self.ended = min(shares.values()) >= self.share
        return shares

    def _name(self, question: str, lines: int) -> str:
        return f"{self.prefix}{question}_{lines}"
