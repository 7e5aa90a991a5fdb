"""The committed pages of BAM and Nexus can be regenerated from their stored results, figures apart."""

import dataclasses
import importlib
import json
import pathlib

import pytest

DOCS = pathlib.Path("docs/reproductions")


def measured_part(stored):
    """Returns the result of `domains.part`, from its record in results.json."""
    rows, planned = [], {}
    for run in stored["runs"]:
        losses = {task: {"loss": loss} for task, loss in run["loss"].items()}
        trained = bool(run["tokens"])
        made = {} if trained or not losses else {"held_out": {"tasks": losses}}
        row = {key: value for key, value in run.items() if key != "loss"}
        row |= {"held_out": losses if trained else {}, "evaluations": made | run["evaluations"]}
        rows.append(row)
        names = (*row["evaluations"], *(("held_out",) if trained else ()))
        planned.setdefault(run["arm"], {})[run["seed"]] = names
    return {**stored, "rows": rows, "planned": planned}


def without_figures(text):
    """Returns the lines of a page without images and their captions."""
    lines = text.splitlines()
    drawn = {at + i for at, line in enumerate(lines) if line.startswith("![") for i in range(4)}
    return [line for at, line in enumerate(lines) if at not in drawn]


@pytest.mark.parametrize("slug", ["bam", "nexus"])
def test_a_committed_page_is_written_again_from_its_stored_results(slug, tmp_path):
    path = DOCS / slug / "results.json"
    stored = json.loads(path.read_text())
    measured = {name: measured_part(part) for name, part in stored["parts"].items()}
    measured |= {"caches": stored["caches"]} if "caches" in stored else {}
    report = importlib.import_module(f"launch.papers.{slug}.page").REPORT
    facts = {name: stored[name] for name in ("command", "versions")}
    dataclasses.replace(report, figures=lambda parts: {}).write(measured, tmp_path, facts)
    committed = (DOCS / f"{slug}.md").read_text()
    assert (tmp_path / f"{slug}.md").read_text().splitlines() == without_figures(committed)
    assert (tmp_path / slug / "results.json").read_bytes() == path.read_bytes()
