"""Caches of SeqIO tasks and the gin-bindable streams over them."""

import collections
import dataclasses
import functools
import importlib
import json
import os
import pathlib

import numpy as np
import pytest
import seqio
import tensorflow as tf

from espalier.data import pieces, seqio_tasks, tasks
from espalier.data.cache import build, description, fingerprint, pool, store, task_cache
from espalier.data.cache.cache_files import CacheCorruptError
from espalier.data.stream import mixing, rows, stream
from espalier.data.task import Feature, Task
from espalier.data.text import document_files, user_data
from espalier.data.text.document_filters import DocumentFilter
from espalier.data.tokenizers.vocabulary import ByteVocabulary

TEXTS = {
    "english": [f"English text number {i}. " + "word " * (i % 30) for i in range(100)],
    "python": [f"def f{i}(x):\n    return x + {i}\n" * (1 + i % 4) for i in range(100)],
}


def read(split, shuffle_files, seed=None, *, name):
    del shuffle_files, seed
    texts = TEXTS[name][:90] if split == "train" else TEXTS[name][90:]
    ids = [f"{name}/{split}/{i}" for i in range(len(texts))]
    return tf.data.Dataset.from_tensor_slices({"targets": texts, "document_id": ids})


def shift(dataset, by=0):
    return dataset.map(lambda x: {**x, "targets": x["targets"] + by})


class Shifter:
    """A preprocessor whose behaviour no description of functions can see."""

    def __call__(self, dataset):
        return shift(dataset, by=int(os.environ.get("SHIFT_BY", 0)))


def add_task(name, source="english", *, extra=(), vocabulary=None, add_eos=True, reader=read):
    if name in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove(name)
    seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(
            functools.partial(reader, name=source), splits=("train", "validation")
        ),
        preprocessors=[seqio.preprocessors.tokenize, *extra, seqio.preprocessors.append_eos],
        output_features={
            "targets": seqio.Feature(vocabulary or seqio.ByteVocabulary(), add_eos=add_eos)
        },
    )
    return seqio.TaskRegistry.get(name)


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """One cache directory with the tasks of a mixture in it."""
    add_task("english", "english")
    add_task("python", "python")
    if "both" not in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.add("both", [("english", 3.0), ("python", 1.0)])
    return tmp_path_factory.mktemp("caches")


def test_holds_what_seqio_yields(root):
    task = seqio.TaskRegistry.get("english")
    made = task_cache.open_task_cache(task, "train", cache_dir=root)
    expected = list(
        task.get_dataset(None, "train", shuffle=False, try_in_mem_cache=False).as_numpy_iterator()
    )
    assert made.num_records == len(expected) == 90
    for i, record in enumerate(expected):
        np.testing.assert_array_equal(made.columns["targets"].values(i), record["targets"])
        assert made.columns["document_id"].text(i) == f"english/train/{i}"
    assert made.text_bytes() == sum(len(text) for text in TEXTS["english"][:90])
    # Bytes and one EOS per document.
    assert made.tokens() == made.text_bytes() + 90


class Divisible(seqio.FunctionDataSource):
    """A source that can be read in any number of parts."""

    supports_arbitrary_sharding = True

    def get_dataset(self, split, shuffle=True, seed=None, shard_info=None, **_):
        dataset = super().get_dataset(split, shuffle, seed)
        if shard_info is None:
            return dataset
        return dataset.shard(shard_info.num_shards, shard_info.index)


def test_is_reused_and_shards_do_not_mix_up_records(root, tmp_path, monkeypatch):
    task = seqio.TaskRegistry.get("python")
    task_cache.open_task_cache(task, "train", cache_dir=root)
    monkeypatch.setattr(build, "Build", None)  # would fail
    again = task_cache.open_task_cache(task, "train", cache_dir=root)
    monkeypatch.undo()
    monkeypatch.setattr(seqio_tasks, "_RECORDS_PER_PART", 25)
    divisible = add_task("divisible", "python")
    divisible._source = Divisible(
        functools.partial(read, name="python"),
        splits=("train", "validation"),
        num_input_examples={"train": 90, "validation": 10},
    )
    sharded = task_cache.open_task_cache(divisible, "train", cache_dir=tmp_path)
    assert len(sharded.manifest["shards"]) == 4
    order = [i for shard in range(4) for i in range(shard, 90, 4)]
    for at, i in enumerate(order):
        np.testing.assert_array_equal(
            sharded.columns["targets"].values(at), again.columns["targets"].values(i)
        )
    # A cache with the most shards of earlier versions stays, although there would be more now.
    monkeypatch.setattr(task_cache, "_FORMER_SHARDS", 4)
    monkeypatch.setattr(seqio_tasks, "_RECORDS_PER_PART", 9)
    former = task_cache.open_task_cache(divisible, "train", cache_dir=tmp_path)
    assert former.directory == sharded.directory
    new = task_cache.open_task_cache(divisible, "train", cache_dir=tmp_path / "other")
    assert len(new.manifest["shards"]) == 10


def test_a_cache_that_is_there_is_only_read(root, monkeypatch):
    """As by somebody who may not write to a cache that is shared."""
    task = seqio.TaskRegistry.get("english")
    made = task_cache.open_task_cache(task, "validation", cache_dir=root)
    before = sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*"))

    def refused(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr(store, "building_lock", refused)
    monkeypatch.setattr(pathlib.Path, "mkdir", refused)
    again = task_cache.open_task_cache(task, "validation", cache_dir=root)
    assert again.content == made.content
    assert sorted((path, path.stat().st_mtime_ns) for path in root.rglob("*")) == before


def test_numbers_as_ids_and_texts_that_are_none(tmp_path):
    """Of data that was tokenised elsewhere."""

    def number(dataset):
        keep = dataset.enumerate()
        return keep.map(lambda i, x: {**x, "document_id": i, "targets_pretokenized": x["targets"]})

    task = add_task("numbered", extra=(number,))
    made = task_cache.open_task_cache(task, "train", cache_dir=tmp_path)
    assert [made.columns["document_id"].text(i) for i in (0, 89)] == ["0", "89"]
    assert made.text_bytes() is None
    held_out = stream.make_eval_stream(
        task="numbered", task_feature_lengths={"targets": 64}, batch_size=4, cache_dir=tmp_path
    )
    assert held_out.bytes_per_token == 0


@pytest.mark.parametrize(("bytes_per_shard", "shards"), [(400, 2), (1_000_000, 1)])
def test_files_are_read_once_however_many_documents_they_hold(
    tmp_path, monkeypatch, bytes_per_shard, shards
):
    reads = collections.Counter()
    read_piece = document_files.DocumentFiles.read_piece

    def counted(self, piece, split):
        for document in read_piece(self, piece, split):
            reads[os.path.basename(piece.path)] += 1
            yield document

    monkeypatch.setattr(document_files.DocumentFiles, "read_piece", counted)
    monkeypatch.setattr(pieces, "_SHARD_BYTES", (bytes_per_shard, bytes_per_shard))
    monkeypatch.setattr(description, "PROBE_RECORDS", 0)
    for name in "ab":
        lines = [json.dumps({"text": f"{name} {i}"}) for i in range(40)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    user_data.register_files(
        name="once",
        files=str(tmp_path / "*.jsonl"),
        vocabulary=seqio.ByteVocabulary(),
        validation_fraction=0.0,
        cache_dir=tmp_path / "caches",
    )
    task = tasks.find("once")
    with pool.limited(1):  # to count the reads
        made = task_cache.open_task_cache(task, "train", cache_dir=tmp_path / "caches")
    assert len(made.manifest["shards"]) == shards and made.num_records == 80
    assert reads == {"a.jsonl": 40, "b.jsonl": 40}


def changed_reader(split, shuffle_files, seed=None, *, name):
    return read(split, shuffle_files, seed, name=name).skip(0)


CHANGES = {
    "source": {"reader": changed_reader},
    "vocabulary": {"vocabulary": seqio.ByteVocabulary(extra_ids=5)},
    "vocabulary (EOS)": {"add_eos": False},
    "preprocessors": {"extra": (functools.partial(shift, by=1),)},
    "output of the preprocessors": {"extra": (Shifter(),)},
}


@pytest.mark.parametrize("changed", CHANGES)
def test_refuses_what_was_built_from_something_else(changed, tmp_path, monkeypatch, capsys):
    """Every input, among them one that only the output shows."""
    probe_only = changed.startswith("output")
    task = add_task("task", extra=(Shifter(),) if probe_only else ())
    before = task_cache.open_task_cache(task, "validation", cache_dir=tmp_path)
    task = add_task("task", **CHANGES[changed])
    if probe_only:
        monkeypatch.setenv("SHIFT_BY", "1")
    with pytest.raises(store.CacheMismatchError) as error:
        task_cache.open_task_cache(task, "validation", cache_dir=tmp_path)
    assert changed.partition(" (")[0] in str(error.value)
    assert str(before.directory) in str(error.value)
    assert "espalier prepare cache" in str(error.value)
    after = task_cache.open_task_cache(task, "validation", cache_dir=tmp_path, changed="build")
    assert after.fingerprint != before.fingerprint
    said = capsys.readouterr().err
    assert changed.partition(" (")[0] in said and "built beside" in said
    # Both are there now, and the one asked for is found.
    assert store.open_cache(before.directory).content == before.content
    assert (
        task_cache.open_task_cache(task, "validation", cache_dir=tmp_path).content == after.content
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Long(DocumentFilter):
    def __call__(self, document):
        return len(document["text"]) > 3


class Characters(ByteVocabulary):
    def encode_batch(self, texts):
        return [np.array([3 + len(text)], np.int32) for text in texts]


@pytest.mark.parametrize(
    ("cls", "name", "value"),
    [
        (Long, "__call__", lambda self, document: len(document["text"]) > 5),
        (Characters, "encode_batch", lambda self, texts: [np.array([3], np.int32)] * len(texts)),
    ],
)
def test_code_of_filters_and_vocabularies_is_noticed(cls, name, value, tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "abcd"}\n{"text": "hello world"}\n')
    source = document_files.find(
        name="coded",
        files=str(tmp_path / "a.jsonl"),
        validation_fraction=0.0,
        filters=(Long(),),
        cache_dir=tmp_path,
    )
    task = Task("coded", source, {"targets": Feature(Characters())}, tokenises=True)

    def made():
        with pool.limited(1):
            return task_cache.open_task_cache(task, "train", cache_dir=tmp_path)

    first = made()
    assert made().fingerprint == first.fingerprint
    monkeypatch.setattr(cls, name, value)
    with pytest.raises(store.CacheMismatchError, match="the first records differ"):
        made()


def test_replacing_deletes_what_is_changed_or_damaged(tmp_path):
    old = task_cache.open_task_cache(add_task("task"), "train", cache_dir=tmp_path)
    task = add_task("task", add_eos=False)
    new = task_cache.open_task_cache(task, "train", cache_dir=tmp_path, changed="replace")
    assert not old.directory.exists()
    file = new.directory / "00000.targets.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(CacheCorruptError, match="00000.targets.bin.*--replace"):
        task_cache.open_task_cache(task, "train", cache_dir=tmp_path)
    again = task_cache.open_task_cache(task, "train", cache_dir=tmp_path, changed="replace")
    assert again.content == new.content
    with pytest.raises(ValueError, match="changed is 'always'"):
        task_cache.open_task_cache(task, "train", cache_dir=tmp_path, changed="always")


def test_files_declared_digests_and_versions_are_part_of_the_fingerprint(tmp_path):
    file = tmp_path / "text.txt"
    seen = set()
    for content, version in (("one\ntwo\n", None), ("one\nten\n", None), ("one\ntwo\n", 2)):
        file.write_text(content)
        if "lines" in seqio.TaskRegistry.names():
            seqio.TaskRegistry.remove("lines")
        task = seqio.TaskRegistry.add(
            "lines",
            source=seqio.TextLineDataSource({"train": str(file)}),
            preprocessors=[
                lambda dataset: dataset.map(lambda line: {"targets": line}),
                seqio.preprocessors.tokenize,
            ],
            output_features={"targets": seqio.Feature(seqio.ByteVocabulary(), add_eos=False)},
        )
        task.version = version
        files = fingerprint.FileDigests(tmp_path / "memory.json")
        described = description.describe(seqio_tasks.SeqioTask(task), "train", files)
        described["probe"] = ""  # the probe sees it too; here the files must
        seen.add(json.dumps(described, sort_keys=True))
    assert len(seen) == 3

    task = add_task("declared")
    digests = []
    for declared in ("v1", lambda split: f"v1 of {split}"):
        task.source.digest = declared
        digests.append(
            description.describe(seqio_tasks.SeqioTask(task), "train", None)["source"]["digest"]
        )
    assert digests == ["v1", "v1 of train"]


def test_a_module_that_has_moved_is_described_by_its_former_name(tmp_path, monkeypatch):
    code = "def read(split):\n    return [split, __name__]\n"
    (tmp_path / "before_a_move.py").write_text(code)
    (tmp_path / "after_a_move.py").write_text(code + "\n\nCACHED_AS = 'before_a_move'\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    modules = [importlib.import_module(name) for name in ("before_a_move", "after_a_move")]
    before, after = (fingerprint.describe(module.read) for module in modules)
    assert before["function"] == "before_a_move.read" and before == after


def test_stream_of_a_mixture_by_rates_tokens_and_phases(root):
    lengths = {"targets": 128}
    common = {"task_feature_lengths": lengths, "batch_size": 8, "cache_dir": root}
    made = stream.make_stream(mixture_or_task_name="both", **common)
    assert made.source_names == ("english", "python")
    tokens = np.zeros(2)
    for step in range(100):
        batch = made.batch(step, 0, 8)
        np.add.at(tokens, batch["source_ids"], batch["decoder_loss_weights"].sum(axis=1))
    np.testing.assert_allclose(tokens / tokens.sum(), [0.75, 0.25], atol=0.005)

    def shares(**settings):
        made = stream.make_stream(mixture_or_task_name="both", **common, **settings)
        return made.summary()["phases"][0]["token_shares"]

    counts = {name: made.summary()["sources"][name]["tokens"] for name in made.source_names}
    total = sum(counts.values())
    assert shares(weights="tokens") == {name: n / total for name, n in counts.items()}
    roots = {name: n**0.5 for name, n in counts.items()}
    tempered = shares(weights="tokens", temperature=2.0)
    np.testing.assert_allclose(tempered["python"], roots["python"] / sum(roots.values()))
    assert shares(weights="tokens", max_tokens=10) == {"english": 0.5, "python": 0.5}
    assert shares(weights="unimax") == {"english": 0.5, "python": 0.5}
    small = min(counts, key=counts.get)
    capped = shares(weights="unimax", unimax_epochs=1.0, unimax_tokens=total - 10)
    assert capped[small] == pytest.approx(counts[small] / (total - 10))
    tasks.register_mixture("python_alone", {"python": 1.0, "english": 0.0})
    for weights in ("rates", "tokens", "unimax"):
        alone = stream.make_stream(mixture_or_task_name="python_alone", weights=weights, **common)
        assert alone.source_names == ("python",)
    for settings in ({"weights": "unimax", "temperature": 2.0}, {"unimax_epochs": 1.0}):
        with pytest.raises(ValueError, match="unimax"):
            shares(**settings)
    phased = stream.make_stream(
        mixture_or_task_name="both",
        phases=((0, {"python": 1.0}), (4, {"python": 0.5, "english": 0.5})),
        **common,
    )
    assert set(phased.batch(0, 0, 8)["source_ids"].tolist()) == {1}
    assert set(phased.batch(4, 0, 8)["source_ids"].tolist()) == {0, 1}
    alone = stream.make_stream(mixture_or_task_name="python", **common)
    assert alone.documents(0, 0, 1)[0]["documents"][0]["id"].startswith("python/train/")


def test_evaluation_stream_of_a_task(root):
    made = stream.make_eval_stream(
        task="english", task_feature_lengths={"targets": 64}, batch_size=4, cache_dir=root
    )
    texts = TEXTS["english"][90:]
    weight = sum(
        made.batch(step, 0, 4)["decoder_loss_weights"].sum() for step in range(made.num_steps)
    )
    assert weight == sum(len(text) + 1 for text in texts)
    assert made.bytes_per_token == sum(map(len, texts)) / weight


def test_tasks_that_hold_nothing_out_are_left_out_of_the_evaluation(root, capsys):
    task = add_task("all_train")
    task.source._splits = ("train",)
    assert task.splits == ("train",)
    settings = {"task_feature_lengths": {"targets": 64}, "batch_size": 4, "cache_dir": root}
    with pytest.raises(stream.NoSplitError, match="VALIDATION_FRACTION"):
        stream.make_eval_stream(task="all_train", **settings)
    opener = functools.partial(stream.make_eval_stream, **settings)
    (opened,) = stream.held_out(opener, ["all_train", "english"])
    assert opened.name == "english"
    lines = capsys.readouterr().err.splitlines()
    (line,) = [line for line in lines if line.startswith("Not evaluated: ")]
    assert "'all_train' has no split 'validation'; it has train." in line
    with pytest.raises(ValueError, match="task is called 'none'"):
        stream.held_out(opener, ["none"])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mixture_or_task_name": "bth"}, "'bth'; did you mean 'both'"),
        ({"split": "test"}, "no split 'test'; it has train, validation"),
        ({"weights": "bytes"}, "weights is 'bytes'"),
        ({"max_tokens": 5}, "weights='tokens'"),
        (
            {"phases": ((0, {"english": 1}),), "temperature": 2.0},
            "remove the settings weights and temperature",
        ),
        ({"phases": ((0, {"ruby": 1}),)}, "unknown source 'ruby'"),
        ({"task_feature_lengths": {"inputs": 8, "targets": 8}}, "no feature 'inputs'"),
    ],
)
def test_bad_arguments_are_refused(root, settings, message):
    good = {"mixture_or_task_name": "both", "task_feature_lengths": {"targets": 64}}
    with pytest.raises(ValueError, match=message):
        stream.make_stream(**{**good, "batch_size": 4, "cache_dir": root, **settings})


def test_mixtures_are_not_evaluated_as_one(root):
    with pytest.raises(ValueError, match="one by one.*english, python"):
        stream.make_eval_stream(
            task="both", task_feature_lengths={"targets": 64}, batch_size=4, cache_dir=root
        )


def test_an_empty_source_is_refused_and_leaves_no_cache(tmp_path):
    task = add_task("nothing", extra=(lambda dataset: dataset.filter(lambda x: False),))
    for _ in range(2):
        with pytest.raises(ValueError, match="'nothing' has no records"):
            task_cache.open_task_cache(task, "train", cache_dir=tmp_path)


def test_submixtures_have_the_rates_seqio_gives_them():
    for name in ("inner", "outer"):
        if name in seqio.MixtureRegistry.names():
            seqio.MixtureRegistry.remove(name)
    add_task("english", "english")
    add_task("python", "python")
    seqio.MixtureRegistry.add("inner", [("english", 1.0), ("python", 3.0)])
    seqio.MixtureRegistry.add("outer", [("inner", 1.0), ("python", 1.0)])
    _, rates = mixing.find_tasks("outer")
    assert rates == {"english": 0.25, "python": 1.75}


def weigh(dataset):
    """Odd tokens count half, even ones nothing."""
    return dataset.map(lambda x: {**x, "loss_weights": tf.cast(x["targets"] % 2, tf.float32) * 0.5})


def add_weighted(name, *, early=False, dtype=tf.float32):
    if name in seqio.TaskRegistry.names():
        seqio.TaskRegistry.remove(name)
    steps = [seqio.preprocessors.append_eos, weigh]
    weights = seqio.Feature(seqio.PassThroughVocabulary(1), add_eos=False, dtype=dtype)
    return seqio.TaskRegistry.add(
        name,
        source=seqio.FunctionDataSource(
            functools.partial(read, name="python"), splits=("train", "validation")
        ),
        preprocessors=[seqio.preprocessors.tokenize, *(steps[::-1] if early else steps)],
        output_features={
            "targets": seqio.Feature(seqio.ByteVocabulary(), add_eos=True),
            "loss_weights": weights,
        },
    )


@pytest.mark.parametrize("packing", ["best_fit", "concat"])
def test_a_task_weighs_its_tokens(tmp_path, packing):
    add_weighted("weighted")
    settings = {"task_feature_lengths": {"targets": 32}, "cache_dir": tmp_path, "batch_size": 4}
    made = stream.make_eval_stream(task="weighted", packing=packing, **settings)
    total = 0.0
    for step in range(made.num_steps):
        batch = made.batch(step, 0, 4)
        want = batch["decoder_target_tokens"] % 2 * 0.5  # padding is 0
        np.testing.assert_array_equal(batch["decoder_loss_weights"], want)
        total += want.sum()
    assert total > 0 and made.bytes_per_token == 0
    add_weighted("weighted", early=True)
    with pytest.raises(ValueError, match="every target needs one, BOS and EOS too"):
        stream.make_eval_stream(task="weighted", changed_cache="replace", **settings)


def test_weights_that_are_no_weights_are_refused(tmp_path):
    for values, kind, message in (([1.0, -1.0], "float32", "negative"), ([1, 0], 2, "floating")):
        made = store.write(
            tmp_path / message,
            [{"targets": [3, 4], "loss_weights": np.array(values)}],
            features={"targets": 9, "loss_weights": kind},
        )
        with pytest.raises(ValueError, match=message):
            rows.plan_source("bad", made, {"targets": 8})
