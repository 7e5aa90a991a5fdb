"""The fault table: a sample of it holds, verdicts are what they must be, and a stopped table goes on."""

import json
import os
import pathlib
import signal

import numpy as np
import pytest

from espalier.launch import environment
from tests.faults import __main__ as faults
from tests.faults import invariances, program, report, shim, worker
from tests.faults.table import (
    Bench,
    Case,
    Lost,
    NotTried,
    Row,
    Silent,
    Unclear,
    refused,
    selected,
)

ROWS = {row.number: row for row in worker.rows()}
QUICK = (7, 12, 13, 14, 15, 16, 20, 21, 31, 35)  # rows whose cases take milliseconds


@pytest.fixture
def bench(tmp_path):
    (tmp_path / "case").mkdir()
    return Bench(out=tmp_path, folder=tmp_path / "case", seed=0, shim=shim.loaded())


def test_rows_are_those_of_the_table_and_cases_have_names():
    assert set(ROWS) | set(report.TESTED) == set(range(1, 36))
    assert not set(ROWS) & set(report.TESTED)
    counts = {number: len(selected(row, 0, sample=False)) for number, row in ROWS.items()}
    assert sum(counts.values()) > 500 and min(counts.values()) >= 2
    kills = [case.name for case in selected(ROWS[2], 0, sample=False)]
    assert sum(int(name.split()[0]) for name in kills) >= 50


@pytest.mark.parametrize("number", QUICK)
def test_a_sample_of_a_row_holds(bench, number):
    cases = [case for case in selected(ROWS[number], 1, sample=True) if not case.own_process]
    assert cases
    for index, case in enumerate(cases):
        folder = bench.folder / str(index)
        folder.mkdir()
        result = worker.attempt(case, Bench(bench.out, folder, seed=1))
        assert result["verdict"] == "held", (case.name, result)


def raises(error):
    def run(bench):
        raise error

    return run


def test_verdicts(bench):
    cases = [
        Case("held", lambda bench: 3),
        Case("lost", raises(Lost("rows"))),
        Case("silent", lambda bench: refused(lambda: 1, ValueError) and None),
        Case("named", lambda bench: refused(raises_value, ValueError, naming="y") and None),
        Case("bug", raises(KeyError("x"))),
        Case("no compiler", raises(NotTried("no C compiler"))),
        Case("dies", lambda bench: os.kill(os.getpid(), signal.SIGKILL)),
        Case("hangs", lambda bench: signal.pause(), seconds=-4.5),
        Case("own", lambda bench: None, own_process=True),
    ]
    results = {case.name: result for case, result in worker.run_cases(cases, bench)}
    assert {name: result["verdict"] for name, result in results.items()} == {
        "held": "held",
        "lost": "lost",
        "silent": "silent",
        "named": "unclear",
        "bug": "unclear",
        "no compiler": "not tried",
        "dies": "unclear",
        "hangs": "unclear",
        "own": "held",
    }
    assert results["held"]["tried"] == 3 and results["no compiler"]["tried"] == 0
    assert "died" in results["dies"]["message"] and "no end" in results["hangs"]["message"]


def raises_value():
    raise ValueError("x")


def test_a_killed_process_is_noticed(bench):
    process = program.start(bench, "train", [], before=lambda: os.kill(os.getpid(), signal.SIGKILL))
    assert process.wait() == -signal.SIGKILL
    with pytest.raises(Unclear, match="status -9"):
        process.refused()


def test_a_fault_that_a_process_cannot_make_is_not_tried(tmp_path):
    bench = Bench(out=tmp_path, folder=tmp_path, seed=0, shim=None)
    process = program.start(bench, "train", [], before=lambda: shim.clock(bench))
    with pytest.raises(NotTried, match="^no C compiler$"):
        process.wait()


def test_the_table_is_written_between_its_marks(tmp_path):
    row = Row(3, "a bit", "named", lambda seed: [Case("a", print), Case("b", print)])
    page = tmp_path / "reliability.md"
    page.write_text(f"before\n{report.BEGIN}\nbefore this time\n{report.END}\nafter\n")
    results = {
        (3, "a"): {"verdict": "held", "message": "", "tried": 25, "seconds": 1.0},
        (3, "b"): {"verdict": "silent", "message": "a | b", "tried": 1, "seconds": 1.0},
    }
    summaries = report.summarise([row], {3: ["a", "b"]}, results)
    report.write(summaries, seed=7, command="python -m tests.faults", folder=tmp_path)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "this time" not in text
    assert "| 3 | a bit | named | 26 | 25 |" in text and "- row 3, b: silent; `a \\| b`" in text
    assert "| 23 | influence" in text and "| 0 | made by tests/trainers/influence," in text
    roots = [name for *_, tests in report.TESTED.values() for name in tests.split(", ")]
    assert all(pathlib.Path(environment.ROOT, name).is_dir() for name in roots)
    record = json.loads((tmp_path / "reliability.json").read_text())
    assert (
        record["rows"][0]["seed"] == 7 and record["rows"][0]["failures"][0]["verdict"] == "silent"
    )
    other = Row(5, "a disk", "clear", lambda seed: [Case("c", print)])
    done = {(5, "c"): {"verdict": "held", "message": "", "tried": 4, "seconds": 1.0}}
    later = report.summarise([other], {5: ["c"]}, done)
    report.write(later, seed=8, command="python -m tests.faults --rows=5", folder=tmp_path)
    both = page.read_text()
    assert "| 3 | a bit | named | 26 | 25 |" in both and "| 5 | a disk | clear | 4 | 4 |" in both
    assert "seed 7: 25 of 26 faults held." in both and "seed 8 (row 5): 4 of 4" in both
    printed = "\n".join(report.lines(summaries, 7))
    assert "python -m tests.faults --rows=3 --case=b --seed=7 --out=DIR" in printed


def test_finished_cases_are_not_run_again_and_bad_flags_are_named(tmp_path, capsys, monkeypatch):
    names = [case.name for case in selected(ROWS[19], 0, sample=True)]
    result = {"row": 19, "verdict": "held", "message": "", "tried": 1, "seconds": 0.1}
    rows = [json.dumps({**result, "case": name}) for name in names]
    (tmp_path / "results.jsonl").write_text("\n".join(rows) + '\n{"row": 19, "ca')
    monkeypatch.setattr(faults.subprocess, "Popen", None)  # nothing may be started
    assert faults.main([f"--out={tmp_path}", "--rows=19", "--sample"]) == 0
    assert " 19      3      3 " in capsys.readouterr().out
    assert faults.main([f"--out={tmp_path}", "--rows=99"]) == 2
    assert "there are no rows [99]" in capsys.readouterr().err
    assert faults.main([f"--out={tmp_path}", "--rows=19", "--seed=3"]) == 2
    assert "has results of --seed=0" in capsys.readouterr().err


def test_the_page_has_its_marks_and_is_linked():
    root = pathlib.Path(__file__).parents[2]
    page = (root / "docs" / "evidence" / "reliability.md").read_text()
    assert page.count(report.BEGIN) == page.count(report.END) == 1
    assert "docs/evidence/reliability.md" in (root / "README.md").read_text()


def test_a_form_of_a_step_is_judged_by_its_distance_from_float64():
    distance = invariances._distance((np.array([2.0, 4.0]),), (np.array([2.0, 4.4]),))
    assert distance == pytest.approx(0.1)
    invariances._check_as_near(9e-7, 1.2e-6)
    for plain, other in ((9e-7, 1.9e-6), (3e-6, 3e-6), (9e-7, np.nan), (np.nan, 9e-7)):
        with pytest.raises(Silent, match="from float64"):
            invariances._check_as_near(plain, other)
