"""Every two files of t5x_configs/methods/ work together, in both orders, or are refused with a reason.

`python -m tests.methods_test` writes the table of those that are refused, docs/reference/methods_together.md.
"""

import atexit
import functools
import importlib
import itertools
import json
import pathlib
import re
import shutil
import tempfile
from collections.abc import Iterable, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import pytest

from espalier.launch.config import gin_config, gin_reader
from espalier.launch.config import text as config_text
from espalier.launch.config.build import Configuration
from espalier.launch.run import model_record
from espalier.launch.train import train
from espalier.trainers import initialise as initialise_lib
from espalier.trainers import partitioning
from espalier.trainers.checkpoints import step_dir
from espalier.trainers.hooks import RunContext
from espalier.trainers.objectives.frozen_model import FrozenModel
from espalier.trainers.optim import schedules
from espalier.trainers.recipe import Recipe
from espalier.trainers.telemetry.metrics import divide

ROOT = pathlib.Path(__file__).parent.parent
TABLE = ROOT / "docs" / "reference" / "methods_together.md"
FOLDER = ROOT / "t5x_configs" / "methods"

TEXT = ("pretrain", "preference", "online")
# Files by kind, and the runs that they can be part of, the usual one first.
METHODS = {
    "adapters/bottleneck": ("adapter", TEXT),
    "adapters/dora": ("adapter", TEXT),
    "adapters/ia3": ("adapter", TEXT),
    "adapters/lora": ("adapter", TEXT),
    "adapters/own_base": ("reference", ("preference",)),
    "adapters/own_base_online": ("reference", ("online",)),
    "adapters/prompt": ("adapter", TEXT),
    "averaging/recent_mean": ("optimiser", ("pretrain", "classify", "preference", "online")),
    "averaging/schedule_free": ("optimiser", ("pretrain", "classify", "preference")),
    "bam/attention_experts": ("architecture", TEXT),
    "bam/bam": ("architecture", TEXT),
    "bam/btx": ("architecture", TEXT),
    "distillation/distillation": ("objective", ("pretrain",)),
    "distillation/distillation_pool": ("objective", ("finetune",)),
    "distillation/distillation_stored": ("objective", ("pretrain",)),
    "low_rank/decompose": ("transform", ("pretrain", "classify", "preference")),
    "low_rank/low_rank": ("low rank", TEXT),
    "low_rank/low_rank_conv": ("low rank", ("classify",)),
    "low_rank/spectrum": ("hook", ("pretrain", "classify", "preference", "online")),
    "moe/balance_bias": ("routing", TEXT),
    "moe/fine_grained": ("routing", TEXT),
    "moe/shared_average": ("routing", TEXT),
    "moe/sigmoid": ("routing", TEXT),
    "mov/molora": ("adapter", TEXT),
    "mov/mov": ("adapter", TEXT),
    "nexus/nexus": ("architecture", TEXT),
    "nexus/nexus_bam": ("architecture", TEXT),
    "nexus/nexus_linear": ("architecture", TEXT),
    "nexus/nexus_mlp": ("architecture", TEXT),
    "nexus/nexus_mlp_bam": ("architecture", TEXT),
    "preference/cispo": ("online", ("online",)),
    "preference/cpo": ("losses", ("preference",)),
    "preference/dpo_nll": ("losses", ("preference",)),
    "preference/grpo": ("online", ("online",)),
    "preference/gspo": ("online", ("online",)),
    "preference/indicators": ("hook", ("preference", "online")),
    "preference/ipo": ("losses", ("preference",)),
    "preference/kto": ("losses", ("preference",)),
    "preference/ld_dpo": ("losses", ("preference",)),
    "preference/online_dpo": ("online", ("online",)),
    "preference/orpo": ("losses", ("preference",)),
    "preference/ppo": ("online", ("online",)),
    "preference/reference_free": ("reference", ("preference",)),
    "preference/reference_live": ("reference", ("preference",)),
    "preference/reference_run": ("reference", ("preference", "online")),
    "preference/reward_checkpoint": ("reward", ("online",)),
    "preference/reward_model": ("reward", ("preference",)),
    "preference/rloo": ("online", ("online",)),
    "preference/simpo": ("losses", ("preference",)),
    "preference/slic": ("losses", ("preference",)),
    "preference/tr_dpo": ("reference", ("preference",)),
    "preference/wpo": ("losses", ("preference",)),
    # Not among the first of a kind, since its teachers are several models.
    "distillation/on_policy_pool": ("online", ("online",)),
    "averaging/merge": (
        "transform",
        TEXT,
    ),  # the last: a pair of kinds is tried with the first of each
}
FILES = {
    "pretrain": ("models/tiny", "data/bytes", "runs/pretrain"),
    "classify": ("models/cnn_tiny", "data/textures", "runs/classify"),
    "preference": ("models/tiny", "data/preferences", "runs/preference"),
    "online": ("models/tiny", "data/prompts", "runs/online"),
    "finetune": ("models/tiny", "data/chat", "runs/finetune"),
}
_TUNED = ("TOKENIZER='/x'", "INITIAL_CHECKPOINT_PATH='/x'", "TRAIN_STEPS=10")
BINDINGS = {
    "pretrain": ("MIXTURE_OR_TASK_NAME='python'",),
    "classify": (),
    "preference": (*_TUNED, "PAIRS='x.jsonl'"),
    "online": (*_TUNED, "PROMPT_FILES='x.jsonl'", "BATCH_SIZE=32"),
    "finetune": (*_TUNED, "CHATS='x.jsonl'", "TRAIN_EPOCHS=None"),
}
MERGE = {"merge_method": "karcher", "models": [{"model": "/x"}, {"model": "/y"}]}
# What is given before a pair that lacks it: factors to read or to make, and how an online run trains.
FACTORS = {"classify": "low_rank/low_rank_conv"}
HAVE_EXPERTS = {name for name, (kind, _) in METHODS.items() if kind == "architecture"}
HAVE_EXPERTS -= {"bam/attention_experts"}


def needed(run: str, methods: Sequence[str]) -> list[str]:
    """Returns the methods without which `methods` make no run."""
    more = []
    kinds = {METHODS[name][0] for name in methods}
    if {"low_rank/decompose", "low_rank/spectrum"} & {*methods} and "low rank" not in kinds:
        more.append(FACTORS.get(run, "low_rank/low_rank"))
    of_experts = {"bam/attention_experts"} & {*methods} or "routing" in kinds
    if of_experts and not {*methods} & HAVE_EXPERTS:
        more.append("bam/btx")
    if {"adapters/own_base", "adapters/own_base_online"} & {*methods} and "adapter" not in kinds:
        more.append("adapters/lora")  # without which the reference would be the policy
    references = [name for name in methods if METHODS[name][0] == "reference"]
    if references == ["preference/reference_free"] and not kinds & {"losses", "reward"}:
        more.append("preference/simpo")  # a loss that compares with no reference
    if run == "online" and "online" not in kinds:
        more.append("preference/rloo")
    return more


def arguments(run: str, methods: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns files and bindings of a run with these methods."""
    names = [*FILES[run], *(f"methods/{name}" for name in (*needed(run, methods), *methods))]
    bindings = ["MODEL_DIR='/tmp/x'", *BINDINGS[run]]
    if "preference/reward_checkpoint" in methods:
        bindings.append("REWARD_CHECKPOINT='/y'")
    if "averaging/merge" in methods:
        bindings.append(f"MERGE={MERGE!r}")
    if "adapters/prompt" in methods:
        bindings.append("PROMPT_FIRST_ID=300")
    if pooled := [name for name in methods if re.fullmatch("distillation/.*_pool", name)]:
        bindings.append(f"TEACHER_POOL={other_run() + '/pool.yaml'!r}")
    if any(name.startswith("distillation/") and name not in pooled for name in methods):
        bindings.append(f"TEACHER={other_run()!r}")
    if "preference/reference_run" in methods:
        bindings.append(f"REFERENCE={other_run()!r}")
    return [f"t5x_configs/{name}.gin" for name in names], bindings


@functools.cache
def other_run() -> str:
    """The directory of a run with a configuration; `step_dir.resolve` is told that it has a step."""
    folder = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    head = ("from __gin__ import dynamic_registration", "from espalier.model import config")
    lines = (*head, "include 't5x_configs/models/tiny.gin'", *SHALLOW)
    pathlib.Path(folder, "config.gin").write_text("\n".join(lines) + "\n")
    model_record.write(folder)
    pool = json.dumps({"teachers": [{"name": "one", "checkpoint": folder}]})  # which is YAML
    pathlib.Path(folder, "pool.yaml").write_text(pool)
    return folder


def its_step(run: str) -> pathlib.Path:
    return pathlib.Path(run, "checkpoints", "1")


@pytest.fixture(autouse=True)
def other_run_has_a_step(monkeypatch):
    monkeypatch.setattr(step_dir, "resolve", its_step)


# One layer, which is traced three times faster unrolled than in a loop.
SHALLOW = "config.TransformerConfig.num_layers = 1", "config.TransformerConfig.scan_layers = False"


def configuration(run: str, methods: Sequence[str]) -> tuple[list[str], list[str]]:
    files, bindings = arguments(run, methods)
    return files, bindings if run == "classify" else [*bindings, *SHALLOW]


def load(run: str, methods: Sequence[str]) -> Configuration:
    return gin_config.load(*configuration(run, methods), entry="espalier.launch.train:train")


def common_run(*methods: str) -> str | None:
    """Returns the first run that all these methods can be part of."""
    first, *others = (METHODS[name][1] for name in methods)
    return next((run for run in first if all(run in runs for runs in others)), None)


# What is made of a configuration, and the modules of which methods bind functions and classes for it.
PARTS = {
    "model": r"(espalier\.)?model\.",
    "loss": r"(espalier\.)?trainers\.(distillation|inputs|objectives|online|preference|rewards)\.",
    "optimiser": r"(optax|(espalier\.)?trainers\.optim)\.",
}
# A hook; whose model a part reads; where parameters begin.
OF_NO_PART = {"low_rank/spectrum", "preference/reference_run", "averaging/merge"}


def check(run: str, methods: Sequence[str]) -> gin_reader.Checked:
    """Returns the statements of a run with these methods and their problems, without loading them."""
    files, bindings = configuration(run, methods)
    return gin_config.check(files, bindings, entry=train)


@functools.cache
def refusal(first: str, second: str) -> str | None:
    """Returns the reason for which two methods in this order are refused, or None.

    Statements decide what binds one thing twice and what has no effect. What passes is made if both methods bind something
    of one part: only then can one refuse the other.
    """
    run = common_run(first, second)
    checked = check(run, (first, second))
    if checked.problems:
        return str(checked.problems[0])
    one, other = ({name, *needed(run, (name,))} for name in (first, second))
    if not parts_bound(checked, one - other) & parts_bound(checked, other - one):
        return None
    text = frozenset(final(checked).items())
    if text not in _OUTCOMES:  # the other order often gives the same configuration
        kinds = {METHODS[first][0], METHODS[second][0]}
        _OUTCOMES[text] = refusal_of(load(run, (first, second)), kinds)
    return _OUTCOMES[text]


def parts_bound(checked: gin_reader.Checked, methods: Iterable[str]) -> set[str]:
    """Returns the parts for which the files of these methods bind something."""
    files = {str((FOLDER / f"{name}.gin").resolve()) for name in methods}
    files |= {part for file in files for part in checked.includes.get(file, ())}
    targets = {
        key[1]
        for key, history in checked.history.items()
        if not isinstance(key, str) and any(bound.file in files for bound in history)
    }
    return {part for part, modules in PARTS.items() if any(re.match(modules, t) for t in targets)}


_OUTCOMES: dict[frozenset, str | None] = {}


def final(checked: gin_reader.Checked) -> dict[str, str]:
    """Returns the final value of every macro and binding, with names in full."""
    values = {name: bound.meaning() for name, bound in checked.macros.items()}
    for (scope, target, argument), bound in checked.bindings.items():
        values[f"{scope}/{target}.{argument}"] = bound.meaning()
    return values


def refusal_of(config: Configuration, kinds: set[str]) -> str | None:
    """Returns the error of making what a configuration describes, or None."""
    try:
        recipe = config.arguments()["recipe"].with_span(schedules.Span(10))
        recipe.inputs_spec.arrays(recipe.batch_size)
        objective = recipe.objective(model=recipe.model, num_sources=1)
        refused = initialise(recipe, config.text)
        if refused is None and kinds <= {*OF_LOSS}:
            trace(recipe, objective)
        return refused
    except ValueError as error:
        return str(error)


OF_LOSS = ("losses", "reference", "reward")
_PROGRAMS: dict[frozenset, str | None] = {}
# The parts of a configuration that determine parameters, their reports and the optimiser.
_OF_PROGRAM = re.compile(
    r"(\w+/)*(espalier\.)?(model|trainers\.(recipe|reports|optim|low_rank\.factor_decay))\."
)
_NOT_OF_PROGRAM = ("Recipe.objective", "Recipe.learning_rate", "Recipe.inputs")


def initialise(recipe: Recipe, text: str) -> str | None:
    """Makes the program of a recipe, once for equal models, and returns its error."""
    lines = config_text.canonical(text)
    names = [k for k in lines if _OF_PROGRAM.match(k) and not k.endswith(_NOT_OF_PROGRAM)]
    for name in names:  # which grow by the macros that they read
        names += [m for m in re.findall(r"%(\w+)", lines[name]) if m in lines and m not in names]
    key = frozenset((name, lines[name]) for name in names if not name.startswith("schedules"))
    if key not in _PROGRAMS:
        try:
            recipe.program()
            _PROGRAMS[key] = None
        except ValueError as error:
            _PROGRAMS[key] = str(error)
    return _PROGRAMS[key]


def trace(recipe: Recipe, objective: Any) -> None:
    """Traces the loss, which reads the batch."""
    params = nn.meta.unbox(initialise_lib.abstract_variables(recipe.model, recipe.inputs_spec))[
        "params"
    ]
    stored = getattr(objective, "stored_extras", None)
    extras = None if stored is None else params
    batch = recipe.inputs_spec.arrays(2)
    jax.eval_shape(functools.partial(objective, extras=extras), params, batch, jax.random.key(0))


PAIRS = [pair for pair in itertools.combinations(METHODS, 2) if common_run(*pair)]


def short(reason: str) -> str:
    """Returns a reason in short, the same for both orders of a conflict where it can be."""
    if match := re.search(r"replaces '(\S+)' of another method(?: \(and (.*?)\))?, which", reason):
        return "both set " + ", ".join(
            f"`{name}`" for name in [match[1], *(match[2] or "").split(", ")] if name
        )
    if match := re.match(r"t5x_configs/methods/(\S+)\.gin: has no effect", reason):
        return f"`{match[1]}` would have no effect"
    return reason.partition(". ")[0].splitlines()[0]


def table() -> str:
    """Returns the page of the pairs that do not go together."""
    rows: dict[tuple[str, str], list[tuple[str, str]]] = {}
    for pair in PAIRS:
        reasons = [refusal(*pair), refusal(*pair[::-1])]
        for index, (first, second) in enumerate((pair, pair[::-1])):
            if reasons[index] is None:
                continue
            one_order = None in reasons
            if one_order or index == 0:
                why = f"{short(reasons[index])}{'; the other order works' if one_order else ''}"
                rows.setdefault((second if one_order else first, why), []).append(
                    first if one_order else second
                )
    lines = [HEAD]
    for (one, why), others in sorted(rows.items()):
        order = " after" if why.endswith("order works") else " with"
        names = ", ".join(f"`{other}`" for other in others)
        lines.append(f"| `{one}`{order} {names} | {why} |")
    kinds = [f"| `{name}` | {kind} | {', '.join(runs)} |" for name, (kind, runs) in METHODS.items()]
    return "\n".join([*lines, KINDS_HEAD, *kinds]) + "\n"


HEAD = """# Methods together

Files of `t5x_configs/methods/` given after each other add up, in any order. Those below are refused before a run starts: two
methods that bind one thing to different values, or a method that would change nothing. Files of different runs
(the last table) do not meet. `python -m tests.methods_test` writes this page, and `tests/methods_test.py` checks
all ordered pairs. Two files are in no table: `adapters/adapters_base`, a part of other files, and
`quantised/quantised_training`, which needs the extra `quantised`.

| methods | reason |
|---|---|"""
KINDS_HEAD = """
| file | kind | runs (`t5x_configs/runs/`) |
|---|---|---|"""


def test_every_file_has_a_kind():
    files = {str(p.relative_to(FOLDER).with_suffix("")) for p in FOLDER.rglob("*.gin")}
    # A part of others, and one that needs an extra (tests/model/quantised/quantised_dense_test.py).
    assert files == {*METHODS, "adapters/adapters_base", "quantised/quantised_training"}


def test_every_method_binds_something_of_a_part():
    """Or the rule of `refusal` would miss those that refuse it."""
    checked = {name: check(METHODS[name][1][0], [name]) for name in METHODS}
    assert {name for name in METHODS if not parts_bound(checked[name], [name])} == OF_NO_PART


@pytest.mark.parametrize("method", METHODS)
def test_pairs_with_a_method_go_together_or_are_refused_by_both_orders(method):
    """Fills the cache for the table, a method at a time; the other order is that of refinements."""
    for first, second in PAIRS:
        if first == method and None in (orders := [refusal(first, second), refusal(second, first)]):
            refused = [reason for reason in orders if reason is not None]
            assert all("replaces" in reason for reason in refused), (first, second)


def test_all_pairs_go_together_or_are_refused_as_the_table_says():
    assert TABLE.read_text() == table(), "Run `python -m tests.methods_test`."


@pytest.mark.parametrize(
    ("first", "second", "names"),
    [
        ("preference/simpo", "preference/ipo", ["LOSSES", "simpo.gin:11", "ipo.gin:11"]),
        ("low_rank/low_rank", "bam/bam", None),
        ("bam/bam", "low_rank/low_rank", None),
        ("preference/ld_dpo", "preference/kto", ["LD_ALPHA"]),
        ("preference/indicators", "preference/reward_model", ["hooks.named.indicators"]),
        ("preference/reference_free", "preference/ipo", ["reference"]),
    ],
)
def test_refusals_name_both_sides(first, second, names):
    reason = refusal(first, second)
    assert (reason is None) == (names is None), reason
    assert all(name in reason for name in names or ())


def test_one_order_is_as_good_as_the_other():
    """Where both orders are accepted, they are one configuration."""
    for pair in (("preference/simpo", "preference/indicators"), ("low_rank/low_rank", "bam/btx")):
        texts = []
        for order in (pair, pair[::-1]):
            texts.append(config_text.canonical(load(common_run(*pair), order).text))
        assert texts[0] == texts[1]


def kinds(pair: tuple[str, str]) -> tuple[str, ...]:
    return tuple(sorted(METHODS[name][0] for name in pair))


ALL_REFUSED = {("losses", "reward"), ("optimiser", "optimiser")}
# Methods that one run has together, which meet every two kinds: a group is one program to compile.
GROUPS = (
    (
        *("adapters/bottleneck", "adapters/own_base", "averaging/recent_mean"),
        *("bam/attention_experts", "low_rank/low_rank", "low_rank/decompose", "low_rank/spectrum"),
    ),
    (
        *("adapters/bottleneck", "averaging/recent_mean", "bam/attention_experts"),
        *("low_rank/low_rank", "moe/fine_grained", "preference/cispo"),
        "preference/reward_checkpoint",
    ),
    (
        *("preference/cispo", "adapters/own_base_online", "low_rank/spectrum", "moe/fine_grained"),
        *("moe/shared_average", "preference/reward_checkpoint", "averaging/merge"),
    ),
    (
        *("adapters/bottleneck", "adapters/prompt", "averaging/recent_mean"),
        *("bam/attention_experts", "bam/bam", "distillation/distillation", "low_rank/decompose"),
    ),
    (
        *("adapters/bottleneck", "adapters/own_base", "averaging/recent_mean"),
        *("bam/attention_experts", "low_rank/low_rank", "low_rank/decompose", "preference/cpo"),
    ),
    (
        *("low_rank/spectrum", "moe/balance_bias", "preference/indicators"),
        *("preference/cpo", "preference/ld_dpo"),
    ),
    (
        *("distillation/distillation", "low_rank/low_rank"),
        *("low_rank/spectrum", "moe/balance_bias"),
    ),
    ("preference/reference_live", "adapters/own_base"),
    ("low_rank/decompose", "averaging/merge"),
    ("preference/grpo", "preference/gspo"),
    ("distillation/distillation", "distillation/distillation_stored"),
)


def test_every_two_kinds_are_of_a_group_or_refused():
    met = {kinds(pair) for group in GROUPS for pair in itertools.combinations(group, 2)}
    assert not met & ALL_REFUSED
    assert met | ALL_REFUSED == {kinds(pair) for pair in PAIRS}
    refused = [pair for pair in PAIRS if kinds(pair) in ALL_REFUSED]
    assert all(refusal(*pair) and refusal(*pair[::-1]) for pair in refused)


@pytest.mark.parametrize("group", GROUPS, ids=lambda group: group[-1])
def test_methods_of_every_two_kinds_take_a_step_together(group, monkeypatch, tmp_path):
    """One step on tiny shapes changes the parameters and has a finite loss; hooks read its state, and docs its metrics."""
    monkeypatch.syspath_prepend(str(ROOT / "docs"))
    metric_names = importlib.import_module("metric_names")
    run = common_run(*group)
    files, bindings = arguments(run, group)
    bindings = [b for b in bindings if "BATCH_SIZE" not in b]
    bindings += ["BATCH_SIZE=8", "WARMUP_STEPS=0", "MESH={'data': 1}"]
    bindings += {"online": ["MAX_PROMPT_LENGTH=8", "MAX_NEW_TOKENS=8"]}.get(
        run, ["TASK_FEATURE_LENGTHS={'targets': 16}"]
    )
    bindings += SHALLOW
    config = gin_config.load(files, bindings, entry="espalier.launch.train:train")
    given = config.arguments()
    recipe = given["recipe"].with_span(schedules.Span(10))
    program = recipe.program(devices=jax.devices()[:1])
    with partitioning.use_mesh(program.mesh, program.rules):
        state = program.init()
        before = jax.device_get(state.params)
        monkeypatch.setattr(FrozenModel, "read", constant_params)
        state, metrics = program.steps(1).train(state, batch_of(recipe))
        assert metric_names.unexplained(divide(jax.device_get(metrics))) == []
        total, weight = metrics["loss"]
        assert np.isfinite(total / weight)
        after = jax.device_get(state.params)
        assert any(map(np.any, jax.tree.leaves(jax.tree.map(np.not_equal, before, after))))
        if "low_rank/spectrum" in group:
            context = RunContext(path=tmp_path, writer=True, step=0, program=program, learning_rate=lambda step: 0.1)  # fmt: skip
            (make,) = (make for make in given["hooks"] if "pectrum" in repr(make))
            assert make(run=context)(1, state, {})["spectrum/nuclear"] > 0


def constant_params(frozen: FrozenModel, mesh: Any, rules: Any) -> Any:
    """Stands in for reading a checkpoint: every parameter of the frozen model is 0.02."""
    return jax.tree.map(
        lambda x: jax.device_put(np.full(x.shape, 0.02, x.dtype), x.sharding),
        frozen.abstract(mesh, rules),
    )


def batch_of(recipe: Recipe) -> dict[str, Any]:
    """A batch of random tokens, each row one segment or one pair of two."""
    rng = np.random.default_rng(0)
    batch = {
        k: np.ones(a.shape, a.dtype)
        for k, a in recipe.inputs_spec.arrays(recipe.batch_size).items()
    }
    for name in ("decoder_input_tokens", "decoder_target_tokens"):
        if name in batch:
            batch[name] = rng.integers(1, 250, batch[name].shape).astype(np.int32)
            batch["decoder_positions"][:] = np.arange(batch[name].shape[1])
    for name in ("source_ids", "labels"):
        if name in batch:
            batch[name][:] = 0
    if "pair_weights" in batch:
        batch["decoder_segment_ids"][:, recipe.length // 2 :] = 2
    return batch


if __name__ == "__main__":
    step_dir.resolve = its_step
    TABLE.write_text(table())
