"""The comparison of runs: which numbers it reads, what it says when there are none, that it draws."""

import json

import pytest

from launch import bench, report
from launch.benchmarks import compare
from launch.run import metric_rows


def write_run(folder, losses):
    folder.mkdir()
    rows = [{"step": 1, "loss": 9.0}, {"step": 2, "loss": 8.0}]
    for step, scale in ((1, 2.0), (2, 1.0)):
        row = {"step": step}
        for domain, loss in losses.items():
            row[f"eval/{domain}/loss"] = scale * loss
            row[f"eval/{domain}/bits_per_byte"] = scale * loss / 2
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_the_last_evaluation_of_each_run(tmp_path, capsys):
    a = write_run(tmp_path / "a", {"text": 3.0, "code": 5.0})
    b = write_run(tmp_path / "b_arm", {"text": 4.0, "code": 4.5})
    assert report.main(["--runs", a, b, "--out", str(tmp_path / "out")]) == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["a"] == {
        "step": 2,
        "domains": {
            "text": {"loss": 3.0, "bits_per_byte": 1.5},
            "code": {"loss": 5.0, "bits_per_byte": 2.5},
        },
    }
    assert found["b_arm"]["domains"]["code"]["loss"] == 4.5
    assert (tmp_path / "out" / "report.png").read_bytes()[:4] == b"\x89PNG"
    table = capsys.readouterr().out
    assert "b arm" in table and "4.500  2.250" in table


def test_a_run_that_was_not_evaluated(tmp_path, capsys):
    run = tmp_path / "young"
    run.mkdir()
    (run / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
    assert report.main(["--runs", str(run), "--out", str(tmp_path / "out")]) == 2
    assert "'young' has no held-out evaluation" in capsys.readouterr().err


def test_what_a_rollback_gave_up_is_left_out(tmp_path):
    rows = [{"step": step, "loss": 9.0} for step in (2, 4, 6)]
    rows.append({"step": 7, "rollback_to": 4.0})
    rows.append({"step": 6, "loss": 5.0})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [(row["step"], row["loss"]) for row in metric_rows.read_rows(tmp_path) if "loss" in row]
    assert found == [(2, 9.0), (4, 9.0), (6, 5.0)]


def test_a_damaged_file_is_one_clear_error(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1, "loss": 9.0}\n{"step": 2, "lo\xe9s": 8.0}\n')
    assert report.main(["--runs", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert f"{path} is damaged: line 2 is not a row" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ('{"step": 3, "eval/a": 1.0}', "the row of step 3: 'eval/a' is not the name of"),
        ('{"step": 3, "eval//loss": 1.0}', "the row of step 3: 'eval//loss' is not the name of"),
        ('{"step": 3, "eval/a/accuracy": 1.0}', "the row of step 3 has no eval/a/loss"),
        ('{"step": 3, "loss": 1%s}' % ("0" * 400), "is damaged: line 2 is not a row of metrics"),
        ('{"step": 1%s, "loss": 1}' % ("0" * 400), "is damaged: line 2 is not a row of metrics"),
        ('{"step": -1, "loss": 1}', "is damaged: line 2 is not a row of metrics"),
        ('{"step": 3, "eval/\\ud800/loss": 1.0}', "is damaged: line 2 is not a row of metrics"),
        ('{"step": 3, "eval/[/b]/loss": NaN}', "has no eval/[/loss"),
    ],
)  # fmt: skip
def test_an_odd_row_is_one_clear_error(tmp_path, capsys, row, message):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "eval/a/loss": 9.0}\n' + row + "\n")
    assert report.main(["--runs", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err
    assert str(path) in error and message in error


def test_values_that_are_not_finite_and_names_of_any_form_are_drawn(tmp_path, capsys):
    row = {"step": 3, "eval/[b]/loss": "NaN", "eval/[b]/bits_per_byte": "Infinity"}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    assert report.main(["--runs", str(tmp_path), "--out", str(tmp_path / "out")]) == 0
    assert "[b]" in capsys.readouterr().out
    results = json.loads((tmp_path / "out" / "report.json").read_text(), parse_constant=pytest.fail)
    assert results[tmp_path.name]["domains"]["[b]"]["loss"] == "NaN"


def test_a_directory_that_is_no_run(tmp_path, capsys):
    assert report.main(["--runs", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "metrics.jsonl does not exist" in capsys.readouterr().err


def test_ratio_is_the_median_of_pairs_with_an_interval_around_it():
    ratio = compare.ratio([2.0, 3.0, 8.0, 2.0, 2.2], [1.0, 1.5, 2.0, 1.0, 1.0])
    assert ratio["median"] == 2.0
    low, high = ratio["interval_95"]
    assert low + 1e-9 >= 2.0 and low <= 2.0 <= high <= 4.0


def test_every_benchmark_has_a_module_with_run():
    import importlib.util

    for name in bench.BENCHMARKS:
        assert importlib.util.find_spec(f"launch.benchmarks.{name}"), name


def test_runs_of_the_same_name_keep_apart(tmp_path):
    (tmp_path / "x").mkdir()
    (tmp_path / "y").mkdir()
    runs = [
        write_run(tmp_path / "x" / "text", {"code": 3.0}),
        write_run(tmp_path / "y" / "text", {"code": 4.0}),
    ]
    assert report.main(["--runs", *runs, "--out", str(tmp_path / "out")]) == 0
    assert set(json.loads((tmp_path / "out" / "report.json").read_text())) == {"x/text", "y/text"}


def test_spectra_of_runs_are_drawn_and_a_run_without_is_named(tmp_path, capsys):
    for name, last in (("one", [2.0, 1.0]), ("two", [0.0, 0.0])):
        (tmp_path / name).mkdir()
        lines = [
            {"step": step, "learning_rate": rate, "layers": {"a/query": [[3.0, 2.0], values]}}
            for step, rate, values in ((0, 0.0, [1.0, 0.5]), (4, 0.1, last))
        ]
        text = "".join(json.dumps(line) + "\n" for line in lines)
        (tmp_path / name / "spectra.jsonl").write_text(text)
    (tmp_path / "none").mkdir()
    runs = [str(tmp_path / name) for name in ("one", "two")]
    assert report.main(["--spectra", *runs, f"--out={tmp_path}/out"]) == 0
    assert (tmp_path / "out" / "spectra.png").stat().st_size > 10_000
    assert report.main(["--spectra", *runs, f"{tmp_path}/none", f"--out={tmp_path}/out"]) == 2
    assert "none has no spectra.jsonl" in capsys.readouterr().err
    assert report.main(["--spectra", *[runs[0]] * 2, f"--out={tmp_path}/out"]) == 2
    assert "named twice" in capsys.readouterr().err


def test_the_scorecard_has_every_claim_and_the_readme_its_head(tmp_path, monkeypatch, capsys):
    folder = tmp_path / "reproductions" / "a_paper"
    folder.mkdir(parents=True)
    gain = {"where": "models", "what": "gain of A over B", "unit": "%"}
    gain |= {"effect": 3.5, "interval": [1.25, 5.75]}
    first = {"claim": "A1", "statement": "A is better", "paper": "4 %", "required": True}
    first |= {"verdict": "holds", "effect": 3.5, "interval": [1.25, 5.75], "seeds": [10, 11]}
    second = {**first, "claim": "A2", "required": False, "verdict": "not measured"}
    second |= {"effect": None, "interval": None, "seeds": [], "effects": []}
    record = {"title": "A paper", "claims": [{**first, "effects": [gain]}, second]}
    (folder / "results.json").write_text(json.dumps(record))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- scorecard -->\nold\n<!-- /scorecard -->\nafter\n")
    monkeypatch.chdir(tmp_path)
    assert report.main(["--all", "reproductions", "--out", "scorecard.md"]) == 0
    card = (tmp_path / "scorecard.md").read_text()
    here = "gain of A over B (models): 3.500 [1.250, 5.750] %"
    assert f"| **A1 A is better** | 4 % | {here} | 10, 11 | **holds** |" in card
    assert "| A2 A is better | 4 % |  |  | **not measured** |" in card
    row = "| [A paper](reproductions/a_paper.md) | 1 (1) |  |  |  | 1 (0) |"
    text = readme.read_text()
    assert row in card and row in text and row in capsys.readouterr().out
    assert text.startswith("before\n") and text.endswith("after\n") and "\nold\n" not in text
    assert report.main(["--all", "nothing"]) == 2
    assert "run launch.reproduce first" in capsys.readouterr().err
    (folder / "results.json").write_text("[]")
    assert report.main(["--all", "reproductions"]) == 2
    assert "has no 'title' and 'claims'" in capsys.readouterr().err


def test_a_report_without_a_place_is_refused(capsys):
    assert report.main(["--runs", "a"]) == 2
    assert "--out is missing" in capsys.readouterr().err
