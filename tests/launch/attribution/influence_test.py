"""The command `influence` on a tiny run: factors, scores, reports, what continues after a stop, and bad input."""

import json
import pathlib
import re
import runpy
import sys
import warnings

import jax
import numpy as np
import pytest

from launch import environment
from launch.attribution import ranking
from trainers.checkpoints import state_tree
from trainers.influence import conjugate, documents, files, scores
from trainers.influence import fit as stages

DOCUMENTS = [
    {"text": "import os"},
    {"text": "import sys and os"},
    {"tokens": [5, 6, 7, 8]},
    {"text": ""},
    {"text": "os.path.join"},
    {"text": "import os"},  # repeats the first
]
QUERIES = [
    {"prompt": "import ", "completion": "os"},
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
            runpy.run_module(f"launch.{arguments[0]}", run_name="__main__")
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
        np.testing.assert_allclose(sum(row["scores"]), total, rtol=1e-2)
    report = place.folder / "report"
    flags = (f"--scores={out}", "--top=2", "--bottom", f"--out={report}")
    assert place.command("influence", "report", *flags) == 0
    text = capsys.readouterr().out
    assert "# Influence of 6 documents (ekfac)" in text and "import os" in text
    table = json.loads((report / "report.json").read_text())
    best = table["queries"][1]["top"][0]
    assert best["document"] == 2 and best["score"] == pytest.approx(rows[2]["scores"][1])
    assert best["per_nat"] == pytest.approx(best["score"] / max(table["queries"][1]["nats"], 0.1))
    assert place.command("influence", "report", f"--scores={out}", "--rank_by=per_norm") == 0


def test_identity_and_cosine_are_products_of_gradients(place, trained_run):
    query = gradient(trained_run, [0, *BYTES[:7]], BYTES[7:])
    document = gradient(trained_run, [0], BYTES)
    got = {}
    for method in ("identity", "cosine"):
        status, out = place.score(
            f"--method={method}", "--rank=0", out=f"{method}.jsonl", factors=False
        )
        assert status == 0
        got[method] = read(out)[0]
    dot = query @ document
    norms = np.linalg.norm(query), np.linalg.norm(document)
    np.testing.assert_allclose(got["identity"]["scores"][0], dot, rtol=1e-3)
    np.testing.assert_allclose(got["identity"]["norm"], norms[1], rtol=1e-4)
    np.testing.assert_allclose(got["cosine"]["scores"][0], dot / np.prod(norms), rtol=1e-3)


def test_other_methods_and_low_ranks(place, capsys):
    for method in ("kfac", "ekfac_cg", "tfidf", "bm25"):
        if method == "bm25":
            pytest.importorskip("bm25s")
        flags = (f"--method={method}", "--cg_steps=2", "--cg_documents=2", "--rank=4")
        status, out = place.score(*flags, out=f"{method}.jsonl")
        assert status == 0, method
        rows = read(out)
        assert len(rows) == 6 and np.isfinite([row["scores"] for row in rows]).all()
    _, record = files.read(place.folder / "ekfac_cg.jsonl.queries")
    assert [len(note["objectives"]) for note in record["notes"]] == [3, 3]
    assert all(
        a >= b
        for n in record["notes"]
        for a, b in zip(n["objectives"], n["objectives"][1:], strict=False)
    )
    printed = capsys.readouterr().out
    assert "query gradients keep" in printed and "correlate at" in printed


def test_another_model_for_queries_and_a_mixture_for_documents(place, trained_run, capsys):
    import seqio
    import tensorflow as tf

    from data.tokenizers import vocabularies

    texts = [row["text"] for row in DOCUMENTS if row.get("text")]
    seqio.TaskRegistry.add(
        "influence_texts",
        source=seqio.FunctionDataSource(
            lambda split, shuffle_files, seed=None: tf.data.Dataset.from_tensor_slices(
                {"targets": texts}
            ),
            splits=("train",),
        ),
        preprocessors=[seqio.preprocessors.tokenize],
        output_features={"targets": seqio.Feature(vocabularies.byte(), add_eos=False)},
    )
    given = (f"--factors={place.factors}", f"--queries={place.queries}", "--batch_size=8")
    out = place.folder / "mixture.jsonl"
    other = f"--query_checkpoint={trained_run.path}"
    status = place.command(
        "influence", "score", *given, "--mixture=influence_texts", f"--out={out}", other
    )
    assert status == 0
    rows = [row["scores"] for row in read(out)]
    want = [row["scores"] for row in read(place.score(out="files.jsonl")[1])]
    want = [row for row, document in zip(want, DOCUMENTS, strict=True) if document.get("text")]
    np.testing.assert_allclose(rows, want, rtol=1e-3, atol=1e-3)
    assert place.command("influence", "score", *given, "--mixture=texts", "--out=/tmp/x.jsonl") == 2
    assert "no such SeqIO mixture" in capsys.readouterr().err
    assert place.command("influence", "report", f"--scores={out}") == 0  # without the texts


def test_a_stopped_scan_continues_and_a_cut_file_is_completed(place, capsys):
    status, out = place.score(out="stopped.jsonl")
    assert status == 0
    whole = read(out)
    file = pathlib.Path(out)
    lines = file.read_text()
    file.write_text(lines[: len(lines) * 2 // 3])
    assert place.command("influence", "report", f"--scores={out}") == 2
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


@pytest.mark.parametrize(
    ("query", "message"),
    [
        ({"prompt": "a", "completion": ""}, "line 1: the completion is empty"),
        ({"prompt": "a"}, "line 1 has no 'completion'"),
        ({"prompt": "a" * 600, "completion": "b"}, r"the query has 601 tokens, and the context"),
        ({"prompt": 3, "completion": "b"}, "line 1: the prompt is neither a text"),
        (None, "has no query"),
    ],
)
def test_a_bad_query_names_its_line_and_the_remedy(place, capsys, query, message):
    queries = write(place.folder / "bad.jsonl", [] if query is None else [query])
    assert place.score(queries=queries, out="bad_scores.jsonl")[0] == 2
    assert re.search(message, capsys.readouterr().err)


def test_bad_settings_files_and_factors(place, trained_run, capsys, tmp_path):
    def error(status):
        assert status == 2
        return capsys.readouterr().err

    assert "--damping=0.0 must be a positive number" in error(
        place.score("--damping=0", out="x.jsonl")[0]
    )
    assert "needs --factors" in error(place.score(factors=False, out="x.jsonl")[0])
    assert "has no influence.json" in error(place.score(f"--factors={tmp_path}", out="x.jsonl")[0])
    assert "matches no layer" in error(place.fit("--modules=mpl", f"--out={tmp_path / 'f'}"))
    assert "factors of other settings" in error(place.fit("--labels=empirical"))
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
    assert "is not of `launch.influence score`" in error(place.score(out="theirs.jsonl")[0])
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


def test_ranking_divides_by_norms_and_takes_the_first_of_equal_scores(tmp_path):
    path = write(
        tmp_path / "s.jsonl",
        [{"scores": [s], "norm": n} for s, n in ((1.0, 1.0), (4.0, 8.0), (4.0, 2.0), (-3.0, 1.0))],
    )
    ranking.write_top(path, top=2)
    (query,) = ranking.read_top(path)["queries"]
    assert [e["document"] for e in query["top"]] == [1, 2]
    assert [e["document"] for e in query["top_per_norm"]] == [2, 0]
    assert [e["value"] for e in query["top_per_norm"]] == [2, 1]
    assert query["bottom"][0] == {"document": 3, "score": -3.0, "value": -3.0}
