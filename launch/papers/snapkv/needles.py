"""Retrieval of needles from real text by a converted chat model, under every policy.

A haystack is read once; each question is read after it, and the recorded queries, keys and values are
replayed for each policy. Window and kernel are chosen on some haystacks, and policies judged on others.

Shapes: B questions of a haystack, T tokens.

Haystacks are stretches of the King James Bible with five sentences "The magic number of <adjective noun> is <5 digits>.".
"""

import dataclasses
import functools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from espalier.data.text.sources import english, environment
from espalier.launch.load.load_run import LoadedRun
from espalier.launch.papers.shared import sweeps
from espalier.launch.papers.shared.sweeps import Stages
from espalier.launch.papers.snapkv import attention
from espalier.launch.papers.snapkv.methods import FULL, CachedModel, Method, methods, pooled
from espalier.trainers.decoding.settings import Settings
from espalier.trainers.snapkv import replay

ADJECTIVES = ("amber", "silent", "crooked", "frozen", "golden", "hollow", "rusty", "velvet")
NOUNS = ("falcon", "lantern", "harbor", "anvil", "orchard", "saddle", "teapot", "violin")
DIGITS = 5
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)
MIDDLE = 2  # the needle with two questions, in two wordings


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


def right_digits(answer: str, number: str) -> list[int]:
    """Returns 1 for each digit of the number that the answer's first number has in the same place."""
    match = re.search(r"\d+", answer)
    answered = match.group() if match else ""
    same = [int(a == b) for a, b in zip(answered.ljust(len(number)), number, strict=False)]
    # A longer number is another number: its last digit counts as wrong.
    return [*same[:-1], same[-1] if len(answered) == len(number) else 0]


SUFFIX = 64  # tokens that questions are padded to
NEW_TOKENS = 8
ROOM = SUFFIX + NEW_TOKENS  # of the caches, for a question and an answer
_SETTINGS = Settings(max_new_tokens=NEW_TOKENS)
# Every digit is a token, and so is the space before them in some vocabularies. A vote for one token of an answer keeps
# all of it with a kernel of 2 * answer - 1: 9, or 11 with the space. Narrower ones are measured, and not chosen.
KERNELS = (7, 9, 11, 13)
WINDOWS = (8, 16, 32)
SUFFICIENT = 2 * DIGITS - 1
# Windows of the prompt's end, whose choices are compared with what answers attend to: the last is most of the question.
SOURCE_WINDOWS, SOURCE_WINDOW = 8, 32
CHOSEN_SHARE, THRESHOLD = 0.1, 0.05  # of the prefix, of attention weights


@dataclasses.dataclass(frozen=True, kw_only=True)
class Grid:
    """Haystacks of one length.

    Attributes:
      tokens: the length they are padded to.
      haystacks: how many of them; each has five needles.
      fifth: capacity at which all methods are compared, a fifth of the length.
      others: further capacities of a few methods.
      names: of the methods; all if None.
      seed: of the haystacks.
    """

    tokens: int
    haystacks: int
    fifth: int
    others: Sequence[int] = ()
    names: Sequence[str] | None = None
    seed: int = sweeps.FIRST_SEED + 1


# The first chooses window and kernel, and judges nothing; the last has too few haystacks to judge, and is for the map of
# depths and lengths.
CHOOSING = Grid(tokens=1024, haystacks=4, fifth=192, seed=90)
JUDGED = Grid(tokens=1024, haystacks=12, fifth=192, others=(96, 384))
_CURVES = ("snapkv", "tova", "streaming_llm")
LONG = Grid(tokens=2048, haystacks=4, fifth=384, names=_CURVES)
GRIDS = (JUDGED, LONG)
Case = tuple[str, Method, int]  # name, method, capacity


def candidates() -> list[Case]:
    """Returns SnapKV with every window and kernel, and H2O with every window, at the capacity of CHOOSING."""
    sizes = [(window, kernel) for window in WINDOWS for kernel in KERNELS]
    snapkv = [(f"snapkv {w} {k}", pooled(w, k), CHOOSING.fifth) for w, k in sizes]
    h2o = [(f"h2o {w}", Method("H2O", "h2o", {"window": w}), CHOOSING.fifth) for w in WINDOWS]
    return [*snapkv, *h2o]


def chosen(haystacks: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Returns the best 'window' and 'kernel' of SnapKV, and the best 'h2o_window', by the results of CHOOSING.

    Best is the highest share of exact answers, then of right digits, then the smaller window and kernel. A kernel that is
    smaller than SUFFICIENT is not chosen.
    """

    def score(name: str) -> tuple[float, float]:
        right = np.array([one["digits"][name][str(CHOOSING.fifth)] for one in haystacks])
        return float(right.all(-1).mean()), float(right.mean())

    sizes = [(w, k) for w in WINDOWS for k in KERNELS if k >= SUFFICIENT]
    window, kernel = max(sizes, key=lambda size: score(f"snapkv {size[0]} {size[1]}"))
    h2o_window = max(WINDOWS, key=lambda w: score(f"h2o {w}"))
    return {"window": window, "kernel": kernel, "h2o_window": h2o_window}


def cases(grid: Grid, *, window: int, kernel: int, h2o_window: int) -> list[Case]:
    """Returns the measurements of a grid with the chosen sizes."""
    known = methods(window=window, kernel=kernel, generated=NEW_TOKENS)
    known["h2o"] = Method("H2O", "h2o", {"window": h2o_window})
    known |= {f"kernel_{size}": pooled(window, size) for size in (1, 5)}
    del known["snapkv_int8"]
    at_fifth = [(name, known[name], grid.fifth) for name in grid.names or known]
    return at_fifth + [(name, known[name], c) for c in grid.others for name in _CURVES]


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

    def answer(
        self, reading: "Reading", method: Method, capacity: int, *, unseen: bool = False
    ) -> np.ndarray:
        """Returns the tokens of the model's answers; `unseen`: the haystack is compressed before the question is read."""
        recording, inputs = reading.whole, {}
        if unseen:
            recording = reading.context
            inputs = {"suffix_BX": reading.suffix_BX, "counts_B": reading.counts_B}
        return self.model.generate(recording, method, capacity, _SETTINGS, room=ROOM, **inputs)

    def texts(self, tokens_BM: np.ndarray) -> list[str]:
        """Returns the answers to the questions about each needle as texts."""
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


def measure(
    reader: Reader, hay: Haystack, tokens: int, cases: Sequence[Case], snapkv: Case | None = None
) -> dict[str, Any]:
    """Measures which digits are right, by method and capacity, of every needle of a haystack.

    Args:
      reader: of a chat model.
      hay: what to read.
      tokens: the length that it is padded to.
      cases: beside the full cache.
      snapkv: with which the haystack is also compressed before the question, and whose choices are analysed; None for
        neither.

    Returns:
      {"answers": [[full cache's answer, number]], "digits": {name: {capacity: [needles, 5]}}} and, with `snapkv`, the
      results of `_overlaps` and `_hits` as "overlap" and "hits".
    """
    reading = jax.block_until_ready(reader.read(hay, tokens))
    digits: dict[str, Any] = {}

    def score(name: str, capacity: int, tokens_BM: np.ndarray) -> list[tuple[str, str]]:
        pairs = list(zip(reader.texts(tokens_BM), hay.numbers, strict=True))
        digits.setdefault(name, {})[str(capacity)] = [right_digits(*pair) for pair in pairs]
        return pairs

    full_BM = reader.answer(reading, FULL, 0)
    out = {"answers": score("full", 0, full_BM), "digits": digits}
    for name, method, capacity in cases:
        score(name, capacity, reader.answer(reading, method, capacity))
    if snapkv is None:
        return out
    _, method, capacity = snapkv
    score("before", capacity, reader.answer(reading, method, capacity, unseen=True))
    return {
        **out,
        "overlap": _overlaps(reader, reading, method, capacity),
        "hits": _hits(reader, reading, full_BM),
    }


def _overlaps(reader: Reader, reading: Reading, method: Method, capacity: int) -> dict[str, Any]:
    """Returns the shares of kept positions in common, by layer: {'same': two wordings, 'different': two questions}."""
    prefix = int(reading.context.lengths_B[0])
    same, different = [], []
    policy = method.at(capacity)
    for cache in reader.model.compress(reading.whole, method, capacity, ROOM):
        held_BKP = attention.held_positions(policy.view(cache).positions_BS, prefix)
        again_BKP = jnp.broadcast_to(held_BKP[-1:], held_BKP.shape)
        shared = np.asarray(attention.overlap(again_BKP, held_BKP))[: len(DEPTHS)].tolist()
        same.append(shared.pop(MIDDLE))
        different.append(float(np.mean(shared)))
    chance = (capacity - method.settings["window"]) / prefix
    return {"same": same, "different": different, "chance": chance}


def _hits(reader: Reader, reading: Reading, answers_BM: np.ndarray) -> list[Any]:
    """Returns (hits, attended) [L, W, 2] of the choices of the prompt's last windows while the full cache answers."""
    more_BX, counts_B = jnp.asarray(answers_BM), jnp.full(len(answers_BM), NEW_TOKENS)
    read_on = reader.model.record_more(reading.whole, more_BX, counts_B)
    ends_B = reading.whole.lengths_B
    # Rounded, so that few lengths are compiled.
    prefix = (int(ends_B.min()) - SOURCE_WINDOWS * SOURCE_WINDOW) // SUFFIX * SUFFIX
    count = round(CHOSEN_SHARE * prefix)
    by_layer = [_window_hits(record, ends_B, prefix, count).sum(1) for record in read_on.layers]
    return np.asarray(by_layer).tolist()


@functools.partial(jax.jit, static_argnums=(2, 3))
def _window_hits(record, ends_B, prefix, count):
    return attention.hits_by_window(
        record,
        ends_B,
        windows=SOURCE_WINDOWS,
        window=SOURCE_WINDOW,
        answer=NEW_TOKENS - 1,
        prefix=prefix,
        count=count,
        threshold=THRESHOLD,
    )


def measure_all(run: LoadedRun, stages: Stages, grids: Sequence[Grid] = GRIDS) -> dict[str, Any]:
    """Chooses window and kernel, and measures all haystacks of the grids with them.

    Returns:
      {"candidates": results of CHOOSING, "chosen": the sizes, "haystacks": results of the grids, each with 'tokens'}.
    """
    reader, lines = Reader(run), paragraphs()

    def results(grid: Grid, cases: Sequence[Case], snapkv: Case | None) -> list[dict[str, Any]]:
        out = []
        for i in tqdm(
            range(grid.haystacks), desc=f"{grid.tokens} tokens", unit="haystack", disable=None
        ):

            def one(i: int = i) -> dict[str, Any]:
                rng = np.random.default_rng((grid.seed, grid.tokens, i))
                # Room for the template's words before the haystack.
                hay = haystack(rng, lines, reader.count, grid.tokens - SUFFIX)
                return measure(reader, hay, grid.tokens, cases, snapkv)

            settings = {
                "haystack": [grid.seed, grid.tokens, i],
                "cases": [(name, vars(method), c) for name, method, c in cases],
            }
            stage = stages.get(f"needles_{grid.tokens}_{grid.seed}_{i}", settings, one)
            out.append({"tokens": grid.tokens, "haystack": i, **stage["result"]})
        return out

    tried = results(CHOOSING, candidates(), None)
    sizes = chosen(tried)
    measured = []
    for grid in grids:
        all_cases = cases(grid, **sizes)
        measured += results(grid, all_cases, None if grid.names else all_cases[0])
    return {"candidates": tried, "chosen": sizes, "haystacks": measured}
