"""Apertus (arXiv 2509.14233): MLPs without a gate, with the activation xIELU, and norms over each head's dimensions."""

from espalier.model.hf import parts
from espalier.model.hf.family import Family, field
from espalier.model.hf.mapping import Row
from espalier.model.mlp import Mlp
from espalier.model.norm import RMSNorm

_ACTIVATION = "model.layers.{layer}.mlp.act_fn."
# The others of the shared names have no array in these models.
_ROWS = (
    *(row for row in parts.ROWS if row.native != "norm/scale"),
    *parts.rows_of({"norm": "attention_layernorm", "mlp_norm": "feedforward_layernorm"}, "scale"),
    *(Row(f"mlp/{name}", _ACTIVATION + name) for name in ("alpha_p", "alpha_n")),
    *(Row(f"mlp/{name}", _ACTIVATION + name, scalar=True) for name in ("beta", "eps")),
)

FAMILIES = (
    Family(
        *("apertus", "ApertusForCausalLM"),
        fixed={**parts.LLAMA_LIKE, "block.mlp": Mlp, "block.attention.qk_norm": RMSNorm},
        norms=("block.norm", "block.attention.qk_norm"),
        parts=(
            *(*parts.SIZES, parts.KV_HEADS_OR_ALL, parts.HEAD_DIM_OR_EQUAL, parts.rope()),
            *(parts.OWN_HEAD, parts.BIAS, parts.activation("hidden_act", "xielu")),
            field("rms_norm_eps", "norm.eps", default=1e-5),
        ),
        neutral={"qk_norm": True, "post_norm": False},
        rows=_ROWS,
    ),
)
