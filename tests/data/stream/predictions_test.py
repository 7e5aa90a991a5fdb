"""The store of a frozen model's predictions: what it keeps, shares, and refuses."""

import functools
import hashlib
import io

import numpy as np
import pytest

from espalier.data.preference.stream import ReferencedStream
from espalier.data.stream.predictions import ABOUT, PredictionStore, PredictionStoreError

SETTINGS = {"shape": (2,), "setting": "REFERENCE"}
opened = functools.partial(PredictionStore, **SETTINGS)
shared = functools.partial(PredictionStore.shared, **SETTINGS)
MODEL = hashlib.sha256(b"model").hexdigest()


def digest(name):
    return hashlib.blake2b(name.encode(), digest_size=16).hexdigest()


def test_values_are_kept_for_whoever_asks_next(tmp_path):
    first = opened(MODEL, {"checkpoint": "a"}, root=tmp_path)
    first.add([digest("x"), digest("y")], np.array([[-1.5, -2.5], [-3.0, -4.0]]))
    other = opened(MODEL, {}, root=tmp_path)
    other.add([digest("z")], np.array([[-5.0, -6.0]]))
    both = opened(MODEL, {}, root=tmp_path)
    assert len(both) == 3 and both.missing([digest("x"), digest("w")]) == [digest("w")]
    expected = [[-5.0, -6.0], [0.0, 0.0], [-1.5, -2.5]]
    np.testing.assert_array_equal(both.get([digest("z"), "", digest("x")]), expected)


def test_streams_of_a_process_share_a_store_while_one_uses_it(tmp_path):
    store = shared(MODEL, {}, root=tmp_path)
    store.add([digest("x")], np.ones((1, 2)))
    assert shared(MODEL, {}, root=str(tmp_path)) is store
    assert shared(digest("other"), {}, root=tmp_path) is not store
    assert shared(MODEL, {}, root=tmp_path / "elsewhere") is not store
    (part,) = store.directory.glob("*.npz")
    part.write_bytes(b"damaged")
    assert len(shared(MODEL, {}, root=tmp_path)) == 1
    del store
    with pytest.raises(PredictionStoreError, match="is damaged"):
        shared(MODEL, {}, root=tmp_path)


def test_another_model_knows_nothing_of_them(tmp_path):
    opened(MODEL, {}, root=tmp_path).add([digest("x")], np.zeros((1, 2)))
    assert len(opened(digest("other"), {}, root=tmp_path)) == 0


def test_a_store_that_was_only_begun_is_empty(tmp_path):
    store = opened(MODEL, {}, root=tmp_path)
    store.directory.mkdir()
    assert len(opened(MODEL, {}, root=tmp_path)) == 0
    store.add([digest("x")], np.ones((1, 2)))
    assert len(opened(MODEL, {}, root=tmp_path)) == 1


def test_processes_that_add_the_same_write_one_file(tmp_path):
    stores = [opened(MODEL, {}, root=tmp_path) for _ in range(2)]
    for store in stores:
        store.add([digest("x")], np.ones((1, 2)))
    assert len(list(stores[0].directory.glob("*.npz"))) == 1


def test_damage_is_named_and_nothing_is_guessed(tmp_path):
    store = opened(MODEL, {}, root=tmp_path)
    store.add([digest("x")], np.ones((1, 2)))
    with pytest.raises(PredictionStoreError, match="Start the command again"):
        store.get([digest("y")])
    (part,) = store.directory.glob("*.npz")
    content = part.read_bytes()
    part.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(PredictionStoreError, match=f"{part.name} is damaged.*Delete it"):
        opened(MODEL, {}, root=tmp_path)
    part.write_bytes(content)
    (store.directory / ABOUT).write_text("{}")
    with pytest.raises(PredictionStoreError, match="cannot be read"):
        opened(MODEL, {}, root=tmp_path)
    (store.directory / ABOUT).write_text(f'{{"model": "{digest("other")}"}}')
    with pytest.raises(PredictionStoreError, match="belongs to another reference model"):
        opened(MODEL, {}, root=tmp_path)


def test_a_part_with_a_fitting_hash_that_holds_no_arrays_of_the_store_is_named(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "about.json").write_text('{"model": "model"}')
    objects, numbers = np.array([{}], object), np.zeros((1, 16), np.uint8)
    for arrays in ({"digests": objects, "values": objects}, {"digests": numbers}, None):
        file = io.BytesIO()
        np.savez(file, **arrays) if arrays else np.save(file, numbers)
        part = folder / f"{hashlib.sha256(file.getvalue()).hexdigest()}.npz"
        part.write_bytes(file.getvalue())
        with pytest.raises(PredictionStoreError, match=f"{part.name} holds no arrays"):
            opened("model", {}, root=tmp_path)
        part.unlink()


def test_what_is_not_finite_is_not_kept(tmp_path):
    store = opened(MODEL, {}, root=tmp_path)
    with pytest.raises(PredictionStoreError, match="not finite"):
        store.add([digest("x")], np.array([[np.nan, 0.0]]))
    assert not list(tmp_path.iterdir())


class Rows:
    """Two rows of two slots, of which one is empty."""

    fingerprint = "rows"
    length = 8

    def summary(self):
        return {"rows": 2}

    def batch(self, step, lo, hi):
        return {"source_ids": np.zeros(hi - lo, np.int32)}

    def row_ids(self, step, lo, hi):
        return [[digest("x"), digest("y")], [digest("z"), ""]][lo:hi]


def test_a_batch_has_the_values_of_its_rows(tmp_path):
    store = opened(MODEL, {}, root=tmp_path)
    store.add([digest(name) for name in "xyz"], np.arange(6.0).reshape(3, 2))
    stream = ReferencedStream(Rows(), store, MODEL)
    found = stream.batch(0, 0, 2)["reference_log_probs"]
    np.testing.assert_array_equal(found, [[0, 1, 2, 3], [4, 5, 0, 0]])
    np.testing.assert_array_equal(stream.batch(0, 1, 2)["reference_log_probs"], found[1:])
    assert stream.length == 8 and stream.fingerprint == Rows.fingerprint
    assert stream.summary() == {"rows": 2, "reference": MODEL}
