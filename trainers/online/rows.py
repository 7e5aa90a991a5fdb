"""From prompts and what follows them to the arrays that models are trained on. Shapes: B rows, L length."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

Arrays = dict[str, np.ndarray]
# Prompt, with what is read before it, and completion, with what ended it.
Text = tuple[Sequence[int], Sequence[int]]


def packed(rows: Sequence[Sequence[Text]], source_B: np.ndarray, *, length: int) -> Arrays:
    """The columns of `trainers.inputs.PackedTokens`: texts of a row are segments 1, 2, ...

    The first token of a prompt is read and not predicted, the last of a completion predicted and not read; weights are
    1 at the tokens of completions.
    """
    names = ("input_tokens", "target_tokens", "segment_ids", "positions")
    found = {f"decoder_{name}": np.zeros((len(rows), length), np.int32) for name in names}
    found["decoder_loss_weights"] = np.zeros((len(rows), length), np.float32)
    for b, row in enumerate(rows):
        at = 0
        for segment, (prompt, completion) in enumerate(row, 1):
            text = [*prompt, *completion]
            size = len(text) - 1
            here = slice(at, at + size)
            found["decoder_input_tokens"][b, here] = text[:-1]
            found["decoder_target_tokens"][b, here] = text[1:]
            found["decoder_segment_ids"][b, here] = segment
            found["decoder_positions"][b, here] = np.arange(size)
            found["decoder_loss_weights"][b, at + len(prompt) - 1 : at + size] = 1
            at += size
    return {**found, "source_ids": np.asarray(source_B, np.int32)}


def shapes(rows: int, length: int, **columns: bool) -> dict[str, jax.ShapeDtypeStruct]:
    """float32 columns by name, with a value for each token (True) or for each row (False)."""
    return {
        name: jax.ShapeDtypeStruct((rows, length) if per_token else (rows,), jnp.float32)
        for name, per_token in columns.items()
    }
