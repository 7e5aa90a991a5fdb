"""Dense curvature against products and EK-FAC + CG, and responses against their derivatives, in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.launch.papers.influence import exact
from espalier.trainers.influence import conjugate
from espalier.trainers.influence.conjugate import state_tree

DAMPING = 0.1


@pytest.fixture(scope="module", autouse=True)
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def made():
    """(problem, rows, queries), of few documents."""
    patch = pytest.MonkeyPatch()
    for name, value in {"DOCUMENTS": 10, "QUERIES": 3, "_WIDTH": 4, "_HIDDEN": 3}.items():
        patch.setattr(exact, name, value)
    patch.setattr(exact, "DAMPING", DAMPING)
    yield exact.make_problem(np.random.default_rng(0))
    patch.undo()


@pytest.fixture(scope="module")
def optimum(made):
    return made[0].trained(made[0].start_P)


def test_the_dense_matrix_is_that_of_products(made):
    """Of a random direction; the quadratic forms agree too."""
    problem = made[0]
    theta_P = problem.start_P
    dense = problem.gauss_newton(theta_P)
    r = np.random.default_rng(1)
    matrices = {
        path: jnp.asarray(r.normal(size=(*s.lead, s.inputs, s.outputs)))
        for path, s in problem.sites.items()
    }
    v_P = np.concatenate([np.ravel(matrices[path]) for path in sorted(matrices)])
    product = conjugate.gauss_newton(problem.model, problem.sites)
    got = product(problem.params, problem.documents, matrices)
    got_P = np.concatenate([np.ravel(got[path]) for path in sorted(got)])
    np.testing.assert_allclose(got_P, dense @ v_P, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(dense, dense.T, atol=1e-12)
    assert np.linalg.eigvalsh(dense).min() > -1e-10


def test_at_an_optimum_the_gradient_vanishes_and_the_hessian_is_its_derivative(made, optimum):
    problem = made[0]

    def gradient(theta_P):
        return problem.gradients(theta_P)[1].mean(0) + DAMPING * np.asarray(theta_P)

    assert np.abs(gradient(optimum)).max() < 1e-6
    v_P = np.random.default_rng(2).normal(size=len(optimum))
    step = 1e-5
    moved = (gradient(optimum + step * v_P) - gradient(optimum - step * v_P)) / (2 * step)
    want = problem.hessian(optimum) @ v_P + DAMPING * v_P
    np.testing.assert_allclose(moved, want, rtol=1e-5, atol=1e-7)


def test_scores_are_the_derivatives_of_responses(made, optimum):
    """Of the Bregman response by Gauss-Newton, and of the weight of a document by the Hessian."""
    problem, small = made[0], 1e-4
    curvature = problem.gauss_newton(optimum)
    before = np.asarray(problem.query_losses(optimum))
    by_newton = problem.exact_scores(curvature, optimum)
    by_hessian = problem.exact_scores(problem.hessian(optimum), optimum)
    for document in (0, 7):
        after = problem.bregman_response(optimum, document, small, curvature)
        change = np.asarray(problem.query_losses(after)) - before
        np.testing.assert_allclose(-change / small, by_newton[document], rtol=1e-2, atol=1e-4)
        weights = np.ones(10)
        weights[document] += 10 * small
        after = problem.trained(optimum, weights, curvature)
        change = np.asarray(problem.query_losses(after)) - before
        np.testing.assert_allclose(-change / small, by_hessian[document], rtol=1e-2, atol=1e-4)


def test_conjugate_gradients_from_ekfac_give_the_exact_scores(made, optimum, tmp_path, monkeypatch):
    problem, rows, asked = made
    monkeypatch.setattr(exact, "LABELS", 2)
    curvatures = (problem.gauss_newton(optimum), problem.hessian(optimum))
    scores = exact.all_scores(problem, optimum, *curvatures, rows, asked, tmp_path)
    assert set(scores) == set(exact.METHODS)
    np.testing.assert_allclose(
        scores["ekfac_cg"], scores["gauss_newton"], atol=1e-6 * np.abs(scores["ekfac_cg"]).max()
    )
    with_newton = {name: exact.correlation(x, scores["gauss_newton"]) for name, x in scores.items()}
    assert 0.5 < with_newton["ekfac"] < 1 - 1e-6


@pytest.mark.parametrize("wrong", (False, True))
def test_steps_by_a_wrong_curvature_end_by_the_hessian(made, optimum, wrong, monkeypatch):
    problem = made[0]
    curvature = problem.hessian(optimum) * (not wrong)
    weights, asked = np.ones(10), []
    weights[0] = 0.9  # the curvature of equal weights is near
    objective = problem._objective

    def hessian(*arguments):
        asked.append(arguments)
        return objective.hessian(*arguments)

    monkeypatch.setitem(problem.__dict__, "_objective", objective._replace(hessian=hessian))
    trained_P = problem.trained(optimum, weights, curvature)
    assert len(asked) == wrong
    gradient = objective.value_and_grad(trained_P, weights)[1]
    assert np.abs(gradient).max() < 1e-9


def test_an_optimum_without_weights_is_drawn_again(made, monkeypatch):
    problem, *_ = made
    zero = dataclasses.replace(problem, params=jax.tree.map(jnp.zeros_like, problem.params))
    drawn = [zero, problem]
    monkeypatch.setattr(exact, "make_problem", lambda rng: (drawn.pop(0), [], []))
    found, _, _, weights = exact.optimum(np.random.default_rng(0))
    assert found is problem and not drawn
    assert np.abs(weights).max() > 0.1


def test_an_optimisation_that_does_not_converge_is_an_error(made, monkeypatch):
    monkeypatch.setattr(exact, "_MAX_STEPS", 2)
    monkeypatch.setattr(exact, "_MAX_POLISHING", 0)
    with pytest.raises(exact.NoOptimumError, match="The gradient is still"):
        made[0].trained(made[0].start_P)


def test_other_weights_change_the_tapped_parameters_alone(made):
    problem = made[0]
    changed = state_tree.flatten(problem.with_weights(problem.start_P + 1))
    for path, value in state_tree.flatten(problem.params).items():
        np.testing.assert_allclose(changed[path], value + 1.0 * ("/mlp/" in path), err_msg=path)
