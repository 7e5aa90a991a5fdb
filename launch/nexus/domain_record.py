"""A mixture's record of the embeddings that place its experts, and the check of a file of embeddings against it."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.data.nexus import domain_embeddings
from espalier.data.nexus.domain_embeddings import Embeddings
from espalier.model.transforms.base import TransformError

_REMEDY = (
    f"add the new domain to the file of the mixture with {domain_embeddings.COMMAND} --extend=FILE "
    "--domain NAME=SOURCE, which keeps its encoder, its mean and its vectors."
)


def domains_record(domains: Embeddings, vectors_EM: np.ndarray) -> dict[str, Any]:
    """Returns a mixture's record of its domains: encoder, subtracted mean, and a digest of the vectors."""
    return {
        "encoder": dict(domains.encoder),
        "mean": domains.mean_M.tolist(),
        "digest": digest(vectors_EM),
    }


def digest(vectors_EM: np.ndarray) -> str:
    """Returns the hash of the vectors' bytes."""
    return hashlib.blake2b(np.ascontiguousarray(vectors_EM), digest_size=16).hexdigest()


def check_same_encoder(domains: Embeddings, recorded: Mapping[str, Any]) -> None:
    """Raises TransformError if the file's encoder or subtracted mean differs from the mixture's."""
    if not domain_embeddings.same_encoder(domains.encoder, recorded["encoder"]):
        raise TransformError(
            f"{domains.path} was made with the encoder {domain_embeddings.described(domains.encoder)}, but the "
            f"mixture's embeddings with {domain_embeddings.described(recorded['encoder'])}: {_REMEDY}"
        )
    if domains.mean_M.tolist() != recorded["mean"]:
        raise TransformError(
            f"{domains.path} has another mean, which is subtracted from its vectors, than the mixture's embeddings, so "
            f"all experts would move: {_REMEDY}"
        )


def check_same_vectors(domains: Embeddings, names: Sequence[str], vectors_EM: np.ndarray) -> None:
    """Raises TransformError if an expert's vector in the file differs from the mixture's [E, M]."""
    for name, vector_M in zip(names, vectors_EM, strict=True):
        if name in domains.names and not np.array_equal(domains.vectors([name])[0], vector_M):
            raise TransformError(
                f"{domains.path} has another vector of {name} than the one that the mixture's router was trained "
                f"with: {_REMEDY}"
            )
