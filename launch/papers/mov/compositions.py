"""Two operations on strings, applied one after the other: many small tasks, for experiments on a CPU (arXiv 2309.05444).

    RPdbba  ->  bcce      reverse, then the next letter of the alphabet

An input is two letters that name operations, and four of twelve symbols; the target is the result. One of the operations moves symbols
and the other replaces them. Eight of each kind, in both orders, are 128 tasks, of which 32 are held out: each operation is in four of them, and both
orders of a pair are. To begin with, the 16 operations are learnt alone, with `copy` as the second.
"""

import dataclasses
import itertools
import random
import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.common.ranges import Seed, Size
from espalier.data import tasks
from espalier.data.data_source import GeneratedSource
from espalier.data.instructions.sources import Form

CACHED_AS = "data.mov.compositions"  # the name by which caches of its data know it

NUM_SYMBOLS, LENGTH = 12, 4
HELD_OUT_STRINGS = 10  # one string in ten is for validation, the same in all tasks

Array = np.ndarray  # [..., LENGTH] numbers of symbols
# Letter of the input, name and function of each operation.
MOVES: Mapping[str, tuple[str, Callable[[Array], Array]]] = {
    "R": ("reverse", lambda x: x[..., ::-1]),
    "O": ("rotate", lambda x: np.roll(x, -1, axis=-1)),
    "H": ("halves", lambda x: np.roll(x, LENGTH // 2, axis=-1)),
    "W": ("swap", lambda x: x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)),
    "B": ("back", lambda x: np.roll(x, 1, axis=-1)),
    "E": ("ends", lambda x: x[..., [3, 1, 2, 0]]),
    "M": ("middle", lambda x: x[..., [0, 2, 1, 3]]),
    "L": ("front", lambda x: x[..., [1, 0, 2, 3]]),
}


def _shift(by: int) -> Callable[[Array], Array]:
    return lambda x: (x + by) % NUM_SYMBOLS


_BY = {"P": 1, "S": 2, "Q": 3, "U": 4, "F": 5, "V": 7, "N": 8, "I": 9}
SHIFTS = {letter: (f"shift{by}", _shift(by)) for letter, by in _BY.items()}
COPY = "C"
OPERATIONS = {**MOVES, **SHIFTS, COPY: ("copy", lambda x: x)}
SINGLE = tuple((letter, COPY) for letter in (*MOVES, *SHIFTS))  # learnt before the compositions
LETTERS = "abcdefghijkl"
SYMBOLS = "".join(OPERATIONS) + LETTERS  # of the vocabulary

Pair = tuple[str, str]  # letters of the first and the second operation


def split_pairs(seed: int) -> tuple[list[Pair], list[Pair]]:
    """Returns the compositions that are trained and held out: of each move two shifts are, of each shift two moves, in both orders."""
    rng = random.Random(f"compositions {seed}")
    moves, shifts = (rng.sample([*each], len(each)) for each in (MOVES, SHIFTS))
    chosen = {*zip(moves, shifts, strict=True), *zip(moves, shifts[1:] + shifts[:1], strict=True)}
    every = [*itertools.product(MOVES, SHIFTS), *itertools.product(SHIFTS, MOVES)]
    held_out = [pair for pair in every if pair in chosen or pair[::-1] in chosen]
    return [pair for pair in every if pair not in held_out], held_out


def task_name(pair: Pair) -> str:
    """Returns the name of a composition's task, such as `mov_reverse_shift1`."""
    return "mov_" + "_".join(OPERATIONS[letter][0] for letter in pair)


def solve(pair: Pair, strings: Array) -> Array:
    """Returns both operations applied to strings [..., LENGTH]."""
    first, second = (OPERATIONS[letter][1] for letter in pair)
    return second(first(strings))


@dataclasses.dataclass(frozen=True)
class Composition(GeneratedSource):
    """Examples of one pair of operations as ids."""

    pair: Pair
    vocabulary: Any
    form: Form

    validation_documents = 64

    @property
    def digest(self) -> str:
        return f"Composition 3: {self.name} {self.train_documents} {self.seed} {self.form} {self.vocabulary}"

    def strings(self, split: str) -> Array:
        """Returns the strings of a split, [examples, LENGTH]."""
        rng = np.random.default_rng([self.seed, zlib.crc32(f"{self.name} {split}".encode())])
        size = self.num_input_examples(split)
        tens = rng.integers(NUM_SYMBOLS**LENGTH // HELD_OUT_STRINGS, size=size)
        ones = rng.integers(1, HELD_OUT_STRINGS, size=size) * (split == "train")
        numbers = tens * HELD_OUT_STRINGS + ones
        return numbers[:, None] // NUM_SYMBOLS ** np.arange(LENGTH) % NUM_SYMBOLS

    def texts(self, split: str) -> list[str]:
        """Returns the inputs of a split."""
        return ["".join(self.pair) + _text(row) for row in self.strings(split)]

    def examples(self, split: str) -> dict[str, Sequence[str] | np.ndarray]:
        """Returns {feature: values of all examples}."""
        answers = map(_text, solve(self.pair, self.strings(split)))
        inputs = self._ids(self.texts(split))
        targets = self._ids(answers, end=[self.vocabulary.eos_id])
        ids = {"document_id": [f"{self.name}/{split}/{i}" for i in range(len(inputs))]}
        if self.form == "encoder_decoder":
            return {"inputs": inputs, "targets": targets, **ids}
        weights = np.concatenate([np.zeros(inputs.shape), np.ones(targets.shape)], axis=1)
        return {
            "targets": np.concatenate([inputs, targets], axis=1),
            "loss_weights": weights.astype(np.float32),
            **ids,
        }

    def _ids(self, texts: Any, end: Sequence[int] = ()) -> np.ndarray:
        return np.array([[*self.vocabulary.encode(text), *end] for text in texts], np.int32)


def _text(row: Array) -> str:
    return "".join(LETTERS[number] for number in row)


def register(
    *,
    vocabulary: Any,
    form: Form = "encoder_decoder",
    documents: Size = 2048,
    seed: Seed = 0,
) -> None:
    """Registers a task for each composition and each operation, and mixtures with equal rates.

    The mixtures are `mov_pretrain` (16 operations, followed by copy), `mov_train` (96 compositions) and
    `mov_held_out` (32 others).

    Args:
      vocabulary: has all of SYMBOLS.
      form: see `data.instructions.tasks.register_instructions`; inputs have no EOS, a decoder has no separator.
      documents: training examples of a task.
      seed: seed of the strings and of the choice of held-out compositions.

    Raises:
      ValueError: the vocabulary lacks a symbol.
    """
    tasks.check_symbols(vocabulary, SYMBOLS)
    train, held_out = split_pairs(seed)
    for pair in (*SINGLE, *train, *held_out):
        source = Composition(task_name(pair), documents, seed, pair, vocabulary, form)
        decoder = form == "decoder"
        tasks.register_rows(
            source,
            origin="compositions.register",
            features={
                **({} if decoder else {"inputs": vocabulary}),
                "targets": vocabulary,
                **({"loss_weights": None} if decoder else {}),
            },
            facts={"vocabulary": str(vocabulary), "form": form},
        )
    for name, pairs in (("pretrain", SINGLE), ("train", train), ("held_out", held_out)):
        tasks.register_mixture(f"mov_{name}", dict.fromkeys(map(task_name, pairs), 1.0))
