"""The result of the fault table: as lines on a terminal, as JSON, and as a table in docs/evidence/reliability.md."""

import collections
import dataclasses
import datetime
import json
import pathlib
import subprocess
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.launch import environment
from tests.faults.table import HELD, Row

BEGIN, END = "<!-- table: begin -->", "<!-- table: end -->"
# Rows whose faults only tests make: the fault, what must hold, and the tests.
TESTED = {
    23: (
        "influence by EK-FAC: singular factors, zero gradients, damping",
        "finite, and resumable",
        "tests/trainers/influence, tests/launch/influence",
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
    return f"python -m tests.faults --rows={number} --case={name} --seed={seed} --out=DIR"


def write(summaries: Sequence[Summary], *, seed: int, command: str, folder: pathlib.Path) -> None:
    """Writes reliability.json, and the table between the marks of reliability.md; rows that were not made now stay."""
    path = folder / "reliability.json"
    made = {"commit": _commit(), "date": datetime.date.today().isoformat(), "seed": seed}
    before = json.loads(path.read_text("utf-8"))["rows"] if path.exists() else []
    rows = {row["number"]: row for row in before}
    rows |= {s.number: {**dataclasses.asdict(s), **made, "command": command} for s in summaries}
    record = {
        "rows": [row for _, row in sorted(rows.items())],
        "made by tests alone": sorted(TESTED),
    }
    path.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    page = folder / "reliability.md"
    start, _, rest = page.read_text("utf-8").partition(BEGIN)
    _, _, end = rest.partition(END)
    table = "\n".join(markdown(record["rows"]))
    page.write_text(f"{start}{BEGIN}\n{table}\n{END}{end}", encoding="utf-8")


def markdown(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the table of the rows of reliability.json as Markdown, with those of tests in their places."""
    text = [*_made(rows), "", "| # | fault | must hold | tried | held |", "|---|---|---|---|---|"]
    entries: dict[int, str] = {
        number: f"| {number} | {fault} | {promise} | 0 | made by {tests} |"
        for number, (fault, promise, tests) in TESTED.items()
    }
    for row in rows:
        left = row["planned"] - row["done"]
        held = "; ".join(
            [str(row["held"]), *([f"{left} cases not done"] if left else []), *row["skipped"]]
        )
        number, tried = row["number"], row["tried"]
        entries[number] = f"| {number} | {row['fault']} | {row['promise']} | {tried} | {held} |"
    text += [entry for _, entry in sorted(entries.items())]
    failures = [(row["number"], failure) for row in rows for failure in row["failures"]]
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


def _made(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns a line with date, commit, seed and counts for each time at which rows were made, most rows first."""
    times: dict[tuple[Any, ...], list[Mapping[str, Any]]] = {}
    for row in rows:
        times.setdefault((row["date"], row["commit"], row["seed"]), []).append(row)
    text = []
    for (date, commit, seed), mine in sorted(times.items(), key=lambda item: -len(item[1])):
        tried, held = (sum(row[name] for row in mine) for name in ("tried", "held"))
        which = f" (row {', '.join(str(row['number']) for row in mine)})" if text else ""
        counts = f"{held:,} of {tried:,} faults held"
        text.append(f"{date}, commit {commit}, seed {seed}{which}: {counts}.")
    return text


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(
        command, cwd=environment.ROOT, capture_output=True, text=True, check=False
    )
    return done.stdout.strip() or "unknown"
