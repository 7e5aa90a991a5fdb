"""`launch.upcycle --method=nexus` (arXiv 2408.15901): the seed's FFNs are shared, and a router knows the experts' domains."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from espalier.launch.upcycle.upcycle_flags import METHOD_FILES, Method
from espalier.model.transforms.base import TransformError

_SUFFIXES = {"projection": "", "linear": "_linear", "mlp": "_mlp"}  # of the method's gin files


class Nexus(Method):
    """Experts beside the seed model's FFNs, behind a projection of embeddings of their data or, to compare, another router."""

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
                f"--router={router} needs --domains=FILE, written by launch.prepare embed_domains, for its width."
            )
        if router == "projection" and options.copies > 1:
            raise TransformError(
                "Experts of --copies have the same embedding, so the first would get every token: give runs of "
                "several domains, or --router=linear."
            )

    @functools.cached_property
    def _embeddings(self) -> Any:
        from espalier.data.nexus import domain_embeddings

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
        from espalier.launch.nexus import domain_record

        if self.router_kind != "projection":
            return {}
        vectors_EM = self._embeddings.vectors(experts)
        return {"domains": domain_record.domains_record(self._embeddings, vectors_EM)}

    def settings(self, experts: int) -> dict[str, Any]:
        width = {} if self._embeddings is None else {"DOMAIN_DIM": self._embeddings.dim}
        return super().settings(experts) | width
