"""The benchmark of influence: all sides have the trained MLPs, and agreement of scores is measured as it says."""

import json
import os

import numpy as np
import pytest

from espalier.model.hf.load import load
from espalier.trainers.checkpoints import state_tree
from tests.benchmarks import case, influence

SIZES = {
    **influence.CASE,
    **{"num_layers": 2, "embed_dim": 8, "num_heads": 2, "mlp_dim": 12, "vocab_size": 132},
}


def test_the_models_mlps_are_replaced_and_nothing_else(tmp_path):
    case.write_llama(str(tmp_path), SIZES, np.random.default_rng(0), std=0.1)
    influence._write_tokenizer(tmp_path / "model", SIZES["vocab_size"])
    before = state_tree.flatten(load(tmp_path / "model")[1])
    own = {path: np.asarray(x) + 1 for path, x in before.items() if "/mlp/" in path}
    assert len(own) == 3
    influence.replace_mlps(str(tmp_path), SIZES, own)
    after = state_tree.flatten(load(tmp_path / "model")[1])
    for path, value in before.items():
        np.testing.assert_array_equal(after[path], own.get(path, value), err_msg=path)
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    # bergson refuses batches of more tokens than the model has positions.
    assert config["max_position_embeddings"] >= SIZES["batch_size"] * SIZES["tokens"]
    assert os.path.exists(tmp_path / "model" / "tokenizer.json")


def test_texts_are_mostly_of_one_topic():
    texts = influence.draw(SIZES, 200, np.random.default_rng(0))
    assert texts.shape == (200, SIZES["tokens"])
    assert texts.min() >= 4 and texts.max() < SIZES["vocab_size"]
    own = (SIZES["vocab_size"] - 4) // influence._TOPICS
    most = [np.bincount((row - 4) // own).max() for row in texts]
    assert np.mean(most) / SIZES["tokens"] > 0.75


def test_agreement_is_of_norms_ranks_and_halves():
    r = np.random.default_rng(1)
    theirs = r.normal(size=(50, 3))
    halves = r.random((40, 50)) < 0.5
    losses = -(halves @ theirs)
    scores = {"kronfluence": theirs, "ours": 1.01 * theirs, "bergson": -theirs}
    found = influence.agreement(scores, theirs**3, halves, losses)
    assert found["relative_difference_of_kronfluences_scores"] == pytest.approx(0.01)
    assert found["least_spearman"] == pytest.approx({"kronfluence": 1, "bergson": -1})
    assert found["linear_datamodeling_scores"]["bergson"] == pytest.approx(-1)
    assert found["lds_less_kronfluences"] == pytest.approx(0)
    least = min(np.corrcoef(x, x**3)[0, 1] for x in theirs.T)
    assert found["least_pearson_of_low_rank"] == pytest.approx(least)
