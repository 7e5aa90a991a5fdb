"""The code-mix reproduction: scoring, verdicts and report on hand-made results, and two arms from end to end."""

import json
import pathlib

import numpy as np
import pytest

from espalier.data import tasks
from espalier.data.code_mix import skills
from espalier.launch.code_mix import skills as evaluate_skills
from espalier.launch.config import gin_config
from espalier.launch.load import load_run
from espalier.launch.papers.code_mix import experiment, judged, report, skill_sources
from espalier.launch.papers.code_mix.experiment import (
    ANSWERS,
    JUDGED,
    PHASES,
    PLAIN,
    SHARES,
    Results,
    wins,
)
from espalier.launch.plots import intervals
from espalier.launch.sweep import file

SWEEP = "launch/papers/code_mix/experiment.py"
FULL = "launch/papers/code_mix/experiment.py:full,"
FACTS = {"command": "a command", "versions": {"jax": "1"}}


@pytest.fixture(autouse=True)
def clean():
    yield
    tasks.clear()


def test_students_interval_at_known_values():
    # The mean of 1, 2, 3 is 2, its standard error 1 / sqrt(3), and t of two degrees 4.3027.
    assert intervals.over_seeds([1, 2, 3]) == {"value": 2.0, "low": -0.4841, "high": 4.4841}
    assert intervals.over_seeds([0.25]) == {"value": 0.25, "low": 0.25, "high": 0.25}


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
    by_kind = found["code"]["by_kind"]
    assert by_kind["shift"] == by_kind["shift, rare case"] == 0.0
    assert by_kind["sort"] == by_kind["reverse, rare case"] == 1.0
    assert found["code"]["exact"] == 0.6667


def test_a_model_that_copies_careless_programs_is_right_in_plain_cases_alone():
    asked = skills.problems("code")
    copied = [
        "=" + skills.PROCEDURES[one.kind.partition(",")[0]].careless(one.prompt[-4:-1])
        for one in asked
    ]
    found = evaluate_skills.score(asked, copied)
    assert 0.65 < found["code"]["exact"] < 0.8
    runs = Results([{**row("a"), "evaluations": {"skills": {**SKILLS, **found}}}])
    assert runs.values("a", PLAIN).tolist() == [1.0]


SKILLS = {group: {"exact": 0.5, "by_kind": {"sort": 0.5}} for group in ("reasoning", "knowledge")}
# Scores (reasoning, knowledge, code) with which all claims hold, by arm.
ALL_HOLD = {
    **{
        f"share_{share}": scores
        for share, scores in zip(
            SHARES,
            [(0.2, 0.6, 0.0), (0.4, 0.57, 0.3), (0.5, 0.5, 0.4), (0.4, 0.3, 0.5), (0, 0, 0.6)],
            strict=True,
        )
    },
    "code_markup": (0, 0, 0.5),
    "code_adjacent": (0, 0, 0.55),
    "code_synth": (0, 0, 0.65),
    "synth": (0, 0, 0.9),
    "balanced_synth": (0.55, 0.4, 0.5),
    "text_only": (0.4, 0.8, 0.0),
    "balanced_only": (0.6, 0.7, 0.8),
    "balanced_to_text": (0.7, 0.8, 0.5),
    "code_to_text": (0.6, 0.7, 0.6),
    "balanced_synth_to_text": (0.75, 0.8, 0.6),
    "text_only_cooldown": (0.45, 0.85, 0.1),
    "balanced_to_text_cooldown": (0.72, 0.85, 0.6),
    "balanced_to_text_cooldown_without_code": (0.72, 0.85, 0.5),
}


def rows(scores=ALL_HOLD, seeds=5):
    """Rows of the sweep as `experiment.run` has them, each seed and arm a little different."""
    out = []
    rng = np.random.default_rng(0)
    for run in file.read(f"{SWEEP}:{seeds}"):
        noise = 0.001 * run.seed + 0.001 * rng.normal()
        found = {
            group: {"exact": float(value + noise), "by_kind": {"sort": float(value + noise)}}
            for group, value in zip(
                ("reasoning", "knowledge", "code"), scores[run.arm], strict=True
            )
        }
        evaluations = {"skills": found} | ({ANSWERS: 200} if run.arm in JUDGED else {})
        out.append(row(run.arm, run.seed) | {"evaluations": evaluations, "judged": {}})
        if run.arm in JUDGED:
            out[-1]["judged"] = {
                other: {"win": 0.3 + won, "tie": 0.4 - won, "loss": 0.3}
                for other in JUDGED
                for won in [sum(scores[run.arm]) / 4 - sum(scores[other]) / 4 + noise]
                if other != run.arm
            }
    return out


def row(arm, seed=10):
    phase = next((n for n, arms in enumerate(PHASES, 1) if arm in arms), 1)
    return {
        "run": f"{arm}/seed{seed}",
        "arm": arm,
        "size": None,
        "seed": seed,
        "parents": [],
        "tokens": 1000,
        "loss_tokens": 990,
        "loss_tokens_total": 990 * phase + seed % 3,
        "epochs_total": {"skill_text": 0.5},
        "seconds": 30.0,
        "held_out": {},
        "asked": {"skill_text": 0.5, "skill_web_code": 0.5},
        "read": {"skill_text": 0.501, "skill_web_code": 0.499},
        "learning_rates": [(1, 0.001), (200, 0.01), (400, 0.001)],
    }


def verdicts(found):
    return {claim.name: claim.verdict for claim in report.REPORT.judge(found)}


def test_claims_hold_where_they_are_clear_and_are_reported_with_their_plots(tmp_path):
    judged_claims = report.REPORT.write({"skills": rows()}, tmp_path, FACTS)
    assert {claim.name: claim.verdict for claim in judged_claims} == dict.fromkeys(
        (claim.name for claim in judged_claims), "holds"
    )
    assert {c.name for c in judged_claims if c.required} == {"C0", "C1a", "C2a", "C2b", "C3a"}
    record = json.loads((tmp_path / "code_mix" / "results.json").read_text())
    assert len(record["measured"]["skills"]) == 18 * 5 and record["command"] == "a command"
    text = (tmp_path / "code_mix.md").read_text()
    plots = sorted(path.name for path in (tmp_path / "code_mix").glob("*.png"))
    assert len(plots) == 7 and all(f"(code_mix/{name})" in text for name in plots)
    assert "| balanced → text |" in text


def test_claims_fail_or_stay_undecided_with_their_effects():
    changed = verdicts({"skills": rows({**ALL_HOLD, "synth": (0, 0, 0.5)})})
    assert changed["C3a"] == "fails"
    changed = verdicts({"skills": rows({**ALL_HOLD, "share_25": (0.1, 0.29, 0.3)})})
    assert changed["C2b"] == changed["C2c"] == "mixed" and changed["C2d"] == "fails"
    found = rows()
    for one in found:
        if one["arm"] == "balanced_only":  # better in two seeds, far worse in three
            one["evaluations"]["skills"]["code"]["exact"] = 0.9 if one["seed"] < 12 else 0.4
    assert verdicts({"skills": found})["C1a"] == "undecided"
    found[0]["read"] = {"skill_text": 0.51, "skill_web_code": 0.49}
    assert verdicts({"skills": found})["C0"] == "undecided"  # in one seed
    short = [one | {"loss_tokens_total": 660} if one["arm"] == "synth" else one for one in rows()]
    assert verdicts({"skills": short})["C0"] == "mixed"
    assert verdicts({"skills": rows(seeds=4)})["C1a"] == "not measured"


def test_a_model_that_learned_nothing_gives_no_verdict():
    found = rows({**ALL_HOLD, "synth": (0, 0, 0.0)})
    (claim,) = [one for one in report.REPORT.judge({"skills": found}) if one.name == "C3a"]
    assert claim.verdict == "not measured" and "has learned no skill" in claim.effects[0].why


def test_nothing_measured_is_said_to_be_so(tmp_path):
    assert set(verdicts({}).values()) == {"not measured"}
    report.REPORT.write({}, tmp_path, {**FACTS, "versions": {}})
    assert "- Not measured." in (tmp_path / "code_mix.md").read_text()


def test_pairs_are_of_the_same_seeds():
    found = Results([one for one in rows() if one["run"] != "share_0/seed11"])
    assert [len(values) for values in found.paired("code", "share_100", "share_0")] == [4, 4]


def test_shuffled_arms_keep_their_comparisons():
    shuffled = report.REPORT.shuffle({"skills": rows()}, np.random.default_rng(0))["skills"]
    for one in shuffled:
        source = one["run"].partition("/")[0]
        for other in (two for two in shuffled if two["seed"] == one["seed"]):
            if one["arm"] != other["arm"] and source in JUDGED and other["arm"] in one["judged"]:
                original = other["run"].partition("/")[0]
                gap = sum(ALL_HOLD[source]) / 4 - sum(ALL_HOLD[original]) / 4
                assert one["judged"][other["arm"]]["win"] - 0.3 == pytest.approx(gap, abs=0.03)


def test_the_judge_counts_right_words_and_both_directions_agree(tmp_path):
    given = skills.instructions()
    right = [one.answer for one in given]
    half = ["x" + text[text.find(" ") :] if " " in text else text for text in right]
    shares = judged.compared({"good": right, "half": half, "same": right}, tmp_path)
    assert shares["good"]["same"] == {"win": 0.0, "tie": 1.0, "loss": 0.0}
    assert shares["good"]["half"] == {"win": 0.75, "tie": 0.25, "loss": 0.0}
    assert shares["half"]["good"] == {"win": 0.0, "tie": 0.25, "loss": 0.75}
    found = experiment.with_judgements(
        [
            row(arm) | {"evaluations": {ANSWERS: texts}}
            for arm, texts in (("text_only", half), ("balanced_only", right))
        ],
        tmp_path,
    )
    runs = Results(found)
    assert runs.values("balanced_only", wins("text_only")).tolist() == [0.75]
    assert runs.values("text_only", wins("text_only")).tolist() == [0.0]


def test_a_sweep_is_reported_with_the_papers_figures(tmp_path):
    lines = report.lines_of(rows(), tmp_path)
    drawn = [line.partition("](")[2][:-1] for line in lines if line.startswith("![")]
    assert drawn == [
        *("recipes.png", "phases.png", "proportion.png"),
        *("quality.png", "cooldown.png", "win_rates.png"),
    ]
    assert all((tmp_path / name).exists() for name in drawn)
    assert lines[-3].startswith("| ")
    assert report.lines_of([{**row("text"), "evaluations": {}}], tmp_path) == []


def test_a_sweep_over_sizes_has_a_figure_of_them(tmp_path):
    sized = [{**one, "size": size} for one in rows(seeds=1) for size in ("470m", "2p8b")]
    text = "\n".join(report.lines_of(sized, tmp_path))
    assert "scale.png" in text
    assert "| balanced → text, 2p8b |" in text


def test_scores_of_benchmarks_are_averaged_by_group_as_far_as_none_is_missing():
    answers = {name: {"score": 0.25} for name in ("trivia_qa", "nq_open", "boolq")}
    evaluations = {
        "suite": {"benchmarks": answers | {"nq_open": {"score": 0.75}}},
        "humaneval": {"problems": "humaneval", "pass_at_k": {"1": 0.2}},
        "mbpp": {"problems": "mbpp", "pass_at_k": {"1": 0.6}},
    }
    found = Results([{**row("text_only"), "size": "470m", "evaluations": evaluations}])
    assert found.groups == ("knowledge", "code") and found.main == "470m"
    assert found.scores("text_only", "knowledge").to_dict() == {10: 0.5}
    assert found.scores("text_only", "code").to_dict() == {10: pytest.approx(0.4)}
    with pytest.raises(ValueError, match="no score of reasoning"):
        found.scores("text_only", "reasoning")


def test_the_full_sweep_has_every_arm_of_the_paper_after_what_it_starts_from():
    runs = file.read(f"{FULL}/data")
    assert len(runs) == 20 + 6 and all("DATA_ROOT='/data'" in run.bindings for run in runs)
    parents = {
        run.arm: run.parent for run in runs if run.size == "2p8b" or run.arm.endswith("_code")
    }
    assert parents["balanced_to_text"] == "share_50/2p8b/seed0"
    assert parents["code_to_text"] == "code_markup/2p8b/seed0"
    assert parents["balanced_to_text_cooldown_without_code"] == "balanced_to_text/470m/seed0"
    names = [run.name for run in runs]
    assert all(names.index(run.parent) < names.index(run.name) for run in runs if run.parent)


def test_with_a_judge_the_full_sweep_compares_the_answers_of_all_recipes():
    runs = file.read(f"{FULL}/data,openai:https://host/v1,model=NAME")
    made = {run.arm: run for run in runs if run.made}
    assert len(made) == 10 and {run.size for run in made.values()} == {"470m"}
    judging = made["win_rates"].made
    assert judging[2:5] == (
        "espalier.launch.evaluate",
        "win_rate",
        "--judge=openai:https://host/v1,model=NAME",
    )
    assert "text_only={answers_text_only}" in judging
    assert set(made["win_rates"].above) == {f"answers_{arm}/470m/seed0" for arm in ARMS_OF_FULL}
    assert "--inputs=/data/eval/dolly_200.jsonl" in made["answers_text_only"].made
    assert made["answers_text_only"].above == ("text_only/470m/seed0",)


ARMS_OF_FULL = (
    *("text_only", "balanced_only", "balanced_to_text", "code_to_text"),
    *("text_only_cooldown", "balanced_only_cooldown", "balanced_to_text_cooldown"),
    *("code_to_text_cooldown", "balanced_to_text_cooldown_without_code"),
)


def test_the_sweep_shares_what_runs_start_from_and_phases_go_on(tmp_path):
    from espalier.launch.sweep import check
    from espalier.launch.sweep.folder import SweepFolder

    runs = file.read(f"{SWEEP}:2")
    assert len(runs) == 18 * 2 and {run.seed for run in runs} == {10, 11}
    assert {arm for arms in PHASES for arm in arms} == {run.arm for run in runs}
    files = [pathlib.Path(name) for run in runs for name in run.gin_files]
    assert all(path.is_file() for path in files)  # each is checked with all other configurations
    line = ("share_50", "balanced_to_text", "balanced_to_text_cooldown")
    chosen = [run for run in runs if run.arm in line and run.seed == 11]
    assert [run.parent for run in chosen] == [None, *(run.name for run in chosen[:2])]
    plan = check.plan(SWEEP, chosen, SweepFolder(tmp_path))
    assert [entry.total_steps for entry in plan] == [None] * 3  # they follow from the tokens
    for entry in plan[1:]:
        assert (entry.start["initial_scope"], entry.start["initial_data"]) == ("phase", "continue")


@pytest.mark.parametrize("arm", ["share_100", "synth", "code_adjacent"])
def test_arms_read_as_many_tokens_with_a_loss(arm, tmp_path):
    """Counted in their batches: rows that are less full take more steps."""
    bindings = (
        f"MODEL_DIR={str(tmp_path)!r}",
        f"skill_sources.register.documents={dict.fromkeys(skill_sources.DOCUMENTS, 512)}",
        f"stream.make_stream.cache_dir={str(tmp_path / 'cache')!r}",
        "TRAIN_TOKENS=60e3",
    )
    (planned,) = (run for run in file.read(f"{SWEEP}:1") if run.arm == arm)
    bindings = (*planned.bindings, *bindings)
    config = gin_config.load(planned.gin_files, bindings, entry="espalier.launch.train:train")
    arguments = config.arguments()
    for register in arguments["tasks"]:
        register()
    stream, tokens = arguments["stream"](), arguments["total_tokens"]
    batches = (
        stream.batch(s, 0, stream.batch_size) for s in range(stream.steps_for_tokens(tokens))
    )
    read = sum(batch["decoder_loss_weights"].sum() for batch in batches)
    assert abs(read - tokens) <= stream.batch_size * stream.length


def test_an_arm_and_its_cooldown_from_end_to_end(train, tmp_path):
    def run(arm, *bindings):
        (planned,) = (run for run in file.read(f"{SWEEP}:1") if run.arm == arm)
        settings = (
            *planned.bindings,
            f"MODEL_DIR={str(tmp_path / arm)!r}",
            f"skill_sources.register.documents={dict.fromkeys(skill_sources.DOCUMENTS, 64)}",
            "BATCH_SIZE=8",
            "TRAIN_STEPS=2",
            "TRAIN_TOKENS=None",
            "EVAL_STEPS=1",
            "LOG_PERIOD=1",
            "WIDTH=16",
            "MLP_WIDTH=16",
            *bindings,
        )
        files = (f"--gin_file={name}" for name in planned.gin_files)
        result = train(*files, *(f"--gin.{binding}" for binding in settings))
        assert result.status == 0, result.err
        return tmp_path / arm

    parent = run("share_50", "WARMUP_STEPS=1")
    child = run("text_only_cooldown", f"INITIAL_CHECKPOINT_PATH={str(parent)!r}")
    found = evaluate_skills.evaluate(str(child))
    assert {skill: one["problems"] for skill, one in found.items()} == {
        "reasoning": 600,
        "knowledge": 192,
        "code": 600,
    }
    assert all(one["exact"] < 0.05 for one in found.values())  # after four updates
    assert len(evaluate_skills.answers(str(child))) == 200
    epochs = {"skill_text": 0.25, "skill_web_code": 0.25, "skill_synth": 0.25}
    one = experiment.with_data({"step": 2, "epochs": epochs}, child)
    assert one["asked"] == pytest.approx(
        {"skill_text": 0.8, "skill_web_code": 0.1, "skill_synth": 0.1}
    )
    assert sum(one["read"].values()) == pytest.approx(1.0)
    of_parent = experiment.with_data({"step": 2, "epochs": {"skill_text": 0.5}}, parent)
    rates = [rate for _, rate in of_parent["learning_rates"]]
    assert one["learning_rates"][0] == (
        1,
        pytest.approx(1e-3),
    )  # a tenth of the peak: where it stopped
    assert rates[-1] == pytest.approx(1e-2)  # of the second update: the peak


def test_a_run_of_other_documents_is_refused(trained_run):
    with pytest.raises(load_run.LoadError, match="not on the documents of"):
        evaluate_skills.evaluate(trained_run.path)
