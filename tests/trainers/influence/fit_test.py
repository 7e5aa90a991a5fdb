"""Fits on a mesh and in two processes, labels of two seeds over thousands of documents, and drawn labels."""

import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import re

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.config import TransformerConfig
from espalier.model.kernels.vocab_logits import LogitForm
from espalier.model.moe.moe import MoeMlp
from espalier.model.transformer import Block, Transformer
from espalier.trainers import partitioning
from espalier.trainers.influence import (
    conjugate,
    documents,
    files,
    fit,
    kronecker,
    queries,
    scores,
    sites,
    spread,
    sweep,
)
from espalier.trainers.influence.backward import sampled_labels
from espalier.trainers.influence.consumers import Squares
from espalier.trainers.influence.fit import FitSettings, Reader
from espalier.trainers.scoring.scoring import Row

V = 11
ROOT = pathlib.Path(__file__).parents[3]


def made(*, block=Block, **settings):
    config = dict(vocab_size=V, num_layers=2, embed_dim=8, num_heads=2, mlp_dim=8)
    return Transformer(config=TransformerConfig(**{**config, **settings}), block=block)


def drawn_params(model):
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
    r = np.random.default_rng(0)
    return jax.tree.map(
        lambda x: jnp.asarray(r.normal(size=x.shape) * 0.5, jnp.float32),
        nn.meta.unbox(shapes)["params"],
    )


@pytest.fixture(scope="module")
def model():
    return made()


@pytest.fixture(scope="module")
def params(model):
    return drawn_params(model)


@pytest.fixture(scope="module")
def one_device(model, params, tmp_path_factory):
    """A reader of one device and a folder of stages, which the first that asks fits."""
    return Reader(model=model, params=params, batch_size=16), tmp_path_factory.mktemp("one")


def texts(count, seed):
    r = np.random.default_rng(seed)
    return [
        Row(context=[0], targets=r.integers(1, V, r.integers(2, 12)).tolist()) for _ in range(count)
    ]


def scored(reader, folder, settings, documents, asked, rank=None):
    fit.fit(reader, folder, lambda: documents, settings, total=len(documents))
    chosen = sites.select(reader.model, reader.params)
    curvature = fit.read_curvature(folder, chosen, "ekfac", kronecker.Damping(0.1), reader=reader)
    ready = queries.prepare(
        reader, chosen, asked, curvature, rank=rank, store_dtype="float32", sample=documents[:8]
    )
    rows = scores.score(reader, chosen, ready, documents[:64])
    return np.array([one.scores for one in rows])


def test_labels_of_two_seeds_give_alike_scores(model, params, tmp_path):
    """Over 2,000 documents, at Pearson 0.95 or more."""
    reader = Reader(model=model, params=params, batch_size=64)
    documents, asked = texts(2000, 1), texts(4, 2)
    first, second = (
        scored(reader, tmp_path / str(seed), FitSettings(seed=seed), documents, asked)
        for seed in (0, 1)
    )
    for a, b in zip(first.T, second.T, strict=True):
        assert np.corrcoef(a, b)[0, 1] >= 0.95
    assert not np.array_equal(first, second)


@pytest.mark.parametrize(
    ("shape", "rules", "rank"),
    [({"data": 8}, "dp", None), ({"fsdp": 4, "tensor": 2}, "fsdp_tp", 3)],
)
def test_a_mesh_and_other_batches_change_nothing(
    model, params, one_device, tmp_path, shape, rules, rank
):
    """Sums are split over the mesh, and its devices decompose the covariances."""
    documents, asked = texts(40, 3), texts(3, 4)
    settings = FitSettings(blocks=2)
    want = scored(*one_device, settings, documents, asked, rank)
    mesh = partitioning.make_mesh(shape=shape)
    with partitioning.use_mesh(mesh, partitioning.rules_named(rules)):
        sharding = partitioning.batch_sharding(mesh, partitioning.rules_named(rules))
        many = Reader(model=model, params=params, batch_size=8, sharding=sharding)
        got = scored(many, tmp_path, settings, documents, asked, rank)
    own, other = (files.read(path / "covariances")[0] for path in (one_device[1], tmp_path))
    for name, array in own.items():
        np.testing.assert_allclose(other[name], array, rtol=0, atol=2e-6 * np.abs(array).max())
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_a_mixture_on_a_mesh_that_splits_experts_has_the_same_scores(tmp_path):
    mixture = functools.partial(MoeMlp, num_experts=4, top_k=2)
    block = functools.partial(Block, mlp=mixture)
    model = made(num_layers=1, scan_layers=False, block=block)
    params, documents, asked = drawn_params(model), texts(40, 3), texts(3, 4)
    one = Reader(model=model, params=params, batch_size=8)
    want = scored(one, tmp_path / "one", FitSettings(), documents, asked)
    mesh = partitioning.make_mesh(shape={"data": 4, "expert": 2})
    with partitioning.use_mesh(mesh, partitioning.rules_named("ep")):
        sharding = partitioning.batch_sharding(mesh, partitioning.rules_named("ep"))
        many = dataclasses.replace(one, sharding=sharding)
        got = scored(many, tmp_path / "many", FitSettings(), documents, asked)
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    chosen = sites.select(model, params)
    counts = [fit.tokens_of_experts(tmp_path / name, chosen) for name in ("one", "many")]
    assert counts[0] == counts[1] and set(counts[0]) == set(chosen)


def test_the_fewest_and_most_tokens_of_an_expert_are_those_of_all_layers(tmp_path):
    site = sites.Site(path="mlp/up/kernel", inputs=2, outputs=2, layers=2, experts=3)
    chosen = {site.path: site, "dense": sites.Site(path="dense", inputs=2, outputs=2)}
    counts = {f"{site.path}:count": np.array([[3.0, 9, 4], [5, 0, 7]]), "dense:count": np.ones(())}
    files.write(tmp_path / "covariances", counts, {})
    assert fit.tokens_of_experts(tmp_path, chosen) == {site.path: [0, 9]}


def test_in_float64_batches_and_the_order_of_documents_change_nothing(tmp_path):
    """Documents alone, or all of them as a batch of longer rows; labels are drawn. Scores of layers add up."""
    r = np.random.default_rng(8)
    documents = [
        Row(context=[0], targets=r.integers(1, V, length).tolist())
        for length in (20, 3, 9, 14, 2, 12, 5, 18) * 3
    ]
    stages, table = {}, {}
    with jax.enable_x64(True):
        model = made(num_layers=1, dtype="float64", param_dtype="float64")
        params = jax.tree.map(lambda x: x.astype(jnp.float64), drawn_params(model))
        chosen = sites.select(model, params)
        settings = FitSettings(factor_dtype="float64")
        for size in (24, 1):
            reader, folder = (
                Reader(model=model, params=params, batch_size=size),
                tmp_path / str(size),
            )
            fit.fit(reader, folder, lambda: documents, settings)
            stages[size] = [files.read(folder / name)[0] for name in ("covariances", "squares")]
            curvature = fit.read_curvature(folder, chosen, "ekfac", kronecker.Damping(0.1))
            ready = queries.prepare(
                *(reader, chosen, documents[:2], curvature), rank=None, dtype="float64"
            )
            rows = scores.score(
                *(reader, chosen, ready, documents), per_layer=True, dtype="float64"
            )
            table[size] = [*rows]
        turned = [*scores.score(reader, chosen, ready, documents[::-1], dtype="float64")]
    for many, alone in zip(stages[24], stages[1], strict=True):
        for name, array in many.items():
            atol = 1e-10 * np.abs(array).max()
            np.testing.assert_allclose(alone[name], array, rtol=0, atol=atol, err_msg=name)
    got, want = (np.array([one.scores for one in table[size]]) for size in (1, 24))
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-10 * np.abs(want).max())
    # A document alone is the same program with the same input, wherever it is among the documents.
    np.testing.assert_array_equal([one.scores for one in turned[::-1]], got)
    for one in table[1]:
        layers = sum(np.reshape(x, (-1, 2)).sum(0) for x in one.layers.values())
        np.testing.assert_allclose(layers, one.scores, atol=1e-10 * np.abs(want).max())


def fit_in_a_process(folder):
    """Fits and scores on the devices of all processes; called by each process of the next test."""
    model = made()
    params = jax.tree.map(np.asarray, drawn_params(model))
    mesh = partitioning.make_mesh(shape={"fsdp": 2, "tensor": 2})
    rules = partitioning.rules_named("fsdp_tp")
    with partitioning.use_mesh(mesh, rules):
        reader = Reader(
            model=model,
            params=None,
            batch_size=8,
            sharding=partitioning.batch_sharding(mesh, rules),
        )
        reader = dataclasses.replace(reader, params=jax.device_put(params, reader.whole))
        return scored(reader, folder, FitSettings(blocks=2), texts(40, 3), texts(3, 4), rank=3)


@pytest.mark.multiprocess
def test_two_processes_fit_as_one_does(two_processes, one_device, tmp_path):
    """They read what the first one writes, and save when it does, whatever their own clocks say."""
    script = """
        import pathlib, sys
        import jax, numpy as np
        folder, index, port = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.config.update("jax_default_matmul_precision", "highest")
        jax.distributed.initialize(f"127.0.0.1:{port}", 2, index)
        from tests.trainers.influence import fit_test
        from espalier.trainers.influence import documents
        documents.BATCHES_SORTED = 2
        fit_test.fit.SAVE_SECONDS = (-1.0, 1e9)[index]
        np.save(folder / f"scores{index}.npy", fit_test.fit_in_a_process(folder / "two"))
        print("fine", index)
    """
    two_processes(script)
    want = scored(*one_device, FitSettings(blocks=2), texts(40, 3), texts(3, 4), rank=3)
    folders = one_device[1], tmp_path / "two"
    own, other = (files.read(folder / "covariances")[0] for folder in folders)
    for name, array in own.items():
        np.testing.assert_allclose(other[name], array, rtol=0, atol=2e-6 * np.abs(array).max())
    own, other = (files.read(folder / "eigen")[0] for folder in folders)
    for name in own:
        assert other[name].dtype == own[name].dtype
        if name.endswith((":la", ":ls")):
            assert own[name].dtype == np.float64
            atol = 1e-5 * own[name].max()
            np.testing.assert_allclose(other[name], own[name], rtol=0, atol=atol)
    for i in range(2):
        got = np.load(tmp_path / f"scores{i}.npy")
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    assert {path.name for path in (tmp_path / "two").iterdir()} == set(fit.STAGES)


def test_modules_that_are_fitted_apart_have_the_same_factors(model, params, tmp_path):
    documents = texts(24, 5)
    reader = Reader(model=model, params=params, batch_size=8)
    parts = {"both": ("mlp",), "wide": (".*/mlp/(gate|up)",), "down": (".*/mlp/down",)}
    stages = {}
    for name, modules in parts.items():
        settings = FitSettings(modules=modules)
        fit.fit(reader, tmp_path / name, lambda: documents, settings)
        stages[name] = {s: files.read(tmp_path / name / s)[0] for s in fit.STAGES}
    for stage, both in stages["both"].items():
        apart = stages["wide"][stage] | stages["down"][stage]
        assert set(apart) == set(both) and not set(stages["wide"][stage]) >= set(both)
        for name, array in both.items():
            np.testing.assert_allclose(apart[name], array, rtol=1.3e-6, atol=1e-5)


def test_scores_of_rank_32_correlate_with_uncompressed_ones(tmp_path):
    """At Pearson 0.99 or more, where 32 is less than the rank of every matrix."""
    model = made(num_layers=1, embed_dim=48, mlp_dim=64)
    reader = Reader(model=model, params=drawn_params(model), batch_size=32)
    documents, asked = texts(64, 6), texts(3, 7)
    fit.fit(reader, tmp_path, lambda: documents, FitSettings())
    chosen = sites.select(model, reader.params)
    curvature = fit.read_curvature(tmp_path, chosen, "ekfac", kronecker.Damping(0.1))
    by_rank, pearson = {}, {}
    for rank in (32, None):
        ready = queries.prepare(reader, chosen, asked, curvature, rank=rank, sample=documents)
        rows = scores.score(reader, chosen, ready, documents)
        by_rank[rank] = np.array([one.scores for one in rows]).T
        pearson[rank] = ready.pearson
    for low, full, measured in zip(by_rank[32], by_rank[None], pearson[32], strict=True):
        assert 0.99 <= np.corrcoef(low, full)[0, 1] < 1
        assert measured == pytest.approx(np.corrcoef(low, full)[0, 1], abs=1e-5)
    assert np.isnan(pearson[None]).all()


@pytest.mark.parametrize("call", ["rmtree", "replace"])
def test_a_stop_while_a_sum_is_saved_leaves_the_one_before(tmp_path, monkeypatch, call):
    """At each deletion and each renaming."""
    module = {"rmtree": files.shutil, "replace": files.os}[call]
    original = getattr(module, call)
    for last in range(3):
        folder = tmp_path / str(last) / "sum"
        files.write(folder, {"x": np.arange(3)}, {"read": 1})
        calls = []

        def stop(*arguments, last=last, calls=calls, **settings):
            calls.append(arguments)
            if len(calls) > last:
                raise KeyboardInterrupt
            return original(*arguments, **settings)

        with monkeypatch.context() as patch:
            patch.setattr(module, call, stop)
            with contextlib.suppress(KeyboardInterrupt):
                files.write(folder, {"x": np.arange(4)}, {"read": 2})
        assert files.exists(folder)
        arrays, record = files.read(folder)
        assert len(arrays["x"]) == 2 + record["read"]
        files.write(folder, {"x": np.arange(5)}, {"read": 3})
        assert files.read(folder)[1]["read"] == 3
        assert [path.name for path in folder.parent.iterdir()] == ["sum"]
        files.remove(folder)
        assert not files.exists(folder)


def test_a_changed_number_of_a_record_is_found(tmp_path):
    folder = tmp_path / "sum"
    files.write(folder, {"x": np.arange(3)}, {"read": 12, 3: (0.1, None)})
    assert files.read(folder)[1]["read"] == 12
    path = folder / files.RECORD
    whole = path.read_text()
    path.write_text(whole.replace("12", "13"))
    for read in (files.read, files.read_record):
        with pytest.raises(files.StageError, match=r"record\.json is damaged"):
            read(folder)
    # A stage of an earlier version has none.
    earlier = json.loads(whole)
    del earlier["record_sha256"]
    path.write_text(json.dumps(earlier))
    assert files.read(folder)[1]["read"] == 12


def test_each_device_has_a_part_of_every_sum():
    """Rows are split over as many devices as divide them."""
    mesh = partitioning.make_mesh(shape={"fsdp": 4, "tensor": 2})
    for shape, parts in (
        ((2, 1, 16, 16), 8),
        ((2, 6, 8), 8),
        ((2, 4, 3), 4),
        ((5, 7), 1),
        ((8,), 1),
    ):
        array = jax.device_put(jnp.zeros(shape), spread.sharding(mesh, shape))
        assert {x.data.size for x in array.addressable_shards} == {array.size // parts}


def test_each_device_decomposes_some_matrices(tmp_path, monkeypatch):
    """Stacks are decomposed as on one device, and a covariance that is not finite is named. Both sides have other blocks."""
    r = np.random.default_rng(0)
    x, y = r.normal(size=(3, 1, 6, 20)), r.normal(size=(3, 2, 4, 20))
    sums = {"mlp:a": x @ np.swapaxes(x, -1, -2), "mlp:s": y @ np.swapaxes(y, -1, -2)}
    sums["mlp:count"] = np.array([7.0, 0, 2])
    files.write(tmp_path / "covariances", sums, {})
    used = []
    eigh = fit._eigh
    monkeypatch.setattr(fit, "_eigh", lambda device: used.append(device) or eigh(device))
    settings = {"dtype": np.float64, "stored": np.float64}
    stages = {}
    for name, devices in (("one", None), ("mesh", jax.devices()[:4])):
        fit.write_eigen(tmp_path / "covariances", tmp_path / name, devices=devices, **settings)
        stages[name] = files.read(tmp_path / name)[0]
    assert used[:9] == [fit._DEVICE] * 9
    # Threads of a round begin in any order.
    rounds = (used[9:13], used[13:17], used[17:])
    assert [*map(set, rounds)] == [{*jax.devices()[:4]}] * 2 + [{*jax.devices()[:1]}]
    want = kronecker.eigendecomposition(files.by_site(sums)["mlp"], name="", dtype=np.float64)
    for name, array in want.items():
        np.testing.assert_array_equal(stages["one"][f"mlp:{name}"], array)
        np.testing.assert_allclose(np.abs(stages["mesh"][f"mlp:{name}"]), np.abs(array), atol=1e-12)
    for name in stages:
        values, vectors = (stages[name][f"mlp:{kind}a"] for kind in "lq")
        rebuilt = (vectors * values[..., None, :]) @ np.swapaxes(vectors, -1, -2)
        mean = sums["mlp:a"] / np.array([7.0, 1, 2])[:, None, None, None]
        np.testing.assert_allclose(rebuilt, mean, atol=1e-12)
    sums["mlp:s"][1, 1, 0, 0] = np.inf
    files.write(tmp_path / "covariances", sums, {})
    with pytest.raises(kronecker.FactorError, match="covariance 's' of mlp is not finite"):
        fit.write_eigen(
            tmp_path / "covariances", tmp_path / "x", devices=jax.devices()[:4], **settings
        )
    assert not files.exists(tmp_path / "x")


def test_parts_of_stored_tensors_are_those_of_arrays(tmp_path):
    r = np.random.default_rng(0)
    arrays = {"x": r.normal(size=(2, 3, 4, 5)).astype(np.float32), "y": r.normal(size=(4, 5))}
    arrays |= {"v": np.arange(4), "n": np.array(3.0), "w": arrays["y"].astype(jnp.bfloat16)}
    files.write(tmp_path / "stage", arrays, {})
    indices = [(), (1,), (slice(1, 2),), (1, slice(0, 2)), (slice(None), 2, slice(1, 3))]
    indices += [
        (0, 1, slice(2, 4), slice(1, 4)),
        (slice(0, 2), slice(None), slice(3, 4), slice(0, 0)),
    ]
    with files.opened(tmp_path / "stage") as (tensors, _):
        for name, array in arrays.items():
            np.testing.assert_array_equal(np.asarray(tensors[name]), array)
            for index in indices[: 3 + 4 * (array.ndim > 2)] if array.ndim else indices[:1]:
                got = tensors[name][index]
                np.testing.assert_array_equal(got, array[index], err_msg=f"{name} {index}")
                assert got.shape == array[index].shape and got.dtype == array.dtype


@pytest.mark.multiprocess
def test_no_process_has_an_array_of_all_processes_twice(processes):
    """Of four processes, none takes more than 1.5 arrays to gather one, and half an array to write, read or decompose it."""
    script = """
        import pathlib, resource, sys
        import jax, numpy as np
        folder, index, port = pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"127.0.0.1:{port}", 4, index)
        from espalier.trainers import partitioning
        from espalier.trainers.influence import files, fit, spread
        mesh = partitioning.make_mesh(shape={"fsdp": 8})
        reader = fit.Reader(model=None, params=None, batch_size=1,
                            sharding=jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec()))
        fit._eigh = lambda device: lambda x: (x[..., 0], x)
        spread._LARGE = 0

        def grown(call, array_bytes):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            result = call()
            return result, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024 / array_bytes

        for layers, size in ((2, 64), (128, 512)):  # the first one only warms up
            nbytes = 4 * layers * size * size
            own = np.broadcast_to(np.arange(size, dtype=np.float32), (layers, 1, size, size))
            own = own + own.swapaxes(-1, -2) if layers == 2 else own
            x, placed = grown(lambda: reader.place_spread(own), nbytes)
            path = folder / str(layers)
            arrays = {"m:a": x, "m:s": x, "m:count": np.ones(layers)}
            _, written = grown(lambda: files.write(path, arrays, {}), nbytes)
            devices = [*mesh.devices.flat]
            call = lambda: fit.write_eigen(path, folder / f"eigen{layers}", devices=devices,
                                           dtype=np.float32, stored=np.float32)
            _, decomposed = grown(call, nbytes)
            with files.opened(path) as (tensors, _):
                again, read = grown(lambda: reader.place_spread(tensors["m:a"]), nbytes)
            same = all(np.array_equal(a.data, b.data) for a, b in
                       zip(x.addressable_shards, again.addressable_shards))
            host, gathered = grown(lambda: spread.on_host(x), nbytes)
            assert same and np.array_equal(host, own)
        sizes = dict(placed=placed, written=written, decomposed=decomposed, read=read, gathered=gathered)
        print(index, sizes)
        assert gathered < 1.5, sizes
        assert max(placed, read, written, decomposed) < 0.5, sizes
        if index == 0:
            vectors = files.read(folder / "eigen128")[0]["m:qa"]
            assert np.array_equal(vectors, (own + own.swapaxes(-1, -2)) / 2)
        print("fine", index)
    """
    processes(script, count=4)


def test_drawn_labels_have_the_probabilities_of_the_model():
    r = np.random.default_rng(0)
    hidden = jnp.asarray(np.tile(r.normal(size=(1, 1, 4)), (1000, 16, 1)), jnp.float32)
    head = jnp.asarray(r.normal(size=(V, 4)), jnp.float32)
    labels = jax.jit(lambda ids: sampled_labels(LogitForm(), hidden, head, ids, jax.random.key(0)))
    drawn = np.asarray(labels(jnp.arange(1000)))
    share = np.bincount(drawn.reshape(-1), minlength=V) / drawn.size
    want = np.asarray(jax.nn.softmax(hidden[0, 0] @ head.T))
    # Four standard errors of 16,000 draws.
    np.testing.assert_allclose(share, want, atol=4 * np.sqrt(0.25 / drawn.size))
    turned = np.asarray(labels(jnp.arange(1000)[::-1]))
    np.testing.assert_array_equal(turned[::-1], drawn)
    assert drawn.min() >= 0 and drawn.max() < V


@pytest.mark.parametrize("on_mesh", [False, True])
def test_inner_products_are_sums_in_float64_without_the_flag(on_mesh):
    """Of large products that nearly cancel, in float32: the error is that of float64."""
    assert not jax.config.jax_enable_x64
    r = np.random.default_rng(0)
    x, y = r.normal(size=(2, 2, 64, 512)).astype(np.float32)
    pair = [np.concatenate([x, x]) * 1e3, np.concatenate([y, np.nextafter(-y, np.float32(9))])]
    want = math.fsum((pair[0].astype(np.float64) * pair[1].astype(np.float64)).reshape(-1))
    size = np.abs(pair[0].astype(np.float64) * pair[1]).sum()
    mesh = partitioning.make_mesh(shape={"fsdp": 8})
    place = jnp.asarray
    if on_mesh:
        place = functools.partial(jax.device_put, device=spread.sharding(mesh, pair[0].shape))
    got = conjugate.dot({"m": place(pair[0])}, {"m": place(pair[1])})
    assert abs(got - want) <= 1e-15 * size
    rounded = float(np.sum(pair[0] * pair[1]))
    assert abs(rounded - want) > 1e-11 * size


def test_rotations_and_gauss_newton_products_have_the_precision_of_the_setting(model, params):
    """Products on accelerators: those of the model's own passes stay as they are."""
    site = sites.Site(path="m", inputs=4, outputs=3)
    q = {"qa": jnp.eye(4)[None], "qs": jnp.eye(3)[None]}
    a, g, v = jnp.ones((2, 5, 4)), jnp.ones((2, 5, 3)), jnp.ones((4, 3))
    chosen = sites.select(model, params)
    zeros = {p: jnp.zeros((*s.lead, s.inputs, s.outputs)) for p, s in chosen.items()}
    arrays = documents.columns(texts(2, 1), [0, 1], 2, 16)

    def precisions(function, *arguments):
        text = str(jax.make_jaxpr(function)(*arguments))
        return set(re.findall(r"precision=\(?(?:Precision\.)?(\w+)", text))

    for setting in ("highest", "default"):
        squares = Squares(1, "float32", setting)
        curvature = kronecker.Curvature(
            sites={"m": site}, eigen={"m": q}, inverse={"m": v}, damping={}, precision=setting
        )
        product = conjugate.gauss_newton(model, chosen, setting)
        with jax.default_matmul_precision("default"):
            got = [
                precisions(lambda a, g, s=squares: s.dense(a, g, jnp.ones((2, 5)), q), a, g),
                precisions(lambda v, c=curvature: c({"m": v}, batched=False), v),
                precisions(lambda z, p=product: p(params, arrays, z), zeros),
            ]
        assert all(("HIGHEST" in own) == (setting == "highest") for own in got), got


def test_own_halves_are_ranked_with_each_damping(model, params, tmp_path, monkeypatch):
    """As by a curvature of that damping; documents of three tokens are ranked, but are no queries."""
    documents = texts(20, 9) + [Row(context=[0], targets=[3, 4, 5])]
    reader = Reader(model=model, params=params, batch_size=8)
    chosen = sites.select(model, params)
    fit.fit(reader, tmp_path, lambda: documents, FitSettings())
    compression = queries.Compression
    monkeypatch.setattr(queries, "Compression", lambda *_: compression(None, "float32"))
    got = sweep.recalls(reader, tmp_path, chosen, documents[::-1], asked=6)
    asked = [i for i, row in enumerate(documents[::-1]) if len(row.targets) >= 4][:6]
    halves = [sweep.halved(documents[::-1][i]) for i in asked]
    assert [one.damping for one in got] == [None, *sweep.DAMPINGS]
    for one in got:
        curvature = one.damping and fit.read_curvature(
            tmp_path, chosen, "ekfac", kronecker.Damping(one.damping)
        )
        ready = queries.prepare(reader, chosen, halves, curvature, rank=None)
        rows = scores.score(reader, chosen, ready, documents[::-1])
        own = np.array([one.scores for one in rows])
        want = [1 + (own[:, q] > own[i, q]).sum() for q, i in enumerate(asked)]
        np.testing.assert_array_equal(one.ranks, want)
        assert one.first == np.mean(np.array(want) == 1)
    assert not sweep.recalls(reader, tmp_path, chosen, documents, asked=0)
    assert sweep.table([], 3) == []
