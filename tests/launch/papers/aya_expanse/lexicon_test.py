"""Requests in words of real languages, their exact score, and the texts of the base."""

import itertools

import numpy as np
import pytest

from espalier.launch.papers.aya_expanse import lexicon, lexicon_text

pytest.importorskip("django")


def test_words_name_one_concept_in_their_language():
    for code in lexicon.LANGUAGES:
        assert len(lexicon.concepts(code)) == len(lexicon.CONCEPTS)
    assert lexicon.words("es")["Monday"] == "lunes" and lexicon.words("de")["April"] == "april"
    assert lexicon.meanings("listopad") == {"October", "November"} - {"October"}
    assert lexicon.sibling("cs") == "pl" and lexicon.family("en") == ("en",)
    with pytest.raises(ValueError, match="no other language"):
        lexicon.sibling("en")


@pytest.mark.parametrize(
    ("content", "language", "prompt", "answer"),
    [
        (("translate", ("Monday", "Dutch")), "es", "traduce: monday, dutch =", "lunes, holandés"),
        (("sort", ("Persian", "Czech")), "it", "ordina: persiano, ceco =", "ceco, persiano"),
    ],
)
def test_a_request_and_its_answer(content, language, prompt, answer):
    assert lexicon.Content(*content).said(language, "en") == (prompt, answer)


def test_splits_share_no_content_and_are_functions_of_the_seed():
    seen = {
        split: set(itertools.islice(lexicon.contents(split, 1), 300)) for split in lexicon.SPLITS
    }
    for one, other in itertools.combinations(seen.values(), 2):
        assert not one & other
    rows = lexicon.requests("pool", 6, 3)
    assert rows == lexicon.requests("pool", 6, 3) != lexicon.requests("pool", 6, 4)
    assert [row["language"] for row in rows[:7]] == list(lexicon.LANGUAGES)
    assert {row["kind"] for row in rows} == set(lexicon.KINDS)
    for row in rows:
        assert lexicon.score(row["answer"], row["answer"], row["language"]) == 1.0


@pytest.mark.parametrize(
    ("text", "score"),
    [
        (" lunes, checo", 1.0),
        ("lunes,checo,", 1.0),
        ("checo, lunes", 0.0),
        ("lunes, danés", 0.5),
        ("lunedì, checo", 0.5),  # two right concepts, half of them in the language
        ("pondělí, česky", 0.0),
        ("lunes, checo, lunes", 0.95),
        ("lunes, checo, x, x", 0.4),  # half of the words are Spanish, and twice the length
        ("lunes", 0.5),
        ("", 0.0),
    ],
)
def test_the_score_is_correctness_times_consistency_less_length(text, score):
    assert lexicon.score(text, "lunes, checo", "es") == pytest.approx(score)


def test_noise_is_a_function_of_request_and_answer_with_the_given_deviation():
    row = {"id": "a", "answer": "lunes, checo", "language": "es"}
    texts = [f"lunes, {i}" for i in range(2000)]
    noise = [
        lexicon.noisy_score(t, row, deviation=0.5) - lexicon.score(t, "lunes, checo", "es")
        for t in texts
    ]
    assert np.std(noise) == pytest.approx(0.5, rel=0.05) and abs(np.mean(noise)) < 0.05
    judge = [lexicon.noisy_score(t, row, deviation=0.5, name="judge") for t in texts]
    assert abs(np.corrcoef(noise, judge)[0, 1]) < 0.1
    assert lexicon.noisy_score(texts[0], row) == lexicon.noisy_score(f" {texts[0]} ", row)
    assert lexicon.noisy_score(texts[0], row, deviation=0.0) == lexicon.score(
        texts[0], row["answer"], "es"
    )


def test_a_translator_takes_words_of_the_other_language_at_its_rate():
    text = ", ".join(lexicon.words("en")[x] for x in lexicon.NAMES)
    exact = lexicon.translated(text, "cs", loss=0.0, key=1)
    assert exact == " " + ", ".join(lexicon.words("cs")[x] for x in lexicon.NAMES)
    assert lexicon.artefacts(exact, "cs") == 0.0
    shares = [
        lexicon.artefacts(lexicon.lossy(exact, "cs", loss=0.3, key=key), "cs") for key in range(40)
    ]
    assert np.mean(shares) == pytest.approx(0.3, abs=0.03)
    assert lexicon.lossy("lunes, x", "es", loss=1.0, key=0) == " lunedì, x"


def test_documents_are_functions_of_their_fields_and_reach_the_vocabulary():
    source = lexicon_text.Words("words_cs", 40, 0, "cs")
    texts = source.texts("train")
    assert texts == lexicon_text.Words("words_cs", 40, 0, "cs").texts("train")
    assert texts != lexicon_text.Words("words_cs", 40, 1, "cs").texts("train")
    assert source.digest != lexicon_text.Words("words_cs", 40, 1, "cs").digest
    calendars = [t for t in texts if t.startswith("cs: po ") or "pondělí úterý" in t]
    assert calendars
    every = lexicon_text.Texts(documents=20)
    sampled = [document.text for document in every.sample("words_cs", 1e9)]
    assert sampled == lexicon_text.Words("words_cs", 20, 0, "cs").texts("train")
    assert sum(len(t.encode()) for t in sampled) == every.size("words_cs")
    assert len(list(every.sample("words_cs", 50))) < 20
