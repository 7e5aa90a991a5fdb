"""The embeddings of a batch's sentences, by which routers with `router_input = 'sentence'` choose.

Every adapted projection of the model reads them, so they are a context of the rows (model/rows.py). They are frozen: vectors
that another model computed, one for each row or for each example that is packed into a row, or of an encoder-decoder the mean of
the embeddings of an example's inputs in its own frozen table, if it has no others.

Shapes: B rows, K examples of a row, N tokens that an encoder reads, T tokens of targets, D width, S width of an embedding.
"""

import contextlib
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from espalier.model import rows
from espalier.model.adapters.adapter import AdapterError

COLUMN = "sentence_embeddings"  # of a batch
_OF_INPUTS = re.compile(r"(.*/)?encoder/.*|.*/cross_attention/(key|value)")


class OfTokens(NamedTuple):
    """The embedding of the sentence of each token.

    Attributes:
      inputs: of the tokens that the encoder reads [B, N, S]; of a decoder, of its own.
      targets: of the tokens that the decoder reads [B, T, S].
    """

    inputs: jax.Array
    targets: jax.Array

    def at(self, path: str) -> jax.Array:
        """Returns the embeddings of the tokens that the projection at a path reads."""
        return self.inputs if _OF_INPUTS.fullmatch(path) else self.targets


def sentence_embeddings(
    embeddings: jax.Array | OfTokens | None,
) -> contextlib.AbstractContextManager[None]:
    """Context manager: models that are applied inside it read these embeddings, one per row [B, S] or per token; None for none."""
    return rows.given({COLUMN: embeddings})


def current() -> jax.Array | OfTokens | None:
    """Returns the embeddings of the innermost context."""
    return (rows.current() or {}).get(COLUMN)


def of_batch(
    model: Any, variables: Mapping[str, Any], batch: Mapping[str, Any], *, own: bool = True
) -> jax.Array | OfTokens | None:
    """Returns the embeddings of a batch's sentences; None without the column COLUMN for a decoder, or unless `own`.

    They are the batch's column COLUMN: [B, S], one for each row, or [B, K, S], of segments 1, 2, ... of each row. Without
    one, if a router reads its `own` model's, those of an encoder-decoder are means of the embeddings of an example's inputs,
    divided by their root mean square. Where there are no segments of targets yet, each row is one example, and has one
    embedding, [B, S].
    """
    if COLUMN in batch:
        given = batch[COLUMN]
        if given.ndim == 2:
            return given
        if own and "encoder_segment_ids" in batch:
            raise AdapterError(
                f"The data have embeddings of sentences, of width {given.shape[-1]}, and the router reads the model's own: set "
                "sentence_dim of the adapter to this width, or leave the embeddings out."
            )
        targets = _of_segments(given, batch["decoder_segment_ids"])
        encoder = batch.get("encoder_segment_ids")
        return OfTokens(targets if encoder is None else _of_segments(given, encoder), targets)
    if not own or "encoder_input_tokens" not in batch:
        return None
    x_BND = _embedded(model, variables, batch["encoder_input_tokens"])
    segments_BN = batch["encoder_segment_ids"]
    if "decoder_segment_ids" not in batch:
        return _means(x_BND, segments_BN, jnp.ones_like(segments_BN[:, :1]))[:, 0]
    return OfTokens(
        _means(x_BND, segments_BN, segments_BN),
        _means(x_BND, segments_BN, batch["decoder_segment_ids"]),
    )


def _of_segments(embeddings_BKS: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Returns the embedding of each token's segment, [B, T, S]; 0 for padding."""
    place_BT1 = jnp.maximum(segments_BT - 1, 0)[..., None]
    of_tokens_BTS = jnp.take_along_axis(embeddings_BKS, place_BT1, axis=1)
    return jnp.where(segments_BT[..., None] > 0, of_tokens_BTS, 0.0)


def _embedded(model: Any, variables: Mapping[str, Any], tokens_BN: jax.Array) -> jax.Array:
    x_BND = model.apply(variables, tokens_BN, method=lambda model, ids: model.token_embed(ids))
    return jax.lax.stop_gradient(x_BND).astype(jnp.float32)


def _means(x_BND: jax.Array, segments_BN: jax.Array, segments_BT: jax.Array) -> jax.Array:
    """Returns the mean over the tokens of each token's segment, divided by its root mean square."""
    same_BTN = (segments_BT[:, :, None] == segments_BN[:, None, :]).astype(jnp.float32)
    counts_BT1 = jnp.maximum(same_BTN.sum(-1, keepdims=True), 1)
    means_BTD = jnp.einsum("btn,bnd->btd", same_BTN, x_BND) / counts_BT1
    squares_BT1 = jnp.square(means_BTD).mean(-1, keepdims=True)
    return means_BTD * jax.lax.rsqrt(squares_BT1 + 1e-6)
