"""What a row is: shapes of batches, units, and recipes that say it twice or not at all."""

import jax
import jax.numpy as jnp
import pytest

from espalier.model import flops
from espalier.model.config import TransformerConfig
from espalier.model.transformer import Transformer
from espalier.trainers.inputs import Images, PackedTokens
from espalier.trainers.optim import optimizers, schedules
from espalier.trainers.recipe import Recipe


def recipe(**given):
    config = TransformerConfig(vocab_size=8, num_layers=1, embed_dim=8, num_heads=1, mlp_dim=8)
    return Recipe(
        model=Transformer(config=config),
        batch_size=4,
        optimizer=optimizers.sgd,
        learning_rate=schedules.constant(peak=0.1),
        **given,
    )


def test_packed_tokens_are_what_lengths_say():
    made = recipe(feature_lengths={"targets": 16})
    assert (
        made.inputs_spec == PackedTokens(16)
        and made.length == 16
        and made.inputs_spec.unit == "tokens"
    )
    assert made.inputs_spec.arrays(4)["decoder_loss_weights"].shape == (4, 16)


def test_an_image_is_a_row_of_length_one():
    made = recipe(inputs=Images(8, channels=1))
    assert made.length == 1 and made.inputs_spec.length is None
    arrays = made.inputs_spec.arrays(4)
    assert arrays["images"].shape == (4, 8, 8, 1) and arrays["labels"].dtype == jnp.int32
    assert made.inputs_spec.init_arguments()[0].shape == (1, 8, 8, 1)


def test_rows_are_said_once():
    with pytest.raises(ValueError, match="bind one of them"):
        recipe(inputs=Images(8), feature_lengths={"targets": 16})
    with pytest.raises(ValueError, match="TASK_FEATURE_LENGTHS = {} lacks 'targets'"):
        recipe()


def test_traced_flops_count_products_convolutions_and_what_loops_repeat():
    x_NHWC, kernel = jnp.ones((2, 8, 8, 3)), jnp.ones((3, 3, 3, 5))
    w, stack = jnp.ones((5, 7)), jnp.ones((4, 7, 7))

    @jax.jit
    def function(x):
        y = jax.lax.conv_general_dilated(
            x, kernel, (2, 2), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return jax.lax.scan(lambda carry, w: (carry @ w, None), y @ w, stack)[0]

    places = 2 * 4 * 4
    expected = 2 * places * (9 * 3 * 5 + 5 * 7 + 4 * 7 * 7)
    assert flops.traced_flops(function, x_NHWC) == expected
