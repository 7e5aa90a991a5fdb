"""The encoder-decoders of Hugging Face: T5 (arXiv 1910.10683), its version 1.1, and mT5 (arXiv 2010.11934).

T5's config.json says by `tie_word_embeddings` whether the head is the token table, which also scales the logits by
D^-1/2. Newer versions of transformers write `scale_decoder_outputs` for the scale.
"""

from collections.abc import Mapping
from typing import Any

from espalier.model.attention import Attention, CrossAttention
from espalier.model.hf.config_fields import ACTIVATIONS, ConfigFields, activation_field
from espalier.model.hf.family import Family, Part, field
from espalier.model.hf.mapping import Row
from espalier.model.mlp import GatedMlp, Mlp
from espalier.model.norm import RMSNorm
from espalier.model.t5.encoder_decoder import EncoderDecoder
from espalier.model.t5.relative_bias import RelativeBias

_HEADS = {"query": "q", "key": "k", "value": "v", "out": "o"}
_GATED_GELU = "gated-gelu"  # means the approximation by tanh, unlike "gelu"


def _kernel(native: str, hf: str, **more: Any) -> Row:
    return Row(f"{native}/kernel", f"{hf}.weight", transpose=True, **more)


def _stack(stack: str, sublayers: Mapping[str, tuple[str, str]]) -> list[Row]:
    """Returns the rows of a stack; `sublayers` are the names of its attentions and of their norms."""
    rows = [
        Row(f"{stack}/final_norm/scale", f"{stack}.final_layer_norm.weight"),
        Row(
            f"{stack}/position_bias/embedding",
            f"{stack}.block.0.layer.0.SelfAttention.relative_attention_bias.weight",
        ),
    ]
    layer = f"{stack}.block.{{layer}}.layer."
    for i, (native, (theirs, norm)) in enumerate(sublayers.items()):
        rows.append(Row(f"{stack}/{norm}/scale", f"{layer}{i}.layer_norm.weight"))
        rows += [
            _kernel(f"{stack}/{native}/{ours}", f"{layer}{i}.{theirs}.{head}")
            for ours, head in _HEADS.items()
        ]
    mlp, dense = f"{stack}/mlp", f"{layer}{len(sublayers)}.DenseReluDense"
    return [
        *rows,
        Row(f"{stack}/mlp_norm/scale", f"{layer}{len(sublayers)}.layer_norm.weight"),
        _kernel(f"{mlp}/gate", f"{dense}.wi_0"),
        _kernel(f"{mlp}/up", f"{dense}.wi_1"),
        _kernel(f"{mlp}/up", f"{dense}.wi", unless=f"{mlp}/gate/kernel"),
        _kernel(f"{mlp}/down", f"{dense}.wo"),
    ]


_SELF = {"attention": ("SelfAttention", "norm")}
_CROSS = {"cross_attention": ("EncDecAttention", "cross_norm")}
_ROWS = (
    Row("token_embed/embedding", "shared.weight"),
    Row("lm_head/embedding", "lm_head.weight"),
    *_stack("encoder", _SELF),
    *_stack("decoder", _SELF | _CROSS),
)


def _mlp(fields: ConfigFields) -> dict[str, Any]:
    name = fields.get("feed_forward_proj", "relu")
    gated = name.startswith("gated-")
    theirs = "gelu_new" if name == _GATED_GELU else name.removeprefix("gated-")
    if theirs not in ACTIVATIONS:
        known = ", ".join((*ACTIVATIONS, *(f"gated-{known}" for known in ACTIVATIONS)))
        raise fields.error("feed_forward_proj", f"supported are {known}")
    # What transformers makes of it; its class obeys these two where they differ.
    fields.neutral(is_gated_act=gated, dense_act_fn=theirs)
    return {
        "block.mlp": GatedMlp if gated else Mlp,
        "block.mlp.activation": ACTIVATIONS[theirs],
    }


def _feed_forward(here: Mapping[str, Any]) -> dict[str, Any]:
    gated, activation = here["block.mlp"] is GatedMlp, here.get("block.mlp.activation")
    name = activation_field(activation)
    if gated:
        name = _GATED_GELU if activation == "gelu" else f"gated-{name}"
    return {"feed_forward_proj": name}


def _layers(fields: ConfigFields) -> dict[str, Any]:
    encoder = fields.required("num_layers")
    decoder = fields.get("num_decoder_layers", encoder)
    return {"encoder_layers": encoder, "config.num_layers": decoder}


def _t5_head(fields: ConfigFields) -> dict[str, Any]:
    tied = fields.get("tie_word_embeddings", True)
    scaled = fields.get("scale_decoder_outputs", tied)
    scale = fields.required("d_model") ** -0.5 if scaled else 1.0
    return {"tie_embeddings": tied, "logit_scale": scale}


_PARTS = (
    field("vocab_size", "config.vocab_size"),
    field("d_model", "config.embed_dim"),
    field("d_kv", "config.head_dim"),
    field("d_ff", "config.mlp_dim"),
    field("num_heads", "config.num_heads"),
    Part(
        _layers,
        lambda here: {
            "num_layers": here.get("encoder_layers", 1),
            "num_decoder_layers": here["config.num_layers"],
        },
    ),
    field("layer_norm_epsilon", "norm.eps", default=1e-6),
    field("relative_attention_num_buckets", "relative_bias.num_buckets", default=32, absent=32),
    field("relative_attention_max_distance", "relative_bias.max_distance", default=128, absent=128),
    Part(_mlp, _feed_forward),
    Part(write=lambda here: {"is_encoder_decoder": True, "decoder_start_token_id": 0}),
)
_LIKE_T5: dict[str, Any] = dict(
    model_class=EncoderDecoder,
    fixed={
        "norm": RMSNorm,
        "block.attention": Attention,
        "block.attention.rope": None,
        "block.attention.scale": 1.0,
        "block.cross_attention": CrossAttention,
        "block.cross_attention.scale": 1.0,
        "relative_bias": RelativeBias,
    },
    rows=_ROWS,
    silent=(*("is_encoder_decoder", "n_positions", "tie_word_embeddings"),),
    # Of old checkpoints, whose model never reads it.
    ignored=(r"decoder\.block\.0\.layer\.1\.EncDecAttention\.relative_attention_bias\.weight",),
    tied={
        name: "shared.weight"
        for name in ("encoder.embed_tokens.weight", "decoder.embed_tokens.weight", "lm_head.weight")
    },
    prefix="",
)

_T5 = Family(
    *("t5", "T5ForConditionalGeneration"),
    parts=(
        *_PARTS,
        Part(
            _t5_head,
            lambda here: {
                "tie_word_embeddings": here["tie_embeddings"],
                "scale_decoder_outputs": here["logit_scale"] != 1.0,
            },
        ),
    ),
    **_LIKE_T5,
)
# All mT5 have a head of their own. Newer versions of transformers write that it is tied, whether or not it is.
_MT5 = Family(
    *("mt5", "MT5ForConditionalGeneration"),
    parts=(
        *_PARTS,
        Part(
            lambda fields: {"tie_embeddings": False, "logit_scale": 1.0},
            lambda here: {"tie_word_embeddings": False},
        ),
    ),
    **_LIKE_T5,
)
FAMILIES = (_T5, _MT5)
