"""Generated domains with known entropy, to measure what experts learn of each (arXiv 2408.08274, 2408.15901).

With probability `copied`, the next symbol of a document is the symbol `lag` positions back. Otherwise it is drawn
from the domain's table: each symbol has four successors with the probabilities SUCCESSORS. Attention learns to
copy; an FFN learns the table. The first symbol is uniform. The first `lag` symbols of a document are not copied.
Tasks, and their mixture `lag_domains`:

  lag_general  copies a fifth of the symbols, from 2 positions back
  lag_N        copies half of the symbols, from N positions back; N is 4, 5, 7, 9, 11, 13 or 15
  kin_F        copies half of the symbols; F is one of the families a, b, c and d, which have a lag each
  kin_F70      as kin_F, with 70 % of the rows of its table
  kin_F40      as kin_F, with 40 % of the rows of its table

`lag_4` and `lag_5` are related: 70 % of the rows of their tables are the same. All other tables are independent. The
domains of a family have one lag, so that only their tables tell them apart.

Shapes: V symbols, K successors, N documents, T symbols of a document.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np

from espalier.common.ranges import Count, Seed, Size
from espalier.data import tasks
from espalier.data.data_source import GeneratedSource

CACHED_AS = "data.nexus.lag_domains"  # the name by which caches of its data know it

SYMBOLS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUV"
SUCCESSORS = (0.55, 0.25, 0.15, 0.05)
RELATED = 0.7  # share of rows that a related table copies, if its domain has no other share


@dataclasses.dataclass(frozen=True)
class Domain:
    """The distribution of a domain's documents."""

    lag: int  # distance, in symbols, to the symbol that is copied
    copied: float  # probability of copying
    table: int  # seed of the table
    # seed of another table; this table has the share `related` of its rows
    related_to: int | None = None
    related = RELATED

    @functools.cached_property
    def successors_VK(self) -> np.ndarray:
        """Returns the possible successors [V, K] of each symbol, the most probable first."""
        rng = np.random.default_rng(self.table)
        own_VK = rng.permuted(np.tile(np.arange(len(SYMBOLS)), (len(SYMBOLS), 1)), axis=1)
        own_VK = own_VK[:, : len(SUCCESSORS)]
        if self.related_to is not None:
            same = rng.permutation(len(SYMBOLS))[: round(self.related * len(SYMBOLS))]
            other = Domain(self.lag, self.copied, self.related_to)
            own_VK[same] = other.successors_VK[same]
        return own_VK

    @property
    def table_VV(self) -> np.ndarray:
        """Returns the probability [V, V] of each symbol (column) after another (row), without copying."""
        table_VV = np.zeros((len(SYMBOLS), len(SYMBOLS)))
        np.put_along_axis(table_VV, self.successors_VK, np.array([SUCCESSORS]), axis=1)
        return table_VV


@dataclasses.dataclass(frozen=True)
class Kin(Domain):
    """A domain with a share of related rows of its own."""

    related: float = RELATED


LAGS = {
    "lag_general": Domain(lag=2, copied=0.2, table=2),
    **{
        f"lag_{lag}": Domain(lag, 0.5, table=lag, related_to=4 if lag == 5 else None)
        for lag in (4, 5, 7, 9, 11, 13, 15)
    },
}
_FAMILIES = {"a": (4, 104), "b": (7, 107), "c": (9, 109), "d": (11, 111)}  # lag, seed of the table
KIN = {
    **{f"kin_{family}": Domain(lag, 0.5, table) for family, (lag, table) in _FAMILIES.items()},
    **{
        f"kin_{family}{share}": Kin(lag, 0.5, table + share, related_to=table, related=share / 100)
        for family, (lag, table) in _FAMILIES.items()
        for share in (70, 40)
    },
}
DOMAINS = LAGS | KIN


def draw(domain: Domain, documents: int, length: int, rng: np.random.Generator) -> np.ndarray:
    """Returns documents [N, T] as indices into SYMBOLS; more documents do not change the first ones."""
    copies_NT, ranks_NT = np.moveaxis(rng.random((documents, length, 2)), -1, 0)
    copies_NT = copies_NT < domain.copied
    first_N = (ranks_NT[:, 0] * len(SYMBOLS)).astype(np.uint8)
    ranks_NT = np.searchsorted(np.cumsum(SUCCESSORS)[:-1], ranks_NT, side="right")
    symbols_NT = np.empty((documents, length), np.uint8)
    symbols_NT[:, 0] = first_N
    for t in range(1, length):
        symbols_NT[:, t] = domain.successors_VK[symbols_NT[:, t - 1], ranks_NT[:, t]]
        if t >= domain.lag:
            copy_N = copies_NT[:, t]
            symbols_NT[copy_N, t] = symbols_NT[copy_N, t - domain.lag]
    return symbols_NT


def entropies(domain: Domain, length: int = 64) -> np.ndarray:
    """Returns the entropy [T], in nats, of each symbol given the domain and all symbols before it.

    The entropy is exact. The next symbol depends on two symbols only: the previous one and the one `lag` back.
    Their joint distribution follows by recursion. With a < b and J(a, b) [V, V] the joint distribution of the
    symbols at a and b,

      J(a, b) = copied J(a, b - lag) + (1 - copied) J(a, b - 1) table,   J(b, a) = J(a, b)'

    because the distribution of the symbol at b, given all symbols before it, is
    copied delta(x[b - lag]) + (1 - copied) table[x[b - 1]].
    """
    table_VV, symbols = domain.table_VV, range(len(SYMBOLS))
    # Distributions of the next symbol: after the pair (symbol `lag` back, previous symbol), and without copying.
    after_VVV = domain.copied * np.eye(len(symbols))[:, None] + (1 - domain.copied) * table_VV
    copying_VV, following_V = _entropy(after_VVV), _entropy(table_VV)
    marginals = [np.full(len(symbols), 1 / len(symbols))]
    joints = {(0, 0): np.diag(marginals[0])}
    per_symbol = [float(np.log(len(symbols)))]
    for b in range(1, length):
        starting = b < domain.lag
        copied = 0.0 if starting else domain.copied
        back = 0 if starting else b - domain.lag
        per_symbol.append(
            float(
                marginals[-1] @ following_V
                if starting
                else np.sum(joints[back, b - 1] * copying_VV)
            )
        )
        for a in range(max(0, b - domain.lag + 1), b):
            copying = joints[back, a].T if back <= a else joints[a, back]
            joints[a, b] = copied * copying + (1 - copied) * joints[a, b - 1] @ table_VV
        marginals.append(copied * marginals[back] + (1 - copied) * marginals[-1] @ table_VV)
        joints[b, b] = np.diag(marginals[-1])
    return np.array(per_symbol)


def entropy_floor(domain: Domain, length: int = 64) -> float:
    """Returns the least possible mean loss, in nats per token, on documents of a domain.

    As in a run's loss, the mean is over all `length` symbols, the first one included; there is no EOS.
    """
    return float(entropies(domain, length).mean())


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    """Returns the entropy of distributions along the last axis, in nats."""
    logs = np.log(probabilities, where=probabilities > 0, out=np.zeros_like(probabilities))
    return -(probabilities * logs).sum(-1)


@dataclasses.dataclass(frozen=True)
class LagSource(GeneratedSource):
    """Documents of one domain."""

    length: int  # symbols of a document

    @property
    def digest(self) -> str:
        sizes = (SYMBOLS, SUCCESSORS, RELATED, self.validation_documents)
        return f"{type(self).__name__} of {sizes}, {DOMAINS[self.name]}: {self}"

    def texts(self, split: str) -> list[str]:
        domain = DOMAINS[self.name]
        rng = np.random.default_rng((self.seed, self.splits.index(split), domain.table))
        symbols_NT = draw(domain, self.num_input_examples(split), self.length, rng)
        return [row.tobytes().decode() for row in np.frombuffer(SYMBOLS.encode(), "u1")[symbols_NT]]


def register(
    *,
    vocabulary: Any,
    domains: Sequence[str] = tuple(LAGS),
    documents: Count = 60_000,
    length: Size = 64,
    seed: Seed = 0,
) -> None:
    """Registers a task for each domain, and their mixture `lag_domains`.

    Documents have no EOS, so a document fills a row of `length` targets.

    Args:
      vocabulary: has all of SYMBOLS.
      domains: names of DOMAINS.
      documents: training documents of each domain; 60,000 are enough for 1,500 batches of 32 without repetition.
      length: symbols of a document.
      seed: seed of the documents; the domains do not depend on it.

    Raises:
      ValueError: `documents` or `length` is below 1, or the vocabulary lacks a character.
    """
    if documents < 1 or length < 1:
        raise ValueError(
            f"lag_domains.register.documents = {documents} and length = {length} must be at least 1."
        )
    tasks.register_generated(
        [LagSource(name, documents, seed, length) for name in domains],
        mixture="lag_domains",
        symbols=SYMBOLS,
        origin="lag_domains.register",
        vocabulary=vocabulary,
        add_eos=False,
    )
