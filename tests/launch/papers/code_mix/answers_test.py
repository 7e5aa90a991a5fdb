"""Exact match and F1 on cases worked out by hand."""

import pytest

from espalier.launch.papers.code_mix.harness_tasks import answers


@pytest.mark.parametrize(
    ("text", "gold", "match"),
    [
        (" The Trellis!", ["trellis"], 1),
        ("a vine and an arbour", ["vine and arbour"], 1),
        ("St. Louis", ["st louis"], 1),
        ("theatre", ["atre"], 0),  # articles are words
        ("lattice", ["trellis", "Lattice"], 1),
        ("", ["the"], 0),  # an article alone is an answer of its own
        ("The ", ["the"], 1),
        ("trellis work", ["trellis"], 0),
    ],
)
def test_exact_match_heeds_words_alone(text, gold, match):
    assert answers.exact_match(text, gold) == match


def test_f1_is_the_best_overlap_of_words():
    # Three of four words are common: p = 3/4, r = 3/3.
    assert answers.f1("the red red vine grew", ["nothing", "red vine red"]) == pytest.approx(6 / 7)
    assert answers.f1("", ["vine"]) == 0 == answers.f1("vine", ["the"])
