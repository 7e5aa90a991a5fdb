"""Searches against compilers of known cost: what they find, what they skip, and that they continue; and their candidates."""

import itertools
import json

import jax
import pytest

from espalier.launch.precompile import __main__ as command
from espalier.launch.precompile import apart, candidates, search, tpu_topology
from espalier.launch.precompile.candidates import Candidate
from espalier.launch.precompile.search import Result
from tests.launch import precompile_test as runs


def candidate(rows=8, *, mesh=(("fsdp", 8),), rules="fsdp", remat="full", arguments=0):
    return Candidate(batch_size=rows, mesh=mesh, rules=rules, remat=remat, argument_bytes=arguments)


def report(peak, *, step=1.0, fits=True):
    return {
        "hbm_bytes": {"peak": peak},
        "fits": fits,
        "collectives": {"all-reduce": {"bytes": 5e9}},
        "roofline_seconds": {"step_one_ring": step, "mfu_bound_one_ring": 0.5 / step},
    }


@pytest.mark.parametrize(
    ("peak", "most"),
    [
        (lambda count: 100 + 7 * count, 128),  # a line: two sizes give the answer
        (lambda count: 100 + count**2 / 8, 84),  # above the line
        (lambda count: 100 + 50 * count**0.5, 324),  # below it
        (lambda count: 100 + 100 * (count > 37), 37),  # a step
        (lambda count: 2000, 0),
        (lambda count: 900 + 50 * count, 2),
    ],
)
def test_the_largest_batch(peak, most):
    asked = []

    def compile(one):
        asked.append(one.batch_size)
        return Result(one, report(peak(one.batch_size // 4), fits=True))

    limit = 100 + 100 * (most == 37) - 1 if most == 37 else 1000
    results = list(search.largest_batch(candidate, compile, unit=4, limit=limit))
    best = search.best(results, "batch", limit)
    assert (best.candidate.batch_size if best else 0) == 4 * most
    assert len(set(asked)) == len(asked) <= 22


def test_a_batch_that_cannot_be_compiled_counts_as_too_large():
    def compile(one):
        return Result(one, report(1) if one.batch_size < 5 else None, "stopped")

    results = list(search.largest_batch(candidate, compile, unit=1, limit=1e9))
    assert search.best(results, "batch", 1e9).candidate.batch_size == 4


def layouts():
    meshes = {"fsdp": (("fsdp", 8),), "fsdp_tp": (("fsdp", 4), ("tensor", 2))}
    return [
        candidate(mesh=mesh, rules=rules, remat=remat)
        for remat in ("full", "dots", "none")
        for rules, mesh in meshes.items()
    ]


COSTS = {
    # (rules, remat): peak, seconds of a step
    ("fsdp", "full"): (50, 3.0),
    ("fsdp", "dots"): (120, 2.0),
    ("fsdp_tp", "full"): (40, 2.8),
    ("fsdp_tp", "dots"): (80, 2.5),
    ("fsdp_tp", "none"): (90, 2.5),
}


def test_layouts_are_compared_by_time_then_memory_and_hopeless_ones_are_not_compiled():
    asked = []

    def compile(one):
        asked.append((one.rules, one.remat))
        peak, step = COSTS[asked[-1]]
        return Result(one, report(peak, step=step))

    results = list(search.all_layouts(layouts(), compile, limit=100))
    assert set(asked) == set(COSTS)  # not (fsdp, none)
    best = search.best(results, "layout", 100)
    assert (best.candidate.rules, best.candidate.remat) == ("fsdp_tp", "dots")
    table = search.table(results, best, 100).splitlines()
    assert len(table) == 1 + 6
    assert [line for line in table if line.startswith("*")] == [
        line for line in table if "fsdp_tp" in line and "dots" in line
    ]
    assert "does not fit with more rematerialisation" in table[5] and "NO" in table[3]
    assert search.best(results, "layout", 10) is None


def test_a_state_that_is_too_large_is_not_compiled():
    (result,) = search.all_layouts([candidate(arguments=200)], None, limit=100)
    assert result.report is None and "state and batch alone are" in result.reason


def timed(folder, run, *, seconds=100.0, text="a"):
    store = search.Store({"text": text}, folder)
    return search.Timed(store, run, seconds=seconds)


def test_a_search_continues_with_stored_results(tmp_path):
    calls = []

    def run(one, seconds):
        calls.append(one.batch_size)
        return search.Result(one, report(one.batch_size)), False

    assert timed(tmp_path, run)(candidate(4)).peak == 4
    again = timed(tmp_path, run, seconds=0)
    assert again(candidate(4)).peak == 4 and calls == [4]
    with pytest.raises(search.OutOfTime):
        again(candidate(8))
    # Another configuration, and a file cut short, have no result.
    assert timed(tmp_path, run, text="b")(candidate(4)).peak == 4 and calls == [4, 4]
    search.Store({"text": "a"}, tmp_path).path(candidate(4)).write_text('{"rep')
    assert timed(tmp_path, run)(candidate(4)).peak == 4 and calls == [4, 4, 4]


def test_a_candidate_that_its_own_limit_stopped_is_not_stored(tmp_path):
    outcomes = iter([((None, "stopped after 3 s"), True), ((report(1), ""), False)])

    def run(one, seconds):
        result, stopped = next(outcomes)
        return search.Result(one, *result), stopped

    one = timed(tmp_path, run)
    assert one(candidate()).reason == "stopped after 3 s"
    assert one(candidate()).report is not None


@pytest.fixture
def eight_devices(monkeypatch):
    monkeypatch.setattr(tpu_topology, "devices", lambda topology: jax.devices()[:8])
    return tpu_topology.parse("v5e:2x4")


def test_the_layouts_of_a_run(eight_devices):
    recipe = runs.recipe(
        runs.plain_llama(), mesh={"fsdp": 8}, rules="fsdp", rows=8, length=runs.LENGTH
    )
    found = candidates.layouts(recipe, eight_devices)
    meshes = {(dict(one.mesh).get("tensor", 1), one.rules) for one in found}
    # Four heads are not split over eight shards, and this model has no experts.
    tensor = itertools.product((2, 4), ("fsdp_tp", "fsdp_tp_sp"))
    assert meshes == {(1, "dp"), (1, "fsdp"), *tensor}
    assert [one.remat for one in found] == sorted(
        (one.remat for one in found), key=("full", "dots", "none").index
    )
    sizes = {one.rules: one.argument_bytes for one in found}
    batch = 8 * runs.LENGTH * 4 * 6 / 8
    assert sizes["dp"] == pytest.approx(runs.STATE_BYTES, abs=2 * batch)
    assert sizes["fsdp"] == pytest.approx(runs.STATE_BYTES / 8, rel=0.02, abs=2 * batch)
    words = next(one for one in found if one.rules == "fsdp_tp").words
    assert words[1] == '--gin.MESH={"fsdp": 4, "tensor": 2}'


@pytest.mark.parametrize(
    ("rules", "mesh", "unit"),
    [("fsdp", {"fsdp": 8}, 8), ("fsdp_tp", {"fsdp": 4, "tensor": -1}, 4), ("dp", None, 8)],
)
def test_a_batch_is_a_multiple_of_its_shards(eight_devices, rules, mesh, unit):
    recipe = runs.recipe(runs.plain_llama(), mesh=mesh, rules=rules, rows=8, length=64)
    assert candidates.batch_unit(recipe, eight_devices) == unit


def test_candidates_are_compiled_without_the_flags_of_the_search():
    words = ["--topology=v5e:4x4", "--search=batch", "--memory_limit", "3", "--json=x.json"]
    assert command.without_search([*words, "--gin.SEED=1"]) == [
        "--topology=v5e:4x4",
        "--gin.SEED=1",
    ]


def test_stored_results_are_json(tmp_path):
    timed(tmp_path, lambda one, _: (search.Result(one, report(3)), False))(candidate())
    (path,) = tmp_path.iterdir()
    assert json.loads(path.read_text())["candidate"] == "8 rows, fsdp 8, fsdp, remat full"


TINY = [
    *("--gin_file=t5x_configs/models/tiny.gin", "--gin_file=t5x_configs/runs/pretrain.gin"),
    *("--gin.BATCH_SIZE=8", '--gin.TASK_FEATURE_LENGTHS={"targets": 64}', "--topology=v5e:2x4"),
]


def test_the_command_searches_continues_and_says_the_best(
    eight_devices, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(tpu_topology, "prepare_environment", lambda: None)
    monkeypatch.setattr(tpu_topology, "versions", lambda: {"jax": "1"})
    compiled = []

    def compile_apart(words, limits):
        compiled.append(words)
        assert limits.memory_bytes == 12e9 and limits.seconds <= 1200
        dots, two = (any(text in word for word in words) for text in ("'dots'", '"tensor": 2'))
        peak = 20e9 if any("'none'" in word for word in words) else 10e9
        return apart.Outcome(report(peak, step=3.0 - dots - two), "", 1.0)

    monkeypatch.setattr(apart, "compile_apart", compile_apart)
    stored = [f"--search_dir={tmp_path / 'results'}", f"--json={tmp_path / 'search.json'}"]
    words = [*TINY, "--search=layout", *stored]
    assert command.main([*words, "--search_minutes=0"]) == 75
    assert "the same command continues it" in capsys.readouterr().out and not compiled
    assert not json.loads((tmp_path / "search.json").read_text())["finished"]

    assert command.main(words) == 0
    shown, count = capsys.readouterr().out, len(compiled)
    assert "best: 8 rows, fsdp 4 x tensor 2, fsdp_tp, remat dots" in shown
    assert f"{count} layouts fit this run" in shown
    written = json.loads((tmp_path / "search.json").read_text())
    assert written["finished"] and written["best"][1] == '--gin.MESH={"fsdp": 4, "tensor": 2}'
    assert len(written["candidates"]) == count
    assert set(TINY) < set(compiled[0]) and not any("search" in word for word in compiled[0])
    # What is stored is not compiled again, not even without time.
    assert command.main([*words, "--search_minutes=0"]) == 0 and len(compiled) == count
    assert command.main([*words, "--memory_limit=5"]) == 1
    assert "nothing fits into 5.00 GB" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--cache=capacity=3"], "--cache is read by --program=prefill or decode alone"),
        (
            ["--program=decode", "--blocks=2"],
            "--blocks is read by --program=covariances or squares alone",
        ),
        (["--program=decode", "--cache=capacity"], "--cache=capacity: expected NAME=VALUE"),
        (["--program=decode", *["--cache=capacity=3"] * 2], "--cache=capacity is set twice"),
        (["--memory_limit=3"], "--memory_limit is read by a search alone"),
        (["--search=batch", "--program=decode"], "searches for updates alone"),
        (["--search=layout", "--hlo=x"], "--hlo writes one program's text"),
        (["--search=layout", "--memory_limit=17"], "must be above 0 and at most 16.91 GB"),
    ],
)
def test_flags_that_nothing_would_read_are_errors(flags, message, capsys, monkeypatch):
    monkeypatch.setattr(tpu_topology, "prepare_environment", lambda: None)
    assert command.main([*TINY, *flags]) == 2
    assert message in capsys.readouterr().err
