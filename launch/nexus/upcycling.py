"""`espalier upcycle --method=nexus` (arXiv 2408.15901): the seed's FFNs are shared, and a router knows the experts' domains."""

import functools
import hashlib
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import numpy as np

from espalier.data.nexus import domain_embeddings
from espalier.data.nexus.domain_embeddings import Embeddings
from espalier.launch.upcycle.upcycle_flags import METHOD_FILES, Method
from espalier.model.transforms.base import TransformError

_REMEDY = (
    f"add the new domain to the file of the mixture with {domain_embeddings.COMMAND} --extend=FILE "
    "--domain NAME=SOURCE, which keeps its encoder, its mean and its vectors."
)
_SUFFIXES = {"projection": "", "linear": "_linear", "mlp": "_mlp"}  # of the method's gin files


class Nexus(Method):
    """Experts in addition to the seed model's FFNs; their router projects embeddings of their data or, to compare, is another one."""

    flags: ClassVar[tuple[str, ...]] = ("seed_model", "domains", "router", "attention_experts")

    @property
    def mixes_attention(self) -> bool:
        return self.options.attention_experts

    @property
    def router_kind(self) -> str:
        return self.options.router or "projection"

    @property
    def files(self) -> list[str]:
        file = f"{METHOD_FILES}/nexus/nexus{_SUFFIXES[self.router_kind]}"
        if not self.mixes_attention:
            return [f"{file}.gin"]
        if self.router_kind == "linear":
            return [f"{file}.gin", f"{METHOD_FILES}/bam/attention_experts.gin"]
        return [f"{file}_bam.gin"]

    def check(self) -> None:
        options, router = self.options, self.router_kind
        if not options.seed_model:
            raise TransformError(
                "--method=nexus needs --seed_model=DIR, the run whose FFNs all tokens share."
            )
        if router == "linear" and options.domains:
            raise TransformError("--router=linear does not read --domains: remove it.")
        if router != "linear" and not options.domains:
            raise TransformError(
                f"--router={router} needs --domains=FILE, written by espalier prepare embed_domains, for its width."
            )
        if router == "projection" and options.copies > 1:
            raise TransformError(
                "Experts of --copies have the same embedding, so the first would get every token: give runs of "
                "several domains, or --router=linear."
            )

    @functools.cached_property
    def _embeddings(self) -> Any:
        return domain_embeddings.read(self.options.domains) if self.options.domains else None

    def routers(self, experts: Sequence[str], record: Mapping[str, Any]) -> Any:
        if self.router_kind == "linear":
            return super().routers(experts, record)
        from espalier.model.nexus.domain_router import MlpRouters, ProjectionRouters

        std = record["logit_std"]
        if self.router_kind == "mlp":
            return MlpRouters(logit_std=std)
        return ProjectionRouters(logit_std=std, domains=self._embeddings.vectors(experts))

    def record(self, experts: Sequence[str]) -> dict[str, Any]:
        if self.router_kind != "projection":
            return {}
        vectors_EM = self._embeddings.vectors(experts)
        return {"domains": domains_record(self._embeddings, vectors_EM)}

    def settings(self, experts: int) -> dict[str, Any]:
        width = {} if self._embeddings is None else {"DOMAIN_DIM": self._embeddings.dim}
        return super().settings(experts) | width


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
    """Raises TransformError if the file's vectors have another length than the mixture's [E, M], or an expert another vector."""
    length = float(np.linalg.norm(vectors_EM[0]))
    if not np.isclose(length, domains.length, rtol=1e-4):
        raise TransformError(
            f"{domains.path} has vectors of length {domains.length:g}, but the mixture's have {length:g}, so the new "
            f"expert would have another level: {_REMEDY}"
        )
    for name, vector_M in zip(names, vectors_EM, strict=True):
        if name in domains.names and not np.array_equal(domains.vectors([name])[0], vector_M):
            raise TransformError(
                f"{domains.path} has another vector of {name} than the one that the mixture's router was trained "
                f"with: {_REMEDY}"
            )
