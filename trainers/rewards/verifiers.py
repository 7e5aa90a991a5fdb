"""Rewards from texts: whether an answer is right, has a required form, or is too long.

A verifier is a function (text of a completion, info of its prompt's row) -> number; `TextReward`
makes a `Reward` of the weighted sum of verifiers.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from trainers.rewards.base import Completion

Verifier = Callable[[str, Any], float]


class VerifierError(ValueError):
    """A row lacks the key that a verifier compares an answer with, or a package is missing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextReward:
    """The weighted sum of verifiers of a completion's text.

    Attributes:
      vocabulary: a SeqIO vocabulary, or another object with `decode` of token ids.
      verifiers: at least one.
      weights: of them; None for 1 each.

    Raises:
      ValueError: no verifiers, or other weights than verifiers.
    """

    vocabulary: Any
    verifiers: Sequence[Verifier]
    weights: Sequence[float] | None = None

    def __post_init__(self):
        if not self.verifiers:
            raise ValueError(
                "TextReward.verifiers is empty: name functions such as @verifiers.exact_answer."
            )
        if self.weights is not None and len(self.weights) != len(self.verifiers):
            raise ValueError(
                f"TextReward.weights = {list(self.weights)} do not fit the {len(self.verifiers)} verifiers."
            )

    def __call__(self, completions: Sequence[Completion]) -> np.ndarray:
        """float32 [N]; VerifierError as the verifiers raise it."""
        weights = [1.0] * len(self.verifiers) if self.weights is None else self.weights
        rewards_N = np.zeros(len(completions), np.float64)
        for n, completion in enumerate(completions):
            text = self.vocabulary.decode(list(completion.tokens))
            for weight, verifier in zip(weights, self.verifiers, strict=True):
                rewards_N[n] += weight * verifier(text, completion.info)
        return rewards_N.astype(np.float32)


def exact_answer(text: str, info: Any, *, key: str = "answer", pattern: str | None = None) -> float:
    """1 if the answer is the row's, white space around both apart, else 0.

    Args:
      text: of the completion.
      info: of the row, which has the answer under `key`.
      key: of the right answer.
      pattern: regular expression whose last match is the answer, or its first group if it has one; None for the
        whole text.
    """
    answer = extracted(text, pattern)
    return float(answer is not None and answer.strip() == str(_value(info, key)).strip())


def matches(text: str, info: Any, *, pattern: str) -> float:
    """1 if the whole text is of the form of a regular expression, in which dots match line ends, else 0."""
    del info
    return float(re.fullmatch(pattern, text, re.DOTALL) is not None)


def too_long(text: str, info: Any, *, free: int, span: int) -> float:
    """0 for up to `free` characters, then falling by 1 / span for each to -1 (DAPO, arXiv 2503.14476, eq. 13)."""
    del info
    if free < 0 or span < 1:
        raise ValueError(f"free = {free} must be at least 0 and span = {span} at least 1.")
    return -min(max(len(text) - free, 0) / span, 1.0)


def reasoning_gym(text: str, info: Any, *, pattern: str | None = None) -> float:
    """The score that reasoning-gym gives an answer to one of its generated problems, from 0 to 1.

    Args:
      text: of the completion.
      info: the problem as the package makes it: 'question', 'answer' and 'metadata'.
      pattern: see `exact_answer`.

    Raises:
      VerifierError: the package is not installed, or the row is none of its problems.
    """
    try:
        import reasoning_gym as package
    except ImportError:
        raise VerifierError(
            "The verifier 'reasoning_gym' needs the package of this name: pip install reasoning-gym."
        ) from None
    metadata = _value(info, "metadata")
    dataset = metadata.get("source_dataset") if isinstance(metadata, Mapping) else None
    if dataset is None:
        raise VerifierError(
            "A row's 'metadata' names no 'source_dataset', as problems of reasoning-gym do: write the rows as "
            "reasoning_gym.create_dataset gives them, with their 'question' as 'prompt' too."
        )
    score = package.get_score_answer_fn(dataset)
    return float(score(answer=extracted(text, pattern), entry=dict(info)))


def extracted(text: str, pattern: str | None) -> str | None:
    """The last match of `pattern`, or its first group; the text without one; None where nothing matches."""
    if pattern is None:
        return text
    matched = list(re.finditer(pattern, text, re.DOTALL))
    if not matched:
        return None
    return matched[-1][1] if matched[-1].re.groups else matched[-1][0]


def _value(info: Any, key: str) -> Any:
    if not isinstance(info, Mapping) or key not in info:
        known = ", ".join(map(repr, info)) if isinstance(info, Mapping) else "nothing"
        raise VerifierError(
            f"A row has no {key!r} to compare its answers with, only {known or 'nothing'}: add it to the rows of the "
            "prompts, or bind the verifier's key."
        )
    return info[key]
