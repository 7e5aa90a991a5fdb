"""Means by group against the paper's own table."""

import pytest

from espalier.launch.evaluate.suites import scores
from espalier.launch.papers.code_mix.suite import SUITE

# Reasoning, knowledge, code, and the average of all, in %: "To Code, or Not To Code?"
# (arXiv 2408.10914), the 470M recipes, one line for each phase.
TABLE = [
    ("text-only, pre-training", 49.0, 9.5, 0.4, 19.6),
    ("text-only, cooldown", 54.1, 11.1, 4.4, 23.2),
    ("balanced-only, pre-training", 51.8, 8.1, 9.0, 23.0),
    ("balanced-only, cooldown", 53.2, 11.1, 8.4, 24.2),
    ("balanced to text, initialisation", 52.0, 7.4, 7.8, 22.4),
    ("balanced to text, continued", 53.0, 9.9, 4.8, 22.6),
    ("balanced to text, cooldown", 54.9, 10.9, 5.8, 23.9),
    ("code to text, initialisation", 44.7, 1.5, 15.5, 20.6),
    ("code to text, continued", 53.3, 9.5, 4.1, 22.3),
    ("code to text, cooldown", 52.1, 10.3, 7.5, 23.3),
]


@pytest.mark.parametrize(("recipe", "reasoning", "knowledge", "code", "total"), TABLE)
def test_totals_are_those_of_the_paper(recipe, reasoning, knowledge, code, total):
    del recipe
    by_group = {"reasoning": reasoning, "knowledge": knowledge, "code": code}
    # Benchmarks that differ within a group, around the group's score.
    found = {}
    for group in SUITE.groups:
        middle = (len(group.benchmarks) - 1) / 2
        for i, name in enumerate(group.benchmarks):
            found[name] = by_group[group.name] + i - middle
    groups, average = scores.means(SUITE, found)
    assert groups == pytest.approx(by_group)
    assert average == pytest.approx(total, abs=0.06)


def test_the_suite_has_the_papers_benchmarks():
    assert [len(group.benchmarks) for group in SUITE.groups] == [11, 2, 2]
    assert len(set(SUITE.benchmarks)) == 15


def test_a_suite_is_found_by_the_name_of_its_paper():
    assert "code_mix" in scores.names()
    assert scores.find("code_mix") is SUITE


def test_what_lacks_a_part_has_no_mean():
    found = dict.fromkeys(SUITE.benchmarks, 0.25)
    del found["mbpp"]
    groups, total = scores.means(SUITE, found)
    assert groups == {"reasoning": 0.25, "knowledge": 0.25, "code": None} and total is None
    rows = list(scores.table(SUITE, found, {"mbpp": "not there"}))
    assert ("code", "mbpp", "-", "not there") in rows
    assert ("code", "mean", "-", "1 of 2 benchmarks") in rows
    assert rows[-1] == ("total", "mean of groups", "-", "")
