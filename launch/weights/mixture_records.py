"""What a mixture remembers of how it was made, so that later experts are made alike and embedded by one encoder."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data.nexus import domain_embeddings
from data.nexus.domain_embeddings import Embeddings
from model.transforms.upcycle import UpcycleError

# Fields of experts.Mixture, by the names of flags of launch.upcycle too.
KEPT = ("expert_scale", "drop_ratio", "drop_seed", "router_std", "logit_std")

_REMEDY = (
    f"add the new domain to the file that the mixture was made with, {domain_embeddings.COMMAND} --extend=FILE "
    "--domain NAME=SOURCE, which keeps its encoder, its mean and its vectors."
)


def record(domains: Embeddings, vectors_EM: np.ndarray) -> dict[str, Any]:
    """What is kept with the mixture: the encoder, the mean it has subtracted, and a digest of the vectors."""
    return {
        "encoder": dict(domains.encoder),
        "mean": domains.mean_M.tolist(),
        "digest": digest(vectors_EM),
    }


def digest(vectors_EM: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(vectors_EM), digest_size=16).hexdigest()


def check_same_encoder(domains: Embeddings, recorded: Mapping[str, Any]) -> None:
    """Raises UpcycleError where vectors are not comparable with those of the mixture."""
    if not domain_embeddings.same_encoder(domains.encoder, recorded["encoder"]):
        raise UpcycleError(
            f"{domains.path} was made by the encoder {domain_embeddings.described(domains.encoder)}, and the mixture's "
            f"embeddings by {domain_embeddings.described(recorded['encoder'])}: {_REMEDY}"
        )
    if domains.mean_M.tolist() != recorded["mean"]:
        raise UpcycleError(
            f"{domains.path} takes another mean from its vectors than the embeddings of the mixture, which would "
            f"move every expert: {_REMEDY}"
        )


def check_same_vectors(domains: Embeddings, names: Sequence[str], vectors_EM: np.ndarray) -> None:
    """Raises UpcycleError where the file has another vector of an expert than the mixture [E, M]."""
    for name, vector_M in zip(names, vectors_EM, strict=True):
        if name in domains.names and not np.array_equal(domains.vectors([name])[0], vector_M):
            raise UpcycleError(
                f"{domains.path} has another vector of {name} than the mixture, whose router has learned from its "
                f"own: {_REMEDY}"
            )
