"""Arms of a sweep that a command makes of other arms' runs: read, checked, made, stopped and gone on with."""

import dataclasses
import os
import re
import signal
import sys
import threading
import time

import pytest

from espalier.launch.submit import local, worker
from espalier.launch.submit.base import State, Status
from espalier.launch.sweep import __main__ as sweep
from espalier.launch.sweep import check, driver, parts
from espalier.launch.sweep import file as sweep_file
from espalier.launch.sweep import run as sweep_run
from espalier.launch.sweep.file import SweepError
from espalier.launch.sweep.folder import Planned, SweepFolder, SweepFolderError, read_results
from espalier.trainers.checkpoints import step_dir

# ---- Files.


@pytest.fixture
def write(tmp_path):
    """Writes a sweep file whose get_config returns the given text; returns its path."""

    def make(text):
        path = tmp_path / "sweep.py"
        path.write_text(
            f"from ml_collections import ConfigDict\n\n\ndef get_config():\n    return {text}\n"
        )
        return str(path)

    return make


MIXTURES = """ConfigDict(dict(
    seeds=(0, 7),
    gin_files=('all.gin',),
    bindings=('A=1',),
    memory_gb=2,
    arms=dict(
        mixture=dict(parent='start', seeds=(7,)),
        start=dict(made=('upcycle', '{seed}', '{code}/x', '--draw={SEED}', "{'kept': 1}", '--to={run}')),
        code=dict(parent='seed'),
        soup=dict(made=('{python}', '{start}', '{seed}', '{run}'), evaluations=('score',), memory_gb=5),
        seed={},
    ),
    evaluations=dict(score=dict(command=('score', '{json}'))),
))"""


def test_runs_come_after_all_that_they_are_made_of(write):
    runs = {run.name: run for run in sweep_file.read(write(MIXTURES))}
    names = list(runs)
    assert len(names) == 9 and "mixture/seed0" not in runs
    for run in runs.values():
        assert all(names.index(above) < names.index(run.name) for above in run.above), names
    start, soup = runs["start/seed7"], runs["soup/seed7"]
    assert start.made == ("upcycle", "{seed}", "{code}/x", "--draw=7", "{'kept': 1}", "--to={run}")
    assert start.made_of == {"seed": "seed/seed7", "code": "code/seed7"}
    assert soup.above == ("start/seed7", "seed/seed7") and soup.parent is None
    assert start.gin_files == start.bindings == () and start.memory_gb == 2 and soup.memory_gb == 5
    # Only those that a made arm names itself.
    assert not start.evaluations and set(soup.evaluations) == {"score"}
    assert set(runs["code/seed0"].evaluations) == {"score"}
    assert runs["mixture/seed7"].parent == "start/seed7"


def test_sizes_are_of_all_that_something_is_made_of(write):
    text = (
        "ConfigDict(dict(sizes=dict(s={}, m={}), arms=dict(a={}, b=dict(made=('{a}', '{run}')))))"
    )
    runs = {run.name: run for run in sweep_file.read(write(text))}
    assert runs["b/m/seed0"].made_of == {"a": "a/m/seed0"}
    assert runs["b/s/seed0"].above == ("a/s/seed0",)


NAMED = """ConfigDict(dict(seeds=(0, 1), arms=dict(
    learned=dict(parent='sft', bindings=("PAIRS='{pairs}/x.jsonl'", "LENGTHS={'targets': 8}")),
    pairs=dict(made=('draw', '{sft}', '--to={run}')), sft={},
)))"""


def test_bindings_name_what_other_arms_made(write, tmp_path):
    runs = {run.name: run for run in sweep_file.read(write(NAMED))}
    assert list(runs)[:3] == ["sft/seed0", "pairs/seed0", "learned/seed0"]
    learned = runs["learned/seed1"]
    assert learned.above == ("sft/seed1", "pairs/seed1") and learned.parent == "sft/seed1"

    folder = SweepFolder(tmp_path / "out")
    planned = {
        name: Planned(
            run=run,
            digest=name,
            total_steps=0,
            first_step=0,
            tokens_per_step=0,
            start={},
            evaluation_digests={},
        )
        for name, run in runs.items()
    }
    sources = folder.sources(learned, planned)
    made_at = f"{folder.path}/runs/pairs/seed1/made"
    bindings = check.bindings_of(learned, folder, sources=sources)
    assert bindings[:2] == [f"PAIRS='{made_at}/x.jsonl'", "LENGTHS={'targets': 8}"]

    # Where the folder is changes nothing; what is made there does.
    def digest(pairs, sources, plan=planned):
        return check.config_digest({"PAIRS": pairs}, learned, plan, sources)

    first = digest("'{pairs}/x.jsonl'", {})
    assert digest(f"'{made_at}/x.jsonl'", sources) == first != digest("'{pairs}/y.jsonl'", {})
    other = dataclasses.replace(planned["pairs/seed1"], digest="changed")
    assert digest("'{pairs}/x.jsonl'", {}, {**planned, "pairs/seed1": other}) != first


@pytest.mark.parametrize(
    ("arms", "errors"),
    [
        (
            "m=dict(made=('{sed}', '{run}', '{python}')), seed={}",
            [r"arm 'm': its command names \{sed\}, but no arm has this name; did you mean 'seed'"],
        ),
        ("m=dict(made=('{a}', '--to=x')), a={}", [r"arm 'm': its command has no word with \{run\}"]),
        (
            "m=dict(made=('{c}', '{run}')), c=dict(parent='b'), b=dict(parent='m')",
            [r"'m' is its own ancestor \(m -> c -> b -> m\)", "arm 'c'", "arm 'b'"],
        ),
        ("m=dict(made=('{m}', '{run}'))", [r"'m' is its own ancestor \(m -> m\)"]),
        (
            "a=dict(seeds=(0,)), b={}, m=dict(made=('{b}', '{a}', '{run}'), seeds=(0, 1))",
            [
                r"arm 'm': the arm 'a' in its command lacks the seeds 1\.",
                r"arm 'm': the arm 'b' in its command lacks the seeds 1\.",
            ],
        ),
        (
            "a={}, m=dict(made=('{a}', '{run}'), parent='a', gin_files=('x.gin',), bindings=('A=1',))",
            [f"arm 'm' is made, not trained: remove its {key}" for key in ("parent", "gin_files", "bindings")],
        ),
        (
            "a=dict(bindings=(\"X='{b}'\",), seeds=(0, 1)), b=dict(made=('{run}',), seeds=(0,))",
            [r"arm 'a': the arm 'b' in its bindings lacks the seeds 1\."],
        ),
        (
            "a=dict(bindings=(\"X='{bb}/x'\",)), b={}",
            [r"arm 'a': a binding names \{bb\}, but no arm has this name; did you mean 'b'"],
        ),
        ("a=dict(bindings=(\"X='{a}'\",))", [r"'a' is its own ancestor \(a -> a\)"]),
        ("m=dict(made='cp {run}')", ["made = 'cp {run}' is not a tuple of strings"]),
        ("m=dict(made=())", [r"made = \(\) is not a tuple of strings"]),
        (
            "run={}, m=dict(made=('{run}',))",
            [r"arm 'run': \{run\} has another meaning in commands: rename the arm"],
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_made_arm_is_said_at_once(write, arms, errors):
    with pytest.raises(SweepError) as raised:
        sweep_file.read(write(f"ConfigDict(dict(arms=dict({arms})))"))
    assert len(raised.value.problems) == len(errors), raised.value
    for error in errors:
        assert re.search(error, str(raised.value)), raised.value


def test_sizes_that_are_lacking_are_named(write):
    text = """ConfigDict(dict(sizes=dict(s={}, m={}),
        arms=dict(a=dict(sizes=('s',)), b=dict(made=('{a}', '{run}')))))"""
    with pytest.raises(SweepError, match="arm 'b': the arm 'a' in its command lacks the sizes 'm'"):
        sweep_file.read(write(text))


def test_a_digest_is_of_the_command_and_of_all_above_it(write, tmp_path):
    folder = SweepFolder(tmp_path / "out")

    def digests(change=lambda text: text):
        text = """ConfigDict(dict(arms=dict(
            a=dict(made=('draw', '{SEED}', '{run}')), b=dict(made=('{a}', '{run}')),
            c=dict(made=('{b}', '{run}')), d=dict(made=('draw', '{run}')))))"""
        runs = sweep_file.read(write(change(text)))
        return {entry.run.arm: entry.digest for entry in check.plan("sweep.py", runs, folder)}

    first = digests()
    assert len(set(first.values())) == 4 and digests() == first
    for old, new, changed in (
        ("'draw', '{SEED}'", "'draw', '-x', '{SEED}'", "abc"),
        ("('{b}'", "('{a}', '{b}'", "c"),
        ("arms=", "seeds=(1,), arms=", "abc"),  # nothing of d depends on it
    ):
        found = digests(lambda text, old=old, new=new: text.replace(old, new))
        assert {arm for arm in first if found[arm] != first[arm]} == set(changed)


def test_a_digest_is_also_of_what_the_gin_files_say_that_a_command_names(write, tmp_path):
    folder = SweepFolder(tmp_path / "out")
    whole, part = tmp_path / "whole.gin", tmp_path / "part.gin"
    whole.write_text(f"include {str(part)!r}\nA = 1\n")
    part.write_text("B = [1, 2]\n")
    text = f"""ConfigDict(dict(seeds=(0, 1), arms=dict(
        a=dict(made=('draw', '--gin_file={whole}', '--to={{run}}')), b=dict(made=('{{a}}', '{{run}}')),
        c=dict(made=('draw', '--gin_file={{a}}/config.gin', '{{run}}')), d=dict(made=('draw', '{{run}}')))))"""

    def digests():
        runs = sweep_file.read(write(text))
        return {entry.run.arm: entry.digest for entry in check.plan("sweep.py", runs, folder)}

    first = digests()
    part.write_text("# Of the data.\nB = [1,\n     2]\n")
    assert digests() == first
    part.write_text("B = [1, 3]\n")
    found = digests()
    assert {arm for arm in first if found[arm] != first[arm]} == set("abc")
    # What is made is what was checked.
    folder.write_plan("sweep.py", check.plan("sweep.py", sweep_file.read(write(text)), folder))
    part.write_text("B = [1, 4]\n")
    with pytest.raises(SweepFolderError, match="a/seed0: its gin files have changed since"):
        sweep_run.run_one(out=folder.path, run="a/seed0")
    part.unlink()
    with pytest.raises(SweepError, match=f"a: its command: the gin file {part}") as raised:
        digests()
    assert len(raised.value.problems) == 1


# ---- Runs.


GIN = """
from __gin__ import dynamic_registration

import local_text
from espalier.launch import train
from espalier.trainers import recipe

include '{programs}/local_text.gin'

SEED = 0
DIRECTORY = '{cache}/text'
recipe.Recipe.seed = %SEED
local_text.open_stream.seed = %SEED
config.TransformerConfig.num_layers = 1
config.TransformerConfig.embed_dim = 16
config.TransformerConfig.num_heads = 2
config.TransformerConfig.num_kv_heads = 1
config.TransformerConfig.mlp_dim = 16
"""
SWEEP = """ConfigDict(dict(
    seeds=(3,),
    gin_files=({gin!r},),
    bindings=('TRAIN_STEPS=4',),
    arms=dict(
        seed={{}},
        code=dict(parent='seed', bindings=("local_text.open_stream.phases=((0, {{'code': 1.0}}),)",)),
        law=dict(parent='seed', bindings=('TRAIN_STEPS=2',)),
        start=dict(made=('{{python}}', '-m', 'launch.upcycle', '--method=btx', '--experts', 'seed={{seed}}',
            'code={{code}}', 'law={{law}}', '--gin_file={own}', '--router_seed={{SEED}}', '--to={{run}}')),
        copy=dict(made=('cp', '-r', '{{start}}', '{{run}}'), evaluations=('step',)),
        mixture=dict(parent='copy', gin_files=('t5x_configs/methods/bam/btx.gin',), bindings=('EXPERTS=3',)),
    ),
    evaluations=dict(step={step}),
))"""
STEP = """dict(command=('sh', '-c', 'ls $0/checkpoints | sort -n | tail -1 > $1', '{run}', '{json}'))"""


@pytest.fixture
def tiny(train, write, tmp_path):
    """A sweep of a seed, two branches, what is made of the three, and a mixture that starts from it."""
    gin, own = tmp_path / "tiny.gin", tmp_path / "own.gin"
    text = GIN.format(programs=train.programs, cache=train.cache)
    gin.write_text(
        text.replace(
            "from espalier.launch", "from espalier.model import config\nfrom espalier.launch"
        )
    )
    own.write_text("from __gin__ import dynamic_registration\n\nimport local_text\n")

    def make(change=lambda text: text):
        return write(change(SWEEP).format(gin=str(gin), own=own, step=STEP))

    make.own = own
    return make


@pytest.fixture
def run(tmp_path, capsys):
    """Runs the command in this process; returns status, stdout and stderr."""

    def go(*arguments):
        status = sweep.main([*arguments, f"--out={tmp_path / 'out'}"])
        return status, *capsys.readouterr()

    return go


class Here:
    """A back end that runs jobs in this process, where all is imported: one for each question."""

    def __init__(self, **settings):
        del settings
        self._jobs, self._found = {}, {}

    def submit(self, job):
        self._jobs[job.name], self._found[job.name] = job, Status(state=State.WAITING)
        return job.name

    def statuses(self, handles):
        for name, job in self._jobs.items():
            if self._found[name].state is State.WAITING:
                assert all(self._found[above].state is State.ENDED for above in job.after)
                status = worker.run(job.command)
                self._found[name] = Status(state=State.ENDED, exit_status=status, seconds=1.0)
                break
        return {handle: self._found[handle] for handle in handles}

    def close(self):
        pass


@pytest.fixture
def here(monkeypatch):
    """Sweeps run in this process."""
    monkeypatch.setattr(local, "LocalSubmitter", Here)
    monkeypatch.setattr(driver, "_POLL_SECONDS", 0.0)
    for name in ("argv", "orig_argv"):
        monkeypatch.setattr(sys, name, list(getattr(sys, name)))


def states(folder):
    found = driver.progress(folder, folder.read_plan())
    return {entry.planned.run.arm: entry.state.value for entry in found}


def digests(path):
    return step_dir.read_manifest(step_dir.resolve(path)).arrays


def test_branches_become_a_mixture_that_is_trained(tiny, run, here, command, tmp_path):
    path, folder = tiny(), SweepFolder(tmp_path / "out")
    status, out, err = run("--sweep", path, "--dry_run", "--only=mixture/*")
    assert status == 0 and "0 of 6 runs done" in out, err
    assert re.search(r"start +seed, code, law", out), out
    made_at = folder.path / "runs/start/seed3/made"
    assert f"start/seed3: made\n  {sys.executable} -m launch.upcycle --method=btx" in out
    assert "--router_seed=3" in out and f"--to={made_at}\n" in out
    assert f"INITIAL_CHECKPOINT_PATH='{folder.path}/runs/copy/seed3/made'\"" in out

    status, out, _ = run("--sweep", path, "--only=copy/*")
    assert status == 0, out
    below = dict.fromkeys(("seed", "code", "law", "start", "copy"), "done")
    assert states(folder) == {**below, "mixture": "waiting"}
    status, out, _ = run("--sweep", path)
    assert status == 0 and set(states(folder).values()) == {"done"}, out
    assert all(len(folder.attempts(f"{arm}/seed3")) == 1 for arm in (*below, "mixture"))

    # As by hand.
    by_hand = tmp_path / "by_hand"
    runs = [f"{arm}={folder.path}/runs/{arm}/seed3" for arm in ("seed", "code", "law")]
    flags = ("--method=btx", "--router_seed=3", f"--gin_file={tiny.own}", f"--to={by_hand}")
    assert command("upcycle", "--experts", *runs, *flags) == 0
    assert digests(made_at) == digests(by_hand)
    config = (folder.path / "runs/mixture/seed3/config.gin").read_text()
    assert f"'{folder.path}/runs/copy/seed3/made/checkpoints/0'" in config

    rows = {row["arm"]: row for row in read_results(folder.path)}
    assert list(rows) == ["seed", "code", "law", "start", "copy", "mixture"]
    tokens = [row["tokens"] // 512 for row in rows.values()]
    assert tokens == [4, 4, 2, 0, 0, 4]
    totals = [row["tokens_total"] // 512 for row in rows.values()]
    assert totals == [4, 8, 6, 10, 10, 14]  # the seed once, though all three come from it
    mixture, start = rows["mixture"], rows["start"]
    parents = ("copy", "start", "seed", "code", "law")
    assert mixture["parents"] == [f"{arm}/seed3" for arm in parents]
    read = {
        name: sum(row["epochs"].get(name, 0) for row in rows.values())
        for name in ("licence", "code")
    }
    assert mixture["epochs_total"] == pytest.approx(read) and min(read.values()) > 0
    assert start["made"] and start["made_of"] == ["seed/seed3", "code/seed3", "law/seed3"]
    assert not mixture["made"] and mixture["made_of"] == []
    assert mixture["start"] == {"initial_scope": "params"}
    assert (start["step"], start["directory"]) == (0, "runs/start/seed3/made")
    assert (folder.path / start["directory"] / "config.gin").exists()
    evaluations = [row["evaluations"].get("step") for row in rows.values()]
    assert evaluations == [4, 4, 2, None, 0, 4]

    # Other settings of what is made are named, and what starts from it.
    other = tiny(lambda text: text.replace("--method=btx", "--method=bam"))
    status, _, err = run("--sweep", other)
    assert (
        status == 2
        and "start/seed3: its command, a gin file in the command, or a run in the command has changed"
        in err
    )
    assert "mixture/seed3: a run that it depends on has changed" in err and "law/seed3" not in err
    status, out, _ = run("--sweep", other, "--only=start/*", "--rerun_changed")
    assert status == 0 and (folder.path / "replaced/start/seed3.1/made/config.gin").exists(), out
    assert "moa.MixtureOfAttention" in (made_at / "config.gin").read_text()


# What is stopped half way leaves the half of what it makes.
COPY = "test -e $0 || { mkdir $2; touch $2/half $0; sleep 60; }; cp -r $1 $2"
COPIES = """ConfigDict(dict(
    arms=dict(
        a=dict(made=('cp', '-r', {run!r}, '{{run}}')),
        b=dict(made=('sh', '-c', '{copy}', '{flag}', '{{a}}', '{{run}}'), evaluations=('step',)),
        c=dict(made=('sh', '-c', 'echo error: no luck.; exit 3', '{{run}}')),
        d=dict(made=('cp', '-r', '{{b}}', '{{c}}', '{{run}}')),
    ),
    evaluations=dict(step={step}),
))"""


def interrupt_when(path):
    """Ctrl-C once a file is there."""

    def wait():
        until = time.monotonic() + 120
        while not path.exists() and time.monotonic() < until:
            time.sleep(0.05)
        if path.exists():
            os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=wait, daemon=True).start()


def test_a_command_that_is_stopped_begins_anew_and_one_that_fails_stops_what_is_made_of_it(
    write, run, tmp_path
):
    flag, first = tmp_path / "flag", tmp_path / "first"
    (first / "checkpoints" / "3").mkdir(parents=True)
    for name in ("config.gin", "checkpoints/3/manifest.json"):
        (first / name).write_text("A = 1")
    path = write(COPIES.format(run=str(first), copy=COPY, flag=flag, step=STEP))
    folder = SweepFolder(tmp_path / "out")
    interrupt_when(flag)
    status, out, _ = run("--sweep", path, "--only=b/*")
    assert status == 75 and "b/seed0: stopped\n" in out, out
    assert states(folder) == {"a": "done", "b": "stopped", "c": "waiting", "d": "waiting"}
    half = folder.path / "runs/b/seed0/made/half"
    assert half.exists()
    status, out, _ = run("--sweep", path)
    assert status == 1 and "c/seed0: failed: no luck." in out, out
    assert states(folder) == {"a": "done", "b": "done", "c": "failed", "d": "blocked"}
    assert (half.parent / "config.gin").exists() and not half.exists()
    assert len(folder.attempts("a/seed0")) == 1 and len(folder.attempts("b/seed0")) == 2
    status, out, _ = run("--status")
    assert status == 0 and "2 of 4 runs done, 1 failed, 1 blocked" in out
    (_, b) = read_results(folder.path)
    assert b["evaluations"] == {"step": 3} and b["made_of"] == b["parents"] == ["a/seed0"]


# ---- Commands.


def test_an_evaluation_that_a_signal_stops_is_no_failure(tmp_path):
    ends = "import os, signal; [os.kill(process, signal.SIGTERM) for process in (os.getppid(), os.getpid())]"
    with pytest.raises(SystemExit) as end:
        sweep_run.evaluate("slow", {"command": [sys.executable, "-c", ends]}, tmp_path)
    assert end.value.code == 75
    with pytest.raises(sweep_run.EvaluationError, match="ended with status -15"):
        sweep_run.evaluate(
            "own",
            {"command": [sys.executable, "-c", "import os; os.kill(os.getpid(), 15)"]},
            tmp_path,
        )


def test_a_command_that_makes_no_run_and_one_that_fails(write, tmp_path):
    text = """ConfigDict(dict(arms=dict(
        a=dict(made=('true', '{run}')), b=dict(made=('sh', '-c', 'exit 4', '{run}')),
        c=dict(made=('{a}', '{run}')))))"""
    folder = SweepFolder(tmp_path / "out")
    plan = check.plan("sweep.py", sweep_file.read(write(text)), folder)
    by_name = {entry.name: entry for entry in plan}
    a, b, c = plan
    with pytest.raises(
        sweep_run.MadeError, match=r"succeeded without writing .*made: let it write to \{run\}"
    ):
        sweep_run.make(folder, a, by_name)
    with pytest.raises(SystemExit) as ended:
        sweep_run.make(folder, b, by_name)
    assert ended.value.code == 4
    with pytest.raises(ValueError, match="a/seed0 is not trained yet"):
        sweep_run.make(folder, c, by_name)
    with folder.lock_run(a.name), pytest.raises(ValueError, match=r"in use: .* makes this run"):
        assert folder.in_use(a.name)
        sweep_run.make(folder, a, by_name)


def test_a_file_may_be_made_and_is_no_parent(write, tmp_path):
    text = "ConfigDict(dict(arms=dict(a=dict(made=('touch', '{run}')))))"
    folder = SweepFolder(tmp_path / "out")
    (a,) = check.plan("sweep.py", sweep_file.read(write(text)), folder)
    outcome = sweep_run.make(folder, a, {a.name: a})
    assert outcome["checkpoint"] is None and folder.model_dir(a.run).is_file()
    folder.write_record(a.name, {"digest": a.digest, "trained": outcome})
    with pytest.raises(
        ValueError, match="a/seed0 cannot be a parent: its command wrote no checkpoint"
    ):
        folder.final_checkpoint(a)
    assert sweep_run.make(folder, a, {a.name: a}) == outcome  # anew


def test_names_without_a_value_stay_in_their_braces():
    given = ("{a}/{b}", "{a}{a}", "{{b}}", "{'a': 1}", "{}")
    assert parts.places(given) == ("a", "b")
    assert parts.filled(given, {"a": "{b}"}) == ("{b}/{b}", "{b}{b}", "{{b}}", "{'a': 1}", "{}")
