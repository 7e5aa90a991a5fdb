"""Every two files of t5x_configs/methods/ work together, in both orders, or are refused with a reason.

`python -m tests.methods_test` writes the table of those that are refused, docs/methods_together.md.
"""

import functools
import itertools
import pathlib
import re
from collections.abc import Iterator, Sequence

import gin
import pytest

from launch.config import config_diff, gin_config
from trainers.optim import schedules

ROOT = pathlib.Path(__file__).parent.parent
TABLE = ROOT / "docs" / "methods_together.md"
FOLDER = ROOT / "t5x_configs" / "methods"

TEXT = ("pretrain", "preference", "online")
# Files by kind, and the runs that they can be part of, the usual one first.
METHODS = {
    "bam/bam": ("architecture", TEXT),
    "bam/btx": ("architecture", TEXT),
    "low_rank/decompose": ("transform", ("pretrain", "classify", "preference")),
    "low_rank/low_rank": ("low rank", TEXT),
    "low_rank/low_rank_conv": ("low rank", ("classify",)),
    "low_rank/spectrum": ("hook", ("pretrain", "classify", "preference", "online")),
    "nexus/nexus": ("architecture", TEXT),
    "nexus/nexus_bam": ("architecture", TEXT),
    "nexus/nexus_linear": ("architecture", TEXT),
    "nexus/nexus_mlp": ("architecture", TEXT),
    "preference/cpo": ("losses", ("preference",)),
    "preference/dpo_nll": ("losses", ("preference",)),
    "preference/grpo": ("online", ("online",)),
    "preference/indicators": ("hook", ("preference", "online")),
    "preference/ipo": ("losses", ("preference",)),
    "preference/kto": ("losses", ("preference",)),
    "preference/ld_dpo": ("losses", ("preference",)),
    "preference/online_dpo": ("online", ("online",)),
    "preference/orpo": ("losses", ("preference",)),
    "preference/ppo": ("online", ("online",)),
    "preference/reference_free": ("reference", ("preference",)),
    "preference/reference_live": ("reference", ("preference",)),
    "preference/reward_checkpoint": ("reward", ("online",)),
    "preference/reward_model": ("reward", ("preference",)),
    "preference/rloo": ("online", ("online",)),
    "preference/simpo": ("losses", ("preference",)),
    "preference/slic": ("losses", ("preference",)),
}
FILES = {
    "pretrain": ("models/tiny", "data/bytes", "runs/pretrain"),
    "classify": ("models/cnn_tiny", "data/textures", "runs/classify"),
    "preference": ("models/tiny", "data/preferences", "runs/preference"),
    "online": ("models/tiny", "data/prompts", "runs/online"),
}
_TUNED = ("TOKENIZER='/x'", "INITIAL_CHECKPOINT_PATH='/x'", "TRAIN_STEPS=10")
BINDINGS = {
    "pretrain": ("MIXTURE_OR_TASK_NAME='python'",),
    "classify": (),
    "preference": (*_TUNED, "PAIRS='x.jsonl'"),
    "online": (*_TUNED, "PROMPT_FILES='x.jsonl'", "BATCH_SIZE=32"),
}
# What is given before a pair that lacks it: factors to read or to make, and how an online run trains.
FACTORS = {"classify": "low_rank/low_rank_conv"}


def needed(run: str, methods: Sequence[str]) -> list[str]:
    """Returns the methods without which `methods` make no run."""
    more = []
    kinds = {METHODS[name][0] for name in methods}
    if {"low_rank/decompose", "low_rank/spectrum"} & {*methods} and "low rank" not in kinds:
        more.append(FACTORS.get(run, "low_rank/low_rank"))
    if run == "online" and "online" not in kinds:
        more.append("preference/rloo")
    return more


def arguments(run: str, methods: Sequence[str]) -> tuple[list[str], list[str]]:
    """Returns files and bindings of a run with these methods."""
    names = [*FILES[run], *(f"methods/{name}" for name in (*needed(run, methods), *methods))]
    bindings = ["MODEL_DIR='/tmp/x'", *BINDINGS[run]]
    if "preference/reward_checkpoint" in methods:
        bindings.append("REWARD_CHECKPOINT='/y'")
    return [f"t5x_configs/{name}.gin" for name in names], bindings


def load(run: str, methods: Sequence[str]) -> gin_config.Config:
    return gin_config.load(*arguments(run, methods), entry="launch.train:train")


def common_run(*methods: str) -> str | None:
    """Returns the first run that all these methods can be part of."""
    first, *others = (METHODS[name][1] for name in methods)
    return next((run for run in first if all(run in runs for runs in others)), None)


@functools.cache
def refusal(first: str, second: str) -> str | None:
    """Returns the reason for which two methods in this order are refused, or None."""
    run = common_run(first, second)
    problems = gin_config.problems(*arguments(run, (first, second)), entry="launch.train:train")
    if problems:
        return str(problems[0])
    config = load(run, (first, second))
    try:
        return initialise(config)
    finally:
        gin.clear_config()


_PROGRAMS: dict[frozenset, str | None] = {}
# The parts of a configuration that determine parameters, their reports and the optimiser.
_OF_PROGRAM = re.compile(
    r"(\w+/)*(model\.|trainers\.(recipe|reports|inputs|optim|low_rank|online\.(groups|pairs|critic)))"
)


def initialise(config: gin_config.Config) -> str | None:
    """Makes recipe, objective and, once for equal models, the program; returns the error."""
    try:
        recipe = config.arguments()["recipe"]
        recipe.objective(model=recipe.model, num_sources=1)
    except ValueError as error:
        return str(error)
    key = frozenset(_program_lines(config.text))
    if key not in _PROGRAMS:
        try:
            recipe.over(schedules.Span(10)).program()
            _PROGRAMS[key] = None
        except ValueError as error:
            _PROGRAMS[key] = str(error)
    return _PROGRAMS[key]


def _program_lines(text: str) -> Iterator[tuple[str, str]]:
    lines = config_diff.canonical(text)
    skipped = ("Recipe.objective", "Recipe.learning_rate")
    names = [k for k in lines if _OF_PROGRAM.match(k) and not k.endswith(skipped)]
    for name in names:
        yield name, lines[name]
        names += [m for m in re.findall(r"%(\w+)", lines[name]) if m in lines and m not in names]


PAIRS = [pair for pair in itertools.combinations(METHODS, 2) if common_run(*pair)]


def test_every_file_has_a_kind():
    files = {str(p.relative_to(FOLDER).with_suffix("")) for p in FOLDER.rglob("*.gin")}
    assert files == set(METHODS)


if __name__ == "__main__":
    import time

    begun = time.process_time()
    for pair in PAIRS:
        reasons = [refusal(*pair), refusal(*pair[::-1])]
        print(common_run(*pair), *pair, *["OK" if r is None else r.replace("\n", " | ")[:230] for r in reasons], sep=" ; ")
    print(time.process_time() - begun, len(_PROGRAMS))
