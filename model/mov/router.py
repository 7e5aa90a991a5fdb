"""The router of a mixture of adapters (arXiv 2309.05444): s = softmax(x W), one for each adapted projection.

Experts are mixed softly, or each token uses its `top_k`. All of it is float32. Padding is routed like any token.

Shapes: '...' leading dimensions, N experts, W width of the router's input, B rows, S width of a sentence's embedding.
"""

from collections.abc import Mapping
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp

from espalier.common.ranges import Decay, NonNegative, Size, refuse_set
from espalier.model import axes
from espalier.model.adapters.adapter import Adapted, Adapter, AdapterError
from espalier.model.linear import Dense
from espalier.model.moe import routing
from espalier.model.moe.moe import ExpertDense
from espalier.model.mov import sentence

RouterInput = Literal["site_tensor", "layer_input", "sentence"]


class Routed(Adapter):
    """An adapter with several experts. One expert is the plain adapter, without a router.

    The mean probability of each expert, the entropy of a token's probabilities and the load are sown into 'metrics'; the load of
    a soft mixture is that of each token's most probable expert.

    Attributes:
      num_experts: N.
      router_input: what a router reads: the tensor that is rescaled (of attention each head by itself, of a gated MLP
        its activated branch) or projected ('site_tensor'); the input of the attention or MLP ('layer_input'); the
        embedding of the sentence ('sentence'): of the row, of an example in it, or of an encoder-decoder's inputs, see
        model/mov/sentence.py.
      sentence_dim: width of the sentences' embeddings where another model computes them, so that an encoder-decoder never reads
        its own; None for this model's width.
      top_k: number of experts of a token; None mixes all.
      renormalise: whether the weights of a token's `top_k` experts sum to 1. If not, a rescaling does not begin as the base
        model, since the chosen experts' probabilities sum to less. All experts' weights always do.
      jitter: in training, the router's input is multiplied by uniform noise between 1 - jitter and 1 + jitter.
      balance_loss: weight of routing.balance_loss, which only `top_k` experts can lower.
      router_init: initialiser of the router. Zeros would leave equal experts equal for ever.

    Raises:
      AdapterError: `top_k` is not between 1 and the number of experts, `balance_loss` without a choice of experts, or no
        embedding for 'sentence'.
      ValueError: `renormalise` is False without `top_k`.
    """

    num_experts: Size = 10
    router_input: RouterInput = "site_tensor"
    sentence_dim: Size | None = None
    top_k: Size | None = None
    renormalise: bool = True
    jitter: Decay = 0.0
    balance_loss: NonNegative = 0.0
    router_init: Any = nn.initializers.normal(0.02)

    def __post_init__(self):
        if self.top_k is not None and not 1 <= self.top_k <= self.num_experts:
            raise AdapterError(
                f"{type(self).__name__}: top_k = {self.top_k} must lie between 1 and num_experts = {self.num_experts}; None "
                "mixes all."
            )
        if self.balance_loss and (self.top_k is None or self.num_experts == 1):
            raise AdapterError(
                f"{type(self).__name__}: balance_loss = {self.balance_loss} balances the load of chosen experts, and with top_k = "
                f"{self.top_k} of {self.num_experts} none are chosen, so that it could not train a router: set top_k "
                "(ADAPTER_TOP_K), or balance_loss = 0 (ADAPTER_BALANCE_LOSS)."
            )
        if self.top_k is None:
            refuse_set(self, ("renormalise",), "top_k = None, whose weights sum to 1")
        if self.router_input != "sentence":
            refuse_set(self, ("sentence_dim",), f"router_input = {self.router_input!r}")
        super().__post_init__()

    @nn.nowrap
    def row_context(
        self, model: Any, variables: Mapping[str, Any], batch: Mapping[str, Any]
    ) -> dict[str, Any]:
        """Returns the embeddings of the batch's sentences, if the router reads them."""
        if self.router_input != "sentence":
            return {}
        own = self.sentence_dim is None
        embeddings = sentence.of_batch(model, variables, batch, own=own)
        return {} if embeddings is None else {sentence.COLUMN: embeddings}

    def weights(self, site: Adapted, tensor: jax.Array, axis: str, *sizes: jax.Array) -> jax.Array:
        """Returns the experts' weights [..., N] for the tensor [..., W] of this site; `axis` is its last one's name.

        At stacked experts of the model, which have a router each, the tensor has rows of these sizes.
        """
        if sizes and self.router_input == "sentence":
            raise AdapterError(
                f"{self.site_path}: router_input = 'sentence' is not at stacked experts, whose rows are sorted by expert and know no "
                "sentence: use 'site_tensor' or 'layer_input' (ADAPTER_ROUTER_INPUT), or exclude it from the patterns."
            )
        read, axis = self._read(site, tensor, axis)
        common = {"kernel_init": self.router_init, "param_dtype": self.param_dtype}
        common |= {"features": self.num_experts, "name": "router"}
        read = self._jittered(read.astype(jnp.float32))
        if sizes:
            names = (site.base.axes[0], axis, axes.UNMODELED)
            router = ExpertDense(num_experts=site.base.num_experts, axes=names, **common)
            real = _within(len(read), *sizes)
            with jax.default_matmul_precision("highest"):  # as in routing.scored
                logits = router(read, *sizes)
            # What is computed for rows after the last expert's is undefined.
            logits = jnp.where(real[:, None], logits, 0.0)
        else:
            with jax.default_matmul_precision("highest"):
                logits = Dense(axes=(axis, axes.UNMODELED), **common)(read)
            real = jnp.ones(logits.shape[:-1], bool)
        probs = jax.nn.softmax(logits, axis=-1)
        if self.top_k is None:
            weights, experts = probs, probs.argmax(-1)[..., None]
        else:
            routes = routing.route(probs, top_k=self.top_k, renormalise=self.renormalise)
            experts, chosen = routes.experts_MK, jax.nn.one_hot(routes.experts_MK, self.num_experts)
            weights = jnp.sum(chosen * routes.weights_MK[..., None], axis=-2)
        self._report(probs, experts, real)
        if not sizes:  # a mean over the rows of all experts is of none of them
            self.sow("intermediates", "router_weights", weights)
        return weights

    @nn.nowrap
    def _read(self, site: Adapted, tensor: jax.Array, axis: str) -> tuple[jax.Array, str]:
        """Returns the router's input and the logical name of its last axis."""
        if self.router_input == "layer_input":
            return site.layer_input, axes.EMBED
        if self.router_input == "site_tensor":
            return tensor, axis
        embeddings = sentence.current()
        if embeddings is None and self.is_initializing():
            width = self.sentence_dim or site.layer_input.shape[-1]
            return jnp.zeros((*site.layer_input.shape[:-1], width)), axes.CONTEXT
        if embeddings is None:
            raise AdapterError(
                f"{self.site_path}: router_input = 'sentence' reads embeddings of sentences, and there are none. Without others they "
                "are of an encoder-decoder's inputs: give your data's examples 'sentence_embedding' (espalier prepare "
                "embed_sentences writes them), or use 'site_tensor' or 'layer_input'. In Python, give float32 "
                "'sentence_embeddings' [rows, width] in each batch of your own loop, or apply the model inside of "
                "sentence.sentence_embeddings(...)."
            )
        self._check_width(jax.tree.leaves(embeddings)[0].shape[-1])
        if isinstance(embeddings, sentence.OfTokens):
            return embeddings.at(self.site_path), axes.CONTEXT
        between = (1,) * (site.layer_input.ndim - 2)
        return embeddings.reshape(len(embeddings), *between, -1), axes.CONTEXT

    def _check_width(self, found: int) -> None:
        width = self.sentence_dim
        if not self.is_initializing():
            width = nn.meta.unbox(self.get_variable("params", "router"))["kernel"].shape[-2]
        if width not in (None, found):
            raise AdapterError(
                f"{self.site_path}: the embeddings of sentences have {found} numbers, and the router reads {width}: set sentence_dim "
                "of the adapter to their width."
            )

    def _jittered(self, x: jax.Array) -> jax.Array:
        if not (self.jitter and self.has_rng("dropout")):
            return x
        low, high = 1 - self.jitter, 1 + self.jitter
        return x * jax.random.uniform(self.make_rng("dropout"), x.shape, minval=low, maxval=high)

    def _report(self, probs: jax.Array, experts: jax.Array, real: jax.Array) -> None:
        self.sow("intermediates", "router_probs", probs)
        routing.report(self, probs, experts, real)
        self.sow("metrics", "router_probability", routing.mean_of(probs, real))


def _within(rows: int, sizes: jax.Array) -> jax.Array:
    """Returns which of the rows [R] are an expert's; see `grouped_matmul` for the sizes."""
    of_devices = sizes.reshape(-1, sizes.shape[-1]).sum(-1, keepdims=True)
    at = jnp.arange(rows // len(of_devices))[None]
    return (at < of_devices).reshape(-1)
