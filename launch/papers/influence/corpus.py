"""Writes the small corpus of a seed, its queries, and the halves of it that models are trained on again.

  python -m espalier.launch.papers.influence.corpus --to=DIR --seed=0

In DIR are documents.jsonl and held_out.jsonl ({"text", "source"}), queries.jsonl ({"prompt", "completion", "group",
"answer"}), halves.npz with the subsets, and half_00.jsonl and so on: all documents in their order, in which each one that
is left out is replaced by a blank one of its length. So all runs read the same places in the same order.
"""

if __name__ == "__main__":
    from espalier.launch.papers.influence import corpus

    raise SystemExit(corpus.main())

import argparse
import dataclasses
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from espalier.launch import cli
from espalier.launch.inference import row_files
from espalier.launch.papers.influence import small_corpus
from espalier.launch.papers.influence.small_corpus import Document

HALVES = 12
DOCUMENTS, HELD_OUT, QUERIES, SUBSETS = (
    *("documents.jsonl", "held_out.jsonl"),
    *("queries.jsonl", "halves.npz"),
)
_HELD_OUT_SEEDS = 1_000_000  # added to a seed, for its held-out documents
_TEXT_BYTES = 3_000_000  # of docstrings


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return cli.run_command(__doc__, "corpus", _run, add_flags=_add_flags, argv=argv)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--to", required=True, metavar="DIR", help="write the results to this folder"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the corpus")


def _run(flags: argparse.Namespace) -> None:
    from espalier.data.text import corpus

    texts = corpus.assemble(sources=("docstrings",), bytes_per_source=_TEXT_BYTES)
    lines = small_corpus.text_lines(
        document.text for document in texts.documents("docstrings", "train")
    )
    write(pathlib.Path(flags.to), lines, flags.seed)


def write(
    folder: pathlib.Path, lines: Sequence[str], seed: int, **sizes: Any
) -> tuple[list[Document], np.ndarray]:
    """Writes all files of a seed; returns the documents, and whether each half has each document [halves, documents].

    Args:
      folder: is created.
      lines: real text.
      seed: of everything.
      **sizes: numbers of documents and queries, for `small_corpus.draw`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    documents, queries = small_corpus.draw(lines, seed, **sizes)
    others, _ = small_corpus.draw(lines, seed + _HELD_OUT_SEEDS, **sizes)
    # Another seed has other countries.
    held_out = [one for one in others if one.source != small_corpus.FACT]
    write_documents(folder / DOCUMENTS, documents)
    write_documents(folder / HELD_OUT, held_out[: len(held_out) // 10])
    row_files.write(str(folder / QUERIES), map(dataclasses.asdict, queries))
    halves_SN = halves(len(documents), np.random.default_rng((seed, 1)))
    for name, kept_N in zip(half_names(), halves_SN, strict=True):
        write_documents(folder / f"{name}.jsonl", without(documents, np.flatnonzero(~kept_N)))
    np.savez_compressed(folder / SUBSETS, halves=halves_SN)
    return documents, halves_SN


def half_names() -> list[str]:
    """Returns the names of the halves, which are also those of their files and arms."""
    return [f"half_{i:02d}" for i in range(HALVES)]


def halves(documents: int, rng: np.random.Generator) -> np.ndarray:
    """Returns random halves [halves, documents]."""
    return np.stack([rng.permutation(documents) < documents // 2 for _ in range(HALVES)])


def without(documents: Sequence[Document], removed: Iterable[int]) -> list[Document]:
    """Returns the documents with some of them blank."""
    gone = {int(index) for index in removed}
    return [one.removed() if i in gone else one for i, one in enumerate(documents)]


def write_documents(path: pathlib.Path, documents: Sequence[Document]) -> None:
    row_files.write(str(path), map(dataclasses.asdict, documents))


def read_documents(folder: pathlib.Path) -> list[Document]:
    return [Document(**row) for row in _rows(folder / DOCUMENTS)]


def read_queries(folder: pathlib.Path) -> list[small_corpus.Query]:
    return [small_corpus.Query(**row) for row in _rows(folder / QUERIES)]


def read_halves(folder: pathlib.Path) -> np.ndarray:
    """Returns whether each half has each document [halves, documents]."""
    with np.load(folder / SUBSETS) as arrays:
        return arrays["halves"]


def _rows(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
