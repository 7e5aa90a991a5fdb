"""The comparison of runs: which numbers it reads, what it says when there are none, that it draws."""

import json
import re

import pytest

from espalier.launch.report import __main__ as report
from espalier.launch.report import figures, page
from espalier.launch.report import runs as reported
from espalier.launch.run import metric_rows


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


def test_a_run_that_was_not_evaluated_yet_is_left_out_by_name(tmp_path, capsys):
    a = write_run(tmp_path / "a", {"text": 3.0})
    b = write_run(tmp_path / "b", {})
    assert report.main(["--runs", b, a, "--out", str(tmp_path / "out")]) == 0
    assert list(json.loads((tmp_path / "out" / "report.json").read_text())) == ["a"]
    assert "Left out: run 'b' has no held-out evaluation" in capsys.readouterr().err
    assert report.main(["--runs", b, "--out", str(tmp_path / "none")]) == 2
    assert not (tmp_path / "none").exists()


def test_what_differs_between_the_configurations_of_runs_is_shown(tmp_path, capsys):
    runs = [write_run(tmp_path / name, {"text": 3.0}) for name in ("slow", "fast")]
    for run, rate in zip(runs, ("3e-4", "3e-3"), strict=True):
        (tmp_path / run / "config.gin").write_text(
            f"MODEL_DIR = {run!r}\nLEARNING_RATE = {rate}\nBATCH_SIZE = 8\n"
            + (
                "WARMUP_STEPS = 5\nespalier.trainers.optim.schedules.cosine.warmup_steps = %WARMUP_STEPS\n"
                "espalier.trainers.optim.schedules.cosine.a_parameter_with_a_long_name = 3\n"
                if rate == "3e-3"
                else ""
            )
        )
    assert report.main(["--runs", *runs, "--out", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr().out
    text = (tmp_path / "out" / "report.html").read_text()
    for shown in (printed, text):
        assert "hat differs between the configurations" in shown
        assert all(word in shown for word in ("LEARNING_RATE", "0.0003", "0.003", "WARMUP_STEPS"))
        assert "BATCH_SIZE" not in shown and "MODEL_DIR" not in shown
        assert "%WARMUP_STEPS" not in shown  # the macro has a row
        assert "long_name" in re.sub(r"[^a-z_]", "", shown)  # folded, and not cut
    # There are neither arms nor seeds, and bits per byte are drawn once.
    assert "arm" not in re.sub("WARMUP.*", "", text) and "seed" not in text
    assert text.count("bits per byte</") <= 2
    (tmp_path / runs[1] / "config.gin").write_text("no gin")
    assert report.main(["--runs", *runs, "--out", str(tmp_path / "out")]) == 0
    # Without configurations, nothing is said of them.
    for run in runs:
        (tmp_path / run / "config.gin").unlink()
    assert report.main(["--runs", *runs, "--out", str(tmp_path / "out")]) == 0
    assert "configurations" not in (tmp_path / "out" / "report.html").read_text()


def write_other(folder, objective, unit, **metrics):
    """A run of another objective with a held-out loss of 0.5 and further held-out metrics."""
    folder.mkdir()
    (folder / "config.gin").write_text(objective)
    rows = [{"step": step, "loss": 1.0 / step, "learning_rate": 0.1} for step in (1, 2)]
    rows += [
        {"step": step, **{f"eval/x/{name}": value for name, value in values.items()}}
        for step in (1, 2)
        for values in ({"loss": 0.5, unit: 8.0, **metrics},)
    ]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_runs_of_different_objectives_have_their_own_units_and_axes(tmp_path, capsys):
    preference = "LOSSES = [@direct.dpo]\nrecipe.Recipe.objective = @preference.preference\n"
    image = "recipe.Recipe.objective = @classification.classification\n"
    runs = [
        write_run(tmp_path / "a", {"text": 3.0}),
        write_other(
            tmp_path / "dpo", preference, "pairs", **{"llh/chosen": -2.0, "accuracy": 0.75}
        ),
        write_other(tmp_path / "cnn", image, "images", accuracy=0.5),
    ]
    assert report.main(["--runs", *runs, "--out", str(tmp_path / "out")]) == 0
    tables = capsys.readouterr().out
    assert "held out: nats per token, bits per byte" in tables
    assert "held out, preference (dpo): per pair" in tables
    assert "held out, classification: nats per image" in tables
    text = (tmp_path / "out" / "report.html").read_text()
    assert "src=" not in text and 'href="http' not in text
    headings = re.findall("<h2>(.*)</h2>", text)
    assert headings == [
        "What differs between the configurations",
        *("Held-out loss", "Held-out bits per byte", "Losses over training"),
        *("Held-out loss: preference (dpo)", "Held-out accuracy: preference (dpo)"),
        "Losses over training: preference (dpo)",
        *("Held-out loss: classification", "Held-out accuracy: classification"),
        "Losses over training: classification",
        "Other held-out metrics, means over domains",
        "Other metrics of training",
    ]
    assert "<title>dpo: 0.750</title>" in text and "<title>dpo, step 2: 0.500</title>" in text
    read = list(reported.from_directories(metric_rows.named(runs)).values())
    groups = {group[0].arm: group for group in page._kinds(read)}
    assert groups["dpo"][0].kind == ("preference (dpo)", "per pair")
    for metric, unit in (("loss", "per pair"), ("accuracy", "share")):
        (panel,) = page._last_values(groups["dpo"], metric)
        assert (panel.title, panel.unit, list(panel.values)) == ("x", unit, ["dpo"])


def test_dots_of_one_unit_share_their_axis(tmp_path):
    directories = [
        write_run(tmp_path / name, {"text": x, "code": 9.0}) for name, x in (("a", 3.0), ("b", 3.1))
    ]
    read = list(reported.from_directories(metric_rows.named(directories)).values())
    dots = page._last_values(read, "loss")
    other = figures.Dots("score", "", {"a": (read[0], 0.5), "b": (read[1], 0.6)})
    axes = figures.draw([*dots, other], {"a": "k", "b": "r"}).axes
    assert axes[0].get_xlim() == axes[1].get_xlim() != axes[2].get_xlim()
    assert axes[0].get_xlim()[0] < 3.0 and axes[0].get_xlim()[1] > 9.0


def write_sweep(folder, arms, seeds=2):
    rows = []
    for number, arm in enumerate(arms):
        for seed in range(seeds):
            place = folder / "runs" / arm / f"seed{seed}"
            place.parent.mkdir(parents=True, exist_ok=True)
            write_run(place, {"text": 3.0 + number + 0.5 * seed, "code": 5.0})
            held_out = metric_rows.last_evaluation("", metric_rows.read_rows(place))["domains"]
            row = {"arm": arm, "size": None, "seed": seed, "made": False, "held_out": held_out}
            row |= {"step": 2, "directory": f"runs/{arm}/seed{seed}", "run": f"{arm}/seed{seed}"}
            mine = {"score": 0.5, "answers": ["a"], "passed": True, "ratio": float("inf")}
            rows.append({**row, "evaluations": {"mine": mine}})
    (folder / "results.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(folder)


def test_any_sweep_is_drawn_with_its_seeds(tmp_path, capsys):
    sweep = write_sweep(tmp_path / "mine", ("my_arm", "other"))
    scores = [run.scores for run in reported.from_sweeps([sweep])]
    assert scores == [{"mine/score": 0.5}] * 4  # no verdict, and nothing that cannot be drawn
    assert report.main(["--sweep", sweep, "--out", str(tmp_path / "out")]) == 0
    assert "3.250 (3.000 to 3.500)  1.625" in capsys.readouterr().out
    text = (tmp_path / "out" / "report.html").read_text()
    assert "<td>3.250 (3.000 to 3.500)  1.625</td>" in text and "0, 1</td>" in text
    assert "<title>my arm, seed 1: 3.500</title>" in text
    assert "<h2>Evaluations</h2>" in text and "<title>other, seed 0: 0.500</title>" in text
    assert "<title>other, seed 1, step 2: 8.000</title>" in text
    results = json.loads((tmp_path / "out" / "report.json").read_text())
    assert [(row["arm"], row["seed"]) for row in results][1:3] == [("my arm", 1), ("other", 0)]
    assert (tmp_path / "out" / "report.png").read_bytes()[:4] == b"\x89PNG"


def test_a_sweep_without_finished_runs_is_one_clear_error_and_leaves_nothing(tmp_path, capsys):
    (tmp_path / "results.jsonl").write_text("")
    assert report.main(["--sweep", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "is finished yet" in capsys.readouterr().err
    assert report.main(["--sweep", str(tmp_path / "no"), "--out", str(tmp_path / "out")]) == 2
    assert "no does not exist: give the folder (--out) of a sweep" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    assert report.main(["--sweep", str(tmp_path), "--out", str(tmp_path / "out.html")]) == 2
    assert "out.html is the name of a file: name a folder" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (-0.001, "0.00"),
        (-0.2, "−0.20"),
        (-1234.5, "−1,234.50"),
        (0.0, "0.00"),
        (-0.005001, "−0.01"),
    ],
)
def test_numbers_of_pages(value, text):
    assert figures.number(value, 2) == text


def test_short_numbers():
    values = (0.0, 0.123456, -12.3456, 1234.5, 123456.0, 2e-6, float("nan"))
    texts = ["0.000", "0.123", "−12.35", "1,234", "1.23e+05", "2e−06", "nan"]
    assert [figures.short(value) for value in values] == texts


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


def test_the_scorecard_has_every_claim_and_one_page_has_the_main_effects(
    tmp_path, monkeypatch, capsys
):
    folder = tmp_path / "reproductions" / "a_paper"
    folder.mkdir(parents=True)
    first = {"claim": "A1", "statement": "A is better", "paper": "4 %", "required": True}
    first |= {"group": "controls", "verdict": "holds", "seeds": [20, 21], "unit": "%"}
    first |= {"above": 1.0, "below": None, "why": ""}
    first |= {
        "effect": 3.5,
        "interval": [1.25, 5.75],
        "where": "models",
        "what": "gain of A over B",
    }
    second = {**first, "claim": "A2", "required": False, "verdict": "not measured"}
    second |= {"group": "of the paper", "effect": None, "interval": [None, None], "seeds": []}
    second |= {"why": "no runs"}
    third = {**first, "claim": "A3", "required": False, "verdict": "undecided", "below": 4.0}
    head = {"claim": "A1", "what": "gain in score", "unit": "%", "paper": 4.0, "digits": 1}
    head |= {"value": 3.5, "low": 1.25, "high": 5.75, "word": "reproduced", "required": True}
    head |= {"why": "A reads more.", "mind": "A second size, 40 minutes."}
    record = {
        "title": "A paper: on small models",
        "headline": head,
        "claims": [second, third, first],
    }
    bounds = ["", "", True, "", "a part", 0.0, None, [2]]
    record |= {"criteria": {"claims": {"A1": bounds}}, "measured": {"a part": []}}
    (folder / "results.json").write_text(json.dumps(record))
    readme = tmp_path / "README.md"
    readme.write_text("before\n<!-- scorecard -->\nold\n<!-- /scorecard -->\nafter\n")
    monkeypatch.chdir(tmp_path)
    assert report.main(["--all", "reproductions", "--out", "docs/evidence/scorecard.md"]) == 0
    card = (tmp_path / "docs" / "evidence" / "scorecard.md").read_text()
    here = "gain of A over B (models): 3.500 [1.250, 5.750] %"
    main = f"| **A1 A is better** | 4 % | {here} | above 1 % | 2 | **holds** |"
    other = "| A2 A is better | 4 % |  | above 1 % |  | **not measured**: no runs |"
    assert card.index(main) < card.index(other)  # the main effect comes first
    excluded = "**undecided**; excluded: below 1.250, above 5.750 %"
    assert f"{here} | above 1 % and below 4 % | 2 | {excluded} |" in card
    assert (
        "| [A paper: on small models](../../reproductions/a_paper.md) | 1 (1) |  | 1 (0) | 1 (0) |"
        in card
    )
    total = "1 papers, 3 claims: 1 holds, 1 is undecided, 1 is not measured. Of the 1 that must hold at this scale: 1 holds."
    assert total in card and total in capsys.readouterr().out
    learned = (tmp_path / "docs" / "evidence" / "what_we_learned.md").read_text()
    row = "| gain in score | +4.0 % | +3.5 % [+1.2, +5.8] | **reproduced** | A reads more. |"
    assert f"| [A paper](../../reproductions/a_paper.md) {row}" in learned and total in learned
    assert "A second size, 40 minutes." in learned
    assert (
        tmp_path / "docs" / "evidence" / "images" / "what_we_learned.png"
    ).stat().st_size > 5_000
    text = readme.read_text()
    assert total in text and "(docs/evidence/images/what_we_learned.png)" in text
    assert text.startswith("before\n") and text.endswith("after\n") and "\nold\n" not in text
    (tmp_path / "reproductions" / "older").mkdir()
    (tmp_path / "reproductions" / "older" / "results.json").write_text('{"claims": []}')
    (tmp_path / "reproductions" / "begun").mkdir()
    begun = json.dumps({**record, "measured": {"another": []}})
    (tmp_path / "reproductions" / "begun" / "results.json").write_text(begun)
    assert report.main(["--all", "reproductions", "--out", "docs/evidence/scorecard.md"]) == 0
    said = capsys.readouterr().out
    assert total in said and "Not run under these rules yet, and not counted: older." in said
    assert (
        "begun is judged in part so far, and not counted, since these parts have not run: `a part`."
        in said
    )
    (folder / "results.json").write_text("[]")
    assert report.main(["--all", "reproductions"]) == 2
    assert "has no 'claims'" in capsys.readouterr().err
    assert report.main(["--all", "nothing"]) == 2
    assert "run espalier reproduce first" in capsys.readouterr().err


def test_a_report_without_a_place_is_refused(capsys):
    assert report.main(["--runs", "a"]) == 2
    assert "--out is missing" in capsys.readouterr().err
    assert report.main(["--time", "a", "--out=b"]) == 2
    assert "--out has no effect with --time" in capsys.readouterr().err
