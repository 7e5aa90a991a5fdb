"""Pairs from rated responses: the best response to a prompt against one with a lower rating.

    {"prompt": ..., "responses": [..., ...], "ratings": [4.5, 2]}

The prompt is a text or a list of messages, and so is each response. If the prompt has messages, a response that is
a text is the assistant's message. The pairs are rows in the format of `records`; "margin" is the difference of the
ratings.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Literal

from espalier.common.ranges import check_choice
from espalier.data.rows.records import Tally, text_of
from espalier.data.stream import order
from espalier.data.text.documents import DataError

Rejected = Literal["worst", "random", "next"]
EXAMPLE = '{"prompt": "...", "responses": ["...", "..."], "ratings": [4.5, 2]}'
_TEMPLATE_KEYS = ("tools", "chat_template_kwargs")


def pairs(
    rows: Iterable[tuple[str, Mapping[str, Any]]],
    *,
    rejected: Rejected = "worst",
    min_margin: float = 0.0,
    seed: int = 0,
    dropped: Tally | None = None,
) -> Iterator[dict[str, Any]]:
    """Yields at most one pair for each row of rated responses.

    The chosen response is the first one with the highest rating. The rejected response always has a lower
    rating, since a pair with equal ratings teaches nothing.

    Args:
      rows: (place, row); errors name the place.
      rejected: 'worst', the 'next' best, or a 'random' one of the responses with a lower rating.
      min_margin: least difference of the two ratings.
      seed: seed of the random choices.
      dropped: counts rows without a possible rejected response, as 'tie' or 'small_margin'.

    Raises:
      DataError: a row is malformed.
    """
    check_choice("rejected", rejected, Rejected)
    if not 0 <= min_margin < math.inf:
        raise ValueError(f"min_margin is {min_margin}; it must be 0 or more.")
    return _pairs(rows, rejected, min_margin, seed, Tally() if dropped is None else dropped)


def _pairs(rows, rejected: str, min_margin: float, seed: int, dropped: Tally):
    for number, (where, row) in enumerate(rows):
        responses, ratings = _checked(row, where)
        best = max(range(len(ratings)), key=ratings.__getitem__)
        lower = [i for i, rating in enumerate(ratings) if rating < ratings[best]]
        far = [i for i in lower if ratings[best] - ratings[i] >= min_margin]
        if not far:
            dropped.add("small_margin" if lower else "tie", where)
            continue
        if rejected == "random":
            other = far[order.hash64(seed, "binarise", number) % len(far)]
        else:
            pick = min if rejected == "worst" else max
            other = pick(far, key=ratings.__getitem__)
        yield {
            "prompt": row["prompt"],
            "chosen": responses[best],
            "rejected": responses[other],
            "margin": ratings[best] - ratings[other],
            **{key: row[key] for key in _TEMPLATE_KEYS if key in row},
        }


def _checked(row: Mapping[str, Any], where: str) -> tuple[list[Any], list[float]]:
    """Returns the responses, as messages if the prompt has messages, and their ratings."""
    for key, kinds, what in (
        ("prompt", (str, list), "a text or messages"),
        ("responses", (list,), "a list of texts or of messages"),
        ("ratings", (list,), "a list of numbers"),
    ):
        if not isinstance(row.get(key), kinds):
            kind = type(row[key]).__name__ if key in row else "nothing"
            raise DataError(f"{where}: {key!r} holds {kind}; it must be {what}. A row is {EXAMPLE}")
    responses, ratings = row["responses"], row["ratings"]
    if len(responses) != len(ratings) or len(responses) < 2:
        raise DataError(
            f"{where}: {len(responses)} responses and {len(ratings)} ratings; a row needs at least two "
            "responses, each with one rating"
        )
    for rating in ratings:
        number = isinstance(rating, int | float) and not isinstance(rating, bool)
        if not number or not math.isfinite(rating):
            raise DataError(f"{where}: {rating!r} in 'ratings' is not a finite number")
    text_of(row["prompt"], "prompt", where)
    for number, response in enumerate(responses, 1):
        what = f"response {number}"
        if isinstance(text_of(response, what, where), tuple) and isinstance(row["prompt"], str):
            raise DataError(
                f"{where}: {what} has messages but 'prompt' is a text; write both in the same form"
            )
    if isinstance(row["prompt"], list):
        responses = [
            [{"role": "assistant", "content": text}] if isinstance(text, str) else text
            for text in responses
        ]
    return responses, ratings
