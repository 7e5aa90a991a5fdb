"""Every option of a layer, optimiser, schedule or loss changes a program or a value, or is refused.

Each target is compared with itself with another value of one parameter; tests/options_test.py asks for a row of PROGRAMS for each.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model import attention, config, embed, linear, mlp, norm, rope, transformer
from espalier.model.adapters import adapter, bottleneck, ia3, lora, prompt
from espalier.model.bam import moa
from espalier.model.heads import actor_critic, reward_model
from espalier.model.low_rank import lowrank, lowrank_conv
from espalier.model.moe import moe
from espalier.model.mov import molora, mov
from espalier.model.nexus import domain_router, mlp_router
from espalier.model.t5 import encoder_decoder, relative_bias
from espalier.model.vision import convolution, resnet
from espalier.trainers.online import losses as online_losses
from espalier.trainers.optim import optimizers, schedules
from espalier.trainers.optim.gradient_terms import ParamAxes
from espalier.trainers.preference.losses import direct, reference_free, terms, unpaired
from espalier.trainers.preference.losses.pairs import PairLogProbs
from tests.options_effect import called, of_module, traced, without_effect

SIZES = {"vocab_size": 16, "num_layers": 1, "embed_dim": 8, "num_heads": 2, "mlp_dim": 8}
CONFIG = config.TransformerConfig(**SIZES, scan_layers=False)
X_BTD, AT_BT = jnp.ones((2, 4, 8)), jnp.zeros((2, 4), jnp.int32)
IMAGES = jnp.ones((2, 4, 4, 3))
RANK = lowrank.Factorisation(rank=0.5, layers=(".*",))
OTHER_RANK = lowrank.Factorisation(rank=0.25, layers=(".*",))
EXPERTS = {"num_experts": 2, "features": 8, "axes": ("a", "b", "c")}
ROUTER = {"features": 4, "axes": ("a", "b"), "domain_dim": 8}
DENSE = {"features": 8, "axes": ("a", "b")}
PREFERENCE_LOSSES = (
    *(direct.dpo, direct.robust, direct.ipo, direct.hinge, direct.exo_pair, direct.discopop),
    *(direct.sigmoid_norm, direct.dpop, reference_free.slic_hinge, reference_free.simpo),
    *(reference_free.alpha_po, reference_free.cpo, reference_free.orpo, terms.nll, unpaired.kto),
    unpaired.apo_zero_unpaired,
)


@dataclasses.dataclass(frozen=True)
class Options:
    """How the effect of a target's parameters is seen.

    Attributes:
      fingerprint, base, values, passed: see `without_effect`.
    """

    fingerprint: Callable[..., str]
    base: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    values: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    passed: tuple[str, ...] = ()


def module(target: Any, *arguments: Any, base=(), values=(), passed=(), **keywords: Any) -> Options:
    def fingerprint(**fields: Any) -> str:
        return of_module(target(**fields), *arguments, **keywords)

    return Options(fingerprint, dict(base), dict(values), passed)


def layer(target: Any, *, base=(), values=(), **keywords: Any) -> Options:
    """A layer of a transformer, whose config and kind every caller passes."""
    base = {"config": CONFIG, **dict(base)}
    return module(target, X_BTD, base=base, values=values, passed=("config", "kind"), **keywords)


def model_with(**slots: Any) -> nn.Module:
    """A decoder of one layer with adapters."""
    own = {"adapters": adapter.named(**slots)} if slots else {}
    block = functools.partial(
        transformer.Block,
        attention=functools.partial(attention.Attention, **own),
        mlp=functools.partial(mlp.GatedMlp, **own),
        layout="sequential",
    )
    return transformer.Transformer(config=CONFIG, block=block)


def adapted(target: Any, **base: Any) -> Options:
    def fingerprint(**fields: Any) -> str:
        return of_module(model_with(own=functools.partial(target, **fields)), AT_BT)

    patterns = {name: [(".*/query",)] for name in ("layers", "inputs", "outputs")}
    values = {**patterns, "ranks": [((".*/query", 3),)], "activation": ["relu"]}
    return Options(fingerprint, base, {**values, "router_init": [called]})


def factorised(**fields: Any) -> str:
    return of_module(
        lowrank.LowRankDense(**DENSE, factorisation=lowrank.Factorisation(**fields)), X_BTD
    )


def sized(**fields: Any) -> str:
    return of_module(transformer.Transformer(config=config.TransformerConfig(**fields)), AT_BT)


def rotated(**fields: Any) -> str:
    return of_module(
        attention.Attention(config=CONFIG, rope=rope.Rope(**fields)), X_BTD, positions_BT=AT_BT
    )


def network(**fields: Any) -> str:
    return of_module(resnet.ResNet(config=resnet.ResNetConfig(**fields)), IMAGES, train=True)


def prompted(**fields: Any) -> str:
    table = functools.partial(prompt.PromptEmbed, adapters=prompts(**fields))
    return of_module(transformer.Transformer(config=CONFIG, embed=table), AT_BT)


def prompts(**fields: Any) -> adapter.Adapters:
    return adapter.named(prompt=functools.partial(prompt.Prompt, **fields))


def optimiser(target: Any, **base: Any) -> Options:
    params = {"w": {"kernel": jnp.ones((4, 4))}, "bias": jnp.arange(4.0)}
    names = ParamAxes({"w/kernel": ("a", "b"), "bias": ("a",)})

    def fingerprint(**arguments: Any) -> str:
        transform = target(learning_rate=0.1, param_axes=names, **arguments)
        return traced(lambda p, g: transform.update(g, transform.init(p), p), params, params)

    passed = ("learning_rate", "param_axes")
    return Options(
        fingerprint, {"weight_decay": 0.5, **base}, {"no_decay": [(".*kernel",)]}, passed
    )


def schedule(target: Any, **base: Any) -> Options:
    def fingerprint(**arguments: Any) -> str:
        rate = schedules.as_schedule(target(**arguments))
        return str([float(rate(jnp.int32(step))) for step in range(0, 24, 2)])

    values = {"before": [0.7], "at": [(0.5,)], "schedules": [(0.1, 0.2)], "starts": [(0, 4)]}
    return Options(fingerprint, base, values)


def preference(target: Any) -> Options:
    random = np.random.default_rng(0)
    names = ("chosen", "rejected", "ref_chosen", "ref_rejected")
    arrays = {name: -3 - random.random(4) for name in names}
    arrays |= {name: random.integers(1, 9, 4) for name in ("chosen_length", "rejected_length")}
    arrays |= {"weights": np.ones(4), "mean_chosen_length": 4.0, "labels": np.array([1, 0, 1, 0])}
    pairs = PairLogProbs(**{name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()})
    return Options(lambda **fields: str(np.asarray(target(pairs, **fields))), passed=("pairs",))


def policy_loss(target: Any, **base: Any) -> Options:
    random = np.random.default_rng(0)
    names = ("log_probs", "old_log_probs", "advantages", "reference_log_probs")
    arrays = {name: jnp.asarray(random.normal(size=(2, 5)), jnp.float32) for name in names}
    tokens = online_losses.PolicyTokens(**arrays, mask=jnp.ones((2, 5)))

    def fingerprint(**arguments: Any) -> str:
        # A ratio of completions takes no reduction but the usual one.
        of_completions = {
            k: x for k, x in arguments.items() if k not in ("reduction", "max_length")
        }
        of_tokens = {k: x for k, x in arguments.items() if k != "ratio"}
        sums = [target(tokens, **settings) for settings in (of_completions, of_tokens)]
        return str(jax.tree.map(np.asarray, sums))

    others = {"reduction": ["bnpo"], "ratio": ["completion"]}
    return Options(fingerprint, base, others, ("tokens",))


# Of a layer with a window, whose rotary embedding is the one of `local_rope`.
ROPES = {"rope": [None], "local_rope": [rope.Rope(base=100.0)]}
WINDOW = {"kind": config.LayerKind(window=2), "qk_norm": norm.RMSNorm}
RELU = {"activation": ["relu"]}
LOW_RANK = {"factorisation": RANK}
LOWER = {"factorisation": [OTHER_RANK]}
AXES2, AXES3 = {"axes": [("c", "d")]}, {"axes": [("c", "d", "e")]}
ENCODED = attention.Encoded(X_BTD)
SIZES_E = jnp.array([2, 2])
TABLE = {"num_embeddings": 16, "features": 8}
OF_TABLE = ("num_embeddings", "features", "dtype", "param_dtype")  # passed by every owner
OF_BIAS = ("num_heads", "bidirectional", "dtype", "param_dtype")
NETWORK = {"num_classes": 2, "stages": (1, 3), "widths": (8, 8), "stem_width": 4}
OF_NETWORK = {"config": resnet.ResNetConfig(**NETWORK)}
OF_BLOCK = {**OF_NETWORK, "width": 8, "stride": 1}
BACKBONE = {"backbone": model_with()}
COSINE = schedules.cosine(1.0, total_steps=20)

PROGRAMS: dict[Any, Options] = {
    attention.Attention: layer(attention.Attention, base=WINDOW, values=ROPES, positions_BT=AT_BT),
    attention.CrossAttention: layer(
        attention.CrossAttention,
        base={"qk_norm": norm.RMSNorm},
        values={"rope": [rope.Rope()], "local_rope": [rope.Rope()]},
        encoded=ENCODED,
    ),
    moa.MixtureOfAttention: layer(
        moa.MixtureOfAttention, base=WINDOW, values=ROPES, positions_BT=AT_BT
    ),
    mlp.GatedMlp: layer(mlp.GatedMlp, values=RELU),
    mlp.Mlp: layer(mlp.Mlp, values=RELU),
    moe.MoeMlp: layer(moe.MoeMlp, values=RELU),
    transformer.Block: layer(
        functools.partial(transformer.Block, layout="sequential"),
        positions_BT=AT_BT,
        encoded=ENCODED,
    ),
    transformer.Transformer: module(
        transformer.Transformer, AT_BT, base={"config": CONFIG}, passed=("config",)
    ),
    encoder_decoder.EncoderDecoder: module(
        encoder_decoder.EncoderDecoder,
        AT_BT,
        base={"config": CONFIG, "block": functools.partial(transformer.Block, layout="sequential")},
        values={"block": [called]},
        passed=("config",),
        encoder_tokens_BS=AT_BT,
    ),
    config.TransformerConfig: Options(
        sized,
        {**SIZES, "layer_pattern": ("sliding",), "sliding_window": 2},
        {"layer_pattern": [("full",)]},
    ),
    norm.RMSNorm: module(norm.RMSNorm, X_BTD),
    norm.LayerNorm: module(norm.LayerNorm, X_BTD),
    rope.Rope: Options(
        rotated,
        {"scaling": "yarn", "factor": 2.0, "truncate": False},
        {"layout": ["interleaved"], "scaling": ["none"], "fraction": [0.5]},
    ),
    embed.Embed: module(embed.Embed, AT_BT, base=TABLE, passed=OF_TABLE),
    embed.Positions: module(
        embed.Positions, AT_BT, base={"num_positions": 8, "features": 8}, passed=OF_TABLE
    ),
    relative_bias.RelativeBias: module(
        relative_bias.RelativeBias,
        base={"num_heads": 2, "bidirectional": True},
        passed=OF_BIAS,
        length=4,
        key_length=4,
    ),
    linear.Dense: module(linear.Dense, X_BTD, base=DENSE, values=AXES2),
    moe.ExpertDense: module(moe.ExpertDense, X_BTD[0], SIZES_E, base=EXPERTS, values=AXES3),
    lowrank.LowRankDense: module(
        lowrank.LowRankDense, X_BTD, base=DENSE | LOW_RANK, values=AXES2 | LOWER
    ),
    lowrank.LowRankExpertDense: module(
        lowrank.LowRankExpertDense,
        *(X_BTD[0], SIZES_E),
        base=EXPERTS | LOW_RANK,
        values=AXES3 | LOWER,
    ),
    lowrank.Factorisation: Options(
        factorised,
        {"layers": (".*",)},
        {"layers": [("none",)], "ranks": [((".*", 0.25),)], "multiple": [3]},
    ),
    domain_router.DomainRouter: module(
        domain_router.DomainRouter, X_BTD, base=ROUTER, values=AXES2
    ),
    mlp_router.MlpRouter: module(mlp_router.MlpRouter, X_BTD, base=ROUTER, values=AXES2),
    lora.Lora: adapted(lora.Lora, rank=2),
    ia3.Ia3: adapted(ia3.Ia3),
    bottleneck.Bottleneck: adapted(bottleneck.Bottleneck),
    mov.Mov: adapted(mov.Mov, num_experts=2),
    molora.MoLora: adapted(molora.MoLora, num_experts=2),
    prompt.Prompt: Options(prompted, {"length": 2}, {"starts": [(5, 6)]}),
    prompt.PromptEmbed: module(
        prompt.PromptEmbed,
        AT_BT,
        base={**TABLE, "adapters": prompts(length=2)},
        values={"adapters": [prompts(length=3)]},
        passed=OF_TABLE,
    ),
    actor_critic.ActorCritic: module(
        actor_critic.ActorCritic, AT_BT, base=BACKBONE, passed=("backbone",)
    ),
    reward_model.RewardModel: module(
        reward_model.RewardModel, AT_BT, base=BACKBONE, passed=("backbone",)
    ),
    convolution.Conv: module(convolution.Conv, IMAGES, base={"features": 4}),
    lowrank_conv.LowRankConv: module(
        lowrank_conv.LowRankConv, IMAGES, base={"features": 4} | LOW_RANK, values=LOWER
    ),
    resnet.ResNetConfig: Options(network, NETWORK, {"stages": [(1, 2)], "widths": [(8, 4)]}),
    **{
        target: module(target, IMAGES, base=base, passed=("config",), train=True)
        for target, base in (
            (resnet.ResNet, OF_NETWORK),
            (resnet.Stem3x3, OF_NETWORK),
            (resnet.Stem7x7, OF_NETWORK),
            (resnet.Bottleneck, OF_BLOCK),
            (resnet.WideBlock, OF_BLOCK),
        )
    },
    optimizers.adamw: optimiser(optimizers.adamw),
    optimizers.lion: optimiser(optimizers.lion),
    optimizers.adafactor: optimiser(optimizers.adafactor),
    optimizers.muon: optimiser(optimizers.muon),
    optimizers.sgd: optimiser(optimizers.sgd),
    schedules.constant: schedule(schedules.constant, peak=1.0),
    schedules.linear: schedule(schedules.linear, peak=1.0, total_steps=20),
    schedules.cosine: schedule(schedules.cosine, peak=1.0, total_steps=20),
    schedules.stepwise: schedule(schedules.stepwise, peak=1.0, total_steps=20),
    schedules.rsqrt: schedule(schedules.rsqrt, peak=1.0, warmup_steps=4),
    schedules.wsd: schedule(schedules.wsd, peak=1.0, total_steps=20, decay_steps=6),
    schedules.cooldown: schedule(schedules.cooldown, before=1.0, start_step=4, steps=8),
    schedules.continued: schedule(schedules.continued, before=COSINE, start_step=4, scale=0.5),
    schedules.phases: schedule(schedules.phases, schedules=(1.0, 0.5), starts=(0, 8)),
    **{target: preference(target) for target in PREFERENCE_LOSSES},
    online_losses.rloo: policy_loss(online_losses.rloo),
    online_losses.grpo: policy_loss(online_losses.grpo, reduction="dr_grpo", max_length=8),
    online_losses.cispo: policy_loss(online_losses.cispo, reduction="dr_grpo", max_length=8),
    online_losses.ppo: policy_loss(online_losses.ppo),
}


# Options without effect, each with the reason why it stays.
NO_EFFECT = {
    (
        moe.MoeMlp,
        "exchange_factor",
    ): "it limits what devices exchange on a mesh that splits experts",
    (domain_router.DomainRouter, "axes"): "owners of routers pass it; this one has no such kernel",
}


def name_of(target: Any) -> str:
    return f"{target.__module__}.{target.__qualname__}"


@pytest.mark.parametrize("target", PROGRAMS, ids=name_of)
def test_every_option_changes_a_program_or_a_value(target):
    options = PROGRAMS[target]
    dead = without_effect(
        target, options.fingerprint, base=options.base, values=options.values, passed=options.passed
    )
    assert dead == [name for holder, name in NO_EFFECT if holder is target]
