"""The sweep of influence: its corpora, and that retrained models differ in nothing but the documents that are blank."""

import functools
import json
import pathlib

import numpy as np

from espalier.launch.config import gin_config
from espalier.launch.papers.influence import corpus, scoring, small_corpus
from espalier.launch.sweep import file

SIZES = {**dict.fromkeys(small_corpus.SIZES, 20), small_corpus.FACT: 40}
GIN = "t5x_configs/experiments/influence/cpu/corpus.gin"
LINES = [f"line {i} of some real text." for i in range(30)]


@functools.cache
def runs():
    return {run.arm: run for run in file.read("launch/papers/influence/experiment.py:1")}


def test_judged_seeds_are_not_the_pilots():
    assert {run.seed for run in file.read("launch/papers/influence/experiment.py:5")} == {
        *range(20, 25)
    }
    assert {run.seed for run in file.read("launch/papers/influence/experiment.py:pilot")} == {0}


def test_all_models_continue_the_start_on_files_of_other_arms(tmp_path):
    every = runs()
    again = {arm: run for arm, run in every.items() if run.parent and arm != "wide_model"}
    removed = (len(scoring.REMOVED_BY) + len(scoring.RANDOMS)) * len(scoring.REMOVED_FOR)
    assert len(again) == 1 + corpus.HALVES + removed
    for arm, run in again.items():
        assert run.parent == "start/seed20"
        folder = "scores" if arm.startswith("without") else "corpus"
        name = "documents" if arm == "model" else arm
        assert f"FILES='{{{folder}}}/{name}.jsonl'" in run.bindings
        others = [x for x in run.bindings if not x.startswith("FILES")]
        assert others == [x for x in again["model"].bindings if not x.startswith("FILES")]
    halves = {arm for arm in again if arm.startswith("half_")}
    assert set(every["halves"].made_of) == {*halves, "corpus", "scores"}
    assert set(every["removals"].made_of) == {*again, "corpus"} - {*halves, "model"}
    assert every["wide_model"].parent == "wide_start/seed20"
    wide = [x for x in every["wide_model"].bindings if x not in every["model"].bindings]
    assert wide == [x for x in every["wide_start"].bindings if x.startswith("config.")]
    corpus.write(tmp_path, LINES, 0, sizes=SIZES, queries=2)
    bindings = [x.replace("{corpus}", str(tmp_path)) for x in every["start"].bindings]
    config = gin_config.load(
        every["start"].gin_files,
        [*bindings, "MODEL_DIR='/run'"],
        entry="espalier.launch.train:train",
    )
    recipe = config.arguments()["recipe"]
    assert recipe.model.config.vocab_size >= len(small_corpus.SYMBOLS) + 3
    assert f'symbols = "{small_corpus.SYMBOLS}"' in pathlib.Path(GIN).read_text()


def test_the_files_of_halves_have_the_documents_in_their_places(tmp_path):
    documents, halves_SN = corpus.write(tmp_path, LINES, 5, sizes=SIZES, queries=3)
    assert corpus.read_documents(tmp_path) == documents
    assert len(corpus.read_queries(tmp_path)) == 9
    np.testing.assert_array_equal(corpus.read_halves(tmp_path), halves_SN)
    lines = (tmp_path / "half_03.jsonl").read_text().splitlines()
    for line, one, kept in zip(lines, documents, halves_SN[3], strict=True):
        text = json.loads(line)["text"]
        assert text == (one.text if kept else "." * len(one.text))
    held_out = (tmp_path / corpus.HELD_OUT).read_text().splitlines()
    sources = {json.loads(line)["source"] for line in held_out}
    assert sources & {*small_corpus.PROCEDURES} and small_corpus.FACT not in sources


def test_words_and_signs_are_counted_not_characters():
    documents = [
        small_corpus.Document("ada says the capital of zo is ba.", "fact"),
        small_corpus.Document("reverse('123') == '321'", "reverse_code"),
    ]
    query = small_corpus.Query("fact", "fact", "the capital of zo is", " ba.", "ba")
    found = scoring.lexical_scores(documents, [query])
    assert found["tfidf"].shape == found["bm25"].shape == (2, 1)
    assert found["tfidf"][1, 0] == 0 < found["tfidf"][0, 0]
    assert found["bm25"][1, 0] == 0 < found["bm25"][0, 0]
