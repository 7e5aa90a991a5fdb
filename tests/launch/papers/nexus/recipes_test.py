"""The sweeps of BAM (arXiv 2408.08274) and Nexus (arXiv 2408.15901), small and at full size, as gin has their arms."""

import ast
import functools
import math
import pathlib

import pytest

from espalier.launch.config import gin_config
from espalier.launch.papers.bam import experiment as bam
from espalier.launch.papers.nexus import experiment as nexus
from espalier.launch.papers.nexus import lag_domains
from espalier.launch.sweep import file

SMALL = [
    *(("bam", kind) for kind in ("synthetic", "text", "sizes")),
    *(("nexus", kind) for kind in ("synthetic", "text")),
]
FULL = [("bam_full", "/data"), ("nexus_full", "/data")]
# Flag of launch.upcycle -> the macro that says the same to training.
SAID_TWICE = {"top_k": "TOP_K", "attention_top_k": "ATTENTION_TOP_K", "shared_kv": "SHARED_KV"}
METHODS = {"projection": "nexus", "linear": "nexus_linear", "mlp": "nexus_mlp"}


@functools.cache
def every_run(sweep, text):
    paper, _, full = sweep.partition("_")
    return file.read(f"launch/papers/{paper}/experiment.py:{full}{',' * bool(full)}{text}")


def runs_of(sweep, text):
    """Those of the first seed, by arm."""
    runs = every_run(sweep, text)
    return {run.arm: run for run in runs if run.seed == runs[0].seed}


def domains_of(sweep, kind):
    """The general one first, and Nexus' new one last."""
    if sweep == "bam":
        return bam.DOMAINS[kind]
    general, experts, new = nexus.DOMAINS[kind]
    return (general, *experts, new)


def bound(run):
    return dict(binding.split("=", 1) for binding in run.bindings)


def shares(sweep, text):
    """Arm -> domain -> share of what it is trained on."""
    found = {arm: bound(run) for arm, run in runs_of(sweep, text).items() if not run.made}
    if sweep == "nexus_full":
        return {arm: ast.literal_eval(values["SHARES"]) for arm, values in found.items()}
    if sweep != "bam_full":
        phases = {arm: values["stream.make_stream.phases"] for arm, values in found.items()}
        return {arm: dict(ast.literal_eval(value))[0] for arm, value in phases.items()}
    runs = runs_of(sweep, text)  # files say it, one of several arms once
    firsts = {(runs[arm].gin_files, found[arm].get("SHARES")): arm for arm in reversed(found)}
    return {arm: load(runs[arm]).macros["SHARES"] for arm in firsts.values()}


def flags_of(run):
    """Flag -> value, of a run that is made."""
    pairs = (word[2:].partition("=") for word in run.made if word.startswith("--"))
    return {name: value if equals else "True" for name, equals, value in pairs}


def load(run):
    parent = ["INITIAL_CHECKPOINT_PATH='/before'"] if run.parent else []
    bindings = [*run.bindings, "MODEL_DIR='/run'", *parent]
    return gin_config.load(run.gin_files, bindings, entry="espalier.launch.train:train")


@pytest.mark.parametrize(("sweep", "text"), SMALL + FULL)
def test_runs_stand_after_those_they_start_from_and_their_files_are_there(sweep, text):
    done = set()
    for arm, run in runs_of(sweep, text).items():
        assert run.name == f"{arm}/seed{run.seed}" and done.issuperset(run.above)
        done.add(run.name)
        read = [word.partition("=")[2] for word in run.made if word.startswith("--gin_file=")]
        assert all(pathlib.Path(path).is_file() for path in (*run.gin_files, *read))
        if run.parent is None and not run.made and sweep != "nexus_full":
            assert arm.startswith("seed")


@pytest.mark.parametrize(("sweep", "kind"), SMALL)
def test_small_sweeps_have_the_arms_that_reports_name_for_every_seed(sweep, kind):
    runs = every_run(sweep, kind)
    for arm in runs_of(sweep, kind):
        assert [run.seed for run in runs if run.arm == arm] == [20, 21, 22], arm
    if sweep == "bam":
        named = [bam.SEED, *map(bam.specialist, domains_of(sweep, kind)[1:]), *bam.PAIR]
        if kind == "synthetic":
            named += {*bam.BTX, *bam.BAM, *bam.CONTROLS, *map(bam.long, bam.LONG)} - {*bam.PAIR}
            named += [*map(bam.matched, (*bam.BAM, *bam.CHOSEN)), bam.DENSE_LONG]
        named += [bam.DENSE] if kind == "text" else []
        if kind == "sizes":
            named = [bam.wide(arm, width) for arm in named for width in bam.WIDTHS]
    else:
        named = [nexus.SEED, *map(nexus.expert, domains_of(sweep, kind)[1:])]
        every = {*nexus.ROUTERS, *nexus.LOW, *nexus.EXTENSIONS, nexus.DENSE, nexus.KEPT}
        named += nexus.TEXT_ARMS if kind == "text" else every
    # Other arms are made on the way.
    made = {arm for arm, run in runs_of(sweep, kind).items() if run.made}
    assert set(named) == set(runs_of(sweep, kind)) - made


@pytest.mark.parametrize(("sweep", "text"), SMALL + FULL)
def test_shares_sum_to_1_and_are_of_the_sweeps_domains(sweep, text):
    full = {
        "bam_full": {"general", "web", *bam.FULL_DOMAINS},
        "nexus_full": {"pretraining", *nexus.FULL_TOKENS, nexus.CODE},
    }
    known = full.get(sweep) or set(domains_of(sweep, text))
    for arm, of in shares(sweep, text).items():
        assert math.fsum(of.values()) == pytest.approx(1, abs=1e-9), arm
        assert known.issuperset(of) and min(of.values()) >= 0


def test_shares_at_full_size_are_those_of_the_phases():
    found = shares("bam_full", "/data")
    assert found["btx"] == found["bam"] == dict.fromkeys(("general", *bam.FULL_DOMAINS), 0.25)
    for domain in bam.FULL_DOMAINS:
        assert (found[domain][domain], found[domain]["web"]) == (0.9, 0.1)
    found = shares("nexus_full", "/data")
    for size in nexus.SIZES:
        assert found[f"nexus_mixed_{size}"] == found[f"linear_mixed_{size}"]
        mixed, annealed = found[f"nexus_mixed_{size}"], found[f"nexus_{size}"]
        assert (mixed["pretraining"], annealed["pretraining"]) == (0.25, 0.7)  # 0.25 is ours
        # The rest as SlimPajama has it: C4 to Wikipedia as 26.7 to 3.8.
        assert mixed["c4"] / mixed["wikipedia"] == pytest.approx(26.7 / 3.8)
    added = found["nexus_with_code_2p8b"]
    assert (added["code"], added["pretraining"]) == (0.5, pytest.approx(0.1))


@pytest.mark.parametrize(("sweep", "text"), SMALL + FULL)
def test_a_mixture_is_trained_as_it_was_made(sweep, text):
    """What the flags of the command that makes it say, its bindings say again."""
    runs, experts = runs_of(sweep, text), {}
    for arm, run in runs.items():
        above = run
        while above.parent:  # an anneal goes on from a mixture that was trained
            above = runs[above.parent.partition("/")[0]]
        if run.made or not above.made:
            continue
        flags, values = flags_of(above), bound(run)
        if "--experts" in above.made:
            at = above.made.index("--experts") + 1
            experts[arm] = sum(not word.startswith("--") for word in above.made[at:])
        else:
            experts[arm] = experts[flags["moe"].strip("{}")] + 1
        assert int(values.get("EXPERTS", 4)) == experts[arm], arm
        said = {SAID_TWICE[flag]: value for flag, value in flags.items() if flag in SAID_TWICE}
        assert said == {name: values[name] for name in SAID_TWICE.values() if name in values}
        method = pathlib.Path(run.gin_files[-1]).stem
        if sweep.startswith("bam"):
            assert method == flags["method"]
        elif "--experts" in above.made:
            assert method == METHODS[flags["router"]]
    counts = {"bam_full": 15, "nexus_full": 19}
    counts |= {"bam": {"synthetic": 12, "text": 2, "sizes": 4}.get(text)}
    counts |= {"nexus": {"synthetic": 9, "text": 4}.get(text)}
    assert len(experts) == counts[sweep]


def test_twins_differ_in_updates_and_readings_alone_and_all_mixtures_have_one_balance():
    runs, routed = runs_of("bam", "synthetic"), set()
    for arm, twin in runs.items():
        base = runs.get(arm.removesuffix("_cm").removesuffix("_long"))
        if base and base is not twin and not twin.made and arm != bam.DENSE_LONG:
            assert base.parent == twin.parent
            own = {name: bound(twin)[name] for name in ("TRAIN_STEPS", "EVAL_PERIOD")}
            assert bound(base) | own == bound(twin)
        if not twin.made and (twin.parent or "").partition("/")[0].endswith("_start"):
            values = bound(twin)
            assert (values["BALANCE_LOSS"], values["ROUTER_Z_LOSS"]) == ("0.05", "0.0")
            config = load(twin)
            if config.macros.get("ATTENTION_TOP_K") is not None:
                routed.add(arm)
                assert config.value("moa.MixtureOfAttention.balance_loss") == 0.05
    assert routed == {"moa_top1_cm", "moa_top2_cm"}


@pytest.mark.parametrize(("sweep", "kind"), SMALL)
def test_small_files_read_and_evaluate_the_domains_of_their_sweep(sweep, kind):
    domains, runs = domains_of(sweep, kind), runs_of(sweep, kind)
    config = load(next(iter(runs.values())))
    assert config.arguments()["eval_tasks"] == domains
    if kind == "text":
        assert tuple(config.macros["SOURCES"]) == domains
    else:
        assert set(domains) <= set(lag_domains.DOMAINS)
        assert config.macros["MIXTURE_OR_TASK_NAME"] == "lag_domains"
    evaluations = {}
    for run in runs.values():
        evaluations |= run.evaluations
    if sweep == "nexus":  # evaluates mixtures before their training too
        assert f"--tasks={','.join(domains)}" in evaluations["held_out"]["command"]
    assert tuple(evaluations["routing"]["arguments"]["tasks"]) == domains


@pytest.mark.parametrize(("sweep", "text"), FULL)
def test_full_arms_resolve(sweep, text):
    """Arms until every gin file has been in one."""
    seen, step = set(), 512 * 2048
    for arm, run in runs_of(sweep, text).items():
        if run.made or seen.issuperset(run.gin_files):
            continue
        seen.update(run.gin_files)
        config = load(run)
        recipe = config.arguments()["recipe"]
        assert recipe.batch_size * recipe.length == step, arm
        assert config.macros["WARMUP_STEPS"] < config.macros["TRAIN_TOKENS"] / step
    folder = pathlib.Path(f"t5x_configs/experiments/{sweep.removesuffix('_full')}/full")
    assert {str(path) for path in folder.glob("*.gin")} <= seen
