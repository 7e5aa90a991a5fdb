"""The embeddings of a batch's sentences, by which routers with `router_input = 'sentence'` choose.

They are frozen vectors that another model computed for each row. Every adapted projection of the model reads them, so
they are handed over by a context and not through the calls of all layers.

Shapes: B rows, S width of an embedding.
"""

import contextlib
import contextvars
from collections.abc import Iterator

import jax

_EMBEDDINGS_BS: contextvars.ContextVar[jax.Array | None] = contextvars.ContextVar(
    "sentence_embeddings", default=None
)


@contextlib.contextmanager
def sentence_embeddings(embeddings_BS: jax.Array | None) -> Iterator[None]:
    """Context manager: models that are applied inside read these embeddings; None for none."""
    token = _EMBEDDINGS_BS.set(embeddings_BS)
    try:
        yield
    finally:
        _EMBEDDINGS_BS.reset(token)


def current() -> jax.Array | None:
    """Returns the embeddings of the innermost context."""
    return _EMBEDDINGS_BS.get()
