"""Values of the wrong type or out of range are found before any work; every number that a file sets has a range."""

import collections.abc
import functools
import pathlib
import typing
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Any, Literal

import pytest

from espalier.common.ranges import Count, Decay, Finite, Fraction, Positive, Size
from espalier.launch.config import gin_config, gin_reader, parameters, values
from espalier.launch.config.gin_reader import Target
from espalier.launch.config.values import Macro, Reference
from espalier.model.transformer import Transformer
from espalier.trainers.batches import Stream
from espalier.trainers.evaluate import EvalStream

ROOT = pathlib.Path(__file__).resolve().parents[3]
FILES = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "t5x_configs").rglob("*.gin"))
RUN = [f"t5x_configs/{name}.gin" for name in ("models/tiny", "data/bytes", "runs/pretrain")]
NEEDED = ["MODEL_DIR='/x'", "MIXTURE_OR_TASK_NAME='python'", "TRAIN_STEPS=3"]

# Parameters of other libraries, which declare no ranges.
WITHOUT_RANGE = {
    *(f"schedule_free_adamw.{name}" for name in ("b1", "b2", "weight_decay")),
    *(f"variance_scaling.{name}" for name in ("in_axis", "out_axis")),
}


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def has_range(annotation: Any) -> bool:
    """Returns whether an annotation declares a range for each of its numbers."""
    if typing.get_origin(annotation) in (Annotated, collections.abc.Callable):
        return True  # no number is a function
    return annotation not in (int, float) and all(map(has_range, typing.get_args(annotation)))


def test_every_number_in_a_shipped_file_has_a_declared_range():
    without = set()
    for file in FILES:
        checked = gin_config.check([file], fragment=True)
        for (_, target, argument), bound in checked.bindings.items():
            value = gin_config._with_macros(bound.value, checked.macros)
            annotation = parameters.hints(checked.targets[target].value).get(argument)
            if any(map(is_number, values.leaves(value))) and not has_range(annotation):
                without.add(f"{target.rpartition('.')[2]}.{argument}")
    assert without == WITHOUT_RANGE


@functools.cache
def load_error(*bindings: str) -> str:
    with pytest.raises(gin_config.ConfigError) as caught:
        gin_config.load(RUN, [*NEEDED, *bindings], entry="espalier.launch.train:train")
    return str(caught.value)


@pytest.mark.parametrize(
    ("binding", "problem"),
    [
        ("OPTIMIZER=adamw", "Write --gin.OPTIMIZER=@optimizers.adamw\n"),
        ("SCHEDULE=cosine()", "Write --gin.SCHEDULE=@schedules.cosine()\n"),
        (
            "OPTIMIZER=none_such",
            "a function, @MODULE.NAME, such as --gin.OPTIMIZER=@optimizers.adamw",
        ),
        ("MODEL=tiny", "did you mean --gin_file=t5x_configs/models/tiny.gin?"),
        ("OPTIMIZER=@optimizers.adamw()", "takes the function itself, not its result"),
        ("TRAIN_STEPS=10,000", "A number has no commas: --gin.TRAIN_STEPS=10000\n"),
        ("TRAIN_STEPS=10,100", "A number has no commas: --gin.TRAIN_STEPS=10100\n"),
        ("MIXTURE_OR_TASK_NAME=a/*.jsonl", "--gin.MIXTURE_OR_TASK_NAME='\"a/*.jsonl\"'"),
        (
            "TEACHER=/x",
            "a macro of t5x_configs/methods/distillation/distillation.gin: add that with",
        ),
        ("MESH=fsdp", "--gin.MESH=\"{'fsdp': -1}\""),
        ("TRAIN_STEPS=-5", "is -5, but takes a number that is at least 1"),
        ("TRAIN_STEPS=1e9", "takes int or None, not 1000000000.0"),
        ("TRAIN_STEPS=99999999999", "at least 1 and below 2147483648"),
        ("SEED=99999999999999999999", "at least 0 and below 4294967296"),
        ("EVAL_STEPS=0", "is 0, but takes a number that is at least 1"),
        ("BATCH_SIZE=0", "is 0, but takes a number that is at least 1"),
        ("LEARNING_RATE=-1", "cosine.peak' is -1, but takes a number that is at least 0"),
        ("LEARNING_RATE=1e400", "is inf, but takes a finite number"),
        ("LEARNING_RATE=%LEARNING_RATE", "leads back to the macro itself"),
        ("optimizers.adamw.b1=1.5", "at least 0 and below 1"),
        ("optimizers.adamw.weight_decay=-1.0", "at least 0"),
        ("recipe.Recipe.ema_decay=1.0", "at least 0 and below 1"),
        ("recipe.Recipe.ema_decay=-0.1", "at least 0 and below 1"),
        ("config.TransformerConfig.num_heads=0", "at least 1"),
        ("config.TransformerConfig.num_kv_heads=0", "at least 1"),
        ("config.TransformerConfig.head_dim=-16", "at least 1"),
        ("rope.Rope.base=-1", "Rope.base' is -1, but takes a number that is above 0"),
        ("checkpoint.Checkpointer.keep_last=-1", "keep_last' is -1"),
        ("DOCUMENT_START=-1", "start_token' is -1"),
        ("TASK_FEATURE_LENGTHS={'targets': '64'}", "takes a dict of int"),
        ("TASK_FEATURE_LENGTHS={'targets': 0}", "is 0, but takes"),
        ("MESH={'fsdp': 'all'}", "takes a dict of int or None"),
        ("MESH=" + "[" * 500 + "]" * 500, "is not a value in gin syntax"),
        ("SCHEDULE=@schedules.cosine", "not @schedules.cosine itself: write @schedules.cosine()"),
        ("MODEL=@config.TransformerConfig", "takes an object of Model, not @config.Transf"),
        ("MODEL=@config.TransformerConfig()", "which is of TransformerConfig"),
        ("train.train.hooks=[1]", "takes a list of a function, as @module.name"),
    ],
)
def test_a_value_out_of_range_or_of_another_kind_is_a_problem(binding, problem):
    assert problem in load_error(binding)


def test_a_function_that_is_called_by_mistake_is_one_problem():
    error = load_error("OPTIMIZER=@optimizers.adamw()")
    assert "learning_rate" not in error


def test_a_number_may_stand_for_a_schedule():
    # Whose own settings, of the files before, then have no use.
    assert "SCHEDULE" not in load_error("SCHEDULE=1e-3", "TRAIN_STEPS=0")
    assert "is -0.001, but takes a number" in load_error("SCHEDULE=-1e-3")


def test_a_problem_of_a_macro_names_its_place():
    assert "--gin.LEARNING_RATE=-1: 'espalier.trainers.optim.schedules.cosine.peak'" in load_error(
        "LEARNING_RATE=-1"
    )


Schedule = Callable[[int], float]


def makes_schedule() -> Schedule:
    return float


def takes(
    *,
    size: Size,
    share: Fraction | None = None,
    plain: float = 0.0,
    either: Fraction | Literal["auto"] = "auto",
    sizes: Sequence[Size] = (),
    pairs: Sequence[tuple[Count, Mapping[str, Decay]]] = (),
    fixed: tuple[Fraction, Positive] = (0.0, 1.0),
    number: Finite = 0.0,
    model: Transformer | None = None,
    schedule: Schedule = float,
    stream: EvalStream | None = None,
    anything: Any = None,
): ...


@pytest.mark.parametrize(
    ("argument", "good", "bad"),
    [
        ("size", [1, 2**31 - 1, Macro("X")], [0, -1, 2**31, 1.0, True, None]),
        ("share", [0, 1, 0.5, None], [-0.1, 1.1, float("nan"), "0.5"]),
        ("plain", [-1e30, 0], [1e39, -1e39, float("nan"), float("inf")]),
        ("either", [0.5, "auto"], [2.0, "none", float("nan")]),
        ("sizes", [[], (1, 2)], [[1, 0], 1, ["1"]]),
        ("pairs", [[(0, {"a": 0.5})], [[1, {}]]], [[(-1, {})], [(0, {"a": 1.0})]]),
        ("fixed", [(1.0, 5.0)], [(1.0, 0.0), (5.0, 1.0)]),
        ("number", [-5, 1e9], [float("inf")]),
        ("stream", [None], [3, "python"]),
        ("schedule", [None], [0.1, [1]]),
        ("anything", [float("nan"), {"a": [1]}], []),
    ],
)
def test_values_are_compared_with_annotations_of_every_form(argument, good, bad):
    assert [value for value in good if parameters.mismatch(takes, argument, value)] == []
    assert [value for value in bad if not parameters.mismatch(takes, argument, value)] == []


@pytest.mark.parametrize(
    ("argument", "evaluate", "value", "fits"),
    [
        ("model", True, Transformer, True),
        ("model", False, Transformer, False),
        ("model", True, gin_reader.Checked, False),
        ("model", True, makes_schedule, True),  # not certain
        ("schedule", True, makes_schedule, True),
        ("schedule", False, makes_schedule, False),
        ("schedule", False, len, True),
        ("stream", True, gin_reader.Checked, False),
        ("stream", True, Stream, True),
        ("anything", False, Transformer, True),
    ],
)
def test_references_give_the_kind_of_object_that_is_wanted(argument, evaluate, value, fits):
    reference = Reference("x.y", evaluate, Target("x.y", value))
    problem = parameters.mismatch(takes, argument, reference)
    assert (problem is None) == fits, problem


def test_a_range_is_declared_for_each_number():
    hints = parameters.hints(takes)
    assert [name for name in hints if not has_range(hints[name])] == ["plain"]
    assert not has_range(Mapping[str, int] | None)
    assert not has_range(collections.abc.Sequence[tuple[int, Size]])
