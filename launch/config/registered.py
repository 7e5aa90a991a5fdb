"""The classes and functions that a recorded model may name, by names that stay valid when a file moves.

A run records its model as data (launch/config/model_file.py), and whoever reads it calls only these objects. All of
them build a part of a model or a number from their arguments; none reads or writes files, or starts anything.
"""

# Group -> its module and names in it. When a file moves, change the module; a group or name that runs have recorded stays.
_GROUPS: dict[str, tuple[str, tuple[str, ...]]] = {
    "actor_critic": ("model.heads.actor_critic", ("ActorCritic",)),
    "adapter": ("model.adapters.adapter", ("named",)),
    "attention": ("model.attention", ("Attention", "CrossAttention")),
    "bottleneck": ("model.adapters.bottleneck", ("Bottleneck",)),
    "config": ("model.config", ("TransformerConfig",)),
    "convolution": ("model.vision.convolution", ("Conv",)),
    "domain_router": ("model.nexus.domain_router", ("DomainRouter",)),
    "embed": ("model.embed", ("Embed", "Positions")),
    "encoder_decoder": ("model.t5.encoder_decoder", ("EncoderDecoder",)),
    "ia3": ("model.adapters.ia3", ("Ia3",)),
    "initializers": (
        "jax.nn.initializers",
        (
            "constant",
            "glorot_normal",
            "glorot_uniform",
            "he_normal",
            "he_uniform",
            "lecun_normal",
            "lecun_uniform",
            "normal",
            "ones",
            "orthogonal",
            "truncated_normal",
            "uniform",
            "variance_scaling",
            "zeros",
        ),
    ),
    "linear": ("model.linear", ("Dense",)),
    "lora": ("model.adapters.lora", ("Lora",)),
    "lowrank": (
        "model.low_rank.lowrank",
        ("Factorisation", "LowRankDense", "LowRankExpertDense", "factorised"),
    ),
    "lowrank_conv": ("model.low_rank.lowrank_conv", ("LowRankConv",)),
    "mlp": ("model.mlp", ("GatedMlp", "Mlp")),
    "mlp_router": ("model.nexus.mlp_router", ("MlpRouter",)),
    "moa": ("model.bam.moa", ("MixtureOfAttention", "experts_of")),
    "moe": ("model.moe.moe", ("ExpertDense", "MoeMlp", "experts_of")),
    "molora": ("model.mov.molora", ("MoLora",)),
    "mov": ("model.mov.mov", ("Mov",)),
    "norm": ("model.norm", ("LayerNorm", "RMSNorm")),
    "prompt": ("model.adapters.prompt", ("Prompt", "PromptEmbed")),
    "relative_bias": ("model.t5.relative_bias", ("RelativeBias",)),
    "resnet": (
        "model.vision.resnet",
        ("Bottleneck", "ResNet", "ResNetConfig", "Stem3x3", "Stem7x7", "WideBlock"),
    ),
    "reward_model": ("model.heads.reward_model", ("RewardModel",)),
    "rope": ("model.rope", ("Rope",)),
    "transformer": ("model.transformer", ("Block", "Transformer")),
}

# Name in a record, such as 'mlp.GatedMlp' -> module and attribute.
REGISTERED: dict[str, tuple[str, str]] = {
    f"{group}.{name}": (module, name)
    for group, (module, names) in _GROUPS.items()
    for name in names
}
