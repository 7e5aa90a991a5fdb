"""Accuracy of the small retrieval model under every policy and capacity.

Shapes: E prompts, T prompt length, A answer tokens.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from tqdm.auto import tqdm

from espalier.launch.papers.snapkv import retrieval
from espalier.launch.papers.snapkv.methods import FULL, CachedModel, Method, methods, pooled
from espalier.trainers.decoding.settings import Settings
from espalier.trainers.snapkv import replay

WINDOW = 8
KERNEL = 2 * retrieval.ANSWER_TOKENS - 1  # a vote for one token of an answer keeps all of it
FIFTHS = 5  # of the lines, by depth
METHODS = {
    **methods(
        window=WINDOW,
        kernel=KERNEL,
        generated=retrieval.ANSWER_TOKENS,
        future=retrieval.ANSWER_TOKENS,
    ),
    **{f"kernel_{size}": pooled(WINDOW, size) for size in (1, 3, 5)},
    "truncation": FULL,
}
del METHODS["pyramidkv"]  # of two layers it leaves the last almost nothing
SNAPKV = METHODS["snapkv"]
_SETTINGS = Settings(max_new_tokens=retrieval.ANSWER_TOKENS, num_ids=retrieval.VOCAB_SIZE)


class Answered(NamedTuple):
    """Prompts with the answers of the full cache: what was drawn and recorded, and prompts and answers as one recording."""

    drawn: retrieval.Prompts
    recording: replay.Recording
    full_EA: np.ndarray
    read_on: replay.Recording


class Retriever(CachedModel):
    """A trained retrieval model."""

    def answer(
        self,
        recording: replay.Recording,
        method: Method = FULL,
        capacity: int = 0,
        *,
        suffix_EX: np.ndarray | None = None,
        logits_EV: jax.Array | None = None,
    ) -> np.ndarray:
        """Returns greedy answers [E, A] of a recording whose caches a method compresses to a capacity.

        `suffix_EX` are tokens that are read after the compression; `logits_EV` are those of the prompts' last tokens.
        """
        room = retrieval.ANSWER_TOKENS + (0 if suffix_EX is None else suffix_EX.shape[1])
        held = self.hold(recording, method, capacity, room=room, logits_BV=logits_EV)
        return self.generate(
            held if suffix_EX is None else self.read_on(held, suffix_EX), _SETTINGS
        )

    def draw(
        self, prompts: int, lines: int, seed: int, question: retrieval.Question = "last"
    ) -> Answered:
        """Draws prompts and answers them with the full cache."""
        rng = np.random.default_rng((seed, lines))
        drawn = retrieval.draw_prompts(rng, retrieval.draw_lines(rng, prompts, lines), question)
        recording = self.record(drawn.tokens_ET)
        full_EA = self.answer(recording)
        read_on = self.record(np.concatenate([drawn.tokens_ET, full_EA], axis=1))
        return Answered(drawn, recording, full_EA, read_on)


def accuracy(
    retriever: Retriever,
    *,
    prompts: int,
    lines: int,
    capacities: Sequence[int],
    seed: int = 0,
    names: Sequence[str] | None = None,
) -> dict[str, Any]:
    """Measures the shares of right answers, by method and capacity, to prompts with the question last.

    Args:
      retriever: the model.
      prompts, lines: how many prompts, of how many lines.
      capacities: to measure the methods at.
      seed: of the prompts.
      names: of the methods; None for all.

    Returns:
      {"length": T, "right": {method: {capacity: {"exact": share, "tokens": [A], "depths": [FIFTHS]}}}}: shares of prompts
      with every token right, with each token right, and of the first by depth of the line in question.
    """
    drawn, recording, full_EA, read_on = retriever.draw(prompts, lines, seed)
    length = drawn.tokens_ET.shape[1]

    def check(answer_EA: np.ndarray) -> dict[str, Any]:
        return _shares(answer_EA == drawn.answers_EA, drawn.line_E * FIFTHS // lines)

    right: dict[str, dict[str, Any]] = {"full": {str(length): check(full_EA)}}
    cases = [
        (name, METHODS[name], capacity)
        for name in names or METHODS
        for capacity in capacities
        if capacity < length
    ]
    for name, method, capacity in tqdm(cases, desc=f"{lines} lines", unit="case", disable=None):
        if name == "truncation":
            cut = np.concatenate([drawn.tokens_ET[:, :1], drawn.tokens_ET[:, 1 - capacity :]], 1)
            answer_EA = retriever.answer(retriever.record(cut))
        elif name == "oracle":  # it sees the answer of the full cache
            answer_EA = retriever.answer(read_on, method, capacity, logits_EV=recording.logits_BV)
        else:
            answer_EA = retriever.answer(recording, method, capacity)
        right.setdefault(name, {})[str(capacity)] = check(answer_EA)
    return {"length": length, "right": right}


def _shares(right_EA: np.ndarray, fifth_E: np.ndarray) -> dict[str, Any]:
    exact_E = right_EA.all(1)
    depths = [exact_E[fifth_E == fifth] for fifth in range(FIFTHS)]
    return {
        "exact": round(float(exact_E.mean()), 4),
        "tokens": right_EA.mean(0).round(4).tolist(),
        "depths": [round(float(some.mean()), 4) if some.size else None for some in depths],
    }


def depths(retriever: Retriever, **settings: Any) -> dict[str, Any]:
    """Returns `accuracy` of a few methods, for the depth by length map."""
    return accuracy(retriever, **settings, names=("snapkv", "h2o", "streaming_llm"))


def question_agnostic(
    retriever: Retriever, *, prompts: int, lines: int, capacity: int, seed: int = 0
) -> dict[str, float]:
    """Measures the share of exact answers where the context is compressed before the question is read, and after."""
    rng = np.random.default_rng((seed, lines))
    drawn = retrieval.draw_prompts(rng, retrieval.draw_lines(rng, prompts, lines))
    suffix = retrieval.LINE + 1
    context = retriever.record(drawn.tokens_ET[:, :-suffix])
    question_EX = drawn.tokens_ET[:, -suffix:]
    answers = {
        "full": retriever.answer(context, suffix_EX=question_EX),
        "before": retriever.answer(context, SNAPKV, capacity, suffix_EX=question_EX),
        "after": retriever.answer(retriever.record(drawn.tokens_ET), SNAPKV, capacity),
    }
    return {name: _exact(answer, drawn) for name, answer in answers.items()}


def question_positions(
    retriever: Retriever, *, prompts: int, lines: int, capacity: int, seed: int = 0
) -> dict[str, Any]:
    """Measures the share of exact answers to questions after the context and before it."""
    rng = np.random.default_rng((seed, lines))
    context = retrieval.draw_lines(rng, prompts, lines)
    out = {}
    for question in retrieval.QUESTIONS:
        drawn = retrieval.draw_prompts(rng, context, question)
        recording = retriever.record(drawn.tokens_ET)
        out[question] = {
            "full": _exact(retriever.answer(recording), drawn),
            "snapkv": _exact(retriever.answer(recording, SNAPKV, capacity), drawn),
        }
    return out


def _exact(answer_EA: np.ndarray, drawn: retrieval.Prompts) -> float:
    return round(float((answer_EA == drawn.answers_EA).all(1).mean()), 4)
