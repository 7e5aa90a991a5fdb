"""Retrieval of needles from real text by a converted chat model, under every policy.

A haystack is a stretch of the King James Bible with five sentences "The magic number of <adjective
noun> is <5 digits>." spread over it, and a question about each of them. The haystack is read once; each
question is read after it, and the recorded queries, keys and values are replayed for each policy.

Shapes: B questions of a haystack, T tokens.
"""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from data.text.sources import english, environment
from launch.papers.shared.sweeps import Stages
from launch.papers.snapkv.methods import FULL, Method, kernels, methods
from launch.papers.snapkv.programs import CachedModel
from launch.run.load_run import LoadedRun
from trainers.decoding.settings import Settings
from trainers.snapkv import cache_analysis, replay

ADJECTIVES = ("amber", "silent", "crooked", "frozen", "golden", "hollow", "rusty", "velvet")
NOUNS = ("falcon", "lantern", "harbor", "anvil", "orchard", "saddle", "teapot", "violin")
DIGITS = 5
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
MIDDLE = 2  # the needle with two questions, in two wordings
SUFFIX = 64  # tokens that questions are padded to
NEW_TOKENS = 8
ROOM = SUFFIX + NEW_TOKENS  # of the caches, for a question and an answer
_SETTINGS = Settings(max_new_tokens=NEW_TOKENS)
WINDOW = 32
KERNEL = 7


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """Haystacks of one length.

    Attributes:
      tokens: the length they are padded to.
      haystacks: how many of them; each has five needles.
      fifth: capacity at which all methods are compared, a fifth of the length.
      others: further capacities of a few methods.
    """

    tokens: int
    haystacks: int
    fifth: int
    others: Sequence[int] = ()


GRIDS = (
    Grid(tokens=1024, haystacks=8, fifth=192, others=(96, 384)),
    Grid(tokens=2048, haystacks=4, fifth=384, others=(1024,)),
)
_CURVES = ("snapkv", "h2o", "streaming_llm", "random")


def cases(grid: Grid) -> list[tuple[str, Method, int]]:
    """Returns (name, method, capacity) of all measurements of a grid."""
    known = {
        **methods(window=WINDOW, kernel=KERNEL),
        **kernels(window=WINDOW, sizes=(1, 3)),
    }
    del known["snapkv_int8"]
    at_fifth = [(name, method, grid.fifth) for name, method in known.items()]
    return at_fifth + [(name, known[name], c) for c in grid.others for name in _CURVES]


@dataclasses.dataclass(frozen=True)
class Haystack:
    """A text and its needles.

    Attributes:
      text: needles included.
      names, numbers: of the needles, in the order of DEPTHS.
    """

    text: str
    names: tuple[str, ...]
    numbers: tuple[str, ...]

    def questions(self) -> list[str]:
        """Returns one for each needle, and then the middle one in other words."""
        asked = [f"What is the magic number of {n}? Answer with the number." for n in self.names]
        again = f"Tell me the magic number of {self.names[MIDDLE]}. I only need the number."
        return [*asked, again]

    def opening(self, needle: int) -> str:
        """Returns the beginning of the answer, after which a small model writes the number alone."""
        return f"The magic number of {self.names[needle]} is"


def paragraphs() -> list[str]:
    """Returns the paragraphs of a long public text in an installed package, in order.

    Raises:
      ValueError: the package is not installed.
    """
    env = environment.Environment.current()
    books = [c for c in english.candidates(env) if c.id.startswith("english/kjv/")]
    if not books:
        raise ValueError(f"The haystack is text of {english.BIBLE}, which is not installed.")
    return [line for book in books for line in book.read().split("\n\n")[1:]]


def haystack(rng: np.random.Generator, lines: Sequence[str], count: Any, tokens: int) -> Haystack:
    """Returns a stretch of consecutive paragraphs of at most `tokens` tokens, needles included.

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
    following = (s for line in lines[start:] for s in re.split(r"(?<=[.;:?!]) ", line))
    for sentence in following:
        if (used := count(sentence) + 1) > budget:
            break
        sentences.append(sentence)
        budget -= used
    places = [round(depth * len(sentences)) for depth in DEPTHS]
    for place, needle in sorted(zip(places, needles, strict=True), reverse=True):
        sentences.insert(place, needle)
    return Haystack(" ".join(sentences), chosen, numbers)


class Reader:
    """A chat model that reads haystacks; one program is compiled per length of haystack, and per policy."""

    def __init__(self, run: LoadedRun):
        self.run = run
        self.model = CachedModel.of_run(run)

    def count(self, text: str) -> int:
        """Returns the number of tokens of a text."""
        return len(self.run.vocabulary.encode(text))

    def prompts(self, hay: Haystack) -> tuple[list[int], list[list[int]]]:
        """Returns the tokens up to the end of the haystack, and those of each question after it."""
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
        """Reads haystack and questions, as rows padded to `length` + SUFFIX tokens.

        Raises:
          ValueError: they do not fit.
        """
        prefix, suffixes = self.prompts(hay)
        if len(prefix) > length or max(map(len, suffixes)) > SUFFIX:
            raise ValueError(f"{len(prefix)} tokens of haystack do not fit {length}.")
        context = self.model.record(_padded([prefix], length), jnp.array([len(prefix)]))
        context = jax.tree.map(lambda leaf: jnp.repeat(leaf, len(suffixes), axis=0), context)
        tokens_BX = _padded(suffixes, SUFFIX)
        counts_B = jnp.array([len(suffix) for suffix in suffixes])
        whole = self.model.record_more(context, tokens_BX, counts_B)
        return Reading(context, whole, jnp.asarray(tokens_BX), counts_B)

    def answers(
        self, reading: "Reading", method: Method, capacity: int, *, unseen: bool = False
    ) -> list[str]:
        """Returns the model's answers; `unseen`: the haystack is compressed before the question is read."""
        recording, inputs = reading.whole, {}
        if unseen:
            recording = reading.context
            inputs = {"suffix_BX": reading.suffix_BX, "counts_B": reading.counts_B}
        tokens_BM = self.model.generate(recording, method, capacity, _SETTINGS, room=ROOM, **inputs)
        return [self.run.vocabulary.decode(row) for row in tokens_BM[: len(DEPTHS)].tolist()]


def _padded(rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
    return np.array([[*row, *[0] * (length - len(row))] for row in rows], np.int32)


@dataclasses.dataclass(frozen=True)
class Reading:
    """The recording of a haystack, in rows, one for each question.

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


def right_digits(answer: str, number: str) -> list[int]:
    """Returns 1 for each digit of the number that the answer's first number has in the same place."""
    match = re.search(r"\d+", answer)
    answered = match.group() if match else ""
    same = [int(a == b) for a, b in zip(answered.ljust(len(number)), number, strict=False)]
    # A longer number is another number: its last digit counts as wrong.
    return [*same[:-1], same[-1] if len(answered) == len(number) else 0]


def measure(
    reader: Reader,
    hay: Haystack,
    tokens: int,
    cases: Sequence[tuple[str, Method, int]],
    unseen: tuple[Method, int],
) -> dict[str, Any]:
    """Measures which digits are right, by method and capacity, of every needle of a haystack.

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
    score("before the question", unseen[1], reader.answers(reading, *unseen, unseen=True))
    return {
        "length": int(reading.whole.lengths_B.max()),
        "answers": full,
        "digits": digits,
        "overlap": _overlap(reader, reading, *unseen),
    }


def _overlap(reader: Reader, reading: Reading, method: Method, capacity: int) -> dict[str, float]:
    """Returns the shares of kept positions in common of two wordings and of two questions."""
    prefix = int(reading.context.lengths_B[0])
    same, different = [], []
    policy = method.at(capacity)
    for cache in reader.model.compress(reading.whole, method, capacity, ROOM):
        positions_BS = policy.view(cache).positions_BS
        held_BKP = np.asarray(cache_analysis.held_positions(positions_BS, prefix))
        for row in range(len(DEPTHS)):
            pair = held_BKP[-1:], held_BKP[row : row + 1]
            overlap = float(cache_analysis.overlap(*pair)[0])
            (same if row == MIDDLE else different).append(overlap)
    chance = (capacity - method.settings["window"]) / prefix
    return {
        "same": float(np.mean(same)),
        "different": float(np.mean(different)),
        "chance": chance,
    }


def measure_all(
    run: LoadedRun, stages: Stages, grids: Sequence[Grid] = GRIDS, *, seed: int = 0
) -> list[Mapping[str, Any]]:
    """Returns the results of all haystacks, in order, each with its `tokens`."""
    reader, lines = Reader(run), paragraphs()
    plan = [(grid, i) for grid in grids for i in range(grid.haystacks)]
    out = []
    for grid, i in tqdm(plan, desc="needles", unit="haystack"):
        rng = np.random.default_rng((seed, grid.tokens, i))
        snapkv = methods(window=WINDOW, kernel=KERNEL)["snapkv"]

        def one(grid: Grid = grid, rng: Any = rng, snapkv: Method = snapkv) -> dict[str, Any]:
            # Room for the template's words before the haystack.
            hay = haystack(rng, lines, reader.count, grid.tokens - SUFFIX)
            return measure(reader, hay, grid.tokens, cases(grid), unseen=(snapkv, grid.fifth))

        measured = [(name, capacity) for name, _, capacity in cases(grid)]
        settings = {"seed": seed, "tokens": grid.tokens, "haystack": i, "cases": measured}
        stage = stages.get(f"needles_{grid.tokens}_{i}", settings, one)
        out.append({"tokens": grid.tokens, **stage["result"]})
    return out
