"""How well a model completes the queries: negative log-likelihoods, and whether greedy decoding would give the completion.

Shapes: Q queries, T tokens.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from espalier.launch.load.loaded_run import LoadedRun
from espalier.launch.papers.influence.small_corpus import Document, Query
from espalier.trainers.influence import conjugate, documents
from espalier.trainers.scoring.scoring import Row


def document_row(loaded: LoadedRun, document: Document) -> Row:
    """Returns a document as the model is trained on it, with EOS."""
    encoded = loaded.vocabulary.encode(document.text)
    return Row(context=loaded.context([]), targets=[*encoded, loaded.vocabulary.eos_id])


def query_row(loaded: LoadedRun, query: Query) -> Row:
    """Returns a query, whose targets are its completion and EOS."""
    encode = loaded.vocabulary.encode
    return Row(
        context=loaded.context(encode(query.prompt)),
        targets=[*encode(query.completion), loaded.vocabulary.eos_id],
    )


def batch_of(rows: Sequence[Row]) -> dict[str, np.ndarray]:
    """Returns a batch that has all rows, as columns [rows, length]."""
    length = documents.bucket_length(max(row.inputs for row in rows))
    return documents.columns(rows, range(len(rows)), len(rows), length)


def measure(model: Any) -> Callable[[Any, Any], tuple[Any, Any]]:
    """Returns the compiled function (params, batch) -> (nats [Q], whether all tokens are the most probable ones [Q])."""
    import jax
    import jax.numpy as jnp

    def measured(params: Any, batch: Any) -> tuple[Any, Any]:
        log_probs_QTV = jax.nn.log_softmax(conjugate.logits_of(model, params, batch))
        targets_QT, weights_QT = batch["decoder_target_tokens"], batch["decoder_loss_weights"]
        picked_QT = jnp.take_along_axis(log_probs_QTV, targets_QT[..., None], axis=-1)[..., 0]
        right_QT = (log_probs_QTV.argmax(-1) == targets_QT) | (weights_QT == 0)
        return -(picked_QT * weights_QT).sum(-1), right_QT.all(-1)

    return jax.jit(measured)
