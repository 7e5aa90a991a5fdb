"""What the files of queries and documents say beyond the texts, and the search for answers and procedures in documents.

A query may have `task` and `kind` (such as factual or reasoning), `correct` (whether the completion is), `control` (whether its
prompt states the answer), `answer` and `procedure`, which are patterns; a document may have `source`. All are optional.

A pattern is a text, or a list of alternatives; an alternative is a text, or a list of texts that must all occur, such as the
steps of a calculation. Letters' case and spaces do not matter, a text occurs only as whole words, and a whole number also as
words ("forty-two") and with commas (1,000).

Shapes: N documents, Q queries.
"""

import dataclasses
import functools
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.inference.row_files import RowFileError

Pattern = Sequence[Sequence[str]]  # alternatives, of texts that must all occur

_ONES = [
    "zero",
    "one",
    "two",
    "three",
    "four",
    "five",
    "six",
    "seven",
    "eight",
    "nine",
    "ten",
    "eleven",
    "twelve",
    "thirteen",
    "fourteen",
    "fifteen",
    "sixteen",
    "seventeen",
    "eighteen",
    "nineteen",
]
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_LARGEST_IN_WORDS = 999_999
_NUMBER, _WORD = re.compile(r"-?\d{1,15}"), re.compile(r"\w+")
ALL, NOT_CONTROLS = "all queries", "all but controls"
NO_SOURCE, OTHER_SOURCES = "(none)", "(others)"
_MOST = 100  # characters of a name


def pattern(value: Any) -> Pattern:
    """Returns the pattern of a JSON value.

    Raises:
      ValueError: it is none, or has an empty text.
    """
    alternatives = [value] if isinstance(value, str) else value
    if not isinstance(alternatives, list) or not alternatives:
        raise ValueError("it is neither a text nor a list of texts")
    result = []
    for one in alternatives:
        texts = [one] if isinstance(one, str) else one
        if not isinstance(texts, list) or not texts:
            raise ValueError("an alternative is neither a text nor a list of texts")
        if not all(isinstance(text, str) and normal(text) for text in texts):
            raise ValueError("a text of it is empty or no text")
        result.append(texts)
    return result


def normal(text: str) -> str:
    """Returns a text without case, with single spaces, and with '-' for the minus sign."""
    return " ".join(text.replace("\N{MINUS SIGN}", "-").casefold().split())


def in_words(number: int) -> str:
    """Returns a whole number below a million in English words."""
    if number < 0:
        return f"minus {in_words(-number)}"
    if number < 20:
        return _ONES[number]
    if number < 100:
        tens, ones = divmod(number, 10)
        return _TENS[tens - 2] + (f"-{_ONES[ones]}" if ones else "")
    size, name = (1000, "thousand") if number >= 1000 else (100, "hundred")
    head, rest = divmod(number, size)
    joined = " and " if rest < 100 else " "
    return f"{in_words(head)} {name}" + (f"{joined}{in_words(rest)}" if rest else "")


def spellings(text: str) -> list[str]:
    """Returns equivalent spellings of a text, in `normal` form."""
    plain = normal(text)
    if not _NUMBER.fullmatch(plain):
        return [plain]
    number = int(plain)
    result = [plain, f"{number:,}"]
    if abs(number) <= _LARGEST_IN_WORDS:
        words = in_words(number)
        result += [words, words.replace("-", " "), words.replace(" and ", " ")]
    return list(dict.fromkeys(result))


def occurs(text: str, wanted: Pattern) -> bool:
    """Returns whether a pattern occurs in a text of `normal` form."""
    return any(all(_has(text, part) for part in texts) for texts in wanted)


def _has(text: str, part: str) -> bool:
    # A search for the letters alone is fast, and decides most documents.
    return any(spelling in text and rule.search(text) for spelling, rule in _rules(part))


@functools.lru_cache(maxsize=65_536)
def _rules(part: str) -> tuple[tuple[str, re.Pattern[str]], ...]:
    number = _NUMBER.fullmatch(normal(part)) is not None
    return tuple((spelling, _whole(spelling, number)) for spelling in spellings(part))


def _whole(text: str, number: bool) -> re.Pattern[str]:
    """Returns the rule for a text as whole words; a number is no part of a longer, a decimal or a negative one."""
    hyphen = "-" if number else ""  # of forty-two
    before = rf"(?<![\w{hyphen}])" if _WORD.match(text) else ""
    after = rf"(?![\w{hyphen}])" if _WORD.match(text[-1]) else ""
    if text[0].isdigit():
        before = r"(?<!\w)(?<!\d[.,])(?<!(?<![\w)])-)"
    elif re.match(r"-\d", text):
        before = r"(?<![\w)])"
    if text[-1].isdigit():
        after = r"(?!\w)(?![.,]\d)"
    return re.compile(before + re.escape(text) + after)


def matches(texts: Iterable[str], patterns: Mapping[Any, Pattern]) -> dict[Any, np.ndarray]:
    """Returns the numbers of the documents in which each pattern occurs, ascending, by the pattern's key.

    A pattern is searched in documents that have a word of it: the time hardly depends on the number of patterns.
    """
    result: dict[Any, list[int]] = {key: [] for key in patterns}
    by_word: dict[str, set[Any]] = {}
    without_words: set[Any] = set()
    for key, wanted in patterns.items():
        for texts_together in wanted:
            for spelling in spellings(texts_together[0]):
                words = _WORD.findall(spelling)
                keys = by_word.setdefault(max(words, key=len), set()) if words else without_words
                keys.add(key)
    for number, text in enumerate(texts):
        plain = normal(text)
        keys = without_words.union(
            *(by_word[w] for w in set(_WORD.findall(plain)) & by_word.keys())
        )
        for key in keys:
            if occurs(plain, patterns[key]):
                result[key].append(number)
    return {key: np.array(numbers, np.int64) for key, numbers in result.items()}


def chance(documents: int, matching: int, top: int) -> float:
    """Returns the probability that `top` random documents have one of the matching ones."""
    from scipy import stats

    return float(stats.hypergeom.sf(0, documents, matching, min(top, documents)))


def hits(ranked_N: np.ndarray, matching: np.ndarray, top: int) -> list[int]:
    """Returns the ranks from 1 at which one of the first `top` documents is a matching one."""
    return [int(rank) + 1 for rank in np.flatnonzero(np.isin(ranked_N[:top], matching))]


def per_query(
    ranked_NQ: np.ndarray, matching: Mapping[int, np.ndarray], top: int
) -> dict[int, dict[str, Any]]:
    """Returns what the first documents of each query with a pattern have, by query.

    Each has `top`, the number of matching documents among the first; `rank`, that of the first one, or None; `corpus`, the
    number of all matching documents; `chance`, the probability of one among as many random documents, and `expected`, the number of
    matching ones among these.
    """
    documents = len(ranked_NQ)
    result = {}
    for q, own in matching.items():
        ranks = hits(ranked_NQ[:, q], own, top)
        result[q] = {
            **{"top": len(ranks), "rank": ranks[0] if ranks else None, "corpus": len(own)},
            "chance": chance(documents, len(own), top),
            "expected": len(own) * min(top, documents) / documents,
        }
    return result


def presence_table(
    ranked_NQ: np.ndarray,
    matching: Mapping[int, np.ndarray],
    groups: Mapping[str, Sequence[int]],
    correct: Sequence[bool | None],
    *,
    top: int,
) -> list[dict[str, Any]]:
    """Returns for each group of queries how many have a matching document among the first `top`.

    Of queries whose completion is marked as correct or wrong there are rows of their own: an answer that the model does not
    give is no evidence of retrieval.

    Args:
      ranked_NQ: documents of each query from the highest score.
      matching: matching documents, by query with a pattern.
      groups: queries by name.
      correct: whether each query's completion is correct; None if not known.
      top: number of documents.

    Returns:
      Rows with `share` and its Wilson interval, the share that random documents would have (`chance`), the number of
      queries whose pattern occurs in any document (`in_corpus`), and the number of matching top documents (`times`), of those
      among as many random documents (`expected`), and of different ones (`distinct`).
    """
    from espalier.launch.plots import intervals

    single = per_query(ranked_NQ, matching, top)
    rows = []
    for group, queries in groups.items():
        known = [q for q in queries if q in single]
        parts = {
            "all": known,
            "correct": [q for q in known if correct[q] is True],
            "wrong": [q for q in known if correct[q] is False],
        }
        for part, own in parts.items():
            if not own:
                continue
            tops = [np.intersect1d(ranked_NQ[:top, q], matching[q]) for q in own]
            rows.append(
                {
                    **{"group": group, "answered": part, "queries": len(own), "documents": top},
                    "share": intervals.share([single[q]["top"] > 0 for q in own]),
                    "chance": float(np.mean([single[q]["chance"] for q in own])),
                    "in_corpus": sum(single[q]["corpus"] > 0 for q in own),
                    "times": sum(len(x) for x in tops),
                    "expected": sum(single[q]["expected"] for q in own),
                    "distinct": len(np.unique(np.concatenate(tops))),
                }
            )
    return rows


@dataclasses.dataclass(frozen=True, kw_only=True)
class Query:
    """A query with its labels.

    Attributes:
      prompt, completion: as the file has them.
      task, kind: names, or "".
      correct: whether the completion is; None if not known.
      control: whether the prompt states the answer, so that no document is needed for it.
      answer, procedure: patterns, or None.
    """

    prompt: Any
    completion: Any
    task: str = ""
    kind: str = ""
    correct: bool | None = None
    control: bool = False
    answer: Pattern | None = None
    procedure: Pattern | None = None

    @property
    def group(self) -> str:
        """The kind, with a mark if the query is a control."""
        return f"{self.kind} (control)".strip() if self.control else self.kind


def query(row: Mapping[str, Any], where: str) -> Query:
    """Returns the query of a row.

    Raises:
      RowFileError: a label is of the wrong kind, or the prompt of a control lacks the answer; the message names the place.
    """
    for key in ("correct", "control"):
        if not isinstance(row.get(key), bool | None):
            raise RowFileError(f"{where}: {key!r} is {row[key]!r}: give true or false.")
    patterns = {}
    for key in ("answer", "procedure"):
        if row.get(key) is not None:
            try:
                patterns[key] = pattern(row[key])
            except ValueError as error:
                raise RowFileError(
                    f"{where}: {key!r} is not what can be searched for ({error}): give a text, a list of alternatives, or a "
                    "list of lists of texts that occur together."
                ) from None
    control = bool(row.get("control"))
    if control and "answer" in patterns and not _states(row.get("prompt"), patterns["answer"]):
        raise RowFileError(
            f"{where}: the prompt of a control states the answer, and 'answer' does not occur in this prompt: correct one of "
            "them, or remove 'control'."
        )
    return Query(
        prompt=row.get("prompt"),
        completion=row.get("completion"),
        task=name(row, "task", where),
        kind=name(row, "kind", where),
        correct=row.get("correct"),
        control=control,
        **patterns,
    )


def _states(prompt: Any, answer: Pattern) -> bool:
    """Returns whether a prompt has an answer; ids are not searched, and count as having it."""
    if isinstance(prompt, str):
        return occurs(normal(prompt), answer)
    turns = [turn.get("content") for turn in prompt or () if isinstance(turn, Mapping)]
    return not turns or occurs(normal(" ".join(x for x in turns if isinstance(x, str))), answer)


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
    """Returns {kind: its queries}, with controls apart; without kinds or with several, all other queries together too."""
    kinds: dict[str, list[int]] = {}
    for q, one in enumerate(queries):
        if one.group:
            kinds.setdefault(one.group, []).append(q)
    asked = [q for q, one in enumerate(queries) if not one.control] or [*range(len(queries))]
    every = ALL if len(asked) == len(queries) else NOT_CONTROLS
    return kinds if asked in kinds.values() else {every: asked, **kinds}
