"""Distillation against float64 formulas, its chunks, its teachers, and devices."""

import dataclasses
import functools
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from espalier.model.config import TransformerConfig
from espalier.model.t5.encoder_decoder import EncoderDecoder
from espalier.model.transformer import Transformer
from espalier.trainers import initialise, partitioning
from espalier.trainers.checkpoints.checkpoint import Checkpointer
from espalier.trainers.distillation import objective
from espalier.trainers.distillation.objective import Teacher, distillation
from espalier.trainers.objectives.base import StoredExtras
from espalier.trainers.objectives.frozen_model import FrozenCheckpoint
from espalier.trainers.optim import optimizers, schedules
from espalier.trainers.recipe import Recipe
from tests.drawn import drawn

B, T, V = 4, 6, 32
CONFIG = TransformerConfig(
    vocab_size=V, num_layers=1, embed_dim=16, num_heads=4, mlp_dim=24, scan_layers=False
)
STUDENT = Transformer(config=CONFIG)
TEACHER = Transformer(
    config=dataclasses.replace(CONFIG, embed_dim=32),
    tie_embeddings=False,
    logit_scale=0.7,
    logit_softcap=5.0,
)
DIVERGENCES = {
    "forward_kl": objective.forward_kl,
    "reverse_kl": objective.reverse_kl,
    "jensen_shannon": functools.partial(objective.jensen_shannon, beta=0.3),
}


@functools.cache
def parameters(model, seed):
    """Parameters far from uniform predictions."""
    params = nn.meta.unbox(drawn(model, jnp.zeros((1, 4), jnp.int32), seed=seed))
    return jax.tree_util.tree_map_with_path(
        lambda path, x: 8 * x if "embedding" in str(path) else x, params
    )


def make_batch(rows=B):
    rng = np.random.default_rng(3)
    tokens = rng.integers(1, V, (rows, T + 1))
    return jax.tree.map(
        jnp.asarray,
        {
            "decoder_input_tokens": tokens[:, :-1].astype(np.int32),
            "decoder_target_tokens": tokens[:, 1:].astype(np.int32),
            "decoder_segment_ids": np.ones((rows, T), np.int32),
            "decoder_positions": np.tile(np.arange(T, dtype=np.int32), (rows, 1)),
            "decoder_loss_weights": (np.arange(rows * T).reshape(rows, T) % 3 > 0).astype(
                np.float32
            ),
            "source_ids": (np.arange(rows) % 2).astype(np.int32),
        },
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Fixed(StoredExtras):
    """A teacher whose parameters are at hand."""

    model: object
    params: object

    def check(self, mesh, rules, meta):
        pass

    def abstract(self, mesh, rules):
        return initialise.abstract_params(self.model, mesh, rules)

    def read(self, mesh, rules):
        wanted = self.abstract(mesh, rules)
        return jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), self.params, wanted)


def teacher(model=TEACHER, seed=1):
    return Fixed(model, parameters(model, seed))


def evaluate(batch, *, student=STUDENT, taught=None, extras=None, gradients=True, **settings):
    """The `LossOut` and the gradients of (student, teacher), or None, by one jitted call."""
    loss = distillation(model=student, num_sources=2, teacher=taught, **settings)
    if extras is None and taught is not None:
        extras = taught.params

    def total(params, extras):
        out = loss(params, batch, None, extras=extras)
        return out.sum, out

    if not gradients:
        return jax.jit(total)(parameters(student, 0), extras)[1], None
    grad = jax.value_and_grad(total, argnums=0 if extras is None else (0, 1), has_aux=True)
    (_, out), found = jax.jit(grad)(parameters(student, 0), extras)
    return out, found


@functools.cache
def logits64(model, seed):
    """Logits of `make_batch()`."""
    tokens_BT = make_batch()["decoder_input_tokens"]
    logits = jax.jit(lambda params: model.apply({"params": params}, tokens_BT))
    return np.asarray(logits(parameters(model, seed)), np.float64)


def log_softmax(logits):
    logits = logits - logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))


def divergence64(name, log_p, log_q):
    p, q = np.exp(log_p), np.exp(log_q)
    if name == "forward_kl":
        return (p * (log_p - log_q)).sum(-1)
    if name == "reverse_kl":
        return (q * (log_q - log_p)).sum(-1)
    log_m = np.log(0.3 * p + 0.7 * q)
    return 0.3 * (p * (log_p - log_m)).sum(-1) + 0.7 * (q * (log_q - log_m)).sum(-1)


def means(out):
    return {k: float(s / w) for k, (s, w) in out.metrics.items() if w.ndim == 0}


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("name", DIVERGENCES)
def test_the_loss_is_its_formula(name, temperature):
    batch = make_batch()
    out, _ = evaluate(
        batch,
        taught=teacher(),
        divergence=DIVERGENCES[name],
        temperature=temperature,
        teacher_weight=0.6,
    )
    student, taught = logits64(STUDENT, 0), logits64(TEACHER, 1)
    distance = divergence64(
        name, log_softmax(taught / temperature), log_softmax(student / temperature)
    )
    targets = np.asarray(batch["decoder_target_tokens"])[..., None]
    nll = -np.take_along_axis(log_softmax(student), targets, axis=-1)[..., 0]
    weights = np.asarray(batch["decoder_loss_weights"], np.float64)
    assert (distance * weights).sum() / weights.sum() > 0.01
    loss = 0.6 * temperature**2 * distance + 0.4 * nll
    np.testing.assert_allclose(out.sum, (loss * weights).sum(), rtol=2e-5)
    assert float(out.weight) == weights.sum()
    found = means(out)
    np.testing.assert_allclose(found["loss"], (nll * weights).sum() / weights.sum(), rtol=1e-5)
    np.testing.assert_allclose(
        found["divergence"], (distance * weights).sum() / weights.sum(), rtol=2e-5
    )
    by_source = [(nll * weights)[s::2].sum() for s in range(2)]
    np.testing.assert_allclose(out.metrics["source_loss"][0], by_source, rtol=1e-5)


def test_the_gradient_of_forward_kl_is_the_difference_of_probabilities():
    """d KL(p || q) / d logits = (q - p) / temperature, through the student's head alone."""
    batch, temperature = make_batch(), 2.0
    _, (gradient, _) = evaluate(
        batch, taught=teacher(), temperature=temperature, teacher_weight=1.0
    )

    p, q = (
        jnp.exp(log_softmax(x / temperature)).astype(jnp.float32)
        for x in (logits64(TEACHER, 1), logits64(STUDENT, 0))
    )
    towards = (q - p) * temperature  # temperature^2 / temperature

    def by_hand(params):
        logits = STUDENT.apply({"params": params}, batch["decoder_input_tokens"])
        return (logits * towards * batch["decoder_loss_weights"][..., None]).sum()

    expected = jax.jit(jax.grad(by_hand))(parameters(STUDENT, 0))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), gradient, expected)


def test_chunks_change_nothing():
    batch = make_batch()
    whole, part = (
        evaluate(batch, taught=teacher(), divergence=DIVERGENCES["jensen_shannon"], chunk=chunk)
        for chunk in (B * T, 5)
    )
    np.testing.assert_allclose(whole[0].sum, part[0].sum, rtol=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, atol=2e-5, rtol=1e-5), whole[1], part[1]
    )


@pytest.mark.parametrize("name", DIVERGENCES)
def test_no_gradient_reaches_the_teacher(name):
    _, (student, taught) = evaluate(
        make_batch(), taught=teacher(), divergence=DIVERGENCES[name], teacher_weight=1.0
    )
    assert not any(np.any(g) for g in jax.tree.leaves(taught))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(student))
    assert np.any(student["token_embed"]["embedding"])


@pytest.mark.parametrize("name", DIVERGENCES)
def test_a_student_like_its_teacher_has_nothing_to_learn(name):
    out, (gradient, _) = evaluate(
        make_batch(),
        taught=teacher(STUDENT, 0),
        divergence=DIVERGENCES[name],
        teacher_weight=1.0,
    )
    assert abs(float(out.sum)) < 2e-5
    assert all(np.abs(g).max() < 2e-5 for g in jax.tree.leaves(gradient))


def stored_batch(batch, k, temperature):
    """The batch with the K largest log-probabilities of the teacher, as the store has them."""
    logits_XV = jnp.asarray(logits64(TEACHER, 1), jnp.float32).reshape(-1, V)
    ids_XK, log_p_XN = objective.largest(logits_XV, k, temperature)
    return {
        **batch,
        objective.TEACHER_IDS: ids_XK.reshape(B, T, k),
        objective.TEACHER_LOG_PROBS: log_p_XN.reshape(B, T, k + 1),
    }


@pytest.mark.parametrize("name", DIVERGENCES)
def test_all_tokens_stored_are_the_live_teacher(name):
    batch, settings = make_batch(), {"divergence": DIVERGENCES[name], "temperature": 2.0}
    live, (gradient, _) = evaluate(batch, taught=teacher(), **settings)
    stored, from_store = evaluate(stored_batch(batch, V, 2.0), **settings)
    np.testing.assert_allclose(live.sum, stored.sum, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), gradient, from_store)


def test_all_tokens_of_a_smaller_table_leave_none_for_the_student():
    """The other tokens of a student, which are padding of its table, have no probability of the teacher."""
    rng = np.random.default_rng(0)
    logits_CV, more_CV = rng.normal(size=(3, V)).astype(np.float32), np.ones((3, 2), np.float32)
    ids, log_p = objective.largest(jnp.asarray(logits_CV), V, 1.0)
    log_q = objective.top_log_probs(jnp.asarray(np.hstack([logits_CV, more_CV])), ids, 1.0)
    np.testing.assert_allclose(np.exp(log_p).sum(-1), 1, rtol=1e-5)
    expected = np.log1p(
        2 * np.e / np.exp(logits_CV).sum(-1)
    )  # of a share that the student gives them
    np.testing.assert_allclose(objective.forward_kl(log_p, log_q), expected, rtol=1e-4)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_fewer_tokens_bound_the_divergence_from_below(name):
    batch, settings = make_batch(), {"divergence": DIVERGENCES[name], "temperature": 2.0}
    found = [
        means(evaluate(stored_batch(batch, k, 2.0), gradients=False, **settings)[0])["divergence"]
        for k in (1, 4, V - 1, V)
    ]
    assert found == sorted(found) and 0 < found[0] < 0.9 * found[-1]
    # Four tokens and one outcome for all others.
    ids = np.argsort(-logits64(TEACHER, 1), axis=-1)[..., :4]
    grouped = []
    for model, seed in ((TEACHER, 1), (STUDENT, 0)):
        p = np.exp(log_softmax(logits64(model, seed) / 2.0))
        top = np.take_along_axis(p, ids, axis=-1)
        grouped.append(np.log(np.concatenate([top, 1 - top.sum(-1, keepdims=True)], -1)))
    weights = np.asarray(batch["decoder_loss_weights"], np.float64)
    expected = (divergence64(name, *grouped) * weights).sum() / weights.sum()
    assert found[1] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", DIVERGENCES)
def test_absent_tokens_are_no_outcomes(name):
    """Two tokens in rows of four, of which one position has none: its only outcome has probability 1."""
    batch, k = make_batch(), 4
    with_all = stored_batch(batch, k, 2.0)
    ids, log_p = (
        np.array(with_all[n]) for n in (objective.TEACHER_IDS, objective.TEACHER_LOG_PROBS)
    )
    p = np.exp(np.asarray(log_p, np.float64))
    p[..., -1] += p[..., 2:4].sum(-1)
    p[0, 1] = [0, 0, 0, 0, 1]
    ids[..., 2:], ids[0, 1] = -1, -1
    p[..., 2:4] = 0
    log_p = np.log(np.where(p > 0, p, 1)) + np.where(p > 0, 0, objective.ABSENT_LOG_PROB)
    batch |= {
        objective.TEACHER_IDS: jnp.asarray(ids),
        objective.TEACHER_LOG_PROBS: jnp.asarray(log_p, jnp.float32),
    }
    out, gradient = evaluate(batch, divergence=DIVERGENCES[name], temperature=2.0)
    q = np.exp(log_softmax(logits64(STUDENT, 0) / 2.0))
    top = np.take_along_axis(q, np.maximum(ids[..., :2], 0), axis=-1) * (ids[..., :2] >= 0)
    q = np.concatenate([top, 1 - top.sum(-1, keepdims=True)], -1)
    p = np.concatenate([p[..., :2], p[..., 4:]], -1)
    tiny = 1e-300  # of outcomes that are none on either side
    weights = np.asarray(batch["decoder_loss_weights"], np.float64)
    terms = divergence64(name, np.log(p + tiny), np.log(q + tiny))
    assert abs(terms[0, 1]) < 1e-12 and weights[0, 1]
    expected = (terms * weights).sum() / weights.sum()
    assert means(out)["divergence"] == pytest.approx(expected, rel=1e-4)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(gradient))


def test_each_row_learns_from_its_own_teacher():
    """Of several teachers, also with a smaller table: as from that teacher, if it were the only one."""
    small = Transformer(config=dataclasses.replace(CONFIG, vocab_size=V - 3), logit_scale=0.5)
    both = objective.Teachers(teachers=[teacher(), teacher(small, 2)])
    both = types.SimpleNamespace(all=both, params=tuple(one.params for one in both.teachers))
    settings = {"divergence": DIVERGENCES["jensen_shannon"], "temperature": 2.0}
    index = np.array([1, 0, 0, 1], np.int32)
    batch = make_batch() | {objective.TEACHER_INDEX: jnp.asarray(index)}
    several, (gradient, _) = evaluate(batch, taught=both.all, extras=both.params, **settings)
    total, gradients = 0.0, []
    for k, one in enumerate(both.all.teachers):
        weights = batch["decoder_loss_weights"] * (index == k)[:, None]
        own = batch | {"decoder_loss_weights": weights}
        alone, (its_gradient, _) = evaluate(own, taught=one, **settings)
        total += alone.sum
        gradients.append(its_gradient)
    np.testing.assert_allclose(several.sum, total, rtol=1e-5)
    added = jax.tree.map(jnp.add, *gradients)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=3e-5), gradient, added)


def test_one_of_several_teachers_is_the_teacher():
    batch = make_batch() | {objective.TEACHER_INDEX: jnp.zeros(B, jnp.int32)}
    one = teacher()
    alone, (gradient, _) = evaluate(batch, taught=one)
    pool, (same, _) = evaluate(
        batch, taught=objective.Teachers(teachers=[one]), extras=(one.params,)
    )
    np.testing.assert_allclose(pool.sum, alone.sum, rtol=1e-6)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), gradient, same)


@pytest.mark.parametrize("stored", [False, True])
def test_an_encoder_decoder_learns_another_over_targets_after_inputs(stored):
    """Live and with all tokens stored, against float64 logits of both models."""
    student = EncoderDecoder(config=CONFIG)
    taught = EncoderDecoder(config=dataclasses.replace(CONFIG, embed_dim=32), logit_scale=0.7)
    inputs = np.random.default_rng(4).integers(1, V, (B, 5)).astype(np.int32)
    batch = make_batch() | {
        "encoder_input_tokens": jnp.asarray(inputs),
        "encoder_segment_ids": jnp.ones((B, 5), jnp.int32),
        "encoder_positions": jnp.tile(jnp.arange(5), (B, 1)),
    }

    def logits_of(model, seed):
        def run(params):
            tokens = batch["decoder_input_tokens"]
            return model.apply({"params": params}, tokens, encoder_tokens_BS=inputs)

        return np.asarray(jax.jit(run)(parameters(model, seed)), np.float64)

    logits = logits_of(taught, 1)
    if stored:
        flat = jnp.asarray(logits, jnp.float32).reshape(-1, V)
        ids, log_probs = objective.largest(flat, V, 2.0)
        batch[objective.TEACHER_IDS] = ids.reshape(B, T, V)
        batch[objective.TEACHER_LOG_PROBS] = log_probs.reshape(B, T, V + 1)
    live = None if stored else teacher(taught)
    out, _ = evaluate(batch, student=student, taught=live, temperature=2.0, teacher_weight=1.0)
    log_p, log_q = (log_softmax(x / 2.0) for x in (logits, logits_of(student, 0)))
    weights = np.asarray(batch["decoder_loss_weights"], np.float64)
    expected = 4.0 * (divergence64("forward_kl", log_p, log_q) * weights).sum()
    assert expected / weights.sum() > 0.01
    np.testing.assert_allclose(out.sum, expected, rtol=2e-5)


def test_rows_of_a_store_are_those_of_the_model():
    lengths = {"inputs": 5, "targets": T}
    rows = objective.TaughtTokens(lengths, top_k=3)
    arrays = rows.arrays(B)
    assert rows.length == 5 + T and arrays["encoder_positions"].shape == (B, 5)
    assert arrays[objective.TEACHER_IDS].shape == (B, T, 3)
    assert "encoder_positions" not in objective.TaughtTokens({"targets": T}, top_k=3).arrays(B)


def test_a_teacher_of_other_rows_is_refused():
    with pytest.raises(ValueError, match="TEACHER is a Transformer and the student a EncoderDec"):
        distillation(model=EncoderDecoder(config=CONFIG), teacher=teacher())


def test_tables_padded_to_other_sizes_are_compared_where_both_have_rows():
    wide = Transformer(config=dataclasses.replace(TEACHER.config, vocab_size=V + 8))
    batch = make_batch()
    out, _ = evaluate(batch, taught=teacher(wide))
    expected = divergence64(
        "forward_kl",
        log_softmax(logits64(wide, 1)[..., :V]),
        log_softmax(logits64(STUDENT, 0)),
    )
    weights = np.asarray(batch["decoder_loss_weights"], np.float64)
    np.testing.assert_allclose(
        means(out)["divergence"], (expected * weights).sum() / weights.sum(), rtol=2e-5
    )


@pytest.mark.parametrize("k", [None, 4])
def test_devices_change_no_update(k):
    batch = make_batch(rows=B)
    batch = batch if k is None else stored_batch(batch, k, 1.0)
    make = functools.partial(distillation, teacher=teacher() if k is None else None, chunk=5)

    def trained(devices, mesh):
        recipe = Recipe(
            model=STUDENT,
            batch_size=B,
            feature_lengths={"targets": T},
            optimizer=optimizers.sgd,
            learning_rate=schedules.constant(peak=0.1),
            objective=make,
            rules="fsdp_tp",
            mesh=mesh,
        )
        program = recipe.program(devices=jax.devices()[:devices])
        with partitioning.use_mesh(program.mesh, program.rules):
            state, steps = program.init(), program.steps(2)
            for _ in range(2):
                placed = jax.device_put(batch, program.batch_sharding)
                state, metrics = steps.train(state, placed)
            return jax.device_get((state.params, metrics["distillation_loss"]))

    one, eight = trained(1, {"data": 1}), trained(8, {"fsdp": 2, "tensor": 4})
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), one, eight)


def test_a_student_learns_its_teacher():
    batch = make_batch()
    loss = distillation(model=STUDENT, teacher=teacher(), teacher_weight=1.0)
    optimizer = optax.adam(1e-2)
    params = parameters(STUDENT, 0)
    state = optimizer.init(params)

    @jax.jit
    def step(params, state):
        out, gradient = jax.value_and_grad(
            lambda p: loss(p, batch, None, extras=parameters(TEACHER, 1)).sum
        )(params)
        updates, state = optimizer.update(gradient, state)
        return optax.apply_updates(params, updates), state, out

    first = None
    for _ in range(60):
        params, state, value = step(params, state)
        first = value if first is None else first
    assert value < 0.2 * first


def test_a_beta_that_cannot_be_is_refused():
    with pytest.raises(ValueError, match="beta = 1.0"):
        objective.jensen_shannon(jnp.zeros((1, 2)), jnp.zeros((1, 2)), beta=1.0)


def test_a_batch_without_predictions_is_refused():
    with pytest.raises(ValueError, match="distillation_stored.gin"):
        evaluate(make_batch())


@pytest.fixture
def run(tmp_path):
    """A run directory of the teacher."""
    meta = {"vocabulary": "a" * 32, "start_token": 0, "add_bos": False}
    with Checkpointer(tmp_path / "run" / "checkpoints") as checkpointer:
        checkpointer.save(5, {"params": parameters(TEACHER, 1)}, meta=meta)
    return tmp_path / "run"


def from_run(run, model=TEACHER, **changes):
    place = {"path": str(run), "model_dir": str(run.parent), "macro": "TEACHER", **changes}
    return Teacher(model=model, checkpoint=FrozenCheckpoint(**place))


def check(taught, meta):
    mesh = partitioning.make_mesh(devices=jax.devices()[:1])
    taught.check(mesh, partitioning.rules_named("fsdp"), meta)


def test_a_teacher_that_fits_passes(run):
    data = {"vocabulary": "a" * 32, "start_token": 0, "add_bos": False, "seed": 1}
    for meta in ({}, {"vocabulary": "a" * 32}, data):
        check(from_run(run), meta)


@pytest.mark.parametrize(
    ("meta", "message"),
    [
        ({"vocabulary": "b" * 32}, "TEACHER: .*/5 was trained with another vocabulary"),
        (
            {"start_token": 7},
            r"TEACHER: .*begin with start_token = 0, .*with 7: set DOCUMENT_START = 0",
        ),
        ({"add_bos": True}, r"TEACHER: .* begin with add_bos = False, but this run's with True"),
    ],
)
def test_a_teacher_of_other_data_is_refused_by_name(run, meta, message):
    with pytest.raises(ValueError, match=message):
        check(from_run(run), meta)


def test_a_teacher_of_another_model_is_refused_by_name(run):
    with pytest.raises(ValueError, match="TEACHER: .*/5 is of another model"):
        check(from_run(run, model=STUDENT), {})
    with pytest.raises(ValueError, match="TEACHER: a Dense predicts no tokens"):
        check(from_run(run, model=nn.Dense(3)), {})
