"""How attentions become the experts of model/bam/moa.py (BAM, arXiv 2408.08274).

Shapes: K key/value heads of one expert.
"""

import dataclasses
import re

from espalier.model.transforms.experts import ExpertAxis

_HEADS = r"(.*/)?attention/(query|key|value|out)/(kernel|bias)"


@dataclasses.dataclass(frozen=True, kw_only=True)
class AttentionExperts:
    """A `model.transforms.experts.AttentionExperts` in the order of heads of a MixtureOfAttention.

    Attributes:
      kv_heads: K.
      shared_kv: whether experts share keys and values, which are the mean of all models.
      averaged: see the protocol.
    """

    kv_heads: int
    shared_kv: bool = False
    averaged: bool = False

    def axis(self, path: str) -> ExpertAxis | None:
        match = re.fullmatch(_HEADS, path)
        if match is None:
            return None
        # By expert, or by key/value head if experts share these.
        name, kind = match[2], match[3]
        groups = self.kv_heads if self.shared_kv else 1
        if name == "out":
            return ExpertAxis(-2, groups) if kind == "kernel" else None  # one bias is added once
        return None if self.shared_kv and name in ("key", "value") else ExpertAxis(-1, groups)
