"""Settings of `precompile`, which its command line shows without jax."""

import dataclasses
import pathlib
from typing import Annotated, Literal

from espalier.launch.config.setting_flags import Names


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """Settings of programs other than `train`.

    Attributes:
      max_new_tokens: number of new tokens for which the caches have room.
      cache_dtype: dtype of caches while decoding, by default the model's.
      weights_dtype: dtype of the weights of attention, MLPs and experts, like in `generate`, by default the model's.
      prefill_chunk: number of prompt tokens that are read at a time, like in `generate`.
      modules: which layers have factors, like in `influence fit`.
      blocks: number of diagonal blocks of each factor, like in `influence fit`.
      queries: queries that documents are scored for.
      rank: rank of compressed query gradients, like in `influence score`.
    """

    max_new_tokens: int = 128
    cache_dtype: Literal["int8", "bfloat16", "float16", "float32"] | None = None
    weights_dtype: Literal["int8"] | None = None
    prefill_chunk: int | None = None
    modules: Names = ("mlp",)
    blocks: int = 1
    queries: int = 100
    rank: int = 64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Search:
    """Limits of a search.

    Attributes:
      memory_limit: memory of a chip that a candidate may use, in 10^9 bytes (default: all that a program can have).
      search_minutes: minutes that the search may take.
      candidate_minutes: most time of a candidate.
      candidate_gb: most memory of the compiler.
      search_dir: folder of stored results (default: precompile in the caches' folder, see ESPALIER_CACHE).
    """

    memory_limit: Annotated[float, "GB"] | None = None
    search_minutes: Annotated[float, "M"] = 60.0
    candidate_minutes: Annotated[float, "M"] = 20.0
    candidate_gb: Annotated[float, "GB"] = 12.0
    search_dir: Annotated[pathlib.Path, "DIR"] | None = None
