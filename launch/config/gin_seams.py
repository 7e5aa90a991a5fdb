"""What code passes by itself when it calls a function or class that gin has handed to it.

A caller's argument wins over gin's, so a binding of it would be ignored; the checker reads here which
those are. A seam that passes arguments has a row, and tests/launch/config/gin_seams_test.py calls each.
"""

import inspect
from typing import Any

_PROJECTION = ("features", "axes", "use_bias", "dtype", "param_dtype", "name")
_ROUTER = ("features", "axes", "dtype", "param_dtype", "name")
_POINTWISE = ("features", "axes", "kernel_init", "dtype", "param_dtype", "name")
_CONVOLUTION = ("features", "side", "stride", "dtype", "param_dtype", "name")
_HEAD = ("features", "axes", "kernel_init", "name")
_TABLE = ("features", "dtype", "param_dtype")

# By owner, and by the parameter of it that takes a factory: names of the arguments it is called with.
PASSED: dict[str, dict[str, tuple[str, ...]]] = {
    "data.vision.images.make_eval_stream": {"images": ("split",)},
    "data.vision.images.make_stream": {"images": ("split",)},
    "data.text.user_data.register_sources": {"sources": ("name",)},
    "launch.evaluation.held_out.evaluate": {"stream": ("task",)},
    "launch.run.reference.make_eval_stream": {"stream": ("task",)},
    "launch.run.reference.make_stream": {"stream": ("positions",)},
    "launch.train.train": {
        "checkpointer": ("directory",),
        "eval_stream": ("task",),
        "rollouts": ("stream", "program", "folder"),
        "stream": ("positions",),
    },
    "model.heads.actor_critic.ActorCritic": {"head": _HEAD},
    "model.attention.Attention": {"dense": _PROJECTION, "qk_norm": ("name",)},
    "model.nexus.domain_router.DomainRouter": {"dense": _POINTWISE},
    "model.mlp.GatedMlp": {"dense": _PROJECTION},
    "model.mlp.Mlp": {"dense": _PROJECTION},
    "model.nexus.mlp_router.MlpRouter": {"dense": _POINTWISE},
    "model.bam.moa.MixtureOfAttention": {
        "dense": _PROJECTION,
        "qk_norm": ("name",),
        "router": _ROUTER,
    },
    "model.moe.moe.MoeMlp": {
        "router": _ROUTER,
        "expert_dense": ("num_experts", "features", "axes", "dtype", "param_dtype", "name"),
        "shared": ("config", "kind", "name"),
    },
    "model.vision.resnet.ResNet": {
        "block": ("config", "width", "stride", "conv", "dense", "name"),
        "conv": _CONVOLUTION,
        "dense": _POINTWISE,
        "stem": ("config", "name"),
    },
    "model.heads.reward_model.RewardModel": {"head": _HEAD},
    "model.transformer.Block": {
        "attention": ("config", "kind", "name"),
        "mlp": ("config", "kind", "name"),
        "norm": ("name",),
        "post_norm": ("name",),
    },
    "model.transformer.Transformer": {
        "block": ("config", "kind", "name"),
        "embed": ("num_embeddings", *_TABLE),
        "position_embed": _TABLE,
    },
    "trainers.preference.indicators.hook.PreferenceIndicators": {"pairs": ("task",)},
    "trainers.recipe.Recipe": {
        "optimizer": ("learning_rate",),
        "objective": ("model", "num_sources"),
    },
}

# Entry functions whose commands pass the values of flags, whether or not these are given.
FLAGS: dict[str, tuple[str, ...]] = {
    "launch.evaluation.held_out.evaluate": (
        "checkpoint",
        "params",
        "tasks",
        "max_batches",
        "json_file",
    ),
}


def passed(owner: Any, parameter: str) -> tuple[str, ...]:
    """Arguments with which `owner` calls the factory in `parameter`; subclasses call as it does."""
    for holder in inspect.getmro(owner) if inspect.isclass(owner) else (owner,):
        row = PASSED.get(f"{holder.__module__}.{holder.__qualname__}", {})
        if parameter in row:
            return row[parameter]
    return ()
