"""Rewards computed from texts: whether an answer is right, has a required form, or is too long.

A verifier is a function (text of a completion, info of its prompt's row) -> number. `TextReward` is the `Reward` that
sums verifiers with weights.
"""

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.common.ranges import Finite
from espalier.trainers.rewards.base import Completion

Verifier = Callable[[str, Any], float]


class VerifierError(ValueError):
    """A row lacks the key that a verifier compares an answer with, or a package is missing."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class TextReward:
    """The weighted sum of verifiers of a completion's text.

    Attributes:
      vocabulary: a SeqIO vocabulary, or another object with `decode` of token ids.
      verifiers: at least one.
      weights: one weight per verifier; None for 1 each.
    """

    vocabulary: Any
    verifiers: Sequence[Verifier]
    weights: Sequence[Finite] | None = None

    def __post_init__(self):
        if not self.verifiers:
            raise ValueError(
                "TextReward.verifiers is empty: name functions such as @verifiers.exact_answer."
            )
        if self.weights is not None and len(self.weights) != len(self.verifiers):
            raise ValueError(
                f"TextReward.weights = {list(self.weights)}: give one for each of the {len(self.verifiers)} verifiers."
            )

    def __call__(self, completions: Sequence[Completion]) -> np.ndarray:
        """Returns rewards, float32 [N]; raises VerifierError if a verifier does."""
        weights = [1.0] * len(self.verifiers) if self.weights is None else self.weights
        rewards_N = np.zeros(len(completions), np.float64)
        for n, completion in enumerate(completions):
            text = self.vocabulary.decode(list(completion.tokens))
            for weight, verifier in zip(weights, self.verifiers, strict=True):
                rewards_N[n] += weight * verifier(text, completion.info)
        return rewards_N.astype(np.float32)


def exact_answer(text: str, info: Any, *, key: str = "answer", pattern: str | None = None) -> float:
    """Returns 1 if the answer equals the row's, ignoring white space around both, else 0.

    Args:
      text: the completion.
      info: the row, which has the right answer under `key`.
      key: name of the right answer's column.
      pattern: regular expression whose last match is the answer, or its first group if it has one; None for the
        whole text.
    """
    answer = extracted(text, pattern)
    return float(answer is not None and answer.strip() == str(_value(info, key)).strip())


def matches(text: str, info: Any, *, pattern: str) -> float:
    """Returns 1 if a regular expression matches the whole text, else 0; dots also match line ends."""
    del info
    return float(re.fullmatch(pattern, text, re.DOTALL) is not None)


def too_long(text: str, info: Any, *, free: int, span: int) -> float:
    """Returns 0 up to `free` characters, then falls by 1 / span per character to -1 (DAPO, arXiv 2503.14476, eq. 13)."""
    del info
    if free < 0 or span < 1:
        raise ValueError(f"free = {free} must be at least 0 and span = {span} at least 1.")
    return -min(max(len(text) - free, 0) / span, 1.0)


def reasoning_gym(text: str, info: Any, *, pattern: str | None = None) -> float:
    """Returns reasoning-gym's score of an answer to one of its generated problems, from 0 to 1.

    Args:
      info: the problem in the package's format: 'question', 'answer' and 'metadata'.
      pattern: see `exact_answer`.

    Raises:
      VerifierError: the package is not installed, or the row is not one of its problems.
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
            "A row's 'metadata' has no 'source_dataset': write the rows of reasoning_gym.create_dataset, with their "
            "'question' as 'prompt' too."
        )
    score = package.get_score_answer_fn(dataset)
    return float(score(answer=extracted(text, pattern), entry=dict(info)))


def extracted(text: str, pattern: str | None) -> str | None:
    """Returns the last match of `pattern`, or its first group; the text if `pattern` is None; None without a match."""
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
            f"A row of the prompts has no {key!r}, only {known or 'nothing'}: add it, or bind the verifier's key."
        )
    return info[key]
