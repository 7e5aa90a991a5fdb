"""The committed pages: they follow from results.json, and no claim holds on shuffled measurements."""

import collections
import dataclasses
import importlib
import json
import pathlib

import numpy as np
import pytest

from espalier.launch import reproduce
from espalier.launch.papers.shared import claim

DOCS = pathlib.Path("docs/reproductions")
DRAWS, HELD = 60, 6  # of draws at the level of 2.5 % more than 6 of 60 hold with probability 0.003


OLDER = "**These verdicts are older than today's rules.**"


def record_of(slug):
    return json.loads((DOCS / slug / "results.json").read_text())


# Claims that hold on shuffled measurements too, as was found after their runs, when criteria no longer change. The README of
# the method says so. V1 of low_rank: all arms on images are within about 3 points, and its margin is 2.
DECIDES_NOTHING = {"low_rank": {"V1"}}
RUN = sorted(reproduce.slugs())
TODAY = [slug for slug in RUN if "measured" in record_of(slug)]


@pytest.mark.parametrize("slug", sorted(set(RUN) - set(TODAY)))
def test_a_page_that_was_judged_by_other_rules_says_so(slug):
    head = (DOCS / f"{slug}.md").read_text().splitlines()[:6]
    assert any(line.startswith(OLDER) for line in head)


def stored(slug):
    report = importlib.import_module(f"espalier.launch.papers.{slug}.report").REPORT
    return report, record_of(slug)


@pytest.mark.parametrize("slug", TODAY)
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


@pytest.mark.parametrize("slug", TODAY)
def test_no_claim_holds_on_shuffled_measurements_more_than_rarely(slug):
    report, record = stored(slug)
    held = collections.Counter()
    for draw in range(DRAWS):
        shuffled = report.shuffle(record["measured"], np.random.default_rng(draw))
        for one in report.judge(shuffled):
            noisy = [effect for effect in one.effects if not effect.exact]
            held[one.name] += bool(noisy) and one.verdict == claim.HOLDS
    assert {name for name, count in held.items() if count > HELD} == DECIDES_NOTHING.get(
        slug, set()
    )
