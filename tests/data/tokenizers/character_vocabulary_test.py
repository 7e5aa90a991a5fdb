"""A closed set of characters as a SeqIO vocabulary."""

import numpy as np
import pytest

from espalier.data.stream import rows
from espalier.data.tokenizers import vocabularies


def test_characters_are_ids_in_their_order_in_python_and_in_tensorflow():
    vocabulary = vocabularies.characters(symbols="ba c?")
    assert vocabulary.encode("ab? c") == [4, 3, 7, 5, 6]
    assert vocabulary.encode("abz") == [4, 3, 2]
    assert vocabulary.encode_tf("ab? cz").numpy().tolist() == [4, 3, 7, 5, 6, 2]
    assert vocabulary.decode([4, 3, 7, 1, 4]) == "ab?"  # up to EOS
    ids = np.array([[4, 3, 7, 1, 4], [5, 6, 0, 0, 0]])
    assert vocabulary.decode_tf(ids).numpy().tolist() == [b"ab?", b" c"]
    assert (vocabulary.vocab_size, vocabulary.eos_id, vocabulary.bos_id) == (8, 1, None)


def test_other_characters_are_another_vocabulary():
    one, same, other = (vocabularies.characters(symbols=s) for s in ("abc", "abc", "acb"))
    assert one == same and one != other
    assert (
        rows.vocabulary_digest(one) == rows.vocabulary_digest(same) != rows.vocabulary_digest(other)
    )


def test_characters_may_be_of_any_script():
    vocabulary = vocabularies.characters(symbols="a\u4e00\uac00\U0001f331")
    text = "\uac00a\U0001f331\u4e00é\U0001f332"
    assert vocabulary.encode(text) == [5, 3, 6, 4, 2, 2]
    assert vocabulary.encode_tf(text).numpy().tolist() == [5, 3, 6, 4, 2, 2]
    assert vocabulary.decode_tf(np.array([[5, 6, 1]])).numpy()[0].decode() == text[0] + text[2]


@pytest.mark.parametrize("symbols", ["", "aba"])
def test_symbols_that_no_table_can_have_are_refused(symbols):
    with pytest.raises(ValueError, match="different characters"):
        vocabularies.characters(symbols=symbols)
