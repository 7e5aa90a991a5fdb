"""Compositions of operations against strings written by hand and plain Python."""

import collections

import numpy as np
import pytest

from espalier.launch.papers.mov import compositions


class Letters:
    """A vocabulary of characters without TensorFlow."""

    eos_id, unk_id = 1, 2

    def encode(self, text):
        return [3 + compositions.SYMBOLS.index(symbol) for symbol in text]

    def decode(self, ids):
        return "".join(compositions.SYMBOLS[id - 3] for id in ids)


LETTERS = compositions.LETTERS


def _shifted(by):
    return lambda s: "".join(LETTERS[(LETTERS.index(c) + by) % 12] for c in s)


BY_HAND = {
    "R": lambda s: s[::-1],
    "O": lambda s: s[1:] + s[0],
    "H": lambda s: s[2:] + s[:2],
    "W": lambda s: s[1] + s[0] + s[3] + s[2],
    "B": lambda s: s[3] + s[:3],
    "E": lambda s: s[3] + s[1:3] + s[0],
    "M": lambda s: s[0] + s[2] + s[1] + s[3],
    "L": lambda s: s[1] + s[0] + s[2:],
    **{
        letter: _shifted(by)
        for letter, by in zip("PSQUFVNI", (1, 2, 3, 4, 5, 7, 8, 9), strict=True)
    },
    "C": lambda s: s,
}


def source(pair, form="encoder_decoder", documents=40, seed=0):
    name = compositions.task_name(pair)
    return compositions.Composition(name, documents, seed, pair, Letters(), form)


def test_every_composition_is_what_plain_python_computes():
    train, held_out = compositions.split_pairs(0)
    assert (len(train), len(held_out), len({*train, *held_out})) == (96, 32, 128)
    assert {pair[::-1] for pair in held_out} == {*held_out}  # both orders do the same
    times = collections.Counter(letter for pair in held_out for letter in pair)
    assert len(times) == 16 and set(times.values()) == {4}
    assert compositions.split_pairs(0) == (train, held_out) != compositions.split_pairs(1)
    assert len(compositions.SINGLE) == 16
    moved = {BY_HAND[letter]("abcd") for letter in compositions.MOVES}
    assert len(moved) == 8 and "abcd" not in moved
    for pair in (*compositions.SINGLE, *train, *held_out):
        made = source(pair).examples("train")
        for inputs, targets in zip(made["inputs"], made["targets"], strict=True):
            text = Letters().decode(inputs)
            assert text[:2] == "".join(pair) and len(text) == 6 and targets[-1] == 1
            answer = BY_HAND[pair[1]](BY_HAND[pair[0]](text[2:]))
            assert Letters().decode(targets[:-1]) == answer


def test_strings_depend_on_seed_task_and_split_alone():
    pair, other = ("R", "P"), ("P", "R")
    strings = source(pair).strings("train")
    np.testing.assert_array_equal(strings, source(pair).strings("train"))
    for different in (source(pair, seed=1), source(other)):
        assert (strings != different.strings("train")).any()
    numbers = {
        split: source(each, documents=5000).strings(split) @ 12 ** np.arange(4)
        for split, each in (("train", pair), ("validation", other))
    }
    assert numbers["train"].shape == (5000,) and numbers["validation"].shape == (64,)
    assert (numbers["train"] % 10 > 0).all() and (numbers["validation"] % 10 == 0).all()


def test_a_decoder_learns_the_answer_alone():
    whole, parts = (
        source(("O", "P"), form).examples("train") for form in ("decoder", "encoder_decoder")
    )
    np.testing.assert_array_equal(whole["targets"], np.hstack([parts["inputs"], parts["targets"]]))
    assert whole["loss_weights"].dtype == np.float32
    np.testing.assert_array_equal(whole["loss_weights"], [[0] * 6 + [1] * 5] * 40)


def test_a_vocabulary_without_the_symbols_is_an_error():
    class Few(Letters):
        def encode(self, text):
            return [self.unk_id for _ in text]

    with pytest.raises(
        ValueError, match="set vocabularies.characters.symbols = 'ROHWBEMLPSQUFVNICabc"
    ):
        compositions.register(vocabulary=Few())
