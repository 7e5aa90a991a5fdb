"""Accuracy of the small retrieval model under every policy and capacity.

Shapes: E prompts, T prompt length, A answer tokens.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from data.snapkv import retrieval
from launch.papers.snapkv.methods import FULL, Method, kernels, methods
from launch.plots import intervals
from model.transforms import layer_stack
from trainers.decoding.settings import Settings
from trainers.snapkv import replay

WINDOW = 8
KERNEL = 7
_SETTINGS = Settings(max_new_tokens=retrieval.ANSWER_TOKENS, num_ids=retrieval.VOCAB_SIZE)


@dataclasses.dataclass
class Retriever:
    """A trained model and the programs that are compiled for it, which models of one shape share."""

    model: Any
    params: Any

    @classmethod
    def of_run(cls, loaded: Any) -> "Retriever":
        """From a run that launch/run/load_run.py has loaded."""
        params = layer_stack.unroll(loaded.params, loaded.model.config)
        return cls(layer_stack.unrolled(loaded.model), params)

    def record(self, tokens_ET: np.ndarray) -> replay.Recording:
        """All prompts have the same length."""
        lengths_E = jnp.full(len(tokens_ET), tokens_ET.shape[1], jnp.int32)
        return _record(self.model, self.params, jnp.asarray(tokens_ET), lengths_E)

    def answer(
        self,
        recording: replay.Recording,
        method: Method,
        capacity: int = 0,
        *,
        suffix_EX: np.ndarray | None = None,
        logits_EV: jax.Array | None = None,
    ) -> np.ndarray:
        """Greedy answers [E, A].

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
        caches = _compress(self.model, policy, room, method.cache_dtype, recording)
        lengths_E = recording.lengths_B - policy.future
        logits_EV = recording.logits_BV if logits_EV is None else logits_EV
        policy = replay.decoding_policy(policy)
        if suffix_EX is not None:
            logits_EV, caches = _read_on(
                self.model, policy, self.params, caches, lengths_E, suffix_EX
            )
            lengths_E = lengths_E + more
        return np.asarray(_answer(self.model, policy, self.params, caches, lengths_E, logits_EV))


@functools.partial(jax.jit, static_argnums=0)
def _record(model, params, tokens_ET, lengths_E):
    return replay.record(model, params, tokens_ET, lengths_E)


@functools.partial(jax.jit, static_argnums=(0, 1, 2, 3))
def _compress(model, policy, room, cache_dtype, recording):
    return replay.compressed(model, policy, recording, room=room, cache_dtype=cache_dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read_on(model, policy, params, caches, lengths_E, suffix_EX):
    counts_E = jnp.full(len(suffix_EX), suffix_EX.shape[1], jnp.int32)
    return replay.read_on(model, params, policy, caches, lengths_E, suffix_EX, counts_E)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _answer(model, policy, params, caches, lengths_E, logits_EV):
    found = replay.answer(model, params, policy, caches, lengths_E, logits_EV, _SETTINGS)
    return found.tokens_BM


def accuracy(
    retriever: Retriever,
    *,
    prompts: int,
    lines: int,
    capacities: Sequence[int],
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Which answers are right, by method and capacity, of prompts with the question last.

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
    found = retrieval.draw_prompts(rng, retrieval.draw_lines(rng, prompts, lines))
    recording = retriever.record(found.tokens_ET)
    full_EA = retriever.answer(recording, FULL)
    # The oracle sees what the model with its full cache goes on to write.
    read_on = retriever.record(np.concatenate([found.tokens_ET, full_EA], axis=1))
    length = found.tokens_ET.shape[1]

    def check(answer_EA: np.ndarray) -> list[list[int]]:
        return (answer_EA == found.answers_EA).astype(int).tolist()

    correct: dict[str, dict[str, Any]] = {"full": {str(length): check(full_EA)}}
    cases = [case for case in _cases(capacities, length) if names is None or case[0] in names]
    for name, method, capacity in tqdm(cases, desc=f"{lines} lines", unit="case", disable=None):
        if name == "truncation":
            cut = np.concatenate([found.tokens_ET[:, :1], found.tokens_ET[:, 1 - capacity :]], 1)
            answer_EA = retriever.answer(retriever.record(cut), FULL)
        elif name == "oracle":
            answer_EA = retriever.answer(read_on, method, capacity, logits_EV=recording.logits_BV)
        else:
            answer_EA = retriever.answer(recording, method, capacity)
        correct.setdefault(name, {})[str(capacity)] = check(answer_EA)
    return {"length": length, "line": found.line_E.tolist(), "correct": correct}


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
    """`accuracy` of a few methods, for the depth by length map."""
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
    """Whether answers are right where the context is compressed before the question is read."""
    rng = np.random.default_rng((seed, lines))
    found = retrieval.draw_prompts(rng, retrieval.draw_lines(rng, prompts, lines))
    suffix = retrieval.LINE + 1
    context = retriever.record(found.tokens_ET[:, :-suffix])
    question_EX = found.tokens_ET[:, -suffix:]
    method = methods(window=WINDOW, kernel=KERNEL)["snapkv"]
    correct = {
        "full": retriever.answer(context, FULL, suffix_EX=question_EX),
        "before the question": retriever.answer(context, method, capacity, suffix_EX=question_EX),
        "after the question": retriever.answer(retriever.record(found.tokens_ET), method, capacity),
    }
    return {name: _exact(answer, found).tolist() for name, answer in correct.items()}


def question_positions(
    retriever: Retriever, *, prompts: int, lines: int, capacity: int, seed: int = 0
) -> dict[str, Any]:
    """Whether answers are right with the question after the context and before it."""
    rng = np.random.default_rng((seed, lines))
    context = retrieval.draw_lines(rng, prompts, lines)
    method = methods(window=WINDOW, kernel=KERNEL)["snapkv"]
    out = {}
    for question in retrieval.QUESTIONS:
        found = retrieval.draw_prompts(rng, context, question)
        recording = retriever.record(found.tokens_ET)
        out[question] = {
            "full": _exact(retriever.answer(recording, FULL), found).tolist(),
            "snapkv": _exact(retriever.answer(recording, method, capacity), found).tolist(),
        }
    return out


def _exact(answer_EA: np.ndarray, found: retrieval.Prompts) -> np.ndarray:
    return (answer_EA == found.answers_EA).all(1).astype(int)


def exact_match(correct_EA: Any) -> dict[str, float]:
    """Share of prompts whose answer tokens are all right."""
    return intervals.share(np.asarray(correct_EA).all(-1))
