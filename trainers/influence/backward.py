"""One forward and backward pass that hands every site's inputs and gradients to a consumer.

A tap with a backward pass of its own stands at each site. It passes the gradient on, and returns the consumer's results as
the gradient of an extra argument of zeros. The loss is the sum over tokens of the negative log-likelihood of the labels, so
that documents of a batch do not mix. Dropout is off, and auxiliary losses do not count.

Shapes: B batch, T length, X = B T tokens, D width, V vocabulary.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from espalier.model.kernels import taps
from espalier.model.kernels.cross_entropy import map_tokens, token_log_probs
from espalier.model.kernels.vocab_logits import LogitForm
from espalier.trainers.checkpoints import state_tree
from espalier.trainers.influence.consumers import Consumer, Covariances, Gradients, Rows
from espalier.trainers.influence.sites import HEAD, Site
from espalier.trainers.objectives.base import Batch
from espalier.trainers.objectives.forward import decoder_arguments

COLLECTION = "taps"
Sites = Mapping[str, Site]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _tapped(consume: Callable[..., Any], y: jax.Array, saved: Any, inputs: Any, out: Any) -> Any:
    """Returns y; the gradient of `out` is consume(gradient of y, saved, inputs)."""
    return y


def _tapped_fwd(consume, y, saved, inputs, out):
    return y, (saved, inputs)


def _tapped_bwd(consume, residuals, g):
    return g, None, None, consume(g, *residuals)


_tapped.defvjp(_tapped_fwd, _tapped_bwd)


def _dense(consumer: Consumer, bias: bool, g_BTY: jax.Array, saved: Any, inputs: Any) -> Any:
    mask_BT1 = saved["mask"][..., None].astype(consumer.dtype)
    a_BTX = saved["x"].astype(consumer.dtype) * mask_BT1
    if bias:
        a_BTX = jnp.concatenate([a_BTX, mask_BT1], axis=-1)
    return consumer.dense(a_BTX, g_BTY.astype(consumer.dtype), mask_BT1[..., 0], inputs)


def _experts(
    consumer: Consumer, shape: tuple[int, int], g_RY: jax.Array, saved: Any, inputs: Any
) -> Any:
    rows = Rows(saved["sizes"], saved["rows"], *shape)
    a_RX, g_RY = (
        jnp.where(rows.valid_R[:, None], x.astype(consumer.dtype), 0) for x in (saved["x"], g_RY)
    )
    return consumer.experts(a_RX, g_RY, rows, inputs)


def _lookup(consumer: Consumer, rows: int, g_BTD: jax.Array, saved: Any, inputs: Any) -> Any:
    """A tied table's use at the model's input: the gradient of its rows is the input, and the token the output."""
    one_hot_BTV = jax.nn.one_hot(saved["ids"], rows, dtype=consumer.dtype)
    g_BTD = g_BTD.astype(consumer.dtype)
    return consumer.dense(g_BTD, one_hot_BTV, jnp.ones(g_BTD.shape[:2], consumer.dtype), inputs)


class _StaticPartial(functools.partial):
    """A partial function that compares by its function and arguments, as a static argument must."""

    def _key(self) -> Any:
        return self.func, self.args

    def __hash__(self) -> int:
        return hash(self._key())

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _StaticPartial) and self._key() == other._key()


class _Tap:
    """The tap of one trace: each site gets a backward pass of its consumer."""

    def __init__(self, consumers: Mapping[str, Consumer], sites: Sites, batch: Batch):
        self.consumers, self.sites, self.masks = consumers, sites, masks_of(batch)

    def projection(self, module, name, x, y, *, bias, sizes, rows):
        path = "/".join((*module.path, name))
        if path not in self.sites:
            return y
        slot = module.get_variable(COLLECTION, name)
        consumer, mask_BT = self.consumers[path], self.masks[self.sites[path].stream]
        if sizes is None:
            return self.dense(consumer, y, x, mask_BT, slot, bias=bias)
        consume = _StaticPartial(_experts, consumer, mask_BT.shape)
        saved = {"x": x, "sizes": sizes, "rows": rows}
        return _tapped(consume, y, saved, slot["in"], slot["out"])

    def dense(self, consumer, y, x, mask_BT, slot, *, bias):
        consume = _StaticPartial(_dense, consumer, bias)
        return _tapped(consume, y, {"x": x, "mask": mask_BT}, slot["in"], slot["out"])

    def lookup(self, module, name, ids, y):
        head, consumer = self.sites.get(HEAD), self.consumers.get(HEAD)
        if head is None or not head.tied or not isinstance(consumer, Gradients):
            return y
        if head.parameter != "/".join((*module.path, name)):
            return y
        slot = module.get_variable(COLLECTION, name)
        consume = _StaticPartial(_lookup, consumer, head.outputs)
        return _tapped(consume, y, {"ids": ids}, slot["in"], slot["out"])

    def head(self, h_BTD, head_VD, slot):
        """Returns the products [B, T, V] of hidden states and the head."""
        wide = jnp.promote_types(h_BTD.dtype, jnp.float32)
        head_VD = head_VD.astype(h_BTD.dtype)
        y_BTV = jnp.einsum("btd,vd->btv", h_BTD, head_VD, preferred_element_type=wide)
        masks = self.masks["decoder"]
        return self.dense(self.consumers[HEAD], y_BTV, h_BTD, masks, slot, bias=False)


def masks_of(batch: Batch) -> dict[str, jax.Array]:
    """Returns 1.0 at the tokens that the decoder and the encoder read, 0.0 at padding."""
    names = {"decoder": "decoder_segment_ids", "encoder": "encoder_segment_ids"}
    return {s: (batch[n] != 0).astype(jnp.float32) for s, n in names.items() if n in batch}


def backward(
    model: Any,
    sites: Sites,
    consumer: Consumer,
    params: Any,
    inputs: Mapping[str, Any],
    batch: Batch,
    *,
    key: jax.Array | None = None,
) -> tuple[dict[str, Any], jax.Array]:
    """Returns the consumer's results by path, and the negative log-likelihood of every label [B, T].

    Args:
      model, params: a language model and its parameters.
      sites: the tapped sites by path.
      consumer: computes the results.
      inputs: arrays for the consumer by path; {} for none.
      batch: rows of documents with `decoder_loss_weights`, and `document_ids` with a key.
      key: labels are drawn from the model with this key and the documents' ids, one for each position with a weight; None
        for the batch's targets.
    """
    rows, length = batch["decoder_input_tokens"].shape
    # The square of a matrix that is used twice needs the sum of both gradients.
    twice = {path for path, site in sites.items() if site.tied and consumer.squares}
    consumers: dict[str, Consumer] = dict.fromkeys(sites, consumer)
    if isinstance(consumer, Covariances):
        consumers = {path: consumer.at(site) for path, site in sites.items()}
    consumers |= {path: Gradients(consumer.dtype) for path in twice}
    outs = {path: consumers[path].zeros(site, rows, length) for path, site in sites.items()}

    def loss(outs: Any) -> tuple[jax.Array, jax.Array]:
        slots = {path: {"in": dict(inputs.get(path, {})), "out": outs[path]} for path in sites}
        named = {site.parameter: slots[path] for path, site in sites.items()}
        tap = _Tap(consumers, sites, batch)
        args, keywords = decoder_arguments(batch, False)
        variables = {"params": params, COLLECTION: state_tree.nest(named)}
        with taps.installed(tap):
            hidden_BTD = model.apply(variables, *args, **keywords, method="hidden").hidden_BTD
        nll_BT = _nll(model, params, hidden_BTD, batch, key, tap, slots.get(HEAD))
        return (nll_BT * batch["decoder_loss_weights"].astype(nll_BT.dtype)).sum(), nll_BT

    results, nll_BT = jax.grad(loss, has_aux=True)(outs)
    for path in twice:
        results[path] = consumer.finish(sites[path], results[path], inputs.get(path, {}))
    return results, nll_BT


def _nll(
    model: Any,
    params: Any,
    hidden_BTD: jax.Array,
    batch: Batch,
    key: jax.Array | None,
    tap: _Tap,
    slot: Any,
) -> jax.Array:
    """Returns the negative log-likelihood [B, T] of the batch's targets or of drawn labels."""
    head_VD = model.apply({"params": params}, method="head_VD")
    form = LogitForm(float(model.logit_scale), model.logit_softcap)
    targets_BT = batch["decoder_target_tokens"]
    if key is not None:
        targets_BT = sampled_labels(form, hidden_BTD, head_VD, batch["document_ids"], key)
    if slot is None:
        log_probs_X = token_log_probs(
            hidden_BTD.reshape(-1, hidden_BTD.shape[-1]),
            head_VD,
            targets_BT.reshape(-1),
            logit_scale=form.scale,
            softcap=form.softcap,
        )
        return -log_probs_X.reshape(targets_BT.shape)
    logits_BTV = form.scale * tap.head(hidden_BTD, head_VD, slot)
    if form.softcap is not None:
        logits_BTV = form.softcap * jnp.tanh(logits_BTV / form.softcap)
    log_probs_BTV = jax.nn.log_softmax(logits_BTV)
    return -jnp.take_along_axis(log_probs_BTV, targets_BT[..., None], axis=-1)[..., 0]


def sampled_labels(
    form: LogitForm,
    hidden_BTD: jax.Array,
    head_VD: jax.Array,
    documents_B: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Returns labels [B, T] drawn from the model, which depend on the document's id and the position, not on the batch."""
    B, T, D = hidden_BTD.shape
    h_XD = jax.lax.stop_gradient(hidden_BTD).reshape(B * T, D)
    head_VD = jax.lax.stop_gradient(head_VD).astype(h_XD.dtype)

    def uniform(document: jax.Array) -> jax.Array:
        own = jax.random.fold_in(key, document)
        keys = jax.vmap(lambda t: jax.random.fold_in(own, t))(jnp.arange(T))
        return jax.vmap(lambda k: jax.random.uniform(k, dtype=jnp.float32))(keys)

    def draw(h_CD: jax.Array, u_C: jax.Array) -> jax.Array:
        sums_CV = jnp.cumsum(jax.nn.softmax(form.logits(h_CD, head_VD)), axis=-1)
        below_CV = sums_CV < u_C[:, None] * sums_CV[:, -1:]
        return jnp.minimum(below_CV.sum(-1), head_VD.shape[0] - 1).astype(jnp.int32)

    u_X = jax.vmap(uniform)(documents_B).reshape(-1)
    return map_tokens(draw, h_XD, u_X, vocab=head_VD.shape[0]).reshape(B, T)
