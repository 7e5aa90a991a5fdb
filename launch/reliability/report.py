"""The result of the fault table: as lines on a terminal, as JSON, and as a table in docs/reliability.md."""

import collections
import dataclasses
import datetime
import json
import pathlib
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from launch import environment
from launch.reliability.table import HELD, Row

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
# Rows whose faults only tests make: the fault, what must hold, and the tests.
TESTED = {
    21: (
        "merging of models: other vocabularies, shapes and dtypes, NaN, missing tensors",
        "refused, or aligned by a rule",
        "tests/launch/merging",
    ),
    23: (
        "influence by EK-FAC: singular factors, zero gradients, damping",
        "finite, and resumable",
        "tests/trainers/influence, tests/launch/attribution",
    ),
}


@dataclasses.dataclass(frozen=True)
class Summary:
    """The counts of one row.

    Attributes:
      tried, held: numbers of faults.
      planned, done: numbers of cases.
      seconds: their time together.
      failures: cases that did not hold, with verdict and message.
      skipped: reasons of cases that this machine cannot try.
    """

    number: int
    fault: str
    promise: str
    tried: int
    held: int
    planned: int
    done: int
    seconds: float
    failures: list[dict[str, Any]]
    skipped: list[str]


def read(path: pathlib.Path) -> dict[tuple[int, str], dict[str, Any]]:
    """Returns the last result of each case by row and name; a line that a kill has cut is passed over."""
    results = {}
    for line in path.read_text("utf-8").splitlines() if path.exists() else ():
        try:
            result = json.loads(line)
        except ValueError:
            continue
        results[result["row"], result["case"]] = result
    return results


def summarise(
    rows: Sequence[Row],
    planned: Mapping[int, Sequence[str]],
    results: Mapping[tuple[int, str], Mapping[str, Any]],
) -> list[Summary]:
    """Returns the counts of each row."""
    summaries = []
    for row in rows:
        names = planned[row.number]
        mine = {name: results[row.number, name] for name in names if (row.number, name) in results}
        done = list(mine.values())
        failures = [
            {"case": name, "verdict": result["verdict"], "message": result["message"]}
            for name, result in mine.items()
            if result["verdict"] not in (HELD, "not tried")
        ]
        skipped = collections.Counter(r["message"] for r in done if r["verdict"] == "not tried")
        summaries.append(
            Summary(
                number=row.number,
                fault=row.fault,
                promise=row.promise,
                tried=sum(result["tried"] for result in done),
                held=sum(result["tried"] for result in done if result["verdict"] == HELD),
                planned=len(names),
                done=len(done),
                seconds=round(sum(result["seconds"] for result in done), 1),
                failures=failures,
                skipped=[f"{count} not tried: {reason}" for reason, count in skipped.items()],
            )
        )
    return summaries


def lines(summaries: Sequence[Summary], seed: int) -> list[str]:
    """Returns the table for a terminal, and each case that did not hold with its command."""
    text = [f"{'row':>3}  {'tried':>5}  {'held':>5}  {'s':>6}  fault"]
    for s in summaries:
        text.append(f"{s.number:>3}  {s.tried:>5}  {s.held:>5}  {s.seconds:>6.0f}  {s.fault}")
        if s.done < s.planned:
            text.append(f"{'':>24}{s.planned - s.done} of {s.planned} cases are not done")
        text += [f"{'':>24}{reason}" for reason in s.skipped]
    for s in summaries:
        for failure in s.failures:
            text.append(f"\nrow {s.number}, {failure['case']}: {failure['verdict']}")
            text.append(f"  {failure['message'][:1000]}")
            text.append(f"  {reproduce(s.number, failure['case'], seed)}")
    return text


def reproduce(number: int, case: str, seed: int) -> str:
    """Returns the command that runs one case again."""
    import shlex

    name = shlex.quote(case)
    return f"python -m launch.faults --rows={number} --case={name} --seed={seed} --out=DIR"


def write(summaries: Sequence[Summary], *, seed: int, command: str, folder: pathlib.Path) -> None:
    """Writes reliability.json, and the table between the marks of reliability.md."""
    record = {
        "commit": _commit(),
        "date": datetime.date.today().isoformat(),
        "seed": seed,
        "command": command,
        "rows": [dataclasses.asdict(s) for s in summaries],
        "made by tests alone": sorted(TESTED),
    }
    text = json.dumps(record, indent=1, ensure_ascii=False) + "\n"
    (folder / "reliability.json").write_text(text, encoding="utf-8")
    page = folder / "reliability.md"
    before, _, rest = page.read_text("utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    table = "\n".join(markdown(summaries, record))
    page.write_text(f"{before}{BEGIN}\n{table}\n{END}{after}", encoding="utf-8")


def markdown(summaries: Sequence[Summary], record: Mapping[str, Any]) -> list[str]:
    """Returns the table as Markdown, with the rows of tests in their places."""
    tried, held = (sum(getattr(s, name) for s in summaries) for name in ("tried", "held"))
    text = [
        f"{record['date']}, commit {record['commit']}, seed {record['seed']}: {held:,} of {tried:,} faults held.",
        "",
        "| # | fault | must hold | tried | held |",
        "|---|---|---|---|---|",
    ]
    entries: dict[int, str] = {
        number: f"| {number} | {fault} | {promise} | 0 | made by {tests} |"
        for number, (fault, promise, tests) in TESTED.items()
    }
    for s in summaries:
        notes = [f"{s.planned - s.done} cases not done"] if s.done < s.planned else []
        held_text = "; ".join([str(s.held), *notes, *s.skipped])
        entries[s.number] = f"| {s.number} | {s.fault} | {s.promise} | {s.tried} | {held_text} |"
    text += [entry for _, entry in sorted(entries.items())]
    failures = [(s.number, failure) for s in summaries for failure in s.failures]
    if failures:
        text += [
            "",
            "What did not hold (`--rows=NUMBER --case=NAME` repeats it):",
            "",
        ]
        for number, failure in failures:
            message = " ".join(failure["message"].split()).replace("|", "\\|")[:160]
            text.append(f"- row {number}, {failure['case']}: {failure['verdict']}; `{message}`")
    return text


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(
        command, cwd=environment.ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"
