"""A generated language with a known reward, to study over-optimisation in preference learning (arXiv 2410.11677).

A document is a prompt of three symbols and a completion of at most twelve symbols, EOS included:

  +tu   a text of language A on the topic t; u has no meaning
  ?kl   the fact of the keys k and l: three symbols of A
  -tu   a text of language B

Texts are Markov chains with 32 successors of each symbol, the r-th with a probability proportional to 1 / r^2: the ten likeliest
next symbols of a chain have 0.96 of the mass, so that entropy and mass can move both ways, and 22 others are possible. In texts on a
topic, a quarter of the symbols are preferred symbols of the topic. `reward` scores an answer to `+tu`: preferences are drawn from it,
and it measures alignment. It has no price on length.

Shapes: V symbols of a language, K successors.
"""

import functools
import itertools
import random
from typing import Any, Literal

import numpy as np

from espalier.common.ranges import Count, Seed
from espalier.data import tasks
from espalier.data.data_source import GeneratedSource

CACHED_AS = "data.preference.topic_language"  # the name by which caches of its data know it

SIZE = 244  # symbols of a language
SHARED = "abcdefghijklmnopqrstuvwx"  # topics and keys
MARKS = {"topic": "+", "fact": "?", "other": "-"}
SHARES = {"topic": 0.4, "fact": 0.3, "other": 0.3}
LANGUAGE_A = "".join(chr(0x4E00 + i) for i in range(SIZE))
LANGUAGE_B = "".join(chr(0xAC00 + i) for i in range(SIZE))
_WEIGHTS = 1 / np.arange(1, 33) ** 2
SUCCESSORS = tuple((_WEIGHTS / _WEIGHTS.sum()).tolist())
PREFERRED = 6  # symbols of a topic
ON_TOPIC = 0.25
SHORTEST, LONGEST = 4, 11  # symbols of a text
FACTS, ANSWER = 72, 3
HELD_OUT = 256  # number of held-out prompts of texts on topics

Kind = Literal["topic", "fact", "other"]


def symbols() -> str:
    """Returns all symbols, for `vocabularies.characters`."""
    return "".join(MARKS.values()) + SHARED + LANGUAGE_A + LANGUAGE_B


@functools.cache
def _successors(language: str) -> np.ndarray:
    """Returns the possible successors [V, K] of each symbol of a language, as indices, the most probable first."""
    rng = np.random.default_rng(ord(language[0]))
    return np.stack([rng.permutation(SIZE)[: len(SUCCESSORS)] for _ in range(SIZE)])


@functools.cache
def preferred(topic: str) -> str:
    """Returns the preferred symbols of a topic, all of language A."""
    return "".join(random.Random(f"topic {topic}").sample(LANGUAGE_A, PREFERRED))


@functools.cache
def facts() -> dict[str, str]:
    """Returns prompt -> answer for all facts."""
    rng = random.Random("facts")
    keys = rng.sample(list(itertools.product(SHARED, repeat=2)), FACTS)
    return {MARKS["fact"] + k + other: "".join(rng.sample(LANGUAGE_A, ANSWER)) for k, other in keys}


@functools.cache
def prompts(split: str) -> tuple[str, ...]:
    """Returns shuffled prompts of texts on topics: HELD_OUT for 'validation', all others for 'train'."""
    every = [MARKS["topic"] + t + u for t, u in itertools.product(SHARED, repeat=2)]
    random.Random("prompts").shuffle(every)
    return tuple(every[:HELD_OUT] if split == "validation" else every[HELD_OUT:])


def completion(prompt: str, rng: np.random.Generator) -> str:
    """Returns a random completion of a prompt; for a fact, its answer."""
    if prompt in facts():
        return facts()[prompt]
    on_topic = prompt[0] == MARKS["topic"]
    language = LANGUAGE_A if on_topic else LANGUAGE_B
    table_VK, wanted = _successors(language), preferred(prompt[1])
    at, letters = int(rng.integers(SIZE)), []
    for _ in range(int(rng.integers(SHORTEST, LONGEST + 1))):
        if on_topic and rng.random() < ON_TOPIC:
            at = language.index(wanted[int(rng.integers(PREFERRED))])
        letters.append(language[at])
        at = int(table_VK[at, rng.choice(len(SUCCESSORS), p=SUCCESSORS)])
    return "".join(letters)


def reward(prompt: str, text: str, *, ended: bool) -> float:
    """Returns the reward of an answer to a prompt `+tu`.

    The reward is 1.5 for each different preferred symbol of the topic among the first SHORTEST symbols, which every text of the
    language has, -4 times the share of symbols outside A, -4 times the share of symbols that repeat the previous one, and -0.5
    if the answer did not end: a longer answer is neither better nor worse. An empty answer has -4.
    """
    if not text:
        return -4.0
    different = len(set(text[:SHORTEST]) & set(preferred(prompt[1])))
    outside = sum(symbol not in LANGUAGE_A for symbol in text) / len(text)
    repeats = sum(a == b for a, b in itertools.pairwise(text)) / len(text)
    return 1.5 * different - 4.0 * outside - 4.0 * repeats - 0.5 * (not ended)


class TopicSource(GeneratedSource):
    """Documents of all kinds; documents on topics use the prompts of their split."""

    @property
    def digest(self) -> str:
        numbers = (SUCCESSORS, PREFERRED, ON_TOPIC, SHORTEST, LONGEST, FACTS, ANSWER, HELD_OUT)
        return f"{type(self).__name__} of {symbols()}, {SHARES}, {numbers}: {self}"

    def texts(self, split: str) -> list[str]:
        rng = np.random.default_rng((self.seed, self.splits.index(split)))
        kinds = rng.choice(list(SHARES), self.num_input_examples(split), p=list(SHARES.values()))
        documents = []
        for kind in kinds.tolist():
            if kind == "other":
                prompt = MARKS[kind] + "".join(rng.choice(list(SHARED), 2))
            else:
                known = prompts(split) if kind == "topic" else tuple(facts())
                prompt = known[int(rng.integers(len(known)))]
            documents.append(prompt + completion(prompt, rng))
        return documents


def register(*, vocabulary: Any, documents: Count = 96_000, seed: Seed = 0) -> None:
    """Registers the task `topic_language`: prompts with their completions, and EOS.

    Args:
      vocabulary: has all of `symbols()`.
      documents: number of training documents.
      seed: seed of the documents; languages, topics and facts do not depend on it.
    """
    tasks.register_source(
        "topic_language",
        TopicSource("topic_language", documents, seed),
        origin="topic_language.register",
        vocabulary=vocabulary,
        add_bos=False,
        add_eos=True,
    )
