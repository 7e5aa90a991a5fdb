"""The command that embeds domains: sources, encoders, files that are extended, and errors."""

import gzip
import json
import subprocess
import sys
import types

import jax
import numpy as np
import pytest

from espalier.data import tasks
from espalier.data.nexus import domain_embeddings
from espalier.launch.nexus import domain_vectors

LAG = "--gin_file=t5x_configs/data/lag_domains.gin"
TEXTS = {"law": ["lex dura", "sed lex", "ius"], "code": ["import os", "x = 1"], "sea": ["waves"]}


@pytest.fixture(autouse=True)
def nothing_left():
    yield
    tasks.clear()


@pytest.fixture
def embed(command, tmp_path, capsys):
    """Runs the command on TEXTS; returns what it wrote, or its message if it failed."""
    for name, texts in TEXTS.items():
        lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    path = tmp_path / "domains.json"

    def run(*flags, names=("law", "code", "sea"), extend=False):
        to = f"--{'extend' if extend else 'output'}={path}"
        given = [x for name in names for x in ("--domain", f"{name}={tmp_path / name}.jsonl")]
        before = path.read_bytes() if path.exists() else None
        if status := command("prepare embed_domains", to, *given, *flags):
            assert status == 2
            assert (path.read_bytes() if path.exists() else None) == before
            return capsys.readouterr().err.partition("error: ")[2]
        return domain_embeddings.read(path)

    run.path = path
    return run


def reread(path):
    return json.loads(path.read_text())


def test_help_shows_the_encoders_at_once():
    code = (
        "import runpy, sys; sys.argv = ['embed_domains', '--help']\n"
        "try: runpy.run_module('espalier.launch.nexus.embed_domains', run_name='__main__')\n"
        "except SystemExit: print(sorted({'jax', 'tensorflow', 'gin', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.rstrip().endswith("[]")
    assert "--domain four=task:lag_4" in done.stdout and "sentence-transformers" in done.stdout


def test_vectors_may_stay_uncentred_or_be_lengthened_in_a_new_file_alone(embed):
    made = embed("--dim=32", "--mean=none", "--length=17", names=("law", "code"))
    assert not made.mean_M.any() and made.length == 17.0
    np.testing.assert_allclose(np.linalg.norm(made.vectors(), axis=1), 17.0, rtol=1e-6)
    raw_M = made.domains["law"].raw_M
    np.testing.assert_allclose(
        made.vectors(["law"])[0], 17 * raw_M / np.linalg.norm(raw_M), rtol=1e-5
    )
    assert "are of a new file" in embed("--mean=none", names=("sea",), extend=True)
    assert embed(names=("sea",), extend=True).length == 17.0


def test_files_are_embedded_and_extended_with_the_settings_they_began_with(embed, capsys):
    made = embed("--dim=32", "--order=1", "--seed=3", names=("law", "code"))
    assert made.encoder == {
        "kind": "ngrams",
        "order": 1,
        "dim": 32,
        "documents": 2000,
        "tokens": 512,
        "seed": 3,
    }
    assert [made.domains[name].documents for name in made.names] == [3, 2]
    np.testing.assert_allclose(made.vectors()[0], -made.vectors()[1], rtol=1e-6)
    assert "nearest code (-1.00)" in capsys.readouterr().out
    before = reread(embed.path)
    added = embed("--dim=32", names=("sea",), extend=True)
    after = reread(embed.path)
    assert after["domains"].pop("sea")["documents"] == 1
    assert after == before and added.dim == 32


def test_an_extended_file_may_be_another_one(embed, command, tmp_path):
    embed("--dim=32", names=("law", "code"))
    before, other = embed.path.read_bytes(), tmp_path / "more.json"
    flags = (f"--extend={embed.path}", f"--output={other}", f"--domain=sea={tmp_path}/sea.jsonl")
    assert command("prepare embed_domains", *flags) == 0
    assert embed.path.read_bytes() == before
    assert domain_embeddings.read(other).names == ("law", "code", "sea")


def test_of_each_source_the_first_documents_may_be_all_that_is_read(embed, tmp_path):
    (tmp_path / "endless.jsonl").write_text(json.dumps({"text": "lex dura"}) + "\n\n{" + "\n")
    found = embed(
        "--limit=1", "--dim=32", "--domain", f"x={tmp_path}/endless.jsonl", names=("law", "code")
    )
    assert [found.domains[name].documents for name in found.names] == [1, 1, 1]
    np.testing.assert_array_equal(found.domains["x"].raw_M, found.domains["law"].raw_M)
    embed.path.unlink()
    assert "--limit=0 must be at least 1" in embed("--limit=0")
    assert "--limit is for encoders that read" in embed("--limit=2", "--encoder=one_hot")


def test_a_file_that_another_command_has_extended_meanwhile_is_left_as_it_is(
    embed, command, monkeypatch, capsys, tmp_path
):
    embed("--dim=32", names=("law", "code"))
    draw = domain_vectors.draw
    more = tmp_path / "more.jsonl"
    more.write_text('{"text": "more"}\n')

    def slowly(name, *given):
        if name == "sea":  # while it reads, another one begins and ends
            flags = (f"--extend={embed.path}", f"--domain=more={more}")
            assert command("prepare embed_domains", *flags) == 0
        return draw(name, *given)

    monkeypatch.setattr(domain_vectors, "draw", slowly)
    flags = (f"--extend={embed.path}", f"--domain=sea={tmp_path}/sea.jsonl")
    assert command("prepare embed_domains", *flags) == 2
    assert "was written by another command meanwhile" in capsys.readouterr().err
    assert domain_embeddings.read(embed.path).names == ("law", "code", "more")


def test_an_extension_by_another_encoder_is_an_error(embed):
    embed("--dim=32", names=("law", "code"))
    for flag in ("--dim=64", "--order=3", "--tokens=100", "--seed=1"):
        message = embed(flag, names=("sea",), extend=True)
        assert "ngrams (order 2, dim 32" in message and flag[2:].replace("=", " ") in message
    assert "and this encoder is one_hot" in embed("--encoder=one_hot", names=("sea",), extend=True)
    assert "already has the domain 'law'" in embed(names=("law",), extend=True)
    assert "exists already" in embed()


def test_errors_of_flags_and_sources(embed, tmp_path, command, capsys):
    assert "--order does not apply to --encoder=random" in embed("--encoder=random", "--order=2")
    assert "--dim=0 must be at least 1" in embed("--dim=0")
    assert "--seed=-1" in embed("--seed=-1")
    assert "--encoder=model needs --checkpoint=DIR" in embed("--encoder=model")
    assert "there is no domain" in embed(names=())
    assert "expected NAME=SOURCE" in embed("--domain=lone")
    assert "--domain=law occurs twice" in embed(names=("law", "law"))
    assert "matches no file" in embed("--domain", "none=/nowhere/*.jsonl")
    assert "no key 'body'" in embed("--text_key=body")
    (tmp_path / "empty.jsonl").write_text('{"text": ""}\n')
    assert "domain 'empty': " in embed(names=("law", "empty"))
    assert "domain 'law' equals the mean" in embed(names=("law",))
    assert "domain 'short': all documents have fewer than 9 characters" in embed(
        "--order=9", "--domain", f"short={tmp_path / 'sea.jsonl'}", names=("code",)
    )
    assert "task:lag_4: no such task; there are none" in embed("--domain=x=task:lag_4")


def test_documents_are_drawn_from_all_of_a_source_and_are_the_same_each_time(embed, tmp_path):
    texts = [f"{i:04d} " * 300 for i in range(400)]
    with gzip.open(tmp_path / "many.jsonl.gz", "wt") as file:
        file.writelines(json.dumps({"text": text}) + "\n" for text in texts)
    (tmp_path / "lines.txt").write_text("one line\nanother\n\nthird\n")
    sources = [f"--domain=many={tmp_path / '*.gz'}", f"--domain=lines={tmp_path / 'lines.txt'}"]
    made = embed(*sources, "--documents=40", "--document_per=line", names=())
    assert [made.domains[name].documents for name in made.names] == [40, 3]
    first = embed.path.read_bytes()
    embed.path.unlink()
    embed(*sources, "--documents=40", "--document_per=line", names=())
    assert embed.path.read_bytes() == first
    from espalier.launch.nexus import domain_vectors

    flags = types.SimpleNamespace(text_key="text", document_per="file", limit=None)
    counts = np.zeros(400)
    for seed in range(50):
        settings = {"documents": 40, "tokens": 10, "seed": seed}
        drawn = domain_vectors.draw("many", str(tmp_path / "*.gz"), settings, flags)
        assert {len(text) for text in drawn} == {640} and len(set(drawn)) == 40
        counts[[int(text[:4]) for text in drawn]] += 1
    quarters = counts.reshape(4, 100).sum(1)  # of 500 each, were they equally probable
    assert np.abs(quarters - 500).max() < 4 * np.sqrt(500 * 0.75)


def test_tasks_that_gin_registers(embed):
    few = "--gin.DOCUMENTS=300"
    wanted = ["--domain=four=task:lag_4", "--domain=five=task:lag_5", "--domain=nine=task:lag_9"]
    made = embed(LAG, few, *wanted, "--documents=200", names=())
    assert made.domains["four"].documents == 200 and made.domains["four"].source == "task:lag_4"
    four, five, nine = made.vectors()
    assert four @ five > four @ nine
    tasks.clear()
    message = embed(LAG, few, "--domain=x=task:lag_6", names=(), extend=True)
    assert "no such task" in message and "lag_" in message


def test_the_states_of_a_run(embed, trained_run, tmp_path):
    flags = ("--encoder=model", f"--checkpoint={trained_run.path}", "--tokens=6")
    made = embed(*flags, names=("law", "code"))

    variables = {"params": trained_run.params["ema"]}
    hidden = jax.jit(
        lambda ids: trained_run.model.apply(variables, ids, method="hidden").hidden_BTD
    )

    def states(text):
        """Of the tokens after the start, a text at a time, padded with what they do not see."""
        bytes_T = text.encode()[:6]
        ids = [0, *(byte + 3 for byte in bytes_T), *[0] * (6 - len(bytes_T))]
        return np.asarray(hidden(np.array([ids])), np.float64)[0, 1 : len(bytes_T) + 1].mean(0)

    for name in ("law", "code"):
        want = np.mean([states(text) for text in TEXTS[name]], axis=0)
        np.testing.assert_allclose(made.domains[name].raw_M, want, atol=2e-5)
    assert made.dim == 16 and len(made.encoder["digest"]) == 64
    before = reread(embed.path)
    embed(names=("sea",), extend=True)  # the checkpoint is known
    after = reread(embed.path)
    del after["domains"]["sea"]
    assert after == before
    # Other parameters are another encoder.
    message = embed(
        "--params=raw", "--domain", f"sky={tmp_path / 'sea.jsonl'}", names=(), extend=True
    )
    assert message.count("digest") == 2 and "cannot be compared" in message


@pytest.fixture
def sentence_package(monkeypatch):
    """A package sentence_transformers whose model counts letters."""

    class SentenceTransformer:
        max_seq_length = 512

        def __init__(self, folder, *, local_files_only, trust_remote_code):
            assert local_files_only and not trust_remote_code

        def encode(self, texts, *, batch_size, convert_to_numpy, show_progress_bar):
            cut = [text[: self.max_seq_length] for text in texts]
            return np.array([[text.count(x) for x in "aeiou"] for text in cut], np.float32)

    package = types.SimpleNamespace(SentenceTransformer=SentenceTransformer)
    monkeypatch.setitem(sys.modules, "sentence_transformers", package)


def test_a_sentence_encoder(embed, sentence_package, tmp_path):
    folder = tmp_path / "model"
    message = embed("--encoder=sentences", f"--sentence_model={folder}")
    assert "there is no such folder. Models are not downloaded" in message
    folder.mkdir()
    (folder / "weights").write_text("1")
    flags = ("--encoder=sentences", f"--sentence_model={folder}", "--tokens=5")
    made = embed(*flags, names=("law", "code"))
    np.testing.assert_allclose(made.domains["law"].raw_M, [0, 2 / 3, 1 / 3, 0, 1 / 3])
    moved = folder.rename(tmp_path / "moved")
    embed(f"--sentence_model={moved}", names=("sea",), extend=True)
    (moved / "weights").write_text("2")
    assert "cannot be compared" in embed(
        f"--sentence_model={moved}",
        "--domain",
        f"sky={tmp_path / 'sea.jsonl'}",
        names=(),
        extend=True,
    )


def test_without_the_package_the_remedy_is_named(embed, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    message = embed("--encoder=sentences", f"--sentence_model={tmp_path}")
    assert "pip install -e '.[sentences]'" in message


def test_controls_need_no_documents(embed):
    made = embed("--encoder=one_hot", "--dim=3", "--domain=a", "--domain=b=/nowhere", names=())
    np.testing.assert_array_equal(made.vectors(), np.eye(3)[:2])
    assert not made.mean_M.any() and made.domains["b"].documents == 0
    more = embed("--domain=c", names=(), extend=True)
    np.testing.assert_array_equal(more.vectors(), np.eye(3))
    assert "set --dim to at least 4" in embed("--domain=d", names=(), extend=True)
