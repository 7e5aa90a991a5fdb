"""What EK-FAC at full size takes: counts against closed forms and against arrays of a small fit; the page has the table."""

import pathlib

import numpy as np
import pytest

from espalier.launch.papers.influence import plan
from espalier.trainers.influence.sites import Site
from tests.drawn import drawn

WIDTH, HIDDEN, LAYERS = 4096, 14336, 32


def site(path, inputs, outputs, **settings):
    return Site(path=path, parameter=path, inputs=inputs, outputs=outputs, **settings)


def gated(width, hidden, **lead):
    sizes = {"gate": (width, hidden), "up": (width, hidden), "down": (hidden, width)}
    return {name: site(name, *sides, **lead) for name, sides in sizes.items()}


def test_counts_are_the_closed_forms_of_a_gated_mlp():
    """A matrix of width d and hidden width f, 3 in each of 32 layers, two blocks."""
    model = plan.Model(8_000_000_000, gated(WIDTH, HIDDEN, layers=LAYERS), 5e10)
    got = plan.plan(model, blocks=2)
    d, f, matrices = WIDTH, HIDDEN, 3 * LAYERS
    assert got.weights == matrices * d * f == 5_637_144_576
    assert got.eigenvectors_whole == 4 * matrices * (d**2 + f**2)
    assert got.eigenvectors == 4 * matrices * (d**2 + f**2) / 2
    assert got.eigenvalues == got.query_whole == 4 * matrices * d * f
    assert got.query == 2 * matrices * 64 * (d + f)
    assert got.factors == 4 * matrices * (d**2 + f**2 + d * f)
    assert got.decompositions == 9 * matrices * 2 * ((d / 2) ** 3 + (f / 2) ** 3)
    tokens = 100_000 * 512
    assert got.fit_passes == 2 * 5e10 * tokens
    assert got.covariances == 2 * matrices * (d**2 + f**2) / 2 * tokens
    assert got.squares == got.covariances + 2 * matrices * d * f * tokens
    scanned = 5_000_000 * 512
    assert got.score_pass == 5e10 * scanned
    assert got.score_products == 2 * 100 * 64 * matrices * (d + f) * scanned
    assert got.scores == 4 * 5_000_000 * 100
    per_second = 0.4 * 197e12
    hours = (got.score_pass + got.score_products) / per_second / 3600
    assert got.score_hours == pytest.approx(hours)
    assert got.decomposition_minutes == pytest.approx(got.decompositions / 1.6e12 / 60)


def test_experts_are_all_stored_and_only_chosen_ones_compute():
    dense = plan.plan(plan.Model(0, gated(8, 12, layers=3), 0.0), blocks=1)
    experts = plan.plan(plan.Model(0, gated(8, 12, layers=3, experts=4), 0.0), blocks=1, top_k=1)
    for name in ("weights", "eigenvectors", "eigenvalues", "query_whole", "query"):
        assert getattr(experts, name) == 4 * getattr(dense, name)
    for name in ("covariances", "squares", "score_products"):
        assert getattr(experts, name) == getattr(dense, name)
    # No side is above the rank: a query's gradients stay whole.
    assert dense.query == 2 * 3 * 3 * 8 * 12


def test_sizes_are_those_of_the_arrays_of_a_fit(tmp_path):
    import flax.linen as nn
    import jax.numpy as jnp

    from espalier.model.config import TransformerConfig
    from espalier.model.transformer import Transformer
    from espalier.trainers.influence import files, sites
    from espalier.trainers.influence import fit as stages
    from espalier.trainers.scoring.scoring import Row

    config = TransformerConfig(vocab_size=13, num_layers=2, embed_dim=6, num_heads=1, mlp_dim=9)
    model = Transformer(config=config)
    params = nn.meta.unbox(drawn(model, jnp.zeros((1, 4), jnp.int32)))
    reader = stages.Reader(model=model, params=params, batch_size=2)
    rows = [Row(context=[0], targets=[3, 4, 5]), Row(context=[0], targets=[1, 2])]
    stages.fit(reader, tmp_path, lambda: rows, stages.FitSettings(blocks=2))
    got = plan.plan(plan.Model(0, sites.select(model, params), 0.0), blocks=2)
    eigen, squares = (
        files.by_site(files.read(tmp_path / stage)[0]) for stage in ("eigen", "squares")
    )
    stored = sum(own[name].nbytes for own in eigen.values() for name in ("qa", "qs"))
    assert got.eigenvectors == stored
    assert got.eigenvalues == sum(np.asarray(own["squares"]).nbytes for own in squares.values())


def test_the_docs_have_the_tables():
    """The models' shapes are read; 4 experts of 590M are chosen one at a time."""
    text = pathlib.Path("docs/use/influence_costs.md").read_text()
    assert "\n".join(plan.full_table()) in text
    assert "\n".join(plan.full_table(plan.PYTHIA, plan.STEPS)) in text
    btx = pathlib.Path("t5x_configs/methods/bam/btx.gin").read_text()
    assert f"TOP_K = {plan.SIZES[2].top_k}\n" in btx
