"""The settings of fitted factors, which a command line shows without jax."""

import dataclasses
from collections.abc import Sequence
from typing import Annotated, Any, Literal


@dataclasses.dataclass(frozen=True, kw_only=True)
class FitSettings:
    """Settings that factors depend on.

    Attributes:
      modules: layers, with commas: mlp, attention, adapters, head, all, or patterns of whole paths.
      labels: labels of the curvature: sampled from the model (the Fisher), or the documents' own tokens (empirical).
      blocks: diagonal blocks of each covariance; more need less memory.
      factor_dtype: dtype of sums and stored factors; bfloat16 stores eigenvectors only, sums stay in float32.
      seed: seed of the sampled labels.
      precision: rounding of products in the eigenbasis on accelerators; 'default' rounds them to bfloat16 on TPUs and to 10 bits on GPUs.
    """

    modules: Annotated[Sequence[str], "NAMES"] = ("mlp",)
    labels: Literal["sampled", "empirical"] = "sampled"
    blocks: int = 1
    factor_dtype: Literal["float32", "float64", "bfloat16"] = "float32"
    seed: int = 0
    precision: Literal["highest", "high", "default"] = "highest"

    def __post_init__(self):
        if self.blocks < 1:
            raise ValueError(f"--blocks={self.blocks} must be at least 1.")

    @property
    def sum_dtype(self) -> str:
        """Dtype of sums over tokens: at least float32."""
        return "float32" if self.factor_dtype == "bfloat16" else self.factor_dtype

    def record(self) -> dict[str, Any]:
        return {**dataclasses.asdict(self), "modules": list(self.modules)}
