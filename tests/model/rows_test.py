"""Where each kind of row has a prompt, and the context of rows."""

import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model import rows


def test_a_decoder_reads_the_prompt():
    tokens_BT, lengths_B = jnp.array([[5, 6, 7], [8, 0, 0]]), jnp.array([3, 1])
    prompts = rows.TOKENS.prompts(tokens_BT, lengths_B, start=2)
    assert prompts.columns == {} and rows.encoder_arguments(prompts.columns) == {}
    assert prompts.tokens_BT is tokens_BT and prompts.lengths_B is lengths_B
    assert rows.TOKENS.placed([1], [5, 6]) == {"context": [1, 5, 6]}


def test_an_encoder_reads_the_prompt_and_the_decoder_a_start():
    tokens_BT, lengths_B = jnp.array([[5, 6, 7], [8, 0, 0]]), jnp.array([3, 1])
    prompts = rows.INPUTS_AND_TARGETS.prompts(tokens_BT, lengths_B, start=2)
    np.testing.assert_array_equal(prompts.tokens_BT, [[2], [2]])
    np.testing.assert_array_equal(prompts.lengths_B, [1, 1])
    np.testing.assert_array_equal(prompts.columns["encoder_segment_ids"], [[1, 1, 1], [1, 0, 0]])
    arguments = rows.encoder_arguments(prompts.columns)
    assert arguments["encoder_tokens_BS"] is tokens_BT
    assert arguments["encoder_positions_BS"] is None
    placed = rows.INPUTS_AND_TARGETS.placed([1], [5, 6])
    assert placed == {"context": [1], "encoder_inputs": [5, 6]}


def test_the_innermost_context_is_read():
    assert rows.current() is None
    with rows.given("outer"):
        with pytest.raises(KeyError), rows.given(None):
            assert rows.current() is None
            raise KeyError
        assert rows.current() == "outer"
    assert rows.current() is None
