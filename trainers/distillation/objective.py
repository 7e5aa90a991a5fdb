"""Distillation: a student learns a teacher's distribution over every next token (Hinton et al. 2015, arXiv 1503.02531).

With p of the teacher and q of the student, both softmax(logits / temperature), the loss of a token is

    teacher_weight * temperature^2 * divergence(p, q) + (1 - teacher_weight) * cross-entropy of the data's token.

Gradients of the divergence shrink with 1 / temperature^2, which the factor makes up for (section 2 there).

The teacher runs beside the student in every step (`Teacher`), or its K largest log-probabilities of every token are
columns of the batch. Both models' logits exist for one chunk of tokens at a time.

Shapes: B rows, T length, X = B T tokens, C tokens of a chunk, D width, V vocabulary, K stored tokens, N outcomes.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from espalier.common.ranges import Count, Fraction, Positive, Size
from espalier.model.axes import Rules
from espalier.model.kernels.cross_entropy import map_tokens
from espalier.model.kernels.vocab_logits import LogitForm
from espalier.trainers.inputs import Arrays, TokenRows, packed
from espalier.trainers.objectives.base import Batch, LossOut, Objective, StoredExtras, loss_in
from espalier.trainers.objectives.forward import Forward, forward_objective, frozen_forward
from espalier.trainers.objectives.frozen_model import FrozenModel

TEACHER_IDS = "teacher_ids"  # [B, T, K] int32; -1 for no token
# [B, T, K + 1] float32; the last is the log-probability of all other tokens together.
TEACHER_LOG_PROBS = "teacher_log_probs"
TEACHER_INDEX = "teacher_index"  # [B] int32, of `Teachers`
# Of outcomes that a row lacks, where a teacher of another vocabulary has fewer than K: exp of it is 0.
ABSENT_LOG_PROB = -1e4

# (log p [C, N], log q [C, N]) -> [C], in nats.
Divergence = Callable[[jax.Array, jax.Array], jax.Array]


def forward_kl(log_p_CN: jax.Array, log_q_CN: jax.Array) -> jax.Array:
    """KL(p || q): the student covers all tokens that the teacher considers."""
    return (jnp.exp(log_p_CN) * (log_p_CN - log_q_CN)).sum(-1)


def reverse_kl(log_p_CN: jax.Array, log_q_CN: jax.Array) -> jax.Array:
    """KL(q || p): the student avoids tokens that the teacher avoids (MiniLLM, arXiv 2306.08543)."""
    return forward_kl(log_q_CN, log_p_CN)


def jensen_shannon(log_p_CN: jax.Array, log_q_CN: jax.Array, *, beta: float = 0.5) -> jax.Array:
    """beta KL(p || m) + (1 - beta) KL(q || m) with m = beta p + (1 - beta) q (GKD, arXiv 2306.13649, eq. 1)."""
    if not 0.0 < beta < 1.0:
        raise ValueError(f"jensen_shannon: beta = {beta} must lie between 0 and 1.")
    log_m_CN = jnp.logaddexp(log_p_CN + jnp.log(beta), log_q_CN + jnp.log1p(-beta))
    return beta * forward_kl(log_p_CN, log_m_CN) + (1 - beta) * forward_kl(log_q_CN, log_m_CN)


class Teacher(FrozenModel):
    """A teacher that runs beside the student: any run's language model, sharded as the student is and outside of its state."""

    add_bos = "register the data with add_bos"

    def check(self, mesh: Mesh, rules: Rules, meta: Mapping[str, Any]) -> None:
        """Checks also that the teacher predicts tokens."""
        macro = self.checkpoint.macro
        if not hasattr(self.model, "head_VD"):
            raise ValueError(
                f"{macro}: a {type(self.model).__name__} predicts no tokens; give the run of a language model."
            )
        super().check(mesh, rules, meta)


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Teachers(StoredExtras):
    """Several teachers that run beside the student, each for its own rows: the `StoredExtras` of an objective.

    All of them are in memory, and each reads every row: time and memory grow with their number.

    Attributes:
      teachers: the teachers; the column 'teacher_index' of a batch has the place of each row's.
    """

    teachers: Sequence[Teacher]

    def check(self, mesh: Mesh, rules: Rules, meta: Mapping[str, Any]) -> None:
        for teacher in self.teachers:
            teacher.check(mesh, rules, meta)

    def abstract(self, mesh: Mesh, rules: Rules) -> Any:
        return tuple(teacher.abstract(mesh, rules) for teacher in self.teachers)

    def read(self, mesh: Mesh, rules: Rules) -> Any:
        return tuple(teacher.read(mesh, rules) for teacher in self.teachers)


def check_student(teacher: Teacher | Teachers, student: Any) -> None:
    """Raises ValueError if only one of teacher and student is an encoder-decoder: the other reads inputs and targets as one text."""
    if isinstance(teacher, Teachers):
        for one in teacher.teachers:
            check_student(one, student)
    elif teacher.model.row.encodes != student.row.encodes:
        raise ValueError(
            f"TEACHER is a {type(teacher.model).__name__} and the student a {type(student).__name__}, which read different rows: "
            "an encoder-decoder learns from an encoder-decoder, a decoder from a decoder."
        )


@dataclasses.dataclass(frozen=True)
class TaughtTokens(TokenRows):
    """Packed tokens, each with a teacher's K likeliest predictions.

    Attributes:
      feature_lengths: {'targets': tokens of a row}; of an encoder-decoder also its 'inputs'.
      top_k: K.
    """

    feature_lengths: Mapping[str, Size]
    top_k: Size

    @property
    def length(self) -> int:
        return sum(self.feature_lengths.values())

    def arrays(self, rows: int) -> Arrays:
        per_token = (rows, self.feature_lengths["targets"])
        ids = jax.ShapeDtypeStruct((*per_token, self.top_k), jnp.int32)
        log_probs = jax.ShapeDtypeStruct((*per_token, self.top_k + 1), jnp.float32)
        tokens = packed(self.feature_lengths).arrays(rows)
        return {**tokens, TEACHER_IDS: ids, TEACHER_LOG_PROBS: log_probs}


@loss_in("nats per token")
def distillation(
    *,
    model: Any,
    num_sources: Count = 0,
    teacher: Teacher | Teachers | None = None,
    divergence: Divergence = forward_kl,
    temperature: Positive = 1.0,
    teacher_weight: Fraction = 0.9,
    chunk: Size = 512,
) -> Objective:
    """A student learns a teacher's next-token distribution (Hinton et al., arXiv 1503.02531); a mean over the data's tokens.

    The loss of a token is teacher_weight * temperature^2 * divergence(p, q) + (1 - teacher_weight) * cross-entropy of the
    data's token, with p of the teacher and q of the student, both softmax(logits / temperature).

    Metrics, means over tokens: 'loss', the student's cross-entropy in nats as in pre-training, so that perplexities stay
    comparable; 'divergence', without its factors; 'distillation_loss', the minimised sum without auxiliary losses.

    If the two tables have different numbers of rows (vocabularies padded to other sizes), the divergence is over the rows
    that both have.

    Args:
      model: the student, a language model.
      num_sources: S; with S > 0, metric 'source_loss' is a vector over batch["source_ids"].
      teacher: runs in every step, or several for rows of their own; None if log-probabilities come with the batch, computed at this
        temperature.
      divergence: a function of this file, or another of two arrays of log-probabilities.
      temperature: above 0; a larger one shows more of the teacher's ranking of unlikely tokens.
      teacher_weight: of the divergence, from 0 to 1; the cross-entropy has the rest.
      chunk: tokens whose logits exist at a time.
    """
    if teacher is not None:
        check_student(teacher, model)

    def loss_fn(out: Forward, extras: Any) -> LossOut:
        batch = out.batch
        if isinstance(teacher, Teachers):
            taught = _each_live(teacher, extras, batch)
        else:
            taught = _stored(batch) if teacher is None else _live(teacher, extras, batch)
        per_token, outcomes = taught
        form, head_VD = form_of(model), out.head_VD()

        def of_chunk(h_CD: jax.Array, targets_C: jax.Array, *seen: jax.Array) -> Any:
            logits_CV = form.logits(h_CD, head_VD.astype(h_CD.dtype))
            target_C = jnp.take_along_axis(logits_CV, targets_C[:, None], axis=-1)[:, 0]
            nll_C = jax.nn.logsumexp(logits_CV, axis=-1) - target_C
            log_p_CN, log_q_CN = outcomes(seen, logits_CV, temperature)
            return nll_C, divergence(jax.lax.stop_gradient(log_p_CN), log_q_CN)

        targets_X = batch["decoder_target_tokens"].reshape(-1)
        nll_X, divergence_X = map_tokens(
            of_chunk,
            out.hidden_XD,
            targets_X,
            *per_token,
            vocab=2 * head_VD.shape[0],  # two tables of logits
            chunk=chunk,
        )
        weights_BT = batch["decoder_loss_weights"].astype(jnp.float32)
        nll_BT, divergence_BT = (x.reshape(weights_BT.shape) for x in (nll_X, divergence_X))
        loss_BT = teacher_weight * temperature**2 * divergence_BT + (1 - teacher_weight) * nll_BT
        total, weight = (loss_BT * weights_BT).sum(), weights_BT.sum()
        return out.mean_loss(
            nll_BT,
            weights_BT,
            total=total,
            metrics={
                "divergence": ((divergence_BT * weights_BT).sum(), weight),
                "distillation_loss": (total, weight),
            },
            num_sources=num_sources,
        )

    return forward_objective(model, loss_fn, stored_extras=teacher)


# Arrays [X, ...] of the teacher, and (chunks of these, the student's logits [C, V], temperature) -> (log p, log q) [C, N].
_Taught = tuple[tuple[jax.Array, ...], Callable[[Any, jax.Array, float], tuple[jax.Array, ...]]]


def _live(teacher: Teacher, params: Any, batch: Batch) -> _Taught:
    out = frozen_forward(teacher.model, params, batch)
    form, head_VD = form_of(teacher.model), out.head_VD()

    def outcomes(seen, logits_CV, temperature):
        (h_CD,) = seen
        taught_CV = form.logits(h_CD, head_VD.astype(h_CD.dtype))
        shared = min(taught_CV.shape[-1], logits_CV.shape[-1])
        return tuple(_log_probs(x[:, :shared], temperature) for x in (taught_CV, logits_CV))

    return (jax.lax.stop_gradient(out.hidden_XD),), outcomes


def _each_live(teachers: Teachers, params: Any, batch: Batch) -> _Taught:
    """The outcomes of a row are those of its teacher, and absent ones up to the number of the student's ids."""
    index_X = jnp.repeat(batch[TEACHER_INDEX], batch["decoder_target_tokens"].shape[1])
    pairs = zip(teachers.teachers, params, strict=True)
    live = [_live(teacher, its_params, batch) for teacher, its_params in pairs]

    def outcomes(seen, logits_CV, temperature):
        index_C, *hidden = seen
        size = logits_CV.shape[-1]
        chosen: tuple[jax.Array, ...] = (jnp.zeros_like(logits_CV),) * 2
        for k, ((_, of_one), h_CD) in enumerate(zip(live, hidden, strict=True)):
            own = of_one((h_CD,), logits_CV, temperature)
            wide = [_widened(x_CN, size) for x_CN in own]
            is_its_C1 = (index_C == k)[:, None]
            chosen = tuple(jnp.where(is_its_C1, x, y) for x, y in zip(wide, chosen, strict=True))
        return chosen

    return (index_X, *(hidden_XD for (hidden_XD,), _ in live)), outcomes


def _widened(x_CN: jax.Array, size: int) -> jax.Array:
    padding = ((0, 0), (0, size - x_CN.shape[-1]))
    return jnp.pad(x_CN, padding, constant_values=ABSENT_LOG_PROB)


def _stored(batch: Batch) -> _Taught:
    """The outcomes are the K stored tokens, and all other tokens together.

    Their divergence is a lower bound of the divergence over all tokens (data processing inequality), and equals it at
    K = V. It does not depend on how the teacher ranks the tokens that are not stored.
    """
    if TEACHER_IDS not in batch:
        raise ValueError(
            "Batches hold no predictions of a teacher: give t5x_configs/methods/distillation/distillation.gin, whose "
            "teacher runs beside the student, or distillation_stored.gin."
        )
    ids_XK, log_p_XN = (
        batch[name].reshape(-1, batch[name].shape[-1]) for name in (TEACHER_IDS, TEACHER_LOG_PROBS)
    )

    def outcomes(seen, logits_CV, temperature):
        ids_CK, log_p_CN = seen
        log_q_CN = top_log_probs(logits_CV, ids_CK, temperature)
        outcomes_stored = log_q_CN.shape[-1]
        return log_p_CN[:, :outcomes_stored], log_q_CN

    return (ids_XK, log_p_XN), outcomes


def top_log_probs(logits_CV: jax.Array, ids_CK: jax.Array, temperature: float) -> jax.Array:
    """Returns log-probabilities of K tokens and, last, of all others together: [C, K + 1], or [C, V] where K = V.

    An id of -1 is no token: its log-probability is ABSENT_LOG_PROB, and no token is missing among the others for it.
    """
    log_p_CV = _log_probs(logits_CV, temperature)
    absent_CK = ids_CK < 0
    log_p_CK = jnp.take_along_axis(log_p_CV, jnp.maximum(ids_CK, 0), axis=-1)
    log_p_CK = jnp.where(absent_CK, ABSENT_LOG_PROB, log_p_CK)
    if ids_CK.shape[-1] == logits_CV.shape[-1]:
        return log_p_CK
    ids_CK = jnp.where(absent_CK, logits_CV.shape[-1], ids_CK)
    others_CV = jnp.put_along_axis(log_p_CV, ids_CK, -jnp.inf, axis=-1, inplace=False, mode="drop")
    return jnp.concatenate([log_p_CK, jax.nn.logsumexp(others_CV, axis=-1, keepdims=True)], axis=-1)


def largest(logits_CV: jax.Array, k: int, temperature: float) -> tuple[jax.Array, jax.Array]:
    """Returns the stored values of a teacher: ids [C, K] of its likeliest tokens, and their `top_log_probs` [C, K + 1]."""
    _, ids_CK = jax.lax.top_k(logits_CV, k)
    log_p_CN = top_log_probs(logits_CV, ids_CK, temperature)
    return ids_CK, _widened(log_p_CN, k + 1)  # with all tokens, no others


def form_of(model: Any) -> LogitForm:
    """The scale and cap of a model's logits."""
    return LogitForm(model.logit_scale, model.logit_softcap)


def _log_probs(logits_CV: jax.Array, temperature: float) -> jax.Array:
    return jax.nn.log_softmax(logits_CV / temperature, axis=-1)
