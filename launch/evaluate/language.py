"""Whether answers are in the language of their prompts: pass rates of texts and of their lines, by language.

Example, on answers of espalier generate to prompts with a "language", such as {"prompt": "...", "language": "cs"}:

  espalier evaluate language --inputs=answers.jsonl --json=/tmp/language.json

A text passes if all of its lines do. Lines of fewer than 15 letters (5 of Chinese, Japanese or Korean), code between
fences and addresses are not judged; of a short text its script is. The detector `lingua` (pip install -e
'.[languages]') knows the 23 languages of data/languages/table.py; `script` needs no package and compares only
the scripts of letters, so that it does not tell languages of one script apart.
"""

import collections
import statistics
from collections.abc import Mapping
from typing import Any

from espalier.data.languages import identify
from espalier.launch import cli
from espalier.launch.evaluate.suites.scores import percent
from espalier.launch.inference import row_files

EXAMPLE = '{"text": "...", "language": "cs"}'


class LanguageError(ValueError):
    """Rows that cannot be checked."""


def evaluate(
    *,
    inputs: str,
    language: str | None = None,
    detector: identify.Kind = "lingua",
    text_key: str = "text",
    json: str | None = None,
    failures: str | None = None,
) -> dict[str, Any]:
    """Checks a file of answers, prints a table and writes the files.

    Args:
      inputs: JSON lines with the answers, such as espalier generate writes.
      language: language of all rows (default: the "language" of each row).
      detector: what detects the language: lingua, or the script of the letters.
      text_key: key of the answer in a row.
      json: write the rates to this JSON file.
      failures: file for the rows that fail, with their lines by language, JSON lines.

    Returns:
      {'detector', 'languages': code -> `data.languages.identify.pass_rates`, 'mean': {'texts_passed', 'lines_passed'} over
      languages, 'worst': the language whose texts pass least often, None if no text was judged}.

    Raises:
      LanguageError: no row, or a row without a text or a known language.
      RowFileError, DataError: files that cannot be read or written.
    """
    row_files.check_output(json, "json", others={"inputs": inputs})
    row_files.check_output(failures, "failures", compressed=True, others={"inputs": inputs})
    rows = [
        (_language(row, place, language), _text(row, place, text_key), row)
        for place, row in row_files.read(inputs, example=EXAMPLE)
    ]
    if not rows:
        raise LanguageError(f"--inputs={inputs} has no row: generate it with espalier generate.")
    by = identify.detector(detector)
    checked: dict[str, list[identify.Checked]] = collections.defaultdict(list)
    failed = []
    for code, text, row in rows:
        one = identify.check(text, code, by)
        checked[code].append(one)
        if one.passes is False:
            failed.append({**row, "others": dict(one.others)})
    results = summarised({code: identify.pass_rates(some) for code, some in checked.items()})
    results = {"detector": by.name, **results}
    print(_table(results))
    if json:
        row_files.write_json(json, results)
    if failures:
        row_files.write(failures, failed)
    return results


def summarised(by_language: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Returns the rates by language, their means over languages and the worst language."""
    texts = {c: r["texts_passed"] for c, r in by_language.items() if r["texts_passed"] is not None}
    lines = [r["lines_passed"] for r in by_language.values() if r["lines_passed"] is not None]
    return {
        "languages": dict(sorted(by_language.items())),
        "mean": {
            "texts_passed": statistics.fmean(texts.values()) if texts else None,
            "lines_passed": statistics.fmean(lines) if lines else None,
        },
        "worst": min(texts, key=lambda code: texts[code]) if texts else None,
    }


def _language(row: Mapping[str, Any], place: str, given: str | None) -> str:
    from espalier.data.languages import table

    tag = given if given is not None else row.get("language")
    if tag is None:
        raise LanguageError(
            f'{place} has no "language": add one to every row, or give --language=CODE for all rows.'
        )
    try:
        return table.find(tag).code
    except ValueError as error:
        raise LanguageError(f"{place}: {error}") from None


def _text(row: Mapping[str, Any], place: str, key: str) -> str:
    text = row.get(key)
    if not isinstance(text, str):
        raise LanguageError(
            f"{place} has no text {key!r}; present are {', '.join(map(repr, row)) or 'no keys'}. Set --text_key."
        )
    return text


def _table(results: Mapping[str, Any]) -> str:
    lines = [
        f"in the language of the prompt, by {results['detector']}",
        f"{'language':10} {'texts':>7} {'judged':>7} {'texts, %':>9} {'lines, %':>9}  other lines",
    ]
    for code, rates in results["languages"].items():
        others = ", ".join(f"{name} {count}" for name, count in list(rates["others"].items())[:4])
        cells = (percent(rates["texts_passed"]), percent(rates["lines_passed"]))
        lines.append(
            f"{code:10} {rates['texts']:7,} {rates['judged']:7,} {cells[0]:>9} {cells[1]:>9}  {others}".rstrip()
        )
    mean = results["mean"]
    cells = (percent(mean["texts_passed"]), percent(mean["lines_passed"]))
    lines.append(
        f"{'mean':10} {'':7} {'':7} {cells[0]:>9} {cells[1]:>9}  worst: {results['worst']}"
    )
    return "\n".join(lines)


main = cli.command(__doc__, "evaluate language", evaluate)

if __name__ == "__main__":
    raise SystemExit(main())
