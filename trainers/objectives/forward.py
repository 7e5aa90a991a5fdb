"""One forward pass inside an objective, and the `LossOut` of its predictions.

`forward_objective` makes an objective from a function of a `Forward`. The function computes a loss per token or per row
and returns `Forward.mean_loss` or, if it computes sum and weight itself, `Forward.loss_out`. `frozen_forward` runs a
reference or teacher.

Shapes: B rows, T length, X = B T tokens, D width, V vocabulary, S sources, L layers, N values, '...' shape of a value.
"""

import contextlib
import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.nn import logsumexp

from espalier.model import rows
from espalier.model.kernels.cross_entropy import Implementation, map_tokens, token_log_probs
from espalier.model.kernels.vocab_logits import LogitForm
from espalier.trainers.objectives.base import Batch, LossOut, Metrics, Objective, StoredExtras

# (batch, training: bool) -> positional and keyword arguments of a model's method.
Arguments = Callable[[Batch, bool], tuple[tuple[Any, ...], dict[str, Any]]]
_LAYER = re.compile(r"layers/block_\d+/")
_LARGEST = "_max"  # end of the name of a sown metric that is reported of the worst layer too


@dataclasses.dataclass(frozen=True, kw_only=True)
class Forward:
    """The output of a model for a batch, and the collections that its modules wrote.

    Attributes:
      variables: parameters and other collections that the model read.
      output: output of the model's method; for method 'hidden', an object with `hidden_BTD`.
      written: collections that the modules wrote.
      lasting: names of the collections in `written` that the train state holds.
    """

    model: Any
    variables: Mapping[str, Any]
    batch: Batch
    output: Any
    written: Mapping[str, Any]
    lasting: Sequence[str] = ()

    @property
    def hidden_XD(self) -> jax.Array:
        """Final hidden states of all tokens."""
        return self.output.hidden_BTD.reshape(-1, self.output.hidden_BTD.shape[-1])

    def head_VD(self) -> jax.Array:
        """Rows of the model's output matrix."""
        return self.apply("head_VD")

    def apply(self, method: str, *arguments: Any) -> Any:
        """Calls another method of the model on the same variables."""
        return self.model.apply(self.variables, *arguments, method=method)

    def log_probs_BT(
        self, *, temperature: float = 1.0, implementation: Implementation = "auto"
    ) -> jax.Array:
        """Returns log-probabilities of all targets, float32, including prompts and padding.

        Args:
          temperature: divides the logits, as in sampling.
          implementation: form of the cross-entropy, see model/kernels/cross_entropy.py.
        """
        targets_BT = self.batch["decoder_target_tokens"]
        softcap = self.model.logit_softcap
        log_probs_X = token_log_probs(
            self.hidden_XD,
            self.head_VD(),
            targets_BT.reshape(-1),
            # c tanh(x / c) / t = (c / t) tanh((x / t) / (c / t))
            logit_scale=self.model.logit_scale / temperature,
            softcap=None if softcap is None else softcap / temperature,
            implementation=implementation,
        )
        return log_probs_X.reshape(targets_BT.shape)

    def log_collisions_BT(self) -> jax.Array:
        """Returns log sum_v p_v^2 of the next tokens, float32, without gradient: the mean of p over tokens drawn from p."""
        head_VD = jax.lax.stop_gradient(self.head_VD()).astype(self.hidden_XD.dtype)
        form = LogitForm(float(self.model.logit_scale), self.model.logit_softcap)

        def of_chunk(h_CD: jax.Array) -> jax.Array:
            logits_CV = form.logits(h_CD, head_VD)
            return logsumexp(2 * logits_CV, axis=-1) - 2 * logsumexp(logits_CV, axis=-1)

        hidden_XD = jax.lax.stop_gradient(self.hidden_XD)
        collisions_X = map_tokens(of_chunk, hidden_XD, vocab=head_VD.shape[0])
        return collisions_X.reshape(self.batch["decoder_target_tokens"].shape)

    def most_likely_BT(self) -> jax.Array:
        """Returns the most probable token at each place of the targets; ties go to the first."""
        head_VD = self.head_VD().astype(self.hidden_XD.dtype)
        form = LogitForm(float(self.model.logit_scale), self.model.logit_softcap)
        ids_X = map_tokens(
            lambda h_CD: jnp.argmax(form.logits(h_CD, head_VD), axis=-1),
            self.hidden_XD,
            vocab=head_VD.shape[0],
        )
        return ids_X.reshape(self.batch["decoder_target_tokens"].shape)

    def mean_loss(
        self,
        loss: jax.Array,
        weights: jax.Array,
        *,
        total: jax.Array | None = None,
        weight: jax.Array | None = None,
        metrics: Metrics | None = None,
        num_sources: int = 0,
    ) -> LossOut:
        """Returns the weighted mean of a loss per token [B, T] or per row [B].

        Args:
          loss: in nats or any other unit, float32; reported as metric 'loss'.
          weights: weights of the loss's shape; 0 for padding.
          total: the weighted sum to differentiate, if it is not computed from `loss`, for example because its gradient
            is computed chunk by chunk.
          weight: what `total` is divided by, if it is not the sum of `weights`.
          num_sources: see `source_losses`.
        """
        weighted, count = loss * weights, weights.sum()
        reported = {"loss": (weighted.sum(), count), **(metrics or {})}
        reported |= source_losses(self.batch, weighted, weights, num_sources)
        total = reported["loss"][0] if total is None else total
        return self.loss_out(total, count if weight is None else weight, reported)

    def loss_out(self, total: jax.Array, weight: jax.Array, metrics: Metrics) -> LossOut:
        """Returns the loss with the losses, metrics and counts that modules sowed, and the collections that they wrote.

        Each value in collection 'losses' is a mean over the batch. It is multiplied by `weight`, added to the loss, and
        reported as metric 'auxiliary_loss'.
        """
        reported, added = dict(metrics), 0.0
        if auxiliary := jax.tree.leaves(self.written.get("losses")):
            added = weight * sum(value.astype(jnp.float32).sum() for value in auxiliary)
            reported["auxiliary_loss"] = (added, weight)
        if sown := self.written.get("metrics"):
            by_layer = _by_layer(sown, scanned=self.model.config.scan_layers)
            # A mean over layers hides the one whose largest value is near its bound.
            worst = {
                f"{name}_worst_layer": values.max(0)
                for name, values in by_layer.items()
                if name.endswith(_LARGEST) and len(values) > 1
            }
            means = {name: values.mean(0) for name, values in by_layer.items()}
            for name, value in (means | worst).items():
                reported[name] = (weight * value, jnp.full_like(value, weight))
        return LossOut(
            sum=total + added,
            weight=weight,
            metrics=reported,
            variables=self.updates,
            counts=self.written.get("counts"),
        )

    @property
    def updates(self) -> dict[str, Any]:
        """Returns the train state's collections after this batch in training; none in evaluation."""
        return {name: self.written[name] for name in self.lasting}


def decoder_arguments(batch: Batch, training: bool) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Returns the arguments of a language model: tokens, positions (None for 0, 1, ...) and segments.

    An encoder-decoder also gets its inputs.
    """
    del training
    positions_BT, segments_BT = batch.get("decoder_positions"), batch["decoder_segment_ids"]
    keywords = {"positions_BT": positions_BT, "segments_BT": segments_BT}
    return (batch["decoder_input_tokens"],), keywords | rows.encoder_arguments(batch)


def forward_objective(
    model: Any,
    loss: Callable[[Forward, Any], LossOut],
    *,
    stored_extras: StoredExtras | None = None,
    method: str | None = "hidden",
    arguments: Arguments = decoder_arguments,
    noise: bool = True,
) -> Objective:
    """Returns an objective that runs a model and computes `loss` of (forward pass, extras; None without `stored_extras`).

    Args:
      stored_extras: frozen parameters or other arrays, see `Objective`.
      method, arguments, noise: see `forward`.
    """

    def loss_fn(
        params: Any,
        batch: Batch,
        rng: jax.Array | None,
        *,
        variables: Mapping[str, Any],
        extras: Any,
    ) -> LossOut:
        out = forward(
            model, params, batch, rng, variables, method=method, arguments=arguments, noise=noise
        )
        return loss(out, extras)

    return Objective(loss_fn=loss_fn, stored_extras=stored_extras)


def forward(
    model: Any,
    params: Any,
    batch: Batch,
    rng: jax.Array | None,
    variables: Mapping[str, Any],
    *,
    method: str | None = "hidden",
    arguments: Arguments = decoder_arguments,
    noise: bool = True,
) -> Forward:
    """Runs a model on a batch, for a loss.

    In training, modules use the rng 'dropout', write the state's collections, and sow into 'metrics' and 'counts'. In
    evaluation (no rng) they do none of these. They sow into 'losses' in both.

    Args:
      rng: rng of this microbatch; None in evaluation.
      method: name of the model's method; None for `__call__`.
      arguments: makes the method's arguments from the batch.
      noise: whether modules may draw random numbers; False for a loss that compares this pass with one outside of training,
        such as a frozen reference's.

    Raises:
      ValueError: a module draws random numbers, without `noise`; the message has its path.
    """
    training = rng is not None
    lasting = tuple(variables) if training else ()
    variables = {"params": params, **variables}
    args, keywords = arguments(batch, training)
    watched = contextlib.nullcontext() if noise else nn.intercept_methods(_refuse_noise)
    with rows.given(model.row_context(variables, batch)), watched:
        output, written = model.apply(
            variables,
            *args,
            **keywords,
            rngs={"dropout": rng} if training else None,
            mutable=["losses", *(["metrics", "counts"] if training else []), *lasting],
            method=method,
        )
    return Forward(
        model=model,
        variables=variables,
        batch=batch,
        output=output,
        written=written,
        lasting=lasting,
    )


def _refuse_noise(
    call: Callable[..., Any], args: Any, keywords: Any, context: nn.module.InterceptorContext
) -> Any:
    """Calls a module's method; raises ValueError if the module has drawn from the rng 'dropout'."""
    out, scope = call(*args, **keywords), context.module.scope
    if scope is not None and scope.rng_counters.get("dropout"):
        raise ValueError(
            f"{'/'.join(scope.path) or 'The model'} draws random numbers in training, but the loss compares log-probabilities with those of a "
            "model that draws none, such as a reference: set DROPOUT_RATE = 0.0 of the model, LORA_DROPOUT = 0.0 of "
            "adapters, and the jitter of a router to 0.0."
        )
    return out


def frozen_forward(
    model: Any, params: Any, batch: Batch, *, method: str | None = "hidden"
) -> Forward:
    """Runs a frozen language model: without gradient to its parameters, random numbers, or writing collections."""
    variables = {"params": jax.lax.stop_gradient(params)}
    args, keywords = decoder_arguments(batch, False)
    with rows.given(model.row_context(variables, batch)):
        output = model.apply(variables, *args, **keywords, method=method)
    return Forward(model=model, variables=variables, batch=batch, output=output, written={})


def source_losses(
    batch: Batch, weighted: jax.Array, weights: jax.Array, num_sources: int
) -> Metrics:
    """Returns metric 'source_loss', a vector over the sources [S]; no metric with S = `num_sources` = 0.

    Args:
      batch: batch with 'source_ids' of its rows.
      weighted: losses times weights, [B, T], or [N] with the same number of adjacent values for each row.
      weights: weights, of the same shape.
      num_sources: S.
    """
    if not num_sources:
        return {}
    sources = batch["source_ids"]
    if weighted.ndim == 2:
        weighted, weights = weighted.sum(-1), weights.sum(-1)
    else:
        sources = jnp.repeat(sources, weighted.size // sources.size)
    one_hot_NS = jax.nn.one_hot(sources, num_sources, dtype=jnp.float32)
    return {"source_loss": (weighted @ one_hot_NS, weights @ one_hot_NS)}


def _by_layer(sown: Mapping[str, Any], *, scanned: bool) -> dict[str, jax.Array]:
    """Returns the values of all layers [L, ...] by name: 'mlp/load' of layers/block_0/mlp/load, layers/block_1/mlp/load, ...

    With `scanned`, the values of layers are stacked.
    """
    by_name: dict[str, list[jax.Array]] = {}
    for path, value in jax.tree_util.tree_leaves_with_path(sown):
        # `sow` stores tuples, so the last key is the index in the tuple.
        where = "/".join(str(key.key) for key in path[:-1])
        name = _LAYER.sub("", where)
        stacked = scanned and name != where
        by_name.setdefault(name, []).append(value if stacked else value[None])
    return {name: jnp.concatenate(values) for name, values in by_name.items()}
