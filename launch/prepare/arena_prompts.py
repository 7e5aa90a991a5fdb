"""Writes prompts in many languages for open answers, from local copies of public sets, for espalier generate.

Example, the first 100 prompts of m-ArenaHard in three languages, from /data/eval/m_arena_hard:

  espalier prepare arena_prompts --set=m_arena_hard --data_dir=/data/eval --languages=cs,hi,ja --limit=100 \\
    --output=prompts.jsonl

The rows are {"id", "language", "prompt", ...}; `espalier generate --chat --inputs=prompts.jsonl` answers them, and
`espalier evaluate win_rate --by_language` and `espalier evaluate language` read the answers. Sets:

  m_arena_hard              500 prompts of Arena-Hard-Auto, translated by machine into the 23 languages
  m_arena_hard_v2           498 later ones, of Arena-Hard-Auto 2.0
  dolly                     200 held-out prompts of Dolly, edited by people where there is such a translation (ar, es, fr,
                            hi, ru), by machine in the other languages: the prompts of Aya 23 and Aya Expanse
  dolly_machine_translated  the same, all translated by machine
  dolly_human_edited        only those edited by people
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

from espalier.common.ranges import Size
from espalier.data.languages import table
from espalier.launch import cli
from espalier.launch.evaluate.suites import local_data
from espalier.launch.evaluate.suites.local_data import Source

Set = Literal[
    "m_arena_hard", "m_arena_hard_v2", "dolly", "dolly_machine_translated", "dolly_human_edited"
]
_ARENAS = {
    "m_arena_hard": "CohereLabs/m-ArenaHard",
    "m_arena_hard_v2": "CohereLabs/m-ArenaHard-v2.0",
}
_DOLLY = "CohereLabs/aya_evaluation_suite"


def write(
    *,
    set: Set,
    output: str,
    data_dir: str | None = None,
    languages: str = "",
    limit: Size | None = None,
) -> None:
    """Writes the prompts of a set, language by language.

    Args:
      set: name of the set of prompts.
      output: write the rows to this file of JSON lines.
      data_dir: folder of all evaluation sets (default: $ESPALIER_EVAL_DATA).
      languages: codes such as en,cs,hi (default: all 23).
      limit: number of prompts of each language (default: all).

    Raises:
      ValueError: an unknown language, or a language without prompts.
      MissingDataError, WrongDataError, RowFileError: files that cannot be read or written.
    """
    from espalier.launch.inference import row_files

    row_files.check_output(output, compressed=True)
    wanted = table.codes(languages.split(",")) if languages else tuple(table.LANGUAGES)
    read = _arena if set in _ARENAS else _dolly
    rows = read(set, wanted, data_dir)
    if empty := [code for code in wanted if not rows[code]]:
        raise ValueError(
            f"{set} has no prompt in {', '.join(table.LANGUAGES[code].name for code in empty)}: leave "
            f"{', '.join(empty)} out with --languages."
        )
    chosen = [row for code in wanted for row in rows[code][:limit]]
    row_files.write(output, chosen)
    print(f"{len(chosen):,} prompts in {len(wanted)} languages: {output}")


def _arena(
    set: str, wanted: Sequence[str], data_dir: str | None
) -> Mapping[str, list[dict[str, Any]]]:
    columns = ("question_id", "category", "prompt")
    rows = {}
    for code in wanted:
        source = Source(
            folder=set, split="test", columns=columns, configuration=code, repository=_ARENAS[set]
        )
        rows[code] = [
            {
                "id": f"{row['question_id']}/{code}",
                "language": code,
                "category": row["category"],
                "prompt": row["prompt"],
            }
            for row in local_data.rows(source, data_dir)
        ]
    return rows


def _dolly(
    set: str, wanted: Sequence[str], data_dir: str | None
) -> Mapping[str, list[dict[str, Any]]]:
    rows: dict[str, list[dict[str, Any]]] = {code: [] for code in wanted}
    names = ("dolly_human_edited", "dolly_machine_translated") if set == "dolly" else (set,)
    for name in names:
        source = Source(
            folder="aya_evaluation_suite",
            split="test",
            columns=("id", "inputs", "language"),
            configuration=name,
            repository=_DOLLY,
        )
        lacking = [code for code in wanted if not rows[code]]
        for code, row in _of_languages(local_data.rows(source, data_dir) if lacking else []):
            if code in lacking:
                id = f"{row['id']}/{code}"
                rows[code].append(
                    {"id": id, "language": code, "set": name, "prompt": row["inputs"]}
                )
    return rows


def _of_languages(rows: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields (code, row) of the rows in one of the 23 languages, of Chinese only those in the usual script."""
    for row in rows:
        try:
            language = table.find(row["language"])
        except ValueError:
            continue  # the set has 115 languages
        if row.get("script") in (None, language.writing[0], language.flores[0].partition("_")[2]):
            yield language.code, row


main = cli.command(__doc__, "prepare arena_prompts", write)

if __name__ == "__main__":
    raise SystemExit(main())
