"""Examples of rows and templates against ids written by hand; ranking against brute force."""

import json

import numpy as np
import pytest

from espalier.data.instructions import ranking
from espalier.data.instructions.sources import Encoding, InstructionFiles, Tokeniser
from espalier.data.instructions.templates import Template
from espalier.data.pieces import Piece
from espalier.data.text.documents import DataError


class Bytes:
    """A vocabulary of bytes without TensorFlow."""

    vocab_size, bos_id, eos_id = 300, 299, 1

    def encode(self, text):
        return [byte + 3 for byte in text.encode()]


def ids(text):
    return [byte + 3 for byte in text.encode()]


ROWS = [{"text": f"t{n}", "label": n % 2} for n in range(20)] + [{"text": "skipped", "label": -1}]
JINJA = "{% if label >= 0 %}{{text}}? ||| {{answer_choices[label]}}{% endif %}"


@pytest.fixture
def open_source(tmp_path):
    def call(form, *, rows=ROWS, ranked=False, fraction=0.0, jinja=JINJA, add_bos=False):
        path = tmp_path / "train.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        template = Template("templates.yaml", "ask", jinja, "no ||| yes", True, {})
        encoding = Encoding(template, Tokeniser(Bytes(), form, "\n", add_bos, True), ranked)
        files = {"train": [str(path)]} | ({"validation": [str(path)]} if fraction else {})
        return InstructionFiles.of(
            "asked",
            files,
            validation_fraction=fraction,
            cache_dir=tmp_path / "cache",
            encoding=encoding,
        )

    return call


def read(source, split="train"):
    return [
        each for path in source.files[split] for each in source.read_examples(Piece(path), split)
    ]


def test_an_encoder_decoder_reads_inputs_and_targets(open_source):
    source = open_source("encoder_decoder")
    examples = read(source)
    assert len(examples) == 20 and source.num_input_examples("train") == 20
    assert source.dropped == {"not_rendered": {"rows": 1, "first": "train.jsonl:21"}}
    assert examples[1]["inputs"].tolist() == [*ids("t1?"), 1]
    assert examples[1]["targets"].tolist() == [*ids("yes"), 1]
    assert source.tokens("train") == 10 * 4 + 10 * 3


def test_a_decoder_has_a_loss_on_the_answer_alone(open_source):
    example = read(open_source("decoder", add_bos=True))[0]
    assert example["targets"].tolist() == [299, *ids("t0?\n"), *ids("no"), 1]
    assert example["loss_weights"].tolist() == [0.0] * 5 + [1.0] * 3


def test_held_out_rows_are_the_same_for_all_templates(open_source):
    first = open_source("encoder_decoder", fraction=0.3)
    second = open_source(
        "encoder_decoder",
        fraction=0.3,
        jinja="Is {{text}} ||| {{answer_choices[label]}}",
        rows=ROWS[:-1],
    )
    assert first.digest != second.digest
    names = [[each["document_id"] for each in read(x, "validation")] for x in (first, second)]
    assert names[0] == names[1] and 0 < len(names[0]) < 20
    assert len(read(first)) == 20 - len(names[0])


def test_each_answer_choice_is_an_example_for_ranking(open_source):
    examples = read(open_source("decoder", ranked=True))
    assert len(examples) == 40
    assert [each["targets"].tolist() for each in examples[:2]] == [
        [*ids("no"), 1],
        [*ids("yes"), 1],
    ]
    assert [int(each["is_right"][0]) for each in examples[:4]] == [1, 0, 0, 1]
    assert {tuple(each["inputs"]) for each in examples[:2]} == {tuple(ids("t0?\n"))}


def test_no_example_is_an_error(open_source):
    with pytest.raises(
        DataError, match="the train split has no example .1 not_rendered .first: tr"
    ):
        open_source("decoder", rows=ROWS[-1:]).num_input_examples("train")


def test_accuracies_are_those_of_brute_force():
    rng = np.random.default_rng(0)
    options, scores, right = [], [], {metric: [] for metric in ranking.METRICS}
    for row in range(50):
        size = rng.integers(2, 5)
        tokens, logps = rng.integers(1, 9, size), -rng.exponential(size=size) * 9
        answer = rng.integers(size)
        for n in range(size):
            options.append(ranking.Option(f"row {row}", n == answer, int(tokens[n])))
            scores.append(float(logps[n]))
        right["accuracy"].append(np.argmax(logps) == answer)
        right["accuracy_per_token"].append(np.argmax(logps / tokens) == answer)
    expected = {metric: np.mean(values) for metric, values in right.items()}
    assert ranking.accuracies(options, scores) == pytest.approx(expected)
    assert len(set(expected.values())) == 2


def test_a_task_is_the_mean_over_sets_of_medians_over_templates():
    values = {"r1": [0.1, 0.9, 0.2], "r2": [0.5, 0.7]}
    sets = {
        name: {str(n): {"accuracy": x, "accuracy_per_token": 1 - x} for n, x in enumerate(each)}
        for name, each in values.items()
    }
    expected = {"accuracy": (0.2 + 0.6) / 2, "accuracy_per_token": (0.8 + 0.4) / 2}
    assert ranking.summary(sets) == pytest.approx(expected)
