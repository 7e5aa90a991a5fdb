"""What a report needs of the scored documents: texts, sources, and the documents in which patterns occur."""

import dataclasses
import itertools
import json
import os
from collections.abc import Collection, Iterator, Mapping
from typing import Any

import numpy as np

from espalier.common.bars import Bar
from espalier.data.text import documents
from espalier.launch.inference import row_files
from espalier.launch.inference.row_files import RowFileError
from espalier.launch.influence import inputs, ranking
from espalier.launch.influence.analyses import labels, search


@dataclasses.dataclass(frozen=True)
class Corpus:
    """The documents.

    Attributes:
      texts: texts of wanted documents by number.
      sources: source of each document; None if no document has one.
      matching: numbers of the documents with a pattern, by its key; empty if the documents are no file.
    """

    texts: Mapping[int, str]
    sources: list[str] | None
    matching: Mapping[Any, np.ndarray]


def check_same(path: str, recorded: Mapping[str, Any], flag: str) -> None:
    """Raises RowFileError if a file is not the one that was scored."""
    try:
        digest = inputs.digest(path, flag)
    except RowFileError as error:
        raise RowFileError(f"{error} If it was moved, give its new place with --{flag}.") from None
    if digest != recorded["sha256"]:
        raise RowFileError(
            f"--{flag}={path} has changed since it was scored: give the file that was scored, or score again with another "
            "--out."
        )


def read(
    scores: str,
    path: str | None,
    wanted: Collection[int],
    patterns: Mapping[Any, search.Pattern],
    *,
    count: int,
    limit: int | None,
) -> Corpus:
    """Reads the documents once.

    Args:
      scores: file of scores, which decoded texts are beside.
      path: JSON lines of documents; None for those of a mixture.
      wanted: numbers of the documents whose texts are returned.
      patterns: what is searched, by any key.
      count: number of scored documents.
      limit: number of first documents of the file that were scored; None for all.

    Raises:
      RowFileError: the file of decoded texts is damaged.
      DataError: the file cannot be read.
    """
    texts = _decoded(scores)
    if path is None:
        return Corpus({i: texts[i] for i in wanted if i in texts}, None, {})
    file = row_files.local(path, "documents")
    sources: list[str] = []

    def each() -> Iterator[str]:
        lines = documents.read_json_lines(file, example=inputs.DOCUMENT_EXAMPLE)
        numbered = enumerate(itertools.islice(lines, limit))
        quiet = None if count > 10_000 else True
        for i, (_, row) in Bar(numbered, desc="documents", total=count, disable=quiet):
            sources.append(labels.source(row))
            text = row.get("text", row.get("tokens", ""))
            if not isinstance(text, str):
                text = texts.get(i, json.dumps(text))
            if i in wanted:
                texts[i] = text
            yield text

    matching = search.matches(each(), patterns)
    named = any(source != labels.NO_SOURCE for source in sources)
    return Corpus({i: texts[i] for i in wanted if i in texts}, sources if named else None, matching)


def _decoded(scores: str) -> dict[int, str]:
    """Returns the texts of documents that were read as tokens."""
    path = ranking.texts_file(scores)
    if not os.path.isfile(path):
        return {}
    rows = row_files.read(path, example='{"document": 0, "text": "..."}')
    try:
        return {int(row["document"]): str(row["text"]) for _, row in rows}
    except (KeyError, TypeError, ValueError):
        raise RowFileError(_damaged(path, "a row has no document and text")) from None


def token_rows(scores: str, *, queries: int, count: int) -> list[dict[str, Any]]:
    """Returns the token scores of top and bottom documents; none if they were not asked for.

    Args:
      scores: file of scores.
      queries, count: numbers of queries and documents.

    Raises:
      RowFileError: the file is damaged.
    """
    path = ranking.tokens_file(scores)
    if not os.path.isfile(path):
        return []
    try:
        rows = [row for _, row in row_files.read(path, example='{"query": 0, "scores": [0.1]}')]
    except documents.DataError as error:
        raise RowFileError(_damaged(path, str(error))) from None
    for number, row in enumerate(rows, 1):
        ids = row.get("query"), row.get("document")
        texts, values = row.get("texts"), row.get("scores")
        if (
            not all(
                type(i) is int and 0 <= i < n for i, n in zip(ids, (queries, count), strict=True)
            )
            or not isinstance(texts, list)
            or not isinstance(values, list)
            or len(texts) != len(values)
            or not all(isinstance(text, str) for text in texts)
            or not all(type(value) in (int, float) for value in values)
            or not isinstance(row.get("spurious"), bool)
        ):
            raise RowFileError(_damaged(path, f"line {number} has no text and score of each token"))
    return rows


def _damaged(path: str, problem: str) -> str:
    return (
        f"{path} is damaged ({problem}): delete it, and run the same `launch.influence score` command again, which writes it "
        "anew."
    )
