"""Retrieval of needles from real text by a converted chat model, under every policy.

A haystack is read once; each question is read after it, and the recorded queries, keys and values are
replayed for each policy. A number is scored by the log-probabilities of its tokens, and by the digits of the model's own answer.

Shapes: B questions of a haystack, T tokens.

Haystacks are stretches of the King James Bible with five sentences "The magic number of <adjective noun> is <5 digits>.".
"""

import dataclasses
import functools
import re
from collections.abc import Sequence
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
from espalier.launch.papers.snapkv.methods import FULL, CachedModel, Held, Method, methods, pooled
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
        """Returns a question for each needle, and one in other words for the middle needle."""
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
    """Returns, for each digit of the number, 1 if the first number in the answer has this digit in the same place, else 0."""
    match = re.search(r"\d+", answer)
    answered = match.group() if match else ""
    same = [int(a == b) for a, b in zip(answered.ljust(len(number)), number, strict=False)]
    # A longer number is another number: its last digit counts as wrong.
    return [*same[:-1], same[-1] if len(answered) == len(number) else 0]


SUFFIX = 64  # tokens that questions are padded to
NEW_TOKENS = 8
ROOM = SUFFIX + NEW_TOKENS  # of the caches, for a question and an answer
_SETTINGS = Settings(max_new_tokens=NEW_TOKENS)
# The best on four haystacks of seed 90, which judge nothing. Every digit is a token, and so is the space before them: a vote for
# one token of an answer keeps all of it with a kernel of 2 * answer - 1, which is 11, or 9 without the space.
WINDOW, KERNEL = 8, 13
H2O_WINDOW = 16
# Windows of the prompt's end, whose choices are compared with what answers attend to: the last is most of the question.
SOURCE_WINDOWS, SOURCE_WINDOW = 8, 32
CHOSEN_SHARE, THRESHOLD = 0.1, 0.05  # of the prefix, of attention weights


TOKENS = 1024  # that haystacks are padded to
HAYSTACKS = 12
CAPACITY = 192  # at which all methods are compared, about a fifth
OTHERS = (96, 384)  # capacities of the curves
Case = tuple[str, Method, int]  # name, method, capacity


def cases() -> list[Case]:
    """Returns the methods that are measured beside the full cache; SnapKV is first."""
    known = methods(window=WINDOW, kernel=KERNEL, generated=NEW_TOKENS)
    known["h2o"] = Method("H2O", "h2o", {"window": H2O_WINDOW})
    known["kernel_7"] = pooled(WINDOW, 7)  # the paper's
    known["kernel_1"] = pooled(WINDOW, 1)
    # One query votes, as in TOVA, and the votes are pooled, as in SnapKV.
    known["window_1"] = dataclasses.replace(pooled(1, KERNEL), label="SnapKV, window of 1")
    for name in ("snapkv_int8", "snapkv_avg", "pyramidkv", "adakv"):  # the paper's methods alone
        del known[name]
    return [
        *((name, method, CAPACITY) for name, method in known.items()),
        ("h2o", known["h2o"], 4 * CAPACITY),  # what the paper compares SnapKV with
        *((name, known[name], c) for c in OTHERS for name in ("snapkv", "tova")),
    ]


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

    def hold(
        self, reading: "Reading", method: Method, capacity: int, *, unseen: bool = False
    ) -> Held:
        """Returns the prompts as a method holds them; `unseen`: the haystack is compressed before the question is read."""
        recording = reading.context if unseen else reading.whole
        held = self.model.hold(recording, method, capacity, room=ROOM)
        return self.model.read_on(held, reading.suffix_BX, reading.counts_B) if unseen else held

    def losses(self, held: Held, hay: Haystack) -> list[list[float]]:
        """Returns the nats of each token of the numbers [needles, X]."""
        numbers = [self.run.vocabulary.encode(f" {number}") for number in hay.numbers]
        rows = [*numbers, numbers[MIDDLE]]
        counts_B = np.array([len(row) for row in rows])
        log_BX = self.model.log_probabilities(held, _padded(rows, NEW_TOKENS), counts_B)
        return [
            [round(-float(x), 4) for x in log_X[:count]]
            for log_X, count in zip(log_BX[: len(DEPTHS)], counts_B, strict=False)
        ]

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


def measure(reader: Reader, hay: Haystack, tokens: int, every: Sequence[Case]) -> dict[str, Any]:
    """Measures every needle of a haystack with the full cache and other methods, and analyses what the first of these keeps.

    Args:
      reader: of a chat model.
      hay: what to read.
      tokens: the length that it is padded to.
      every: what to measure, from `cases`; the first also compresses the haystack before the question.

    Returns:
      {"answers": [[full cache's answer, number]], "losses": {name: {capacity: [needles, tokens of the number]}}, "digits":
      {name: {capacity: [needles, 5]}}, "overlap": of `_overlaps`, "hits": of `_hits`}.
    """
    reading = jax.block_until_ready(reader.read(hay, tokens))
    digits: dict[str, Any] = {}
    losses: dict[str, Any] = {}

    def score(name: str, method: Method, capacity: int, **settings: bool) -> np.ndarray:
        held = reader.hold(reading, method, capacity, **settings)
        tokens_BM = reader.model.generate(held, _SETTINGS)
        pairs = zip(reader.texts(tokens_BM), hay.numbers, strict=True)
        digits.setdefault(name, {})[str(capacity)] = [right_digits(*pair) for pair in pairs]
        if method.policy != "streaming_llm":  # its ring takes one token at a time
            losses.setdefault(name, {})[str(capacity)] = reader.losses(held, hay)
        return tokens_BM

    full_BM = score("full", FULL, 0)
    for case in every:
        score(*case)
    _, *snapkv = every[0]
    score("before", *snapkv, unseen=True)
    return {
        "answers": [list(pair) for pair in zip(reader.texts(full_BM), hay.numbers, strict=True)],
        "losses": losses,
        "digits": digits,
        "overlap": _overlaps(reader, reading, *snapkv),
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


def measure_all(run: LoadedRun, stages: Stages) -> list[dict[str, Any]]:
    """Returns what `measure` does of each haystack, with its number as 'haystack', and 'seconds'."""
    reader, lines, every = Reader(run), paragraphs(), cases()
    out = []
    for number in tqdm(sweeps.seeds(HAYSTACKS), desc="needles", unit="haystack", disable=None):

        def one(number: int = number) -> dict[str, Any]:
            rng = np.random.default_rng((number, TOKENS))
            # Room for the template's words before the haystack.
            return measure(
                reader, haystack(rng, lines, reader.count, TOKENS - SUFFIX), TOKENS, every
            )

        settings = {
            "haystack": [number, TOKENS],
            "cases": [(name, vars(method), c) for name, method, c in every],
        }
        stage = stages.get(f"needles_{number}", settings, one)
        out.append({"haystack": number, "seconds": stage["seconds"], **stage["result"]})
    return out
