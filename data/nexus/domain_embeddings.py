"""Embeddings of data domains, which a router projects to the embeddings of its experts (Nexus, arXiv 2408.15901, 3.2).

`espalier prepare embed_domains` writes the embeddings of all domains of a mixture to one JSON file:

  {"format": 1, "encoder": {"kind": "ngrams", ...}, "mean": [M], "length": 1.0,
   "domains": {NAME: {"vector": [M], "raw": [M], "documents": n, "source": "..."}}}

The encoder computes a domain's raw vector from its documents. Raw vectors of different domains are similar, so by
default a domain's vector is its raw vector minus the mean, scaled to length 1. The mean is over the domains in the
first version of the file. Mean, length and encoder do not change when domains are added, because routers have
learned from the old vectors.

A new projection of short vectors is nearly even: opposite vectors come to lie together, so that centring, which
makes many cosines negative, mixes up the order of similarities. Uncentred vectors keep it, and with a length of
3 sqrt(M) the more similar pairs of centred ones do.

Shapes: N domains, M width of an embedding.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.common import spelling
from espalier.common.storage import output_files

FORMAT = 1
COMMAND = "espalier prepare embed_domains"
PLACES = ("checkpoint", "sentence_model")  # paths of an encoder; its digest identifies it
_NOTHING = 1e-6  # lengths below this share of the raw vector's length are rounding errors


class EmbeddingsError(ValueError):
    """Raised for domains that cannot be embedded, and for files of embeddings that do not fit or cannot be read."""


@dataclasses.dataclass(frozen=True)
class Raw:
    """A domain's raw vector [M], the number of its documents, and their source."""

    raw_M: np.ndarray
    documents: int
    source: str | None


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """The content of a file of embeddings."""

    path: str  # the file
    encoder: Mapping[str, Any]  # kind and settings of the encoder of the raw vectors
    mean_M: np.ndarray  # mean that is subtracted from raw vectors
    domains: Mapping[str, Raw]  # name -> raw vector, in the order in which domains were added
    vectors_NM: np.ndarray  # vectors of this length, in the same order
    length: float = 1.0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.domains)

    @property
    def dim(self) -> int:
        return len(self.mean_M)

    def vectors(self, names: Sequence[str] | None = None) -> np.ndarray:
        """Returns vectors [N, M], float32, of the domains `names` in this order; None for all domains.

        Raises:
          EmbeddingsError: the file has no domain of a name.
        """
        names = self.names if names is None else names
        for name in names:
            if name not in self.domains:
                raise EmbeddingsError(
                    f"{self.path}: no domain {name!r}; {spelling.nearest(name, self.names)}. Add it "
                    f"with {COMMAND} --extend={self.path} --domain {name}=FILE"
                )
        rows = [self.names.index(name) for name in names]
        return self.vectors_NM[rows].astype(np.float32)


def create(
    path: str | os.PathLike,
    encoder: Mapping[str, Any],
    raws: Mapping[str, Raw],
    *,
    centred: bool = True,
    length: float = 1.0,
) -> Embeddings:
    """Returns the embeddings of the first domains, without writing them.

    Args:
      path: the file to write later.
      encoder: kind and settings of the encoder of the raw vectors.
      raws: domain -> raw vector.
      centred: subtract the mean of these raw vectors from all vectors; False uses the mean 0.
      length: of all vectors.

    Raises:
      EmbeddingsError: there is no domain, a raw vector equals the mean, or the length is not positive.
    """
    if not raws:
        raise EmbeddingsError("there is no domain: add --domain NAME=SOURCE, once per domain")
    if not 0 < length < np.inf:
        raise EmbeddingsError(f"--length={length:g} must be positive")
    mean_M = np.mean([raw.raw_M for raw in raws.values()], axis=0, dtype=np.float64)
    mean_M = mean_M if centred else np.zeros_like(mean_M)
    vectors_NM = np.stack([_placed(name, raw.raw_M, mean_M, length) for name, raw in raws.items()])
    return Embeddings(os.fspath(path), encoder, mean_M, dict(raws), vectors_NM, length)


def extend(old: Embeddings, raws: Mapping[str, Raw]) -> Embeddings:
    """Returns the embeddings with more domains, the old mean and the old length, without writing them.

    Raises:
      EmbeddingsError: there is no domain, a name is taken, or a raw vector has another width or equals the mean.
    """
    check_new(old, raws)
    for name, raw in raws.items():
        if raw.raw_M.shape != old.mean_M.shape:
            raise EmbeddingsError(
                f"the vector of domain {name!r} has {raw.raw_M.size} numbers, and those in {old.path} {old.dim}"
            )
    vectors = [_placed(name, raw.raw_M, old.mean_M, old.length) for name, raw in raws.items()]
    return dataclasses.replace(
        old,
        domains={**old.domains, **raws},
        vectors_NM=np.concatenate([old.vectors_NM, np.stack(vectors)]),
    )


def check_new(old: Embeddings, names: Mapping[str, Any] | Sequence[str]) -> None:
    """Raises EmbeddingsError if `names` is empty or `old` already has one of them."""
    if not names:
        raise EmbeddingsError(
            f"there is no domain to add to {old.path}: add --domain NAME=SOURCE, once per domain"
        )
    if both := [name for name in names if name in old.domains]:
        raise EmbeddingsError(
            f"{old.path} already has the domain {both[0]!r}, and routers may have learned from it: "
            "choose another name, or write a new file"
        )


def check_encoder(old: Embeddings, encoder: Mapping[str, Any]) -> None:
    """Raises EmbeddingsError if `encoder` is not the encoder of the old vectors."""
    if not same_encoder(encoder, old.encoder):
        raise EmbeddingsError(
            f"{old.path} was made with the encoder {described(old.encoder)}, and this encoder is "
            f"{described(encoder)}: their vectors cannot be compared. Use the same checkpoint without flags "
            "of the encoder, or embed all domains again without --extend"
        )


def same_encoder(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Returns whether vectors of two encoders are comparable; models are compared by digest, not by path."""
    paths = {*PLACES, "params"}
    one, other = ({key: e[key] for key in e.keys() - paths} for e in (one, other))
    return one == other


def described(encoder: Mapping[str, Any]) -> str:
    """Returns an encoder's kind and settings as one line of text."""
    settings = (f"{key} {value}" for key, value in encoder.items() if key != "kind")
    return f"{encoder['kind']} ({', '.join(settings)})"


def write(embeddings: Embeddings) -> None:
    """Writes the file atomically."""
    domains = {
        name: {
            "vector": vector_M.tolist(),
            "raw": np.asarray(raw.raw_M, np.float64).tolist(),
            "documents": raw.documents,
            "source": raw.source,
        }
        for (name, raw), vector_M in zip(
            embeddings.domains.items(), embeddings.vectors_NM, strict=True
        )
    }
    content = {
        "format": FORMAT,
        "encoder": dict(embeddings.encoder),
        "mean": embeddings.mean_M.tolist(),
        "length": embeddings.length,
        "domains": domains,
    }
    output_files.write(embeddings.path, json.dumps(content, indent=1, ensure_ascii=False))


def read(path: str | os.PathLike) -> Embeddings:
    """Returns the embeddings in a file.

    Raises:
      EmbeddingsError: the file does not exist or does not hold embeddings.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise EmbeddingsError(
            f"{path}: the file of embeddings does not exist; make it with {COMMAND} --output={path} "
            "--domain NAME=FILE --domain ..."
        )
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise EmbeddingsError(
                f"{path}: the format is {content['format']!r}, and this program reads {FORMAT}: make the "
                f"file again with {COMMAND}"
            )
        mean_M = np.array(content["mean"], np.float64)
        length = float(content.get("length", 1.0))  # older files have none
        domains = {
            name: Raw(np.array(entry["raw"], np.float64), entry["documents"], entry["source"])
            for name, entry in content["domains"].items()
        }
        vectors_NM = np.array([x["vector"] for x in content["domains"].values()], np.float64)
        encoder = content["encoder"]
        encoder["kind"]
    except EmbeddingsError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise _damaged(path, f"{type(error).__name__}: {error}") from None
    widths = {mean_M.shape, *(raw.raw_M.shape for raw in domains.values()), vectors_NM.shape[1:]}
    if len(widths) != 1 or mean_M.ndim != 1:
        raise _damaged(path, "its vectors have different widths")
    if not np.allclose(np.linalg.norm(vectors_NM, axis=1), length, rtol=1e-5):
        raise _damaged(path, f"its vectors do not have length {length:g}")
    return Embeddings(path, encoder, mean_M, domains, vectors_NM, length)


def _damaged(path: str, problem: str) -> EmbeddingsError:
    return EmbeddingsError(
        f"{path} is damaged or not a file of embeddings ({problem}); make it with {COMMAND}"
    )


def _placed(name: str, raw_M: np.ndarray, mean_M: np.ndarray, length: float) -> np.ndarray:
    """Returns the raw vector minus the mean, scaled to a length."""
    raw_M = np.asarray(raw_M, np.float64)
    before = np.linalg.norm(raw_M - mean_M)
    if not before > _NOTHING * np.linalg.norm(raw_M):  # NaN too
        raise EmbeddingsError(
            f"the vector of domain {name!r} equals the mean of the domains, which a router projects to 0: use at "
            "least two different domains"
        )
    return (raw_M - mean_M) / before * length
