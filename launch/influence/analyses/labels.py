"""What the files of queries and documents say beyond the texts: tasks, kinds, answers, procedures, sources.

A query may have `task` and `kind` (such as factual or reasoning), `correct` (whether the completion is), `answer` and
`procedure` (patterns of launch/influence/analyses/search.py); a document may have `source`. All are optional.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.launch.inference.row_files import RowFileError
from espalier.launch.influence.analyses import search

ALL = "all queries"
NO_SOURCE, OTHER_SOURCES = "(none)", "(others)"
_MOST = 100  # characters of a name


@dataclasses.dataclass(frozen=True, kw_only=True)
class Query:
    """A query with its labels.

    Attributes:
      prompt, completion: as the file has them.
      task, kind: names, or "".
      correct: whether the completion is; None if not known.
      answer, procedure: patterns, or None.
    """

    prompt: Any
    completion: Any
    task: str = ""
    kind: str = ""
    correct: bool | None = None
    answer: search.Pattern | None = None
    procedure: search.Pattern | None = None


def query(row: Mapping[str, Any], where: str) -> Query:
    """Returns the query of a row.

    Raises:
      RowFileError: a label is of the wrong kind; the message names the place.
    """
    correct = row.get("correct")
    if correct is not None and not isinstance(correct, bool):
        raise RowFileError(f"{where}: 'correct' is {correct!r}: give true or false.")
    patterns = {}
    for key in ("answer", "procedure"):
        if row.get(key) is not None:
            try:
                patterns[key] = search.pattern(row[key])
            except ValueError as error:
                raise RowFileError(
                    f"{where}: {key!r} is not what can be searched for ({error}): give a text, a list of alternatives, or a "
                    "list of lists of texts that occur together."
                ) from None
    return Query(
        prompt=row.get("prompt"),
        completion=row.get("completion"),
        task=name(row, "task", where),
        kind=name(row, "kind", where),
        correct=correct,
        **patterns,
    )


def name(row: Mapping[str, Any], key: str, where: str) -> str:
    """Returns a short text of a row, "" without; raises RowFileError if it is none."""
    value = row.get(key)
    if value is None:
        return ""
    if not isinstance(value, str) or len(value) > _MOST:
        raise RowFileError(f"{where}: {key!r} must be a text of at most {_MOST} characters.")
    return value


def source(row: Mapping[str, Any]) -> str:
    """Returns the source of a document: a long one cut, other values than texts as JSON, and NO_SOURCE if there is none."""
    value = row.get("source")
    if value is None or value == "":
        return NO_SOURCE
    return (value if isinstance(value, str) else json.dumps(value))[:_MOST]


def groups(queries: Sequence[Query]) -> dict[str, list[int]]:
    """Returns the queries by kind; all together without kinds, and beside several ones."""
    kinds: dict[str, list[int]] = {}
    for q, one in enumerate(queries):
        if one.kind:
            kinds.setdefault(one.kind, []).append(q)
    every = {ALL: list(range(len(queries)))}
    return kinds if list(kinds.values()) == list(every.values()) else {**every, **kinds}
