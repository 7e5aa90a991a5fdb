"""The rows of a batch: their kinds, and what layers read of a whole row besides its tokens.

A layer may choose by its row, such as a router by an embedding of the sentence. What it reads is the row's *context*, a tree of
arrays with one entry for each row, which only that layer understands. A model makes it (`Model.row_context` of
model/protocol.py). Whoever applies the model enters it with `given`, and carries it along with the rows where tokens are
generated; layers read it with `current`. So it does not pass through the calls of all layers.

Shapes: B rows, T length.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Prompts(NamedTuple):
    """Prompts in the form that a model reads before it continues them.

    Attributes:
      columns: the columns of a batch for the encoder; empty for a decoder.
      tokens_BT: tokens that the decoder reads.
      lengths_B: number of these tokens in each row.
    """

    columns: dict[str, jax.Array]
    tokens_BT: jax.Array
    lengths_B: jax.Array


@dataclasses.dataclass(frozen=True)
class RowKind:
    """The kind of data in a row.

    Attributes:
      features: the features of TASK_FEATURE_LENGTHS in a row; none for images.
    """

    features: tuple[str, ...]

    @property
    def encodes(self) -> bool:
        """Whether an encoder reads a part of the row."""
        return "inputs" in self.features

    def prompts(
        self, tokens_BT: jax.Array, lengths_B: jax.Array, *, start: int | jax.Array
    ) -> Prompts:
        """Returns prompts, padded on the right, where the model reads them.

        Args:
          start: the token that the targets of an encoder-decoder follow, or those of all rows, [B, 1].
        """
        if not self.encodes:
            return Prompts({}, tokens_BT, lengths_B)
        real_BT = jnp.arange(tokens_BT.shape[1], dtype=jnp.int32)[None] < lengths_B[:, None]
        columns = {
            "encoder_input_tokens": tokens_BT,
            "encoder_segment_ids": real_BT.astype(jnp.int32),
        }
        first_B1 = jnp.full_like(tokens_BT[:, :1], start)
        return Prompts(columns, first_B1, jnp.ones_like(lengths_B))

    def begun(self, tokens_BT: jax.Array, lengths_B: jax.Array) -> Prompts:
        """Returns `prompts` of rows whose first token is the start token, before a decoder's text or an encoder-decoder's targets."""
        if not self.encodes:
            return Prompts({}, tokens_BT, lengths_B)
        return self.prompts(tokens_BT[:, 1:], lengths_B - 1, start=tokens_BT[:, :1])

    def placed(self, before: Sequence[int], prompt: Sequence[int]) -> dict[str, Sequence[int]]:
        """Returns the tokens that precede a text's targets, as 'context' of the decoder and 'encoder_inputs'.

        Args:
          before: tokens before every text, such as a BOS.
        """
        if self.encodes:
            return {"context": before, "encoder_inputs": prompt}
        return {"context": [*before, *prompt]}


TOKENS = RowKind(("targets",))
INPUTS_AND_TARGETS = RowKind(("inputs", "targets"))
IMAGES = RowKind(())


def encoder_arguments(batch: Mapping[str, jax.Array]) -> dict[str, Any]:
    """Returns the keyword arguments for a batch's inputs of an encoder-decoder's `hidden`; {} for a batch without inputs."""
    if "encoder_input_tokens" not in batch:
        return {}
    return {
        "encoder_tokens_BS": batch["encoder_input_tokens"],
        "encoder_positions_BS": batch.get("encoder_positions"),
        "encoder_segments_BS": batch["encoder_segment_ids"],
    }


_CURRENT: contextvars.ContextVar[Any] = contextvars.ContextVar("row_context", default=None)


@contextlib.contextmanager
def given(context: Any) -> Iterator[None]:
    """Context manager: models that are applied inside read this context of their rows; None for none."""
    token = _CURRENT.set(context)
    try:
        yield
    finally:
        _CURRENT.reset(token)


def current() -> Any:
    """Returns the innermost context of rows; None without one."""
    return _CURRENT.get()
