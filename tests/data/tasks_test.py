"""SeqIO tasks and mixtures over the corpus."""

import json

import pytest

from espalier.data import tasks
from espalier.data.tasks import in_seqio
from espalier.data.text import corpus, user_data
from espalier.data.tokenizers import vocabularies

TEXTS = {
    f"numpy/m{i}.py": f"def function_{i}(argument):\n    return {i * 7919}\n" * 20
    for i in range(20)
}
PO = "".join(f'msgid "m{i}"\nmsgstr "{{0}} Nummer {i}, und noch mehr Text."\n\n' for i in range(40))
DOMAINS = ("a", "b", "c", "d", "e", "f")
LANGUAGES = {
    f"django/contrib/{domain}/locale/{code}/LC_MESSAGES/django.po": PO.format(f"{word} {domain}")
    for domain in DOMAINS
    for code, word in (("de", "Satz"), ("nl", "Zin en nog wat woorden"))
}


@pytest.fixture(scope="module")
def byte():
    return vocabularies.byte()


@pytest.fixture
def small(fake_environment, tmp_path):
    env = fake_environment(
        {"numpy": TEXTS, "django": LANGUAGES}, stdlib={"pydoc_data/topics.py": _topics()}
    )
    return corpus.assemble(
        sources=["english", "python", "multilingual"],
        env=env,
        cache_dir=tmp_path / "cache",
        near_duplicate_threshold=2.0,
        containment_threshold=1.0,
    )


def _topics() -> str:
    return f"topics = { ({f't{i}': f'Topic {i} is about this and that. ' * 10 for i in range(20)})!r}\n"


def _records(name, split):
    seqio = in_seqio()

    task = seqio.TaskRegistry.get(name)
    dataset = task.get_dataset(sequence_length=None, split=split, shuffle=False)
    return list(dataset.as_numpy_iterator())


def test_tasks_yield_every_document_with_its_name_and_eos(small, byte):
    user_data.register_corpus(vocabulary=byte, corpus=small)
    for split in ("train", "validation"):
        records = _records("python", split)
        documents = list(small.documents("python", split))
        assert [r["document_id"].decode() for r in records] == [d.id for d in documents]
        for record, document in zip(records, documents, strict=True):
            expected = [value + 3 for value in document.text.encode()] + [1]
            assert record["targets"].tolist() == expected
            assert record["targets_pretokenized"].decode() == document.text
            assert record["targets"].dtype == "int32"


def test_bos_and_eos_by_choice(small, tmp_path, byte):
    vocabulary = vocabularies.sentencepiece(
        corpus=small, size=420, sample_bytes=10**6, cache_dir=tmp_path
    )
    text = next(small.documents("python", "train")).text
    ids = list(vocabulary.encode(text))
    for add_bos, add_eos in ((False, False), (True, False), (True, True)):
        user_data.register_corpus(
            vocabulary=vocabulary,
            corpus=small,
            sources=["python"],
            add_bos=add_bos,
            add_eos=add_eos,
        )
        expected = [3] * add_bos + ids + [1] * add_eos
        assert _records("python", "train")[0]["targets"].tolist() == expected
    with pytest.raises(ValueError, match="task 'python': add_bos=True, but .* has no BOS"):
        user_data.register_corpus(vocabulary=byte, corpus=small, sources=["python"], add_bos=True)


@pytest.mark.parametrize("none", [None, -1])
def test_eos_is_not_asked_of_a_vocabulary_without_it(small, byte, monkeypatch, none):
    monkeypatch.setattr(type(byte), "eos_id", none)
    with pytest.raises(ValueError, match="task 'python': add_eos=True, but .* has no EOS"):
        user_data.register_corpus(vocabulary=byte, corpus=small, sources=["python"])
    user_data.register_corpus(vocabulary=byte, corpus=small, sources=["python"], add_eos=False)
    text = next(small.documents("python", "train")).text
    assert _records("python", "train")[0]["targets"].tolist() == list(byte.encode(text))


def test_mixtures_weigh_by_bytes_and_temperature(small, byte):
    seqio = in_seqio()

    user_data.register_corpus(
        vocabulary=byte, corpus=small, temperature=1.0, language_temperature=2.0
    )
    everything = seqio.MixtureRegistry.get("all")
    assert {task.name for task in everything.tasks} == {
        "english",
        "python",
        "lang_de",
        "lang_nl",
        "lang_en",
    }
    for task in everything.tasks:
        assert everything.get_rate(task) == small.size(task.name)
    languages = seqio.MixtureRegistry.get("multilingual")
    ratio = languages.get_rate(seqio.TaskRegistry.get("lang_nl")) / languages.get_rate(
        seqio.TaskRegistry.get("lang_de")
    )
    assert ratio == pytest.approx((small.size("lang_nl") / small.size("lang_de")) ** 0.5)
    code = seqio.MixtureRegistry.get("code")
    assert [task.name for task in code.tasks] == ["python"]


def test_registering_again_replaces_and_does_not_repeat(small, byte):
    for _ in range(2):
        user_data.register_corpus(vocabulary=byte, corpus=small)
    assert len(_records("english", "train")) == len(list(small.documents("english", "train")))


def test_clear_takes_everything_back(small, byte):
    seqio = in_seqio()

    before = {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    user_data.register_corpus(vocabulary=byte, corpus=small)
    assert {"python", "code"} <= {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()}
    tasks.clear()
    assert {*seqio.TaskRegistry.names(), *seqio.MixtureRegistry.names()} == before
    assert tasks.summary() == {"tasks": {}, "mixtures": {}, "corpora": {}}


def test_digest_follows_the_text_alone(small, byte):
    user_data.register_corpus(vocabulary=byte, corpus=small)
    digest = tasks.sources()["python"].digest
    assert digest != tasks.sources()["english"].digest
    user_data.register_corpus(vocabulary=byte, corpus=small, add_eos=False)
    assert tasks.sources()["python"].digest == digest
    path = small.file("python", "train")
    path.write_text(path.read_text().replace("return", "yield", 1))
    user_data.register_corpus(vocabulary=byte, corpus=small)
    assert tasks.sources()["python"].digest != digest


def test_summary_holds_sizes_hashes_and_versions(small, byte):
    user_data.register_corpus(vocabulary=byte, corpus=small)
    summary = json.loads(json.dumps(tasks.summary()))
    assert (
        summary["tasks"]["python"]["documents"] == small.manifest["sources"]["python"]["documents"]
    )
    assert summary["tasks"]["python"]["digest"] == tasks.sources()["python"].digest
    assert summary["corpora"][small.digest]["packages"]["numpy"] == "1.0"
    assert summary["mixtures"]["all"]["python"] == small.size("python")


def test_names_that_are_taken_or_unknown(small, byte):
    user_data.register_corpus(vocabulary=byte, corpus=small)
    with pytest.raises(ValueError, match="the name 'english' is taken by a task"):
        tasks.register_mixture("english", {"python": 1.0})
    with pytest.raises(
        ValueError, match="mixture 'new': no task or mixture 'pyton'; did you mean 'python'"
    ):
        tasks.register_mixture("new", {"pyton": 1.0})
    with pytest.raises(ValueError, match="unknown source 'cp'; did you mean 'cpp'"):
        user_data.register_corpus(vocabulary=byte, corpus=small, sources=["cp"])
    with pytest.raises(ValueError, match="none of the sources cpp is in the corpus, which holds"):
        user_data.register_corpus(vocabulary=byte, corpus=small, sources=["cpp"])


def test_a_source_without_held_out_documents_has_no_validation_split(
    fake_environment, tmp_path, byte
):
    seqio = in_seqio()

    built = corpus.assemble(
        sources=["python"],
        env=fake_environment({"numpy": TEXTS}),
        cache_dir=tmp_path,
        validation_fraction=0,
        near_duplicate_threshold=2.0,
    )
    user_data.register_corpus(vocabulary=byte, corpus=built)
    assert seqio.TaskRegistry.get("python").splits == ("train",)
    assert len(_records("python", "train")) == 20


def told(**registered):
    return tasks.notices({"tasks": registered})


def test_nothing_is_told_of_data_that_are_read_whole():
    assert told(a={"documents": {"train": 3}}) == [] == tasks.notices({})


def test_documents_are_told_by_filter_and_rows_by_reason():
    documents = {
        "Short": {"documents": 1200, "bytes": 2_500_000},
        "C": {"documents": 1, "bytes": 0},
    }
    rows = {
        "identical": {"rows": 3, "first": "x:2"},
        "empty_completion": {"rows": 1, "first": "x:5"},
    }
    facts = {"documents": {"train": 90, "validation": 10}}
    noted = {"invisible_characters": {"rows": 2, "first": "x:9"}}
    found = told(a={**facts, "dropped": documents}, b={**facts, "dropped": rows, "noted": noted})
    assert found == [
        ("dropped", "a: Short 1,200 documents (2.5 MB), C 1 documents (0.0 MB)"),
        (
            "dropped",
            "b: 3 identical (first: x:2), 1 empty_completion (first: x:5), 3.8% of all rows",
        ),
        ("noted", "b: 2 invisible_characters (first: x:9)"),
    ]
    (line,) = told(b={"documents": {"train": 75}, "dropped": rows})
    assert line[0] == "WARNING" and line[1].endswith("5.1% of all rows")
