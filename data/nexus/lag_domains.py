"""Generated domains whose entropy is known, to measure what experts know of each (2408.08274, 2408.15901).

In a document of a domain the next symbol is, with probability `copied`, the one `lag` back, else it follows
the domain's table: four successors of the symbol before, of the probabilities SUCCESSORS. Copying is what an
attention learns, the table what an FFN does. The first symbol is any, all equally likely, and until there is
one `lag` back nothing is copied. Tasks, and their mixture `lag_domains`:

  lag_general  copies a fifth of the symbols, from two back
  lag_N        copies half of them, from N back; N is 4, 5, 7, 9, 11, 13 or 15

`lag_4` and `lag_5` are related: 70 % of their tables' rows are the same. All other tables have nothing in common.

Shapes: V symbols, K successors, N documents, T symbols of a document.
"""

import dataclasses
import functools
from typing import Any

import numpy as np

from data import tasks

SYMBOLS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUV"
SUCCESSORS = (0.55, 0.25, 0.15, 0.05)
RELATED = 0.7  # of the rows of a table that is made from another one
SPLITS = ("train", "validation")
VALIDATION_DOCUMENTS = 1024


@dataclasses.dataclass(frozen=True)
class Domain:
    """How a domain's documents are made.

    Attributes:
      lag: how far back the symbol lies that is copied.
      copied: probability that one is.
      table: seed of the table.
      related_to: seed of another table, of which this one has RELATED of the rows.
    """

    lag: int
    copied: float
    table: int
    related_to: int | None = None

    @functools.cached_property
    def successors_VK(self) -> np.ndarray:
        """What may follow each symbol, the most probable first."""
        rng = np.random.default_rng(self.table)
        own_VK = rng.permuted(np.tile(np.arange(len(SYMBOLS)), (len(SYMBOLS), 1)), axis=1)
        own_VK = own_VK[:, : len(SUCCESSORS)]
        if self.related_to is not None:
            other = dataclasses.replace(self, table=self.related_to, related_to=None)
            same = rng.permutation(len(SYMBOLS))[: round(RELATED * len(SYMBOLS))]
            own_VK[same] = other.successors_VK[same]
        return own_VK

    @property
    def table_VV(self) -> np.ndarray:
        """Probability of each symbol (column) after another (row) where nothing is copied."""
        table_VV = np.zeros((len(SYMBOLS), len(SYMBOLS)))
        np.put_along_axis(table_VV, self.successors_VK, np.array([SUCCESSORS]), axis=1)
        return table_VV


DOMAINS = {
    "lag_general": Domain(lag=2, copied=0.2, table=2),
    **{
        f"lag_{lag}": Domain(lag, 0.5, table=lag, related_to=4 if lag == 5 else None)
        for lag in (4, 5, 7, 9, 11, 13, 15)
    },
}


def draw(domain: Domain, documents: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """Documents [N, T] of indices into SYMBOLS; the first ones are the same however many are drawn."""
    copies_NT, ranks_NT = np.moveaxis(rng.random((documents, length, 2)), -1, 0)
    copies_NT = copies_NT < domain.copied
    first_N = (ranks_NT[:, 0] * len(SYMBOLS)).astype(np.uint8)
    ranks_NT = np.searchsorted(np.cumsum(SUCCESSORS)[:-1], ranks_NT, side="right")
    found_NT = np.empty((documents, length), np.uint8)
    found_NT[:, 0] = first_N
    for t in range(1, length):
        found_NT[:, t] = domain.successors_VK[found_NT[:, t - 1], ranks_NT[:, t]]
        if t >= domain.lag:
            copy_N = copies_NT[:, t]
            found_NT[copy_N, t] = found_NT[copy_N, t - domain.lag]
    return found_NT


def entropies(domain: Domain, length: int = 64) -> np.ndarray:
    """Entropy [T], in nats, of each symbol of a document given the domain and all symbols before it.

    It is exact. The next symbol depends on two, the one before and the one `lag` back, and their joint
    distribution follows by recursion: with a < b and J(a, b) [V, V] that of the symbols at a and b,

      J(a, b) = copied J(a, b - lag) + (1 - copied) J(a, b - 1) table,   J(b, a) = J(a, b)'

    since given all before b the symbol at b is drawn from copied delta(x[b - lag]) + (1 - copied) table[x[b - 1]].
    """
    table_VV, symbols = domain.table_VV, range(len(SYMBOLS))
    # After the pair (one `lag` back, the one before), and where nothing can be copied.
    after_VVV = domain.copied * np.eye(len(symbols))[:, None] + (1 - domain.copied) * table_VV
    copying_VV, following_V = _entropy(after_VVV), _entropy(table_VV)
    marginals = [np.full(len(symbols), 1 / len(symbols))]
    joints = {(0, 0): np.diag(marginals[0])}
    found = [float(np.log(len(symbols)))]
    for b in range(1, length):
        starting = b < domain.lag
        copied = 0.0 if starting else domain.copied
        found.append(
            float(
                marginals[-1] @ following_V
                if starting
                else np.sum(joints[b - domain.lag, b - 1] * copying_VV)
            )
        )
        back = 0 if starting else b - domain.lag
        for a in range(max(0, b - domain.lag + 1), b):
            copying = joints[back, a].T if back <= a else joints[a, back]
            joints[a, b] = copied * copying + (1 - copied) * joints[a, b - 1] @ table_VV
        marginals.append(copied * marginals[back] + (1 - copied) * marginals[-1] @ table_VV)
        joints[b, b] = np.diag(marginals[-1])
    return np.array(found)


def entropy_floor(domain: Domain, length: int = 64) -> float:
    """The least mean loss, in nats per token, on documents of a domain, as runs measure it.

    A document has no EOS: what is counted are its `length` symbols, the first one among them.
    """
    return float(entropies(domain, length).mean())


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    """Of distributions along the last axis, in nats."""
    logs = np.log(probabilities, where=probabilities > 0, out=np.zeros_like(probabilities))
    return -(probabilities * logs).sum(-1)


@dataclasses.dataclass(frozen=True)
class LagSource:
    """Documents of one domain; satisfies `seqio.DataSourceInterface`."""

    name: str
    train_documents: int
    length: int
    seed: int

    splits = SPLITS
    caching_permitted = True
    supports_arbitrary_sharding = False
    performs_internal_shuffling = False

    @property
    def digest(self) -> str:
        sizes = (SYMBOLS, SUCCESSORS, RELATED, VALIDATION_DOCUMENTS)
        return f"{type(self).__name__} of {sizes}, {DOMAINS[self.name]}: {self}"

    def num_input_examples(self, split: str) -> int:
        return self.train_documents if split == "train" else VALIDATION_DOCUMENTS

    def list_shards(self, split: str) -> list[str]:
        return [split]

    def texts(self, split: str) -> list[str]:
        """All documents of a split."""
        domain = DOMAINS[self.name]
        rng = np.random.default_rng((self.seed, SPLITS.index(split), domain.table))
        found_NT = draw(domain, self.num_input_examples(split), self.length, rng)
        return [row.tobytes().decode() for row in np.frombuffer(SYMBOLS.encode(), "u1")[found_NT]]

    def get_dataset(self, split: str = "train", shuffle=True, seed=None, shard_info=None, **_):
        """`{"text", "document_id"}` as a `tf.data.Dataset`, in random order as they are."""
        import tensorflow as tf

        del shuffle, shard_info  # drawn at random; one shard
        texts = self.texts(split)
        ids = [f"{self.name}/{split}/{i}" for i in range(len(texts))]
        return tf.data.Dataset.from_tensor_slices({"text": texts, "document_id": ids})


def register(*, vocabulary: Any, documents: int = 60_000, length: int = 64, seed: int = 0) -> None:
    """Registers a task for each domain, and their mixture `lag_domains`.

    Documents have no EOS, so that one fills a row of `length` targets.

    Args:
      vocabulary: of SYMBOLS.
      documents: of each domain to train on; 1,500 batches of 32 repeat none of 60,000.
      length: of a document, in symbols.
      seed: of the documents; domains are the same for all seeds.

    Raises:
      ValueError: no document or no symbol, or the vocabulary lacks a character.
    """
    if documents < 1 or length < 1:
        raise ValueError(
            f"lag_domains.register.documents = {documents} and length = {length} must be at least 1."
        )
    if missing := [s for s in SYMBOLS if vocabulary.unk_id in vocabulary.encode(s)]:
        raise ValueError(
            f"{vocabulary} lacks {''.join(missing)!r}, which the generated documents have: set "
            f"vocabularies.characters.symbols = {SYMBOLS!r}."
        )
    for name in DOMAINS:
        tasks.register_source(
            name,
            LagSource(name, documents, length, seed),
            origin="lag_domains.register",
            vocabulary=vocabulary,
            add_bos=False,
            add_eos=False,
        )
    tasks.register_mixture("lag_domains", dict.fromkeys(DOMAINS, 1.0))
