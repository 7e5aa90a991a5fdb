"""Every kind of data that gin alone can name: two steps of a tiny model, from flags to a checkpoint."""

import json
import random
import sys

import pyarrow
import pytest
from pyarrow import parquet

from espalier.trainers.telemetry.metric_writers import read_jsonl

VOCAB_SIZE = 384  # the rows of the tiny model's table


def documents(count=60):
    """Texts of made-up words: the same everywhere, with pairs of letters worth a piece."""
    rng = random.Random(0)
    words = ["".join(rng.choices("etaoinshrdlu", k=rng.randint(2, 7))) for _ in range(200)]
    return [f"{i}: {' '.join(rng.choices(words, k=rng.randint(20, 80)))}\n" for i in range(count)]


TEXTS = documents()


@pytest.fixture
def run(train, tmp_path):
    """Trains on a data file and flags; returns what run.json says and the metrics by name."""

    def call(data, task, *bindings):
        path = tmp_path / "run"
        result = train(
            *(f"--gin_file=t5x_configs/{name}.gin" for name in ("models/tiny", f"data/{data}")),
            "--gin_file=t5x_configs/runs/pretrain.gin",
            *(
                f"--gin.{binding}"
                for binding in (
                    f"MODEL_DIR={str(path)!r}",
                    f"MIXTURE_OR_TASK_NAME={task!r}",
                    "TASK_FEATURE_LENGTHS={'targets': 64}",
                    "BATCH_SIZE=8",
                    "TRAIN_STEPS=2",
                    "WARMUP_STEPS=1",
                    "EVAL_STEPS=1",
                    "LOG_PERIOD=1",
                    "config.TransformerConfig.num_layers=1",
                    "config.TransformerConfig.scan_layers=False",
                    *bindings,
                )
            ),
        )
        assert result.status == 0, result.err
        assert (path / "checkpoints" / "2").is_dir()
        rows = read_jsonl(f"{path}/metrics.jsonl")
        assert [row["step"] for row in rows if "loss" in row] == [1, 2]
        metrics = {name: value for row in rows for name, value in row.items()}
        # A model that knows nothing of its 384 rows.
        assert metrics["loss"] == pytest.approx(5.95, abs=0.15)
        return json.loads((path / "run.json").read_text()), metrics

    return call


@pytest.fixture(scope="module")
def tfds_folder(tmp_path_factory):
    """A TFDS set of one split, prepared on disk."""
    import tensorflow_datasets as tfds

    where = tmp_path_factory.mktemp("tfds")
    folder = where / "made_up" / "1.0.0"
    folder.mkdir(parents=True)
    identity = tfds.core.DatasetIdentity(
        name="made_up", version=tfds.core.Version("1.0.0"), data_dir=str(folder), module_name=""
    )
    features = tfds.features.FeaturesDict({"body": tfds.features.Text()})
    info = tfds.core.DatasetInfo(builder=identity, features=features)
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=40)
    writer.initialize_splits(["train"])
    writer.add_examples({"train": [{"body": text} for text in TEXTS]})
    writer.close_all()
    return str(where)


def test_slices_of_a_tfds_set_with_a_vocabulary_of_its_own(run, tfds_folder):
    facts, metrics = run(
        "tfds",
        "tfds",
        "TFDS_NAME='made_up:1.0.0'",
        f"TFDS_DATA_DIR={tfds_folder!r}",
        "TFDS_SPLITS={'train': 'train[20%:]', 'validation': 'train[:20%]'}",
        "TEXT_KEY='body'",
        f"VOCAB_SIZE={VOCAB_SIZE}",
    )
    assert facts["tasks"]["tfds"]["documents"] == {"train": 48, "validation": 12}
    assert facts["data"]["vocabulary"]["size"] == VOCAB_SIZE
    assert metrics["eval/tfds/loss"] == pytest.approx(5.95, abs=0.15)


def test_a_glob_of_parquet_files_with_a_vocabulary_of_its_own(run, tmp_path):
    for part in range(3):
        table = pyarrow.table({"body": TEXTS[part::3]})
        parquet.write_table(table, tmp_path / f"part_{part}.parquet")
    facts, metrics = run(
        "files",
        "files",
        f"FILES='{tmp_path}/part_*.parquet'",
        "VALIDATION_FRACTION=0.2",
        "TEXT_KEY='body'",
        f"VOCAB_SIZE={VOCAB_SIZE}",
    )
    counts = facts["tasks"]["files"]["documents"]
    assert sum(counts.values()) == len(TEXTS) and 5 < counts["validation"] < 20
    assert facts["data"]["vocabulary"]["size"] == VOCAB_SIZE
    assert metrics["eval/files/loss"] == pytest.approx(5.95, abs=0.15)


def test_globs_of_text_files_to_train_on_and_to_hold_out(run, tmp_path):
    for part in range(4):
        name = "held_out" if part == 3 else f"train_{part}"
        (tmp_path / f"{name}.txt").write_text("\n".join(TEXTS[part::4]))
    facts, metrics = run(
        "files",
        "files",
        f"FILES='{tmp_path}/train_*.txt'",
        f"VALIDATION_FILES='{tmp_path}/held_*.txt'",
        f"VOCAB_SIZE={VOCAB_SIZE}",
    )
    assert facts["tasks"]["files"]["documents"] == {"train": 3, "validation": 1}
    assert facts["data"]["vocabulary"]["size"] == VOCAB_SIZE
    assert metrics["eval/files/loss"] == pytest.approx(5.95, abs=0.15)


MODULE = '''
"""Two tasks over texts held in memory, and their mixture three to one."""

import functools

import seqio
import tensorflow as tf

TEXTS = {texts!r}


def read(split, shuffle_files, *, part):
    texts = TEXTS[part::2]
    texts = texts[5:] if split == "train" else texts[:5]
    return tf.data.Dataset.from_tensor_slices({{"targets": texts}})


for part, name in enumerate(("my_even", "my_odd")):
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(
            functools.partial(read, part=part), splits=("train", "validation")
        ),
        preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
        output_features={{"targets": seqio.Feature(seqio.ByteVocabulary())}},
    )
seqio.MixtureRegistry.add("my_mixture", [("my_even", 3.0), ("my_odd", 1.0)])
'''


def test_a_mixture_that_a_module_registers(run, tmp_path, monkeypatch):
    (tmp_path / "my_data_configs_module.py").write_text(MODULE.format(texts=TEXTS))
    monkeypatch.syspath_prepend(tmp_path)
    try:
        facts, metrics = run("mixtures", "my_mixture", "MIXTURES_MODULE=my_data_configs_module")
    finally:
        sys.modules.pop("my_data_configs_module", None)
    assert set(facts["data"]["sources"]) == {"my_even", "my_odd"}
    for task in ("my_even", "my_odd"):
        assert metrics[f"source_loss/{task}"] == pytest.approx(5.95, abs=0.2)
        assert metrics[f"eval/{task}/loss"] == pytest.approx(5.95, abs=0.2)


def test_the_corpus_of_one_source_with_a_vocabulary_of_its_own(run):
    facts, metrics = run(
        "corpus",
        "docstrings",
        "SOURCES=['docstrings']",
        "BYTES_PER_SOURCE=60000",
        f"VOCAB_SIZE={VOCAB_SIZE}",
    )
    (corpus,) = facts["corpora"].values()
    assert corpus["settings"]["sources"] == ["docstrings"]
    size = sum(corpus["sources"]["docstrings"]["bytes"].values())
    assert 0 < size < 60_000 + corpus["settings"]["max_document_bytes"]  # the last one comes whole
    assert facts["data"]["vocabulary"]["size"] == VOCAB_SIZE
    assert metrics["eval/docstrings/loss"] == pytest.approx(5.95, abs=0.2)
