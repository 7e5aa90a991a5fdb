"""Sweeps: files multiplied out, configurations checked, runs driven, stopped and resumed as a whole."""

import dataclasses
import io
import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest
from etils import epath
from rich.console import Console

from espalier.launch.submit.base import Job, State, Status, first_error
from espalier.launch.sweep import __main__ as sweep
from espalier.launch.sweep import driver, screen
from espalier.launch.sweep import file as sweep_file
from espalier.launch.sweep import run as sweep_run
from espalier.launch.sweep.driver import RunState
from espalier.launch.sweep.file import Run, SweepError
from espalier.launch.sweep.folder import Planned, SweepFolder, SweepFolderError, read_results
from espalier.trainers.checkpoints import step_dir
from espalier.trainers.telemetry.metric_writers import read_jsonl

ROOT = pathlib.Path(__file__).parents[2]


@pytest.fixture
def write(tmp_path):
    """Writes a sweep file whose get_config returns the given ConfigDict; returns its path."""

    def make(text, parameters=""):
        path = tmp_path / "sweep.py"
        path.write_text(
            "import ml_collections\n\n\n"
            f"def get_config({parameters}):\n"
            f"    return ml_collections.ConfigDict({text})\n"
        )
        return str(path)

    return make


# ---- Sweep files.


PHASES = """dict(
    seeds=(0, 1),
    gin_files=('all.gin',),
    bindings=('A=1',),
    memory_gb=2,
    arms=dict(
        cooldown=dict(parent='continued', bindings=('A=2',), seeds=(1,), memory_gb=3),
        continued=dict(parent='balanced', gin_files=('continued.gin',), evaluations=()),
        balanced={},
    ),
    evaluations=dict(skills=dict(command=('measure', '{run}', '{json}'))),
)"""


def test_arms_and_seeds_are_runs_parents_first(write):
    runs = sweep_file.read(write(PHASES))
    assert [(run.name, run.parent) for run in runs] == [
        ("balanced/seed0", None),
        ("continued/seed0", "balanced/seed0"),
        ("balanced/seed1", None),
        ("continued/seed1", "balanced/seed1"),
        ("cooldown/seed1", "continued/seed1"),
    ]
    cooldown, continued = runs[4], runs[1]
    assert cooldown.bindings == ("A=1", "A=2", "SEED=1") and cooldown.memory_gb == 3
    assert continued.gin_files == ("all.gin", "continued.gin") and continued.memory_gb == 2
    assert set(cooldown.evaluations) == {"skills"} and not continued.evaluations


def test_sizes_multiply_and_win_over_arms(write):
    text = """dict(
        sizes=dict(s={'gin_files': ('s.gin',)}, m={'bindings': ('A=3',), 'memory_gb': 9}),
        arms=dict(one={'gin_files': ('one.gin',), 'bindings': ('A=2',)},
                  two={'parent': 'one', 'sizes': ('m',)}),
    )"""
    runs = {run.name: run for run in sweep_file.read(write(text))}
    assert list(runs) == ["one/m/seed0", "one/s/seed0", "two/m/seed0"]
    assert runs["one/s/seed0"].gin_files == ("one.gin", "s.gin")
    assert runs["one/m/seed0"].bindings == ("A=2", "A=3", "SEED=0")
    assert runs["two/m/seed0"].parent == "one/m/seed0" and runs["two/m/seed0"].memory_gb == 9


def test_what_an_arm_has_of_its_own_at_a_size_wins(write):
    text = """dict(
        sizes=dict(s={'bindings': ('A=1',)}, m={'bindings': ('A=3',)}, l={}),
        arms=dict(
            rows=dict(made=('write', '{run}')),
            one=dict(sizes=dict(s=dict(bindings=('A=4', "B='{rows}'"), memory_gb=5), m={})),
        ),
    )"""
    runs = {run.name: run for run in sweep_file.read(write(text)) if run.arm == "one"}
    assert list(runs) == ["one/m/seed0", "one/s/seed0"]
    narrow = runs["one/s/seed0"]
    assert narrow.bindings == ("A=1", "A=4", "B='{rows}'", "SEED=0") and narrow.memory_gb == 5
    assert narrow.made_of == {"rows": "rows/s/seed0"}
    assert runs["one/m/seed0"].bindings == ("A=3", "SEED=0")


def test_the_text_after_a_colon_is_given_to_get_config(write):
    path = write("dict(arms={arm: {}})", parameters="arm")
    assert [run.arm for run in sweep_file.read(f"{path}:chosen")] == ["chosen"]


@pytest.mark.parametrize(
    ("text", "errors"),
    [
        (
            "dict(arms=dict(a={'parent': 'balanced'}, balance={}))",
            [r"arm 'a': its parent 'balanced' does not exist; did you mean 'balance'"],
        ),
        (
            "dict(arms=dict(a=dict(parent='c'), b=dict(parent='a'), c=dict(parent='b')))",
            [r"'a' is its own ancestor \(a -> c -> b -> a\)", "arm 'b'", "arm 'c'"],
        ),
        (
            "dict(arms=dict(a=dict(seeds=(0,)), b=dict(parent='a', seeds=(0, 1))))",
            [r"arm 'b': its parent 'a' lacks the seeds 1\."],
        ),
        (
            "dict(sizes=dict(s={}, m={}), arms=dict(a=dict(sizes=('s', 'l')), b=dict(parent='a')))",
            [r"arm 'a': sizes names 'l'; valid names are m, s", r"lacks the sizes 'm'"],
        ),
        (
            "dict(sizes=dict(s={}), arms=dict(a=dict(sizes=dict(s=dict(binding=('A=1',))))))",
            [r"arm 'a', size 's': a size has no 'binding'; did you mean 'bindings'"],
        ),
        (
            "dict(sizes=dict(s={}), arms=dict(a=dict(sizes=dict(l={}, s=dict(bindings=('A={b}',))))))",
            [r"arm 'a': sizes names 'l'", r"a binding names \{b\}, but no arm has this name"],
        ),
        (
            "dict(sizes=dict(s={}), arms=dict(a=dict(made=('x', '{run}'), sizes=dict(s=dict(bindings=('A=1',))))))",
            [r"arm 'a' is made, not trained: remove its bindings"],
        ),
        ("{'arms': {'a': {}, 'b': {}, 'a': {}}}", ["line 5 repeats the key 'a'"]),
        ("dict(arms=dict(a={}), seeds=(1, 1))", [r"seeds = \(1, 1\) repeats a seed"]),
        ("dict(arms=dict(a={}), seeds=(0.5,))", ["is not a tuple of integers"]),
        (
            "dict(arm=dict(a={}))",
            ["a sweep has no 'arm'; did you mean 'arms'", "there are no arms"],
        ),
        ("dict(arms={'a/b': {}})", ["names have letters"]),
        (
            "dict(arms=dict(a=dict(bindings=('SEED=1', 'STEPS'), gin_files='x.gin', memory_gb=0)))",
            [
                "sets SEED",
                "'STEPS' is not NAME=VALUE",
                "gin_files = 'x.gin' is not a tuple",
                "memory_gb = 0 is not a positive",
            ],
        ),
        (
            "dict(arms=dict(a={}, b=dict(parent='a', bindings=('INITIAL_CHECKPOINT_PATH=None',))))",
            ["INITIAL_CHECKPOINT_PATH is bound, but the parent 'a' sets it"],
        ),
        (
            "dict(arms=dict(a={}), evaluations=dict("
            "x={}, y=dict(command=('score',)), z=dict(call='launch.sweep:nope'),"
            " w=dict(call='launch.sweep.folder:read_results', arguments=dict(wrong=1))))",
            [
                "'x': give either call",
                r"'y': its command has no word with \{json\}",
                "'z': 'launch.sweep:nope' cannot be called",
                "'w': .* unexpected keyword argument 'wrong'",
            ],
        ),
        ("1 / 0", [r"get_config\(\) could not be called: ZeroDivisionError"]),
    ],
)
def test_what_is_wrong_with_a_file_is_said_at_once(write, text, errors):
    with pytest.raises(SweepError) as raised:
        sweep_file.read(write(text))
    assert len(raised.value.problems) == len(errors), raised.value
    for error in errors:
        assert re.search(error, str(raised.value)), raised.value


def test_a_file_that_is_not_there():
    with pytest.raises(SweepError, match="does not exist: give --sweep FILE.py"):
        sweep_file.read("nowhere.py")


# ---- Driving, with runs that only write what a run leaves behind.


def planned(name, parent=None, *, steps=10, digest="1", evaluations=()):
    arm, seed = name.split("/seed")
    run = Run(
        name=name,
        arm=arm,
        size=None,
        seed=int(seed),
        parent=parent,
        gin_files=(),
        bindings=(),
        evaluations={key: {} for key in evaluations},
        memory_gb=None,
    )
    return Planned(
        run=run,
        digest=digest,
        total_steps=steps,
        first_step=0,
        tokens_per_step=100,
        start={},
        evaluation_digests={key: key for key in evaluations},
    )


PLAN = (
    planned("a/seed0"),
    planned("b/seed0", "a/seed0"),
    planned("c/seed0", "b/seed0"),
    planned("a/seed1"),
)


class FakeSubmitter:
    """Runs a function for each job when it is asked about, one for each question."""

    def __init__(self, run):
        self._run = run
        self.jobs: dict[str, Job] = {}
        self.found: dict[str, Status] = {}
        self.started: list[str] = []
        self.cancelled = False

    def submit(self, job):
        self.jobs[job.name] = job
        self.found[job.name] = Status(state=State.WAITING)
        return job.name

    def statuses(self, handles):
        for name, job in self.jobs.items():
            if self.found[name].state is State.WAITING:
                before = [self.found[after] for after in job.after]
                if any(s.state is State.DROPPED or s.exit_status for s in before):
                    self.found[name] = Status(state=State.DROPPED)
                elif all(s.state is State.ENDED for s in before):
                    self.started.append(name)
                    status = self._run(name)
                    self.found[name] = Status(
                        state=State.ENDED, exit_status=status, seconds=6.0, memory_gb=1.0
                    )
                    break
        return {handle: self.found[handle] for handle in handles}

    def cancel(self, handle):
        self.cancelled = True
        if self.found[handle].state is State.WAITING:
            self.found[handle] = Status(state=State.DROPPED)

    def close(self):
        pass


@pytest.fixture
def drive(tmp_path, monkeypatch):
    """Drives a plan in which the named runs end with another status than 0."""
    monkeypatch.setattr(driver, "_POLL_SECONDS", 0.0)
    folder = SweepFolder(tmp_path / "sweep")

    def go(plan=PLAN, *, bad=None, minutes=None, on_run=lambda name: None):
        by_name = {entry.name: entry for entry in plan}

        def train(name):
            on_run(name)
            status = (bad or {}).get(name, 0)
            if status == 0:
                finish(folder, by_name[name])
            else:
                folder.write_record(name, {"digest": by_name[name].digest, "evaluations": {}})
                with open(folder.log(name), "a") as log:
                    log.write("step 1\rstep 2\nerror: the data ran out: add some.\n")
            return status

        submitter = FakeSubmitter(train)
        status = driver.drive(
            folder,
            plan,
            submitter,
            wanted=list(by_name),
            command=lambda name: ("run", name),
            watch=lambda runs: None,
            minutes=minutes,
        )
        return status, submitter

    go.folder = folder
    return go


def finish(folder, entry):
    """What a run leaves that has been trained and evaluated."""
    trained = {
        "step": entry.total_steps,
        "checkpoint": f"runs/{entry.name}/checkpoints/{entry.total_steps}",
        "held_out": {"text": {"loss": float("nan"), "bits_per_byte": 1.5}},
        "tokens": entry.total_steps * entry.tokens_per_step,
        "epochs": {"text": 0.5},
    }
    measured = {
        key: {"digest": digest, "result": {"score": 1}, "seconds": 1.0}
        for key, digest in entry.evaluation_digests.items()
    }
    record = {"digest": entry.digest, "trained": trained, "evaluations": measured}
    folder.write_record(entry.name, record)


def states(folder, plan=PLAN):
    return {run.planned.name: run.state for run in driver.progress(folder, plan)}


def test_results_have_a_row_per_finished_run_and_nothing_is_run_twice(drive):
    status, submitter = drive()
    assert status == 0 and submitter.started == [entry.name for entry in PLAN]
    assert submitter.jobs["b/seed0"].after == ("a/seed0",)
    rows = read_results(drive.folder.path)
    assert [row["run"] for row in rows] == [entry.name for entry in PLAN]
    row = rows[2]
    assert (row["arm"], row["seed"], row["parents"]) == ("c", 0, ["b/seed0", "a/seed0"])
    assert (row["tokens"], row["tokens_total"]) == (1000, 3000)
    assert (row["epochs"], row["epochs_total"]) == ({"text": 0.5}, {"text": 1.5})
    assert (row["seconds"], row["memory_gb"], row["attempts"]) == (6.0, 1.0, 1)
    assert row["held_out"]["text"]["loss"] != row["held_out"]["text"]["loss"]  # NaN came through
    status, submitter = drive()
    assert status == 0 and submitter.started == []
    assert len(read_results(drive.folder.results)) == 4


def test_a_failure_stops_only_what_starts_from_it_and_is_tried_again(drive):
    status, submitter = drive(bad={"b/seed0": 2})
    assert status == 1 and submitter.started == ["a/seed0", "b/seed0", "a/seed1"]
    assert states(drive.folder) == {
        "a/seed0": RunState.DONE,
        "b/seed0": RunState.FAILED,
        "c/seed0": RunState.BLOCKED,
        "a/seed1": RunState.DONE,
    }
    (attempt,) = drive.folder.attempts("b/seed0")
    assert attempt["error"] == "the data ran out: add some." and attempt["status"] == 2
    assert attempt["tail"][-1] == "error: the data ran out: add some."
    assert [row["run"] for row in read_results(drive.folder.path)] == ["a/seed0", "a/seed1"]
    status, submitter = drive()
    assert status == 0 and submitter.started == ["b/seed0", "c/seed0"]
    assert read_results(drive.folder.path)[1]["attempts"] == 2


@pytest.mark.parametrize(
    ("text", "status", "error"),
    [
        ("Traceback ...\n  File x\nValueError: bad\nmore\n", 1, "ValueError: bad"),
        ("train: 1\rtrain: 2\n", 1, "train: 2"),
        ("", 4, "ended with status 4"),
        ("error: old\n", -9, "ended by SIGKILL (out of memory?)"),
    ],
)
def test_the_reason_of_a_failure_is_one_line(tmp_path, text, status, error):
    (tmp_path / "log").write_text(text)
    assert first_error(tmp_path / "log", status) == error


def test_stopped_runs_and_the_time_budget_end_with_75(drive):
    status, submitter = drive(bad={"a/seed0": 75})
    assert status == 75 and submitter.started == ["a/seed0", "a/seed1"]
    assert states(drive.folder)["a/seed0"] is RunState.STOPPED
    assert states(drive.folder)["c/seed0"] is RunState.WAITING
    status, submitter = drive(minutes=0.0)  # over after the first run
    assert submitter.cancelled and status == 75 and submitter.started == ["a/seed0"]
    assert drive()[0] == 0


def test_a_signal_stops_the_sweep_and_is_given_back(drive):
    before = signal.getsignal(signal.SIGINT)
    status, submitter = drive(on_run=lambda name: signal.raise_signal(signal.SIGINT))
    assert status == 75 and submitter.started == ["a/seed0"]
    assert signal.getsignal(signal.SIGINT) is before


def test_a_changed_run_is_known_and_set_aside_and_a_new_evaluation_is_no_change(drive):
    drive()
    folder = drive.folder
    more = planned("a/seed0", evaluations=("skills",))
    assert not folder.changed(more) and not folder.done(more)
    assert drive((more,))[1].started == ["a/seed0"]
    other = dataclasses.replace(more, evaluation_digests={"skills": "other"})
    assert folder.changed(other) == ["skills"]
    folder.set_aside(other)
    assert folder.record("a/seed0")["evaluations"] == {}
    assert "trained" in folder.record("a/seed0")
    changed = planned("a/seed0", digest="2")
    assert folder.changed(changed) == ["training"]
    folder.set_aside(changed)
    assert not folder.directory("a/seed0").exists()
    assert (folder.path / "replaced" / "a" / "seed0.1" / "sweep_run.json").exists()


def test_one_driver_at_a_time(drive):
    folder = drive.folder
    with folder.lock():
        assert folder.driven()
        with pytest.raises(SweepFolderError, match=f"in use: process {os.getpid()} on .*--status"):
            folder.lock()
    assert not folder.driven()


# ---- Evaluations.


def test_evaluations_by_call_and_by_command(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "measures.py").write_text(
        "def named(run, factor):\n    return {'run': run, 'factor': factor}\n"
        "def bad(run):\n    return object()\n"
    )
    call = {"call": "measures:named", "arguments": {"factor": 3}}
    directory = tmp_path / "seed0"
    assert sweep_run.evaluate("x", call, directory) == {"run": str(directory), "factor": 3}
    write = "import json, sys; json.dump(sys.argv[1], open(sys.argv[2], 'w'))"
    command = {"command": ("{python}", "-c", write, "{run}", "{json}")}
    assert sweep_run.evaluate("x", command, directory) == str(directory)
    for settings, error in (
        ({"call": "measures:bad"}, "'x': measures:bad returned a value that is not JSON"),
        ({"command": ("sh", "-c", "exit 4", "{json}")}, "'x' ended with status 4"),
        ({"command": ("true", "{json}")}, "'x' wrote no JSON"),
    ):
        with pytest.raises(sweep_run.EvaluationError, match=error):
            sweep_run.evaluate("x", settings, directory)


# ---- The screen.


def rendered(group):
    console = Console(width=80, file=io.StringIO())
    console.print(group)
    return console.file.getvalue()


def test_sixty_runs_fit_eighty_columns_and_a_page():
    runs = []
    for i in range(60):
        arm = f"balanced_synth_then_text_cooldown_{i // 3}"
        entry = planned(f"{arm}/seed{i % 3}", f"balanced_then_text/seed{i % 3}")
        state = list(RunState)[i % 6]
        runs.append(
            driver.Progress(
                planned=entry,
                state=state,
                step=5,
                loss=1.23456,
                seconds=60.0,
                rate=0.1,
                error="error " * 30 if state is RunState.FAILED else None,
            )  # fmt: skip
        )
    lines = rendered(screen.table("sweep", runs)).splitlines()
    assert max(map(len, lines)) <= 80
    text = "\n".join(lines)
    assert "10 of 60 runs done, 10 running" in text
    for i in range(20):
        assert re.search(rf"^balanced_\S*_{i} ", text, re.MULTILINE), text
    assert "✓ 1.235" in text and "5/10" in text and "50 s" in text


def test_many_seeds_have_a_mark_each():
    runs = [
        driver.Progress(planned=planned(f"a/seed{i}"), state=RunState.DONE, step=10, loss=1.0)
        for i in range(12)
    ]
    text = rendered(screen.table("sweep", runs))
    (line,) = re.findall("^a .*", text, re.MULTILINE)
    assert line.count("✓") == 12 and max(map(len, text.splitlines())) <= 80


def progress(name, state, step, seconds, rate=None):
    return driver.Progress(
        planned=planned(name), state=state, step=step, seconds=seconds, rate=rate
    )


def test_files_of_runs_that_have_ended_or_not_begun_are_not_read_again():
    known = [
        progress("a/seed0", RunState.DONE, 10, 20.0),
        progress("a/seed1", RunState.WAITING, 0, 0.0),
    ]
    plan = [entry.planned for entry in known]
    jobs = {"a/seed1": Status(state=State.WAITING)}
    assert driver.progress(None, plan, jobs, known) == known  # no folder is asked
    with pytest.raises(AttributeError):
        driver.progress(None, plan, {"a/seed1": Status(state=State.RUNNING)}, known)


def test_what_is_left_is_estimated_from_what_is_done():
    runs = [
        progress("a/seed0", RunState.DONE, 10, 20.0),  # 2 s a step
        progress("a/seed1", RunState.WAITING, 0, 0.0),  # 20 s
        progress("b/seed0", RunState.RUNNING, 5, 20.0, 0.25),  # 4 s a step: 20 s
    ]
    assert screen.seconds_left(runs, workers=1) == pytest.approx(40)
    assert screen.seconds_left(runs, workers=2) == pytest.approx(20)
    assert screen.seconds_left(runs[1:2], workers=1) is None


# ---- The command, on real configurations and runs.


GIN = """
from __gin__ import dynamic_registration

import local_text
from espalier.launch import train
from espalier.trainers import recipe

include '{programs}/small_text.gin'

SEED = 0
DIRECTORY = '{cache}/text'
recipe.Recipe.seed = %SEED
local_text.open_stream.seed = %SEED
train.train.eval_tasks = ('licence',)
train.train.hooks = [@local_text.Sleep]
local_text.Sleep.seconds = 0.0
schedules.cosine.total_steps = 16
"""
SWEEP = """dict(
    gin_files=({gin!r},),
    bindings=('TRAIN_STEPS=12', 'local_text.Sleep.seconds={sleep}'),
    arms=dict(
        base=dict(seeds=(3,)),
        longer=dict(seeds=(3,), parent='base', bindings=(
            'TRAIN_STEPS=16', "initial.InitialCheckpoint.scope='state'")),
    ),
    evaluations=dict(step=dict(
        command=('sh', '-c', 'ls $0/checkpoints | sort -n | tail -1 > $1', '{{run}}', '{{json}}'))),
)"""


@pytest.fixture
def tiny(train, write, tmp_path):
    """A sweep of two tiny runs, the second of which continues the first."""
    gin = tmp_path / "tiny.gin"
    text = GIN.format(programs=train.programs, cache=train.cache)
    gin.write_text(
        text.replace(
            "from espalier.trainers",
            "from espalier.trainers.optim import schedules\nfrom espalier.trainers",
        )
    )

    def make(sleep=0.0, change=lambda text: text):
        return write(change(SWEEP.format(gin=str(gin), sleep=sleep)))

    make.gin = str(gin)
    return make


@pytest.fixture
def command(tmp_path, capsys):
    """Runs the command in this process; returns status, stdout and stderr."""

    def run(*arguments):
        status = sweep.main([*arguments, f"--out={tmp_path / 'out'}"])
        return status, *capsys.readouterr()

    return run


def test_all_configurations_are_checked_before_the_first_run(tiny, command, tmp_path):
    def broken(text):
        arms = """bad_gin=dict(gin_files=('nowhere.gin',)),
        bad_name=dict(bindings=('TRAIN_STEP=3',)),
        bad_value=dict(bindings=("TRAIN_STEPS='x'",)),
        too_short=dict(seeds=(3,), parent='base', bindings=("initial.InitialCheckpoint.scope='state'",)),
        bad_batch=dict(bindings=('recipe.Recipe.microbatches=3',)),
        wider=dict(seeds=(3,), parent='base', bindings=(
            'config.TransformerConfig.mlp_dim=64', 'TRAIN_STEPS=3')),
        adapted=dict(seeds=(3,), parent='base', gin_files=('t5x_configs/methods/adapters/lora.gin',), bindings=(
            'LORA_RANK=2', 'TRAIN_STEPS=3')),
        base="""
        return text.replace("base=", arms, 1)

    status, _, err = command("--sweep", tiny(change=broken))
    assert status == 2 and "Traceback" not in err
    for said in (
        "bad_gin: --gin_file: no file 'nowhere.gin'",
        "bad_name: --gin.TRAIN_STEP=3: nothing reads the macro 'TRAIN_STEP'",
        "bad_value: --gin.TRAIN_STEPS='x'",
        "too_short: it continues base, which ends at step 12",
        "bad_batch: BATCH_SIZE = 8 is not a multiple of the 3 microbatches",
        "wider: its parent base has another model: layers/",
    ):
        assert said in err, err
    assert "adapted" not in err  # its adapters are new
    assert not (tmp_path / "out").exists()


def test_a_dry_run_shows_the_runs_and_what_they_stand_for(tiny, command, tmp_path):
    status, out, _ = command("--sweep", tiny(), "--dry_run")
    assert status == 0 and "0 of 2 runs done, 2 waiting" in out
    assert "longer/seed3: 4 steps\n  espalier train --gin_file=" in out
    assert not (tmp_path / "out").exists()
    for arguments, error in (
        (("--only=lunger/*",), "matches none of the 2 runs; did you mean 'longer/seed3'"),
        (("--minutes=0",), "--minutes 0.0: give a positive"),
    ):
        status, _, err = command("--sweep", tiny(), "--dry_run", *arguments)
        assert status == 2 and error in err
    status, out, _ = command("--sweep", tiny(), "--dry_run", "--only=longer/*")
    assert "2 runs" in out  # the one it starts from too
    status, out, _ = command("--sweep", tiny(), "--dry_run", "--only=base/*")
    assert "1 runs" in out


KEY = "eval/licence/loss"


def await_step(directory, step, process):
    path = pathlib.Path(directory) / "metrics.jsonl"
    until = time.monotonic() + 120
    while time.monotonic() < until:
        assert process.poll() is None, process.stdout.read()
        if path.exists() and any(row["step"] >= step for row in read_jsonl(str(path))):
            return
        time.sleep(0.05)
    raise AssertionError(f"{directory} did not reach step {step}")


def digests(path, step):
    return step_dir.read_manifest(epath.Path(path) / "checkpoints" / str(step)).arrays


def test_a_sweep_that_is_stopped_and_killed_ends_as_runs_by_hand(train, tiny, command, tmp_path):
    # By hand: the first run, and one that continues it.
    hand = {}
    for name, bindings in (
        ("base", ["TRAIN_STEPS=12"]),
        ("longer", ["TRAIN_STEPS=16", "initial.InitialCheckpoint.scope='state'"]),
    ):
        if name == "longer":
            bindings.append(f"INITIAL_CHECKPOINT_PATH={str(hand['base'])!r}")
        hand[name] = tmp_path / "hand" / name
        given = [*bindings, "SEED=3", f"MODEL_DIR={str(hand[name])!r}"]
        result = train(f"--gin_file={tiny.gin}", *(f"--gin.{binding}" for binding in given))
        assert result.status == 0, result.err

    out = tmp_path / "out"
    path = tiny(sleep=0.2)

    def start():
        words = [sys.executable, "-m", "espalier.launch.sweep", "--sweep", path, f"--out={out}"]
        return subprocess.Popen(
            words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    with start() as process:
        await_step(out / "runs/base/seed3", 4, process)
        process.send_signal(signal.SIGINT)
        printed = process.communicate(timeout=120)[0]
    assert process.returncode == 75, printed
    assert re.search(r"base/seed3: stopped at step \d+", printed), printed
    assert states_of(out) == {"base/seed3": "stopped", "longer/seed3": "waiting"}
    with start() as process:
        await_step(out / "runs/longer/seed3", 14, process)
        process.kill()
    # The run is told by the system and saves its work.
    until = time.monotonic() + 60
    while SweepFolder(out).in_use("longer/seed3") and time.monotonic() < until:
        time.sleep(0.1)
    saved = step_dir.complete_steps(epath.Path(out / "runs/longer/seed3/checkpoints"))
    assert max(saved) >= 14
    base = out / "runs/base/seed3"
    kept = (base / "metrics.jsonl").read_bytes(), (base / "run.json").read_bytes()

    status, printed, _ = command("--sweep", path)
    assert status == 0, printed
    assert kept == ((base / "metrics.jsonl").read_bytes(), (base / "run.json").read_bytes())
    for name, step in (("base", 12), ("longer", 16)):
        assert digests(out / f"runs/{name}/seed3", step) == digests(hand[name], step)
    rows = {row["arm"]: row for row in read_results(out)}
    for name, step, tokens in (("base", 12, 12 * 512), ("longer", 16, 4 * 512)):
        row = rows[name]
        (by_hand,) = (r for r in read_jsonl(f"{hand[name]}/metrics.jsonl") if KEY in r)
        assert (row["step"], row["tokens"], row["evaluations"]) == (step, tokens, {"step": step})
        assert 0.7 * tokens < row["loss_tokens"] <= tokens  # without padding
        assert row["held_out"]["licence"]["loss"] == by_hand[KEY]
    assert rows["longer"]["start"] == {"initial_scope": "state"}
    assert rows["longer"]["parents"] == ["base/seed3"]
    # Twelve batches, then four more, of eight rows each.
    ratio = rows["longer"]["epochs"]["licence"] / rows["base"]["epochs"]["licence"]
    assert ratio == pytest.approx(4 / 12, rel=1e-5)

    # Nothing is left to do, and what has changed is named and refused.
    status, printed, _ = command("--sweep", path)
    assert status == 0 and "2 of 2 runs done" in printed and "started" not in printed
    change = tiny(sleep=0.2, change=lambda text: text.replace("STEPS=16", "STEPS=14"))
    status, _, err = command("--sweep", change)
    assert status == 2 and "longer/seed3: TRAIN_STEPS was 16 there and is 14 now" in err
    assert "base/seed3" not in err and "--rerun_changed" in err

    # A file that is edited under a sweep would make runs of one arm differ.
    folder = SweepFolder(out)
    plan = [dataclasses.replace(entry, digest="0") for entry in folder.read_plan()]
    folder.write_plan("sweep.py", plan)
    folder.directory("base/seed3").rename(out / "elsewhere")
    with pytest.raises(SweepFolderError, match="its gin files have changed since"):
        sweep_run.run_one(out=folder.path, run="base/seed3")


def states_of(out):
    folder = SweepFolder(out)
    return {
        run.planned.name: run.state.value for run in driver.progress(folder, folder.read_plan())
    }
