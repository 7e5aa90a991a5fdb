"""The sweeps of MoV and MoLORA (arXiv 2309.05444), small and at full size, as gin has their arms."""

import functools
import pathlib

import flax.linen as nn
import jax
import pytest
from flax import traverse_util

from espalier.launch.config import gin_config
from espalier.launch.papers.mov import experiment, full_size, runs
from espalier.launch.sweep import file
from espalier.model.adapters import adapter
from espalier.trainers import initialise


@functools.cache
def runs_of(text):
    runs = file.read(f"launch/papers/mov/experiment.py:{text}")
    return {run.arm: run for run in runs if run.seed == runs[0].seed}


def load(run):
    parent = ["INITIAL_CHECKPOINT_PATH='/before'"] if run.parent else []
    bindings = [*run.bindings, "MODEL_DIR='/run'", *parent]
    return gin_config.load(run.gin_files, bindings, entry="espalier.launch.train:train")


def recipe_of(run):
    return load(run).arguments()["recipe"]


# Method -> arm, but for its size. More experts and higher ranks are multiples of them.
ARMS = {"(IA)3": "ia3", "LoRA-4": "lora4", "MoV-10": "mov10", "MoLORA-10": "molora10"}
# Per cent of the model's parameters as the paper's shapes give them, by size.
PER_CENT = {
    "(IA)3": (0.036, 0.019, 0.0097),
    "LoRA-4": (0.49, 0.26, 0.13),
    "LoRA-8": (0.98, 0.52, 0.27),
    "LoRA-16": (1.96, 1.05, 0.54),
    "MoV-10": (0.55, 0.28, 0.142),
    "MoV-30": (1.64, 0.84, 0.426),
    "MoV-60": (3.27, 1.67, 0.852),
    "MoLORA-10": (5.51, 2.95, 1.51),
    "MoLORA-15": (8.26, 4.42, 2.26),
}


def test_the_table_of_parameters_is_the_papers():
    assert set(PER_CENT) == set(full_size.METHODS)
    for method, expected in PER_CENT.items():
        for size, value in zip(full_size.SIZES, expected, strict=True):
            assert full_size.per_cent(method, size) == pytest.approx(value, rel=0.04)  # two digits
    assert full_size.per_cent("MoV-60", "11B") == pytest.approx(
        full_size.REPORTED["MoV-60", "11B"], rel=0.02
    )


@pytest.mark.parametrize("size", [*experiment.FULL_MODELS])
def test_the_table_counts_the_models_of_full_size(size):
    sizes = full_size.SIZES[size.upper()]
    for method, arm in ARMS.items():
        model = recipe_of(runs_of("full,/data")[f"{arm}_{size}"]).model
        params = nn.meta.unbox(initialise.abstract_variables(model)["params"])
        leaves = traverse_util.flatten_dict(params, sep="/")
        trained = sum(leaf.size for path, leaf in leaves.items() if adapter.is_adapter(path))
        assert trained == full_size.METHODS[method](sizes), method
        base = sum(leaf.size for leaf in leaves.values()) - trained
        assert base == pytest.approx(sizes.parameters, rel=1e-5)


@pytest.mark.parametrize(
    ("arm", "batch", "steps", "rate"),
    [("mov30_3b", 32, 500_000, 3e-4), ("full_3b", 256, 10_000, 1e-3)],
)
def test_full_arms_have_the_papers_steps_batch_and_rate(arm, batch, steps, rate):
    config = load(runs_of("full,/data")[arm])
    arguments = config.arguments()
    recipe = arguments["recipe"]
    assert (recipe.batch_size, arguments["total_steps"]) == (batch, steps)
    assert float(recipe.learning_rate(1000)) == pytest.approx(rate)
    assert recipe.optimizer.__name__ == "adafactor" and recipe.length == 1024 + 256
    assert config.macros["DROPOUT_RATE"] == 0.1
    assert not [str(warning) for warning in config.warnings]


def test_full_arms_are_all_methods_of_each_size_and_the_ablations_of_one():
    runs = runs_of("full,/data")
    for size in experiment.FULL_MODELS:
        arms = {arm.rpartition("_")[0] for arm in runs if arm.endswith(f"_{size}")}
        ablated = {f"mov10_{x}" for x in experiment.ABLATIONS} if size == "3b" else set()
        mov = {f"mov{n}" for n in experiment.FULL_MOV_EXPERTS[size]}
        others = {"full", "ia3", "lora4", "lora8", "lora16", "molora10", "molora15"}
        assert arms == others | mov | ablated
    sentence = recipe_of(runs["mov10_sentence_3b"]).model.layer_settings()[0].attention.adapters
    assert sentence.slots["mov"].router_input == "sentence"
    assert all(pathlib.Path(path).is_file() for run in runs.values() for path in run.gin_files)


def test_small_arms_train_what_they_say_from_one_frozen_model():
    every = file.read("launch/papers/mov/experiment.py:1")
    by_width = {width: {r.arm: r for r in every if r.size == width} for width in runs.WIDTHS}
    assert set(by_width["64"]) == {"rows", "pretrained", "single", "base", *runs.BY_WIDTH}
    for width, arms in by_width.items():
        for arm in runs.TUNED:
            if arm in arms:
                assert arms[arm].parent == f"base/{width}/seed{arms[arm].seed}"
                values = dict(binding.split("=", 1) for binding in arms[arm].bindings)
                assert values["TRAIN_STEPS"] == str(experiment.STEPS)
    frozen = {
        width: dict(binding.split("=", 1) for binding in arms["base"].bindings)
        for width, arms in by_width.items()
    }
    rates = [float(frozen[width]["LEARNING_RATE"]) for width in (runs.NARROW, runs.MAIN)]
    assert rates == [experiment.NARROW_RATE, experiment.BASE_RATE]
    main = by_width[runs.MAIN]
    recipe = recipe_of(main["mov10_top1"])
    adapter = recipe.model.layer_settings()[0].attention.adapters.slots["mov"]
    assert (adapter.num_experts, adapter.top_k, adapter.renormalise) == (10, 1, False)
    counts = {
        arm: recipe_of(main[arm]).program(devices=jax.devices()[:1]).num_params(trained_only=True)
        for arm in ("lora4", "lora45", "molora10", "mov10_sentence")
    }
    size = full_size.Size(2, 128, 256, 32, 0)
    assert counts["lora4"] == full_size.lora(size, experiment.RANK)
    assert counts["molora10"] == full_size.molora(size, 10, experiment.RANK) == counts["lora45"]
    # Eight routers for each layer of both stacks read a sentence's embedding, which has the model's width.
    routers = 8 * size.layers * size.width
    assert counts["mov10_sentence"] == 10 * (full_size.ia3(size) + routers)
    wide, narrow = (recipe_of(by_width[w]["full"]) for w in (runs.MAIN, "64"))
    config = narrow.model.config
    assert (config.embed_dim, config.head_dim, config.mlp_dim) == (64, 16, 128)
    programs = [each.program(devices=jax.devices()[:1]) for each in (wide, narrow)]
    total, small = (each.num_params() for each in programs)
    assert total == programs[0].num_params(trained_only=True)
    assert 1e6 < total < 2e6 and 0.3e6 < small < 0.6e6
