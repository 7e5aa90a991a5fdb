"""The code-mix reproduction: scoring, verdicts and report on hand-made results, and two arms from end to end."""

import json
import pathlib

import numpy as np
import pytest

from espalier.data import tasks
from espalier.data.code_mix import skills
from espalier.data.tokenizers import vocabularies
from espalier.launch.code_mix import skills as evaluate_skills
from espalier.launch.config import gin_config
from espalier.launch.load import load_run
from espalier.launch.papers.code_mix import experiment, figures, judged, report, skill_sources
from espalier.launch.papers.code_mix.experiment import ANSWERS, JUDGED, PHASES, SHARES
from espalier.launch.papers.code_mix.scores import (
    ANSWER_LOSSES,
    ASKED,
    CODE_LOSS,
    PLAIN,
    SHARE_ERROR,
    SORTING,
    Results,
    copied,
    wins,
)
from espalier.launch.papers.shared import criteria
from espalier.launch.plots import intervals
from espalier.launch.sweep import file

SWEEP = "launch/papers/code_mix/experiment.py:"
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
    losses = [float(problem.skill == "code") for problem in asked]
    found = evaluate_skills.score(asked, right, losses)
    assert {n: (one["exact"], one["loss"], one["problems"]) for n, one in found.items()} == {
        "knowledge": (1.0, 0.0, 192),
        "code": (1.0, 1.0, 600),
    }
    half = ["" if n < 192 and n % 2 else answer for n, answer in enumerate(right)]
    half[192:392] = ["?"] * 200  # the first procedure of three
    losses[192:392] = [4.0] * 200
    found = evaluate_skills.score(asked, half, losses)
    assert found["knowledge"]["by_kind"] == {f"quarter {n}": 0.5 for n in (1, 2, 3, 4)}
    by_kind = found["code"]["by_kind"]
    assert by_kind["shift"] == by_kind["shift, rare case"] == 0.0
    assert by_kind["sort"] == by_kind["reverse, rare case"] == 1.0
    assert (found["code"]["exact"], found["code"]["loss"]) == (0.6667, 2.0)
    assert found["code"]["loss_by_kind"]["shift"] == 4.0
    assert found["code"]["loss_by_kind"]["sort, rare case"] == 1.0


def test_a_model_that_copies_careless_programs_is_right_in_plain_cases_alone():
    asked = skills.problems("code")
    continued = [
        "=" + skills.PROCEDURES[one.kind.partition(",")[0]].careless(one.prompt[-4:-1])
        for one in asked
    ]
    losses = [9.0 if skills.RARE in one.kind else 0.5 for one in asked]
    found = evaluate_skills.score(asked, continued, losses)
    assert found["code"]["exact"] == pytest.approx(copied(), abs=1e-4) and 0.65 < copied() < 0.8
    one = row("a")
    one["evaluations"]["skills"]["code"] = found["code"]
    runs = Results([one])
    assert runs.values("a", PLAIN).tolist() == [1.0]
    assert runs.values("a", ANSWER_LOSSES["code"]).tolist() == [0.5]


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
    "balanced_synth": (0.55, 0.4, 0.5),
    "balanced_markup": (0.45, 0.5, 0.35),
    "balanced_adjacent": (0.53, 0.5, 0.4),
    "few_code": (0, 0, 0.4),
    "few_markup": (0, 0, 0.3),
    "few_adjacent": (0, 0, 0.35),
    "few_synth": (0, 0, 0.5),
    "text_only": (0.4, 0.75, 0.0),
    "balanced_only": (0.6, 0.7, 0.8),
    "balanced_to_text": (0.7, 0.85, 0.5),
    "code_to_text": (0.6, 0.7, 0.6),
    "balanced_synth_to_text": (0.75, 0.8, 0.6),
    "text_only_cooldown": (0.45, 0.85, 0.1),
    "balanced_to_text_cooldown": (0.78, 0.9, 0.6),
    "balanced_to_text_cooldown_without_code": (0.72, 0.85, 0.5),
    "balanced_to_text_cooldown_synth": (0.72, 0.85, 0.4),
    "balanced_synth_to_text_cooldown_synth": (0.75, 0.8, 0.7),
}


def rows(scores=ALL_HOLD, seeds=5, sweep=SWEEP):
    """Rows of the sweep as `experiment.run` has them, each seed and arm a little different."""
    out = []
    rng = np.random.default_rng(0)
    for run in file.read(f"{sweep}{seeds}"):
        noise = 0.001 * run.seed + 0.001 * rng.normal()
        reasoning, knowledge, code = (value + noise for value in scores[run.arm])
        one = row(run.arm, run.seed, (reasoning, knowledge, code)) | {"size": run.size}
        out.append(one)
        if ANSWERS in run.evaluations:
            one["evaluations"][ANSWERS] = 200
            one["right"] = dict.fromkeys(ASKED, 0.5 + noise)
            one["judged"] = {
                other: dict.fromkeys(ASKED, {"win": 0.3 + won, "tie": 0.4 - won, "loss": 0.3})
                for other in JUDGED
                for won in [sum(scores[run.arm]) / 4 - sum(scores[other]) / 4 + noise]
                if other != run.arm
            }
    return out


def row(arm, seed=20, scores=(0.5, 0.5, 0.5)):
    reasoning, knowledge, code = map(float, scores)

    def found(exact, kinds):
        by_kind = dict.fromkeys(kinds, exact)
        losses = dict.fromkeys(kinds, 1 - exact)
        return {"exact": exact, "loss": 1 - exact, "by_kind": by_kind, "loss_by_kind": losses}

    kinds = [name + rare for name in skills.PROCEDURES for rare in ("", skills.RARE)]
    return {
        "run": f"{arm}/seed{seed}",
        "arm": arm,
        "size": None,
        "seed": seed,
        "parents": [],
        "tokens": 1000,
        "loss_tokens": 990,
        "epochs_total": {"skill_text": 0.5},
        "seconds": 30.0,
        "parameters": 110_784,
        "held_out": {
            "skill_web_code": {"loss": 1 - 0.5 * code, "bits_per_byte": 2 - code},
            "skill_text": {"loss": 2 - reasoning - knowledge, "bits_per_byte": 2.0},
        },
        "evaluations": {
            "skills": {
                "reasoning": found(reasoning, kinds),
                "knowledge": found(knowledge, ["quarter 1"]),
                "code": found(code, kinds),
            }
        },
        "judged": {},
        "asked": {"skill_text": 0.5, "skill_web_code": 0.5},
        "read": {"skill_text": 0.501, "skill_web_code": 0.499},
        "learning_rates": [(1, 0.001), (200, 0.01), (400, 0.001)],
    }


def measured(scores=ALL_HOLD, seeds=5):
    narrow = [one | {"parameters": 30_000} for one in rows(scores, seeds, f"{SWEEP}narrow,")]
    kinds = rows(scores, seeds, f"{SWEEP}kinds,")
    return {"skills": rows(scores, seeds), "narrow": narrow, "kinds": kinds}


def verdicts(found):
    return {one.name: one.verdict for one in report.REPORT.judge(found)}


def test_claims_hold_where_they_are_clear_and_are_reported_with_their_plots(tmp_path):
    judged_claims = report.REPORT.write(measured(), tmp_path, FACTS)
    assert {one.name: one.verdict for one in judged_claims} == dict.fromkeys(
        (one.name for one in judged_claims), "holds"
    )
    assert {c.name for c in judged_claims if c.required} == {"C1a", "C1b", "C2a", "C2b"}
    assert {c.part for c in judged_claims if c.name.startswith("C6")} == {"narrow"}
    record = json.loads((tmp_path / "code_mix" / "results.json").read_text())
    assert len(record["measured"]["skills"]) == 21 * 5 and record["command"] == "a command"
    assert len(record["measured"]["narrow"]) == 4 * 5
    assert len(record["measured"]["kinds"]) == 5 * 5
    assert record["headline"]["word"] == "reproduced" and record["headline"]["unit"] == "%"
    text = (tmp_path / "code_mix.md").read_text()
    plots = sorted(path.name for path in (tmp_path / "code_mix").glob("*.png"))
    assert len(plots) == 9 and all(f"(code_mix/{name})" in text for name in plots)
    assert "| balanced → text |" in text and "110,784 parameters" in text


def test_claims_fail_or_stay_undecided_with_their_effects():
    changed = verdicts(measured({**ALL_HOLD, "few_synth": (0, 0, 0.3)}))
    assert changed["C3a"] == "fails"
    changed = verdicts(measured({**ALL_HOLD, "share_25": (0.1, 0.29, 0.3)}))
    assert changed["C2b"] == "holds" and changed["C2c"] == changed["C2d"] == "fails"
    changed = verdicts(measured({**ALL_HOLD, "balanced_markup": (0.3, 0.5, 0.35)}))
    assert changed["C3e"] == "fails" and changed["C3c"] == changed["C3d"] == "holds"
    changed = verdicts(measured({**ALL_HOLD, "share_50": (0.6, 0.5, 0.4)}))
    assert changed["C3c"] == changed["C3d"] == changed["C3e"] == "fails"
    found = measured()
    for one in found["skills"]:
        if one["arm"] == "balanced_only":  # better in two seeds, far worse in three
            one["held_out"]["skill_web_code"]["loss"] = 0.5 if one["seed"] < 22 else 0.9
    assert verdicts(found)["C1a"] == "undecided"
    found["skills"][0]["read"] = {"skill_text": 0.51, "skill_web_code": 0.49}
    assert found["skills"][0]["arm"] == "balanced_only"
    (judged_claim,) = [one for one in report.REPORT.judge(found) if one.name == "C1a"]
    assert (
        judged_claim.verdict == "not measured"
        and "other shares than configured" in judged_claim.why
    )
    assert verdicts(measured(seeds=4))["C1a"] == "not measured"


def test_a_model_that_learned_nothing_gives_no_verdict():
    found = measured({**ALL_HOLD, "few_synth": (0, 0, -0.02)})
    (judged_claim,) = [one for one in report.REPORT.judge(found) if one.name == "C3a"]
    assert judged_claim.verdict == "not measured" and "has learned no skill" in judged_claim.why


def test_scores_at_their_ends_give_no_verdict():
    high = {**ALL_HOLD, "balanced_to_text": (0.96, 0.8, 0.5), "text_only": (0.95, 0.7, 0.0)}
    (judged_claim,) = [one for one in report.REPORT.judge(measured(high)) if one.name == "C1b"]
    assert (
        judged_claim.verdict == "not measured"
        and "at the ceiling of sorting in words" in judged_claim.why
    )
    # The mean over procedures is dead where one of them is, and the others may differ.
    found = Results(rows())
    for one in found.rows:
        one["evaluations"]["skills"]["reasoning"]["by_kind"] |= {
            "shift": 1.0,
            "shift, rare case": 1.0,
        }
    assert found.unmet("reasoning", "text_only", "balanced_to_text") == (
        "all arms are at the ceiling of shifting in words"
    )
    assert not found.unmet(SORTING, "text_only", "balanced_to_text")
    assert not found.unmet(CODE_LOSS, "text_only", "balanced_to_text")
    won = wins("text_only", ASKED[0])
    assert not found.unmet(won, "text_only", "balanced_to_text")
    dead = Results([one | {"right": dict.fromkeys(ASKED, 0.01)} for one in rows()])
    assert dead.unmet(won, "text_only", "balanced_to_text") == (
        "all arms are at the floor of right final results"
    )


def test_nothing_measured_is_said_to_be_so(tmp_path):
    assert set(verdicts({}).values()) == {"not measured"}
    report.REPORT.write({}, tmp_path, {**FACTS, "versions": {}})
    assert "- Not measured." in (tmp_path / "code_mix.md").read_text()


def test_pairs_are_of_the_same_seeds():
    found = Results([one for one in rows() if one["run"] != "share_0/seed21"])
    assert [len(values) for values in found.paired("code", "share_100", "share_0")] == [4, 4]


def test_shuffled_arms_keep_their_comparisons():
    shuffled = report.REPORT.shuffle({"skills": rows()}, np.random.default_rng(0))["skills"]
    for one in shuffled:
        source = one["run"].partition("/")[0]
        for other in (two for two in shuffled if two["seed"] == one["seed"]):
            if one["arm"] != other["arm"] and source in JUDGED and other["arm"] in one["judged"]:
                original = other["run"].partition("/")[0]
                gap = sum(ALL_HOLD[source]) / 4 - sum(ALL_HOLD[original]) / 4
                found = one["judged"][other["arm"]][ASKED[0]]
                assert found["win"] - 0.3 == pytest.approx(gap, abs=0.03)


def test_the_judge_counts_right_ends_and_both_directions_agree(tmp_path):
    given = skills.instructions()
    right = [one.answer for one in given]
    ends = [text.split()[-1] for text in right]  # without the steps before
    wrong = ["x" if one.skill == "knowledge" else f"{one.answer} 1." for one in given]
    results, facts = ASKED
    shares = judged.compared(
        {"good": right, "ends": ends, "facts": [*wrong[:150], *right[150:]]}, tmp_path
    )
    ties = {"win": 0.0, "tie": 1.0, "loss": 0.0}
    assert shares["good"]["ends"] == {results: ties, facts: ties}
    assert shares["good"]["facts"] == {results: {"win": 1.0, "tie": 0.0, "loss": 0.0}, facts: ties}
    assert shares["facts"]["ends"] == {results: {"win": 0.0, "tie": 0.0, "loss": 1.0}, facts: ties}
    found = experiment.with_judgements(
        [
            row(arm) | {"evaluations": {ANSWERS: texts}}
            for arm, texts in (("text_only", wrong), ("balanced_only", right))
        ],
        tmp_path,
    )
    runs = Results(found)
    assert found[0]["right"] == {results: 0.0, facts: 0.0} and found[1]["right"][results] == 1.0
    assert runs.values("balanced_only", wins("text_only", facts)).tolist() == [1.0]
    assert runs.values("text_only", wins("text_only", results)).tolist() == [0.0]


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


@pytest.mark.parametrize("web_code", ["share_50", "share_100"])
def test_kinds_of_code_are_drawn_beside_text_and_of_code_at_full_size(web_code):
    start = "balanced" if web_code == "share_50" else "code"
    arms = ["share_0", web_code, *(f"{start}_{kind}" for kind in ("markup", "adjacent", "synth"))]
    scores = dict(zip(arms, (0.2, 0.4, 0.3, 0.5, 0.6), strict=True))
    every = [row(arm, seed, (scores[arm] + gap, 0.5, 0.5)) for arm in arms for seed, gap in SPREAD]
    sorting, _, losses = figures.kinds(Results(every)).axes
    drawn = [line.get_ydata() for line in sorting.lines]
    assert [list(y) for y in drawn if len(y) == 3] == [
        pytest.approx([scores[arm] + gap for _, gap in SPREAD]) for arm in arms
    ]
    of_all = [line.get_ydata() for line in losses.lines if line.get_linestyle() == ":"]
    assert [list(y) for y in of_all] == [pytest.approx([0.8] * 2), pytest.approx([0.6] * 2)]
    assert figures.kinds(Results(every[:-3])) is None


SPREAD = ((20, -0.1), (21, 0.0), (22, 0.1))


def test_scores_of_benchmarks_are_averaged_by_group_as_far_as_none_is_missing():
    answers = {name: {"score": 0.25} for name in ("trivia_qa", "nq_open", "boolq")}
    evaluations = {
        "suite": {"benchmarks": answers | {"nq_open": {"score": 0.75}}},
        "humaneval": {"problems": "humaneval", "pass_at_k": {"1": 0.2}},
        "mbpp": {"problems": "mbpp", "pass_at_k": {"1": 0.6}},
    }
    found = Results([{**row("text_only"), "size": "470m", "evaluations": evaluations}])
    assert found.groups == ("knowledge", "code") and found.main == "470m"
    assert found.scores("text_only", "knowledge").to_dict() == {20: 0.5}
    assert found.scores("text_only", "code").to_dict() == {20: pytest.approx(0.4)}
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

    runs = file.read(f"{SWEEP}2")
    assert len(runs) == 21 * 2 and {run.seed for run in runs} == {20, 21}
    assert {arm for arms in PHASES for arm in arms} == {run.arm for run in runs}
    files = [pathlib.Path(name) for run in runs for name in run.gin_files]
    assert all(path.is_file() for path in files)  # each is checked with all other configurations
    line = ("share_50", "balanced_to_text", "balanced_to_text_cooldown")
    chosen = [run for run in runs if run.arm in line and run.seed == 21]
    assert [run.parent for run in chosen] == [None, *(run.name for run in chosen[:2])]
    plan = check.plan(SWEEP.removesuffix(":"), chosen, SweepFolder(tmp_path))
    assert [entry.total_steps for entry in plan] == [None] * 3  # they follow from the tokens
    for entry in plan[1:]:
        assert (entry.start["initial_scope"], entry.start["initial_data"]) == ("phase", "continue")


def test_kinds_of_code_beside_text_are_half_of_the_tokens_and_of_unseen_seeds():
    runs = file.read(f"{SWEEP}kinds,12")
    assert {run.seed for run in runs} == set(range(40, 52)) and len(runs) == 5 * 12
    assert {run.arm for run in runs} == set(experiment.BESIDE_TEXT)
    assert not any(run.parent for run in runs)
    for kind in ("markup", "adjacent", "synth"):
        half = {source: share / 2 for source, share in experiment.READ[f"few_{kind}"].items()}
        assert experiment.READ[f"balanced_{kind}"] == pytest.approx({"skill_text": 0.5, **half})
    # What they share with the other part are the same runs, but for their seeds.
    other = {run.arm: run for run in file.read(f"{SWEEP}1")}
    shared = [run for run in runs if run.arm in other]
    assert len(shared) == 3 * 12
    for run in shared:
        one = other[run.arm]
        assert run.bindings[:-1] == one.bindings[:-1] and run.gin_files == one.gin_files
        assert (run.bindings[-1], one.bindings[-1]) == (f"SEED={run.seed}", "SEED=20")


def test_parts_that_were_judged_are_kept_when_another_one_runs():
    record = json.loads(pathlib.Path("docs/reproductions/code_mix/results.json").read_text())
    parts = tuple(record["measured"])
    assert set(parts) >= {"skills", "narrow"}
    criteria.kept(record["criteria"], parts, report.REPORT.claims, experiment)


# Arm -> a sign that every document of one of its sources has and none of the others, and the share of tokens of that source.
SIGNS = {"share_100": ("=", 1.0), "few_synth": (":", 0.1), "few_adjacent": ("?", 0.15)}


@pytest.mark.parametrize("arm", SIGNS)
def test_arms_read_as_many_tokens_with_a_loss_and_their_shares_of_sources(arm, tmp_path):
    """Counted in their batches: rows that are less full take more steps, and each is of one source."""
    bindings = (
        f"MODEL_DIR={str(tmp_path)!r}",
        f"skill_sources.register.documents={dict.fromkeys(skill_sources.DOCUMENTS, 512)}",
        f"stream.make_stream.cache_dir={str(tmp_path / 'cache')!r}",
        "TRAIN_TOKENS=60e3",
    )
    (planned,) = (run for run in file.read(f"{SWEEP}1") if run.arm == arm)
    bindings = (*planned.bindings, *bindings)
    config = gin_config.load(planned.gin_files, bindings, entry="espalier.launch.train:train")
    arguments = config.arguments()
    for register in arguments["tasks"]:
        register()
    stream, tokens = arguments["stream"](), arguments["total_tokens"]
    batches = [
        stream.batch(s, 0, stream.batch_size) for s in range(stream.steps_for_tokens(tokens))
    ]
    read_BN = np.concatenate([batch["decoder_loss_weights"].sum(axis=1) for batch in batches])
    assert abs(read_BN.sum() - tokens) <= stream.batch_size * stream.length
    sign, share = SIGNS[arm]
    (token,) = vocabularies.characters(symbols=skills.SYMBOLS).encode(sign)
    has_BN = np.concatenate(
        [(batch["decoder_target_tokens"] == token).any(axis=1) for batch in batches]
    )
    # Shares are of tokens with a loss; rows of questions have fewer of them.
    assert read_BN[has_BN].sum() / read_BN.sum() == pytest.approx(share, abs=SHARE_ERROR)


def test_an_arm_and_its_cooldown_from_end_to_end(train, tmp_path):
    def run(arm, *bindings):
        (planned,) = (run for run in file.read(f"{SWEEP}1") if run.arm == arm)
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
    guessed = 3 * np.log(10)  # a result is three digits
    assert 0.7 * guessed < found["code"]["loss"] < 2 * guessed
    assert len(evaluate_skills.answers(str(child))) == 200
    epochs = {"skill_text": 0.25, "skill_web_code": 0.25}
    one = experiment.with_data({"step": 2, "epochs": epochs}, child)
    assert one["asked"] == pytest.approx({"skill_text": 0.8, "skill_web_code": 0.2})
    assert one["parameters"] == 16 * 64 + 2 * (4 * 16**2 + 3 * 16 * 16 + 16) + 16
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
