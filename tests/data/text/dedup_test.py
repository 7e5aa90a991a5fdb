"""Near-duplicate search and containment against sets of byte strings."""

import functools

import numpy as np
import pytest

from espalier.data.text import corpus, dedup
from espalier.launch.config import parameters
from espalier.launch.prepare import documents


def _text(seed: int, words: int = 400) -> str:
    rng = np.random.default_rng(seed)
    return " ".join("".join(rng.choice(list("abcdefghij"), 5)) for _ in range(words))


@functools.cache  # one text is compared with many
def _set(text: str) -> frozenset[bytes]:
    raw = b" ".join(text.encode().split())
    count = max(len(raw) - dedup.SHINGLE + 1, 1)
    return frozenset(raw[i : i + dedup.SHINGLE] for i in range(count))


def _resemblance(a: str, b: str) -> float:
    shared = len(_set(a) & _set(b))
    return shared / (len(_set(a)) + len(_set(b)) - shared)


def test_shingles_are_one_hash_per_distinct_run_of_bytes():
    text = _text(0) + " " + _text(0)[:300] + "\n\t  é日本"
    hashes = dedup.shingles(text)
    raw = b" ".join(text.encode().split())
    assert len(hashes) == len(raw) - dedup.SHINGLE + 1
    assert len(set(hashes.tolist())) == len(_set(text))
    assert len(dedup.shingles("")) == len(dedup.shingles("short")) == 1


@pytest.mark.parametrize("shared", [0.0, 0.3, 0.6, 0.9])
def test_sketch_estimates_resemblance(shared):
    errors = []
    for seed in range(20):
        left, right = _text(3 * seed), _text(3 * seed + 1)
        common = _text(3 * seed + 2, words=int(400 * shared / max(1 - shared, 0.05)))
        a, b = f"{common} {left}", f"{common} {right}"
        estimate = (dedup.sketch(dedup.shingles(a)) == dedup.sketch(dedup.shingles(b))).mean()
        errors.append(estimate - _resemblance(a, b))
    # 128 values: standard error up to 0.044, of the mean of twenty up to 0.01.
    assert abs(np.mean(errors)) < 0.03
    assert np.abs(errors).max() < 0.18


def test_near_duplicates_finds_what_brute_force_finds():
    texts = []
    for seed in range(40):
        words = _text(seed).split()
        texts.append(" ".join(words))
        changed = words.copy()
        for position in range(0, len(words), 200 if seed % 2 else 12):
            changed[position] = "other"
        texts.append("  " + "\n".join(changed))
    found = dedup.near_duplicates(texts, threshold=0.8)
    kept: list[int] = []
    for index, text in enumerate(texts):
        expected = [other for other in kept if _resemblance(text, texts[other]) >= 0.8]
        assert (found[index] in expected) if expected else found[index] is None
        if not expected:
            kept.append(index)
    assert sum(other is not None for other in found) == 20


def test_near_duplicates_of_a_dropped_document_are_kept_or_match_the_kept_one():
    text = _text(1)
    assert dedup.near_duplicates([text, text, text]) == [None, 0, 0]
    assert dedup.near_duplicates([]) == []


def test_containment_against_sets():
    training = [_text(seed, words=800) for seed in range(4)]
    halves = f"{training[1][:2400]} {_text(9)}"
    documents = [training[0], halves, _text(11, words=800)]
    seen = set().union(*map(_set, training))
    expected = [len(_set(text) & seen) / len(_set(text)) for text in documents]
    shares = dedup.containment(
        [dedup.sample(text) for text in documents], [dedup.sample(text) for text in training]
    )
    assert expected[0] == 1.0 and 0.4 < expected[1] < 0.6 and expected[2] < 0.01
    np.testing.assert_allclose(shares, expected, atol=0.06)


def test_containment_does_not_count_boilerplate():
    licence = _text(7)
    training = [f"{licence} {_text(seed)}" for seed in range(20, 20 + dedup.BOILERPLATE)]
    document = dedup.sample(f"{licence} {_text(99)}")
    samples = [dedup.sample(text) for text in training]
    assert dedup.containment([document], samples)[0] < 0.02
    assert dedup.containment([document], samples[:-1])[0] > 0.4  # one fewer: it counts again
    assert dedup.containment([document], [])[0] == 0


@pytest.mark.parametrize(
    ("function", "argument"),
    [
        (corpus.assemble, "near_duplicate_threshold"),
        (documents.prepare_documents, "near_duplicates"),
    ],
)
def test_thresholds_are_those_that_bands_serve(function, argument):
    assert parameters.mismatch(function, argument, 0.4) and parameters.mismatch(
        function, argument, 1.1
    )
    assert not parameters.mismatch(function, argument, 0.5)
    least = 1 - (1 - 0.5 ** (dedup.SKETCH // dedup.BANDS)) ** dedup.BANDS
    assert 0.86 < least < 0.88  # share of pairs of resemblance 0.5 that are compared
