"""The board of preference runs, of made-up metrics: what is read, what is said, and that it is drawn."""

import json

import pytest

from espalier.launch.papers.preference import board
from espalier.launch.plots import panels
from espalier.launch.report import __main__ as report
from espalier.trainers.preference.indicators import samples


def run(path, rows):
    path.mkdir()
    lines = [json.dumps({"step": step, **row}) + "\n" for step, row in rows]
    (path / "metrics.jsonl").write_text("".join(lines))
    return str(path)


def watched(steps, *, alarm=None, p_win=True, llh=-0.1):
    """Rows of indicators: entropy rises to step 20 and falls, likelihood by `llh` each time."""
    for i, step in enumerate(steps):
        row = {
            "llh_chosen": -1.0 + llh * i,
            "llh_rejected": -1.2 + 1.5 * llh * i,
            "llh_gap": 0.2 - 0.5 * llh * i,
            "entropy": 2.0 + 0.2 * min(i, 4 - i),
            "mass": 0.9 - 0.01 * i,
            "ead": 0.4,
            "length": 5.0 + i,
            "alarm": float(alarm is not None and step >= alarm),
        }
        if p_win:
            row |= {"p_win": 0.5 + 0.1 * min(i, 4 - i), "reward": 1.0}
        yield step, {f"indicators/{name}": value for name, value in row.items()}


@pytest.fixture
def runs(tmp_path):
    steps = (0, 10, 20, 30, 40)
    hot = run(tmp_path / "hot", [(0, {"loss": 0.7}), *watched(steps, alarm=30)])
    kind = run(tmp_path / "kind", watched(steps[:4], p_win=False, llh=0.1))
    bare = [
        (10, {"loss": 0.6, "accuracy": 0.7, "llh/chosen": -9.0}),
        (10, {f"eval/{task}/llh/chosen": x for task, x in (("a", -2.0), ("b", -4.0))}),
    ]
    return [hot, kind, run(tmp_path / "bare", bare)]


def test_series_are_the_indicators_or_where_there_are_none_those_of_the_evaluation(runs):
    hot, kind, bare = (board.read(str(i), folder) for i, folder in enumerate(runs))
    assert (hot.alarm, kind.alarm, bare.alarm) == (30, None, None)
    masses = {0: 0.9, 10: 0.89, 20: 0.88, 30: 0.87, 40: 0.86}
    assert hot.series["mass"].to_dict() == pytest.approx(masses)
    assert (hot.first("llh_chosen"), hot.last) == (-1.0, 40)
    assert hot.highest("p_win") == (20, pytest.approx(0.7))
    # Of two tasks the mean; the training batches' own are not taken.
    assert bare.series["llh_chosen"].to_dict() == {10: -3.0}
    assert bare.series["accuracy"].to_dict() == {10: 0.7}
    assert bare.final("entropy") is None and bare.highest("entropy") is None


def test_what_the_signals_say(runs):
    hot, kind, bare = (board.read(str(i), folder) for i, folder in enumerate(runs))
    said = board.sentence(hot)
    assert (
        said.startswith("signs of over-optimisation at step 30")
        and "best P_win 0.700 at step 20" in said
    )
    assert "fell from -1.00 to -1.40" in said and "highest at step 20 (2.40 bits)" in said
    assert board.sentence(kind).startswith("no sign of over-optimisation")
    assert "stayed at -3.00 nats per token; it has no indicators" in board.sentence(bare)
    assert "r = -1.00 " in board.length_link([hot])
    assert board.length_link([bare]) is None


def test_an_entropy_that_turned_without_an_alarm_is_a_warning(tmp_path):
    folder = run(tmp_path / "x", watched((0, 10, 20, 30, 40)))
    assert "early warning, for entropy falls since step 20" in board.sentence(
        board.read("x", folder)
    )


def test_the_table_has_the_columns_that_there_are(runs):
    read = [board.read(str(i), folder) for i, folder in enumerate(runs)]
    header, first, second, third = board.table(read)
    cells = dict(zip(header, first, strict=True))
    assert cells["best P_win"] == "0.700 @ 20" and cells["alarm"] == "@ 30"
    assert cells["LLH"] == "−1.00 → −1.40" and cells["mass"] == "0.900 → 0.860"
    assert dict(zip(header, second, strict=True))["best P_win"] == "–"
    assert dict(zip(header, third, strict=True))["accuracy"] == "0.70"
    assert "KL" not in header


@pytest.mark.parametrize("ending", ["html", "png"])
def test_a_board_is_one_file(runs, tmp_path, capsys, ending):
    path = tmp_path / "out" / f"board.{ending}"
    assert report.main(["--board", *runs, f"--out={path}"]) == 0
    assert "hot: signs of over-optimisation at step 30" in capsys.readouterr().out
    assert [p.name for p in path.parent.iterdir()] == [path.name]
    if ending == "html":
        page = path.read_text()
        assert "<svg" in page and "<td>−1.00 → −1.40</td>" in page and "src=" not in page
        assert "<title>hot, p win, step 20: 0.700</title>" in page
        assert "fell from −1.00 to −1.40 nats" in page
    else:
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size < 300_000


def test_a_title_names_dashed_lines_only_if_there_are_some(runs):
    figure = board.draw([board.read("hot", runs[0])])
    titles = {axes.get_title() for axes in figure.axes}
    assert {
        "LLH\nchosen, rejected dashed",
        "loss\ntraining",
        "entropy of the likeliest\noutputs",
    } < titles


def test_what_cannot_be_drawn_is_an_error(runs, tmp_path, capsys):
    other = run(tmp_path / "other", [(1, {"loss": 2.0})])
    for arguments, says in (
        ([str(tmp_path / "none")], "does not exist"),
        ([other], "runs/preference.gin"),
        ([runs[0], "--out=board.pdf"], ".html or .png"),
    ):
        assert report.main([f"--out={tmp_path}/board.html", "--board", *arguments]) == 2
        assert says in capsys.readouterr().err


def test_runs_of_a_sweep_go_by_the_names_of_their_arms(tmp_path, capsys):
    rows = list(watched((0, 10, 20)))
    for name in ("dpo", "ipo"):
        (tmp_path / name).mkdir()
    folders = [run(tmp_path / name, rows) for name in ("dpo/seed0", "ipo/seed0", "ipo/seed1")]
    for given, names in (
        (folders[:2], ["dpo", "ipo"]),
        (folders, ["dpo/seed0", "ipo/seed0", "ipo/seed1"]),
        (folders[:1], ["seed0"]),
    ):
        assert report.main(["--board", *given, f"--out={tmp_path}/board.html"]) == 0
        lines = capsys.readouterr().out.splitlines()
        assert [line.partition(":")[0] for line in lines[: len(names)]] == names


def test_many_runs_have_colours_of_their_own():
    assert len(set(panels.colours(6))) == 6 and len(set(panels.colours(9))) == 9


def with_samples(folder, outputs=20):
    for step in (0, 10, 30):
        path = samples.path_of(folder, step)
        path.parent.mkdir(parents=True, exist_ok=True)
        row = {"prompt": [1], "prompt_text": "Say | <b>", "text": f"`out` of\n{step}"}
        row |= {"ended": "length" if step == 30 else "eos", "reward": -0.001}
        path.write_text((json.dumps(row) + "\n") * outputs)


def test_outputs_are_beside_the_readings(tmp_path):
    folder = run(tmp_path / "x", watched((0, 10, 20, 30), alarm=None))
    with_samples(tmp_path / "x")
    assert report.main(["--board", folder, f"--out={tmp_path}/board.html"]) == 0
    page = (tmp_path / "board.html").read_text()
    assert page.count("Prompt: <code>Say | &lt;b&gt;</code>") == 3
    first = (
        "<td>0</td>\n<td>−1.00</td>\n<td>2.00</td>\n<td>0.50</td>\n<td>1.00</td>\n<td>0.00</td>\n"
    )
    assert f"{first}<td><code>`out` of 0</code></td>" in page
    assert "<td>30</td>" in page and "<td><code>`out` of 30</code> (cut)</td>" in page
    assert page.count("`out` of 10") == 0  # neither the first, the best nor the last


def test_too_few_readings_or_outputs_are_no_verdict(tmp_path):
    for name, steps, outputs, says in (
        (
            "a",
            (0, 10, 20),
            20,
            "too few to judge (3 readings, where a sign needs 4), and no alarm: ",
        ),
        (
            "b",
            (0, 10, 20, 30),
            4,
            "too few to judge (readings of 4 outputs, where noise needs 16), ",
        ),
        ("c", (0, 10, 20, 30), 20, "early warning"),
    ):
        folder = run(tmp_path / name, watched(steps))
        with_samples(tmp_path / name, outputs)
        assert says in board.sentence(board.read(name, folder))
    cut = [(step, {**row, "indicators/ended": 0.0}) for step, row in watched((0, 10, 20))]
    folder = run(tmp_path / "d", cut)
    assert "; every output was cut" in board.sentence(board.read("d", folder))


def test_no_number_is_minus_zero(tmp_path):
    rows = [(step, {**row, "indicators/llh_chosen": value}) for (step, row), value in
            zip(watched((0, 10)), (-0.2, -0.001), strict=True)]  # fmt: skip
    read = board.read("x", run(tmp_path / "x", rows))
    assert "rose from -0.20 to 0.00" in board.sentence(read)
    assert "−0.20 → 0.00" in board.table([read])[1]
