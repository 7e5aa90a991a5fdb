"""Prompt tuning (arXiv 2104.08691): learned embeddings of virtual tokens, which a text begins with.

Virtual tokens are ids of the vocabulary that no text uses, such as an imported model's reserved special tokens. Being tokens, they
are packed, cached and masked like any other. An encoder-decoder's inputs begin with them (`inputs_prefix`); texts and chat templates
of decoders contain them, and their loss weights are those of a prompt.

Shapes: B batch, T length, D width, P virtual tokens, V rows of the table.
"""

from collections.abc import Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from espalier.common.ranges import Count, Size, recordable
from espalier.model import axes
from espalier.model.adapters.adapter import PREFIX, Adapter, AdapterError
from espalier.model.embed import Embed

SLOT = "prompt"  # of adapter.named


@recordable
class Prompt(Adapter):
    """Prompt tuning (arXiv 2104.08691): learned embeddings [P, D] of the ids `first_id`, `first_id` + 1, ...

    What is learned is the change of each embedding, which is zero at the start.

    Attributes:
      length: P, the number of virtual tokens.
      first_id: the first virtual token.
      starts: P ids with whose embeddings the virtual tokens begin, such as a text's; none for their own embeddings.

    Raises:
      AdapterError: ids outside the table, or another number of `starts`.
    """

    PATTERNS: ClassVar[tuple[str, ...]] = ()

    length: Size = 20
    first_id: Count = 0
    starts: Sequence[Count] = ()

    @property
    def inputs_prefix(self) -> tuple[int, ...]:
        return tuple(range(self.first_id, self.first_id + self.length))

    @nn.compact
    def __call__(self, ids_BT: jax.Array, rows_BTD: jax.Array, table_VD: jax.Array) -> jax.Array:
        count, (rows, width) = self.length, table_VD.shape
        starts = list(self.starts) or list(range(self.first_id, self.first_id + count))
        if len(starts) != count:
            raise AdapterError(
                f"adapter.named.{SLOT}: {len(starts)} starts for {count} virtual tokens: give one id for each, or none."
            )
        if max(*starts, self.first_id + count - 1) >= rows:
            raise AdapterError(
                f"adapter.named.{SLOT}: the ids of virtual tokens and their starts go up to "
                f"{max(*starts, self.first_id + count - 1)}, and the table has {rows} rows: choose ids that it has."
            )
        zeros, names = nn.initializers.zeros, (axes.UNMODELED, axes.EMBED)
        change_PD = axes.parameter(self, "change", zeros, names, (count, width), self.param_dtype)
        prompt_PD = table_VD[jnp.array(starts)].astype(jnp.float32) + change_PD
        index_BT = ids_BT - self.first_id
        virtual_BT = (index_BT >= 0) & (index_BT < count)
        learned_BTD = jnp.take(prompt_PD, index_BT, axis=0, mode="clip").astype(rows_BTD.dtype)
        return jnp.where(virtual_BT[..., None], learned_BTD, rows_BTD)


def inputs_prefix(*, model: Any) -> tuple[int, ...]:
    """Returns the virtual tokens with which an encoder-decoder's inputs begin; none for a decoder or without prompt tuning."""
    return model.inputs_prefix


@recordable
class PromptEmbed(Embed):
    """A table of tokens whose virtual ones have learned embeddings.

    The head of a model with tied embeddings is the table without them.

    Attributes:
      adapters: the model's adapters; the one in the slot 'prompt' is applied here.
    """

    adapters: Any = None

    def setup(self):
        super().setup()
        self.adapter_prompt = self.adapters.slots[SLOT].clone()

    def __call__(self, ids_BT: jax.Array) -> jax.Array:
        rows_BTD = super().__call__(ids_BT)
        if not (self.is_initializing() or self.has_variable("params", PREFIX + SLOT)):
            return rows_BTD  # the base model
        return self.adapter_prompt(ids_BT, rows_BTD, self.embedding)
