"""Answers of a sentence and more by a converted chat model, about contexts of real text, under the compared policies.

A context is read once, and each question after it. The documentation's answer is scored by its log-probability, token by token,
under each policy's cache, and the model's own greedy answer by its overlap with it (ROUGE-L). The first token of an answer
follows from the whole prompt, so that later tokens are what tests a policy. The least that a policy can have is what the model
says of the answer without any context.
"""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tqdm.auto import tqdm

from espalier.launch.load.load_run import LoadedRun
from espalier.launch.papers.shared import sweeps
from espalier.launch.papers.shared.sweeps import Stages
from espalier.launch.papers.snapkv import documentation
from espalier.launch.papers.snapkv.documentation import Context, Entry
from espalier.launch.papers.snapkv.methods import FULL, CachedModel, Held, Method, pooled
from espalier.trainers.decoding.settings import Settings
from espalier.trainers.snapkv import replay

SUFFIX, ANSWER = 64, 96  # tokens that questions and answers are padded to
NEW_TOKENS = 48
_WINDOW = 32  # which the question fits; the paper's for LongBench, with a kernel of 7
# With a kernel of 2 * answer - 1 a vote for one token of an answer keeps all of it: 63 is that of 32 tokens.
PAPER, WIDE = "snapkv_7", "snapkv_63"


@dataclasses.dataclass(frozen=True)
class Size:
    """Contexts of one length.

    Attributes:
      tokens: of a context, at most.
      capacity: at which policies are compared.
      contexts: how many judge.
    """

    tokens: int
    capacity: int
    contexts: int


MAIN = Size(tokens=4096, capacity=512, contexts=10)
# The paper's 1,024 slots, and 4,096 of H2O.
LONG = Size(tokens=8192, capacity=1024, contexts=2)
SIZES = (MAIN, LONG)


def cases(size: Size) -> dict[str, tuple[Method, int]]:
    """Returns name -> (method, capacity) beside the full cache."""
    return {
        PAPER: (pooled(_WINDOW, 7), size.capacity),
        WIDE: (pooled(_WINDOW, 63), size.capacity),
        "snapkv_1": (pooled(_WINDOW, 1), size.capacity),
        "tova": (Method("TOVA", "tova"), size.capacity),
        "h2o_4": (Method("H2O", "h2o", {"window": _WINDOW}), 4 * size.capacity),
    }


def capacities(size: Size) -> dict[str, int]:
    return {name: capacity for name, (_, capacity) in cases(size).items()}


ANSWERED = ("full", PAPER, WIDE, "h2o_4")  # whose own answers are generated


class Reader:
    """A chat model that reads contexts and answers questions about them."""

    def __init__(self, run: LoadedRun):
        self.run = run
        self.model = CachedModel.of_run(run)
        self.settings = Settings(max_new_tokens=NEW_TOKENS, eos_ids=tuple(run.eos_ids))

    def encode(self, text: str) -> list[int]:
        return self.run.vocabulary.encode(text)

    def prompt(self, context: str, entry: Entry) -> tuple[str, str]:
        """Returns the prompt up to the end of a context, and from there to the beginning of the answer."""
        question = Context.question(entry)
        content = f"{context}\n\n{question}" if context else question
        text = self.run.chat_template.render(
            [{"role": "user", "content": content}], add_generation_prompt=True
        )
        cut = text.index(content) + len(context)
        return text[:cut], text[cut:] + Context.opening(entry)

    def measure(self, context: Context, size: Size) -> dict[str, Any]:
        """Returns what every policy makes of the questions about a context.

        Returns:
          {'losses': name -> [for each question the nats of the answer's tokens]; 'none' is without a context,
          'overlaps': name -> [ROUGE-L of its own answers], 'answers': name -> [texts], 'tokens': of the context}.
        """
        from espalier.launch.evaluate.suites.scores import rouge_l

        prefix = self.encode(self.prompt(context.text, context.asked[0])[0])
        read = self.model.record(_padded([prefix], size.tokens), jnp.array([len(prefix)]))
        read = jax.block_until_ready(read)
        held: dict[str, list[Held]] = {}
        for entry in context.asked:  # one at a time, since a recording takes much memory
            for name, one in self._held(read, context, entry, size).items():
                held.setdefault(name, []).append(one)
        texts = [context.answer(entry) for entry in context.asked]
        rows = [self.encode(text)[:ANSWER] for text in texts]
        counts_B, given_BX = np.array([len(row) for row in rows]), _padded(rows, ANSWER)
        losses, answers = {}, {}
        for name, some in held.items():
            together = Held.of(some)
            log_BX = self.model.log_probabilities(together, given_BX, counts_B)
            losses[name] = [
                [round(-float(x), 4) for x in log_X[:count]]
                for log_X, count in zip(log_BX, counts_B, strict=True)
            ]
            if name in ANSWERED:
                tokens_BM = self.model.generate(together, self.settings)
                answers[name] = [self._text(row) for row in tokens_BM.tolist()]
        return {
            "asked": [entry.name for entry in context.asked],
            "tokens": len(prefix),
            "losses": losses,
            "overlaps": {
                name: [round(rouge_l(one, text), 4) for one, text in zip(some, texts, strict=True)]
                for name, some in answers.items()
            },
            "answers": answers,
        }

    def _text(self, tokens: Sequence[int]) -> str:
        """Returns the first line of an answer, up to its end."""
        answer = itertools.takewhile(lambda one: one not in self.settings.eos_ids, tokens)
        return self.run.vocabulary.decode(list(answer)).strip().split("\n")[0]

    def _held(
        self, read: replay.Recording, context: Context, entry: Entry, size: Size
    ) -> dict[str, Held]:
        """Returns what every method holds of a context and a question about it, and of the question alone."""
        suffix = self.encode(self.prompt(context.text, entry)[1])
        counts_B = jnp.array([len(suffix)])
        whole = self.model.record_more(read, jnp.asarray(_padded([suffix], SUFFIX)), counts_B)
        alone = self.encode("".join(self.prompt("", entry)))
        bare = self.model.record(_padded([alone], 2 * SUFFIX), jnp.array([len(alone)]))
        every = {"none": (bare, FULL, 0), "full": (whole, FULL, 0)}
        every |= {name: (whole, *case) for name, case in cases(size).items()}
        return {name: self.model.hold(*case, room=ANSWER) for name, case in every.items()}


def _padded(rows: Sequence[Sequence[int]], length: int) -> np.ndarray:
    """Returns tokens [rows, length].

    Raises:
      ValueError: a row has more of them.
    """
    if (most := max(map(len, rows))) > length:
        raise ValueError(f"{most} tokens do not fit {length}.")
    return np.array([[*row, *[0] * (length - len(row))] for row in rows], np.int32)


def measure_all(run: LoadedRun, stages: Stages, sizes: Sequence[Size] = SIZES) -> list[Any]:
    """Returns what `Reader.measure` does of each context, with 'size', its number as 'context', and 'seconds'."""
    reader, listed = Reader(run), documentation.entries()
    count = lambda text: len(reader.encode(text))  # noqa: E731
    out = []
    for size in sizes:
        numbers = sweeps.seeds(size.contexts)
        for number in tqdm(numbers, desc=f"{size.tokens} tokens", unit="context", disable=None):

            def one(number: int = number, size: Size = size) -> dict[str, Any]:
                rng = np.random.default_rng((number, size.tokens))
                # Room for the template's words before the context.
                made = documentation.context(rng, listed, count, size.tokens - SUFFIX)
                return reader.measure(made, size)

            settings = {
                "size": dataclasses.asdict(size) | {"contexts": None},
                "number": number,
                "entries": len(listed),
                "cases": [(name, vars(method), c) for name, (method, c) in cases(size).items()],
            }
            stage = stages.get(f"sentences_{size.tokens}_{number}", settings, one)
            facts = {"size": size.tokens, "context": number, "seconds": stage["seconds"]}
            out.append({**facts, **stage["result"]})
    return out
