"""The reproductions' own parts: intervals, stages, scoring, and all of SnapKV's on an untrained model."""

import json

import flax.linen as nn
import jax
import numpy as np
import pytest

from data.snapkv import retrieval as task
from launch import environment, papers, reproduce
from launch.papers.shared import claim
from launch.papers.shared.claim import Claim, Evidence
from launch.papers.shared.results import Results
from launch.papers.shared.sweeps import Stages
from launch.papers.snapkv import attention, needles, page, retrieval
from launch.plots import intervals
from model.config import TransformerConfig
from model.transformer import Transformer
from trainers import initialise

CONFIG = TransformerConfig(
    vocab_size=task.VOCAB_SIZE,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=16,
    scan_layers=False,
)


def test_wilsons_interval_at_known_values():
    # Ten of ten: 10 / (10 + z^2) is the lower bound.
    assert intervals.share([1] * 10) == {"value": 1.0, "low": 0.7225, "high": 1.0}
    half = intervals.share([1, 0] * 50)
    assert half["value"] == 0.5 and abs(half["low"] - 0.4038) < 1e-3


def test_a_ratio_is_of_sums_and_differences_are_paired():
    assert intervals.ratio([1, 3], [2, 2])["value"] == 1.0
    assert np.isnan(intervals.ratio([0, 0], [0, 0])["value"])
    same = intervals.difference([1, 0, 1, 1], [1, 0, 1, 1])
    assert same == {"value": 0.0, "low": 0.0, "high": 0.0}


def test_a_stage_is_measured_once_for_the_same_settings(tmp_path):
    stages, calls = Stages(tmp_path), []

    def measure():
        calls.append(1)
        return {"n": len(calls)}

    assert stages.get("a", {"x": (1, 2)}, measure)["result"] == {"n": 1}
    assert stages.get("a", {"x": (1, 2)}, measure)["result"] == {"n": 1}
    assert stages.get("a", {"x": (1, 3)}, measure)["result"] == {"n": 2}


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" 48213.", [1, 1, 1, 1, 1]),
        (" 48273", [1, 1, 1, 0, 1]),
        (" 482", [1, 1, 1, 0, 0]),
        (" 482135", [1, 1, 1, 1, 0]),  # another number
        (" none", [0, 0, 0, 0, 0]),
    ],
)
def test_digits_are_right_in_their_place(answer, right):
    assert needles.right_digits(answer, "48213") == right


def test_a_haystack_holds_every_needle_once_in_order_and_fits():
    lines = [f"This is verse {i}; and it goes on for a while." for i in range(400)]
    hay = needles.haystack(np.random.default_rng(0), lines, lambda text: len(text.split()), 300)
    assert len(hay.text.split()) <= 300
    places = [
        hay.text.index(f"of {name} is {number}.")
        for name, number in zip(hay.names, hay.numbers, strict=True)
    ]
    assert places == sorted(places)
    assert all(hay.text.count(name) == 1 for name in hay.names)
    words = [word for name in hay.names for word in name.split()]
    assert len(set(words)) == len(words)  # no two needles share a word


def test_everything_is_measured_and_reported_for_an_untrained_model(tmp_path):
    model = Transformer(config=CONFIG)
    init = jax.jit(lambda key: initialise.variables(model, key))
    params = nn.meta.unbox(init(jax.random.key(0)))["params"]
    retriever = retrieval.Retriever(model, params)
    sizes = {"prompts": 8, "lines": 9}
    run = {
        "accuracy": retrieval.accuracy(
            retriever, **sizes, capacities=(24,), names=("snapkv", "kernel_1", "oracle", "h2o")
        ),
        "agnostic": retrieval.question_agnostic(retriever, **sizes, capacity=24),
        "positions": retrieval.question_positions(retriever, **sizes, capacity=24),
        "hits": attention.hit_rates(retriever, **sizes, windows=3),
        "overlaps": attention.overlaps(retriever, **sizes, capacity=24),
        "kept": attention.kept_hits(retriever, **sizes, question="first", capacity=24),
    }
    assert run["accuracy"]["length"] == 7 + 5 * 9
    right = run["accuracy"]["correct"]
    first = [np.asarray(by[capacity])[:, 0] for by in right.values() for capacity in by]
    # The first token follows from the whole prompt, whatever is kept.
    assert all((found == first[0]).all() for found in first)
    assert np.shape(run["hits"]["hits"]) == (2, 3, 8, 2)
    hit, attended = np.moveaxis(np.asarray(run["kept"]), -1, 0)
    assert (hit <= attended).all() and attended.any()
    same, different = (np.asarray(run["overlaps"][key]) for key in ("same", "different"))
    assert ((same > 0) & (same <= 1)).all() and ((different >= 0) & (different <= 1)).all()
    json.dumps(run)


def test_claims_without_measurements_are_reported_as_such(tmp_path):
    judged = page.REPORT.judge({})
    assert [claim.name for claim in judged] == [f"S{i}" for i in range(1, 9)]
    assert {claim.verdict for claim in judged} == {"not measured"}
    page.write({}, tmp_path, {"command": "a command", "versions": {"jax": "1"}})
    assert "| **not measured** |" in (tmp_path / "snapkv.md").read_text()
    assert json.loads((tmp_path / "snapkv" / "results.json").read_text())["command"] == "a command"


def _needles(digits):
    return {
        "tokens": 1024,
        "digits": {name: {capacity: rows} for (name, capacity), rows in digits.items()},
        "overlap": {"same": 0.9, "different": 0.6, "chance": 0.2},
    }


def test_a_claim_that_fails_is_reported_as_failing():
    right, wrong = [[1] * 5] * 40, [[1, 0, 0, 0, 0]] * 40
    names = ("snapkv", "kernel_1", "h2o", "streaming_llm", "random", "before the question")
    digits = {(name, "192"): wrong for name in names} | {("full", "0"): right}
    digits["snapkv", "192"] = right
    found = {"needles": [_needles(digits), _needles(digits)]}
    verdicts = {claim.name: claim.verdict for claim in page.REPORT.judge(found)}
    held = {"S1": "holds", "S2": "holds", "S3": "holds", "S5": "holds", "S8": "holds"}
    assert verdicts == {**dict.fromkeys(("S4", "S6", "S7"), "not measured"), **held}
    digits["snapkv", "192"] = wrong
    found = {"needles": [_needles(digits), _needles(digits)]}
    verdicts = {claim.name: claim.verdict for claim in page.REPORT.judge(found)}
    failed = dict.fromkeys(("S1", "S2", "S3", "S8"), "fails")
    assert verdicts == {**verdicts, **failed}


def test_papers_are_the_folders_that_measure_and_report(tmp_path, monkeypatch, capsys):
    known = reproduce.slugs()
    assert set(known) >= {"bam", "code_mix", "low_rank", "nexus", "preference", "snapkv"}
    for name in ("complete", "without_a_page"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").touch()
        (folder / "measure.py").write_text(
            "TITLE, SEEDS, PARTS = 'A paper, 0000.00000', 2, {'one': 'a part'}\n"
            "def run(**settings):\n    return settings\n"
        )
    (tmp_path / "complete" / "page.py").write_text(
        "def write(found, out, facts):\n    print(found)\n    return []\n"
    )
    monkeypatch.setattr(papers, "__path__", [*papers.__path__, str(tmp_path)])
    monkeypatch.setattr(environment, "prepare", lambda: None)
    assert set(reproduce.slugs()) - set(known) == {"complete"}
    assert reproduce.main(["complete", "--model_dir=a", f"--out={tmp_path}"]) == 0
    settings = {"model_dir": "a", "parts": ["one"], "seeds": 2, "workers": 1, "minutes": None}
    assert str(settings) in capsys.readouterr().out


def test_results_are_one_table_with_pairs_of_the_seeds_that_all_arms_have():
    class Runs(Results):
        def row_scores(self, row):
            return {"loss": row["loss"]}

    losses = {("a", 0): 1.0, ("a", 1): None, ("a", 2): 3.0, ("b", 2): 2.0, ("b", 1): 5.0}
    runs = Runs([{"arm": arm, "seed": seed, "loss": x} for (arm, seed), x in losses.items()])
    assert list(runs.table) == ["arm", "size", "seed", "loss"] and len(runs.table) == 5
    assert [values.tolist() for values in runs.paired("loss", "a", "b")] == [[3.0], [2.0]]
    assert runs.values("a", "accuracy").size == 0 and runs.paired("loss", "a", "c")[0].size == 0
    (evidence,) = runs.better("here", "loss", "b", "a")
    assert evidence.holds and "better in 1 of 1 pairs" in evidence.measured
    assert runs.missing(["a", "b", "c"], [0, 1]) == ["`b` (seed 0)", "`c`"]


def test_a_claim_is_judged_in_the_parts_that_measure_it_and_have_results():
    def measure(value, where):
        return [Evidence(where, f"{value}", value > 1)]

    spec = Claim("X1", "it is more than 1", "more", {"a": [measure], "b": [measure]}, required=True)
    places = {"a": "here", "b": "there"}
    both, one = (claim.judge([spec], found, places)[0] for found in ({"a": 1, "b": 2}, {"b": 2}))
    assert (both.verdict, one.verdict) == ("mixed", "holds")
    assert claim.unmet([both], ["a", "b"]) == ["X1 must hold, and its verdict is: mixed"]
    assert claim.unmet([one], ["a", "b"]) == ["X1 must hold, and part a has not measured it"]
