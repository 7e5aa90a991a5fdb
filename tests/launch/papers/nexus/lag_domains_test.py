"""Generated domains: their entropy against sampled documents and limit cases, what documents are, and tasks."""

import collections
import dataclasses
import itertools

import numpy as np
import pytest

from espalier.data import tasks
from espalier.data.stream import stream
from espalier.data.tokenizers import vocabularies
from espalier.launch.papers.nexus import lag_domains
from espalier.launch.papers.nexus.lag_domains import DOMAINS, KIN, LAGS, SUCCESSORS, SYMBOLS, Domain

TABLE_ENTROPY = -sum(p * np.log(p) for p in SUCCESSORS)


def documents(domain, count=20_000, length=64, seed=0):
    return lag_domains.draw(domain, count, length, np.random.default_rng(seed))


def losses(domain, found_NT):
    """-log p [N, T] of the model that made the documents."""
    table = [dict(zip(row.tolist(), SUCCESSORS, strict=True)) for row in domain.successors_VK]
    after_VV = np.array([[row.get(s, 0.0) for s in range(len(SYMBOLS))] for row in table])
    probability_NT = np.full(found_NT.shape, 1 / len(SYMBOLS))
    follows_NT = after_VV[found_NT[:, :-1], found_NT[:, 1:]]
    probability_NT[:, 1:] = follows_NT
    copied_NT = found_NT[:, domain.lag :] == found_NT[:, : -domain.lag]
    probability_NT[:, domain.lag :] *= 1 - domain.copied
    probability_NT[:, domain.lag :] += domain.copied * copied_NT
    return -np.log(probability_NT)


@pytest.mark.parametrize("name", [*LAGS, "kin_b40"])
def test_the_floor_is_the_loss_of_the_true_model(name):
    loss_NT = losses(DOMAINS[name], documents(DOMAINS[name]))
    floor_T = lag_domains.entropies(DOMAINS[name])
    error = loss_NT.mean(1).std() / np.sqrt(len(loss_NT))
    assert error < 1e-3
    assert abs(loss_NT.mean() - lag_domains.entropy_floor(DOMAINS[name])) < 3.9 * error
    z_T = (loss_NT.mean(0) - floor_T)[1:] / (loss_NT.std(0)[1:] / np.sqrt(len(loss_NT)))
    assert np.abs(z_T).max() < 5 and 0.5 < z_T.std() < 2


def test_the_floor_is_that_of_all_documents_of_a_short_length_one_by_one(monkeypatch):
    """H(document) is the sum over all of them, with a table of four symbols."""
    monkeypatch.setattr(lag_domains, "SYMBOLS", "abcd")
    domain = Domain(lag=3, copied=0.3, table=0)
    every_NT = np.array(list(itertools.product(range(4), repeat=7)))
    monkeypatch.setitem(losses.__globals__, "SYMBOLS", "abcd")
    log_N = -losses(domain, every_NT).sum(1)
    assert np.exp(log_N).sum() == pytest.approx(1, abs=1e-12)
    total = -(np.exp(log_N) * log_N).sum()
    assert lag_domains.entropies(domain, 7).sum() == pytest.approx(total, abs=1e-12)


@pytest.mark.parametrize("lag", [1, 2, 5])
def test_the_floor_where_nothing_or_all_is_copied(lag):
    table = lag_domains.entropies(Domain(lag=lag, copied=0.0, table=1), 20)
    np.testing.assert_allclose(table, [np.log(48)] + [TABLE_ENTROPY] * 19, atol=1e-12)
    copies = lag_domains.entropies(Domain(lag=lag, copied=1.0, table=1), 20)
    begun = [np.log(48), *[TABLE_ENTROPY] * (lag - 1)]
    np.testing.assert_allclose(copies, begun + [0.0] * (20 - lag), atol=1e-12)
    assert lag_domains.entropy_floor(Domain(lag, 0.0, 1), 1) == pytest.approx(np.log(48))


def test_copies_and_successors_are_as_often_as_said():
    domain = DOMAINS["lag_7"]
    found_NT = documents(domain)
    # Where the table cannot give the symbol `lag` back, it comes with the probability of a copy.
    back_NT, before_NT, at_NT = found_NT[:, :-7], found_NT[:, 6:-1], found_NT[:, 7:]
    apart_NT = (domain.successors_VK[before_NT] != back_NT[..., None]).all(-1)
    copies = (at_NT == back_NT)[apart_NT]
    assert abs(copies.mean() - 0.5) < 3.9 * np.sqrt(0.25 / copies.size)
    ranks = (domain.successors_VK[found_NT[:, :6]] == found_NT[:, 1:7, None]).reshape(-1, 4)
    assert (ranks.sum(1) == 1).all()  # nothing is copied before there is one `lag` back
    spread = np.sqrt(np.array(SUCCESSORS) * (1 - np.array(SUCCESSORS)) / len(ranks))
    assert (np.abs(ranks.mean(0) - SUCCESSORS) < 3.9 * spread).all()
    first = np.bincount(found_NT[:, 0], minlength=48) / len(found_NT)
    assert np.abs(first - 1 / 48).max() < 4.5 * np.sqrt(1 / 48 / len(found_NT))


def shared(one, other):
    """Share of equal rows of two domains' tables."""
    return (DOMAINS[one].successors_VK == DOMAINS[other].successors_VK).all(1).mean()


def test_families_have_graded_tables_one_lag_and_nothing_in_common():
    assert len(KIN) == 12
    for family in ("kin_a", "kin_b", "kin_c", "kin_d"):
        assert shared(family, f"{family}70") == pytest.approx(0.7, abs=0.02)
        assert shared(family, f"{family}40") == pytest.approx(0.4, abs=0.02)
    for one, other in itertools.combinations(KIN, 2):
        assert (shared(one, other) > 0) == (one[:5] == other[:5])
        assert (DOMAINS[one].lag == DOMAINS[other].lag) == (one[:5] == other[:5])


def test_two_tables_are_related_and_no_others():
    assert len(LAGS) == 8
    assert collections.Counter(d.lag for d in LAGS.values()).most_common(1)[0][1] == 1
    for domain in DOMAINS.values():
        assert {len(set(row)) for row in domain.successors_VK.tolist()} == {4}
        np.testing.assert_allclose(domain.table_VV.sum(1), 1)
    for one, other in itertools.combinations(LAGS, 2):
        equal = (DOMAINS[one].successors_VK == DOMAINS[other].successors_VK).all(1)
        assert equal.sum() == (34 if {one, other} == {"lag_4", "lag_5"} else 0)


def test_documents_are_always_the_same_and_splits_share_none():
    source = lag_domains.LagSource("lag_4", 3000, 0, length=64)
    train, held_out = source.texts("train"), source.texts("validation")
    assert {len(text) for text in train} == {64} and set("".join(train)) == set(SYMBOLS)
    assert len(set(train)) == 3000 and not set(train) & set(held_out)
    assert dataclasses.replace(source, train_documents=50).texts("train") == train[:50]
    assert not set(dataclasses.replace(source, seed=1).texts("train")) & set(train)
    assert not set(dataclasses.replace(source, name="lag_5").texts("train")) & set(train)
    digests = {dataclasses.replace(source, length=length).digest for length in (32, 64)}
    assert len(digests) == 2


def test_a_document_fills_a_row_and_the_floor_counts_what_the_loss_does(tmp_path):
    vocabulary = vocabularies.characters(symbols=SYMBOLS)
    assert vocabulary.vocab_size == 51
    lag_domains.register(vocabulary=vocabulary, documents=64)
    opened = {"task_feature_lengths": {"targets": 64}, "batch_size": 8, "cache_dir": tmp_path}
    data = stream.make_stream(mixture_or_task_name="lag_domains", **opened)
    batch = data.batch(0, 0, 8)
    assert batch["decoder_loss_weights"].shape == (8, 64)
    assert (batch["decoder_loss_weights"] == 1).all()  # the first symbol among them
    train = {
        t for name in LAGS for t in lag_domains.LagSource(name, 64, 0, length=64).texts("train")
    }
    rows = batch["decoder_target_tokens"].tolist()
    assert all(vocabulary.decode(row) in train for row in rows)
    held_out = stream.make_eval_stream(task="lag_13", **opened)
    assert held_out.bytes_per_token == 1
    with pytest.raises(ValueError, match="lacks 'V'"):
        lag_domains.register(vocabulary=vocabularies.characters(symbols=SYMBOLS[:-1]))
    with pytest.raises(ValueError, match=r"documents = 0 and length = 64 must be at least 1"):
        lag_domains.register(vocabulary=vocabulary, documents=0)
    tasks.clear()
