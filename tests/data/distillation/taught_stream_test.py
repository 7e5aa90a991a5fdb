"""Rows are known by what the teacher reads of them, and get what the store has of them."""

import hashlib

import numpy as np
import pytest

from espalier.data.distillation import taught_stream
from espalier.data.distillation.taught_stream import TaughtStream
from espalier.data.stream.predictions import PredictionStore, PredictionStoreError

B, T, K = 3, 4, 2


PARTS = ("input_tokens", "positions", "segment_ids")
READ = tuple(f"{side}_{part}" for side in ("decoder", "encoder") for part in PARTS)


class Rows:
    """A stream whose batches are given, with the columns of an encoder unless it is of a decoder."""

    batch_size = B

    def __init__(self, order=(0, 1, 2), read=READ):
        rng = np.random.default_rng(0)
        self._columns = {
            name: rng.integers(0, 9, (B, T)).astype(np.int32)[list(order)]
            for name in (*read, "decoder_target_tokens")
        }

    def summary(self):
        return {"start_token": 0}

    def batch(self, step, lo, hi):
        return {name: column[lo:hi] for name, column in self._columns.items()}


def store_of(root, digests):
    store = PredictionStore(
        "m" * 32, {}, root=root, shape=taught_stream.shape_of(T, K), setting="TEACHER"
    )
    ids = (
        np.arange(len(digests) * T * K).reshape(-1, T, K) + 2**24 - 40
    )  # the largest that are exact
    log_probs = -np.random.default_rng(1).random((len(digests), T, K + 1))
    store.add(digests, np.concatenate([ids, log_probs], axis=-1))
    return ids, log_probs.astype(np.float32)


def test_rows_get_their_predictions_in_any_order_and_part_of_a_batch(tmp_path):
    digests = taught_stream.row_digests(Rows().batch(0, 0, B))
    assert len({*digests}) == B
    ids, log_probs = store_of(tmp_path, digests)
    again = PredictionStore(
        "m" * 32, {}, root=tmp_path, shape=taught_stream.shape_of(T, K), setting="TEACHER"
    )
    order = [2, 0, 1]
    stream = TaughtStream(Rows(order), again, top_k=K, teacher="t")
    batch = stream.batch(0, 1, 3)
    np.testing.assert_array_equal(batch["teacher_ids"], ids[order][1:])
    np.testing.assert_array_equal(batch["teacher_log_probs"], log_probs[order][1:])
    assert batch["teacher_ids"].dtype == np.int32 and batch["decoder_target_tokens"].shape == (2, T)
    assert stream.summary() == {"start_token": 0, "teacher": "t"} and stream.batch_size == B


def test_rows_of_decoders_are_known_by_their_three_columns_as_before():
    batch = Rows(read=READ[:3]).batch(0, 0, B)
    row = b"".join(batch[name][1].tobytes() for name in READ[:3])
    expected = hashlib.blake2b(row, digest_size=16).hexdigest()
    assert taught_stream.row_digests(batch)[1] == expected
    assert taught_stream.row_digests(Rows().batch(0, 0, B))[1] != expected


@pytest.mark.parametrize("name", READ)
def test_a_row_that_differs_in_what_the_teacher_reads_is_another(name):
    batch = Rows().batch(0, 0, B)
    column = batch[name].copy()
    column[1, 2] += 1
    before, after = (taught_stream.row_digests(rows) for rows in (batch, {**batch, name: column}))
    assert [a == b for a, b in zip(before, after, strict=True)] == [True, False, True]


def test_what_is_not_stored_or_of_another_size_is_an_error(tmp_path):
    digests = taught_stream.row_digests(Rows().batch(0, 0, B))
    store_of(tmp_path, digests[:2])
    store = PredictionStore(
        "m" * 32, {}, root=tmp_path, shape=taught_stream.shape_of(T, K), setting="TEACHER"
    )
    with pytest.raises(PredictionStoreError, match="has no value for the data"):
        TaughtStream(Rows(), store, top_k=K, teacher="t").batch(0, 0, B)
    with pytest.raises(ValueError, match="values"):
        PredictionStore(
            "m" * 32, {}, root=tmp_path, shape=taught_stream.shape_of(T, K + 1), setting="TEACHER"
        )
    bad = np.full((1, *taught_stream.shape_of(T, K)), np.nan)
    other = PredictionStore(
        "n" * 32, {}, root=tmp_path, shape=taught_stream.shape_of(T, K), setting="TEACHER"
    )
    with pytest.raises(PredictionStoreError, match="log-probabilities of TEACHER are not"):
        other.add(digests[:1], bad)
