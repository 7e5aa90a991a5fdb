"""The code-mix reproduction: scoring, verdicts and report on hand-made results, and two arms from end to end."""

import json
import pathlib

import gin
import numpy as np
import pytest

from data.code_mix import skill_sources, skills
from launch.evaluation import skills as evaluate_skills
from launch.papers.code_mix import measure, page
from launch.papers.code_mix.arms import Results
from launch.papers.code_mix.sweep import SHARES
from launch.plots import intervals
from launch.run import load_run
from launch.sweeping import file

SWEEP = "launch/papers/code_mix/sweep.py"
PACKAGES = "launch/papers/code_mix/packages_sweep.py"


@pytest.fixture(autouse=True)
def clean_gin():
    yield
    gin.clear_config(clear_constants=True)


def test_students_interval_at_known_values():
    # The mean of 1, 2, 3 is 2, its standard error 1 / sqrt(3), and t of two degrees 4.3027.
    assert intervals.over_seeds([1, 2, 3]) == {"value": 2.0, "low": -0.4841, "high": 4.4841}
    assert intervals.over_seeds([0.25]) == {"value": 0.25, "low": 0.25, "high": 0.25}


def test_a_sign_test_counts_the_outcomes_of_fair_coins():
    assert intervals.sign_test([1.0, 2.0, 0.5]) == 1 / 8
    assert intervals.sign_test([1.0, -2.0, 0.5]) == 4 / 8
    assert intervals.sign_test([0.0, 1.0, 1.0]) == 4 / 8  # a tie is no win
    assert intervals.sign_test([1] * 9 + [-1]) == 11 / 1024
    assert intervals.significant([1, 1, 1]) and not intervals.significant([1, 1, 0])
    assert intervals.significant([1] * 5) and intervals.significant([1] * 9 + [-1])
    assert not intervals.significant([1] * 5 + [-1] * 2) and not intervals.significant([])


def test_answers_are_scored_by_skill_and_kind():
    asked = skills.problems("knowledge") + skills.problems("code")
    right = [problem.answer for problem in asked]
    found = evaluate_skills.score(asked, right)
    assert {name: (one["exact"], one["problems"]) for name, one in found.items()} == {
        "knowledge": (1.0, 192),
        "code": (1.0, 600),
    }
    half = ["" if n < 192 and n % 2 else answer for n, answer in enumerate(right)]
    half[192:392] = ["?"] * 200  # the first procedure of three
    found = evaluate_skills.score(asked, half)
    assert found["knowledge"]["by_kind"] == {f"quarter {n}": 0.5 for n in (1, 2, 3, 4)}
    assert found["code"]["by_kind"] == {"shift": 0.0, "reverse": 1.0, "sort": 1.0}
    assert found["code"]["exact"] == 0.6667


# Scores (reasoning, knowledge, code) with which all claims hold, by arm.
ALL_HOLD = {
    **{
        f"share_{share}": scores
        for share, scores in zip(
            SHARES,
            [
                (0.2, 0.6, 0.0),
                (0.4, 0.5, 0.3),
                (0.5, 0.4, 0.4),
                (0.4, 0.2, 0.5),
                (0.2, 0.1, 0.6),
                (0, 0, 0.7),
            ],
            strict=True,
        )
    },
    "code_markup": (0, 0, 0.6),
    "code_adjacent": (0, 0, 0.65),
    "code_synth": (0, 0, 0.75),
    "synth": (0, 0, 0.9),
    "balanced_synth": (0.55, 0.4, 0.5),
    "text_only": (0.4, 0.8, 0.0),
    "balanced_only": (0.6, 0.7, 0.8),
    "balanced_to_text": (0.7, 0.8, 0.5),
    "code_to_text": (0.6, 0.7, 0.6),
    "balanced_synth_to_text": (0.75, 0.8, 0.6),
    "text_only_cooldown": (0.45, 0.85, 0.1),
    "balanced_only_cooldown": (0.6, 0.75, 0.7),
    "balanced_to_text_cooldown": (0.72, 0.85, 0.6),
    "code_to_text_cooldown": (0.6, 0.75, 0.6),
    "balanced_to_text_cooldown_without_code": (0.72, 0.85, 0.5),
}
BITS = {
    "text_only": (2.0, 3.5),
    "balanced_only": (2.2, 2.5),
    "balanced_to_text": (1.9, 2.8),
    "code_to_text": (1.95, 2.9),
}


def rows(scores=ALL_HOLD, seeds=3):
    """Rows of the sweep as `measure.run` has them, each seed a little different."""
    out = []
    for run in file.read(f"{SWEEP}:{seeds}"):
        width = int(run.size.removeprefix("width"))
        reasoning, knowledge, code = np.array(scores[run.arm]) + 0.001 * run.seed
        exact = (reasoning, knowledge + (width - 64) / 200, code)
        out.append(
            _row(run)
            | {
                "evaluations": {
                    "skills": {
                        group: {"exact": float(value)}
                        for group, value in zip(
                            ("reasoning", "knowledge", "code"), exact, strict=True
                        )
                    }
                },
            }
        )
    return out


def package_rows():
    return [
        _row(run)
        | {
            "evaluations": {},
            "held_out": {
                domain: {"bits_per_byte": BITS[run.arm][domain in ("python", "cpp", "markup")]}
                for domain in ("english", "docstrings", "python", "cpp", "markup")
            },
        }
        for run in file.read(PACKAGES)
    ]


def _row(run):
    return {
        "run": run.name,
        "arm": run.arm,
        "size": run.size,
        "seed": run.seed,
        "parents": [],
        "tokens": 1000,
        "tokens_total": 1000,
        "epochs_total": {"skill_text": 0.5},
        "seconds": 30.0,
        "held_out": {},
        "asked": {"skill_text": 0.5, "skill_web_code": 0.5},
        "read": {"skill_text": 0.501, "skill_web_code": 0.499},
        "learning_rates": [(1, 0.001), (200, 0.01), (400, 0.001)],
    }


def verdicts(found):
    return {claim.name: claim.verdict for claim in page.REPORT.judge(found)}


def test_claims_hold_where_every_seed_says_so_and_are_reported_with_their_plots(tmp_path):
    found = {"skills": rows(), "packages": package_rows()}
    judged = page.write(found, tmp_path, {"command": "a command", "versions": {"jax": "1"}})
    assert {claim.name: claim.verdict for claim in judged} == dict.fromkeys(
        (claim.name for claim in judged), "holds"
    )
    assert {c.name for c in judged if c.required} == {"C0", "C1a", "C2a", "C2b", "C3a"}
    record = json.loads((tmp_path / "code_mix" / "results.json").read_text())
    assert len(record["runs"]) == 27 * 3 + 4 * 3 and record["command"] == "a command"
    text = (tmp_path / "code_mix.md").read_text()
    plots = sorted(path.name for path in (tmp_path / "code_mix").glob("*.png"))
    assert len(plots) == 7 and all(f"(code_mix/{name})" in text for name in plots)
    assert "| balanced → text, width96 |" in text


def test_a_claim_fails_where_a_seed_disagrees():
    found = rows({**ALL_HOLD, "share_75": (0.4, 0.2, 0.35), "share_100": (0, 0.4, 0.95)})
    changed = verdicts({"skills": found})
    assert changed["C2b"] == "fails"  # 100 % code knows
    assert changed["C3a"] == "fails"  # web code beats synth
    assert changed["C2a"] == "mixed"  # 12 of 15 neighbours still rise, p = 0.018, but a mean falls
    (worst,) = (r for r in found if r["run"] == "balanced_only/width64/seed1")
    worst["evaluations"]["skills"]["code"]["exact"] = 0.55
    changed = verdicts({"skills": found})
    assert changed["C1a"] == "mixed"  # one seed is below code → text, none below the others
    found[0]["read"] = {"skill_text": 0.51, "skill_web_code": 0.49}
    assert verdicts({"skills": found})["C0"] == "fails"


def test_nothing_measured_is_said_to_be_so(tmp_path):
    assert set(verdicts({}).values()) == {"not measured"}
    page.write({}, tmp_path, {"command": "a command", "versions": {}})
    assert "- Not measured." in (tmp_path / "code_mix.md").read_text()


def test_pairs_are_of_the_same_seeds():
    found = Results([row for row in rows() if row["run"] != "share_0/width64/seed1"])
    ones, others = found.paired("code", "share_100", "share_0")
    assert ones.tolist() == pytest.approx([0.7, 0.702])
    assert others.tolist() == pytest.approx([0.0, 0.002])


def test_a_sweep_is_reported_with_its_figures_in_one_file(tmp_path):
    drawn = page.write_sweeps(rows(), tmp_path)
    assert drawn == [
        "recipes.png",
        "phases.png",
        "proportion.png",
        "quality.png",
        "cooldown.png",
        "scale.png",
    ]
    text = (tmp_path / "report.html").read_text()
    assert text.count("data:image/png;base64,") == 6 and "<table>" in text
    with pytest.raises(ValueError, match="finished arms are text"):
        page.write_sweeps(
            [{**_row(file.read(PACKAGES)[0]), "arm": "text", "evaluations": {}}], tmp_path
        )


def test_scores_of_benchmarks_are_averaged_by_group_as_far_as_none_is_missing():
    answers = {name: {"score": 0.25} for name in ("trivia_qa", "nq_open", "boolq")}
    evaluations = {
        "suite": {"benchmarks": answers | {"nq_open": {"score": 0.75}}},
        "humaneval": {"problems": "humaneval", "pass_at_k": {"1": 0.2}},
        "mbpp": {"problems": "mbpp", "pass_at_k": {"1": 0.6}},
    }
    run = file.read(PACKAGES)[0]
    found = Results([{**_row(run), "size": "470m", "evaluations": evaluations}])
    assert found.groups == ("knowledge", "code") and found.main == "470m"
    assert found.scores(run.arm, "knowledge").to_dict() == {run.seed: 0.5}
    assert found.scores(run.arm, "code").to_dict() == {run.seed: pytest.approx(0.4)}
    with pytest.raises(ValueError, match="no score of reasoning"):
        found.scores(run.arm, "reasoning")


def test_the_full_sweep_has_every_arm_of_the_paper_after_what_it_starts_from():
    runs = file.read("launch/papers/code_mix/full_sweep.py:/data")
    assert len(runs) == 20 + 6 and all("DATA_ROOT='/data'" in run.bindings for run in runs)
    parents = {
        run.arm: run.parent for run in runs if run.size == "2p8b" or run.arm.endswith("_code")
    }
    assert parents["balanced_to_text"] == "share_50/2p8b/seed0"
    assert parents["code_to_text"] == "code_markup/2p8b/seed0"
    assert parents["balanced_to_text_cooldown_without_code"] == "balanced_to_text/470m/seed0"
    names = [run.name for run in runs]
    assert all(names.index(run.parent) < names.index(run.name) for run in runs if run.parent)


def test_the_sweeps_share_what_runs_start_from_and_phases_go_on(tmp_path):
    from launch.sweeping import check
    from launch.sweeping.folder import SweepFolder

    runs = file.read(f"{SWEEP}:2")
    assert len(runs) == 27 * 2 and len(file.read(f"{PACKAGES}:2")) == 4 * 2
    files = [pathlib.Path(name) for run in runs for name in run.gin_files]
    assert all(path.is_file() for path in files)  # each is checked with all other configurations
    line = ("share_50", "balanced_to_text", "balanced_to_text_cooldown")
    chosen = [run for run in runs if run.arm in line and run.size == "width64" and run.seed == 1]
    assert [run.parent for run in chosen] == [None, *(run.name for run in chosen[:2])]
    plan = check.plan(SWEEP, chosen, SweepFolder(tmp_path))
    assert [entry.total_steps for entry in plan] == [400, 400, 80]
    for entry in plan[1:]:
        assert (entry.start["initial_scope"], entry.start["initial_data"]) == ("phase", "continue")


def test_an_arm_and_its_cooldown_from_end_to_end(train, tmp_path):
    def run(arm, *bindings):
        settings = (
            f"MODEL_DIR={str(tmp_path / arm)!r}",
            f"skill_sources.register.documents={dict.fromkeys(skill_sources.DOCUMENTS, 64)}",
            "BATCH_SIZE=8",
            "TRAIN_STEPS=2",
            "EVAL_STEPS=1",
            "LOG_PERIOD=1",
            "WIDTH=16",
            "MLP_WIDTH=16",
            *bindings,
        )
        file = f"--gin_file=t5x_configs/experiments/code_mix/cpu/{arm}.gin"
        result = train(file, *(f"--gin.{binding}" for binding in settings))
        assert result.status == 0, result.err
        return tmp_path / arm

    parent = run("share_50", "WARMUP_STEPS=1")
    child = run("cooldown_with_code", f"INITIAL_CHECKPOINT_PATH={str(parent)!r}")
    found = evaluate_skills.evaluate(str(child))
    assert {skill: one["problems"] for skill, one in found.items()} == {
        "reasoning": 600,
        "knowledge": 192,
        "code": 600,
    }
    assert all(one["exact"] < 0.05 for one in found.values())  # after four updates
    epochs = {"skill_text": 0.25, "skill_web_code": 0.25, "skill_synth": 0.25}
    row = measure.with_data({"step": 2, "epochs": epochs}, child)
    assert row["asked"] == pytest.approx(
        {"skill_text": 0.8, "skill_web_code": 0.1, "skill_synth": 0.1}
    )
    assert sum(row["read"].values()) == pytest.approx(1.0)
    of_parent = measure.with_data({"step": 2, "epochs": {"skill_text": 0.5}}, parent)
    rates = [rate for _, rate in of_parent["learning_rates"]]
    assert row["learning_rates"][0] == (
        1,
        pytest.approx(1e-3),
    )  # a tenth of the peak: where it stopped
    assert rates[-1] == pytest.approx(1e-2)  # of the second update: the peak


def test_a_run_of_other_documents_is_refused(trained_run):
    with pytest.raises(load_run.LoadError, match="not on the documents of"):
        evaluate_skills.evaluate(trained_run.path)
