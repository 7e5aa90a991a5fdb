"""What the cache policy seam tells a policy, and that it is enough to attend as the model does.

Shapes: B batch, T length, D width, N query heads, K key/value heads, H head dim.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from espalier.model.attention import Attention
from espalier.model.config import LayerKind, TransformerConfig
from espalier.model.kernels.attention_ops import dot_product_attention
from espalier.model.kv_cache.full import FullCache
from espalier.model.transformer import Transformer
from espalier.trainers.decoding.prefill import prefill

CONFIG = TransformerConfig(
    vocab_size=11,
    num_layers=4,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=16,
    layer_pattern=("sliding", "full_nope"),
    sliding_window=3,
    scan_layers=False,
)


class Recording(FullCache):
    """Keeps everything, and what it was told."""

    def __init__(self):
        self.layers, self.forms, self.out_BTNH = [], [], None

    def init(self, *, layer, kind, **sizes):
        self.layers.append((layer, kind))
        return super().init(layer=layer, kind=kind, **sizes)

    def append(self, state, *, q_BTNH, k_BTKH, v_BTKH, positions_BT, form):
        self.forms.append(form)
        self.out_BTNH = dot_product_attention(
            q_BTNH,
            k_BTKH,
            v_BTKH,
            q_positions_BT=positions_BT,
            kv_positions_BS=positions_BT,
            **form.arguments(),
        )
        return super().append(
            state,
            q_BTNH=q_BTNH,
            k_BTKH=k_BTKH,
            v_BTKH=v_BTKH,
            positions_BT=positions_BT,
            form=form,
        )


def test_a_policy_knows_the_layer_it_serves():
    model, policy = Transformer(config=CONFIG), Recording()
    ids, lengths = jnp.zeros((1, 5), jnp.int32), jnp.array([5])

    def run(key):
        params = nn.meta.unbox(model.init(key, ids))["params"]
        return prefill(model, params, policy, ids, lengths, room=1)

    jax.eval_shape(run, jax.random.key(0))
    assert policy.layers == [(i, CONFIG.layer_kind(i)) for i in range(4)]
    assert [form.window for form in policy.forms] == [3, None, 3, None]
    assert {(form.scale, form.softcap) for form in policy.forms} == {(0.5, None)}


def test_a_policy_can_attend_as_the_model_does():
    kind = LayerKind(window=3)
    model, policy = Attention(config=CONFIG, kind=kind, scale=0.9, softcap=1.5), Recording()
    x_BTD = 3 * jax.random.normal(jax.random.key(1), (2, 7, 16))
    positions_BT = jnp.where(jnp.arange(7)[None] < jnp.array([[7], [4]]), jnp.arange(7)[None], -1)
    variables = nn.meta.unbox(model.init(jax.random.key(0), x_BTD, positions_BT=positions_BT))
    cache = policy.init(
        batch=2,
        length=7,
        num_heads=4,
        num_kv_heads=2,
        head_dim=4,
        dtype="float32",
        layer=0,
        num_layers=4,
        kind=kind,
    )
    want_BTD, _ = model.apply(
        variables, x_BTD, positions_BT=positions_BT, cache=cache, policy=policy
    )
    got_BTD = policy.out_BTNH.reshape(2, 7, 16) @ variables["params"]["out"]["kernel"]
    np.testing.assert_allclose(got_BTD, want_BTD, atol=1e-5)
    assert np.abs(want_BTD).max() > 0.1
