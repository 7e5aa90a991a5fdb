"""Made languages of one grammar, to measure on two cores what more languages cost (arXiv 2405.15032).

A sentence says the same in every language: two nouns with an adjective each, and a verb that prefers some nouns as its
object. A language has its own word for each of 60 concepts, drawn from one stock of words for all languages; languages of one
family, of four, share half of their words. It also has an order of words (SVO, SOV or VSO), adjectives before or
after nouns, and marks of case or none. A document is sentences, each after a sign for its language. In half of the
documents of the first four languages each sentence is said again, in one of these four, as texts of two languages on the
web do:

  toy_0 ... toy_15    documents; the mixtures toy_mix_4, toy_mix_8 and toy_mix_16 have the first ones in equal shares

Instructions are turns as in the Command format (data/tokenizers/chat_template.py), one symbol for each of its tokens.
The mixture `toy_instructions` has them in equal shares by kind:

  toy_copy_L          says a sentence of language L again
  toy_translate_L_M   says a sentence of language L in M

The same requests without the signs of turns, to evaluate on, are `toy_plain_copy_L` and `toy_plain_translate_L_M`.

Every word is one symbol, so that the vocabulary is fixed. Shapes: N documents, S sentences, T symbols.
"""

import dataclasses
import functools
import itertools
import zlib
from collections.abc import Sequence
from typing import Any

import numpy as np

from espalier.common.ranges import Seed, Size
from espalier.data import tasks
from espalier.data.data_source import GeneratedSource

CACHED_AS = "data.aya23.toy_languages"  # the name by which caches of its data know it

NOUNS, ADJECTIVES, VERBS = 24, 16, 20
CONCEPTS = NOUNS + ADJECTIVES + VERBS
STOCK = 200  # words of all languages
LANGUAGES, FAMILY = 16, 4
COMMON = 4  # languages that every mixture has, and that instructions are in
COUNTS = (4, 8, 16)  # languages of the mixtures
MARKS = 8  # of case
SIGNS = ("turn", "end", "user", "chatbot", "stop", "copy", "translate")
ORDERS = ("svo", "sov", "vso")
_FIRST = 0x4E00  # symbols are characters of a block without letters that case or accents relate
_PARTS = {
    **{"word": STOCK, "language": LANGUAGES, "mark": MARKS, "sign": len(SIGNS)},
}
_STARTS = dict(zip(_PARTS, np.cumsum([0, *_PARTS.values()])[:-1].tolist(), strict=True))
SYMBOLS = "".join(chr(_FIRST + i) for i in range(sum(_PARTS.values())))
_SPECIAL = 3  # ids before the symbols, see data/tokenizers/character_vocabulary.py
_CHOICES = (0.6, 0.25, 0.1, 0.05)  # of a verb's objects and of a noun's adjectives


def symbols() -> str:
    """Returns all symbols, for `vocabularies.characters`."""
    return SYMBOLS


def symbol(kind: str, number: Any) -> Any:
    """Returns the number of a symbol, such as of the sign 'turn', or of words by their numbers."""
    return _STARTS[kind] + (SIGNS.index(number) if kind == "sign" else number)


def text(symbols: Sequence[int]) -> str:
    """Returns symbols as characters."""
    return "".join(SYMBOLS[number] for number in symbols)


@dataclasses.dataclass(frozen=True)
class Language:
    """A made language; its number determines all of it."""

    number: int

    @functools.cached_property
    def words(self) -> np.ndarray:
        """The symbols of the concepts: nouns, adjectives, verbs."""
        family, member = divmod(self.number, FAMILY)
        rng = np.random.default_rng([1, family])
        shared = rng.permutation(CONCEPTS)[: CONCEPTS // 2]
        stock = rng.permutation(STOCK)
        words = np.empty(CONCEPTS, np.int64)
        words[shared] = stock[: len(shared)]
        own = np.setdiff1d(np.arange(CONCEPTS), shared)
        rest = np.random.default_rng([2, family, member]).permutation(stock[len(shared) :])
        words[own] = rest[: len(own)]
        return symbol("word", words)

    @property
    def order(self) -> str:
        return ORDERS[self.number % len(ORDERS)]

    @property
    def adjective_first(self) -> bool:
        return self.number % 2 == 0

    @property
    def marks(self) -> tuple[int, ...]:
        """The symbols after subject and object; empty in a language without case."""
        family, member = divmod(self.number, FAMILY)
        if member % 2:
            return ()
        return tuple(symbol("mark", (2 * family + i) % MARKS) for i in range(2))

    @property
    def sentence_length(self) -> int:
        return 5 + len(self.marks)

    def say(self, meanings: np.ndarray) -> np.ndarray:
        """Returns sentences [..., sentence_length] of meanings [..., 5]: subject, its adjective, verb, object, its adjective."""
        concepts = meanings + np.array([0, NOUNS, NOUNS + ADJECTIVES, 0, NOUNS])
        subject, first, verb, object, second = np.moveaxis(self.words[concepts], -1, 0)
        pairs = []
        for place, (noun, adjective) in enumerate(((subject, first), (object, second))):
            phrase = [adjective, noun] if self.adjective_first else [noun, adjective]
            mark = [np.full_like(noun, self.marks[place])] if self.marks else []
            pairs.append([*phrase, *mark])
        parts = {"s": pairs[0], "v": [verb], "o": pairs[1]}
        return np.stack([word for part in self.order for word in parts[part]], axis=-1)


@functools.cache
def _preferences() -> dict[str, np.ndarray]:
    """Returns the four objects of each verb [VERBS, 4] and adjectives of each noun [NOUNS, 4], the likeliest first."""
    rng = np.random.default_rng(0)
    objects = [rng.permutation(NOUNS)[: len(_CHOICES)] for _ in range(VERBS)]
    adjectives = [rng.permutation(ADJECTIVES)[: len(_CHOICES)] for _ in range(NOUNS)]
    return {"objects": np.array(objects), "adjectives": np.array(adjectives)}


def meanings(shape: tuple[int, ...], rng: np.random.Generator) -> np.ndarray:
    """Returns meanings [*shape, 5] of sentences, which `Language.say` puts into symbols."""
    chances = 1 / np.arange(1, NOUNS + 1)
    subject = rng.choice(NOUNS, size=shape, p=chances / chances.sum())
    verb = rng.integers(VERBS, size=shape)
    ranks = rng.choice(len(_CHOICES), size=(3, *shape), p=_CHOICES)
    object = _preferences()["objects"][verb, ranks[0]]
    adjectives = [
        _preferences()["adjectives"][noun, rank]
        for noun, rank in ((subject, ranks[1]), (object, ranks[2]))
    ]
    return np.stack([subject, adjectives[0], verb, object, adjectives[1]], axis=-1)


@dataclasses.dataclass(frozen=True)
class ToySource(GeneratedSource):
    """Documents of one language, of `length` symbols."""

    language: int
    length: int

    validation_documents = 128

    @property
    def digest(self) -> str:
        return f"ToySource 2: {self}, {self.validation_documents}"

    def texts(self, split: str) -> list[str]:
        rng = np.random.default_rng([self.seed, self.splits.index(split), self.language])
        documents = self.num_input_examples(split)
        sentences = -(-self.length // (2 + min(5, Language(self.language).sentence_length)))
        meanings_NS5 = meanings((documents, sentences), rng)
        # The language in which sentences are said again; -1 for none.
        again_N = np.where(rng.random(documents) < 0.5, rng.integers(COMMON, size=documents), -1)
        if self.language >= COMMON:
            again_N[:] = -1
        rows: list[Any] = [None] * documents
        for again in np.unique(again_N).tolist():
            (places,) = np.nonzero(again_N == again)
            spoken = [self.language, *([again] if again >= 0 else [])]
            versions = [_tagged(number, meanings_NS5[places]) for number in spoken]
            text_NT = np.concatenate(versions, axis=-1).reshape(len(places), -1)[:, : self.length]
            for place, row in zip(places, text_NT, strict=True):
                rows[place] = text(row)
        return rows


def _tagged(number: int, meanings_NS5: np.ndarray) -> np.ndarray:
    """Returns sentences in a language [N, S, T], each between the language's sign and a stop."""
    sentences_NST = Language(number).say(meanings_NS5)
    ends = [
        np.full((*sentences_NST.shape[:2], 1), x)
        for x in (symbol("language", number), symbol("sign", "stop"))
    ]
    return np.concatenate([ends[0], sentences_NST, ends[1]], axis=-1)


@dataclasses.dataclass(frozen=True)
class Instruction(GeneratedSource):
    """Requests of one kind with their answers, as ids with loss weights.

    Attributes:
      kind: copy or translate.
      languages: of the sentence and of its answer.
      turns: whether `examples` have the signs of turns.
    """

    kind: str
    languages: tuple[int, int]
    turns: bool = True

    validation_documents = 64

    @property
    def digest(self) -> str:
        return f"Instruction 2: {self}, {self.validation_documents}"

    def requests(self, split: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns prompts and answers as symbols [N, T]; they have the same meanings with the signs of turns and without."""
        name = _task(self.kind, self.languages)
        rng = np.random.default_rng(
            [self.seed, self.splits.index(split), zlib.crc32(name.encode())]
        )
        count = self.num_input_examples(split)
        meaning = meanings((count,), rng)
        spoken, wanted = map(Language, self.languages)
        asked, answer = spoken.say(meaning), wanted.say(meaning)
        tags = [symbol("language", number) for number in self.languages]
        sign = functools.partial(symbol, "sign")
        before = [sign(self.kind), *tags]
        if self.turns:
            before = [sign("turn"), sign("user"), *before]
        after = [sign("end"), sign("turn"), sign("chatbot")] if self.turns else []
        prompt = np.concatenate([_rows(before, count), asked, _rows(after, count)], axis=1)
        return prompt, np.concatenate([answer, _rows([sign("end")], count)], axis=1)

    def examples(self, split: str) -> dict[str, Sequence[str] | np.ndarray]:
        """Returns {feature: values of all examples}; only answers and their ends are learnt."""
        prompt, answer = self.requests(split)
        weights = np.concatenate([np.zeros(prompt.shape), np.ones(answer.shape)], axis=1)
        return {
            "targets": (np.concatenate([prompt, answer], axis=1) + _SPECIAL).astype(np.int32),
            "loss_weights": weights.astype(np.float32),
            "document_id": [f"{self.name}/{split}/{i}" for i in range(len(prompt))],
        }


def _rows(symbols: Sequence[int], count: int) -> np.ndarray:
    return np.tile(np.array(symbols, np.int64), (count, 1))


def _task(kind: str, languages: tuple[int, int], *, turns: bool = True) -> str:
    numbers = languages[:1] if kind == "copy" else languages
    return "_".join(["toy", *([] if turns else ["plain"]), kind, *map(str, numbers)])


def instructions(documents: int, seed: int, *, turns: bool = True) -> list[Instruction]:
    """Returns the sources of instructions in the COMMON languages; `documents` of each to train on."""
    copies = [("copy", (i, i)) for i in range(COMMON)]
    pairs = [("translate", pair) for pair in itertools.permutations(range(COMMON), 2)]
    return [
        Instruction(_task(kind, spoken, turns=turns), documents, seed, kind, spoken, turns)
        for kind, spoken in copies + pairs
    ]


def instruction_tasks() -> list[str]:
    """Returns the tasks of instructions, with the signs of turns and without them."""
    return [one.name for turns in (True, False) for one in instructions(1, 0, turns=turns)]


def register(
    *,
    vocabulary: Any,
    documents: Size = 6400,
    length: Size = 64,
    requests: Size = 2048,
    seed: Seed = 0,
) -> None:
    """Registers a task for each language and kind of instruction, and the mixtures.

    Args:
      vocabulary: has all of SYMBOLS, in this order.
      documents: training documents of each language; 6,400 are enough for 800 batches of 32 in four languages.
      length: symbols of a document.
      requests: training examples of each kind of instruction and language.
      seed: seed of documents and requests; the languages do not depend on it.

    Raises:
      ValueError: the vocabulary has other symbols.
    """
    if getattr(vocabulary, "symbols", None) != SYMBOLS:
        raise ValueError(
            "toy_languages.register: the vocabulary must have the symbols of launch/papers/aya23/toy_languages.py: include "
            "t5x_configs/data/toy_languages.gin."
        )
    for number in range(LANGUAGES):
        tasks.register_source(
            f"toy_{number}",
            ToySource(f"toy_{number}", documents, seed, number, length),
            origin="toy_languages.register",
            vocabulary=vocabulary,
            add_bos=False,
            add_eos=False,
        )
    for count in COUNTS:
        tasks.register_mixture(f"toy_mix_{count}", {f"toy_{i}": 1.0 for i in range(count)})
    rates = {}
    sources = instructions(requests, seed)
    plain = instructions(requests, seed, turns=False)
    for source in [*sources, *plain]:
        tasks.register_rows(
            source,
            origin="toy_languages.register",
            features={"targets": vocabulary, "loss_weights": None},
            facts={"vocabulary": str(vocabulary)},
        )
    for source in sources:
        rates[source.name] = 1 / sum(one.kind == source.kind for one in sources)
    tasks.register_mixture("toy_instructions", rates)
