"""Heads of one number on a language model: what they leave as it is, and how they are split."""

import jax
import jax.numpy as jnp
import numpy as np

from espalier.model import axes
from espalier.model.config import TransformerConfig
from espalier.model.heads.actor_critic import ActorCritic
from espalier.model.heads.reward_model import RewardModel
from espalier.model.protocol import inference_model, inference_params
from espalier.model.t5.encoder_decoder import EncoderDecoder
from espalier.model.transformer import Transformer
from espalier.trainers.inputs import InputsAndTargets, PackedTokens

CONFIG = TransformerConfig(
    vocab_size=16, num_layers=1, scan_layers=False, embed_dim=8, num_heads=2, mlp_dim=8
)
TOKENS = jnp.array([[3, 5, 7, 2]])


def initialised(model):
    boxed = jax.jit(lambda: model.init(jax.random.key(0), TOKENS)["params"])()
    return boxed, jax.tree.map(axes.unboxed, boxed, is_leaf=lambda x: hasattr(x, "unbox"))


def test_an_actor_is_its_language_model_and_its_critic_expects_nothing_yet():
    lm = Transformer(config=CONFIG, tie_embeddings=False)
    model = ActorCritic(backbone=lm)
    _, params = initialised(model)
    assert "lm_head" in params["backbone"]
    logits, values = model.apply({"params": params}, TOKENS)
    np.testing.assert_array_equal(values, np.zeros((1, 4)))
    policy, own = inference_model(model), inference_params(model, params)
    np.testing.assert_array_equal(policy.apply({"params": own}, TOKENS), logits)
    assert inference_model(lm) is lm and inference_params(lm, own) is own
    assert model.max_length is lm.max_length is None
    assert model.layer_settings() == lm.layer_settings()
    row = PackedTokens(5).arrays(1)
    assert model.forward_flops(row) == lm.forward_flops(row) + 2 * 8


def test_a_reward_is_a_linear_function_of_the_last_state_and_has_no_vocabulary():
    lm = Transformer(config=CONFIG, tie_embeddings=False)
    model = RewardModel(backbone=lm)
    boxed, params = initialised(model)
    assert "lm_head" not in params["backbone"]
    assert boxed["reward_head"]["kernel"].names == (axes.EMBED, axes.UNMODELED)
    kernel = jax.random.normal(jax.random.key(1), (8, 1))
    rewards = model.apply({"params": {**params, "reward_head": {"kernel": kernel}}}, TOKENS)
    hidden = lm.apply({"params": params["backbone"]}, TOKENS, method="hidden").hidden_BTD
    np.testing.assert_allclose(rewards, (hidden @ kernel)[..., 0], rtol=1e-6)
    row = PackedTokens(5).arrays(1)
    logits = 2 * 16 * 8
    assert model.forward_flops(row, {"params": params}) == lm.forward_flops(row) - logits + 2 * 8
    assert inference_model(model) is model and (model.output, lm.output) == ("rewards", "logits")


def test_the_heads_of_an_encoder_decoder_read_its_targets():
    lm = EncoderDecoder(config=CONFIG)
    row, parts = InputsAndTargets(inputs=6, targets=4).arrays(1), 4 / 10
    head = 2 * 8 * parts
    plain = lm.forward_flops(row)
    assert ActorCritic(backbone=lm).forward_flops(row) == plain + head
    without = lm.hidden_flops(row)
    np.testing.assert_allclose(plain - without, 2 * 16 * 8 * parts)
    reward = RewardModel(backbone=lm)
    assert reward.forward_flops(row) == without + head
    assert reward.row is lm.row and reward.row.encodes


def test_the_context_of_rows_is_the_language_models():
    class Known(Transformer):
        def row_context(self, variables, batch):
            return variables["params"]["table"] * batch

    made = RewardModel(backbone=Known(config=CONFIG))
    assert made.row_context({"params": {"backbone": {"table": 3}, "reward_head": {}}}, 2) == 6
