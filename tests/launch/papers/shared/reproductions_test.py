"""The reproductions' own parts: intervals, stages, tables of results, and the papers that the command knows."""

import pathlib
import re

import numpy as np
import pytest

from espalier.launch import environment, papers, reproduce
from espalier.launch.papers.shared import claim, page, sweeps
from espalier.launch.papers.shared.claim import Claim, Effect
from espalier.launch.papers.shared.results import Results
from espalier.launch.papers.shared.sweeps import Stages
from espalier.launch.plots import intervals


def test_wilsons_interval_at_known_values():
    # Ten of ten: 10 / (10 + z^2) is the lower bound.
    assert intervals.share([1] * 10) == {"value": 1.0, "low": 0.7225, "high": 1.0}
    half = intervals.share([1, 0] * 50)
    assert half["value"] == 0.5 and abs(half["low"] - 0.4038) < 1e-3


def test_a_ratio_is_of_sums():
    assert intervals.ratio([1, 3], [2, 2])["value"] == 1.0
    assert np.isnan(intervals.ratio([0, 0], [0, 0])["value"])


def test_a_text_needs_a_value_for_each_slot_and_a_slot_for_each_value():
    prose = page.Prose({"models": "- {count:,} models of {width}, {environment.ROOT}"}, globals())
    shown = f"- 1,000 models of 64, {environment.ROOT}"
    assert prose("models", count=1000, width=64) == shown
    with pytest.raises(ValueError, match=r"no value for the slots \['width'\]"):
        prose("models", count=1)
    with pytest.raises(ValueError, match=r"no slot for the values \['depth'\]"):
        prose("models", count=1, width=2, depth=3)


@pytest.mark.parametrize("slug", reproduce.slugs())
def test_every_text_of_a_page_has_its_own_name_and_is_used(slug):
    (folder,) = (pathlib.Path(path, slug) for path in papers.__path__)
    named = set(re.findall(r'"(\w+)"', "".join(p.read_text() for p in folder.glob("*.py"))))
    sections = re.findall(r"^<!-- (\w+) -->$", (folder / "page.md").read_text(), re.MULTILINE)
    assert len(set(sections)) == len(sections) > 0
    assert [x for x in sections if not {x, x.removesuffix("_figure")} & named] == []


def test_a_claim_is_a_section_of_a_statement_a_condition_and_the_papers_figure():
    prose = page.Prose({"A1": "It rises\n\nby {bound}\n\n7 %", "A2": "It falls\n\nby 1"})
    assert prose.claim("A1", {}, required=True, bound=2) == Claim(
        "A1", "It rises", "by 2", {}, required=True, paper="7 %"
    )
    assert prose.claim("A2", {}).paper == "" and not prose.claim("A2", {}).required


def test_a_sweeps_text_names_a_part_and_what_it_needs():
    assert sweeps.after("full", "full,/data,judge") == "/data,judge"
    assert sweeps.after("full", "5") == sweeps.after("full", "synthetic,5") == ""
    with pytest.raises(ValueError, match="nothing follows 'full'"):
        sweeps.after("full", "full")


def test_a_stage_is_measured_once_for_the_same_settings(tmp_path):
    stages, calls = Stages(tmp_path), []

    def measure():
        calls.append(1)
        return {"n": len(calls)}

    assert stages.get("a", {"x": (1, 2)}, measure)["result"] == {"n": 1}
    assert stages.get("a", {"x": (1, 2)}, measure)["result"] == {"n": 1}
    assert stages.get("a", {"x": (1, 3)}, measure)["result"] == {"n": 2}


def test_papers_are_the_folders_that_measure_and_report(tmp_path, monkeypatch, capsys):
    known = reproduce.slugs()
    assert set(known) >= {"bam", "code_mix", "low_rank", "nexus", "preference", "snapkv"}
    for name in ("complete", "without_a_page"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "__init__.py").touch()
        (folder / "experiment.py").write_text(
            "TITLE, SEEDS, PARTS = 'A paper, 0000.00000', 2, {'one': 'a part'}\n"
            "def run(**settings):\n    return settings\n"
        )
    (tmp_path / "complete" / "report.py").write_text(
        "class REPORT:\n    claims = ()\n    def write(found, out, facts):\n        print(found)\n        return []\n"
    )
    monkeypatch.setattr(papers, "__path__", [*papers.__path__, str(tmp_path)])
    monkeypatch.setattr(environment, "prepare", lambda: None)
    assert set(reproduce.slugs()) - set(known) == {"complete"}
    model_dir = str(tmp_path / "runs")
    assert reproduce.main(["complete", f"--model_dir={model_dir}", f"--out={tmp_path}"]) == 0
    settings = {"model_dir": model_dir, "parts": ["one"], "seeds": 2, "workers": 1, "minutes": None}
    assert str(settings) in capsys.readouterr().out
    for flag in ("--seeds=3", "--workers=2", "--minutes=1"):
        assert reproduce.main(["complete", "--again", flag, f"--out={tmp_path}"]) == 2
        name = flag.partition("=")[0]
        assert f"{name} is of runs, and --again runs nothing" in capsys.readouterr().err


def test_results_are_one_table_with_pairs_of_the_seeds_that_all_arms_have():
    class Runs(Results):
        def row_scores(self, row):
            return {"loss": row["loss"]}

    losses = {("a", 0): 1.0, ("a", 1): None, ("a", 2): 3.0, ("b", 2): 2.0, ("b", 1): 5.0}
    runs = Runs([{"arm": arm, "seed": seed, "loss": x} for (arm, seed), x in losses.items()])
    assert list(runs.table) == ["arm", "size", "seed", "loss"] and len(runs.table) == 5
    assert [values.tolist() for values in runs.paired("loss", "a", "b")] == [[3.0], [2.0]]
    assert runs.values("a", "accuracy").size == 0 and runs.paired("loss", "a", "c")[0].size == 0
    (effect,) = runs.gain("here", "loss", "b", "a")
    assert effect.by_seed == {2: 1.0} and effect.why == "1 of 5 seeds"
    assert runs.missing(["a", "b", "c"], [0, 1]) == ["`b` (seed 0)", "`c`"]


def test_a_claim_is_judged_in_the_parts_that_measure_it_and_have_results():
    def measure(value, where):
        return [Effect(where=where, what="a number", by_seed={0: value}, above=1, exact=True)]

    spec = Claim("X1", "it is more than 1", "more", {"a": [measure], "b": [measure]}, required=True)
    places = {"a": "here", "b": "there"}
    both, one = (claim.judge([spec], found, places)[0] for found in ({"a": 0, "b": 2}, {"b": 2}))
    assert (both.verdict, one.verdict) == ("mixed", "holds")
    assert claim.unmet([both], ["a", "b"]) == ["X1 must hold, and its verdict is: mixed"]
    assert claim.unmet([one], ["a", "b"]) == ["X1 must hold, and part a has not measured it"]
