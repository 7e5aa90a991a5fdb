"""Log-likelihoods against a log-softmax in float64, whatever shares a batch or a row."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model.config import TransformerConfig
from model.transformer import Transformer
from trainers.scoring import likelihoods
from trainers.scoring.likelihoods import LikelihoodScorer
from trainers.scoring.scoring import Row

V = 31


@pytest.fixture(scope="module")
def model():
    config = TransformerConfig(
        vocab_size=V, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=16, scan_layers=False
    )
    return Transformer(config=config, tie_embeddings=False, logit_scale=2.0, logit_softcap=3.0)


@pytest.fixture(scope="module")
def params(model):
    init = jax.jit(lambda key: model.init(key, jnp.zeros((1, 4), jnp.int32)))
    params = nn.meta.unbox(init(jax.random.key(0)))["params"]
    return jax.tree.map(lambda x: 4 * x, params)


@pytest.fixture(scope="module")
def reference(model, params):
    """(log p(targets), whether they are what greedy decoding chooses), one row at a time."""
    hidden = jax.jit(lambda ids: model.apply({"params": params}, ids, method="hidden").hidden_BTD)
    head = np.asarray(params["lm_head"]["embedding"], np.float64)

    def score(row):
        text = [*row.context, *row.targets]
        padded = np.zeros((1, 32), np.int32)
        padded[0, : len(text)] = text
        logits = 3.0 * np.tanh(2.0 * np.asarray(hidden(padded)[0], np.float64) @ head.T / 3.0)
        table = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        places = range(len(row.context) - 1, len(text) - 1)
        best = [int(table[place].argmax()) for place in places]
        total = sum(table[place, target] for place, target in zip(places, row.targets, strict=True))
        return total, best == list(row.targets)

    return score


@pytest.fixture(scope="module")
def rows(reference):
    found = [
        Row(context=[3, 9, 1], targets=[4]),
        Row(context=[3, 9, 1], targets=[5]),  # reads what the first reads
        Row(context=[3, 9], targets=[1, 6]),  # and so does this, of which two tokens count
        Row(context=[0], targets=[4, 5, 6]),
        Row(context=[0, 7], targets=[*range(20)]),
        Row(context=[3, 9, 1], targets=[4]),
    ]
    # Continuations that share a context and are read after it, one of them only predicted.
    shared = [*range(18)]
    for targets in ([4], [5, 6], [5, 7], [8, 9, 10], [5, 6, 1]):
        found.append(Row(context=shared, targets=targets))
    found.append(Row(context=[*shared, 3], targets=[3, 2]))
    found.append(Row(context=[*shared, 3], targets=[4, 2]))
    # What greedy decoding chooses, so that there are such rows: found by trying all tokens.
    best = next(t for t in range(V) if reference(Row(context=[2, 8], targets=[t]))[1])
    return [*found, Row(context=[2, 8], targets=[best]), Row(context=[2, 8], targets=[best, 0])]


@pytest.mark.parametrize("chunk", [V * 4, 2**26])  # four tokens' logits at a time, or all
def test_likelihoods_equal_a_log_softmax_in_float64(
    model, params, rows, reference, monkeypatch, chunk
):
    monkeypatch.setattr(likelihoods, "_CHUNK_LOGITS", chunk)
    scorer = LikelihoodScorer(model, params, batch_tokens=48)
    found = dict(scorer.stream(rows))
    assert sorted(found) == list(range(len(rows)))
    for i, row in enumerate(rows):
        log_prob, greedy = reference(row)
        assert found[i].log_prob == pytest.approx(log_prob, abs=1e-5)
        assert found[i].greedy is greedy
    assert any(found[i].greedy for i in found) and not all(found[i].greedy for i in found)


def test_what_reads_the_same_is_read_once(rows):
    found = likelihoods.readings(rows)
    whole = {r.tokens: r.rows for r in found if not r.tails}
    assert sorted(whole[3, 9, 1]) == [(0, None), (1, None), (2, None), (5, None)]
    context, other = (r for r in found if r.tails)
    assert context.tokens == tuple(range(18))
    assert context.tails == ((5,), (8, 9), (5, 6)) and context.shape == (4, 16, 24)
    assert context.rows == [(6, None), (7, 0), (8, 0), (9, 1), (10, 2)]
    assert other.tails == ((3,), (4,))
    assert sorted(i for r in found for i, _ in r.rows) == list(range(len(rows)))


def test_batches_hold_the_tokens_asked_for(model, params):
    scorer = LikelihoodScorer(model, params, batch_tokens=96, batch_size=3, row_shards=2)
    found = [likelihoods.Reading((1,) * n, ((1,), (2,)), []) for n in (16, 16, 9)]
    found += [likelihoods.Reading((1,) * n, (), []) for n in (30, 28, 27, 16, 16, 16, 9, 9)]
    batches = [(shape, len(batch), size) for shape, batch, size in scorer.batches(found)]
    # 96 // (16 + 2 * 16) = 2 rows and what is left, which takes nothing that has no tails; alone
    # 96 // 32 = 3, made even by the two shards and filled with a shorter one; then 3 of 96 // 16, made even.
    assert batches == [
        ((2, 16, 16), 2, 2),
        ((2, 16, 16), 1, 2),
        ((0, 0, 32), 4, 4),
        ((0, 0, 16), 4, 4),
    ]


def test_a_row_that_predicts_nothing_is_refused(model, params):
    scorer = LikelihoodScorer(model, params, batch_tokens=64)
    with pytest.raises(ValueError, match="Row 1 has no context or no targets"):
        scorer.stream([Row(context=[1], targets=[2]), Row(context=[1], targets=[])])
