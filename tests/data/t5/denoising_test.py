"""Span corruption and prefixes against the published lengths and masks, and the stream as a function of (seed, step)."""

import itertools

import numpy as np
import pytest

from espalier.data.cache import in_place, store
from espalier.data.stream import rows
from espalier.data.stream.row_stream import EvalStream
from espalier.data.stream.train_stream import Stream
from espalier.data.t5 import denoising
from espalier.data.t5.noise import PrefixLM, SpanCorruption, _segments

VOCABULARY = 400
SENTINEL, END = VOCABULARY - 1, 1
LENGTHS = {"inputs": 40, "targets": 14}


def draw(seed=0):
    return np.random.Philox(key=seed).random_raw


@pytest.mark.parametrize(
    ("density", "span", "inputs", "text", "targets"),
    # random_spans_helper of t5/data/preprocessors.py.
    [(0.15, 3.0, 512, 568, 114), (0.15, 3.0, 1024, 1137, 229), (0.5, 3.0, 512, 766, 512)],
)
def test_lengths_are_the_published_ones(density, span, inputs, text, targets):
    noise = SpanCorruption(noise_density=density, mean_noise_span_length=span)
    assert noise.text_length({"inputs": inputs, "targets": targets}) == text
    assert noise._lengths(text)[1] == targets
    parts = noise.split(np.arange(2, 2 + text), draw(), 32_099)
    assert [len(part) + 1 for part in parts] == [inputs, targets]
    assert noise.text_length({"inputs": inputs, "targets": targets - 1}) < text
    with pytest.raises(ValueError, match="at least 3 inputs"):
        noise.text_length({"inputs": inputs, "targets": 2})


@pytest.mark.parametrize("length", [1, 2, 3, 7, 100])
def test_inputs_and_targets_together_are_the_text(length):
    tokens = np.arange(10, 10 + length)
    for seed in range(20):
        inputs, targets = SpanCorruption().split(tokens, draw(seed), SENTINEL)
        spans = np.flatnonzero(targets > 300)
        assert targets[0] == SENTINEL or length == 1
        assert targets[spans].tolist() == [SENTINEL - i for i in range(len(spans))]
        # Each sentinel of the inputs, replaced by what follows it in the targets.
        after = (
            dict(zip(targets[spans].tolist(), np.split(targets, spans[1:]), strict=True))
            if len(spans)
            else {}
        )
        whole = [
            token
            for place in inputs.tolist()
            for token in (after[place][1:].tolist() if place in after else [place])
        ]
        if length > 1:  # a text of one token is not masked
            assert whole == tokens.tolist()
        else:
            assert inputs.tolist() == tokens.tolist()


def test_every_division_is_equally_likely():
    counts = {}
    for seed in range(2400):
        sizes = tuple(_segments(5, 3, draw(seed)))
        counts[sizes] = counts.get(sizes, 0) + 1
    assert set(counts) == {s for s in itertools.product(range(1, 4), repeat=3) if sum(s) == 5}
    assert all(abs(count - 400) < 5 * np.sqrt(400) for count in counts.values())


def test_a_prefix_ends_at_every_place():
    tokens = np.arange(5)
    cuts = [len(PrefixLM().split(tokens, draw(seed), SENTINEL)[0]) for seed in range(400)]
    assert set(cuts) == {1, 2, 3, 4} and min(np.bincount(cuts)[1:]) > 60
    inputs, targets = PrefixLM().split(tokens[:1], draw(), SENTINEL)
    assert (inputs.tolist(), targets.tolist()) == ([], [0])
    with pytest.raises(ValueError, match="at least 2"):
        PrefixLM().text_length({"inputs": 1, "targets": 9})


@pytest.fixture(scope="module")
def caches(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("caches"), np.random.default_rng(0)
    return {
        name: store.write(
            root / name,
            [
                {"targets": rng.integers(2, 300, size), "document_id": f"{name}#{i}"}
                for i, size in enumerate(rng.integers(1, 80, count))
            ],
            features={"targets": VOCABULARY, "document_id": "text"},
        )
        for name, count in (("a", 40), ("b", 25))
    }


SPANS = SpanCorruption()


def make(caches, names="ab", seed=3, batch_size=8, split=SPANS, lengths=LENGTHS, text=None):
    """A stream of all sources to train on, or one that reads one source once."""

    def texts():
        of_texts = text or denoising.text_lengths(task_feature_lengths=lengths, denoising=split)
        sources = [
            rows.plan_source(name, caches[name], of_texts, packing="concat") for name in names
        ]
        if len(names) == 1:
            return EvalStream(*sources, batch_size=batch_size)
        return Stream(sources, ((0, {"a": 0.7, "b": 0.3}),), seed=seed, batch_size=batch_size)

    return denoising.make_stream(
        stream=texts,
        task_feature_lengths=lengths,
        denoising=split,
        first_sentinel=SENTINEL,
        end_token=END,
        seed=seed,
    )


@pytest.mark.parametrize("split", [SpanCorruption(), PrefixLM()])
def test_batches_are_a_function_of_seed_and_step(caches, split):
    whole = make(caches, split=split)
    assert whole.length == 54 and whole.summary()["lengths"] == LENGTHS
    for step in (0, 5, 40):
        batch = whole.batch(step, 0, 8)
        again = make(caches, split=split)
        for lo in (6, 4, 2, 0):  # hosts, in any order
            part = again.batch(step, lo, lo + 2)
            for name, array in part.items():
                np.testing.assert_array_equal(array, batch[name][lo : lo + 2], err_msg=name)
                assert array.dtype == batch[name].dtype
    other = make(caches, split=split, seed=4)
    assert len({whole.fingerprint, other.fingerprint, whole._texts.fingerprint}) == 3
    assert make(caches, split=split).fingerprint == whole.fingerprint
    one, two = (stream.batch(0, 0, 8)["encoder_input_tokens"] for stream in (whole, other))
    assert (one != two).any()
    # A budget counts targets.
    count = sum(whole.batch(step, 0, 8)["decoder_loss_weights"].sum() for step in range(20))
    assert whole.steps_for_tokens(count) == pytest.approx(20, abs=3)
    for phase in whole.summary()["phases"]:
        assert phase["tokens_per_step"] == whole.tokens_per_step(phase["first_step"])


def test_it_is_iterated_over_like_other_streams(caches):
    stream = make(caches)
    whole = stream.batch(0, 0, stream.batch_size)
    assert whole["decoder_target_tokens"].shape[1] == stream.targets_length == LENGTHS["targets"]
    for batch in (next(iter(stream)), stream[0]):
        assert batch.keys() == whole.keys()
        assert all(np.array_equal(batch[name], whole[name]) for name in whole)


def test_a_row_is_split_otherwise_in_every_epoch_and_keeps_its_text(caches):
    stream = make(caches)
    seen = {}
    for step in range(30):
        inputs = stream.batch(step, 0, 8)["encoder_input_tokens"]
        for row, read in zip(stream.documents(step, 0, 8), inputs, strict=True):
            seen.setdefault((row["source"], row["row"]), {})[row["epoch"]] = read.tolist()
    repeated = [list(epochs.values()) for epochs in seen.values() if len(epochs) > 1]
    assert repeated and sum(a[0] == a[1] for a in repeated) < len(repeated) / 10


def test_columns_of_a_row(caches):
    stream = make(caches, names="a")
    assert stream.bytes_per_token == 0.0
    last = stream.num_steps - 1
    for step in (0, last):
        row_B = [row["row"] for row in stream.documents(step, 0, 8)]
        batch = stream.batch(step, 0, 8)
        texts = stream._texts.batch(step, 0, 8)["decoder_target_tokens"]
        for b in range(8):
            real = {name: batch[f"{name}_segment_ids"][b] > 0 for name in ("encoder", "decoder")}
            inputs = batch["encoder_input_tokens"][b][real["encoder"]]
            targets = batch["decoder_target_tokens"][b][real["decoder"]]
            if row_B[b] == rows.NO_ROW:
                assert not real["encoder"].any() and not real["decoder"].any()
                continue
            assert inputs[-1] == targets[-1] == END
            assert not batch["encoder_input_tokens"][b][~real["encoder"]].any()
            words = [token for token in (*inputs[:-1], *targets[:-1]) if token < 300]
            assert sorted(words) == sorted(texts[b][texts[b] > 0].tolist())
            shifted = batch["decoder_input_tokens"][b][real["decoder"]]
            assert shifted.tolist() == [0, *targets[:-1]]
            count = int(real["decoder"].sum())
            assert batch["decoder_positions"][b].tolist() == [*range(count), *[0] * (14 - count)]
        weights = batch["decoder_loss_weights"]
        np.testing.assert_array_equal(weights, batch["decoder_segment_ids"])
    assert rows.NO_ROW in row_B


def test_settings_that_do_not_fit_are_errors(tmp_path, caches):
    with pytest.raises(ValueError, match="must have 'inputs' and 'targets'"):
        make(caches, lengths={"targets": 8})
    with pytest.raises(ValueError, match="Texts of 99 tokens do not fit"):
        make(caches, text={"targets": 99})
    with pytest.raises(ValueError, match="needs 28 sentinels, but the vocabulary has 0"):
        denoising.check_sentinels(0, SpanCorruption().sentinels(568))
    assert PrefixLM().sentinels(568) == 0
    weighed = store.write(
        tmp_path / "w",
        [{"targets": np.arange(2, 9), "loss_weights": np.zeros(7, np.float32), "document_id": "w"}],
        features={"targets": VOCABULARY, "loss_weights": "float32", "document_id": "text"},
    )
    with pytest.raises(ValueError, match="weighs its tokens"):
        make({"a": weighed}, names="a").batch(0, 0, 1)
    source = rows.plan_source("w", weighed, {"targets": 8})
    with pytest.raises(ValueError, match="no token has a loss weight.*give TRAIN_STEPS in place"):
        Stream([source], ((0, {"w": 1.0}),), batch_size=1).steps_for_tokens(9)


def test_rows_of_caches_that_are_read_in_place_are_the_same(caches):
    want = [make(caches).batch(step, 0, 8) for step in range(3)]
    stream = make({n: in_place.open_cache(opened.directory) for n, opened in caches.items()})
    for step, batch in enumerate(want):
        got = stream.batch(step, 0, 8)
        assert list(got) == list(batch)
        for name in batch:
            np.testing.assert_array_equal(got[name], batch[name], err_msg=name)
