"""The reproductions' own parts: intervals, stages, tables of results, and the papers that the command knows."""

import importlib
import json
import pathlib
import re
import shutil
import sys

import numpy as np
import pytest

from espalier.launch import environment, papers, reproduce
from espalier.launch.papers.shared import page, sequential, sweeps
from espalier.launch.papers.shared.claim import Claim, Planned
from espalier.launch.papers.shared.results import Results, compare
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


class _Experiment:
    SEEDS = (5, 8)


def test_a_claim_is_a_section_of_a_statement_a_condition_and_the_papers_figure():
    sections = {"A1": "It rises\n\nby {bound}\n\n7 %", "A2": "It falls\n\nby 1"}
    prose = page.Prose(sections, {"experiment": _Experiment})
    planned = Planned(sd=1.0, expected=1.0, source="a pilot")
    one = prose.claim("A1", "p", compare, planned=planned, above=2, required=True, bound=2)
    assert (one.statement, one.condition, one.paper) == ("It rises", "by 2", "7 %")
    assert (one.looks, one.required, one.group, one.above) == ((5, 8), True, "of the paper", 2)
    other = prose.claim("A2", "p", compare, planned=planned, looks=[3], control=True)
    assert (other.paper, other.looks, other.required, other.group) == ("", (3,), False, "controls")


@pytest.mark.parametrize("slug", reproduce.slugs())
def test_every_claim_has_as_many_seeds_as_its_pilot_asks_for(slug):
    report = importlib.import_module(f"espalier.launch.papers.{slug}.report").REPORT
    for one in report.claims:
        # 0.8, less three standard errors of the simulation.
        assert one.power >= sequential.POWER - 0.006, one.name
        assert one.planned.source


def test_only_arms_of_undecided_claims_get_further_seeds(monkeypatch):
    class Experiment:
        SEEDS = (5, 8, 12)
        asked: list = []

        @staticmethod
        def run(*, seeds, parts, further=None, workers=1):
            Experiment.asked.append((seeds, tuple(parts), further))
            arms = ("a", "b", "c")
            if further is not None:
                arms = tuple(sorted(further.arms))
            gains = {"a": 0.0, "b": 1.0, "c": 0.0}
            return {
                "p": [
                    {
                        "arm": arm,
                        "seed": s,
                        "loss": 3 + gains[arm] + 0.4 * (-1) ** s * (arm == "c") * (s > 1),
                    }
                    for s in range(seeds)
                    for arm in (("a", "b", "c") if s < 5 else arms)
                ],
                **({"q": []} if "q" in parts else {}),
            }

    class Runs(Results):
        def row_scores(self, row):
            return {"loss": row["loss"]}

    planned = Planned(sd=1.0, expected=1.0, source="a pilot")
    texts = {"statement": "", "condition": "", "part": "p", "planned": planned, "looks": (5, 8, 12)}
    claims = [
        Claim(name="X1", measure=compare("loss", ("a", "b")), above=0.0, **texts),
        Claim(name="X2", measure=compare("loss", ("a", "c")), above=0.0, **texts),
    ]
    report = page.Report(
        **{
            "slug": "x",
            "title": "",
            "source": "",
            "claims": claims,
            "places": {"p": "here", "q": ""},
        },
        **{"read": lambda measured: {"p": Runs(measured["p"])}},
        **{"figures": lambda parts: {}, "setup": lambda parts: [], "tables": lambda parts: []},
    )
    measured = reproduce.measured(
        Experiment, report, {"seeds": 8, "parts": ["p", "q"], "workers": 2}
    )
    further = sweeps.Further(5, frozenset({"a", "c"}))
    assert Experiment.asked == [(5, ("p", "q"), None), (8, ("p",), further)]
    assert set(measured) == {"p", "q"} and len(measured["p"]) == 15 + 6
    assert [one.seeds for one in report.judge(measured)] == [5, 8]


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
            "TITLE, SEEDS, PARTS = 'A paper, 0000.00000', (2,), {'one': 'a part'}\n"
            "SWEEPS, EARLIER = {}, ()\n"
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
    settings = {"seeds": 2, "parts": ["one"], "model_dir": model_dir, "workers": 1, "minutes": None}
    assert str(settings) in capsys.readouterr().out
    for flag in ("--seeds=3", "--workers=2", "--minutes=1"):
        assert reproduce.main(["complete", "--again", flag, f"--out={tmp_path}"]) == 2
        name = flag.partition("=")[0]
        assert f"{name} is of runs, and --again runs nothing" in capsys.readouterr().err


_TWO_PARTS = """
from espalier.launch.papers.shared import page
from espalier.launch.papers.shared.claim import Claim, Planned
from espalier.launch.papers.shared.results import Results, compare

TITLE, SEEDS, SWEEPS, EARLIER = "Two parts", (5,), {}, ()
MEANWHILE = []
PARTS = {"one": "a part", "two": "another"}


class Runs(Results):
    def row_scores(self, row):
        return {"loss": row["loss"]}


def run(*, model_dir, seeds, parts, **settings):
    for meanwhile in MEANWHILE:
        meanwhile()
    gains = {"a": 0.0, "b": 1.0}
    return {
        part: [
            {"arm": arm, "seed": s, "loss": 3 + gain + 0.01 * s * gain}
            for s in range(seeds)
            for arm, gain in gains.items()
        ]
        for part in parts
    }


planned = Planned(sd=0.1, expected=1.0, source="a pilot")
REPORT = page.Report(
    slug="two_parts",
    title=TITLE,
    source="Here",
    claims=[
        Claim(
            name=name,
            statement="It rises",
            condition="by more than BOUND",
            part=part,
            measure=compare("loss", ("a", "b")),
            above=BOUND,
            required=True,
            planned=planned,
            looks=(5,),
        )
        for name, part in (("A1", "one"), ("A2", "two"))
    ],
    places={part: part for part in PARTS},
    read=lambda measured: {part: Runs(rows) for part, rows in measured.items()},
    figures=lambda parts: {},
    setup=lambda parts: [],
    tables=lambda parts: [],
    headline=None,
)
"""


def test_parts_of_a_paper_run_at_different_times_and_a_page_has_both(tmp_path, monkeypatch, capsys):
    folder, out = tmp_path / "papers" / "two_parts", tmp_path / "out"
    folder.mkdir(parents=True)
    (folder / "__init__.py").touch()
    monkeypatch.setattr(papers, "__path__", [*papers.__path__, str(folder.parent)])
    monkeypatch.setattr(environment, "prepare", lambda: None)

    def written(bound):
        names = [f"{papers.__name__}.two_parts{name}" for name in ("", ".experiment", ".report")]
        for name in names:
            sys.modules.pop(name, None)
        for name in ("experiment", "report"):
            (folder / f"{name}.py").write_text(_TWO_PARTS.replace("BOUND", bound))
        importlib.invalidate_caches()
        # Two versions of one length in one second would be one file of compiled code.
        shutil.rmtree(folder / "__pycache__", ignore_errors=True)

    def reproduced(part, place):
        return reproduce.main(
            ["two_parts", f"--parts={part}", f"--model_dir={tmp_path / place}", f"--out={out}"]
        )

    written("0.5")
    assert reproduced("one", "here") == 0
    first = json.loads((out / "two_parts/results.json").read_text())
    assert [one["verdict"] for one in first["claims"]] == ["holds", "not measured"]
    capsys.readouterr()
    assert reproduced("two", "there") == 0
    assert "results.json: one" in capsys.readouterr().out
    record = json.loads((out / "two_parts/results.json").read_text())
    assert [one["verdict"] for one in record["claims"]] == ["holds", "holds"]
    assert record["measured"]["one"] == first["measured"]["one"]
    assert list(record["measured"]) == ["one", "two"]
    assert [line.split()[3] for line in record["command"].splitlines()] == [
        "--parts=one",
        "--parts=two",
    ]
    shown = (out / "two_parts.md").read_text()
    assert (
        "those of the part `two` before its first run" in shown
        and "none has changed since" in shown
    )
    # The criteria of the first part are those of its own first run.
    assert record["criteria"]["date"] == first["criteria"]["date"]
    # A part that is written while another one runs is on the page too, with the date of its own criteria.
    (tmp_path / "there/two").mkdir()
    shutil.rmtree(out)
    experiment = sys.modules[f"{papers.__name__}.two_parts.experiment"]

    def meanwhile():
        experiment.MEANWHILE.clear()
        assert reproduced("one", "here") == 0

    experiment.MEANWHILE.append(meanwhile)
    other = dict.fromkeys(("date", "commit"), "2026-01-01 00:00 UTC")
    fixed = tmp_path / "here/criteria.json"
    fixed.write_text(json.dumps(json.loads(fixed.read_text()) | other))
    (tmp_path / "here/one").mkdir()
    assert reproduced("two", "there") == 0
    both = json.loads((out / "two_parts/results.json").read_text())
    assert both["measured"] == record["measured"] and len(both["command"].splitlines()) == 2
    assert both["criteria"]["later"]["one"]["date"] == other["date"]
    # --again looks anew at what changed, and at the commit.
    path = out / "two_parts/results.json"
    old = {**both["criteria"], "commit": "0" * 40, "design": {"one": "other runs"}, "changed": []}
    path.write_text(json.dumps({**both, "criteria": old}))
    assert reproduce.main(["two_parts", "--again", f"--out={out}"]) == 0
    shown = (out / "two_parts.md").read_text()
    assert "changed since: the runs of the part `one`" in shown
    assert "at commit 0000000000 (not in this repository's history)" in shown
    path.write_text(json.dumps(both))
    # A part whose bound is another now is not kept, and nothing is lost.
    written("0.6")
    assert reproduced("two", "elsewhere") == 2
    error = capsys.readouterr().err
    assert (
        "has the parts one, and the claim A1 changed since they were judged" in error
        and "--out" in error
    )
    assert json.loads((out / "two_parts/results.json").read_text()) == both


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
    assert effect.by_seed == {2: 1.0}
    assert runs.missing(["a", "b", "c"], 2) == ["`b` (seed 0)", "`c`"]
