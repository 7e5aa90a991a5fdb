"""Merges of single tensors: against mergekit's results, and what must hold of every method."""

import itertools
import json
import pathlib

import ml_dtypes
import numpy as np
import pytest

from espalier.model.transforms import merge, merge_blocks
from espalier.model.transforms.base import TransformError
from espalier.model.transforms.merge_methods import METHODS

GOLDENS = np.load(pathlib.Path(__file__).parent / "goldens" / "merges.npz")
CASES = json.loads(GOLDENS["cases"].tobytes())
BF16 = np.dtype(ml_dtypes.bfloat16)


def merged(method, arrays, *, based=None, block=1 << 20, name="w", models=None, **values):
    """Merges arrays, the base first; parameters that each model has are lists, or one value for all."""
    based = METHODS[method].base == "needed" if based is None else based
    count = len(arrays) - based
    settings = {k: values.pop(k, None) for k in ("dtype", "out_dtype")}
    settings["sources"] = values.pop("sources", ())
    seed = values.pop("seed", 0)
    filled = {}
    for key, parameter in METHODS[method].parameters.items():
        value = values.pop(key, parameter.default)
        assert value is not ..., key
        filled[key] = [value] * count if parameter.each and not isinstance(value, list) else value
    assert not values, values
    job = merge.Job(
        method=method,
        name=name,
        shape=arrays[0].shape,
        based=based,
        values=filled,
        models=models or [f"m{i + 1}" for i in range(count)],
        seed=seed,
        **settings,
    )
    return merge.merged(job, arrays, block=block)


def tensors(count, shape=(40, 30), seed=0, spread=0.1):
    rng = np.random.default_rng(seed)
    base = rng.normal(size=shape).astype(np.float32)
    return [base] + [
        base + (spread * rng.normal(size=shape)).astype(np.float32) for _ in range(count)
    ]


def ulps(a, b):
    """Returns the largest distance of two arrays, in units of the last place of the larger values."""
    return float(np.max(np.abs(a - b) / np.spacing(np.maximum(np.abs(a), np.abs(b)))))


def defaults(method, count):
    """Returns values of the parameters that have no default."""
    needed = {k: p for k, p in METHODS[method].parameters.items() if p.default is ...}
    return {k: [0.5, 0.3, 0.2][:count] if p.each else 0.3 for k, p in needed.items()}


def count_of(method):
    return max(METHODS[method].least, min(3, METHODS[method].most or 3))


@pytest.mark.parametrize("kind", ["matrix", "vector"])
@pytest.mark.parametrize("case", CASES)
def test_goldens_of_mergekit(monkeypatch, case, kind):
    named, count, shared, each = CASES[case]
    method, _, bare = named.partition(" ")
    based = not bare and method != "linear"
    arrays = [GOLDENS[f"{kind}/{i}"] for i in range(0 if based else 1, count + 1)]

    def words(key, low, high):
        return GOLDENS[f"{kind}/words{key[-1]}"].reshape(-1)[low:high]

    monkeypatch.setattr(merge_blocks, "random_words", words)
    result = merged(method, arrays, based=based, **shared, **each)
    expected = GOLDENS[f"{kind}/{case}"]
    scale = np.abs(expected).max()
    assert np.abs(result - expected).max() <= 2e-6 * scale
    # One unit in the last place of bfloat16 is 2^16 of float32.
    pair = [x.astype(BF16).astype(np.float32) for x in (result, expected)]
    assert ulps(*pair) <= 2**16
    if (key := f"{kind}/{case}/bfloat16") in GOLDENS:
        inputs = [x.astype(BF16) for x in arrays]
        out = merged(
            method,
            inputs,
            based=based,
            dtype=np.dtype(np.float32),
            out_dtype=BF16,
            **shared,
            **each,
        )
        theirs = GOLDENS[key].view(BF16).astype(np.float32)
        assert ulps(out.astype(np.float32), theirs) <= 2**16


@pytest.mark.parametrize("method", METHODS)
def test_no_result_depends_on_the_size_of_a_block(method):
    count = count_of(method)
    arrays = tensors(count, (70, 1100))  # more than two grains
    arrays = arrays if METHODS[method].base == "needed" else arrays[1:]
    values = defaults(method, count)
    if "density" in METHODS[method].parameters:
        values["density"] = 0.6
    by_row = [k for k in ("nuslerp_row_wise", "filter_wise") if k in METHODS[method].parameters]
    for more in [{}, *({k: True} for k in by_row)]:
        if "nuslerp_row_wise" in more:
            more = {**more, "nuslerp_flatten": False}
        whole, blocked = (
            merged(method, arrays, block=block, **values, **more) for block in (1 << 30, 1)
        )
        assert np.array_equal(whole, blocked)


@pytest.mark.parametrize("method", METHODS)
def test_equal_models_stay_as_they_are(method):
    count = count_of(method)
    base = tensors(0)[0].astype(BF16)
    based = METHODS[method].base == "needed"
    if method == "linear":
        weights = {"weight": [0.1, 1.0, 7.0]}
    else:
        weights = defaults(method, count)
    result = merged(method, [base] * (count + based), **weights)
    assert result.dtype == BF16 and np.array_equal(result, base)


def test_linear():
    a, b, c = tensors(2)
    assert np.array_equal(merged("linear", [a, b], weight=[1.0, 0.0]), a)
    mean = merged("linear", [a, b, c], weight=[0.2, 0.3, 0.5])
    np.testing.assert_allclose(
        mean, merged("linear", [c, a, b], weight=[0.5, 0.2, 0.3]), rtol=1e-6, atol=1e-7
    )
    np.testing.assert_allclose(
        mean, merged("linear", [a, b, c], weight=[2.0, 3.0, 5.0]), rtol=1e-6, atol=1e-7
    )
    exact = 0.2 * a.astype(np.float64) + 0.3 * b + 0.5 * c
    np.testing.assert_allclose(mean, exact, atol=1e-6)
    total = merged("linear", [a, b], weight=[0.5, 0.25], normalize=False)
    np.testing.assert_allclose(total, 0.5 * a + 0.25 * b, rtol=1e-6)
    with pytest.raises(TransformError, match="sum to 0"):
        merged("linear", [a, b], weight=[1.0, -1.0])


def test_dtypes_of_results():
    a, b, _ = (x.astype(BF16) for x in tensors(2))
    rounded_once = (0.25 * a.astype(np.float32) + 0.75 * b.astype(np.float32)).astype(BF16)
    assert np.array_equal(merged("linear", [a, b], weight=[0.25, 0.75]), rounded_once)
    assert merged("linear", [a, b.astype(np.float16)], weight=1.0).dtype == np.float32
    assert merged("ties", [a, b], weight=1.0, out_dtype=np.dtype(np.float16)).dtype == np.float16
    wide = [x.astype(np.float64) for x in (a, b)]
    assert merged("slerp", wide, t=0.5).dtype == np.float64
    with pytest.raises(TransformError, match="infinite in float16"):
        merged("linear", [1e5 * a, b], weight=1.0, out_dtype=np.dtype(np.float16))
    # A dtype rounds the inputs first.
    fine = tensors(1)
    rounded = [x.astype(BF16) for x in fine]
    assert np.array_equal(
        merged("ties", fine, weight=1.0, dtype=BF16), merged("ties", rounded, weight=1.0)
    )


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("method", METHODS)
def test_values_that_are_not_finite_are_refused_by_name(method, bad):
    count = METHODS[method].least + (METHODS[method].base == "needed")
    arrays = tensors(count - 1)
    arrays[-1][3, 4] = arrays[-1][20, 1] = bad
    sources = [f"model{i}: w" for i in range(count)]
    with pytest.raises(TransformError, match=f"^model{count - 1}: w has 2 of 1,200 values"):
        merged(method, arrays, sources=sources, block=7, **defaults(method, METHODS[method].least))


def test_slerp_on_the_sphere():
    a, b, _ = tensors(2, spread=3)
    assert np.array_equal(merged("slerp", [a, b], t=0.0), a)
    np.testing.assert_allclose(merged("slerp", [a, b], t=1.0), b, rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(
        merged("slerp", [a, b], t=0.3), merged("slerp", [b, a], t=0.7), rtol=1e-5, atol=1e-6
    )
    x, y = np.zeros((2, 4), np.float32), np.zeros((2, 4), np.float32)
    x[0, 0] = y[1, 1] = 2
    assert abs(np.linalg.norm(merged("slerp", [x, y], t=0.5)) - 2) < 1e-5
    # The threshold of the linear case is no step.
    below, above = (
        merged("slerp", [u, v], t=0.4)
        for c in (0.999499, 0.999501)
        for u, v in [(np.array([1, 0], np.float32), np.array([c, np.sqrt(1 - c * c)], np.float32))]
    )
    np.testing.assert_allclose(below, above, atol=2e-4)
    zero = np.zeros_like(a)
    assert np.isfinite(merged("slerp", [a, -a], t=0.5)).all()
    assert np.isfinite(merged("slerp", [a, zero], t=0.5)).all()


@pytest.mark.parametrize("method", ["multislerp", "karcher"])
def test_means_on_the_sphere_have_the_mean_norm_and_the_direction_between(method):
    rng = np.random.default_rng(1)
    a, b = (rng.normal(size=50).astype(np.float32) for _ in range(2))
    weights = {"weight": 1.0} if method == "multislerp" else {}
    middle = merged(method, [a, 2 * b], based=False, **weights)
    norms = np.linalg.norm(a), np.linalg.norm(2 * b)
    np.testing.assert_allclose(np.linalg.norm(middle), sum(norms) / 2, rtol=1e-5)
    half = a / np.linalg.norm(a) + b / np.linalg.norm(b)
    cosine = middle @ half / np.linalg.norm(middle) / np.linalg.norm(half)
    assert cosine > 1 - 1e-6
    assert np.array_equal(merged(method, [a], based=False, **weights), a)


def test_multislerp_without_a_direction_is_an_error():
    a = tensors(0)[0]
    x = np.array([[1, 0], [-0.5, np.sqrt(0.75)], [-0.5, -np.sqrt(0.75)]])
    with pytest.raises(TransformError, match="cancel out"):
        merged("multislerp", list(x), based=False, weight=1.0)
    assert np.allclose(merged("multislerp", [a, -a], based=False, weight=1.0), 0)


@pytest.mark.parametrize(
    "method", ["task_arithmetic", "dare_linear", "della_linear", "breadcrumbs"]
)
def test_deltas_without_drops_are_task_arithmetic(method):
    base, a, b, c = tensors(3)
    values = {"weight": [0.5, -0.2, 1.3], "lambda": 0.8}
    expected = base + 0.8 * (0.5 * (a - base) - 0.2 * (b - base) + 1.3 * (c - base))
    np.testing.assert_allclose(merged(method, [base, a, b, c], **values), expected, atol=1e-6)
    np.testing.assert_allclose(merged(method, [base, a], weight=1.0), a, atol=1e-6)
    assert np.array_equal(merged(method, [base, a], weight=0.0), base)


@pytest.mark.parametrize(("size", "density"), [(1, 0.3), (10, 0.05), (1000, 0.377), (7, 0.999)])
def test_ties_keeps_an_exact_number(size, density):
    rng = np.random.default_rng(0)
    delta = rng.normal(size=size).astype(np.float32)
    base = np.zeros(size, np.float32)
    result = merged("ties", [base, delta], weight=1.0, density=density)
    kept = max(1, int(density * size))
    assert np.count_nonzero(result) == kept
    assert set(np.flatnonzero(result)) == set(np.argsort(-np.abs(delta))[:kept])
    # Equal values: the first ones.
    ones = np.ones(size, np.float32)
    assert np.flatnonzero(
        merged("ties", [base, ones], weight=1.0, density=density)
    ).tolist() == list(range(kept))


def test_ties_elects_signs():
    zero, ones = np.zeros(4, np.float32), np.ones(4, np.float32)
    values = {"weight": 1.0, "density": 1.0}
    assert np.array_equal(merged("ties", [zero, ones, 3 * ones], **values), 2 * ones)
    assert np.array_equal(merged("ties", [zero, ones, -ones], **values), ones)  # ties are positive
    alone = np.array([0, 1, 0, 0], np.float32)
    assert np.array_equal(merged("ties", [zero, alone, zero, zero], **values), alone)


@pytest.mark.parametrize("size", [1, 2, 3, 10, 99, 1001])
def test_breadcrumbs_keeps_an_exact_number(size):
    delta = np.random.default_rng(0).normal(size=size).astype(np.float32)
    base = np.zeros(size, np.float32)
    order = np.argsort(-np.abs(delta))
    for density, gamma in itertools.product((0.3, 0.9), (0.0, 0.01, 0.5)):
        result = merged("breadcrumbs", [base, delta], weight=1.0, density=density, gamma=gamma)
        kept = int(density * size)
        dropped = min(int(gamma * size), size - kept)
        assert set(np.flatnonzero(result)) == set(order[dropped : dropped + kept])


def test_random_drops_keep_the_mean_and_do_not_depend_on_order():
    base = np.zeros(64, np.float32)
    delta = np.linspace(-1, 1, 64, dtype=np.float32)
    draws = np.stack(
        [merged("dare_linear", [base, delta], weight=1.0, density=0.3, seed=s) for s in range(500)]
    )
    error = draws.std(0) / np.sqrt(len(draws))
    # A rescaled delta also has the mean, up to the share of one value in the norm.
    assert (np.abs(draws.mean(0) - delta) <= 4 * error + 0.03 * np.abs(delta)).all()
    a, b = tensors(2)[1:]
    first = merged("dare_linear", [a, a + 1, b], weight=[0.4, 0.6], density=0.5, models=["x", "y"])
    other = merged("dare_linear", [a, b, a + 1], weight=[0.6, 0.4], density=0.5, models=["y", "x"])
    np.testing.assert_allclose(first, other, rtol=1e-6, atol=1e-6)
    assert not np.array_equal(
        first, merged("dare_linear", [a, a + 1, b], weight=[0.4, 0.6], density=0.5, seed=1)
    )


def test_della_prefers_large_values_and_takes_one_column():
    base = np.zeros((200, 100), np.float32)
    delta = np.tile(np.linspace(0.1, 1, 100, dtype=np.float32), (200, 1))
    values = {"weight": 1.0, "density": 0.5, "epsilon": 0.4, "rescale": False}
    kept = np.count_nonzero(merged("della_linear", [base, delta], **values), axis=0) / 200
    np.testing.assert_allclose(kept, np.linspace(0.1, 0.9, 100), atol=0.15)
    column = np.ones((500, 1), np.float32)
    result = merged("della", [0 * column, column], **values)
    assert 0.4 < np.count_nonzero(result) / 500 < 0.6
    with pytest.raises(TransformError, match="epsilon"):
        merged("della", [base, delta], weight=1.0, density=0.9)


def test_model_stock():
    rng = np.random.default_rng(0)
    base = rng.normal(size=(4, 8)).astype(np.float32)
    e = np.eye(32, dtype=np.float32).reshape(32, 4, 8)
    np.testing.assert_allclose(
        merged("model_stock", [base, base + e[0], base + e[1]]), base, atol=1e-6
    )
    same = base + e[0]
    np.testing.assert_allclose(merged("model_stock", [base, same, same]), same, atol=1e-6)
    assert np.array_equal(merged("model_stock", [base, base + e[0], base - e[0]]), base)
    # Three deltas with cosines of 0.5: a share of 0.75.
    models = [base + e[0] + e[i] for i in (1, 2, 3)]
    expected = base + 0.75 * (np.mean(models, axis=0) - base)
    np.testing.assert_allclose(merged("model_stock", [base, *models]), expected, atol=1e-4)


@pytest.mark.parametrize("kind", ["normal", "few values", "one value", "rising"])
def test_thresholds_of_large_tensors_are_exact(monkeypatch, kind):
    monkeypatch.setattr(merge_blocks, "_MOST_HELD", 2000)
    rng = np.random.default_rng(0)
    size = 150_000
    values = {
        "normal": rng.normal(size=size),
        "few values": rng.integers(-3, 4, size) / 8,
        "one value": np.full(size, 0.5),
        "rising": np.linspace(0, 1, size) ** 8,
    }[kind].astype(np.float32)
    order = np.argsort(-np.abs(values), kind="stable")
    for density in (0.003, 0.5, 0.97):
        result = merged("ties", [np.zeros_like(values), values + 0], weight=1.0, density=density)
        expected = np.zeros_like(values)
        kept = order[: int(density * size)]
        expected[kept] = values[kept]
        assert np.array_equal(result, expected)


def test_words_of_an_index_are_the_same_in_any_range():
    whole = merge_blocks.random_words("key", 0, 1000)
    assert all(
        np.array_equal(merge_blocks.random_words("key", a, b), whole[a:b])
        for a, b in [(0, 1), (1, 2), (7, 9), (8, 1000), (333, 777)]
    )
    assert abs(whole.mean() / 2**32 - 0.5) < 0.05
    assert not np.array_equal(whole, merge_blocks.random_words("other", 0, 1000))


def test_nearswap_moves_at_most_t():
    base, other = tensors(1, spread=1)
    moved = merged("nearswap", [base, other], t=0.2) - base
    assert np.abs(moved).max() <= 0.2 + 1e-6
    near = np.abs(other - base) < 0.2
    np.testing.assert_allclose(moved[near], (other - base)[near], atol=1e-6)
