"""The multilingual suite: scores of texts at known values, and benchmarks by language on a tiny run."""

import json
import math

import pytest

from espalier.launch.evaluate import harness
from espalier.launch.evaluate.suites import scores
from espalier.launch.papers.aya23 import suite


def test_words_are_those_of_every_script():
    assert scores.words("Don't stop, 12!") == ["don", "t", "stop", "12"]
    assert scores.words("हिन्दी भाषा।") == ["हिन्दी", "भाषा"]
    assert scores.words("日本語をabc 話す") == ["日", "本", "語", "を", "abc", "話", "す"]
    assert scores.words("ไทย") == ["ไ", "ท", "ย"]


def test_rouge_l_is_one_for_equal_texts_of_any_script_and_follows_its_formula():
    for text in ("日本語の文", "Ελληνικά εδώ", "שלום עולם", "a cat sat"):
        assert scores.rouge_l(text, text) == 1.0
    # The longest common subsequence of four and three words has two.
    assert scores.rouge_l("ена два три четири", "ена три пет") == pytest.approx(4 / 7)
    assert scores.rouge_l("日本", "中国") == 0.0


def test_translations_are_scored_as_sacrebleu_does(monkeypatch, tmp_path):
    import sacrebleu

    items = [("the cat sat on the mat", "the cat sat on a mat"), ("yes", "yes")]
    references, translations = zip(*items, strict=True)
    expected = sacrebleu.corpus_chrf(list(translations), [list(references)], word_order=2).score
    assert scores.chrf_plus_plus(items) == pytest.approx(expected / 100)
    assert scores.chrf_plus_plus([("same text", "same text")]) == pytest.approx(1)
    monkeypatch.setattr("sacrebleu.utils.SACREBLEU_DIR", str(tmp_path))
    assert scores.spbleu_missing().startswith(f"{tmp_path}/models/")
    assert math.isnan(scores.spbleu(items))


def test_the_groups_are_the_papers():
    sizes = {group.name: len(group.benchmarks) for group in suite.SUITE.groups}
    assert sizes == {
        **{"xcopa": 11, "xwinograd": 6, "xstorycloze": 10, "mmlu": 14, "mgsm": 7, "tydiqa": 9},
        **{"xlsum": 15, "flores_into_english_chrf": 22, "flores_from_english_chrf": 22},
        **{"flores_into_english_spbleu": 22, "flores_from_english_spbleu": 22},
    }
    assert set(suite.SUITE.described) == set(suite.SUITE.sources) == set(suite.SUITE.benchmarks)
    with pytest.raises(ValueError, match="no group 'xcopas'; did you mean 'xcopa'"):
        suite.SUITE.only(["xcopas"])


def test_a_group_without_any_set_takes_one_line_and_there_is_no_total():
    chosen = suite.SUITE.only(["xwinograd", "mgsm"])
    rows = list(scores.table(chosen, {"xwinograd_en": 0.5}, {"mgsm_de": "get it"}))
    assert ("mgsm", "mgsm_de ...", "-", "get it") in rows
    assert ("xwinograd", "xwinograd_en", "50.0", "") in rows
    assert ("xwinograd", "mean", "-", "1 of 6 benchmarks") in rows
    assert not any(group == "total" for group, *_ in rows)


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def sets(tmp_path):
    """A row or two of a language of each group, in the files of the public sets."""
    folder = tmp_path / "eval"
    copa = {
        "premise": "Il pleut.",
        "choice1": "A.",
        "choice2": "B.",
        "question": "cause",
        "label": 0,
    }
    write(folder / "xcopa/it/test.jsonl", copa, {**copa, "question": "effect", "label": 1})
    winograd = {"sentence": "The cat _ sat.", "option1": "she", "option2": "he", "answer": "1"}
    write(folder / "xwinograd/test/en.jsonl", winograd)
    story = {f"input_sentence_{i}": f"{i}." for i in (1, 2, 3, 4)}
    story |= {"sentence_quiz1": "a", "sentence_quiz2": "b", "answer_right_ending": 2}
    write(folder / "xstory_cloze/ar/eval/0.jsonl", story)
    options = {f"option_{x}": x for x in "abcd"}
    question = {"id": "1", "instruction": "Qu?", **options, "answer": "B"}
    write(folder / "m_mmlu/fr/test/0.jsonl", question)
    write(folder / "m_mmlu/fr/train/0.jsonl", *[question] * 6)
    sum_ = {"question": "1+1?", "answer": None, "answer_number": 2, "equation_solution": None}
    solved = {
        **sum_,
        "question": "Frage: 1?",
        "answer": "Schritt-für-Schritt-Antwort: Die Antwort lautet 1.",
    }
    write(folder / "mgsm/de/test/0.jsonl", sum_)
    write(folder / "mgsm/de/train/0.jsonl", *[solved] * 6)
    gold = {"title": "T", "context": "Suomi.", "question": "Mikä?"}
    gold |= {"answers": {"text": ["Suomi"], "answer_start": [0]}}
    write(
        folder / "tydiqa/secondary_task/validation/0.jsonl",
        {**gold, "id": "finnish-1"},
        {**gold, "id": "korean-1"},
    )
    write(folder / "xlsum/korean/test/0.jsonl", {"text": "글.", "summary": "글"})
    for code, text in (("eng_Latn", "One."), ("ces_Latn", "Jedna.")):
        path = folder / f"flores200_dataset/devtest/{code}.devtest"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n{text}\n")
    return folder


def test_every_group_is_evaluated_as_far_as_its_sets_go(
    trained_run, sets, tmp_path, command, capsys, monkeypatch
):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "datasets")
    monkeypatch.setattr("sacrebleu.utils.SACREBLEU_DIR", str(tmp_path))
    monkeypatch.setenv("COLUMNS", "250")  # of the table
    result = tmp_path / "suite.json"
    flags = [f"--checkpoint={trained_run.path}", "--suite=aya23", f"--data_dir={sets}"]
    flags += [f"--json={result}", "--model_args=batch_tokens=4096,max_length=512,max_gen_toks=8"]
    assert command("evaluate harness", *flags) == 0
    found = json.loads(result.read_text())
    assert {name: value["n"] for name, value in found["benchmarks"].items()} == {
        **{"xcopa_it": 2, "xwinograd_en": 1, "xstorycloze_ar": 1, "mmlu_fr": 1, "mgsm_de": 1},
        **{"tydiqa_fi": 1, "tydiqa_ko": 1, "xlsum_ko": 1, "chrf_cs_en": 2, "chrf_en_cs": 2},
    }
    assert all(0 <= value["score"] <= 1 for value in found["benchmarks"].values())
    assert found["benchmarks"]["chrf_cs_en"]["spbleu"] is None
    assert found["missing"]["spbleu_cs_en"].startswith(f"{tmp_path}/models/")
    assert "m_mmlu" in found["missing"]["mmlu_de"] and found["total"] is None
    assert set(found["groups"].values()) == {None}
    shown = " ".join(capsys.readouterr().out.split())
    assert "1 of 11 benchmarks" in shown and "flores200_dataset.tar.gz" in shown


def test_an_unknown_group_is_an_error():
    with pytest.raises(harness.SuiteError, match="--groups: the suite aya23 has no group 'x'"):
        harness.evaluate("nowhere", "auto", "aya23", harness.SuiteFlags(groups=["x"]))
