"""The project's vocabularies against SeqIO's own classes: ids, texts, digests and equality."""

import json
import pathlib
import pickle
import random

import numpy as np
import pytest
import seqio
import tensorflow as tf

from espalier.data import tasks
from espalier.data.stream import rows
from espalier.data.tokenizers import spm_tokenizer, vocabularies
from espalier.data.tokenizers.vocabulary import PassThroughVocabulary
from tests.data import task_kinds

GOLDEN = json.loads((pathlib.Path(__file__).parent.parent / "goldens/task_kinds.json").read_text())
PAIRS = ("bytes", "bytes with sentinels", "pieces", "pieces with sentinels", "numbers")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return task_kinds.train(tmp_path_factory.mktemp("model"))


@pytest.fixture(params=PAIRS)
def pair(request, model):
    """An own vocabulary, and SeqIO's."""
    extra = 5 if "sentinels" in request.param else 0
    if request.param == "numbers":
        return PassThroughVocabulary(9, eos_id=2), seqio.PassThroughVocabulary(9, eos_id=2)
    if "bytes" in request.param:
        return vocabularies.byte(extra_ids=extra), seqio.ByteVocabulary(extra)
    own = vocabularies.from_file(path=model, extra_ids=extra)
    return own, seqio.SentencePieceVocabulary(str(model), extra_ids=extra)


def texts() -> list[str]:
    draw = random.Random(0)
    points = [draw.choice((range(128), range(0xD800), range(0xE000, 0x110000))) for _ in range(999)]
    noise = "".join(chr(draw.choice(span)) for span in points)
    return ["", *task_kinds.HARD, *(noise[at : at + 37] for at in range(0, 999, 37))]


def test_texts_have_seqios_ids(pair):
    own, seqios = pair
    if isinstance(own, PassThroughVocabulary):
        assert own.encode([1, 2]) == seqios.encode([1, 2]) == [1, 2]
        return
    for text, ids in zip(texts(), own.encode_batch(texts()), strict=True):
        assert ids.dtype == np.int32
        assert list(own.encode(text)) == list(seqios.encode(text)) == ids.tolist()
        for made in (own.encode_tf(tf.constant(text)), seqios.encode_tf(tf.constant(text))):
            assert made.dtype == tf.int32 and made.numpy().tolist() == ids.tolist()


def test_ids_have_seqios_texts(pair):
    """Among them every single id, several EOS, and ids beyond the vocabulary."""
    own, seqios = pair
    draw, size = random.Random(1), own.vocab_size
    rows_ = [[draw.randrange(size + 3) for _ in range(9)] for _ in range(50)]
    rows_ += [
        [],
        *([id] for id in range(0, size + 3, 3)),
        [5, 1, 6, 1, 7],
        [0, 0, 5],
        [size + 9, 5],
    ]
    for ids in rows_:
        assert own.decode(ids) == seqios.decode(ids)
        assert own.decode(np.array(ids, int)) == seqios.decode(ids)
        assert own.decode(tf.constant(ids, tf.int32)) == seqios.decode(ids)
        for batch in (ids, [ids, ids]):
            known = tf.constant(np.minimum(np.array(batch, int), size - 1), tf.int32)
            made, expected = (each.decode_tf(known).numpy() for each in (own, seqios))
            np.testing.assert_array_equal(made, expected)


def test_caches_and_seqio_know_them_as_before(pair):
    own, seqios = pair
    tasks.in_seqio()
    assert rows.vocabulary_digest(own) == rows.vocabulary_digest(seqios)
    for name in ("vocab_size", "_base_vocab_size", "extra_ids", "pad_id", "eos_id", "unk_id"):
        assert getattr(own, name) == getattr(seqios, name)
    if not isinstance(own, PassThroughVocabulary):
        assert own.bos_id == seqios.bos_id
    if "Byte" not in str(own):  # SeqIO's shows an address
        assert str(own) == str(seqios)
    assert isinstance(own, type(seqios)) and isinstance(own, seqio.Vocabulary)
    assert seqios == own  # as SeqIO asks of the tasks of a mixture


def test_digests_of_the_code_that_derived_them_from_seqio():
    found = {
        "bytes": vocabularies.byte(extra_ids=3),
        "bytes0": vocabularies.byte(),
        "chars": vocabularies.characters(symbols="abc?é"),
    }
    assert {name: rows.vocabulary_digest(v) for name, v in found.items()} == GOLDEN["digests"]


def test_batches_equal_single_texts_and_pickles_travel(model, tmp_path):
    spm_tokenizer.write(model.read_bytes(), tmp_path)
    moved = tmp_path / "moved.model"
    moved.write_bytes(model.read_bytes())
    every = [
        vocabularies.characters(symbols="ab \U0001f642\ufffd\x00"),
        vocabularies.huggingface(path=tmp_path),
        vocabularies.huggingface(path=tmp_path, extra_ids=2),
        vocabularies.from_file(path=moved, extra_ids=3),
        vocabularies.byte(extra_ids=2),
    ]
    data = pickle.dumps(every)
    moved.unlink()  # another machine has no such file
    for vocabulary, copy in zip(every, pickle.loads(data), strict=True):
        assert copy == vocabulary and copy.vocab_size == vocabulary.vocab_size
        assert rows.vocabulary_digest(copy) == rows.vocabulary_digest(vocabulary)
        for text, ids in zip(texts(), copy.encode_batch(texts()), strict=True):
            assert ids.dtype == np.int32 and ids.tolist() == list(vocabulary.encode(text))
            if not hasattr(vocabulary, "files"):  # those are tested within a pipeline
                assert copy.encode_tf(tf.constant(text)).numpy().tolist() == ids.tolist()
            assert copy.decode(ids) == vocabulary.decode(ids)
    assert len({str(v) for v in every}) == 5 and every[1] != every[2] and every[3] != every[4]
