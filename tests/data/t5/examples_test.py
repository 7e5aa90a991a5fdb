"""Files of inputs with targets: tokens and weights of rows, packed rows, held-out rows, and errors."""

import json

import numpy as np
import pytest

from espalier.data import tasks
from espalier.data.pieces import Piece
from espalier.data.stream import stream
from espalier.data.t5.examples import register_examples
from espalier.data.text.documents import DataError
from espalier.data.tokenizers import vocabularies

VOCABULARY = vocabularies.byte(extra_ids=20)
EOS = VOCABULARY.eos_id


@pytest.fixture
def register(tmp_path, monkeypatch):
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "cache"))

    def call(rows, **settings):
        path = tmp_path / "x.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {"vocabulary": VOCABULARY, "validation_fraction": 0.0, **settings}
        register_examples(name="examples", files=str(path), **settings)
        return tasks.sources()["examples"]

    return call


def examples(source, split="train"):
    source.num_input_examples(split)  # which checks all rows
    return [row for path in source.files[split] for row in source.read_examples(Piece(path), split)]


def test_texts_end_with_eos_and_ids_are_as_they_are(register):
    rows = [
        {"inputs": "ab", "targets": "c", "other": 1},
        {"inputs": [5, 6], "targets": [7, 8], "loss_weights": [0, 0.5]},
    ]
    text, ids = examples(register(rows))
    assert text["inputs"].tolist() == [*VOCABULARY.encode("ab"), EOS]
    assert text["targets"].tolist() == [*VOCABULARY.encode("c"), EOS]
    assert text["loss_weights"].tolist() == [1, 1]
    assert (ids["inputs"].tolist(), ids["targets"].tolist()) == ([5, 6], [7, 8])
    assert ids["loss_weights"].tolist() == [0, 0.5]
    without_eos, _ = examples(register(rows, inputs_eos=False))
    assert without_eos["inputs"].tolist() == VOCABULARY.encode("ab")
    renamed = register([{"q": "a", "a": "b"}], inputs_key="q", targets_key="a")
    assert examples(renamed)[0]["targets"].tolist() == [*VOCABULARY.encode("b"), EOS]


def test_the_held_out_share_is_exact_and_equal_inputs_are_together(register):
    rows = [{"inputs": f"q{i // 2}", "targets": f"a{i}"} for i in range(40)]
    source = register(rows, validation_fraction=0.1)
    splits = {split: examples(source, split) for split in ("train", "validation")}
    assert {split: len(each) for split, each in splits.items()} == {"train": 36, "validation": 4}
    texts = {split: {bytes(x["inputs"]) for x in each} for split, each in splits.items()}
    assert texts["train"].isdisjoint(texts["validation"])


def test_rows_are_the_examples_whatever_the_hosts(register):
    rng = np.random.default_rng(0)
    rows = []
    for i in range(30):
        targets = rng.integers(3, 100, rng.integers(1, 6)).tolist()
        weights = rng.integers(0, 2, len(targets)).tolist()
        weights[0] = 1
        rows.append({"inputs": [i + 3] * (i % 7 + 1), "targets": targets, "loss_weights": weights})
    register(rows)
    lengths = {"inputs": 16, "targets": 12}

    def opened():
        return stream.make_stream(
            mixture_or_task_name="examples", task_feature_lengths=lengths, batch_size=4, seed=1
        )

    made, again = opened(), opened()
    seen = []
    for step in range(made.steps_for_epochs(1)):
        batch = made.batch(step, 0, 4)
        # A step is a function of its number, and each half of it what the whole is.
        for lo in (0, 2):
            part = again.batch(step, lo, lo + 2)
            for name, array in part.items():
                np.testing.assert_array_equal(array, batch[name][lo : lo + 2])
        for b in range(4):
            for segment in range(1, batch["decoder_segment_ids"][b].max() + 1):
                read = batch["encoder_segment_ids"][b] == segment
                learnt = batch["decoder_segment_ids"][b] == segment
                seen.append(
                    {
                        "inputs": batch["encoder_input_tokens"][b][read].tolist(),
                        "targets": batch["decoder_target_tokens"][b][learnt].tolist(),
                        "loss_weights": batch["decoder_loss_weights"][b][learnt].tolist(),
                    }
                )
    assert all(row in rows for row in seen) and len({r["inputs"][0] for r in seen}) >= 28


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"input": "a", "targets": "b"}, "no key 'inputs'; present are 'input', 'targets'"),
        ({"inputs": "a", "targets": 3}, "'targets' is neither a text nor a list of ids"),
        ({"inputs": [9999], "targets": "b"}, "'inputs' has the id 9999"),
        (
            {"inputs": "a", "targets": "b", "loss_weights": [1]},
            "weighs ids, and 'targets' is a text",
        ),
        ({"inputs": "a", "targets": [3, 4], "loss_weights": [1]}, "has 1 numbers, and 'targets' 2"),
        ({"inputs": "a", "targets": [3], "loss_weights": [-1]}, "no list of numbers from 0 on"),
        ({"inputs": "a", "targets": " "}, "no example \\(1 empty_targets"),
        ({"inputs": "a", "targets": [3], "loss_weights": [0]}, "no example \\(1 no_weight"),
    ],
)
def test_rows_that_cannot_be_learnt_are_one_error(register, row, words):
    with pytest.raises(DataError, match=words) as error:
        examples(register([row]))
    assert "x.jsonl" in str(error.value)


@pytest.mark.parametrize("packing", ["examples", "best_fit"])
def test_each_packed_example_has_the_embedding_of_its_row(register, packing):
    """Segment k of a row of tokens is the example whose embedding is the k-th of the row's."""
    rng = np.random.default_rng(0)
    rows = [
        {"inputs": [5 + i], "targets": [60 + i] * (1 + i % 3), "sentence_embedding": x.tolist()}
        for i, x in enumerate(rng.normal(size=(12, 3)).astype(np.float32))
    ]
    register(rows, with_sentences=True)
    made = stream.make_stream(
        mixture_or_task_name="examples",
        task_feature_lengths={"inputs": 8, "targets": 8},
        batch_size=3,
        packing=packing,
    )
    most = 1 if packing == "examples" else 8
    for step in range(3):
        batch = made.batch(step, 0, 3)
        found = batch["sentence_embeddings"]
        assert found.dtype == np.float32 and found.shape[0::2] == (3, 3)
        assert found.shape[1] <= most and (found.shape[1] > 1) == (packing != "examples")
        for b in range(3):
            for segment in range(1, found.shape[1] + 1):
                here = batch["encoder_segment_ids"][b] == segment
                expected = [0.0] * 3
                if here.any():
                    expected = rows[batch["encoder_input_tokens"][b][here][0] - 5][
                        "sentence_embedding"
                    ]
                np.testing.assert_array_equal(found[b, segment - 1], np.float32(expected))


def test_embeddings_that_cannot_be_are_errors(register):
    row = {"inputs": "a", "targets": "b"}
    for value in (None, "x", [], [1.0, "x"], [float("inf")]):
        with pytest.raises(DataError, match="'sentence_embedding' is no list of numbers"):
            examples(register([{**row, "sentence_embedding": value}], with_sentences=True))
    register([{**row, "sentence_embedding": [1.0] * n} for n in (2, 3)], with_sentences=True)
    with pytest.raises(ValueError, match="different widths"):
        stream.make_stream(
            mixture_or_task_name="examples",
            task_feature_lengths={"inputs": 8, "targets": 8},
            batch_size=1,
        )
