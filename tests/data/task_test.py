"""Tasks without SeqIO against SeqIO's own pipeline, and caches that SeqIO made."""

import json
import pathlib
import pickle

import numpy as np
import pytest
import seqio
import tensorflow as tf

from espalier.data import cpu_tensorflow, seqio_tasks, tasks
from espalier.data.cache import cache_dir, description, store, task_cache
from espalier.data.stream import mixing
from espalier.data.text import document_files
from espalier.data.tokenizers import spm_tokenizer, vocabularies
from tests.data import task_kinds

GOLDEN = json.loads((pathlib.Path(__file__).parent / "goldens/task_kinds.json").read_text())


@pytest.fixture(scope="module")
def vocabulary(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vocabularies")
    model = task_kinds.train(folder)
    spm_tokenizer.write(model.read_bytes(), folder)
    return {
        "bytes": vocabularies.byte(extra_ids=3),
        "pieces": vocabularies.from_file(path=model, extra_ids=4),
        "huggingface": vocabularies.huggingface(path=folder),
    }


def seqios(name):
    """The task as SeqIO has it."""
    return seqio_tasks.SeqioTask(tasks.in_seqio().TaskRegistry.get(name))


def assert_equal(own, expected):
    own, expected = list(own), list(expected)
    assert len(own) == len(expected) > 0
    for record, other in zip(own, expected, strict=True):
        assert record.keys() == other.keys()
        for name, value in other.items():
            assert type(record[name]) is type(value)
            if isinstance(value, bytes):
                assert record[name] == value
            else:
                assert record[name].dtype == value.dtype
                np.testing.assert_array_equal(record[name], value)


@pytest.mark.parametrize("kind", ["bytes", "pieces", "huggingface"])
def test_records_of_every_kind_are_seqios(kind, vocabulary, tmp_path, monkeypatch):
    monkeypatch.setattr("espalier.data.task._BATCH_TEXTS", 5)  # several batches of texts
    names = task_kinds.register(tmp_path, vocabulary[kind])
    assert len(names) >= 12
    for name in names:
        own, task = tasks.find(name), seqios(name)
        assert own.splits == task.splits
        assert description.features_of(own) == description.features_of(task)
        for split in own.splits:
            assert_equal(own.records(split), task.records(split))
            assert description.probe(own, split) == description.probe(task, split)


def test_pieces_are_the_records_in_order_and_tasks_travel(vocabulary, tmp_path):
    task_kinds.register(tmp_path, vocabulary["pieces"], ["text", "generated"])
    for name in ("text", "generated_texts"):
        task = pickle.loads(pickle.dumps(tasks.find(name)))
        pieces = task.pieces("train")
        assert len(pieces) == {"text": 2}.get(name, 1)
        parts = [record for piece in pieces for record in task.records("train", [piece])]
        assert_equal(parts, tasks.find(name).records("train"))


def test_caches_are_those_of_the_code_that_read_by_seqio(vocabulary, tmp_path):
    names = task_kinds.register(tmp_path, vocabulary["bytes"])
    made = {
        f"{name}/{split}": task_cache.open_task_cache(
            tasks.find(name), split, cache_dir=tmp_path / "cache"
        ).content
        for name in names
        for split in tasks.find(name).splits
    }
    assert made == GOLDEN["contents"]


@pytest.fixture
def no_build(monkeypatch):
    def refuse(*args, **settings):
        raise AssertionError("a cache is built")

    def start():
        monkeypatch.setattr(store, "build", refuse)

    return start


@pytest.mark.parametrize("name", ["text", "text_bos", "chats", "generated_texts"])
def test_caches_that_seqio_made_stay_valid(name, vocabulary, tmp_path, no_build):
    task_kinds.register(tmp_path, vocabulary["pieces"], [name.removesuffix("_texts")])
    root = {"cache_dir": tmp_path / "cache"}
    before = task_cache.open_task_cache(seqios(name), "train", **root)
    assert "preprocessors" in before.manifest["description"]
    no_build()
    after = task_cache.open_task_cache(tasks.find(name), "train", **root)
    assert after.directory == before.directory and after.content == before.content
    again = task_cache.open_task_cache(tasks.find(name), "train", changed="replace", **root)
    assert again.directory == before.directory


def test_what_has_changed_since_seqio_made_a_cache_is_named(vocabulary, tmp_path):
    root = {"cache_dir": tmp_path / "cache"}
    task_kinds.register(tmp_path, vocabulary["pieces"], ["text"])
    task_cache.open_task_cache(seqios("text"), "train", **root)
    with (tmp_path / "text/0.jsonl").open("a") as file:
        file.write('{"text": "more"}\n')
    task_kinds.register_text(tmp_path, vocabulary["pieces"])
    with pytest.raises(store.CacheMismatchError, match=r"Changed since then: source\. "):
        task_cache.open_task_cache(tasks.find("text"), "train", **root)
    task_kinds.register_text(tmp_path, vocabulary["pieces"], add_bos=True)
    with pytest.raises(store.CacheMismatchError, match="Changed since then: source, steps"):
        task_cache.open_task_cache(tasks.find("text"), "train", **root)


def test_a_cache_of_other_preprocessors_is_not_taken_for_a_tasks(vocabulary, tmp_path):
    """Same name, source, vocabulary and even records, but steps of a user's own."""
    root = {"cache_dir": tmp_path / "cache"}
    task_kinds.register(tmp_path, vocabulary["bytes"], ["text"])
    own = tasks.find("text")
    tasks.clear()

    def unchanged(dataset):
        return dataset

    user = seqio.Task(
        "text",
        source=own.source,
        preprocessors=[
            lambda dataset: dataset.map(lambda x: {**x, "targets": x["text"]}),
            seqio.preprocessors.tokenize,
            unchanged,
            seqio.preprocessors.append_eos,
        ],
        output_features={"targets": seqio.Feature(seqio.ByteVocabulary(3), add_eos=True)},
    )
    task_cache.open_task_cache(user, "train", **root)
    with pytest.raises(store.CacheMismatchError, match="steps"):
        task_cache.open_task_cache(own, "train", **root)


def test_a_start_reads_no_example_unless_code_or_data_changed(vocabulary, tmp_path, monkeypatch):
    root = {"cache_dir": tmp_path / "cache"}
    task_kinds.register(tmp_path, vocabulary["pieces"], ["text"])
    made = task_cache.open_task_cache(tasks.find("text"), "train", **root)
    read, reads = document_files.DocumentFiles.read_examples, []

    def counted(self, *args):
        reads.append(args)
        return read(self, *args)

    monkeypatch.setattr(document_files.DocumentFiles, "read_examples", counted)

    def reopened():
        reads.clear()
        again = task_cache.open_task_cache(tasks.find("text"), "train", **root)
        assert again.directory == made.directory
        return len(reads)

    assert reopened() == 0
    monkeypatch.setattr(description.fingerprint, "code", lambda task: "other code")
    assert reopened() > 0 and reopened() == 0
    for path in cache_dir.cache_dir("files", "probes", override=root["cache_dir"]).iterdir():
        path.write_text("[")
    assert reopened() > 0
    # Code that reads otherwise is noticed.
    monkeypatch.setattr(description.fingerprint, "code", lambda task: "code with a fault")
    monkeypatch.setattr(
        document_files.DocumentFiles,
        "read_examples",
        lambda self, *args: ({**x, "text": x["text"] + "!"} for x in read(self, *args)),
    )
    with pytest.raises(store.CacheMismatchError, match="the first records differ"):
        task_cache.open_task_cache(tasks.find("text"), "train", **root)


def test_seqio_gets_the_tasks_after_tensorflow_has_hidden_accelerators(
    vocabulary, tmp_path, monkeypatch
):
    calls = []
    monkeypatch.setattr(cpu_tensorflow, "load", lambda: calls.append("load"))
    task_kinds.register(tmp_path, vocabulary["bytes"], ["text"])
    assert tasks.in_seqio() is seqio and calls
    assert "text" in seqio.TaskRegistry.names()
    tasks.clear()
    assert "text" not in seqio.TaskRegistry.names()


def _register_as(name, folder, vocabulary):
    file = folder / "file.jsonl"
    file.write_text('{"text": "a"}\n')
    task_kinds.register_text(
        folder, vocabulary["bytes"], name=name, files=str(file), validation_fraction=0.0
    )


def test_mixtures_of_own_and_seqio_tasks_have_seqios_rates(vocabulary, tmp_path):
    task_kinds.register(tmp_path, vocabulary["bytes"], ["text", "text_bos", "generated"])

    def dataset(split, shuffle_files, seed=None):
        return tf.data.Dataset.from_tensor_slices({"targets": ["a", "b"]})

    features = {"targets": seqio.Feature(vocabularies.byte(extra_ids=3), add_eos=True)}
    steps = [seqio.preprocessors.tokenize, seqio.preprocessors.append_eos]
    source = seqio.FunctionDataSource(dataset, splits=["train"])
    try:
        seqio.TaskRegistry.add("users", source, features, steps)
        seqio.MixtureRegistry.add("users_mix", [("users", 0.3), ("text", 0.7), ("text_bos", 0.1)])
        tasks.register_mixture("own", {"text": 1 / 3, "generated_texts": 0.2})
        tasks.register_mixture("all", {"own": 0.7, "users_mix": 1 / 7, "users": 0.3, "text": 0.1})
        for name in ("own", "all", "users_mix", "users", "text"):
            found, rates = mixing.find_tasks(name)
            theirs = seqio.get_mixture_or_task(name)
            members = getattr(theirs, "tasks", [theirs])
            assert [task.name for task in found] == [task.name for task in members] == [*rates]
            if members != [theirs]:
                assert rates == {task.name: theirs.get_rate(task) for task in members}
        kinds = {task.name: type(task).__name__ for task in mixing.find_tasks("all")[0]}
        assert kinds == dict.fromkeys(("generated_texts", "text", "text_bos"), "Task") | {
            "users": "SeqioTask"
        }
        with pytest.raises(
            pickle.PicklingError, match="'users' cannot be found by other processes"
        ):
            pickle.dumps(tasks.find("users"))
        # SeqIO mixes them too, which compares their vocabularies.
        lengths = {"targets": 9}
        mixed = (
            tasks.in_seqio()
            .MixtureRegistry.get("all")
            .get_dataset(lengths, split="train", shuffle=False, num_epochs=1)
        )
        assert next(mixed.as_numpy_iterator())["targets"].dtype == np.int32
        with pytest.raises(ValueError, match="different output features"):
            tasks.register_mixture("odd", {"text": 1, "generated_rows": 1})
        with pytest.raises(ValueError, match="'users' is taken"):
            _register_as("users", tmp_path, vocabulary)
    finally:
        seqio.MixtureRegistry.remove("users_mix")
        seqio.TaskRegistry.remove("users")


def test_a_name_that_seqio_refuses_is_refused(vocabulary, tmp_path):
    with pytest.raises(ValueError, match="'a b' of a task has other characters"):
        _register_as("a b", tmp_path, vocabulary)
