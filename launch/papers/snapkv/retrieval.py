"""A synthetic retrieval task: look up the values of a key among many lines (SnapKV, arXiv 2404.14469).

A document has lines "key v1 v2 v3 v4" with distinct keys, and questions about some of the lines. Each place in a
line has values of its own, so that a model need not count. If the question is last, it repeats the key after the
lines, and the answer is the key's four values. If the question is first, a question token of the key precedes the
lines, and a mark and the answer follow them. Only answers have loss weights.

Ids: 0 precedes every document; then come the keys, the values, the mark, and the question tokens of the keys.

Shapes: E examples, L lines, A answer tokens, Q questions, T tokens of a document.
"""

import dataclasses
from collections.abc import Sequence
from typing import Literal, get_args

import numpy as np

from espalier.common.ranges import Seed, Size, check_choice
from espalier.data import tasks
from espalier.data.data_source import GeneratedSource
from espalier.data.tokenizers.vocabulary import PassThroughVocabulary

CACHED_AS = "data.snapkv.retrieval"  # the name by which caches of its data know it

NUM_KEYS = 64
NUM_VALUES = 16  # of each place in a line
ANSWER_TOKENS = 4
LINE = 1 + ANSWER_TOKENS
FIRST_KEY = 1
FIRST_VALUE = FIRST_KEY + NUM_KEYS
MARK = FIRST_VALUE + ANSWER_TOKENS * NUM_VALUES
FIRST_ASKING = MARK + 1
VOCAB_SIZE = FIRST_ASKING + NUM_KEYS

Question = Literal["last", "first"]
QUESTIONS = get_args(Question)


@dataclasses.dataclass(frozen=True)
class Lines:
    """Lines of examples, without questions."""

    keys_EL: np.ndarray  # distinct within an example
    values_ELA: np.ndarray  # the values of each key

    def tokens_ET(self) -> np.ndarray:
        """Returns the lines of each example in sequence."""
        lines_ELX = np.concatenate([self.keys_EL[..., None], self.values_ELA], axis=-1)
        return lines_ELX.reshape(len(lines_ELX), -1)

    def answered_ET(self, asked_EQ: np.ndarray) -> np.ndarray:
        """Returns the lines with the indices `asked_EQ`: questions with their answers."""
        keys_EQ = np.take_along_axis(self.keys_EL, asked_EQ, axis=1)
        values_EQA = np.take_along_axis(self.values_ELA, asked_EQ[..., None], axis=1)
        return Lines(keys_EQ, values_EQA).tokens_ET()


def draw_lines(rng: np.random.Generator, examples: int, lines: int) -> Lines:
    """Returns random lines; raises ValueError if `lines` is below 1 or above the number of keys."""
    if not 1 <= lines <= NUM_KEYS:
        raise ValueError(f"lines = {lines} must lie in [1, {NUM_KEYS}]: keys are distinct.")
    keys_EK = np.tile(np.arange(NUM_KEYS, dtype=np.int32) + FIRST_KEY, (examples, 1))
    keys_EL = rng.permuted(keys_EK, axis=1)[:, :lines]
    values_ELA = rng.integers(NUM_VALUES, size=(examples, lines, ANSWER_TOKENS), dtype=np.int32)
    firsts_A = FIRST_VALUE + NUM_VALUES * np.arange(ANSWER_TOKENS, dtype=np.int32)
    return Lines(keys_EL, values_ELA + firsts_A)


def documents(
    rng: np.random.Generator, examples: int, lines: int, question: Question
) -> tuple[np.ndarray, np.ndarray]:
    """Returns training documents: tokens [E, T] and their loss weights [E, T].

    With the question last, a document asks for all lines in random order; with the question first, for one line.
    """
    check_choice("question", question, Question)
    context = draw_lines(rng, examples, lines)
    order_EL = rng.permuted(np.tile(np.arange(lines), (examples, 1)), axis=1)
    if question == "last":
        tokens_ET = np.concatenate([context.tokens_ET(), context.answered_ET(order_EL)], axis=1)
        answers = np.tile([False] + [True] * ANSWER_TOKENS, lines)
        weights_T = np.concatenate([np.zeros(lines * LINE, bool), answers])
    else:
        answered_EX = context.answered_ET(order_EL[:, :1])
        asking_E1 = answered_EX[:, :1] - FIRST_KEY + FIRST_ASKING
        mark_E1 = np.full((examples, 1), MARK, np.int32)
        tokens_ET = np.concatenate(
            [asking_E1, context.tokens_ET(), mark_E1, answered_EX[:, 1:]], axis=1
        )
        weights_T = np.arange(tokens_ET.shape[1]) >= tokens_ET.shape[1] - ANSWER_TOKENS
    return tokens_ET, np.broadcast_to(weights_T.astype(np.float32), tokens_ET.shape)


@dataclasses.dataclass(frozen=True)
class Prompts:
    """Prompts as a model reads them, beginning with id 0, and their answers."""

    tokens_ET: np.ndarray  # the prompts
    answers_EA: np.ndarray  # the answers
    line_E: np.ndarray  # index of the line in question, from 0


def draw_prompts(
    rng: np.random.Generator, context: Lines, question: Question = "last", *, asked_E=None
) -> Prompts:
    """Returns prompts about contexts of at least two lines, in the format of `documents`.

    With the question last, an answered question about another line precedes it, so that T is 7 + 5 L.

    Args:
      rng: chooses the lines in question.
      context: the lines.
      question: position of the question.
      asked_E: index of the line in question of each example; drawn if None.
    """
    examples, lines = context.keys_EL.shape
    drawn_E = rng.integers(lines, size=examples)
    asked_E = drawn_E if asked_E is None else asked_E
    other_E = (asked_E + rng.integers(1, lines, size=examples)) % lines
    line_EX = context.answered_ET(asked_E[:, None])
    start_E1 = np.zeros((examples, 1), np.int32)
    if question == "last":
        shown_EX = context.answered_ET(other_E[:, None])
        parts = [start_E1, context.tokens_ET(), shown_EX, line_EX[:, :1]]
    else:
        mark_E1 = np.full((examples, 1), MARK, np.int32)
        parts = [start_E1, line_EX[:, :1] - FIRST_KEY + FIRST_ASKING, context.tokens_ET(), mark_E1]
    return Prompts(np.concatenate(parts, axis=1), line_EX[:, 1:], asked_E)


@dataclasses.dataclass(frozen=True)
class RetrievalSource(GeneratedSource):
    """Documents of one kind: `targets` and `loss_weights`."""

    lines: int
    question: Question

    validation_documents = 256

    @property
    def digest(self) -> str:
        sizes = (NUM_KEYS, NUM_VALUES, ANSWER_TOKENS, self.validation_documents)
        return f"{type(self).__name__} of sizes {sizes}: {self}"

    def examples(self, split: str) -> dict[str, np.ndarray]:
        rng = np.random.default_rng((self.seed, self.lines, self.splits.index(split)))
        count = self.num_input_examples(split)
        tokens_ET, weights_ET = documents(rng, count, self.lines, self.question)
        return {"targets": tokens_ET, "loss_weights": weights_ET}


def register(
    *,
    lines: Sequence[Size] = (6, 12, 24, 48),
    train_documents: Size = 16384,
    seed: Seed = 0,
) -> None:
    """Registers tasks `retrieval_<lines>` and, with the question first, `retrieval_first_<lines>`.

    `retrieval` is the mixture of all of them; `stream.make_stream.phases` can order them as a curriculum.

    Args:
      lines: number of lines of each task.
      train_documents: training documents of each task.
      seed: seed of the documents.
    """
    names = []
    for question, prefix in (("last", "retrieval"), ("first", "retrieval_first")):
        for count in lines:
            name = f"{prefix}_{count}"
            tasks.register_rows(
                RetrievalSource(name, train_documents, seed, count, question),
                origin="retrieval.register",
                features={"targets": PassThroughVocabulary(VOCAB_SIZE), "loss_weights": None},
                facts={"vocabulary": f"{VOCAB_SIZE} ids", "add_bos": False, "add_eos": False},
            )
            names.append(name)
    tasks.register_mixture("retrieval", dict.fromkeys(names, 1.0))
