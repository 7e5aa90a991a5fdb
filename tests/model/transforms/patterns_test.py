"""Patterns of others match what `re` matches, in linear time."""

import pytest

from espalier.model.adapters import lora
from espalier.model.low_rank import lowrank
from espalier.model.transforms import patterns

ENDLESS = [
    r"((\w|[.])+)+!",
    "(a|a)*" * 30 + "!",
    "(.*)" * 70 + "!",
    "(?:a?){60}a{60}!",
    "(a+a+)+!",
    "((((a*)*b*)*)*)*!",
]


@pytest.mark.parametrize("text", ENDLESS)
def test_patterns_without_end_in_re_end_here(text):
    assert patterns.compiled(text).search("a" * 60 + "b" * 60) is None
    assert not patterns.fullmatch(text, "a" * 60 + "b" * 60)


def test_a_pattern_matches_a_whole_path():
    for pattern, path, expected in (
        (r"layers/block_\d+/.*", "layers/block_12/mlp/up", True),
        ("mlp|attention", "mlp/up", False),
        (r"(.*/)?(mlp|mlp/shared)/down", "layers/block_0/mlp/shared/down", True),
    ):
        assert patterns.fullmatch(pattern, path) is expected


@pytest.mark.parametrize(
    "text",
    [
        "(",
        "(" * 5000,
        "((((a{1000}){1000}){1000}){1000})",
        "(?!a)b",
        r"(a)\1",
        "(?<=a)b",
        "*",
        "\ud800",
    ],
)
def test_what_is_no_pattern_of_re2_is_refused(text, capfd):
    with pytest.raises(patterns.PatternError, match="RE2, which has no look-arounds"):
        patterns.compiled(text)
    assert capfd.readouterr().err == ""


def test_patterns_of_a_model_end_too():
    path, endless = "layers/block_0/attention/" * 3 + "query", r"((\w|[/])+)+!"
    adapter = lora.Lora(layers=(endless, ".*query"), ranks=((endless, 1), (".*", 2)))
    assert adapter.fields_at(path) == ["layers"] and adapter.rank_at(path, 8, 8) == 2
    factorisation = lowrank.Factorisation(layers=(endless,))
    assert factorisation.rank_at(path, 8, 8) is None
