"""Every form of the cross-entropy against float64 numpy and against autodiff of the reference.

Shapes: T tokens, D width, V vocabulary.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.kernels import cross_entropy
from espalier.model.kernels.cross_entropy import token_log_probs, weighted_cross_entropy
from espalier.model.kernels.platform import use_platform, use_reference_forms
from espalier.trainers import partitioning

T, D, V = 29, 16, 50  # chunks of 8 leave a short one
FORMS = ("reference", "onehot", "chunked", "blocked")
SETTINGS = (
    {},
    {"z_loss": 0.1},
    {"logit_scale": 0.25, "softcap": 3.0, "z_loss": 0.01},
)


@pytest.fixture
def arrays():
    rng = np.random.default_rng(0)
    h_TD, head_VD = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((T, D), (V, D)))
    targets_T = jnp.asarray(rng.integers(0, V, T), jnp.int32).at[:2].set(jnp.array([0, V - 1]))
    weights_T = jnp.asarray(rng.uniform(0, 3, T), jnp.float32).at[5:9].set(0)
    return h_TD, head_VD, targets_T, weights_T


def by_numpy(h_TD, head_VD, targets_T, logit_scale=1.0, softcap=None):
    """(nll_T, log_z_T) in float64."""
    logits_TV = logit_scale * np.asarray(h_TD, np.float64) @ np.asarray(head_VD, np.float64).T
    if softcap is not None:
        logits_TV = softcap * np.tanh(logits_TV / softcap)
    top_T = logits_TV.max(-1)
    log_z_T = top_T + np.log(np.exp(logits_TV - top_T[:, None]).sum(-1))
    return log_z_T - logits_TV[np.arange(len(top_T)), np.asarray(targets_T)], log_z_T


def summed(implementation, settings, h_TD, head_VD, weights_T, *, targets_T):
    return weighted_cross_entropy(
        h_TD, head_VD, targets_T, weights_T, implementation=implementation, chunk=8, **settings
    )


@pytest.mark.parametrize("settings", SETTINGS)
@pytest.mark.parametrize("implementation", FORMS)
def test_values_and_gradients(arrays, implementation, settings):
    h_TD, head_VD, targets_T, weights_T = arrays
    settings = dict(settings)

    def program(implementation):
        loss = functools.partial(summed, implementation, settings, targets_T=targets_T)

        def scaled(*args):
            total, nll_T, log_z_T = loss(*args)
            # The metrics carry no gradient, whatever is done with them.
            return 0.5 * total + nll_T.sum() + log_z_T.sum(), (total, nll_T, log_z_T)

        grad = jax.jit(jax.grad(scaled, (0, 1, 2), has_aux=True))
        return grad(h_TD, head_VD, weights_T)

    grads, (total, nll_T, log_z_T) = program(implementation)
    z_loss = settings.get("z_loss", 0.0)
    numpy_settings = {k: v for k, v in settings.items() if k != "z_loss"}
    want_nll_T, want_log_z_T = by_numpy(h_TD, head_VD, targets_T, **numpy_settings)
    np.testing.assert_allclose(nll_T, want_nll_T, rtol=3e-6, atol=3e-6)
    np.testing.assert_allclose(log_z_T, want_log_z_T, rtol=3e-6, atol=3e-6)
    want = np.asarray(weights_T, np.float64) @ (want_nll_T + z_loss * want_log_z_T**2)
    np.testing.assert_allclose(total, want, rtol=3e-6)
    np.testing.assert_allclose(grads[2], 0.5 * (want_nll_T + z_loss * want_log_z_T**2), rtol=1e-5)
    np.testing.assert_array_equal(grads[0][5:9], 0)  # weight 0
    if implementation != "reference":
        for got, expected in zip(grads, program("reference")[0], strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)


def test_gradients_of_the_reference_against_differences(arrays):
    h_TD, head_VD, targets_T, weights_T = arrays
    settings = {"logit_scale": 0.25, "softcap": 3.0}
    direction_VD = np.asarray(jax.random.normal(jax.random.key(1), (V, D)), np.float64)
    grad = jax.grad(
        lambda e: summed("reference", settings, h_TD, e, weights_T, targets_T=targets_T)[0]
    )(head_VD)

    def loss(step):
        shifted = np.asarray(head_VD, np.float64) + step * direction_VD
        return np.asarray(weights_T, np.float64) @ by_numpy(h_TD, shifted, targets_T, 0.25, 3.0)[0]

    want = (loss(1e-5) - loss(-1e-5)) / 2e-5
    np.testing.assert_allclose(np.vdot(np.asarray(grad), direction_VD), want, rtol=1e-4)


@pytest.mark.parametrize("implementation", FORMS)
def test_token_log_probs_are_differentiable_per_token(arrays, implementation):
    h_TD, head_VD, targets_T, weights_T = arrays
    settings = {"logit_scale": 0.5, "softcap": 4.0}
    mix_T = weights_T - 1  # any sign

    def program(implementation):
        def loss(h_TD, head_VD):
            logp_T = token_log_probs(
                h_TD, head_VD, targets_T, implementation=implementation, chunk=8, **settings
            )
            return (mix_T * jnp.exp(logp_T)).sum(), logp_T

        return jax.jit(jax.grad(loss, (0, 1), has_aux=True))(h_TD, head_VD)

    grads, logp_T = program(implementation)
    want = -by_numpy(h_TD, head_VD, targets_T, **settings)[0]
    np.testing.assert_allclose(logp_T, want, rtol=3e-6, atol=3e-6)
    for got, expected in zip(grads, program("reference")[0], strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("tokens", [1, 8, 9, 29])
def test_any_number_of_tokens(arrays, tokens):
    h_TD, head_VD, targets_T, weights_T = (x[:tokens] if len(x) == T else x for x in arrays)
    total, nll_T, _ = summed("chunked", {}, h_TD, head_VD, weights_T, targets_T=targets_T)
    assert nll_T.shape == (tokens,)
    want_T = by_numpy(h_TD, head_VD, targets_T)[0]
    np.testing.assert_allclose(nll_T, want_T, rtol=3e-6, atol=3e-6)
    np.testing.assert_allclose(total, np.asarray(weights_T) @ want_T, rtol=3e-6)


@pytest.mark.parametrize("implementation", FORMS)
def test_large_logits_neither_overflow_nor_lose_the_float32_island(arrays, implementation):
    """Logits in the thousands, from bfloat16 operands."""
    h_TD, head_VD, targets_T, weights_T = arrays
    h_TD, head_VD = (1000 * h_TD).astype(jnp.bfloat16), head_VD.astype(jnp.bfloat16)

    def loss(h_TD, head_VD):
        total, nll_T, _ = summed(implementation, {}, h_TD, head_VD, weights_T, targets_T=targets_T)
        return total, nll_T

    (_, nll_T), grads = jax.jit(jax.value_and_grad(loss, (0, 1), has_aux=True))(h_TD, head_VD)
    want_T = by_numpy(h_TD.astype(jnp.float32), head_VD.astype(jnp.float32), targets_T)[0]
    np.testing.assert_allclose(nll_T, want_T, rtol=1e-5, atol=1e-3)
    assert nll_T.dtype == jnp.float32
    assert [g.dtype for g in grads] == [jnp.bfloat16, jnp.bfloat16]
    assert all(np.isfinite(g.astype(jnp.float32)).all() for g in grads)


def test_a_float32_head_under_bfloat16_states_gets_a_float32_gradient(arrays):
    h_TD, head_VD, targets_T, weights_T = arrays
    h_TD = h_TD.astype(jnp.bfloat16)
    grad = jax.grad(lambda e: summed("chunked", {}, h_TD, e, weights_T, targets_T=targets_T)[0])
    assert grad(head_VD).dtype == jnp.float32


def largest_array(function, *args) -> int:
    """Elements of the largest array in the program of `function`, loops included."""
    sizes = []

    def visit(jaxpr):
        for eqn in jaxpr.eqns:
            sizes.extend(v.aval.size for v in eqn.outvars)
            for param in jax.tree.leaves(eqn.params, is_leaf=lambda x: hasattr(x, "jaxpr")):
                inner = getattr(param, "jaxpr", param)
                if hasattr(inner, "eqns"):
                    visit(inner)

    visit(jax.make_jaxpr(function)(*args).jaxpr)
    return max(sizes)


def test_chunked_never_holds_the_logits_of_all_tokens(monkeypatch):
    """With 256,000 entries the batch's logits would be 16 times a chunk's."""
    shapes = ((128, 4), jnp.float32), ((256_000, 4), jnp.float32), ((128,), jnp.int32)
    h, head, targets = (jax.ShapeDtypeStruct(*shape) for shape in shapes)

    def grad(implementation):
        def loss(h, head, targets):
            return weighted_cross_entropy(
                h, head, targets, jnp.ones(128), implementation=implementation, chunk=8
            )[0]

        return jax.grad(loss, (0, 1))

    assert largest_array(grad("chunked"), h, head, targets) == 8 * 256_000
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 2 * 256_000)
    assert largest_array(grad("chunked"), h, head, targets) == 256_000 * 4  # the head itself
    assert largest_array(grad("reference"), h, head, targets) == 128 * 256_000


def test_choice_by_platform(arrays):
    h_TD, head_VD, targets_T, weights_T = arrays

    def program(**options):
        loss = functools.partial(
            weighted_cross_entropy, targets_T=targets_T, weights_T=weights_T, **options
        )
        return str(jax.make_jaxpr(lambda h, e: loss(h, e)[0])(h_TD, head_VD))

    assert program() == program(implementation="chunked")
    for platform in ("tpu", "gpu"):
        with use_platform(platform):
            assert program() == program(implementation="onehot")
    with use_reference_forms():
        assert program(implementation="chunked") == program(implementation="reference")
        assert "custom_vjp" not in program(implementation="chunked")


def test_forward_mode_and_second_derivatives_in_the_reference_form(arrays):
    h_TD, head_VD, targets_T, weights_T = arrays

    def f(h_TD):
        return summed("chunked", {}, h_TD, head_VD, weights_T, targets_T=targets_T)[0]

    with use_reference_forms():
        _, tangent = jax.jvp(f, (h_TD,), (h_TD,))
        np.testing.assert_allclose(tangent, jnp.vdot(jax.grad(f)(h_TD), h_TD), rtol=1e-4)
        product = jax.jvp(jax.grad(f), (h_TD,), (h_TD,))[1]
        assert np.isfinite(product).all()


def test_inside_remat_and_vmap(arrays):
    h_TD, head_VD, targets_T, weights_T = arrays

    def loss(implementation, h_TD):
        return summed(implementation, {}, h_TD, head_VD, weights_T, targets_T=targets_T)[0]

    batch = jnp.stack([h_TD, 2 * h_TD])
    got = jax.vmap(jax.grad(jax.checkpoint(functools.partial(loss, "chunked"))))(batch)
    want = jnp.stack([jax.grad(functools.partial(loss, "reference"))(h) for h in batch])
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("rules", ["dp", "fsdp", "fsdp_tp"])
def test_chunked_on_a_mesh(rules):
    """States split over the batch, the head over its width or its vocabulary."""
    rng = np.random.default_rng(0)
    h_TD, head_VD = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in ((64, D), (48, D)))
    targets_T = jnp.asarray(rng.integers(0, 48, 64), jnp.int32)
    weights_T = jnp.asarray(rng.uniform(0, 1, 64), jnp.float32)

    def loss(implementation, h_TD, head_VD):
        settings = {"z_loss": 0.01}
        return summed(implementation, settings, h_TD, head_VD, weights_T, targets_T=targets_T)[0]

    want = jax.value_and_grad(functools.partial(loss, "reference"), (0, 1))(h_TD, head_VD)
    mesh = partitioning.make_mesh(
        shape={"data": 2, "fsdp": 2, "tensor": 2 if rules == "fsdp_tp" else 1},
        devices=jax.devices()[: 8 if rules == "fsdp_tp" else 4],
    )
    rule_set = partitioning.rules_named(rules)
    with partitioning.use_mesh(mesh, rule_set):
        shardings = [
            jax.sharding.NamedSharding(mesh, partitioning.mesh_spec(names, rule_set))
            for names in (("act_batch", None), ("vocab", "embed"))
        ]
        placed = jax.device_put((h_TD, head_VD), tuple(shardings))
        got = jax.jit(jax.value_and_grad(functools.partial(loss, "chunked"), (0, 1)))(*placed)
    for g, expected in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(g, expected, rtol=1e-4, atol=1e-5)


def test_bad_options(arrays):
    with pytest.raises(ValueError, match="Unknown cross-entropy implementation"):
        weighted_cross_entropy(*arrays, implementation="fused")
    with pytest.raises(ValueError, match="chunk = 0"):
        token_log_probs(*arrays[:3], chunk=0)


def test_logits_of_few_tokens_are_kept_and_of_many_computed_again(monkeypatch):
    h_TD, head_VD, targets_T = jnp.ones((6, 4)), jnp.eye(8, 4), jnp.arange(6)

    def loops():
        def total(h_TD):
            return cross_entropy.token_log_probs(h_TD, head_VD, targets_T, chunk=2).sum()

        return "scan" in str(jax.make_jaxpr(jax.grad(total))(h_TD))

    monkeypatch.setattr(cross_entropy, "target_platform", lambda: "cpu")
    assert not loops()
    monkeypatch.setattr(cross_entropy, "CHUNK_LOGITS", 47)
    assert loops()
