"""Users' own data: files, TFDS sets, modules of mixtures, and their errors."""

import gzip
import json
import sys

import pyarrow
import pytest
from pyarrow import parquet

from espalier.data import tasks
from espalier.data.tasks import in_seqio
from espalier.data.text import user_data
from espalier.data.text.documents import DataError
from espalier.data.tokenizers import vocabularies


@pytest.fixture(scope="module")
def byte():
    return vocabularies.byte()


@pytest.fixture
def register(byte, tmp_path):
    def call(**arguments):
        user_data.register_files(
            name="user_files", vocabulary=byte, cache_dir=tmp_path / "cache", **arguments
        )

    return call


def _texts(name, split="train", **arguments):
    seqio = in_seqio()

    task = seqio.TaskRegistry.get(name)
    dataset = task.get_dataset(sequence_length=None, split=split, shuffle=False, **arguments)
    return {
        r["document_id"].decode(): r["targets_pretokenized"].decode()
        for r in dataset.as_numpy_iterator()
    }


def test_files_of_all_kinds_in_one_task(tmp_path, register):
    (tmp_path / "a.jsonl").write_text('{"text": "one"}\n{"text": ""}\n{"text": "zwei ä"}\n')
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(b'{"text": "three"}\n'))
    (tmp_path / "c.txt").write_text("four\nlines\n")
    parquet.write_table(pyarrow.table({"text": ["five"]}), tmp_path / "d.parquet")
    register(
        files=[f"{tmp_path}/*.jsonl*", f"{tmp_path}/*.txt", f"{tmp_path}/*.parquet"],
        validation_fraction=0,
    )
    assert _texts("user_files") == {
        "a.jsonl:1": "one",
        "a.jsonl:3": "zwei ä",
        "b.jsonl.gz:1": "three",
        "c.txt": "four\nlines\n",
        "d.parquet:0": "five",
    }
    facts = tasks.summary()["tasks"]["user_files"]
    assert facts["documents"] == {"train": 5} and facts["origin"] == "register_files"


def test_shards_of_files_partition_them(tmp_path, register):
    seqio = in_seqio()

    for i in range(5):
        (tmp_path / f"{i}.jsonl").write_text(f'{{"text": "document {i}"}}\n')
    register(files=f"{tmp_path}/*.jsonl", validation_fraction=0)
    shards = [
        _texts("user_files", shard_info=seqio.ShardInfo(index=i, num_shards=2)) for i in range(2)
    ]
    assert [len(shard) for shard in shards] == [3, 2]
    assert shards[0] | shards[1] == _texts("user_files")


def test_validation_split_by_hash(tmp_path, register):
    lines = [json.dumps({"body": f"document {i}", "url": f"u{i}"}) for i in range(200)]
    (tmp_path / "x.jsonl").write_text("\n".join(lines))
    register(files=f"{tmp_path}/x.jsonl", validation_fraction=0.2, text_key="body", id_key="url")
    train, held_out = _texts("user_files"), _texts("user_files", "validation")
    assert len(train) + len(held_out) == 200 and not set(train) & set(held_out)
    assert 20 < len(held_out) < 60 and train["u0"] == "document 0"


def test_lm_batches_of_a_user_task(tmp_path, register):
    seqio = in_seqio()

    (tmp_path / "x.jsonl").write_text('{"text": "abc"}\n{"text": "de"}\n')
    register(files=f"{tmp_path}/x.jsonl", validation_fraction=0)
    dataset = seqio.get_dataset(
        "user_files",
        task_feature_lengths={"targets": 8},
        feature_converter=seqio.LMFeatureConverter(pack=True),
        dataset_split="train",
        shuffle=False,
    )
    batch = next(dataset.as_numpy_iterator())
    assert batch["decoder_target_tokens"].tolist() == [100, 101, 102, 1, 103, 104, 1, 0]


@pytest.mark.parametrize(
    "line, message",
    [
        (b'{"text": "a}\n', "x.jsonl, line 2: malformed JSON"),
        (b'{"content": "a"}\n', "x.jsonl, line 2: no key 'text'; present are 'content'"),
        (b'{"text": "\xff"}\n', "x.jsonl: not UTF-8 at byte offset 27"),
    ],
)
def test_bad_lines_are_one_clear_error_before_tensorflow_reads(tmp_path, register, line, message):
    (tmp_path / "x.jsonl").write_bytes(b'{"text": "good"}\n'[:-2] + b"}\n" + line)
    register(files=f"{tmp_path}/x.jsonl", validation_fraction=0)
    with pytest.raises(DataError, match=message):
        _texts("user_files")
    with pytest.raises(DataError, match=message):
        tasks.summary()


def test_missing_files_fail_when_registered(register):
    with pytest.raises(FileNotFoundError, match="user_files: files='gone/\\*' matches no file"):
        register(files="gone/*")


def test_another_function_does_not_replace_a_task(tmp_path, register, byte):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n')
    register(files=f"{tmp_path}/x.jsonl", validation_fraction=0)
    with pytest.raises(ValueError, match="the name 'user_files' is taken"):
        tasks.register_source(
            "user_files", None, origin="other", vocabulary=byte, add_bos=False, add_eos=True
        )


def test_sets_of_files_are_tasks_of_one_mixture(tmp_path, register):
    seqio = in_seqio()

    for name, texts in (("a", ["one", "two"]), ("b", ["three and more"])):
        rows = [json.dumps({"text": text}) + "\n" for text in texts]
        (tmp_path / f"{name}.jsonl").write_text("".join(rows))
    sets = {name: f"{tmp_path}/{name}.jsonl" for name in "ab"}

    def rates():
        mixture = seqio.MixtureRegistry.get("user_files")
        return {task.name: mixture.get_rate(task) for task in mixture.tasks}

    register(files=sets, validation_fraction=0)
    assert list(_texts("a").values()) == ["one", "two"]
    assert list(_texts("b").values()) == ["three and more"]
    assert rates() == {"a": 6.0, "b": 14.0}  # bytes
    register(files=sets, validation_fraction=0, shares={"a": 3, "b": 1})
    assert rates() == {"a": 3.0, "b": 1.0}
    register(files=sets, validation_files={"a": sets["b"], "b": sets["a"]})
    assert list(_texts("a", "validation").values()) == ["three and more"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"shares": {"a": 1}}, "shares are of a, and the sets of files are a, b"),
        ({"shares": {"a": 1, "b": 1, "c": 1}}, "shares are of a, b, c, and"),
        ({"shares": {"a": 0, "b": 0}}, "sum to 0"),
        ({"files": "x.jsonl", "shares": {"a": 1}}, "the sets of files are one without a name"),
        ({"validation_files": "x.jsonl"}, "must name the same sets"),
        ({"validation_files": {"a": "x.jsonl"}}, "must name the same sets"),
        ({"files": "x.jsonl", "validation_files": {"a": "x.jsonl"}}, "must name the same sets"),
        ({"files": {}}, "must name the same sets"),
    ],
)
def test_sets_and_what_is_said_of_them_must_agree(
    tmp_path, register, monkeypatch, arguments, message
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.jsonl").write_text('{"text": "one"}\n')
    with pytest.raises(ValueError, match=message):
        register(**{"files": {"a": "x.jsonl", "b": "x.jsonl"}, **arguments})


@pytest.fixture(scope="module")
def local_set(tmp_path_factory):
    """A TFDS set of three texts in two splits, prepared on disk."""
    import tensorflow_datasets as tfds

    where = tmp_path_factory.mktemp("tfds")
    folder = where / "tiny_texts" / "1.2.0"
    folder.mkdir(parents=True)
    identity = tfds.core.DatasetIdentity(
        name="tiny_texts", version=tfds.core.Version("1.2.0"), data_dir=str(folder), module_name=""
    )
    features = {"text": tfds.features.Text(), "title": tfds.features.Text()}
    info = tfds.core.DatasetInfo(builder=identity, features=tfds.features.FeaturesDict(features))
    writer = tfds.core.SequentialWriter(info, max_examples_per_shard=10)
    writer.initialize_splits(["train", "validation"])
    writer.add_examples(
        {
            "train": [{"text": "first text", "title": "t"}, {"text": "second ü", "title": "t"}],
            "validation": [{"text": "held out", "title": "t"}],
        }
    )
    writer.close_all()
    return str(where)


def test_a_prepared_tfds_set(local_set, byte, tmp_path):
    user_data.register_tfds(
        name="user_tfds",
        tfds_name="tiny_texts:1.2.0",
        vocabulary=byte,
        data_dir=local_set,
        cache_dir=tmp_path,
    )
    train = _texts("user_tfds")
    assert sorted(train.values()) == ["first text", "second ü"]
    assert all("tiny_texts-train.tfrecord" in id for id in train)
    assert list(_texts("user_tfds", "validation").values()) == ["held out"]
    facts = tasks.summary()["tasks"]["user_tfds"]
    assert facts["documents"] == {"train": 2, "validation": 1}


def test_tfds_slices_and_other_features(local_set, byte, tmp_path):
    arguments = {"tfds_name": "tiny_texts", "data_dir": local_set, "cache_dir": tmp_path}
    user_data.register_tfds(
        name="user_slices",
        vocabulary=byte,
        text_key="title",
        splits={"train": "train[:1]", "validation": "train[1:]"},
        **arguments,
    )
    assert list(_texts("user_slices").values()) == ["t"]
    assert list(_texts("user_slices", "validation").values()) == ["t"]
    whole = user_data.tfds_texts(**arguments)
    assert whole.digest != tasks.sources()["user_slices"].digest
    assert whole.digest == user_data.tfds_texts(**arguments).digest


def test_vocabulary_from_a_tfds_set(local_set, tmp_path):
    texts = user_data.tfds_texts(tfds_name="tiny_texts", data_dir=local_set, cache_dir=tmp_path)
    assert texts.size(texts.sources[0]) > 0
    assert sorted(d.text for d in texts.documents(texts.sources[0], "train")) == [
        "first text",
        "second ü",
    ]


def test_vocabulary_from_slices_of_a_tfds_set(local_set, tmp_path):
    arguments = {"tfds_name": "tiny_texts", "data_dir": local_set, "cache_dir": tmp_path}
    splits = {"train": "train[50%:]", "validation": "train[:50%]"}
    texts = user_data.tfds_texts(splits=splits, **arguments)
    assert list(vocabularies._lines(texts, 1000, 0.7)) in (["first text"], ["second ü"])
    texts = user_data.tfds_texts(splits={"validation": "validation"}, **arguments)
    with pytest.raises(
        ValueError, match="'tiny_texts': no split 'train'; present are 'validation'. Set"
    ):
        list(vocabularies._lines(texts, 1000, 0.7))


def test_mocked_tfds(byte, tmp_path):
    import tensorflow_datasets as tfds

    with tfds.testing.mock_data(num_examples=3):
        user_data.register_tfds(
            name="user_mock",
            tfds_name="imdb_reviews",
            vocabulary=byte,
            splits={"train": "train", "validation": "test"},
            data_dir=str(tmp_path / "none"),
            cache_dir=tmp_path,
        )
        records = _texts("user_mock")
        assert len(records) == 3 and all(records.values())
        assert len(tasks.sources()["user_mock"].digest) == 64


def test_tfds_errors(local_set, byte, tmp_path):
    def register(tfds_name, **arguments):
        arguments = {"data_dir": local_set, "cache_dir": tmp_path, **arguments}
        user_data.register_tfds(name="user_bad", tfds_name=tfds_name, vocabulary=byte, **arguments)

    with pytest.raises(ValueError, match="TFDS has no set 'tiny_text'.*set data_dir"):
        register("tiny_text")
    with pytest.raises(ValueError, match="no feature 'body'; present are 'text', 'title'"):
        register("tiny_texts", text_key="body")
    with pytest.raises(ValueError, match="no split 'test'; present are 'train', 'validation'"):
        register("tiny_texts", splits={"train": "test[:1]"})
    register("imdb_reviews", data_dir=str(tmp_path / "none"))
    with pytest.raises(FileNotFoundError, match="'imdb_reviews.*' is not prepared in .*tfds build"):
        _texts("user_bad")


def test_a_module_of_mixtures(tmp_path, monkeypatch, byte):
    (tmp_path / "my_mixtures_module.py").write_text(
        """
import functools
import seqio
import tensorflow as tf

def dataset(split, shuffle_files):
    return tf.data.Dataset.from_tensor_slices({"targets": ["a", "b"]})

seqio.TaskRegistry.add(
    "module_task",
    source=seqio.FunctionDataSource(dataset, splits=["train"]),
    preprocessors=[seqio.preprocessors.tokenize],
    output_features={"targets": seqio.Feature(seqio.ByteVocabulary())},
)
seqio.MixtureRegistry.add("module_mixture", ["module_task"], default_rate=1.0)
"""
    )
    (tmp_path / "my_broken_module.py").write_text("import a_package_that_is_not_there\n")
    monkeypatch.syspath_prepend(tmp_path)
    names = user_data.import_mixtures(module="my_mixtures_module")
    assert names == ("module_mixture", "module_task")
    assert user_data.import_mixtures(module="my_mixtures_module") == ()
    with pytest.raises(ValueError, match="the module 'my_mixtures' of mixtures does not exist"):
        user_data.import_mixtures(module="my_mixtures")
    with pytest.raises(ValueError, match="'my_mixtures_module.tasks'"):
        user_data.import_mixtures(module="my_mixtures_module.tasks")
    with pytest.raises(ModuleNotFoundError, match="a_package_that_is_not_there"):
        user_data.import_mixtures(module="my_broken_module")
    sys.modules.pop("my_mixtures_module")


def test_sources_are_registered_as_far_as_they_are_named(tmp_path, byte):
    for name in ("prose", "code"):
        (tmp_path / f"{name}.jsonl").write_text('{"text": "one"}\n{"text": "two"}\n')

    def source(pattern):
        def call(name):
            user_data.register_files(
                name=name,
                files=pattern,
                data_root=str(tmp_path),
                vocabulary=byte,
                validation_fraction=0,
                cache_dir=tmp_path / "cache",
            )

        return call

    sources = {"prose": source("prose.*"), "code": source("code.*"), "absent": source("absent.*")}
    user_data.register_sources(name="two", sources=sources, shares={"prose": 1.0, "code": 0.0})
    facts = tasks.summary()
    assert set(facts["tasks"]) == {"prose", "code"}
    assert facts["mixtures"] == {"two": {"prose": 1.0, "code": 0.0}}
    for shares, message in (
        ({"prose": 0.5, "code": 0.4}, r"sum to 0.9, not to 1: prose 0.5, code 0.4"),
        ({"prose": 1.5, "code": -0.5}, r"the weight of 'code' is -0.5"),
        ({"proze": 1.0}, r"the shares of 'two': unknown source 'proze'.*'prose'"),
        ({"absent": 1.0}, r"absent: files='absent.\*' matches no file .*starts at data_root"),
    ):
        with pytest.raises((ValueError, FileNotFoundError), match=message):
            user_data.register_sources(name="two", sources=sources, shares=shares)
    tasks.clear()
