"""The committed pages: they follow from results.json, and no claim holds on shuffled measurements."""

import dataclasses
import importlib
import json
import pathlib

import numpy as np
import pytest
from scipy import stats

from espalier.launch import reproduce

DOCS = pathlib.Path("docs/reproductions")
LEVEL = 0.025  # the share of draws with equal arms in which a claim may hold, of one side


def record_of(slug):
    return json.loads((DOCS / slug / "results.json").read_text())


PAPERS = sorted(reproduce.slugs())
RUN = [slug for slug in PAPERS if "headline" in record_of(slug)]
OLDER = "**These verdicts are older than today's rules.**"


@pytest.mark.parametrize("slug", sorted(set(PAPERS) - set(RUN)))
def test_a_page_that_was_judged_by_other_rules_says_so(slug):
    head = (DOCS / f"{slug}.md").read_text().splitlines()[:6]
    assert any(line.startswith(OLDER) for line in head)


def stored(slug):
    report = importlib.import_module(f"espalier.launch.papers.{slug}.report").REPORT
    return report, record_of(slug)


@pytest.mark.parametrize("slug", RUN)
def test_a_page_is_written_again_from_its_stored_results(slug, tmp_path):
    report, record = stored(slug)
    facts = {name: record[name] for name in ("command", "versions", "criteria")}
    # Figures take seconds; their lines are taken from the page.
    without = dataclasses.replace(report, figures=lambda parts: {})
    without.write(record["measured"], tmp_path, facts)
    committed = (DOCS / f"{slug}.md").read_text().splitlines()
    written = (tmp_path / f"{slug}.md").read_text().splitlines()
    shown = [line for line in committed if line.startswith("![")]
    assert all((DOCS / line.rpartition("(")[2].rstrip(")")).exists() for line in shown)
    assert [x for x in written if not x.startswith(("![", "*"))] == [
        x for x in _without_figures(committed) if not x.startswith(("![", "*"))
    ]
    assert (tmp_path / slug / "results.json").read_text() == (
        DOCS / slug / "results.json"
    ).read_text()


def _without_figures(lines):
    """Returns a page's lines without the figures of the paper, each of which takes four lines."""
    others = [at for at, x in enumerate(lines) if x.startswith("![") and "/claims.png)" not in x]
    gone = {at + i for at in others for i in range(4)}
    return [line for at, line in enumerate(lines) if at not in gone]


@pytest.mark.parametrize("slug", RUN)
def test_an_exchange_leaves_arms_and_seeds_in_place_and_measurements_as_they_were(slug):
    report, record = stored(slug)
    shuffled = report.shuffle(record["measured"], np.random.default_rng(0))
    assert _runs(shuffled) == _runs(record["measured"]) and record == record_of(slug)
    assert shuffled != record["measured"]


def _runs(measured):
    """Returns (part, arm, seed) of every row; haystacks and contexts have neither."""
    parts = {
        name: part.get("rows", ()) if isinstance(part, dict) else part
        for name, part in measured.items()
    }
    return [(name, row.get("arm"), row.get("seed")) for name, rows in parts.items() for row in rows]


@pytest.mark.parametrize("slug", RUN)
def test_no_claim_holds_on_shuffled_measurements_more_than_rarely(slug):
    record = record_of(slug)
    held = {
        one["claim"]
        for one in record["claims"]
        if (null := one["exchanged"])
        and stats.binom.sf(null["holds"] - 1, null["draws"], LEVEL) < 0.001
        # Equal arms are no worse than each other.
        and not (one["above"] is not None and one["above"] < 0 and one["below"] is None)
    }
    assert held == set()
