"""Log-likelihoods against a log-softmax in float64, whatever shares a batch or a row."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.config import TransformerConfig
from espalier.model.embed import Positions
from espalier.model.transformer import Transformer
from espalier.trainers.scoring import likelihoods
from espalier.trainers.scoring.likelihoods import LikelihoodScorer
from espalier.trainers.scoring.scoring import Row
from tests.drawn import drawn

V = 31


@pytest.fixture(scope="module")
def model():
    config = TransformerConfig(
        vocab_size=V, num_layers=2, embed_dim=16, num_heads=2, mlp_dim=16, scan_layers=False
    )
    return Transformer(config=config, tie_embeddings=False, logit_scale=2.0, logit_softcap=3.0)


@pytest.fixture(scope="module")
def params(model):
    params = nn.meta.unbox(drawn(model, jnp.zeros((1, 4), jnp.int32)))
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


@pytest.mark.parametrize("chunk", [4, 256])  # four tokens' logits at a time, or all
def test_likelihoods_equal_a_log_softmax_in_float64(
    model, params, rows, reference, monkeypatch, chunk
):
    monkeypatch.setattr(likelihoods, "_CHUNK", chunk)
    scorer = LikelihoodScorer(model, params, batch_tokens=48)
    found = dict(scorer.stream(rows))
    assert sorted(found) == list(range(len(rows)))
    for i, row in enumerate(rows):
        log_prob, greedy = reference(row)
        assert found[i].log_prob == pytest.approx(log_prob, abs=1e-5)
        assert found[i].greedy is greedy
    assert any(found[i].greedy for i in found) and not all(found[i].greedy for i in found)


def test_continuations_that_fit_the_learned_positions_are_read_after_their_context(
    model, monkeypatch
):
    """17 tokens that follow 3 others are rounded to 24, more than the table has."""
    limited = model.clone(position_embed=functools.partial(Positions, num_positions=20))
    params = nn.meta.unbox(drawn(limited, jnp.zeros((1, 4), jnp.int32)))
    rows = [Row(context=[3, 9, 1], targets=[*range(n, n + 18)]) for n in (4, 5)]
    whole = dict(LikelihoodScorer(limited, params, batch_tokens=64).stream(rows))
    monkeypatch.setattr(likelihoods, "_WORTH_SHARING", 3)
    shared = dict(LikelihoodScorer(limited, params, batch_tokens=64).stream(rows))
    for i in (0, 1):
        assert shared[i].log_prob == pytest.approx(whole[i].log_prob, abs=1e-5)


def test_what_reads_the_same_is_read_once(rows):
    found = likelihoods.readings(rows)
    whole = {r.tokens: r.rows for r in found if not r.tails}
    assert sorted(whole[3, 9, 1]) == [(0, None), (1, None), (2, None), (5, None)]
    context, other = (r for r in found if r.tails)
    assert context.tokens == tuple(range(18))
    assert context.tails == ((5,), (8, 9), (5, 6)) and context.shape == (3, 8, 24)
    assert context.rows == [(6, None), (7, 0), (8, 0), (9, 1), (10, 2)]
    assert other.tails == ((3,), (4,))
    assert sorted(i for r in found for i, _ in r.rows) == list(range(len(rows)))


def test_a_job_of_many_lengths_compiles_one_program_and_no_other_operation(model, params, compiled):
    rng = np.random.default_rng(0)
    rows = []
    for length in (1, 3, 15, 17, 30, 40, 60):
        context = rng.integers(V, size=length).tolist()
        ends = rng.integers(1, 12, size=4)
        rows += [Row(context=context, targets=rng.integers(V, size=n).tolist()) for n in ends]
    scorer = LikelihoodScorer(model, params, batch_tokens=256)
    first = dict(scorer.stream(rows))
    assert len(list(scorer.batches(likelihoods.readings(rows)))) > 1
    assert len(compiled) == 1, compiled
    # Later calls with fewer or shorter rows use it.
    alone = dict(scorer.stream(rows[:20]))
    assert len(compiled) == 1, compiled
    for i, (log_prob, greedy) in alone.items():
        assert first[i].log_prob == pytest.approx(log_prob, abs=1e-5) and first[i].greedy is greedy


def readings_of(*counts):
    """Readings by (tails, tail length, length) and their number, sorted as `readings` sorts."""
    return [
        likelihoods.Reading((1,) * length, tuple((2,) * tail for _ in range(tails)), [])
        for (tails, tail, length), count in sorted(counts, reverse=True)
        for _ in range(count)
    ]


@pytest.mark.parametrize("cost", [0, 50, 200, 1000, 10**6])
def test_no_other_division_into_programs_costs_less(model, params, cost):
    counts = [
        ((3, 8, 64), 5),
        ((3, 8, 24), 4),
        ((2, 16, 16), 1),
        ((0, 0, 128), 2),
        ((0, 0, 32), 30),
        ((0, 0, 24), 9),
    ]
    scorer = LikelihoodScorer(model, params, batch_tokens=256)
    scorer._program_tokens = cost
    read, made = 0, set()
    for (shape, size), batch in scorer.batches(readings_of(*counts)):
        assert len(batch) <= size and size * (shape[0] * shape[1] + shape[2]) <= 256
        read += size * (shape[0] * shape[1] + shape[2])
        made.add((shape, size))

    def cost_of(group):
        """Tokens of a program and of the batches of a group, written out."""
        tails, tail, length = (max(shape[axis] for shape, _ in group) for axis in range(3))
        tokens, rows = tails * tail + length, sum(count for _, count in group)
        batches = math.ceil(rows / (256 // tokens))
        return cost + batches * math.ceil(rows / batches) * tokens

    def divisions(items):
        """All ways to divide items into groups."""
        if not items:
            yield []
            return
        for rest in divisions(items[1:]):
            yield [items[:1], *rest]
            for n, group in enumerate(rest):
                yield [*rest[:n], [*items[:1], *group], *rest[n + 1 :]]

    least = min(sum(map(cost_of, division)) for division in divisions(counts))
    assert read + cost * len(made) == least
    assert len(made) == {0: 6, 10**6: 1}.get(cost, len(made))


def test_batches_fit_shards_and_rows(model, params):
    scorer = LikelihoodScorer(model, params, batch_tokens=96, batch_size=3, row_shards=2)
    found = readings_of(((0, 0, 16), 9))
    # 96 // 16 is more than 3 rows, which two shards make 4; 9 rows are 3 batches of 3, which they make 4 again.
    batches = [(*program, len(batch)) for program, batch in scorer.batches(found)]
    assert batches == [((0, 0, 16), 4, 4), ((0, 0, 16), 4, 4), ((0, 0, 16), 4, 1)]


def test_many_small_calls_get_the_programs_of_a_large_one(model, params):
    scorer = LikelihoodScorer(model, params, batch_tokens=64)
    scorer._program_tokens = 100
    long, short = readings_of(((0, 0, 32), 2)), readings_of(((0, 0, 8), 2))
    lengths = [next(scorer.batches(each))[0].shape.length for each in (long, *[short] * 5)]
    # Two rows in the long program have 48 tokens more than in their own, so the third call pays for it.
    assert lengths == [32, 32, 32, 8, 8, 8]


def test_a_row_that_predicts_nothing_is_refused(model, params):
    scorer = LikelihoodScorer(model, params, batch_tokens=64)
    with pytest.raises(ValueError, match="Row 1 has no context or no targets"):
        scorer.stream([Row(context=[1], targets=[2]), Row(context=[1], targets=[])])
