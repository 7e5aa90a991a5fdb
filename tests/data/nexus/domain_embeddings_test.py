"""Files of embeddings of domains, and encoders that need no model, against closed forms."""

import itertools
import json

import numpy as np
import pytest

from espalier.data.nexus import domain_embeddings, domain_encoders
from espalier.data.nexus.domain_embeddings import EmbeddingsError, Raw
from espalier.launch.papers.nexus import lag_domains

SETTINGS = {"order": 2, "dim": 1024, "documents": 2000, "tokens": 512, "seed": 0}


def ngrams(**settings):
    return domain_encoders.Ngrams(**{**SETTINGS, **settings})


def cosine(one, other):
    return one @ other / np.linalg.norm(one) / np.linalg.norm(other)


def raws(**rows):
    return {name: Raw(np.array(row, np.float64), 3, f"{name}.jsonl") for name, row in rows.items()}


def test_vectors_are_less_the_mean_and_of_length_one(tmp_path):
    made = domain_embeddings.create(
        tmp_path / "x.json", {"kind": "ngrams"}, raws(a=[3, 0], b=[0, 1], c=[0, -1])
    )
    np.testing.assert_allclose(made.mean_M, [1, 0])
    np.testing.assert_allclose(made.vectors(["a"]), [[1, 0]])
    np.testing.assert_allclose(made.vectors()[1:], np.array([[-1, 1], [-1, -1]]) / np.sqrt(2))
    assert made.vectors().dtype == np.float32 and made.dim == 2
    np.testing.assert_array_equal(made.vectors(["c", "a"]), made.vectors()[[2, 0]])
    plain = domain_embeddings.create("x", {"kind": "one_hot"}, raws(a=[2, 0]), centred=False)
    np.testing.assert_array_equal(plain.vectors(), [[1, 0]])


def test_vectors_of_another_length_come_back_and_those_that_are_added_have_it(tmp_path):
    path = tmp_path / "x.json"
    first = raws(a=[3, 0], b=[0, 1], c=[0, -1])
    unit = domain_embeddings.create(path, {"kind": "ngrams"}, first)
    made = domain_embeddings.create(path, {"kind": "ngrams"}, first, length=24.0)
    np.testing.assert_allclose(made.vectors(), 24 * unit.vectors(), rtol=1e-6)
    domain_embeddings.write(made)
    more = domain_embeddings.extend(domain_embeddings.read(path), raws(d=[1, 5]))
    assert more.length == 24.0
    np.testing.assert_allclose(more.vectors(["d"]), [[0, 24]], atol=1e-6)
    content = json.loads(path.read_text())
    del content["length"]  # as older files, whose vectors have length 1
    path.write_text(json.dumps(content))
    with pytest.raises(EmbeddingsError, match="do not have length 1"):
        domain_embeddings.read(path)
    with pytest.raises(EmbeddingsError, match="--length=0 must be positive"):
        domain_embeddings.create(path, {"kind": "ngrams"}, first, length=0.0)


def test_a_file_comes_back_and_what_is_added_changes_nothing_old(tmp_path):
    rng = np.random.default_rng(0)
    first = raws(**{name: rng.normal(size=7) for name in "abc"})
    path = tmp_path / "x.json"
    domain_embeddings.write(domain_embeddings.create(path, {"kind": "ngrams", **SETTINGS}, first))
    before, old = json.loads(path.read_text()), domain_embeddings.read(path)
    np.testing.assert_array_equal(old.mean_M, np.mean([first[n].raw_M for n in "abc"], axis=0))
    added = raws(d=rng.normal(size=7), e=rng.normal(size=7))
    domain_embeddings.write(domain_embeddings.extend(old, added))
    after = json.loads(path.read_text())
    new = {name: after["domains"].pop(name) for name in "de"}
    assert after == before  # bit by bit: JSON has floats exactly
    for name, entry in new.items():
        want = added[name].raw_M - old.mean_M
        np.testing.assert_allclose(entry["vector"], want / np.linalg.norm(want))
        assert entry["documents"] == 3 and entry["source"] == f"{name}.jsonl"
    again = domain_embeddings.read(path)
    assert again.names == ("a", "b", "c", "d", "e") and again.encoder == old.encoder
    np.testing.assert_array_equal(again.vectors(old.names), old.vectors())
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_errors_name_the_domain_the_file_and_the_remedy(tmp_path):
    path = tmp_path / "x.json"
    make = domain_embeddings.create
    with pytest.raises(EmbeddingsError, match="there is no domain: add --domain NAME=SOURCE"):
        make(path, {"kind": "ngrams"}, {})
    with pytest.raises(EmbeddingsError, match="'a' equals the mean .* least two"):
        make(path, {"kind": "ngrams"}, raws(a=[1, 2]))
    with pytest.raises(EmbeddingsError, match="'a' equals the mean"):
        make(path, {"kind": "ngrams"}, raws(a=[1 / 3, 2], b=[1 / 3, 2], c=[1 / 3, 2]))
    with pytest.raises(EmbeddingsError, match="'a' equals the mean"):
        make(path, {"kind": "ngrams"}, raws(a=[np.nan, 2], b=[1, 2]))
    old = make(path, {"kind": "ngrams", "order": 2}, raws(a=[1, 0], b=[0, 1]))
    with pytest.raises(
        EmbeddingsError, match=r"x.json: no domain 'aa'.*--extend=.*x.json --domain aa="
    ):
        old.vectors(["a", "aa"])
    with pytest.raises(EmbeddingsError, match="already has the domain 'b'"):
        domain_embeddings.extend(old, raws(b=[1, 1]))
    with pytest.raises(EmbeddingsError, match="'c' has 3 numbers, and those in .*x.json 2"):
        domain_embeddings.extend(old, raws(c=[1, 1, 1]))
    with pytest.raises(EmbeddingsError, match="'c' equals the mean"):
        domain_embeddings.extend(old, raws(c=[0.5, 0.5]))
    with pytest.raises(
        EmbeddingsError, match=r"ngrams \(order 2\), and this encoder is model \(digest f\)"
    ):
        domain_embeddings.check_encoder(old, {"kind": "model", "digest": "f"})


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (
            None,
            "the file of embeddings does not exist; make it with espalier prepare embed_domains --output=",
        ),
        ("[]", "TypeError"),
        ("{", "JSONDecodeError"),
        ('{"format": 2}', "format is 2, and this program reads 1"),
        ('{"format": 1, "encoder": {"kind": "x"}, "mean": [0]}', "KeyError: 'domains'"),
        ("width", "different widths"),
        ("length", "do not have length 1"),
    ],
)
def test_a_file_that_is_none_is_an_error(tmp_path, content, problem):
    path = tmp_path / "x.json"
    if content in ("width", "length"):
        made = domain_embeddings.create(path, {"kind": "ngrams"}, raws(a=[1, 0], b=[0, 1]))
        domain_embeddings.write(made)
        found = json.loads(path.read_text())
        found["domains"]["a"].update({"raw": [1]} if content == "width" else {"vector": [1, 1]})
        content = json.dumps(found)
    if content is not None:
        path.write_text(content)
    with pytest.raises(EmbeddingsError, match=problem):
        domain_embeddings.read(path)


def test_raw_products_of_ngrams_are_bhattacharyya_coefficients():
    encoder = ngrams(order=1, dim=16384)
    ones = [encoder.raw([text], 0) for text in ("aaab", "abbb", "cd", "ab" * 300)]
    for raw in ones:
        assert np.linalg.norm(raw) == pytest.approx(1, abs=0.03)
    roots = np.sqrt(
        [[3 / 4, 1 / 4, 0, 0], [1 / 4, 3 / 4, 0, 0], [0, 0, 0.5, 0.5], [0.5, 0.5, 0, 0]]
    )
    np.testing.assert_allclose(np.stack(ones) @ np.stack(ones).T, roots @ roots.T, atol=0.03)


def test_equal_texts_have_equal_vectors_and_those_of_other_alphabets_nothing_in_common():
    rng = np.random.default_rng(0)
    texts = ["".join(rng.choice(list("abcdefgh"), 200)) for _ in range(50)]
    encoder = ngrams()
    raw = encoder.raw(texts, 0)
    np.testing.assert_array_equal(raw, ngrams().raw(iter(texts), 5))
    np.testing.assert_allclose(raw, encoder.raw(texts[::-1], 0), atol=1e-12)
    np.testing.assert_allclose(raw, encoder.raw([x + "!" * 9 for x in texts] * 2, 0), atol=0.02)
    cut = ngrams(tokens=200)
    np.testing.assert_array_equal(cut.raw([x + "!" * 9 for x in texts], 0), cut.raw(texts, 0))
    other = encoder.raw(
        [text.translate(str.maketrans("abcdefgh", "ijklmnöπ")) for text in texts], 0
    )
    assert abs(cosine(raw, other)) < 4 / np.sqrt(1024)
    assert cosine(raw, ngrams(seed=1).raw(texts, 0)) < 0.2  # another projection
    assert cosine(raw, ngrams(order=3).raw(texts, 0)) < 0.2
    # Documents count alike: a long one of another kind moves the vector no further than a short one.
    long, short = (encoder.raw(["ab" * n, "xyxyxyxy"], 0) for n in (200, 4))
    assert cosine(long, short) > 0.99
    with pytest.raises(EmbeddingsError, match="all documents have fewer than 2 characters"):
        encoder.raw(["a", ""], 0)


def test_a_histogram_is_that_of_pairs_that_are_counted():
    """With a seed's own hash, but pairs found by Python and signs by their definition."""
    texts, encoder = ["abab", "bca"], ngrams(dim=64)
    shares = {"ab": 1 / 3, "ba": 1 / 6, "bc": 1 / 4, "ca": 1 / 4}
    single = {pair: encoder.raw([pair], 0) for pair in shares}
    assert {tuple(np.abs(raw).round(12)) for raw in single.values()} == {(1 / 8,) * 64}
    want = sum(np.sqrt(share) * single[pair] for pair, share in shares.items())
    np.testing.assert_allclose(encoder.raw(texts, 0), want, atol=1e-12)


@pytest.mark.parametrize("dim", [64, 1024])
def test_related_domains_are_nearest(dim):
    encoder, names = ngrams(dim=dim), list(lag_domains.LAGS)
    found = {}
    for name in names:
        texts = lag_domains.LagSource(name, 1000, 0, length=64).texts("train")
        found[name] = Raw(encoder.raw(texts, 0), len(texts), None)
    made = domain_embeddings.create("x", encoder.settings, found)
    cosines = made.vectors() @ made.vectors().T
    apart = {
        (one, other): cosines[names.index(one), names.index(other)]
        for one, other in itertools.combinations(names, 2)
    }
    related = apart.pop(("lag_4", "lag_5"))
    assert related > max(apart.values()) + 0.1
    # Other documents of a domain lie where it does, and those of a new domain elsewhere.
    again = Raw(
        encoder.raw(lag_domains.LagSource("lag_7", 1000, 1, length=64).texts("train"), 0),
        1000,
        None,
    )
    more = domain_embeddings.extend(made, {"again": again})
    assert more.vectors(["again"])[0] @ more.vectors(["lag_7"])[0] > 0.95


def test_controls_say_nothing_and_go_on():
    one_hot = domain_encoders.OneHot(dim=3)
    np.testing.assert_array_equal([one_hot.raw([], i) for i in range(3)], np.eye(3))
    with pytest.raises(EmbeddingsError, match="set --dim to at least 4"):
        one_hot.raw([], 3)
    control = domain_encoders.Random(dim=1024, seed=0)
    rows = np.array([control.raw([], i) for i in range(6)])
    np.testing.assert_array_equal(rows[4], domain_encoders.Random(dim=1024, seed=0).raw([], 4))
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    assert np.abs(rows @ rows.T - np.eye(6)).max() < 4.5 / np.sqrt(1024)
    assert not (one_hot.centred or control.centred)
