"""Patterns of others match what `re` matches, in linear time."""

import random
import re

import pytest

from model.adapters import lora
from model.low_rank import lowrank
from model.transforms import patterns

_PARTS = ("a", "b", ".", "[ab]", "[^a]", r"\w", r"\d", "/", r"\b", "^", "$", "[a-c/]", r"\.", r"\W")
_REPEATS = ("*", "+", "?", "*?", "{2}", "{1,3}", "{0,2}?", "{2,}")


def _drawn(rng, depth=0):
    kind = rng.random()
    if depth > 3 or kind < 0.45:
        return rng.choice(_PARTS)
    if kind < 0.6:
        return _drawn(rng, depth + 1) + _drawn(rng, depth + 1)
    if kind < 0.72:
        return f"(?:{_drawn(rng, depth + 1)}|{_drawn(rng, depth + 1)}{rng.choice(['', '|'])})"
    if kind < 0.8:
        return f"({_drawn(rng, depth + 1)})"
    if kind < 0.85:
        return (
            f"({rng.choice(['?=', '?!'])}{rng.choice(['a', 'b.', '.*b'])}){_drawn(rng, depth + 1)}"
        )
    return f"(?:{_drawn(rng, depth + 1)}){rng.choice(_REPEATS)}"


def test_random_patterns_match_what_re_matches():
    rng, compared = random.Random(0), [0, 0]
    while sum(compared) < 4000:
        text = _drawn(rng)
        try:
            expected = re.compile(text)
        except re.error:
            continue
        try:
            pattern = patterns.Pattern(text)
        except patterns.PatternError as error:
            assert "looks ahead" in str(error)
            continue
        for _ in range(4):
            word = "".join(rng.choice("ab/1.\n") for _ in range(rng.randrange(9)))
            start = rng.randrange(len(word) + 1)
            whole = expected.fullmatch(word, start) is not None
            assert pattern.fullmatch(word, start) == whole, (text, word, start)
            assert pattern.search(word) == (expected.search(word) is not None), (text, word)
            compared[whole] += 1
    assert min(compared) > 400


@pytest.mark.parametrize(
    ("text", "matches"),
    [
        (r"((\w|[.])+)+!", False),
        ("(a|a)*" * 30 + "!", False),
        ("(.*)" * 70 + "!", False),
        ("(?:a?){60}a{60}", True),
        ("(a+a+)+!", False),
        ("((((a*)*b*)*)*)*!", False),
        ("(?=(?=.*!))(?!.*!)", False),
    ],
)
def test_patterns_without_end_in_re_end_here(text, matches):
    assert patterns.compiled(text).search("a" * 60 + "b" * 60) is matches


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("(", "not a regular expression"),
        ("(" * 5000 + ")" * 5000, "not a regular expression"),
        ("((((a{1000}){1000}){1000}){1000})", "more than 5000 parts"),
        ("(((){5000}){5000}){5000}", "more than 5000 parts"),
        ("(?!a)(?!b)(?!c)(?!d)", "looks ahead more than 3 times"),
        (r"(a)\1", "groupref"),
        ("(?<=a)b", "assert"),
        ("a*+b", "possessive"),
        ("(?i)a", "flags"),
        ("(?i:a)", "subpattern"),
    ],
)
def test_what_no_automaton_matches_is_refused(text, problem):
    with pytest.raises(patterns.PatternError, match=problem):
        patterns.compiled(text)


def test_patterns_of_a_model_end_too():
    path, endless = "layers/block_0/attention/" * 3 + "query", r"((\w|[/])+)+!"
    adapter = lora.Lora(layers=(endless, ".*query"), ranks=((endless, 1), (".*", 2)))
    assert adapter.fields_at(path) == ["layers"] and adapter.rank_at(path, 8, 8) == 2
    factorisation = lowrank.Factorisation(layers=(endless,))
    assert factorisation.rank_at(path, 8, 8) is None
