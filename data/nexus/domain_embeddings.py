"""Embeddings of domains of data, from which a router places its experts (Nexus, 2408.15901, section 3.2).

One JSON file holds those of all domains of a mixture, made by `python -m launch.prepare embed_domains`:

  {"format": 1, "encoder": {"kind": "ngrams", ...}, "mean": [M],
   "domains": {NAME: {"vector": [M], "raw": [M], "documents": n, "source": "..."}}}

A raw vector is what the encoder makes of a domain's documents, and they resemble one another; a vector is the
raw one less the mean, of length 1. The mean is that of the domains with which the file began, and stays when
others are added, as does the encoder: routers have learned from the old vectors.

Shapes: N domains, M width of an embedding.
"""

import dataclasses
import json
import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from data.cache import cache_dir
from data.text.sources import names as known_names

FORMAT = 1
COMMAND = "python -m launch.prepare embed_domains"
PLACES = ("checkpoint", "sentence_model")  # where an encoder lay; its digest says what it is
_NOTHING = 1e-6  # of its raw vector's length, what is left by rounding alone


class EmbeddingsError(ValueError):
    """Domains that cannot be embedded, or a file of embeddings that is not what is asked for."""


@dataclasses.dataclass(frozen=True)
class Raw:
    """What an encoder makes of a domain: the vector [M], of how many documents, and whence they are."""

    raw_M: np.ndarray
    documents: int
    source: str | None


@dataclasses.dataclass(frozen=True)
class Embeddings:
    """What a file of embeddings holds.

    Attributes:
      path: the file.
      encoder: kind and settings of what made the raw vectors.
      mean_M: what is taken from them.
      domains: raw vectors by name, in the order in which they were added.
      vectors_NM: in the same order, of length 1.
    """

    path: str
    encoder: Mapping[str, Any]
    mean_M: np.ndarray
    domains: Mapping[str, Raw]
    vectors_NM: np.ndarray

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self.domains)

    @property
    def dim(self) -> int:
        return len(self.mean_M)

    def vectors(self, names: Sequence[str] | None = None) -> np.ndarray:
        """Vectors [N, M], float32, of domains in the order of `names`; of all where that is None.

        Raises:
          EmbeddingsError: no such domain.
        """
        names = self.names if names is None else names
        for name in names:
            if name not in self.domains:
                raise EmbeddingsError(
                    f"{self.path}: no domain {name!r}; {known_names.nearest(name, self.names)}. Add it "
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
) -> Embeddings:
    """Embeddings of the first domains, not yet written.

    Args:
      path: the file that is to be.
      encoder: kind and settings of what made the raw vectors.
      raws: by name.
      centred: take their mean from all vectors, in place of 0.

    Raises:
      EmbeddingsError: there is none, or one lies at the mean.
    """
    if not raws:
        raise EmbeddingsError(
            "no domain is given: --domain NAME=SOURCE names one, and can be repeated"
        )
    mean_M = np.mean([raw.raw_M for raw in raws.values()], axis=0, dtype=np.float64)
    mean_M = mean_M if centred else np.zeros_like(mean_M)
    vectors_NM = np.stack([_placed(name, raw.raw_M, mean_M) for name, raw in raws.items()])
    return Embeddings(os.fspath(path), encoder, mean_M, dict(raws), vectors_NM)


def extend(old: Embeddings, raws: Mapping[str, Raw]) -> Embeddings:
    """The same embeddings and those of more domains, with the old mean; not yet written.

    Raises:
      EmbeddingsError: there is none, a name is there already, or a vector is of another width or lies at the
        mean.
    """
    check_new(old, raws)
    for name, raw in raws.items():
        if raw.raw_M.shape != old.mean_M.shape:
            raise EmbeddingsError(
                f"domain {name!r} has {raw.raw_M.size} numbers, and those of {old.path} have {old.dim}"
            )
    vectors = [_placed(name, raw.raw_M, old.mean_M) for name, raw in raws.items()]
    return dataclasses.replace(
        old,
        domains={**old.domains, **raws},
        vectors_NM=np.concatenate([old.vectors_NM, np.stack(vectors)]),
    )


def check_new(old: Embeddings, names: Mapping[str, Any] | Sequence[str]) -> None:
    """Raises EmbeddingsError where there is no name, or one that is there already."""
    if not names:
        raise EmbeddingsError(
            f"no domain is given to add to {old.path}: --domain NAME=SOURCE names one"
        )
    if both := [name for name in names if name in old.domains]:
        raise EmbeddingsError(
            f"{old.path} holds the domain {both[0]!r} already, and routers may have learned from it: "
            "choose another name, or write a new file"
        )


def check_encoder(old: Embeddings, encoder: Mapping[str, Any]) -> None:
    """Raises EmbeddingsError where an encoder is not the one that made the old vectors."""
    if not same_encoder(encoder, old.encoder):
        raise EmbeddingsError(
            f"{old.path} was made by the encoder {described(old.encoder)}, and this is "
            f"{described(encoder)}: their vectors have nothing in common. Leave the flags of the encoder out "
            "and give it the same checkpoint, or embed all domains anew without --extend"
        )


def same_encoder(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether vectors of two encoders are comparable: a model is what its digest says, wherever it lay."""
    where = (*PLACES, "params")
    one, other = ({key: x for key, x in e.items() if key not in where} for e in (one, other))
    return one == other


def described(encoder: Mapping[str, Any]) -> str:
    """An encoder in a line."""
    settings = (f"{key} {value}" for key, value in encoder.items() if key != "kind")
    return f"{encoder['kind']} ({', '.join(settings)})"


def write(embeddings: Embeddings) -> None:
    """Writes the file, whole or not at all."""
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
        "domains": domains,
    }
    cache_dir.write_json(pathlib.Path(embeddings.path), content)


def read(path: str | os.PathLike) -> Embeddings:
    """Reads a file of embeddings.

    Raises:
      EmbeddingsError: there is none, or it is not one.
    """
    path = os.fspath(path)
    if not os.path.isfile(path):
        raise EmbeddingsError(
            f"{path}: there is no such file of embeddings; make it with {COMMAND} --output={path} "
            "--domain NAME=FILE --domain ..."
        )
    try:
        content = json.loads(pathlib.Path(path).read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise EmbeddingsError(
                f"{path}: embeddings of format {content['format']!r}, and this program reads {FORMAT}: "
                f"make them anew with {COMMAND}"
            )
        mean_M = np.array(content["mean"], np.float64)
        domains = {
            name: Raw(np.array(entry["raw"], np.float64), entry["documents"], entry["source"])
            for name, entry in content["domains"].items()
        }
        vectors_NM = np.array([x["vector"] for x in content["domains"].values()], np.float64)
        encoder = content["encoder"]
        encoder["kind"]
    except (KeyError, TypeError, AttributeError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise _foreign(path, f"{type(error).__name__}: {error}") from None
    except ValueError as error:
        if isinstance(error, EmbeddingsError):
            raise
        raise _foreign(path, str(error)) from None
    widths = {mean_M.shape, *(raw.raw_M.shape for raw in domains.values()), vectors_NM.shape[1:]}
    if len(widths) != 1 or mean_M.ndim != 1:
        raise _foreign(path, "its vectors are not of one width")
    if not np.allclose(np.linalg.norm(vectors_NM, axis=1), 1, atol=1e-5):
        raise _foreign(path, "its vectors are not of length 1")
    return Embeddings(path, encoder, mean_M, domains, vectors_NM)


def _foreign(path: str, problem: str) -> EmbeddingsError:
    return EmbeddingsError(
        f"{path}: damaged, or no file of embeddings ({problem}); make it with {COMMAND}"
    )


def _placed(name: str, raw_M: np.ndarray, mean_M: np.ndarray) -> np.ndarray:
    """A raw vector less the mean, of length 1."""
    raw_M = np.asarray(raw_M, np.float64)
    length = np.linalg.norm(raw_M - mean_M)
    if not length > _NOTHING * np.linalg.norm(raw_M):  # NaN too
        raise EmbeddingsError(
            f"domain {name!r} lies at the mean of the domains, which a router projects to 0: give domains that "
            "differ, two at least"
        )
    return (raw_M - mean_M) / length
