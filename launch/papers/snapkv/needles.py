"""Needles in real text, found by a converted chat model under every policy.

A haystack is a stretch of the King James Bible with five sentences "The magic number of <adjective
noun> is <5 digits>." spread over it; every one of them is asked for. The haystack is read once; each
question is read after it, and what both showed the policies is replayed for each of them.

Shapes: B questions of a haystack, T tokens.
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from data.text.sources import english, environment
from launch.papers.snapkv.methods import FULL, Method
from launch.run.load_run import LoadedRun
from model.transforms import layer_stack
from trainers.decoding.settings import Settings
from trainers.snapkv import cache_analysis, replay

ADJECTIVES = ("amber", "silent", "crooked", "frozen", "golden", "hollow", "rusty", "velvet")
NOUNS = ("falcon", "lantern", "harbor", "anvil", "orchard", "saddle", "teapot", "violin")
DIGITS = 5
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
MIDDLE = 2  # the needle that is asked for twice, in two wordings
SUFFIX = 64  # tokens that questions are padded to
NEW_TOKENS = 8
_SETTINGS = Settings(max_new_tokens=NEW_TOKENS)


@dataclasses.dataclass(frozen=True)
class Haystack:
    """Text to read and what to ask about it.

    Attributes:
      text: needles included.
      names, numbers: of the needles, in the order of DEPTHS.
    """

    text: str
    names: tuple[str, ...]
    numbers: tuple[str, ...]

    def questions(self) -> list[str]:
        """One for each needle, and then the middle one in other words."""
        asked = [f"What is the magic number of {n}? Answer with the number." for n in self.names]
        return [
            *asked,
            f"Tell me the magic number of {self.names[MIDDLE]}. I only need the number.",
        ]

    def opening(self, needle: int) -> str:
        """How the answer begins, so that a small model gives the number and nothing else."""
        return f"The magic number of {self.names[needle]} is"


def paragraphs() -> list[str]:
    """Of a long public text in an installed package, in order.

    Raises:
      ValueError: the package is not installed.
    """
    env = environment.Environment.current()
    books = [c for c in english.candidates(env) if c.id.startswith("english/kjv/")]
    if not books:
        raise ValueError(f"The haystack is text of {english.BIBLE}, which is not installed.")
    return [line for book in books for line in book.read().split("\n\n")[1:]]


def haystack(rng: np.random.Generator, lines: Sequence[str], count: Any, tokens: int) -> Haystack:
    """A stretch of consecutive paragraphs of at most `tokens` tokens, needles included.

    Args:
      rng: chooses the place, names and numbers.
      lines: paragraphs to choose from.
      count: number of tokens of a text.
      tokens: the most there may be.
    """
    words = (rng.permutation(kind)[: len(DEPTHS)] for kind in (ADJECTIVES, NOUNS))
    chosen = tuple(" ".join(pair) for pair in zip(*words, strict=True))
    numbers = tuple(str(n) for n in rng.integers(10 ** (DIGITS - 1), 10**DIGITS, len(DEPTHS)))
    needles = [f"The magic number of {a} is {b}." for a, b in zip(chosen, numbers, strict=True)]
    budget = tokens - count("\n".join(needles))
    start = int(rng.integers(len(lines) - tokens))
    sentences: list[str] = []
    for line in lines[start:]:
        for sentence in re.split(r"(?<=[.;:?!]) ", line):
            if (used := count(sentence) + 1) > budget:
                budget = 0
                break
            sentences.append(sentence)
            budget -= used
        if not budget:
            break
    places = [round(depth * len(sentences)) for depth in DEPTHS]
    for place, needle in sorted(zip(places, needles, strict=True), reverse=True):
        sentences.insert(place, needle)
    return Haystack(" ".join(sentences), chosen, numbers)


class Reader:
    """A chat model and its compiled programs: one per length of haystack, and per policy of that."""

    def __init__(self, run: LoadedRun):
        self.run = run
        self.model = layer_stack.unrolled(run.model)
        config = run.model.config
        self.params = jax.jit(lambda params: layer_stack.unroll(params, config))(run.params)

    def count(self, text: str) -> int:
        """Tokens of a text."""
        return len(self.run.vocabulary.encode(text))

    def prompts(self, hay: Haystack) -> tuple[list[int], list[list[int]]]:
        """Tokens up to the end of the haystack, and those of each question after it."""
        prefix, suffixes = "", []
        for i, question in enumerate(hay.questions()):
            text = self.run.chat_template.render(
                [{"role": "user", "content": f"{hay.text}\n\n{question}"}],
                add_generation_prompt=True,
            )
            cut = text.index(hay.text) + len(hay.text)
            prefix = text[:cut]
            opening = hay.opening(i if i < len(DEPTHS) else MIDDLE)
            suffixes.append(self.run.vocabulary.encode(text[cut:] + opening))
        return self.run.vocabulary.encode(prefix), suffixes

    def read(self, hay: Haystack, length: int) -> "Reading":
        """Haystack and questions, as rows padded to `length` + SUFFIX tokens.

        Raises:
          ValueError: they do not fit.
        """
        prefix, suffixes = self.prompts(hay)
        if len(prefix) > length or max(map(len, suffixes)) > SUFFIX:
            raise ValueError(f"{len(prefix)} tokens of haystack do not fit {length}.")
        tokens_1T = np.zeros((1, length), np.int32)
        tokens_1T[0, : len(prefix)] = prefix
        context = _record(self.model, self.params, tokens_1T, jnp.array([len(prefix)]))
        context = _repeated(context, len(suffixes))
        tokens_BX = np.zeros((len(suffixes), SUFFIX), np.int32)
        for b, suffix in enumerate(suffixes):
            tokens_BX[b, : len(suffix)] = suffix
        counts_B = jnp.array([len(suffix) for suffix in suffixes])
        whole = _record_more(self.model, self.params, context, tokens_BX, counts_B)
        return Reading(context, whole, jnp.asarray(tokens_BX), counts_B)

    def answers(self, reading: "Reading", method: Method, capacity: int) -> list[str]:
        """What the model writes after each question."""
        policy = method.at(capacity)
        caches = self.caches(reading.whole, method, capacity)
        return self._texts(policy, caches, reading.whole.lengths_B, reading.whole.logits_BV)

    def answers_unseen(self, reading: "Reading", method: Method, capacity: int) -> list[str]:
        """The same where the haystack is compressed before the question is read."""
        policy = replay.decoding_policy(method.at(capacity))
        caches = self.caches(reading.context, method, capacity)
        logits_BV, caches = _read_on(
            self.model,
            policy,
            self.params,
            caches,
            reading.context.lengths_B,
            reading.suffix_BX,
            reading.counts_B,
        )
        return self._texts(policy, caches, reading.whole.lengths_B, logits_BV)

    def caches(self, recording: replay.Recording, method: Method, capacity: int) -> Any:
        """Compressed, with room for a question and an answer."""
        return _compress(self.model, method.at(capacity), method.cache_dtype, recording)

    def _texts(self, policy: Any, caches: Any, lengths_B: jax.Array, logits_BV: jax.Array):
        policy = replay.decoding_policy(policy)
        tokens_BM = _answer(self.model, policy, self.params, caches, lengths_B, logits_BV)
        rows = np.asarray(tokens_BM)[: len(DEPTHS)].tolist()
        return [self.run.vocabulary.decode(row) for row in rows]


@dataclasses.dataclass(frozen=True)
class Reading:
    """A haystack as it was read, in rows, one for each question.

    Attributes:
      context: without the questions.
      whole: with them.
      suffix_BX: tokens of the questions.
      counts_B: how many.
    """

    context: replay.Recording
    whole: replay.Recording
    suffix_BX: jax.Array
    counts_B: jax.Array


@functools.partial(jax.jit, static_argnums=0)
def _record(model, params, tokens_1T, lengths_1):
    return replay.record(model, params, tokens_1T, lengths_1)


@functools.partial(jax.jit, static_argnums=0)
def _record_more(model, params, recording, tokens_BX, counts_B):
    return replay.record_more(model, params, recording, tokens_BX, counts_B)


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _compress(model, policy, cache_dtype, recording):
    room = SUFFIX + NEW_TOKENS
    return replay.compressed(model, policy, recording, room=room, cache_dtype=cache_dtype)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _read_on(model, policy, params, caches, lengths_B, tokens_BX, counts_B):
    return replay.read_on(model, params, policy, caches, lengths_B, tokens_BX, counts_B)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _answer(model, policy, params, caches, lengths_B, logits_BV):
    found = replay.answer(model, params, policy, caches, lengths_B, logits_BV, _SETTINGS)
    return found.tokens_BM


def _repeated(recording: replay.Recording, times: int) -> replay.Recording:
    """A recording of one prompt as so many rows."""
    return jax.tree.map(lambda leaf: jnp.repeat(leaf, times, axis=0), recording)


def right_digits(answer: str, number: str) -> list[int]:
    """1 for each digit of the number that the answer's first number has in the same place."""
    match = re.search(r"\d+", answer)
    given = match.group() if match else ""
    same = [int(a == b) for a, b in zip(given.ljust(len(number)), number, strict=False)]
    # A number that goes on is another number: its last digit counts as wrong.
    return [*same[:-1], same[-1] if len(given) == len(number) else 0]


def measure(
    reader: Reader,
    hay: Haystack,
    tokens: int,
    cases: Sequence[tuple[str, Method, int]],
    unseen: tuple[Method, int],
) -> dict[str, Any]:
    """Which digits are right, by method and capacity, of every needle of a haystack.

    Args:
      reader: of a chat model.
      hay: what to read.
      tokens: the length that it is padded to.
      cases: (name, method, capacity), beside the full cache.
      unseen: method and capacity with which the haystack is also compressed before the question, and
        whose choices for different questions are compared.

    Returns:
      {"length": tokens of haystack and longest question, "answers": [[full cache's answer, number]],
      "digits": {name: {capacity: [needles, 5]}}, "overlap": {"same", "different", "chance"}}.
    """
    reading = jax.block_until_ready(reader.read(hay, tokens))
    digits: dict[str, Any] = {}

    def score(name: str, capacity: int, answers: list[str]) -> list[tuple[str, str]]:
        pairs = list(zip(answers, hay.numbers, strict=True))
        digits.setdefault(name, {})[str(capacity)] = [right_digits(*pair) for pair in pairs]
        return pairs

    full = score("full", 0, reader.answers(reading, FULL, 0))
    for name, method, capacity in cases:
        score(name, capacity, reader.answers(reading, method, capacity))
    score("before the question", unseen[1], reader.answers_unseen(reading, *unseen))
    return {
        "length": int(reading.whole.lengths_B.max()),
        "answers": full,
        "digits": digits,
        "overlap": _overlap(reader, reading, *unseen),
    }


def _overlap(reader: Reader, reading: Reading, method: Method, capacity: int) -> dict[str, float]:
    """Of kept haystack positions, the share in common of two wordings and of two questions."""
    prefix = int(reading.context.lengths_B[0])
    same, different = [], []
    policy = method.at(capacity)
    for cache in reader.caches(reading.whole, method, capacity):
        held_BKP = np.asarray(
            cache_analysis.held_positions(policy.view(cache).positions_BS, prefix)
        )
        for row in range(len(DEPTHS)):
            pair = held_BKP[-1:], held_BKP[row : row + 1]
            found = float(cache_analysis.overlap(*pair)[0])
            (same if row == MIDDLE else different).append(found)
    chance = (capacity - method.settings["window"]) / prefix
    return {
        "same": float(np.mean(same)),
        "different": float(np.mean(different)),
        "chance": chance,
    }
