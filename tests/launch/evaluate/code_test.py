"""pass@k of a model and of given completions, from flags to files, and against all subsets of samples."""

import itertools
import json
import math

import pytest
from scipy import stats

from espalier.launch.evaluate import code

PROBLEMS = [
    {
        "task_id": i,
        "text": f"Add {i} to a number.",
        "code": f"def f(x):\n    return x + {i}",
        "test_list": [f"assert f(1) == {1 + i}"],
        "test_setup_code": "",
    }
    for i in range(3)
]


@pytest.fixture
def evaluate(command, tmp_path):
    """Runs the command; returns the rows and the scores, or the exit status."""
    problems = tmp_path / "problems.jsonl"
    problems.write_text("".join(json.dumps(row) + "\n" for row in PROBLEMS))

    def run(*flags):
        files = [f"--{name}={tmp_path / name}" for name in ("output", "json")]
        status = command("evaluate code", f"--problems={problems}", *files, "--workers=1", *flags)
        if status:
            return status
        rows = [json.loads(line) for line in (tmp_path / "output").read_text().splitlines()]
        return rows, json.loads((tmp_path / "json").read_text())

    return run


@pytest.fixture
def solutions(tmp_path):
    def write(rows):
        path = tmp_path / "solutions.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return f"--solutions={path}"

    return write


RIGHT = [{"task_id": row["task_id"], "completion": row["code"]} for row in PROBLEMS]
WRONG = [{"task_id": i, "completion": "def f(x): return -1"} for i in range(3)]


def test_given_completions_are_run_and_scored(evaluate, solutions, capsys):
    rows, scores = evaluate(solutions([*RIGHT, *WRONG[:2], RIGHT[2]]), "--k", "1", "2")
    assert [(row["task_id"], row["sample"], row["status"]) for row in rows] == [
        ("0", 0, "passed"),
        ("1", 0, "passed"),
        ("2", 0, "passed"),
        ("0", 1, "failed"),
        ("1", 1, "failed"),
        ("2", 1, "passed"),
    ]
    assert rows[3]["detail"] == "AssertionError"
    assert scores["problems"] == "mbpp" and scores["num_problems"] == 3
    assert scores["file"].endswith(".jsonl")
    assert scores["pass_at_k"] == {"1": pytest.approx(2 / 3), "2": 1.0}
    assert scores["statuses"] == {"passed": 4, "failed": 2}
    assert "pass@1     0.6667" in capsys.readouterr().out


def test_rows_that_are_there_are_not_run_again(evaluate, solutions, tmp_path, monkeypatch):
    from espalier.data.sandbox import code_sandbox

    flag = solutions(RIGHT)
    rows, scores = evaluate(flag)
    lines = (tmp_path / "output").read_text().splitlines(keepends=True)
    (tmp_path / "output").write_text(lines[0] + lines[1][:20])  # cut off within a row
    original, programs = code_sandbox.Sandbox.run_one, []

    def run_one(self, program):
        programs.append(program)
        return original(self, program)

    monkeypatch.setattr(code_sandbox.Sandbox, "run_one", run_one)
    again, same = evaluate(flag)
    assert len(programs) == 2
    seconds = {"seconds": 0}
    assert [row | seconds for row in again] == [row | seconds for row in rows]
    assert same == scores


def test_a_limit_takes_the_first_problems_and_without_it_the_rest_follow(
    evaluate, solutions, capsys
):
    flag = solutions(RIGHT)
    rows, scores = evaluate(flag, "--limit=2")
    assert [row["task_id"] for row in rows] == ["0", "1"]
    assert scores["num_problems"] == scores["num_samples"] == 2
    rows, scores = evaluate(flag)
    assert [row["task_id"] for row in rows] == ["0", "1", "2"] and scores["num_problems"] == 3
    assert "2 of 3 rows exist already" in capsys.readouterr().err
    assert evaluate(flag, "--limit=1")[1]["num_problems"] == 1
    # The other problems need no solution.
    assert evaluate(solutions(RIGHT[:1]), "--limit=1") == 2  # but are other solutions
    assert "made with" in capsys.readouterr().err
    assert evaluate(flag, "--limit=0") == 2
    assert "--limit=0 must be at least 1" in capsys.readouterr().err


def test_rows_of_other_settings_are_refused(evaluate, solutions, capsys):
    evaluate(solutions(RIGHT))
    assert evaluate(solutions(RIGHT), "--wall_seconds=9") == 2
    assert "output, line 1: made with another checkpoint" in capsys.readouterr().err


def test_a_model_is_evaluated_and_resumed_with_the_same_draws(
    evaluate, trained_run, tmp_path, capsys
):
    flags = [
        f"--checkpoint={trained_run.path}",
        "--samples=2",
        "--max_new_tokens=8",
        "--k",
        "1",
        "2",
    ]
    rows, scores = evaluate(*flags)
    assert [(row["task_id"], row["sample"]) for row in rows] == [
        (str(i), sample) for i in range(3) for sample in range(2)
    ]
    assert scores["settings"]["temperature"] == 0.8 and scores["settings"]["top_p"] == 0.95
    assert len({row["completion"] for row in rows}) > 3
    lines = (tmp_path / "output").read_text().splitlines(keepends=True)
    (tmp_path / "output").write_text("".join(lines[:3]))
    again, _ = evaluate(*flags)
    assert [row["completion"] for row in again] == [row["completion"] for row in rows]
    assert "3 of 6 rows exist already" in capsys.readouterr().err
    assert evaluate(*flags, "--gin.WEIGHTS_DTYPE='int8'") == 2
    assert "output, line 1: made with another checkpoint" in capsys.readouterr().err


def test_completions_end_before_what_is_no_part_of_them(evaluate, trained_run, monkeypatch):
    from espalier.launch.inference import generate

    def generated(config, rows, *, stops, settings, **_):
        assert stops == ("\nclass", "\nassert", '\n"""', "\nprint", "\nif")
        assert settings.sampling.temperature == 0 and settings.num_samples == 1
        for row, (_, given) in zip(PROBLEMS, rows, strict=True):
            assert given["text"].startswith('"""\nAdd')
            yield {"task_id": str(row["task_id"]), "sample": 0, "text": row["code"]}

    monkeypatch.setattr(generate, "generate", generated)
    _, scores = evaluate(f"--checkpoint={trained_run.path}")
    assert scores["pass_at_k"] == {"1": 1.0}


@pytest.mark.parametrize(
    ("rows", "flags", "message"),
    [
        (RIGHT[:2], [], "has no row for 1 problems, the first is '2'"),
        ([*RIGHT, {"task_id": 7, "completion": ""}], [], "line 4: there is no problem '7'"),
        ([*RIGHT, {"task_id": 1}], [], "line 4: no 'completion'"),
        (RIGHT, ["--k", "2"], "--k=2: each problem has 1 samples"),
        (RIGHT, ["--cpu_seconds=0"], "Limits.cpu_seconds = 0 must be above 0"),
        (RIGHT, ["--output=/none/x.jsonl"], "there is no folder /none"),
        (RIGHT, ["--problems=/none.jsonl"], "--problems=/none.jsonl: the file does not exist"),
    ],
)
def test_bad_input_is_one_error(evaluate, solutions, capsys, rows, flags, message):
    assert evaluate(solutions(rows), *flags) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--samples=2", "--temperature=0"], "--temperature=0 makes all"),
        (["--samples=0"], "--samples=0 must be at least 1"),
        (["--samples=2", "--k", "3"], "--k=3: each problem has 2 samples"),
        (["--top_p=0.5"], "top_p = 0.5 has no effect with temperature = 0"),
        (["--chat", "--token_healing"], "--token_healing is of prompts that are continued"),
    ],
)
def test_flags_that_contradict_each_other(evaluate, trained_run, capsys, flags, message):
    assert evaluate(f"--checkpoint={trained_run.path}", *flags) == 2
    assert message in capsys.readouterr().err


def test_pass_at_k_is_the_share_of_subsets_in_which_one_passes():
    for samples in range(1, 9):
        for passed in range(samples + 1):
            outcomes = [i < passed for i in range(samples)]
            for k in range(1, samples + 1):
                drawn = [any(subset) for subset in itertools.combinations(outcomes, k)]
                expected = sum(drawn) / len(drawn)
                assert code.pass_at_k(samples, passed, k) == pytest.approx(expected, abs=1e-15)


@pytest.mark.parametrize(
    ("samples", "passed", "k"), [(200, 3, 100), (10_000, 1, 5_000), (2000, 700, 10)]
)
def test_many_samples_are_exact_too(samples, passed, k):
    exact = 1 - math.comb(samples - passed, k) / math.comb(samples, k)
    assert code.pass_at_k(samples, passed, k) == pytest.approx(exact, rel=1e-12)


def test_one_sample_each_has_wilsons_interval():
    for passed in (0, 1, 20, 163, 164):
        value, *ends = code.mean_pass_at_k([(1, i < passed) for i in range(164)], 1)
        wilson = stats.binomtest(passed, 164).proportion_ci(0.95, method="wilson")
        assert value == pytest.approx(passed / 164)
        assert ends == pytest.approx([wilson.low, wilson.high], abs=1e-12)


def test_the_mean_of_pass_at_k_is_over_problems_not_over_samples():
    assert code.mean_pass_at_k([(2, 1), (10, 10)], 1)[0] == pytest.approx(0.75)
    assert code.mean_pass_at_k([(2, 1), (10, 10)], 2)[0] == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((5, 6, 1), "6 of 5 samples"),
        ((5, -1, 1), "-1 of 5 samples"),
        ((5, 1, 6), "pass@6 cannot be estimated from 5 samples"),
        ((5, 1, 0), "pass@0 cannot"),
    ],
)
def test_what_cannot_be_estimated_is_an_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        code.pass_at_k(*arguments)
    with pytest.raises(ValueError, match="no problem"):
        code.mean_pass_at_k([], 1)
