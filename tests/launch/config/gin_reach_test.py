"""Bindings of arguments that the caller passes itself are refused, and the derived arguments are right."""

import ast
import functools
import importlib
import inspect
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from espalier.common.ranges import CalledWith
from espalier.launch.config import gin_config, parameters
from espalier.launch.config.gin_config import ConfigError
from espalier.launch.config.model_file import REGISTERED
from espalier.launch.config.parameters import declaration, hints
from espalier.model import config as model_config
from espalier.model import transformer

FILES = ["t5x_configs/models/tiny.gin", "t5x_configs/runs/pretrain.gin"]
UNUSED = {"MODEL_DIR": "''", "MIXTURE_OR_TASK_NAME": "''", "TASKS": "()"}


def problems(*bindings, files=(), entry="espalier.launch.train:train") -> str:
    with pytest.raises(ConfigError) as caught:
        gin_config.load([*FILES, *files], bindings, entry=entry, unused=UNUSED)
    return str(caught.value)


@pytest.mark.parametrize(
    ("binding", "owner"),
    [
        ("optimizers.adamw.learning_rate=1.0", "espalier.trainers.recipe.Recipe.optimizer"),
        ("lm.language_modelling.num_sources=3", "espalier.trainers.recipe.Recipe.objective"),
        ("lm.language_modelling.model=None", "espalier.trainers.recipe.Recipe.objective"),
        ("stream.make_eval_stream.task='x'", "espalier.launch.train.train.eval_stream"),
        ("attention.Attention.config=None", "espalier.model.transformer.Block.attention"),
        ("attention.Attention.kind=None", "espalier.model.transformer.Block.attention"),
        ("mlp.GatedMlp.name='x'", "espalier.model.transformer.Block.mlp"),
        ("transformer.Block.config=None", "espalier.model.transformer.Transformer.block"),
    ],
)
def test_a_binding_of_what_the_caller_passes_is_refused(binding, owner):
    argument = binding.partition("=")[0].rpartition(".")[2]
    text = problems(binding)
    assert text.startswith("1 problem")
    assert f"the value of '{owner}' is called with {argument}=" in text


def test_the_same_in_files(gin_file):
    path = gin_file(
        """
        from __gin__ import dynamic_registration
        from espalier.launch import train
        from espalier.model import linear
        from espalier.model import mlp
        from espalier.trainers.checkpoints import checkpoint
        train.train.checkpointer = @checkpoint.Checkpointer
        checkpoint.Checkpointer.directory = '/x'
        mlp.GatedMlp.dense = @linear.Dense
        linear.Dense.use_bias = True
        """
    )
    text = problems(files=[path])
    assert (
        f"{path}:8: 'espalier.trainers.checkpoints.checkpoint.Checkpointer.directory' has no effect"
        in text
    )
    assert f"{path}:10: 'espalier.model.linear.Dense.use_bias' has no effect" in text


def test_flags_win_over_the_entry_functions_bindings(gin_file):
    own = "t5x_configs/runs/evaluate.gin"
    text = problems(
        "held_out.evaluate.max_batches=3",
        files=[own],
        entry="espalier.launch.evaluate.held_out:evaluate",
    )
    assert (
        "'espalier.launch.evaluate.held_out.evaluate.max_batches' has no effect: the command passes it"
        in text
    )


def test_gin_may_bind_it_where_gin_makes_the_call(gin_file, toy_gin):
    width = "toy_net.Dense.width = 3\n"
    with pytest.raises(ConfigError, match="'toy_net.Block.dense' is called with width="):
        gin_config.load([gin_file(toy_gin + width)], ["MODEL_DIR=/x"], entry="toy_run:train")
    called = width + "toy_run.train.optimizer = @toy_net.Dense()\n"
    gin_config.load([gin_file(toy_gin + called)], ["MODEL_DIR=/x"], entry="toy_run:train")
    scoped = "a/toy_net.Dense.width = 3\ntoy_run.train.optimizer = @a/toy_net.Dense()\n"
    config = gin_config.load([gin_file(toy_gin + scoped)], ["MODEL_DIR=/x"], entry="toy_run:train")
    assert config.entry()["optimizer"].width == 3


def recorder(factory, seen: set):
    @functools.wraps(factory)
    def call(*args, **kwargs):
        seen.add(frozenset(kwargs))
        return factory(*args, **kwargs)

    return call


def test_models_pass_what_the_table_says():
    """Every factory of every module with a row, replaced by one that records its arguments."""
    from espalier.model.attention import Attention
    from espalier.model.bam.moa import MixtureOfAttention
    from espalier.model.embed import Positions
    from espalier.model.heads.actor_critic import ActorCritic
    from espalier.model.heads.reward_model import RewardModel
    from espalier.model.linear import Dense
    from espalier.model.mlp import GatedMlp, Mlp
    from espalier.model.moe.moe import ExpertDense, MoeMlp
    from espalier.model.nexus.domain_router import DomainRouter
    from espalier.model.nexus.mlp_router import MlpRouter
    from espalier.model.norm import RMSNorm
    from espalier.model.t5.encoder_decoder import EncoderDecoder
    from espalier.model.t5.relative_bias import RelativeBias
    from espalier.model.vision import resnet
    from espalier.model.vision.convolution import Conv

    seen: dict[tuple[type, str], set] = {}

    def watched(owner, **factories):
        watching = {
            argument: recorder(factory, seen.setdefault((owner, argument), set()))
            for argument, factory in factories.items()
        }
        return lambda **kwargs: owner(**watching, **kwargs)

    sizes = {"vocab_size": 8, "num_layers": 1, "embed_dim": 4, "num_heads": 1, "mlp_dim": 4}
    mlps = (
        watched(GatedMlp, dense=Dense),
        watched(Mlp, dense=Dense),
        *(
            watched(MoeMlp, router=router, expert_dense=ExpertDense, shared=GatedMlp)
            for router in (watched(DomainRouter, dense=Dense), watched(MlpRouter, dense=Dense))
        ),
    )
    for mlp in mlps:
        block = watched(
            transformer.Block,
            attention=watched(Attention, dense=Dense, qk_norm=RMSNorm),
            mlp=mlp,
            norm=RMSNorm,
            post_norm=RMSNorm,
        )
        model = watched(
            transformer.Transformer,
            block=block,
            embed=transformer.Embed,
            position_embed=lambda **kwargs: Positions(num_positions=4, **kwargs),
        )(config=model_config.TransformerConfig(**sizes))
        for headed in (ActorCritic, RewardModel):
            model = watched(headed, head=Dense)(backbone=model)
            jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
            model = model.backbone
    attention = watched(MixtureOfAttention, dense=Dense, qk_norm=RMSNorm, router=Dense)
    block = functools.partial(transformer.Block, attention=attention)
    model = transformer.Transformer(config=model_config.TransformerConfig(**sizes), block=block)
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    tables = {"embed": transformer.Embed, "head": transformer.Embed}
    model = watched(EncoderDecoder, **tables, relative_bias=RelativeBias)(config=model.config)
    jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    sizes = resnet.ResNetConfig(num_classes=2, stages=(1,), widths=(8,), stem_width=4)
    for kind in (resnet.Bottleneck, resnet.WideBlock):
        factories = {"stem": resnet.Stem3x3, "block": kind, "conv": Conv, "dense": Dense}
        model = watched(resnet.ResNet, **factories)(config=sizes)
        jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)))
    for (owner, argument), calls in seen.items():
        assert calls == {frozenset(parameters.passed(owner, argument))}, (owner, argument)
    for module, name in REGISTERED.values():
        owner = getattr(importlib.import_module(module), name)
        declared = [
            x for x, hint in hints(owner).items() if isinstance(declaration(hint), CalledWith)
        ]
        missing = [(owner, argument) for argument in declared if (owner, argument) not in seen]
        assert not missing


@pytest.mark.parametrize(
    ("binding", "place"),
    [
        ("moa.MixtureOfAttention.qkv_bias=True", "espalier.model.attention.Attention.qkv_bias"),
        ("moa.MixtureOfAttention.rope=None", "espalier.model.attention.Attention.rope"),
        ("moe.MoeMlp.activation='gelu'", "espalier.model.mlp.GatedMlp.activation"),
        (
            "lowrank.LowRankExpertDense.kernel_init=None",
            "espalier.model.linear.Dense.kernel_init or espalier.model.moe.moe.ExpertDense.kernel_init",
        ),
    ],
)
def test_what_a_wrapper_copies_is_refused_with_the_place_to_set_it(binding, place):
    methods = [f"t5x_configs/methods/{name}.gin" for name in ("bam/bam", "low_rank/low_rank")]
    text = problems(binding, files=methods)
    assert f"{binding.partition('=')[0]}' has no effect: the value of" in text
    assert "gets it from the module that it replaces" in text and f"  Bind {place}." in text
    binding = f"{place.removeprefix('model.').partition(' ')[0]}=None"
    if binding.startswith("attention"):  # the same setting at that place holds
        gin_config.load([*FILES, *methods], [binding.replace("qkv_bias=None", "qkv_bias=True")],
                        entry="espalier.launch.train:train", unused=UNUSED)  # fmt: skip


@pytest.mark.parametrize(
    ("binding", "owner"),
    [
        ("moa.MixtureOfAttention.kind=None", "espalier.model.bam.moa.experts_of.moa"),
        ("attention.Attention.kind=None", "espalier.model.bam.moa.experts_of.attention"),
        ("moe.ExpertDense.features=3", "espalier.model.low_rank.lowrank.factorised.dense"),
        ("lowrank.LowRankExpertDense.axes=()", "espalier.model.low_rank.lowrank.factorised.layer"),
        ("lowrank.LowRankExpertDense.factorisation=@lowrank.Factorisation()", "factorised.layer"),
    ],
)
def test_what_a_wrapper_passes_on_is_refused(binding, owner):
    methods = [f"t5x_configs/methods/{name}.gin" for name in ("bam/bam", "low_rank/low_rank")]
    argument = binding.partition("=")[0].rpartition(".")[2]
    text = problems(binding, files=methods)
    assert f"{owner}' is called with {argument}=" in text


def test_a_wrapper_copies_what_the_check_says():
    """Every function that calls `like`: the fields that it reads from the plain module are those of its `Wrapper`."""
    from espalier.model.bam import moa
    from espalier.model.low_rank import lowrank
    from espalier.model.moe import moe

    rank = lowrank.Factorisation(rank=0.5)
    sizes = {"vocab_size": 8, "num_layers": 1, "embed_dim": 4, "num_heads": 1, "mlp_dim": 4}
    layer = {"config": model_config.TransformerConfig(**sizes), "name": None, "parent": None}
    projection = {"features": 3, "axes": ("a", "b"), "name": None, "parent": None}
    cases = {
        moa.experts_of: ({}, layer, moa.MixtureOfAttention),
        moe.experts_of: ({}, layer, moe.MoeMlp),
        lowrank.factorised: ({"factorisation": rank}, projection, lowrank.LowRankDense),
    }
    for owner, (settings, passed, made) in cases.items():
        wrapper = parameters.wrapper(owner)
        default = inspect.signature(owner).parameters[wrapper.made].default
        seen: set = set()
        owner(**settings, **{wrapper.made: recorder(default, seen)})(**passed)
        assert default is made
        expected = {*passed, *wrapper.settings}
        assert seen == {
            frozenset(expected),
            frozenset({*expected, *wrapper.copied(made)}),
        }, owner


def test_every_wrapper_is_read():
    """A call of `like` that `wrapper` cannot read would let bindings vanish again."""
    for path in sorted(pathlib.Path("model").rglob("*.py")):
        for node in ast.parse(path.read_text("utf-8")).body:
            calls = [x for x in ast.walk(node) if isinstance(x, ast.Call)]
            if any(isinstance(x.func, ast.Name) and x.func.id == "like" for x in calls):
                module = importlib.import_module(
                    ".".join(("espalier", *path.with_suffix("").parts))
                )
                assert parameters.wrapper(getattr(module, node.name)) is not None, path


# Called without keywords: functions of arrays, of texts, and of nothing.
POSITIONAL = {
    "espalier.launch.load.load_run.RunConfig.vocabulary",
    "espalier.launch.train.train.tasks",
    "espalier.model.adapters.lora.Lora.a_init",
    "espalier.model.adapters.lora.Lora.b_init",
    "espalier.model.mov.molora.MoLora.a_init",
    "espalier.model.mov.molora.MoLora.b_init",
    "espalier.model.t5.encoder_decoder.EncoderDecoder.norm",
    "espalier.model.transformer.Transformer.norm",
    "espalier.trainers.distillation.objective.distillation.divergence",
    "espalier.trainers.distillation.on_policy.Sampled.teachers",
    "espalier.trainers.online.groups.Groups.advantages",
    "espalier.trainers.online.policy_gradient.policy_gradient.loss",
    "espalier.trainers.preference.objectives.preference.preference.losses",
    "espalier.trainers.recipe.Recipe.averaged",
    "espalier.trainers.rewards.verifiers.TextReward.verifiers",
}


def test_every_factory_in_a_gin_file_has_known_arguments():
    """A new seam whose owner hands the factory on needs a row in PASSED."""
    unknown = set()
    for file in sorted(pathlib.Path(gin_config.gin_source.ROOT, "t5x_configs").rglob("*.gin")):
        checked = gin_config.check([str(file)], fragment=True)
        for (_, target, argument), bound in checked.bindings.items():
            macros = [checked.macros[m] for m in bound.macros if m in checked.macros]
            references = [reference for one in (bound, *macros) for reference in one.references]
            owner = checked.targets[target].value
            is_factory = any(not reference.evaluate for reference in references)
            wrapper = parameters.wrapper(owner) if inspect.isfunction(owner) else None
            if wrapper is not None and argument in (wrapper.plain, wrapper.made):
                continue
            if is_factory and not parameters.passed(owner, argument):
                unknown.add(f"{target}.{argument}")
    assert unknown == POSITIONAL


def test_trainers_pass_what_the_table_says():
    from espalier.data.stream import stream
    from espalier.data.t5 import denoising
    from espalier.data.vision import image_sets, images
    from espalier.launch import train
    from espalier.launch.evaluate import held_out as evaluation
    from espalier.trainers.objectives import lm
    from espalier.trainers.recipe import Recipe

    blank = image_sets.Arrays("x", 1, np.zeros((2, 2, 2, 3), np.uint8), np.zeros(2, int))
    config = gin_config.load(FILES, entry="espalier.launch.train:train", unused=UNUSED)
    recipe = config.arguments()["recipe"]
    calls: dict[str, set] = {"optimizer": set(), "objective": set()}
    Recipe(
        model=recipe.model,
        batch_size=8,
        feature_lengths={"targets": 8},
        optimizer=recorder(lambda learning_rate, param_axes: optax.sgd(0.1), calls["optimizer"]),
        learning_rate=recipe.learning_rate,
        objective=recorder(lm.language_modelling, calls["objective"]),
    ).program().steps(1)
    for name, seen in calls.items():
        assert seen == {frozenset(parameters.passed(Recipe, name))}

    split: set = set()
    given = {"images": recorder(lambda split: blank, split), "batch_size": 2, "image_size": 2}
    images.make_stream(**given)
    images.make_eval_stream(**given, task="x")
    for owner in ("make_stream", "make_eval_stream"):
        assert split == {frozenset(parameters.passed(getattr(images, owner), "images"))}

    held_out: set = set()
    stream.held_out(recorder(lambda task: task, held_out), ["a"])
    for owner, argument in ((train.train, "eval_stream"), (evaluation.evaluate, "stream")):
        assert held_out == {frozenset(parameters.passed(owner, argument))}
    passed_on = {*parameters.passed(train.train, "stream"), *held_out.pop()}
    assert passed_on == {*parameters.passed(denoising.make_stream, "stream")}
