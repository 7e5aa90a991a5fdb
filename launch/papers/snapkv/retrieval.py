"""Accuracy of the small retrieval model under every policy and capacity.

Shapes: E prompts, T prompt length, A answer tokens.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from data.snapkv import retrieval
from launch.papers.snapkv import programs
from launch.papers.snapkv.methods import FULL, Method, kernels, methods
from model.transforms import layer_stack
from trainers.decoding.settings import Settings
from trainers.snapkv import replay

WINDOW = 8
KERNEL = 7
_SETTINGS = Settings(max_new_tokens=retrieval.ANSWER_TOKENS, num_ids=retrieval.VOCAB_SIZE)


@dataclasses.dataclass
class Retriever:
    """A trained model."""

    model: Any
    params: Any

    @classmethod
    def of_run(cls, loaded: Any) -> "Retriever":
        """Returns the model of a run that launch/run/load_run.py has loaded."""
        params = layer_stack.unroll(loaded.params, loaded.model.config)
        return cls(layer_stack.unrolled(loaded.model), params)

    def record(self, tokens_ET: np.ndarray) -> replay.Recording:
        """Reads prompts of one length."""
        lengths_E = jnp.full(len(tokens_ET), tokens_ET.shape[1], jnp.int32)
        return programs.record(self.model, self.params, jnp.asarray(tokens_ET), lengths_E)

    def answer(
        self,
        recording: replay.Recording,
        method: Method,
        capacity: int = 0,
        *,
        suffix_EX: np.ndarray | None = None,
        logits_EV: jax.Array | None = None,
    ) -> np.ndarray:
        """Returns greedy answers [E, A].

        Args:
          recording: of the prompts; the oracle's has the answer at its end.
          method: what compresses them.
          capacity: of it.
          suffix_EX: tokens to read after the compression.
          logits_EV: after the prompts, where the recording goes on.
        """
        policy = method.at(capacity)
        more = 0 if suffix_EX is None else suffix_EX.shape[1]
        room = retrieval.ANSWER_TOKENS + more
        caches = programs.compress(self.model, policy, room, method.cache_dtype, recording)
        lengths_E = recording.lengths_B - policy.future
        logits_EV = recording.logits_BV if logits_EV is None else logits_EV
        policy = replay.decoding_policy(policy)
        if suffix_EX is not None:
            logits_EV, caches = programs.read_on(
                self.model, policy, self.params, caches, lengths_E, suffix_EX
            )
            lengths_E = lengths_E + more
        state = self.params, caches, lengths_E, logits_EV
        return np.asarray(programs.answer(self.model, policy, _SETTINGS, *state))


def accuracy(
    retriever: Retriever,
    *,
    prompts: int,
    lines: int,
    capacities: Sequence[int],
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Measures which answers are right, by method and capacity, of prompts with the question last.

    Args:
      retriever: the model.
      prompts, lines: how many prompts, of how many lines.
      capacities: to measure the methods at.
      seed: of the prompts.
      names: of the methods; None for all.

    Returns:
      {"length": T, "line": [E], "correct": {method: {capacity: [E, A] of 0 and 1}}}.
    """
    rng = np.random.default_rng((seed, lines))
    drawn = retrieval.draw_prompts(rng, retrieval.draw_lines(rng, prompts, lines))
    recording = retriever.record(drawn.tokens_ET)
    full_EA = retriever.answer(recording, FULL)
    # The oracle sees what the model with its full cache goes on to write.
    read_on = retriever.record(np.concatenate([drawn.tokens_ET, full_EA], axis=1))
    length = drawn.tokens_ET.shape[1]

    def check(answer_EA: np.ndarray) -> list[list[int]]:
        return (answer_EA == drawn.answers_EA).astype(int).tolist()

    correct: dict[str, dict[str, Any]] = {"full": {str(length): check(full_EA)}}
    cases = [case for case in _cases(capacities, length) if names is None or case[0] in names]
    for name, method, capacity in tqdm(cases, desc=f"{lines} lines", unit="case", disable=None):
        if name == "truncation":
            cut = np.concatenate([drawn.tokens_ET[:, :1], drawn.tokens_ET[:, 1 - capacity :]], 1)
            answer_EA = retriever.answer(retriever.record(cut), FULL)
        elif name == "oracle":
            answer_EA = retriever.answer(read_on, method, capacity, logits_EV=recording.logits_BV)
        else:
            answer_EA = retriever.answer(recording, method, capacity)
        correct.setdefault(name, {})[str(capacity)] = check(answer_EA)
    return {"length": length, "line": drawn.line_E.tolist(), "correct": correct}


def _cases(capacities: Sequence[int], length: int) -> Iterator[tuple[str, Method, int]]:
    all_methods = {
        **methods(window=WINDOW, kernel=KERNEL, future=retrieval.ANSWER_TOKENS),
        **kernels(window=WINDOW, sizes=(1, 3, 5)),
        "truncation": FULL,
    }
    for name, method in all_methods.items():
        for capacity in capacities:
            if capacity < length:
                yield name, method, capacity


def depths(
    retriever: Retriever, *, prompts: int, lines: int, capacities: Sequence[int], seed: int = 0
) -> dict[str, Any]:
    """Returns `accuracy` of a few methods, for the depth by length map."""
    return accuracy(
        retriever,
        prompts=prompts,
        lines=lines,
        capacities=capacities,
        seed=seed,
        names=("snapkv", "h2o", "streaming_llm"),
    )


def question_agnostic(
    retriever: Retriever, *, prompts: int, lines: int, capacity: int, seed: int = 0
) -> dict[str, Any]:
    """Measures whether answers are right where the context is compressed before the question is read."""
    rng = np.random.default_rng((seed, lines))
    drawn = retrieval.draw_prompts(rng, retrieval.draw_lines(rng, prompts, lines))
    suffix = retrieval.LINE + 1
    context = retriever.record(drawn.tokens_ET[:, :-suffix])
    question_EX = drawn.tokens_ET[:, -suffix:]
    method = methods(window=WINDOW, kernel=KERNEL)["snapkv"]
    correct = {
        "full": retriever.answer(context, FULL, suffix_EX=question_EX),
        "before the question": retriever.answer(context, method, capacity, suffix_EX=question_EX),
        "after the question": retriever.answer(retriever.record(drawn.tokens_ET), method, capacity),
    }
    return {name: _exact(answer, drawn).tolist() for name, answer in correct.items()}


def question_positions(
    retriever: Retriever, *, prompts: int, lines: int, capacity: int, seed: int = 0
) -> dict[str, Any]:
    """Measures whether answers are right with the question after the context and before it."""
    rng = np.random.default_rng((seed, lines))
    context = retrieval.draw_lines(rng, prompts, lines)
    method = methods(window=WINDOW, kernel=KERNEL)["snapkv"]
    out = {}
    for question in retrieval.QUESTIONS:
        drawn = retrieval.draw_prompts(rng, context, question)
        recording = retriever.record(drawn.tokens_ET)
        out[question] = {
            "full": _exact(retriever.answer(recording, FULL), drawn).tolist(),
            "snapkv": _exact(retriever.answer(recording, method, capacity), drawn).tolist(),
        }
    return out


def _exact(answer_EA: np.ndarray, drawn: retrieval.Prompts) -> np.ndarray:
    return (answer_EA == drawn.answers_EA).all(1).astype(int)
