"""Near-duplicates by bands against `dedup.near_duplicates`, which compares in one pass in memory."""

import numpy as np
import pytest

from espalier.data.clean import near_duplicates
from espalier.data.text import dedup


def versions(seed, count=6, words=150):
    """Texts of which each changes some words of one before: chains of pairs, of which only neighbours are similar."""
    rng = np.random.default_rng(seed)
    texts = [["".join(rng.choice(list("abcdefghij"), 5)) for _ in range(words)]]
    for _ in range(count - 1):
        text = list(texts[rng.integers(len(texts))])
        for place in rng.integers(words, size=rng.integers(5)):
            text[place] = "".join(rng.choice(list("klmnop"), 5))
        texts.append(text)
    return [" ".join(text) for text in texts]


def found_by_bands(sketches, threshold):
    pairs, copies = [np.empty((0, 2), np.int64)], [np.empty(0, np.int64)]
    for band, keys in enumerate(near_duplicates.band_keys(sketches)):
        for places in near_duplicates.buckets(keys):
            near, same = near_duplicates.pairs_of(sketches[places], band, threshold=threshold)
            pairs.append(places[near])
            copies.append(places[same])
    all_pairs = np.concatenate(pairs)
    assert len(np.unique(all_pairs, axis=0)) == len(all_pairs)  # each once
    return near_duplicates.duplicates(all_pairs, np.concatenate(copies)).tolist()


@pytest.mark.parametrize("threshold", [0.6, 0.8, 0.95])
def test_bands_find_what_one_pass_finds(threshold):
    rng = np.random.default_rng(0)
    texts = [text for seed in range(40) for text in versions(seed)]
    texts += [texts[i] for i in rng.integers(len(texts), size=30)]  # copies of all sorts
    rng.shuffle(texts)
    one_pass = dedup.near_duplicates(texts, threshold=threshold)
    expected = [i for i, earlier in enumerate(one_pass) if earlier is not None]
    assert 30 < len(expected) < 240
    sketches = np.stack([dedup.sketch(dedup.shingles(text)) for text in texts])
    assert found_by_bands(sketches, threshold) == expected


def test_a_chain_keeps_every_other_document():
    # 1 is similar to 0, and so dropped; 2 is similar to 1 only, and so kept; 3 is similar to 2.
    pairs = np.array([[3, 2], [1, 0], [2, 1]])
    assert near_duplicates.duplicates(pairs, np.array([7])).tolist() == [1, 3, 7]


def test_keys_that_are_equal_by_chance_make_no_pair():
    sketches = np.arange(2 * dedup.SKETCH, dtype=np.uint64).reshape(2, -1)
    pairs, copies = near_duplicates.pairs_of(sketches, 0, threshold=0.0)
    assert len(pairs) == len(copies) == 0
    sketches[1, -1] = sketches[0, -1]  # one entry of four of the last band
    assert len(near_duplicates.pairs_of(sketches, dedup.BANDS - 1, threshold=0.0)[0]) == 0
