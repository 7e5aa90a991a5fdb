"""The scores of a tiny model on a tiny corpus, and the losses of models that are read beside it."""

import contextlib
import json
import types

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from espalier.data.tokenizers import vocabularies
from espalier.launch.load import load_run
from espalier.launch.papers.influence import (
    completions,
    corpus,
    losses,
    scoring,
    small_corpus,
    statistics,
)
from espalier.model.config import TransformerConfig
from espalier.model.transformer import Transformer
from espalier.trainers.checkpoints import state_tree
from espalier.trainers.influence import conjugate, projections
from espalier.trainers.influence import documents as documents_of
from espalier.trainers.influence import sites as site_list

SIZES = dict.fromkeys(small_corpus.SIZES, 6)
LINES = [f"line {i} of some real text." for i in range(10)]


@pytest.fixture(scope="module")
def loaded():
    config = TransformerConfig(vocab_size=64, num_layers=1, embed_dim=8, num_heads=2, mlp_dim=8)
    model = Transformer(config=config)
    made = jax.jit(lambda key: model.init(key, jnp.zeros((1, 4), jnp.int32)))(jax.random.key(0))
    return types.SimpleNamespace(
        model=model,
        params=nn.meta.unbox(made)["params"],
        vocabulary=vocabularies.characters(symbols=small_corpus.SYMBOLS),
        context=lambda tokens: [0, *tokens],
    )


@pytest.fixture(scope="module")
def scored(loaded, tmp_path_factory):
    """(folder of the corpus, folder of its scores)."""
    source, target = (tmp_path_factory.mktemp(name) for name in ("corpus", "scores"))
    patch = pytest.MonkeyPatch()
    settings = {"FITTED": 30, "CG_STEPS": 2, "CG_DOCUMENTS": 8, "BATCH": 64, "PROJECTION": 4}
    for name, value in settings.items():
        patch.setattr(scoring, name, value)
    patch.setattr(statistics, "TOP", 4)
    corpus.write(source, LINES, 3, sizes=SIZES, queries=2)

    scored_by(loaded, source, target, rankings_alone=False)
    yield source, target
    patch.undo()


def scored_by(loaded, source, target, **flags):
    class Start:
        flags = types.SimpleNamespace(
            **{"to": str(target), "corpus": str(source), "seed": 3, "checkpoint": "run"},
            params="auto",
        )

        def __call__(self):
            return types.SimpleNamespace(
                load=lambda *args, **settings: contextlib.nullcontext(loaded)
            )

    vars(Start.flags).update(flags)
    scoring.run(Start())


def test_rankings_alone_are_those_without_conjugate_gradients(loaded, scored, tmp_path):
    source, target = scored
    scored_by(loaded, source, tmp_path, rankings_alone=True)
    whole, alone = (json.loads((x / scoring.RECORD).read_text()) for x in (target, tmp_path))
    assert set(whole["methods"]) - set(alone["methods"]) == {"ekfac_cg"}
    for method, one in alone["methods"].items():
        for name in ("correlations", "separation"):
            found, want = (pd.json_normalize(x[name]) for x in (one, whole["methods"][method]))
            np.testing.assert_allclose(found, want, atol=0.02)  # scores are float32, and few
    assert set(alone["masses"]) == {*scoring.GRADIENTS} - {"ekfac_cg"}
    assert not list(tmp_path.glob("without_*"))


def test_every_method_scores_all_documents_for_all_queries(loaded, scored):
    source, target = scored
    documents = corpus.read_documents(source)
    with np.load(target / scoring.SCORES) as arrays:
        every = dict(arrays)
    assert set(every) == set(scoring.METHODS)
    assert {x.shape for x in every.values()} == {(len(documents), 6)}
    assert all(np.isfinite(x).all() for x in every.values())
    # The cosine divides the dot product by both norms: their products are a matrix of rank one.
    lengths = every["identity"] / every["cosine"]
    np.testing.assert_allclose(
        lengths, np.outer(lengths[:, 0], lengths[0]) / lengths[0, 0], rtol=1e-3
    )
    assert (lengths > 0).all() and np.abs(every["cosine"]).max() <= 1 + 1e-5
    for one, other in (("ekfac", "identity"), ("ekfac_cg", "ekfac"), ("kfac", "ekfac")):
        assert not np.allclose(every[one], every[other], rtol=1e-3)
    record = json.loads((target / scoring.RECORD).read_text())
    assert set(record["methods"]) == set(scoring.METHODS)
    sources = {small_corpus.FACT, *sum(map(small_corpus.names, small_corpus.PROCEDURES), ())}
    assert set(record["answered"]) == set(record["nats"]) == sources
    assert record["parameters"] == sum(x.size for x in jax.tree.leaves(loaded.params))
    assert all(value > 1 for value in record["nats"].values())  # the model has learned nothing


def test_trak_is_of_projected_gradients_and_embeddings_of_mean_states(loaded, scored):
    """Against gradients by autodiff and states of one text at a time."""
    source, target = scored
    documents, queries = corpus.read_documents(source), corpus.read_queries(source)
    rows = [completions.document_row(loaded, one) for one in documents]
    asked = [completions.query_row(loaded, one) for one in queries]
    sites = site_list.select(loaded.model, loaded.params, ("mlp",))
    own = projections.projections(sites, 4, seed=3)

    def loss(weights, batch):
        params = conjugate.with_changed(loaded.params, weights)
        log_probs = jax.nn.log_softmax(conjugate.logits_of(loaded.model, params, batch))
        picked = jnp.take_along_axis(log_probs, batch["decoder_target_tokens"][..., None], -1)
        return -(picked[..., 0] * batch["decoder_loss_weights"]).sum()

    weights = {path: state_tree.flatten(loaded.params)[path] for path in sites}
    gradient = jax.jit(jax.grad(loss))

    def features(row):
        found = gradient(weights, documents_of.columns([row], [0], 1, 64))
        return sum(
            np.einsum("lxy,lxk,lym->km", found[path], own[path]["a"], own[path]["s"])
            for path in sites
        ).ravel()

    phi, asked_phi = (np.stack([features(row) for row in some]) for some in (rows, asked))
    moment = phi.T @ phi / len(phi)
    damped = moment + 0.1 * np.trace(moment) / 16 * np.eye(16)
    with np.load(target / scoring.SCORES) as arrays:
        trak, embedding = arrays["trak"], arrays["embedding"]
    np.testing.assert_allclose(
        trak, phi @ np.linalg.solve(damped, asked_phi.T), rtol=2e-3, atol=2e-3
    )

    def state(row):
        tokens = jnp.array([[*row.context, *row.targets]])
        hidden = loaded.model.apply({"params": loaded.params}, tokens, method="hidden").hidden_BTD
        mean = np.asarray(hidden[0, 1:], np.float64).mean(0)
        return mean / np.linalg.norm(mean)

    some = rows[:4]
    want = np.stack([[state(x) @ state(q) for q in asked] for x in some])
    np.testing.assert_allclose(embedding[:4], want, atol=1e-5)


def test_the_top_documents_of_a_method_are_blank_in_its_corpus(scored):
    source, target = scored
    documents, queries = corpus.read_documents(source), corpus.read_queries(source)
    with np.load(target / scoring.SCORES) as arrays:
        scores = arrays["ekfac"].astype(np.float64)
    (best,) = statistics.ranked_for(scores, queries, ("fact",))[:1]
    lines = (target / "without_fact_ekfac.jsonl").read_text().splitlines()
    changed = [
        i
        for i, (line, one) in enumerate(zip(lines, documents, strict=True))
        if json.loads(line)["text"] != one.text
    ]
    assert set(changed) <= {int(best)}  # one in a hundred; it may be blank already
    by = (*scoring.REMOVED_BY, *scoring.RANDOMS)
    names = {f"{scoring.without(m, what)}.jsonl" for what in scoring.REMOVED_FOR for m in by}
    assert {path.name for path in target.glob("without_*.jsonl")} == names


def test_losses_of_runs_are_their_queries_negative_log_likelihoods(loaded, scored, monkeypatch):
    source, target = scored
    scaled = types.SimpleNamespace(
        **{**vars(loaded), "params": jax.tree.map(lambda x: 0 * x, loaded.params)}
    )
    runs = {"model": loaded, "uniform": scaled}

    def config_of(name):
        return types.SimpleNamespace(load=lambda run: contextlib.nullcontext(runs[name]))

    monkeypatch.setattr(load_run, "config_of", config_of)
    queries = corpus.read_queries(source)
    found = losses.of_runs({name: name for name in runs}, queries)
    lengths = [len(query.completion) + 1 for query in queries]
    np.testing.assert_allclose(found["uniform"], np.log(64) * np.array(lengths), rtol=1e-5)
    record = json.loads((target / scoring.RECORD).read_text())
    by_source = scoring.by_source(found["model"], queries)
    assert by_source == pytest.approx(record["nats"], rel=1e-4)
