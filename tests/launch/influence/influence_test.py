"""The command `influence` on a tiny run: factors, scores, reports, what continues after a stop, and bad input."""

import argparse
import functools
import itertools
import json
import pathlib
import re
import runpy
import sys
import types
import warnings

import jax
import numpy as np
import pytest
from scipy import stats

from espalier.common.storage import mirror, paths
from espalier.data.tasks import in_seqio
from espalier.launch import environment
from espalier.launch.inference import generate, shards
from espalier.launch.influence import inputs, methods, outputs, scorers
from espalier.launch.load.load_run import LoadError
from espalier.trainers.checkpoints import state_tree
from espalier.trainers.influence import conjugate, documents, files, kronecker, lexical, scores
from espalier.trainers.influence import fit as stages
from espalier.trainers.influence import sites as site_list
from espalier.trainers.scoring.scoring import Row

DOCUMENTS = [
    {"text": "import os", "source": "code"},
    {"text": "import sys and os"},
    {"tokens": [5, 6, 7, 8]},
    {"text": ""},
    {"text": "os.path.join"},
    {"text": "import os"},  # repeats the first
]
QUERIES = [
    {"prompt": "import ", "completion": "os", "kind": "factual", "answer": "sys", "correct": True},
    {"prompt": [5, 6], "completion": [7]},
]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def read(path):
    return [json.loads(line) for line in pathlib.Path(path).read_text().splitlines()]


class Place:
    """Files of a test, and the commands on them."""

    def __init__(self, folder, run, command):
        self.folder, self.run, self.command = folder, run, command
        self.documents = write(folder / "d.jsonl", DOCUMENTS)
        self.queries = write(folder / "q.jsonl", QUERIES)
        self.factors = str(folder / "factors")

    def fit(self, *flags):
        given = (
            f"--checkpoint={self.run}",
            f"--documents={self.documents}",
            f"--out={self.factors}",
        )
        return self.command("influence", "fit", *given, "--batch_size=8", *flags)

    def score(self, *flags, out="scores.jsonl", queries=None, factors=True):
        out = str(self.folder / out)
        own = [f"--factors={self.factors}"] if factors else [f"--checkpoint={self.run}"]
        own += [f"--queries={queries or self.queries}", f"--documents={self.documents}"]
        status = self.command("influence", "score", *own, f"--out={out}", "--batch_size=8", *flags)
        return status, out


@pytest.fixture(scope="module")
def place(trained_run, tmp_path_factory):
    patch = pytest.MonkeyPatch()
    patch.setattr(environment, "restart_with_huge_pages", lambda: None)
    patch.setattr(environment, "prepare", lambda: None)

    def command(*arguments):
        patch.setattr(sys, "argv", list(arguments))
        with warnings.catch_warnings(), pytest.raises(SystemExit) as ended:
            warnings.simplefilter("ignore", RuntimeWarning)
            runpy.run_module(f"espalier.launch.{arguments[0]}", run_name="__main__")
        return ended.value.code

    place = Place(tmp_path_factory.mktemp("influence"), trained_run.path, command)
    assert place.fit() == 0
    yield place
    patch.undo()


def gradient(run, context, targets):
    """The gradient of a text's summed loss by parameters of the MLPs, from autodiff."""
    arrays = documents.columns([scores.Row(context=context, targets=targets)], [0], 1, 24)

    def loss(params):
        log_probs = jax.nn.log_softmax(conjugate.logits_of(run.model, params, arrays))
        picked = np.arange(24)[None], arrays["decoder_target_tokens"]
        return -(log_probs[0][picked] * arrays["decoder_loss_weights"]).sum()

    flat = state_tree.flatten(jax.jit(jax.grad(loss))(run.params["ema"]))
    return np.concatenate([np.ravel(flat[p]) for p in sorted(flat) if "/mlp/" in p])


BYTES = [byte + 3 for byte in b"import os"]


def test_factors_lead_from_a_run_to_a_table_of_documents(place, trained_run, capsys):
    """A score of `identity` is the product of two gradients, the rest follow from the factors."""
    status, out = place.score("--token_scores=1", "--per_layer")
    assert status == 0
    printed = capsys.readouterr().out
    assert "6 documents scored for 2 queries" in printed
    assert "that repeat an earlier one and have its scores: 1" in printed
    assert "line 6 repeats document 1" in printed
    rows = read(out)
    assert [len(row["scores"]) for row in rows] == [2] * 6
    assert rows[3]["scores"] == [0, 0] and rows[3]["norm"] == 0
    np.testing.assert_allclose(rows[5]["scores"], rows[0]["scores"], rtol=1e-4)
    for row in rows[:3]:
        layers = sum(np.sum(np.reshape(x, (-1, 2)), 0) for x in row["layers"].values())
        np.testing.assert_allclose(layers, row["scores"], rtol=1e-4)
    # The document with the query's text raises its completion most.
    assert max(range(6), key=lambda i: rows[i]["scores"][1]) == 2
    tokens = read(f"{out}.tokens.jsonl")
    assert {row["query"] for row in tokens} == {0, 1}
    for row in tokens:
        total = rows[row["document"]]["scores"][row["query"]]
        size = np.abs(row["scores"]).sum()  # a small sum of large numbers has their rounding
        np.testing.assert_allclose(sum(row["scores"]), total, atol=1e-2 * size)
    report = place.folder / "report"
    flags = (f"--scores={out}", "--top=2", "--bottom", "--within=1", f"--out={report}")
    assert place.command("influence", "report", *flags) == 0
    printed = capsys.readouterr().out.splitlines()
    assert "6 documents, 2 queries, method ekfac" in printed and len(printed) < 10
    assert any(line.startswith("   first of the top: document 2 (") for line in printed)
    assert printed[-1] == f"written: {report}/report.md, report.json, curves.svg and viewer.html"
    assert "](curves.svg)" in (report / "report.md").read_text()
    text = (report / "report.md").read_text()
    assert "# Influence of 6 documents (ekfac)" in text and "import os" in text
    assert "## Answers in documents" in text
    table = json.loads((report / "report.json").read_text())
    best = table["queries"][1]["top"][0]
    assert best["document"] == 2 and best["score"] == pytest.approx(rows[2]["scores"][1])
    assert best["per_nat"] == pytest.approx(best["score"] / max(table["queries"][1]["nats"], 0.1))
    # Token scores have the texts that the bytes add, and a document of tokens is decoded.
    pieces = {row["document"]: row["texts"] for row in tokens if row["query"] == 0}
    assert all("".join(own) == DOCUMENTS[i]["text"] for i, own in pieces.items() if i in (0, 1, 4))
    assert best["text"] == bytes(x - 3 for x in DOCUMENTS[2]["tokens"]).decode()
    assert table["analyses"]["answer_of_queries"]["0"]["corpus"] == 1
    shares = table["analyses"]["layers"]["all queries"]
    assert sum(shares["layers"].values()) == pytest.approx(1)
    page = (report / "viewer.html").read_text()
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    shown = json.loads(data)
    assert shown["queries"][1]["top"][0]["document"] == 2 and "1:2" in shown["tokens"]
    for number, document in shown["documents"].items():
        assert document["source"] == DOCUMENTS[int(number)].get("source", "(none)")
    # A terminal shows the numbers of the ranking that was asked for.
    flags = (f"--scores={out}", "--rank_by=per_norm", f"--out={report}")
    assert place.command("influence", "report", *flags) == 0
    first = json.loads((report / "report.json").read_text())["queries"][0]["top"][0]
    assert first["value"] != first["score"]
    where = f"first of the top: document {first['document']} ({first['value']:.4g} per norm"
    assert where in capsys.readouterr().out


def test_layers_are_of_as_many_documents_as_the_report_says(place, capsys):
    status, out = place.score("--per_layer", "--top=2", out="few.jsonl")
    assert status == 0
    report = place.folder / "few"
    flags = ("influence", "report", f"--scores={out}", f"--out={report}", "--top=2")
    assert place.command(*flags, "--within=4") == 2
    said = "--within=4: 2 documents at each end are stored: .* with --top=4"
    assert re.search(said, capsys.readouterr().err)
    assert place.command(*flags) == 0  # within the first 6 of 6
    table = json.loads((report / "report.json").read_text())["analyses"]
    assert table["within"] == 6
    assert "summed scores of the first 2 documents" in (report / "report.md").read_text()
    expected = []
    for q in range(2):
        first = sorted(read(out), key=lambda row: -row["scores"][q])[:2]
        total = sum(row["scores"][q] for row in first)
        up = sum(own[q] for row in first for path, own in row["layers"].items() if "/up/" in path)
        expected.append(up / total)
    shares = table["layers"]["all queries"]["matrices"]
    (share,) = (value for path, value in shares.items() if "/up/" in path)
    assert share == pytest.approx(np.mean(expected), rel=1e-4)


def test_a_fit_ranks_documents_for_their_own_halves_with_several_dampings(place, capsys):
    assert place.fit("--sweep_documents=3") == 0  # all stages are there
    title, head, *rows = capsys.readouterr().out.splitlines()[-9:]
    assert title == "3 documents among 6, ranked for their own second halves:"
    names = ["dot product", "1", "0.1", "0.01", "0.001", "0.0001", "1e-05"]
    assert [row.partition("%")[0].rsplit(None, 1)[0].strip() for row in rows] == names
    assert head.split() == ["--damping", "first", "mean", "rank"]
    (default,) = (row for row in rows if row.endswith("(default)"))
    own = methods.Ekfac().damping
    assert own == kronecker.RELATIVE and default.split()[0] == f"{own:g}"
    assert place.fit("--sweep_documents=0") == 0
    assert "second halves" not in capsys.readouterr().out


def test_a_large_head_is_fitted_in_blocks_which_are_stated(place, capsys, monkeypatch):
    monkeypatch.setattr(site_list, "HEAD_BLOCK", 100)  # of 264 tokens
    flags = ("--modules=head", "--sweep_documents=0", f"--out={place.folder / 'head'}")
    assert place.fit(*flags) == 0
    said = "264 tokens is approximated by 3 diagonal blocks of at most 88 tokens; 66.7 %"
    assert said in capsys.readouterr().out
    eigen, _ = files.read(place.folder / "head" / "eigen")
    assert eigen["head:qa"].shape == (1, 16, 16) and eigen["head:qs"].shape == (3, 88, 88)
    status, out = place.score(f"--factors={place.folder / 'head'}", "--rank=0", out="head.jsonl")
    assert status == 0
    got = np.array([row["scores"] for row in read(out)])
    assert np.isfinite(got).all() and got[0, 0] > 0  # the document with the query's text


def test_identity_and_cosine_are_products_of_gradients(place, trained_run):
    query = gradient(trained_run, [0, *BYTES[:7]], BYTES[7:])
    document = gradient(trained_run, [0], BYTES)
    got = {}
    for method in ("identity", "cosine"):
        status, out = place.score(
            f"--method={method}",
            "--rank=0",
            "--token_scores=1",
            out=f"{method}.jsonl",
            factors=False,
        )
        assert status == 0
        rows = read(out)
        got[method] = rows[0]
        for row in read(f"{out}.tokens.jsonl"):
            total = rows[row["document"]]["scores"][row["query"]]
            size = np.abs(row["scores"]).sum()
            np.testing.assert_allclose(sum(row["scores"]), total, atol=1e-5 * size)
    dot = query @ document
    norms = np.linalg.norm(query), np.linalg.norm(document)
    np.testing.assert_allclose(got["identity"]["scores"][0], dot, rtol=1e-3)
    np.testing.assert_allclose(got["identity"]["norm"], norms[1], rtol=1e-4)
    np.testing.assert_allclose(got["cosine"]["scores"][0], dot / np.prod(norms), rtol=1e-3)


def test_other_methods_and_low_ranks(place, capsys):
    names = ["kfac", "ekfac_cg", "tfidf", "trak", "embedding", "bm25"]
    for method in names:
        if method == "bm25":
            pytest.importorskip("bm25s")
        flags = [f"--method={method}"]
        flags += ["--cg_steps=2", "--cg_documents=2"] if method == "ekfac_cg" else []
        if method in ("kfac", "ekfac_cg", "trak"):
            flags += ["--rank=4", "--query_dtype=int8"]
        status, out = place.score(*flags, out=f"{method}.jsonl")
        assert status == 0, method
        rows = read(out)
        assert len(rows) == 6 and np.isfinite([row["scores"] for row in rows]).all()
    _, record = files.read(place.folder / "ekfac_cg.jsonl.queries")
    assert [len(note["objectives"]) for note in record["notes"]] == [3, 3]
    assert {note["documents"] for note in record["notes"]} == {2}
    assert all(
        a >= b
        for n in record["notes"]
        for a, b in zip(n["objectives"], n["objectives"][1:], strict=False)
    )
    printed, errors = capsys.readouterr()
    assert "DEBUG" not in printed + errors
    assert "query gradients keep" in printed and "correlate at" in printed
    assert "conjugate gradients on 2 documents, relative residuals up to" in printed
    beside = [f"--beside={place.folder / name}.jsonl" for name in names[1:5]]
    flags = (f"--scores={place.folder / 'kfac.jsonl'}", *beside, f"--out={place.folder / 'beside'}")
    assert place.command("influence", "report", *flags) == 0
    table = json.loads((place.folder / "beside" / "report.json").read_text())
    assert [row["method"] for row in table["analyses"]["methods"]] == [*names[:5], "random"]
    assert (
        table["compression"]["query_dtype"] == "int8"
        and table["compression"]["kept"]["least"] > 0.5
    )


def test_rankings_of_two_models_are_compared_and_documents_are_removed(place, capsys):
    """The averaged and the last parameters are two models; beside scipy and sums of the files of scores."""
    outs = {}
    for params in ("ema", "raw"):
        flags = ("--method=identity", f"--params={params}")
        status, outs[params] = place.score(*flags, out=f"{params}.jsonl", factors=False)
        assert status == 0
    capsys.readouterr()
    flags = [f"--scores={outs['ema']}", f"--beside={outs['raw']}", "--within=2"]
    assert place.command("influence", "report", *flags, f"--out={place.folder / 'two'}") == 0
    table = json.loads((place.folder / "two" / "report.json").read_text())["analyses"]
    ema, raw = (np.array([row["scores"] for row in read(outs[name])]) for name in ("ema", "raw"))
    for q, got in enumerate(table["methods_of_queries"]["identity (raw.jsonl)"]):
        tops = [{*np.argsort(-x[:, q].astype(np.float32), kind="stable")[:2]} for x in (ema, raw)]
        assert got["spearman"] == pytest.approx(stats.spearmanr(ema[:, q], raw[:, q])[0], abs=1e-6)
        assert got["overlap"] == len(tops[0] & tops[1]) / 2
    kinds = {row["group"]: row["queries"] for row in table["methods_of_kinds"]}
    assert kinds == {"all queries": 2, "factual": 1}
    text = (place.folder / "two" / "report.md").read_text()
    assert "## Rankings by query" in text and "0.33 by chance" in text

    removed, kept = place.folder / "removed.jsonl", place.folder / "kept.jsonl"

    def remove(*flags, keep=False):
        for path in () if keep else (removed, kept):
            path.unlink(missing_ok=True)
        own = (f"--scores={outs['ema']}", f"--out={removed}", *flags)
        return place.command("influence", "remove", *own)

    documents = read(place.documents)
    for flags, column in (((), ema.sum(1)), (("--kind=factual",), ema[:, 0])):
        assert remove("--top=2", f"--kept={kept}", *flags) == 0
        firsts = np.argsort(-column, kind="stable")[:2].tolist()
        assert [row["document"] for row in read(removed)] == firsts
        np.testing.assert_allclose(
            [row["score"] for row in read(removed)], column[firsts], rtol=1e-5
        )
        assert read(kept) == [row for i, row in enumerate(documents) if i not in firsts]
    printed = capsys.readouterr().out
    assert "2 of 6 documents removed by the highest sums over 1 queries" in printed
    assert remove("--top=2", "--rank_by=per_norm") == 0
    norms = np.array([row["norm"] for row in read(outs["ema"])])
    ratios = np.divide(ema.sum(1), norms, out=np.zeros(6), where=norms > 0)
    assert [row["document"] for row in read(removed)] == np.argsort(-ratios)[:2].tolist()
    drawn = []
    for seed in (0, 0, 1, 2, 3):
        assert remove("--top=2", f"--random_seed={seed}") == 0
        drawn.append(tuple(row["document"] for row in read(removed)))
    assert drawn[0] == drawn[1] and len(set(drawn)) > 2

    capsys.readouterr()
    changed = write(place.folder / "other.jsonl", [{"text": "a"}])
    for flags, message in (
        (("--top=6",), "--top=6 must be at least 1, and less than the 6 documents"),
        (("--top=2", "--kind=none"), "has --kind=none and --task=None"),
        (("--top=2", f"--documents={changed}"), "--documents is read for --kept=FILE"),
        (("--top=2", f"--kept={kept}", f"--documents={changed}"), "has changed since it was"),
        (("--top=2", f"--kept={place.documents}"), "is the file of --documents"),
        (("--top=2", f"--kept={removed}"), "is the file of --out"),
    ):
        assert remove(*flags) == 2, flags
        assert message in capsys.readouterr().err
    assert read(place.documents) == documents
    assert remove("--top=1") == 0 and remove("--top=2", keep=True) == 2
    assert f"--out={removed} exists: give another file" in capsys.readouterr().err
    assert len(read(removed)) == 1


def test_the_model_writes_completions_once(place, trained_run, capsys, monkeypatch):
    """They are the most probable bytes one after the other, and score as if they were given."""
    asked = [
        {"prompt": "import ", "kind": "code", "answer": "os"},
        {"prompt": [5, 6]},
    ]
    queries = write(place.folder / "asked.jsonl", asked)
    flags = ("--method=identity", "--rank=0", "--completion_tokens=3")
    status, out = place.score(*flags, out="own.jsonl", queries=queries, factors=False)
    assert status == 0
    written = read(f"{out}.completions.jsonl")
    assert [
        {k: v for k, v in row.items() if k in ("prompt", "kind", "answer")} for row in written
    ] == asked
    logits = jax.jit(functools.partial(conjugate.logits_of, trained_run.model))
    for row, context in zip(written, ([0, *BYTES[:7]], [0, 5, 6]), strict=True):
        tokens = []
        while len(tokens) < 3:
            texts = scores.Row(context=context, targets=[*tokens, 1])
            arrays = documents.columns([texts], [0], 1, 24)
            at = len(context) + len(tokens) - 1
            tokens.append(int(logits(trained_run.params["ema"], arrays)[0, at].argmax()))
            if tokens[-1] == 1:  # EOS
                break
        assert row["ended"] == ("eos" if tokens[-1] == 1 else "length")
        assert row["completion_tokens"] == tokens[: -1 if tokens[-1] == 1 else None]
    given = [
        {**q, "completion": row["completion_tokens"]} for q, row in zip(asked, written, strict=True)
    ]
    again = place.score(
        *flags[:2], out="given.jsonl", queries=write(place.folder / "g.jsonl", given), factors=False
    )[1]
    assert read(out) == read(again)

    def decodes(*args, **options):
        raise AssertionError("the completions are there")

    monkeypatch.setattr(generate, "decoder_and_texts", decodes)
    before = pathlib.Path(f"{out}.completions.jsonl").read_bytes()
    assert place.score(*flags, out="own.jsonl", queries=queries, factors=False)[0] == 0
    assert pathlib.Path(f"{out}.completions.jsonl").read_bytes() == before
    capsys.readouterr()
    assert place.command("influence", "report", f"--scores={out}", f"--beside={again}") == 0
    printed = capsys.readouterr().out
    assert f"**{written[0]['completion'].strip()}" in printed
    assert "identity, 2 completions of its own" in printed

    def error(*more, out="own.jsonl", queries=queries):
        status, _ = place.score(*flags[:2], *more, out=out, queries=queries, factors=False)
        assert status == 2
        return capsys.readouterr().err

    assert "of other --completion_tokens" in error("--completion_tokens=4")
    assert "of another model" in error("--completion_tokens=3", "--params=raw")
    assert "must be at least 1" in error("--completion_tokens=0", out="x.jsonl")
    assert "has a completion, and with" in error(
        "--completion_tokens=3", queries=place.queries, out="x.jsonl"
    )
    assert "With --completion_tokens=N the model writes" in error(out="x.jsonl")
    assert "decodes in one process" in error(
        "--completion_tokens=3", "--beam_pipeline_options=--runner=DirectRunner", out="x.jsonl"
    )
    assert not (place.folder / "x.jsonl.completions.jsonl").exists()
    path = pathlib.Path(f"{out}.completions.jsonl")
    path.write_bytes(before.replace(b'"ended"', b'"end"'))
    assert "of other queries" in error("--completion_tokens=3")
    rows = [{**row, "completion_tokens": [9]} for row in written]
    write(path, rows)
    assert "has scores of other completions" in error("--completion_tokens=3")
    assert place.command("influence", "report", f"--scores={out}") == 2
    assert "has changed since it was scored" in capsys.readouterr().err


def test_shared_tokens_are_also_those_of_an_encoders_inputs():
    """A document whose inputs share a token is not one that shares none."""
    query = Row(context=[0], targets=[9], encoder_inputs=[5, 6])
    documents = [
        Row(context=[0], targets=[1, 2], encoder_inputs=[7, 8]),
        Row(context=[0], targets=[1, 2], encoder_inputs=[5, 6]),
    ]
    (other,), (same,) = (
        row["scores"] for row in scorers.Lexical(lexical.tfidf, [query], documents).stream(0)
    )
    assert same > other == pytest.approx(0)


def test_embeddings_are_mean_hidden_states(place, trained_run):
    """The states of the model itself, without the first token's."""
    out = place.folder / "embedding.jsonl"
    if not out.exists():
        assert place.score("--method=embedding", out="embedding.jsonl")[0] == 0
    model, params = trained_run.model, trained_run.params["ema"]

    def mean(tokens):
        hidden = model.apply({"params": params}, jax.numpy.array([tokens]), method="hidden")
        return np.asarray(hidden.hidden_BTD[0, 1:], np.float64).mean(0)

    query = mean([0, *BYTES])
    other = mean([0, *[byte + 3 for byte in b"import sys and os"]])
    rows = [row["scores"][0] for row in read(out)]
    np.testing.assert_allclose(rows[0], 1, rtol=1e-5)
    want = query @ other / np.linalg.norm(query) / np.linalg.norm(other)
    np.testing.assert_allclose(rows[1], want, rtol=1e-3)
    assert rows[3] == 0 and want < 0.999


def test_every_document_of_a_mixture_is_read_once_in_its_whole_length():
    from espalier.data.tokenizers import vocabularies

    seqio = in_seqio()
    sizes = {"influence_few": 2, "influence_many": 9}
    for name, count in sizes.items():
        seqio.TaskRegistry.add(
            name,
            source=_texts([f"{name} {i}" for i in range(count)]),
            preprocessors=[seqio.preprocessors.tokenize],
            output_features={"targets": seqio.Feature(vocabularies.byte(), add_eos=False)},
        )
    seqio.MixtureRegistry.add("influence_both", [(name, 1.0) for name in sizes])
    run = types.SimpleNamespace(
        vocabulary=vocabularies.byte(), encodes=False, start_token=0, context=lambda ids: [0, *ids]
    )
    source = inputs.Source(mixture="influence_both")
    documents = inputs.Documents(run=run, length=15, source=source)
    rows = [vocabularies.byte().decode(row.targets) for row in documents]
    assert sorted(rows) == sorted(
        f"{n} {i}"[:15] for n, count in sizes.items() for i in range(count)
    )
    assert documents.count() == 11 and documents.cut == 9


def _texts(texts):
    import tensorflow as tf

    seqio = in_seqio()
    return seqio.FunctionDataSource(
        lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
            {"targets": texts}
        ),
        splits=("train",),
        num_input_examples={"train": len(texts)},
    )


def test_another_model_for_queries_and_a_mixture_for_documents(place, trained_run, capsys):
    from espalier.data.tokenizers import vocabularies

    seqio, texts = in_seqio(), [row["text"] for row in DOCUMENTS if row.get("text")]
    seqio.TaskRegistry.add(
        "influence_texts",
        source=_texts(texts),
        preprocessors=[seqio.preprocessors.tokenize],
        output_features={"targets": seqio.Feature(vocabularies.byte(), add_eos=False)},
    )
    given = (f"--factors={place.factors}", f"--queries={place.queries}", "--batch_size=8")
    out = place.folder / "mixture.jsonl"
    other = (f"--query_checkpoint={trained_run.path}", "--rank=4")
    status = place.command(
        "influence", "score", *given, "--mixture=influence_texts", f"--out={out}", *other
    )
    assert status == 0 and "correlate at" in capsys.readouterr().out
    rows = [row["scores"] for row in read(out)]
    want = [row["scores"] for row in read(place.score("--rank=4", out="files.jsonl")[1])]
    want = [row for row, document in zip(want, DOCUMENTS, strict=True) if document.get("text")]
    np.testing.assert_allclose(rows, want, rtol=1e-3, atol=1e-3)
    for limit, count in ((None, len(texts)), (2, 2), (100, len(texts))):
        of_mixture = inputs.Documents(
            run=types.SimpleNamespace(vocabulary=vocabularies.byte()),
            length=8,
            source=inputs.Source(mixture="influence_texts", max_documents=limit),
        )
        assert of_mixture.count() == count
    again = ("influence", "score", *given, "--mixture=influence_texts", f"--out={out}", *other)
    texts[-1] = "another text under the same name"
    assert place.command(*again) == 2
    assert "of other documents" in capsys.readouterr().err
    texts[-1] = DOCUMENTS[-1]["text"]
    assert place.command(*again) == 0
    assert place.command("influence", "score", *given, "--mixture=texts", "--out=/tmp/x.jsonl") == 2
    assert "no such SeqIO mixture" in capsys.readouterr().err
    report = place.folder / "mixture_report"
    flags = (f"--scores={out}", f"--out={report}")
    assert place.command("influence", "report", *flags) == 0
    (best, *_), *_ = (q["top"] for q in json.loads((report / "report.json").read_text())["queries"])
    assert best["text"] == texts[best["document"]]


def test_a_stopped_scan_continues_and_a_cut_file_is_completed(place, capsys):
    status, out = place.score(out="stopped.jsonl")
    assert status == 0
    whole = read(out)
    file = pathlib.Path(out)
    lines = file.read_text()
    file.write_text(lines[: len(lines) * 2 // 3])
    capsys.readouterr()
    assert place.command("influence", "report", f"--scores={out}") == 2
    assert "was cut short or damaged" in capsys.readouterr().err
    assert place.score(out="stopped.jsonl")[0] == 0
    again = read(out)
    assert len(again) == len(whole)
    np.testing.assert_allclose(
        [row["scores"] for row in again], [row["scores"] for row in whole], rtol=1e-4, atol=1e-4
    )
    capsys.readouterr()
    file.write_text("".join(lines.splitlines(True)[:2]))
    assert place.command("influence", "report", f"--scores={out}") == 2
    assert "was cut short: it has 2 of 6 rows" in capsys.readouterr().err
    (place.folder / "stopped.jsonl.top.json").unlink()
    assert place.command("influence", "report", f"--scores={out}") == 2
    assert "is not complete" in capsys.readouterr().err


def test_a_fit_that_was_stopped_continues_bit_for_bit(place, monkeypatch):
    """Sums are saved between windows of documents."""
    first = files.read(place.folder / "factors" / "squares")[0]
    monkeypatch.setattr(documents, "BATCHES_SORTED", 1)
    monkeypatch.setattr(stages, "SAVE_SECONDS", -1.0)
    many = write(place.folder / "many.jsonl", DOCUMENTS * 3)
    other = {}
    for name in ("whole", "parts"):
        place.factors = str(place.folder / name)
        if name == "parts":
            original, calls = stages.files.write, []

            def stop(folder, *arguments, original=original, calls=calls):
                original(folder, *arguments)
                calls.append(folder.name)
                if calls.count("covariances.partial") == 1 and len(calls) == 1:
                    raise KeyboardInterrupt

            with monkeypatch.context() as patch:
                patch.setattr(stages.files, "write", stop)
                with pytest.raises(KeyboardInterrupt):
                    place.fit(f"--documents={many}")
            assert (place.folder / "parts" / "covariances.partial").is_dir()
        assert place.fit(f"--documents={many}") == 0
        other[name] = {s: files.read(place.folder / name / s)[0] for s in stages.STAGES}
        assert not (place.folder / name / "covariances.partial").exists()
    jax.tree.map(np.testing.assert_array_equal, other["whole"], other["parts"])
    assert set(other["whole"]["squares"]) == set(first)
    place.factors = str(place.folder / "factors")


def test_scores_by_factors_in_float64_are_summed_in_float64(place, capsys):
    given = [f"--factors={place.folder / 'wide'}", "--rank=0"]
    with jax.enable_x64(True):
        assert place.fit("--factor_dtype=float64", f"--out={place.folder / 'wide'}") == 0
        status, out = place.score(*given, out="wide.jsonl")
    assert status == 0
    arrays, _ = files.read(place.folder / "wide.jsonl.queries")
    assert {x.dtype for x in arrays.values()} == {np.dtype(np.float64)}
    got = np.array([row["scores"] for row in read(out)])
    assert (got.astype(np.float32) != got).any()
    assert place.score(*given, out="narrow.jsonl")[0] == 2
    assert "need JAX_ENABLE_X64=1" in capsys.readouterr().err


@pytest.mark.parametrize("store", ["s3"], indirect=True)
def test_all_of_it_may_be_in_a_store_where_other_hosts_go_on(
    place, store, monkeypatch, tmp_path, capsys, in_shards
):
    root = f"{store.address}/study"
    mirror.publish(place.run, f"{root}/run")
    for name in ("d.jsonl", "q.jsonl"):
        mirror.put(f"{place.folder}/{name}", f"{root}/{name}")
    inputs = [f"--queries={root}/q.jsonl", f"--documents={root}/d.jsonl"]
    fit = ["fit", f"--checkpoint={root}/run", inputs[1], f"--out={root}/factors"]
    score = ["score", f"--factors={root}/factors", *inputs, f"--out={root}/scores.jsonl"]

    def stop(*arguments, **settings):
        raise KeyboardInterrupt

    def run(host, *words):
        monkeypatch.setenv(mirror.COPIES, str(tmp_path / host))
        return place.command("influence", *words)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(stages, "write_eigen", stop)
        run("a", *fit, "--batch_size=8")
    with monkeypatch.context() as patch:
        patch.setattr(stages, "Covariances", stop)  # the first stage is there
        assert run("b", *fit, "--batch_size=8") == 0
    for stage in stages.STAGES:
        here, _ = files.read(place.folder / "factors" / stage)
        there, _ = files.read(pathlib.Path(mirror.local(f"{root}/factors"), stage))
        jax.tree.map(np.testing.assert_array_equal, here, there)

    score += ["--batch_size=8", "--token_scores=1"]
    monkeypatch.setattr(stages, "SAVE_SECONDS", -1.0)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(outputs, "write_top", stop)
        run("a", *score)
    rows = paths.read(f"{root}/scores.jsonl")
    assert run("b", *score) == 0
    assert paths.read(f"{root}/scores.jsonl") == rows
    # A pipeline's shards are there for another host.
    flag, begun = in_shards
    by_shards = [*score, f"--out={root}/shards.jsonl", flag]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards.Shards, "joined", stop)
        run("a", *by_shards)
    assert "shards.jsonl.shards/000000.0.jsonl" in paths.entries(root)
    assert run("c", *by_shards) == 0 and begun == [0]
    assert paths.read(f"{root}/shards.jsonl") == rows
    assert not [name for name in paths.entries(root) if ".shards" in name]
    status, out = place.score("--token_scores=1", out="local.jsonl")
    assert status == 0 and read(out) == list(map(json.loads, rows.splitlines()))
    for host, given in (("c", root), ("c", place.folder)):
        scores = f"{root}/scores.jsonl" if given == root else out
        assert run(host, "report", f"--scores={scores}", f"--out={given}/report") == 0
    here, there = (
        json.loads(paths.read(f"{given}/report/report.json")) for given in (place.folder, root)
    )
    assert there["queries"] == here["queries"] and there["analyses"] == here["analyses"]
    locks = [name for name in paths.entries(root) if ".lock" in name]
    assert not [
        name for name in locks if not name.startswith("run/")
    ]  # copied from a run that other tests use

    capsys.readouterr()
    assert run("a", *score, "--documents=s3://bucket0/none.jsonl") == 2
    assert run("a", *score, f"--documents={root}/none.jsonl") == 2
    assert run("a", *fit, f"--out={store.address}") == 2
    errors = capsys.readouterr().err
    for text in ("no bucket 'bucket0'", "none.jsonl: there is no such file", "is a whole bucket"):
        assert text in errors


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"prompt": "a", "completion": ""}, "line 1: the completion is empty"),
        ({"prompt": "a"}, "line 1 has no 'completion'"),
        ({"prompt": "a" * 600, "completion": "b"}, r"the query has 601 tokens, and the context"),
        ({"prompt": 3, "completion": "b"}, "line 1: the prompt is neither a text"),
        ({"prompt": "a", "completion": "b", "correct": 1}, "line 1: 'correct' is 1: give true or"),
        (None, "has no query"),
    ],
)
def test_a_bad_query_names_its_line_and_the_remedy(place, capsys, query, message):
    queries = write(place.folder / "bad.jsonl", [] if query is None else [query])
    assert place.score(queries=queries, out="bad_scores.jsonl")[0] == 2
    assert re.search(message, capsys.readouterr().err)


def test_what_an_encoder_reads_is_at_most_the_length(tmp_path):
    """A longer query is an error; a longer document is cut and counted."""
    run = types.SimpleNamespace(
        encodes=True,
        start_token=0,
        encode=lambda value, where: value,
        encoder_inputs=lambda row, where: row["inputs"],
    )
    asked = write(tmp_path / "q.jsonl", [{"prompt": [5] * 9, "completion": [7]}])
    assert inputs.read_queries(run, asked, 9)[0].encoder_inputs == [5] * 9
    with pytest.raises(
        LoadError, match="q.jsonl, line 1: the query has 9 tokens, and the context 8"
    ):
        inputs.read_queries(run, asked, 8)
    rows = [{"inputs": [5] * count, "targets": [7] * 2} for count in (8, 9)]
    source = inputs.Source(documents=write(tmp_path / "d.jsonl", rows)).of(run, 8)
    assert [len(row.encoder_inputs) for row in source] == [8, 8] and source.cut == 1
    embedded = write(tmp_path / "e.jsonl", [{**rows[0], "sentence_embedding": [0.5, 1.0]}])
    with pytest.raises(
        LoadError, match="e.jsonl, line 1 has 'sentence_embedding', which influence does not"
    ):
        list(inputs.Source(documents=embedded).of(run, 8))


def test_bad_settings_files_and_factors(place, trained_run, capsys, tmp_path):
    def error(status):
        assert status == 2
        return capsys.readouterr().err

    assert "--damping=0.0 must be a positive number" in error(
        place.score("--damping=0", out="x.jsonl")[0]
    )
    assert "--cg_documents=1025 must be at most 1,024" in error(
        place.score("--method=ekfac_cg", "--cg_documents=1025", out="x.jsonl")[0]
    )
    assert "--sweep_documents=65 must be from 0 to 64" in error(place.fit("--sweep_documents=65"))
    assert "needs --factors" in error(place.score(factors=False, out="x.jsonl")[0])
    assert "has no influence.json" in error(place.score(f"--factors={tmp_path}", out="x.jsonl")[0])
    assert "matches no layer" in error(place.fit("--modules=mpl", f"--out={tmp_path / 'f'}"))
    assert "factors of other settings" in error(place.fit("--labels=empirical"))
    assert "--seed is of sampled labels" in error(place.fit("--labels=empirical", "--seed=1"))
    assert "--length=0 must be at least 1" in error(
        place.fit("--length=0", f"--out={tmp_path / 'f'}")
    )
    assert "there is no such file" in error(
        place.fit("--documents=/none", f"--out={tmp_path / 'f'}")
    )
    status, out = place.score("--method=tfidf", out="one.jsonl")
    assert status == 0
    assert "has scores of other" in error(place.score("--method=identity", out="one.jsonl")[0])
    write(place.folder / "theirs.jsonl", [{"a": 1}])
    assert "is not of `espalier influence score`" in error(place.score(out="theirs.jsonl")[0])
    # Factors of other parameters: the digest in the record is another.
    record = place.folder / "factors" / "influence.json"
    before = record.read_text()
    record.write_text(before.replace(json.loads(before)["model"], "0" * 64))
    try:
        assert "are of another checkpoint" in error(place.score(out="x.jsonl")[0])
    finally:
        record.write_text(before)
    # A flipped bit of the stored factors.
    stored = place.folder / "factors" / "squares" / "model.safetensors"
    whole = stored.read_bytes()
    stored.write_bytes(whole[:-3] + bytes([whole[-3] ^ 1]) + whole[-2:])
    try:
        assert "its checksum is not the recorded one" in error(place.score(out="y.jsonl")[0])
    finally:
        stored.write_bytes(whole)


def test_reports_of_bad_files_are_one_error(place, capsys):
    status, out = place.score("--token_scores=1", "--top=2", out="reported.jsonl")
    assert status == 0
    capsys.readouterr()

    def error(*flags, scores=out):
        assert place.command("influence", "report", f"--scores={scores}", *flags) == 2
        message = capsys.readouterr().err
        assert message.count("error:") == 1 and "Traceback" not in message
        return message

    changed = write(place.folder / "changed.jsonl", [{"text": "import io"}])
    assert "has changed since it was scored" in error(f"--documents={changed}")
    assert "has changed since it was scored" in error(f"--queries={changed}")
    assert "If it was moved, give its new place" in error("--documents=/none.jsonl")
    assert "2 documents at each end are stored" in error("--top=3")
    assert "--within=0 must be at least 1" in error("--within=0")
    lexical = place.score("--method=tfidf", out="lexical.jsonl")[1]
    assert "has none: rank by the score" in error("--rank_by=per_norm", "--top=2", scores=lexical)
    # Its scores are divided by the norms already.
    cosine = place.score("--method=cosine", out="by_angle.jsonl", factors=False)[1]
    assert all(row.keys() == {"scores"} for row in read(cosine))
    best = json.loads(pathlib.Path(f"{cosine}.top.json").read_text())["queries"][0]
    assert [x["document"] for x in best["top_per_norm"]] == [x["document"] for x in best["top"]]
    assert "has none: rank by" in error("--rank_by=per_norm", "--top=2", scores=cosine)
    shorter = place.score("--method=tfidf", "--max_documents=3", out="shorter.jsonl")[1]
    assert "has scores of other documents than --scores" in error("--top=2", f"--beside={shorter}")
    for name, rows, message in (
        (
            "tokens.jsonl",
            [{"query": 9, "document": 0}],
            "line 1 has no text and score of each token",
        ),
        ("texts.jsonl", [{"document": 0}], "a row has no document and text"),
        ("top.json", [{"documents": 6, "queries": [{"top": []}]}], "is damaged"),
        ("top.json", [{"documents": 6, "queries": [[]]}], "is damaged"),
    ):
        path = pathlib.Path(f"{out}.{name}")
        whole = path.read_bytes()
        write(path, rows)
        assert message in error("--top=2")
        path.write_bytes(whole)
    cut = pathlib.Path(f"{out}.tokens.jsonl")
    cut.write_bytes(cut.read_bytes()[:-20])
    assert "delete it, and run the same `espalier influence score` command" in error("--top=2")
    cut.unlink()
    for row, message in (
        ({"scores": [1.0, "2"]}, "is not a row of"),
        ({"scores": [1.0, float("nan")]}, "has a score that is not finite"),
        ({"scores": [1.0, 2.0], "norm": float("inf")}, "has a score that is not finite"),
    ):
        write(pathlib.Path(out), [row] * 6)
        assert message in error("--top=2")
    write(pathlib.Path(out), [{"scores": [1.0, 2.0]}] * 7)
    assert "has rows of another file: it has 7 of 6 rows" in error("--top=2")


def test_settings_that_a_method_does_not_use_are_errors(place, capsys):
    gradients = {"token_scores": 1, "per_layer": True, "query_checkpoint": place.run, "rank": 3}
    gradients |= {"query_dtype": "int8", "modules": ["attention"]}
    damping = {"damping": 0.2, "damping_kind": "absolute"}
    cg, projection = {"cg_steps": 3, "cg_documents": 3}, {"projection": 3}
    precision = {"precision": "high"}
    for names, settings in (
        (("tfidf", "bm25", "embedding"), gradients | damping | cg | projection | precision),
        (("identity", "cosine"), damping | cg | projection | precision),
        (("ekfac", "kfac"), cg | projection),
        (("ekfac_cg",), projection),
        (("trak",), cg | precision),
    ):
        for method, (name, value) in itertools.product(names, settings.items()):
            with pytest.raises(LoadError, match=f"--{name} is read by .* alone, and this is"):
                methods.of_flags(argparse.Namespace(method=method, **{name: value}))
    assert place.score("--method=tfidf", "--rank=3", out="unused.jsonl")[0] == 2
    assert "--rank is read by --method=ekfac or kfac or" in capsys.readouterr().err
    assert place.score("--rank=0", "--query_dtype=int8", out="unused.jsonl")[0] == 2
    assert "--rank=0 has none" in capsys.readouterr().err
    assert place.score("--split=test", out="unused.jsonl")[0] == 2
    assert place.fit("--module=json", f"--out={place.folder / 'unused'}") == 2
    assert capsys.readouterr().err.count("add --mixture=NAME, or remove") == 2
    assert place.score("--method=trak", "--projection=0", out="unused.jsonl")[0] == 2
    assert "--projection=0 must be at least 1" in capsys.readouterr().err


def test_ranking_divides_by_norms_and_takes_the_first_of_equal_scores(tmp_path):
    path = write(
        tmp_path / "s.jsonl",
        [{"scores": [s], "norm": n} for s, n in ((1.0, 1.0), (4.0, 8.0), (4.0, 2.0), (-3.0, 1.0))],
    )
    outputs.write_top(path, top=2)
    (query,) = outputs.read_top(path)["queries"]
    assert [e["document"] for e in query["top"]] == [1, 2]
    assert [e["document"] for e in query["top_per_norm"]] == [2, 0]
    assert [e["value"] for e in query["top_per_norm"]] == [2, 1]
    assert query["bottom"][0] == {"document": 3, "score": -3.0, "value": -3.0}


def test_scores_over_scores_per_norm_are_one_number_of_each_document(tmp_path):
    """Its norm, whatever the query."""
    r = np.random.default_rng(0)
    scores_NQ, norms_N = r.normal(size=(20, 5)), r.uniform(0.1, 9, 20)
    rows = zip(scores_NQ.tolist(), norms_N.tolist(), strict=True)
    path = write(tmp_path / "s.jsonl", [{"scores": s, "norm": n} for s, n in rows])
    outputs.write_top(path, top=20)
    queries = outputs.read_top(path)["queries"]
    ratios_QN = [
        [e["score"] / e["value"] for e in sorted(q["top_per_norm"], key=lambda e: e["document"])]
        for q in queries
    ]
    np.testing.assert_allclose(ratios_QN, np.tile(norms_N, (5, 1)), rtol=1e-6)


METHODS = [("--method=ekfac", "--per_layer", "--token_scores=1"), ("--method=embedding",)]


@pytest.mark.parametrize("flags", METHODS)
def test_shards_of_documents_have_the_scores_of_one_process(place, flags, in_shards, capsys):
    flag, begun = in_shards
    texts = write(
        place.folder / "many.jsonl", [*DOCUMENTS, *({"tokens": [5] * i} for i in range(50))]
    )
    flags = (
        *flags,
        f"--documents={texts}",
        "--max_documents=40",
    )  # batches of 8, two of them in a shard
    outs = []
    for name, more in (("one", ()), ("shards", (flag,))):
        status, out = place.score(*flags, *more, out=f"{name}{flags[0]}.jsonl")
        assert status == 0
        outs.append(out)
    assert begun == [2, 1, 0]
    assert "documents that were cut, or that repeat an earlier one, are not counted" in (
        capsys.readouterr().out
    )
    ends = ["", ".top.json", ".texts.jsonl", *([".tokens.jsonl"] if len(flags) > 3 else [])]
    for end in ends:
        one, other = (pathlib.Path(out + end).read_bytes() for out in outs)
        assert one == other
    assert not pathlib.Path(f"{outs[1]}.shards").exists()
    # All rows are there: nothing is done again.
    assert place.score(*flags, flag, out=f"shards{flags[0]}.jsonl")[0] == 0
    assert begun == [2, 1, 0]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--method=bm25",), "--method=bm25 scores all documents together, in one process"),
        (("--mixture=x", "--method=embedding"), "--mixture is read by one process"),
    ],
)
def test_what_a_pipeline_cannot_score_is_refused(place, flags, message, in_shards, capsys):
    own = [f"--checkpoint={place.run}", f"--queries={place.queries}", *flags, in_shards[0]]
    if "--mixture=x" not in flags:
        own.append(f"--documents={place.documents}")
    assert place.command("influence", "score", *own, f"--out={place.folder}/no.jsonl") == 2
    assert message in capsys.readouterr().err


@pytest.mark.beam
@pytest.mark.multiprocess
def test_a_pipeline_has_the_scores_of_one_process(place):
    texts = [{"tokens": [5 + i % 90] * (i % 20 + 1)} for i in range(1100)]  # in three shards
    own = [f"--documents={write(place.folder / 'corpus.jsonl', texts)}", "--method=cosine"]
    _, one = place.score(*own, out="long_one.jsonl")
    flag = "--runner=DirectRunner,--direct_running_mode=multi_processing,--direct_num_workers=2"
    status, out = place.score(*own, f"--beam_pipeline_options={flag}", out="long.jsonl")
    assert status == 0 and pathlib.Path(out).read_bytes() == pathlib.Path(one).read_bytes()
