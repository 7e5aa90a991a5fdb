"""GPT-2: learned positions, LayerNorm and projections with biases, query, key and value in one tensor."""

from espalier.model.attention import Attention
from espalier.model.embed import Positions
from espalier.model.hf import parts
from espalier.model.hf.config_fields import activation_field
from espalier.model.hf.family import Family, Part, field
from espalier.model.hf.mapping import Row
from espalier.model.mlp import Mlp
from espalier.model.norm import LayerNorm

_LAYER = "transformer.h.{layer}."
_PROJECTIONS = {
    "attention/out": "attn.c_proj",
    "mlp/up": "mlp.c_fc",
    "mlp/down": "mlp.c_proj",
}
_ROWS = (
    Row("token_embed/embedding", "transformer.wte.weight"),
    Row("positions/embedding", "transformer.wpe.weight"),
    Row("lm_head/embedding", "lm_head.weight"),
    *parts.rows_of({"final_norm": "ln_f"}, "scale", "bias", layer="transformer."),
    *parts.rows_of({"norm": "ln_1", "mlp_norm": "ln_2"}, "scale", "bias", layer=_LAYER),
    # Projections are stored as [in, out].
    *parts.rows_of(_PROJECTIONS, "kernel", "bias", layer=_LAYER, transpose=False),
    *(
        Row(f"attention/{name}/{leaf}", f"{_LAYER}attn.c_attn.{theirs}", joined=i)
        for i, name in enumerate(("query", "key", "value"))
        for leaf, theirs in (("kernel", "weight"), ("bias", "bias"))
    ),
)

FAMILIES = (
    Family(
        *("gpt2", "GPT2LMHeadModel"),
        fixed={
            **{"norm": LayerNorm, "norm.use_bias": True, "position_embed": Positions},
            **{"block.attention": Attention, "block.attention.rope": None},
            **{"block.attention.qkv_bias": True, "block.attention.out_bias": True},
            **{"block.mlp": Mlp, "block.mlp.use_bias": True},
        },
        parts=(
            field("vocab_size", "config.vocab_size"),
            field("n_positions", "position_embed.num_positions", absent=1),
            field("n_embd", "config.embed_dim"),
            field("n_layer", "config.num_layers"),
            field("n_head", "config.num_heads"),
            Part(
                lambda fields: {
                    "config.mlp_dim": fields.get("n_inner", 4 * fields.required("n_embd"))
                },
                lambda here: {"n_inner": here["config.mlp_dim"]},
            ),
            parts.activation(
                *("activation_function", "gelu_new"),
                # The function has two names; GPT-2 uses this one.
                encode=lambda name: "gelu_new" if name == "gelu" else activation_field(name),
            ),
            field("layer_norm_epsilon", "norm.eps", default=1e-5),
            field(
                *("scale_attn_weights", "block.attention.scale"),
                default=True,
                decode=lambda scaled: None if scaled else 1.0,
                encode=lambda scale: scale != 1.0,
            ),
            parts.TIED_HEAD,
        ),
        neutral={"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
        silent=(
            *("n_ctx", "reorder_and_upcast_attn", "summary_activation", "summary_first_dropout"),
            *("summary_proj_to_labels", "summary_type", "summary_use_proj"),
            *("n_special", "predict_special_tokens"),
        ),
        rows=_ROWS,
        # Causal masks, which old checkpoints store as tensors.
        ignored=(r"(transformer\.)?h\.\d+\.attn\.(bias|masked_bias)",),
        tied={"lm_head.weight": "transformer.wte.weight"},
        prefix="transformer.",
    ),
)
