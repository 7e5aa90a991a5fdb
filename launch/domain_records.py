"""What a mixture remembers of the embeddings that route it, so that later ones come from the same encoder."""

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data.domain_embeddings import Embeddings
from model.surgery.upcycle import UpcycleError


def vectors(domains: Embeddings, names: Sequence[str], file: str) -> np.ndarray:
    """The embeddings [E, M] of experts by their names.

    Raises:
      UpcycleError: there is none of an expert.
    """
    if missing := [name for name in names if name not in domains.names]:
        raise UpcycleError(
            f"expert {missing[0]} has no embedding in {file}, which has {', '.join(sorted(domains.names))}: add it "
            f"with python -m launch.embed_domains --extend={file} --domain {missing[0]}=SOURCE, or call the "
            "expert as its domain, NAME=DIR."
        )
    return domains.vectors(names)


def record(domains: Embeddings, vectors_EM: np.ndarray) -> dict[str, Any]:
    """What is kept with the mixture: the encoder, the mean it has subtracted, and a digest of the vectors."""
    return {
        "encoder": dict(domains.encoder),
        "mean": np.asarray(domains.mean, np.float64).tolist(),
        "digest": hashlib.blake2b(np.ascontiguousarray(vectors_EM), digest_size=16).hexdigest(),
    }


def check_same_encoder(domains: Embeddings, file: str, recorded: Mapping[str, Any]) -> None:
    """Raises UpcycleError where vectors of `file` are not comparable with those of the mixture."""
    if dict(domains.encoder) != recorded["encoder"]:
        raise UpcycleError(
            f"{file} is of the encoder {domains.encoder}, and the mixture's embeddings are of "
            f"{recorded['encoder']}: embed the new domain with python -m launch.embed_domains --extend=FILE, where "
            "FILE is the one the mixture was made with."
        )
    if not np.array_equal(np.asarray(domains.mean, np.float64), recorded["mean"]):
        raise UpcycleError(
            f"{file} subtracts another mean than the embeddings of the mixture, which would move every expert: "
            "add the domain to the file the mixture was made with (python -m launch.embed_domains --extend=FILE), "
            "which keeps its mean."
        )
