"""Predictions carried between hand-made vocabularies, against sums over all tokens of the same text in float64."""

import numpy as np
import pytest

from espalier.data.distillation import alignment
from espalier.data.tokenizers import vocabularies

END, ABSENT = 1, -1e4


class Longest:
    """A vocabulary that always takes its longest token: pad, end, unknown, and tokens by their texts."""

    pad_id, eos_id, unk_id, bos_id = 0, END, 2, None

    def __init__(self, *texts):
        self.spellings = dict(enumerate(texts, 3))
        self.vocab_size = 3 + len(texts)

    def encode(self, text):
        ids = []
        while text:
            id = max((i for i, t in self.spellings.items() if text.startswith(t)), key=self._length)
            ids.append(id)
            text = text[self._length(id) :]
        return ids

    def decode(self, ids):
        return "".join(self.spellings.get(id, "") for id in ids)

    def _length(self, id):
        return len(self.spellings[id])


TEACHER = Longest("a", "b", "c", "ab", " c", " ", "abc")
STUDENT = Longest("ab", "bc", "c", "b", "a", " ", " c", "d")


def aligned(text, student_text=None, end=(END,)):
    own = [*STUDENT.encode(text if student_text is None else student_text), *end]
    teacher = alignment.places_of(TEACHER, TEACHER.encode(text))
    return alignment.matches(teacher, alignment.places_of(STUDENT, own))


@pytest.mark.parametrize(
    ("text", "student", "expected"),
    [
        ("ab c", {}, {0: 0, 1: 1, 2: 2}),  # ab| c on both sides, and the end
        ("abcb", {}, {2: 1, 3: 2}),  # abc|b and ab|c|b: they agree on b
        ("bc", {}, {1: 2}),  # b|c and bc: only the end
        ("  a", {"student_text": "a"}, {0: 2, 1: 3}),  # a template has removed the spaces
        ("ab", {"end": STUDENT.encode("d")}, {0: 0, 1: 1}),  # a template ends turns with d
        ("ab", {"end": ()}, {0: 0}),  # nothing ends the turn
        ("ab c", {"student_text": "ab", "end": ()}, {0: 0}),  # a row that is cut
        ("ab", {"student_text": "ba"}, {}),  # another text
        ("", {}, {0: 0}),
    ],
)
def test_tokens_are_matched_where_both_begin_and_end(text, student, expected):
    assert aligned(text, **student) == expected


def test_tokens_within_a_character_have_no_end_or_no_place():
    vocabulary = vocabularies.byte()
    text, places = alignment.places_of(vocabulary, vocabulary.encode("aé" * 12 + "b"))
    assert text == "aé" * 12 + "b"  # longer than what is decoded at a time
    ends = {begin: end for begin, (_, end) in places.items()}
    a = {2 * i: 2 * i + 1 for i in range(13)}
    assert ends == {**a, **{2 * i + 1: None for i in range(12)}, 25: alignment.END}
    cut, places = alignment.places_of(vocabulary, vocabulary.encode("aé")[:2])
    assert cut == "a" and places == {0: (0, 1), 1: (1, None)}  # no end: the text goes on


def test_texts_are_those_within_a_text():
    texts = alignment.texts_of(vocabularies.byte())
    assert texts[vocabularies.byte().encode("a")[0]] == "a" and len(texts) == 128
    assert alignment.texts_of(TEACHER) == TEACHER.spellings


def stored(p_TV, k):
    """Values as the store has them, from probabilities [T, V] in float64."""
    order = np.argsort(-p_TV, axis=-1)[:, :k]
    top = np.take_along_axis(p_TV, order, axis=-1)
    others = 1 - top.sum(-1, keepdims=True)
    return np.concatenate([order, np.log(top), np.log(others)], axis=-1).astype(np.float32)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_a_token_has_the_probability_of_its_text_and_all_others_the_rest(k):
    p_TV = np.random.default_rng(k).dirichlet(np.full(TEACHER.vocab_size, 0.5), 5)
    same_V = alignment.same_texts(TEACHER, STUDENT, TEACHER.vocab_size)
    same_V[END] = END
    made = alignment.carried(stored(p_TV, k), same_V, absent=ABSENT)
    for t, values in enumerate(made.astype(np.float64)):
        ids, p = values[:k], np.exp(values[k:])
        expected = {}
        for id in np.argsort(-p_TV[t])[:k]:
            text = "END" if id == END else TEACHER.spellings.get(id)
            if text == "END" or text in STUDENT.spellings.values():
                expected[text] = p_TV[t, id]
        own = {
            "END" if i == END else STUDENT.spellings[i]: q
            for i, q in zip(ids, p[:k], strict=True)
            if i >= 0
        }
        assert own == pytest.approx(expected, rel=1e-5)
        assert p[k] == pytest.approx(1 - sum(expected.values()), rel=1e-4)
        assert (p[:k][ids < 0] == 0).all()


def test_several_ids_of_one_token_are_added_and_equal_vocabularies_change_nothing():
    values = stored(np.random.default_rng(0).dirichlet(np.ones(8), 4), 5)
    same = alignment.carried(values, np.arange(8, dtype=np.int32), absent=ABSENT)
    np.testing.assert_allclose(same, values, rtol=1e-6)
    one = alignment.carried(values, np.full(8, 6, np.int32), absent=ABSENT)
    np.testing.assert_array_equal(one[:, :5], [[6, -1, -1, -1, -1]] * 4)
    np.testing.assert_allclose(np.exp(one[:, 5]) + np.exp(one[:, -1]), 1, rtol=1e-5)
    nothing = alignment.nothing(2, 5, absent=ABSENT)
    none = alignment.carried(values, np.full(8, -1, np.int32), absent=ABSENT)
    np.testing.assert_allclose(none[:2], nothing, atol=1e-6)
