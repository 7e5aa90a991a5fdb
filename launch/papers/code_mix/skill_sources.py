"""Five generated sources with known skills, to measure how code helps text (arXiv 2408.10914).

Public benchmarks are too hard for small models. Here text states facts and poses problems in words, and
code computes the answers to these problems. A small model learns all of it in minutes
(data/code_mix/skills.py):

  skill_text      facts about invented people, problems in words with rare worked steps, filler
  skill_web_code  calls with results, one in five of them wrong: most programs forget the same cases
  skill_synth     calls that are worked out before their result, executed; wrong ones are dropped
  skill_markup    tags and keys with values, no procedures
  skill_adjacent  a question, the call that answers it, an explanation
"""

import dataclasses
import functools
import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from espalier.common.ranges import Count, Seed
from espalier.data import tasks
from espalier.data.code_mix import skills
from espalier.data.data_source import GeneratedSource

CACHED_AS = "data.code_mix.skill_sources"  # the name by which caches of its data know it

# Share of careless programs among those that write web code, and synth before execution. They forget the same case,
# which 22 % of their operands have, and are wrong alike: a model that copies the most frequent result would not notice
# errors that differ from one another. So a fifth of web code is wrong.
CARELESS = 0.9
KINDS = {"fact": 0.5, "problem": 0.2, "filler": 0.3}  # shares of text documents
WORKED = 0.1  # share of the problems in words that have worked steps
# Training documents per source. 2.4 million tokens, a phase of the experiments, make 0.8 epochs over text and 2.7 over web
# code, twice the paper's. Calls occur more often than that, since there are fewer than 2,400 different ones. In the paper
# synth has six epochs as a tenth of the tokens. Here it has twelve as the only source, so that the effect of repetition is
# not mistaken for one of quality where it is a part.
DOCUMENTS = {
    "skill_text": 128_000,
    "skill_web_code": 58_000,
    "skill_synth": 8_000,
    "skill_markup": 70_000,
    "skill_adjacent": 3_000,
}

_EXPLANATION = {"shift": "one more each", "reverse": "last goes first", "sort": "least goes first"}


class _Writer:
    """Writes the documents of one split.

    Training documents contain no held-out operand. Validation documents use held-out operands only.
    """

    def __init__(self, rng: random.Random, split: str):
        self._rng = rng
        self._held_out = split == "validation"
        # Zipf's law: the n-th fact is stated 1/n times as often as the first.
        ranks = range(1, len(skills.facts()) + 1)
        self._fact_weights = list(itertools.accumulate(1 / rank for rank in ranks))

    def documents(self, source: str) -> Iterator[str]:
        """Yields documents of a source without end."""
        write = {
            "skill_text": self._text,
            "skill_web_code": self._web_code,
            "skill_synth": self._synth,
            "skill_markup": self._markup,
            "skill_adjacent": self._adjacent,
        }[source]
        while True:
            yield write()

    def _drawn(self) -> tuple[str, str]:
        """Returns a procedure and an operand; in training, neither the operand nor a result is held out."""
        name = self._rng.choice(tuple(skills.PROCEDURES))
        if self._held_out:
            return name, self._rng.choice(skills.held_out_operands())
        while True:
            operand = f"{self._rng.randrange(10**skills.DIGITS):0{skills.DIGITS}d}"
            calls = (skills.call(name, operand, careless=flag) for flag in (False, True))
            if not any(map(skills.leaks, calls)):
                return name, operand

    def _text(self) -> str:
        (kind,) = self._rng.choices(tuple(KINDS), tuple(KINDS.values()))
        if kind == "filler":
            return self._filler()
        if kind == "fact":
            (fact,) = self._rng.choices(skills.facts(), cum_weights=self._fact_weights)
            return "".join(skills.stated(fact, self._rng.randrange(skills.FORMS)))
        name, operand = self._drawn()
        if self._rng.random() >= WORKED:
            return "".join(skills.posed(name, operand))
        return "".join(skills.worked(name, operand))

    def _filler(self) -> str:
        """Returns words whose syllables are drawn from a Markov chain."""
        at, words = self._rng.randrange(len(skills.SYLLABLES)), []
        for _ in range(self._rng.randint(2, 6)):
            (then,) = self._rng.choices(range(len(skills.SYLLABLES)), cum_weights=_bigrams()[at])
            words.append(skills.SYLLABLES[at] + skills.SYLLABLES[then])
            (at,) = self._rng.choices(range(len(skills.SYLLABLES)), cum_weights=_bigrams()[then])
        return " ".join(words) + "."

    def _web_code(self) -> str:
        return skills.call(*self._drawn(), careless=self._is_careless())

    def _is_careless(self) -> bool:
        return self._rng.random() < CARELESS

    def _synth(self) -> str:
        """Returns a trace that holds: it is drafted as web code is until its result is right."""
        name, operand = self._drawn()
        while True:
            text = skills.trace(name, operand, careless=self._is_careless())
            if skills.holds(text):
                return text

    def _markup(self) -> str:
        tag, key, value = (self._rng.choice(skills.SYLLABLES) for _ in range(3))
        if self._rng.random() < 0.5:
            return f"<{tag}>{key}{value}</{tag}>"
        return f"<{tag} {key}={self._rng.randrange(100)} {value}={self._rng.randrange(100)}/>"

    def _adjacent(self) -> str:
        name, operand = self._drawn()
        return f"{name} {operand}? {skills.call(name, operand)}, {_EXPLANATION[name]}"


@functools.cache
def _bigrams() -> Sequence[Sequence[float]]:
    """Returns cumulative weights of the next syllable for each syllable: six frequent ones, the others rare."""
    rng = random.Random("bigrams")
    table = []
    for _ in skills.SYLLABLES:
        weights = [0.02] * len(skills.SYLLABLES)
        for rank, at in enumerate(rng.sample(range(len(weights)), 6), 1):
            weights[at] = 6 / rank
        table.append(list(itertools.accumulate(weights)))
    return table


@dataclasses.dataclass(frozen=True)
class SkillSource(GeneratedSource):
    """Documents of one source."""

    validation_documents = 512

    @property
    def digest(self) -> str:
        sizes = (skills.DIGITS, skills.HELD_OUT, skills.NUM_PEOPLE, self.validation_documents)
        return f"{type(self).__name__} of {sizes}, {CARELESS}, {KINDS}, {WORKED}: {self}"

    def texts(self, split: str) -> list[str]:
        writer = _Writer(random.Random(f"{self.name} {split} {self.seed}"), split)
        return list(itertools.islice(writer.documents(self.name), self.num_input_examples(split)))


def register(
    *, vocabulary: Any, documents: Mapping[str, Count] | None = None, seed: Seed = 0
) -> None:
    """Registers a task for each source, and their mixture `skills`.

    Args:
      vocabulary: has all of `skills.SYMBOLS`.
      documents: source -> number of training documents; overrides DOCUMENTS.
      seed: seed of the documents; facts, held-out operands and problems do not depend on it.

    Raises:
      ValueError: `documents` names an unknown source, or the vocabulary lacks a character.
    """
    counts = {**DOCUMENTS, **(documents or {})}
    if unknown := sorted(set(counts) - set(DOCUMENTS)):
        raise ValueError(f"documents names {unknown[0]!r}; the sources are {', '.join(DOCUMENTS)}.")
    tasks.register_generated(
        [SkillSource(name, count, seed) for name, count in counts.items()],
        mixture="skills",
        symbols=skills.SYMBOLS,
        origin="skill_sources.register",
        vocabulary=vocabulary,
        add_eos=True,
    )
