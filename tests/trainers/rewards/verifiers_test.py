"""Rewards from texts."""

import builtins
import sys
import types

import numpy as np
import pytest

from espalier.trainers.rewards import verifiers
from espalier.trainers.rewards.base import Completion
from espalier.trainers.rewards.verifiers import TextReward, VerifierError

CHARACTERS = types.SimpleNamespace(decode=lambda ids: "".join(map(chr, ids)))


def completion(text, info=None):
    return Completion(prompt=[1], tokens=[ord(c) for c in text], ended=True, info=info)


@pytest.mark.parametrize(
    ("text", "pattern", "right"),
    [
        ("72", None, True),
        (" 72\n", None, True),
        ("73", None, False),
        ("72.", None, False),
        ("it is 7, no, 72", r"\d+", True),
        ("72 or 7", r"\d+", False),
        ("<a>72</a> <a>1</a>\n<a>\n72</a>", r"<a>(.*?)</a>", True),
        ("seventy two", r"\d+", False),
    ],
)
def test_an_answer_is_right_or_wrong(text, pattern, right):
    assert verifiers.exact_answer(text, {"answer": 72}, pattern=pattern) == right


def test_forms_and_lengths():
    assert verifiers.matches("<a>\n1</a>", None, pattern=r"<a>.*</a>") == 1
    assert verifiers.matches("<a>1</a>.", None, pattern=r"<a>.*</a>") == 0
    lengths = [verifiers.too_long("x" * n, None, free=4, span=4) for n in (0, 4, 5, 8, 99)]
    assert lengths == [0, 0, -0.25, -1, -1]


def test_verifiers_are_added_by_weight():
    def length(text, info):
        return len(text)

    reward = TextReward(
        vocabulary=CHARACTERS, verifiers=[verifiers.exact_answer, length], weights=[1.0, -0.1]
    )
    found = reward([completion("7", {"answer": "7"}), completion("123", {"answer": "7"})])
    np.testing.assert_allclose(found, [0.9, -0.3], rtol=1e-6)
    assert found.dtype == np.float32


def test_the_scores_of_reasoning_gym_are_asked_for(monkeypatch):
    """By a stand-in for the package, which is optional and has a scorer for each name of a data set."""
    asked = []

    def get_score_answer_fn(name):
        def score(answer, entry):
            asked.append((name, answer))
            return 1.0 if answer == entry["answer"] else 0.01

        return score

    fake = types.SimpleNamespace(get_score_answer_fn=get_score_answer_fn)
    monkeypatch.setitem(sys.modules, "reasoning_gym", fake)
    info = {"answer": "4", "metadata": {"source_dataset": "leg_counting"}}
    assert verifiers.reasoning_gym("so: 4", info, pattern=r"\d+") == 1.0
    assert verifiers.reasoning_gym("none", info, pattern=r"\d+") == 0.01
    assert asked == [("leg_counting", "4"), ("leg_counting", None)]
    with pytest.raises(VerifierError, match="source_dataset"):
        verifiers.reasoning_gym("4", {"metadata": {}})


def test_scores_of_the_package_itself():
    package = pytest.importorskip("reasoning_gym", reason="reasoning-gym is optional")
    entry = package.create_dataset("leg_counting", size=1, seed=1)[0]
    assert verifiers.reasoning_gym(entry["answer"], entry) == 1
    assert verifiers.reasoning_gym("none", entry) < 1


def test_what_is_missing_is_named(monkeypatch):
    with pytest.raises(VerifierError, match="no 'answer'.*only 'text'"):
        verifiers.exact_answer("1", {"text": "x"})
    with pytest.raises(VerifierError, match="only nothing"):
        verifiers.exact_answer("1", None)
    with pytest.raises(ValueError, match="verifiers is empty"):
        TextReward(vocabulary=CHARACTERS, verifiers=[])
    with pytest.raises(ValueError, match="weights"):
        TextReward(vocabulary=CHARACTERS, verifiers=[verifiers.exact_answer], weights=[1.0, 2.0])
    with pytest.raises(ValueError, match="span"):
        verifiers.too_long("x", None, free=1, span=0)
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name == "reasoning_gym":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(VerifierError, match="pip install reasoning-gym"):
        verifiers.reasoning_gym("1", {})
