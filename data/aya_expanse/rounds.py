"""Indicators of over-optimisation by language: what a reward and an independent judge say of the models of each round.

The reward that a policy is trained on rises by construction. It is trusted as long as a judge that the policy is not
trained on agrees, answers do not only become longer, and they stay in their language.
"""

from collections.abc import Mapping, Sequence
from typing import Any

from data.text.documents import DataError
from espalier.common import tables

WRONG_LANGUAGE, CUT = "wrong language", "cut"


def indicators(
    rounds: Sequence[str], reward: Sequence[Mapping[str, Any]], judge: Sequence[Mapping[str, Any]]
) -> list[dict[str, Any]]:
    """Returns a row for each language and round.

    Args:
      rounds: names of the models, as teachers of a pool, from the first to the last.
      reward, judge: rows of `outputs.table` of the same answers, rewarded by the policy's reward and by the judge.

    Returns:
      Rows with 'language', 'round', 'reward' and 'judge' (means), 'new_tokens' (mean), 'wrong_language' and 'cut' (shares
      of the answers), and 'over_optimised': whether the reward rose from the round before while the judge's fell; None in
      the first round.

    Raises:
      DataError: a round has no row in a language.
    """
    by_reward, by_judge = (
        {(row["language"], row["teacher"]): row for row in rows} for rows in (reward, judge)
    )
    made = []
    for language in dict.fromkeys(row["language"] for row in reward):
        before: dict[str, Any] | None = None
        for name in rounds:
            try:
                own, judged = by_reward[language, name], by_judge[language, name]
            except KeyError:
                raise DataError(f"There is no answer of {name!r} in {language!r}") from None
            row = {
                "language": language,
                "round": name,
                "reward": own["reward"],
                "judge": judged["reward"],
                "new_tokens": own["new_tokens"],
                "wrong_language": own.get(WRONG_LANGUAGE, 0) / own["asked"],
                "cut": own.get(CUT, 0) / own["asked"],
                "over_optimised": None,
            }
            if before is not None:
                values = [x[key] for key in ("reward", "judge") for x in (before, row)]
                if None not in values:
                    rose, fell = values[1] > values[0], values[3] < values[2]
                    row["over_optimised"] = rose and fell
            made.append(row)
            before = row
    return made


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """Returns the indicators as a table in Markdown."""
    titles = list(rows[0]) if rows else []
    header = [title.replace("_", " ") for title in titles]
    cells = ([_cell(row[title]) for title in titles] for row in rows)
    return "\n".join(tables.markdown(header, cells)) + "\n"


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return value if isinstance(value, str) else f"{value:.4g}"
