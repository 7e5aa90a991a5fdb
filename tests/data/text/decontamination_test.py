"""Runs of 13 words against sets of tuples of words."""

import json
import random
import re

import pytest

from espalier.data.text import code_problems, decontamination, document_files
from espalier.data.text.decontamination import Index, Overlap
from espalier.data.text.documents import DataError

WORDS = [f"w{i}" for i in range(40)]


def brute(text, words=13):
    found = re.findall(r"\w+", text.lower())
    return [tuple(found[i : i + words]) for i in range(len(found) - words + 1)]


def test_overlap_is_what_comparing_all_runs_finds():
    rng = random.Random(0)
    separators = [" ", ", ", "\n\n", " -- ", "(", "'s "]

    def text(words):
        return "".join(rng.choice((w, w.upper())) + rng.choice(separators) for w in words)

    # Few distinct words, so that short runs are shared by chance and long ones hardly.
    evaluation = [text(rng.choices(WORDS[:3], k=rng.randint(0, 60))) for _ in range(20)]
    for words in (1, 4, 13):
        index = Index.of(evaluation, words)
        known = {run for one in evaluation for run in brute(one, words)}
        assert len(index.runs) == len(known)
        counts = []
        for _ in range(100):
            document = text(rng.choices(WORDS[:4], k=rng.randint(0, 80)))
            if rng.random() < 0.3:
                document += rng.choice(evaluation)
            counts.append(index.overlap(document))
            assert counts[-1] == sum(run in known for run in brute(document, words))
        assert any(counts)


@pytest.mark.parametrize(("shared", "found"), [(12, 0), (13, 1), (14, 2)])
def test_thirteen_words_in_a_row_are_an_overlap(shared, found):
    index = Index.of([" ".join(WORDS)])
    document = f"before {' '.join(WORDS[5 : 5 + shared])} after"
    assert index.overlap(document) == found
    assert index.overlap(document.upper().replace(" ", ";\n")) == found
    swapped = WORDS[5 : 5 + shared]
    swapped[3], swapped[4] = swapped[4], swapped[3]
    assert index.overlap(" ".join(swapped)) == 0


@pytest.mark.parametrize(("length", "runs"), [(12, 0), (13, 1), (14, 2)])
def test_texts_of_fewer_words_cannot_be_found(length, runs):
    index = Index.of([" ".join(WORDS[:length])])
    assert len(index.runs) == runs


def test_problems_of_humaneval_are_found_in_other_documents():
    filter = Overlap(evaluation_set="humaneval")
    assert filter.name == "overlap with humaneval"
    texts = list(decontamination.evaluation_texts("humaneval"))
    assert len(texts) == 164 and all(map(filter.index.overlap, texts))
    assert filter.index.runs.nbytes < 200_000
    problem = code_problems.load("humaneval").problems["HumanEval/0"]
    assert not filter({"text": f"import os\n\n\n{problem.prompt}    pass"})
    assert not filter({"text": problem.solution})
    assert filter({"text": "def add(a, b):\n    return a + b\n" * 20})


@pytest.fixture
def evaluation(tmp_path):
    path = tmp_path / "mbpp.jsonl"
    rows = [
        {"task_id": 1, "text": " ".join(WORDS[:13]), "code": " ".join(WORDS[13:26])},
        {"task_id": 2, "text": "short", "code": "", "test_list": [" ".join(WORDS[26:39])]},
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_fields_of_a_file(evaluation):
    every = Overlap(evaluation_set=evaluation)
    for start in (0, 5, 13, 26):  # fields follow each other
        assert not every({"text": " ".join(WORDS[start : start + 13])})
    assert every({"text": " ".join(WORDS[27:39])})
    some = Overlap(evaluation_set=evaluation, text_keys=("code",))
    assert [some({"text": " ".join(WORDS[i : i + 13])}) for i in (0, 13, 26)] == [True, False, True]
    assert every.settings() != some.settings()
    with pytest.raises(
        DataError, match=r"line 1: no key 'solution'; present are 'task_id', 'text'"
    ):
        _ = Overlap(evaluation_set=evaluation, text_keys=("solution",)).index
    with pytest.raises(DataError, match="none.jsonl: the evaluation set does not exist"):
        _ = Overlap(evaluation_set="none.jsonl").index
    with pytest.raises(ValueError, match="words = 0"):
        Overlap(evaluation_set=evaluation, words=0)


def test_a_set_of_short_texts_is_refused_and_characters_of_chinese_are_words(tmp_path):
    path = tmp_path / "set.jsonl"
    path.write_text('{"q": "Who wrote Hamlet?"}\n{"q": "What is 2+2?"}\n')
    with pytest.raises(DataError, match="no text has 13 words in a row.* Lower Overlap.words"):
        Overlap(evaluation_set=str(path))({"text": "Who wrote Hamlet?"})
    assert not Overlap(evaluation_set=str(path), words=3)({"text": "Who wrote Hamlet?"})
    question = "地球是太阳系中的第三颗行星，也是"  # 15 characters
    path.write_text(json.dumps({"q": question}))
    chinese = Overlap(evaluation_set=str(path))
    assert len(chinese.index.runs) == 3
    assert not chinese({"text": f"title{question}end"})
    assert chinese({"text": question[3:]})


def test_a_document_may_share_so_many_runs(evaluation):
    text = " ".join(WORDS[:15])
    assert [Overlap(evaluation_set=evaluation, most=n)({"text": text}) for n in (2, 3)] == [
        False,
        True,
    ]


def test_what_each_set_drops_is_counted(evaluation, tmp_path):
    problem = code_problems.load("humaneval").problems["HumanEval/0"]
    lines = [problem.prompt, " ".join(WORDS[:13]), "fine", problem.prompt + " ".join(WORDS)]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    filters = [Overlap(evaluation_set="humaneval"), Overlap(evaluation_set=evaluation)]
    found = document_files.find(
        name="mine",
        files=str(path),
        validation_fraction=0,
        filters=filters,
        cache_dir=tmp_path / "cache",
    )
    assert [document.text for document in found.documents("mine", "train")] == ["fine"]
    counted = {name: counts["documents"] for name, counts in found.dropped.items()}
    assert counted == {"overlap with humaneval": 2, "overlap with mbpp.jsonl": 1}
    sets = {filter.name: filter.index for filter in filters}
    counts = {name: sum(index.overlap(line) > 0 for line in lines) for name, index in sets.items()}
    assert list(counts.values()) == [2, 2]
