"""The benchmark of token caches: what it writes, what both sides make of it, and how it measures processes."""

import json
import os
import sys

import numpy as np
import pytest

from tests.benchmarks import compare, data_build
from tests.benchmarks.data import build_peers

TEXTS = [
    *(f"def f{i}(x):\n    return x + {i}  # a comment, and {i * 7} more\n" for i in range(80)),
    "Prose, with an umlaut: Zürich, and 漢字.",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("build")
    data_build.write_tokenizers(path, TEXTS, {"sentencepiece": 340, "huggingface": 300})
    (path / "texts").mkdir()
    for i in range(2):
        lines = [json.dumps({"text": text}) + "\n" for text in TEXTS[i::2]]
        (path / "texts" / f"{i}.jsonl").write_text("".join(lines))
    return path


def _model(folder, kind):
    (model,) = (path for path in (folder / kind).iterdir() if path.stem == "tokenizer" and path.suffix in (".json", ".model"))  # fmt: skip
    return str(model)


@pytest.mark.parametrize("kind", data_build.KINDS)
def test_the_peer_and_a_cache_have_the_same_tokens(folder, kind, tmp_path):
    command, variables = data_build.command(str(folder), kind, "ours", 2, str(tmp_path / "cache"))
    compare.timed(command, env=variables)
    encoded = build_peers.encoder(_model(folder, kind))(TEXTS)
    assert all(len(ids) > 1 and ids[-1] == encoded[0][-1] for ids in encoded)  # the end of text
    assert data_build.made("ours", str(tmp_path / "cache")) == build_peers.digest(encoded)


def test_datasets_writes_what_is_read_back(folder, tmp_path):
    pytest.importorskip("datasets")
    tokenizer = _model(folder, "huggingface")
    build_peers.datasets(str(folder / "texts"), tokenizer, str(tmp_path), 1)
    encoded = build_peers.encoder(tokenizer)(TEXTS)
    assert build_peers.read_datasets(str(tmp_path)) == build_peers.digest(encoded)


def test_datatroves_files_are_read_as_documents(tmp_path):
    (tmp_path / "tokens").mkdir()
    np.asarray([5, 6, 1, 7, 1], "<u2").tofile(tmp_path / "tokens" / "00000_unshuffled.ds")
    np.asarray([3, 5], "<u8").tofile(tmp_path / "tokens" / "00000_unshuffled.ds.index")
    assert build_peers.read_datatrove(str(tmp_path)) == build_peers.digest([[7, 1], [5, 6, 1]])


def test_a_digest_knows_documents_and_not_their_order():
    assert build_peers.digest([[1, 2], [3]]) == build_peers.digest([[3], [1, 2]])
    assert build_peers.digest([[1, 2], [3]]) != build_peers.digest([[1], [2, 3]])
    assert build_peers.digest([np.asarray([1, 2], "<u2")])["tokens"] == 2


def test_texts_are_distinct_and_a_quarter_is_prose():
    documents = data_build.documents(400_000)
    texts = [text for _, text in documents]
    assert len(set(texts)) == len(texts) > 10
    sizes = {prose: 0 for prose in (True, False)}
    for suffix, text in documents:
        sizes[suffix != ".py"] += len(text.encode())
    assert all(size > 100_000 - 1 for size in sizes.values())


def test_figures_are_ratios_of_all_sides_and_tell_differing_tokens(monkeypatch):
    seconds = {"ours": 2.0, "datasets": 4.0, "datatrove": 6.0, "library": 1.0}

    def measure(folder, kind, side, workers):
        tokens = 10_000_000 + (side == "datatrove" and kind == "wrong")
        made = {"documents": 1, "tokens": tokens, "sha256": "x"}
        use = {"wall_s": seconds[side] / workers, "process_cpu_s": seconds[side]}
        return {**use, "peak_mb": 100.0, "other_load": 0.0, "made": json.dumps(made)}

    monkeypatch.setattr(data_build, "_measure", measure)
    monkeypatch.setitem(data_build.KINDS, "wrong", 1)
    monkeypatch.setitem(data_build.PEERS, "wrong", ("datasets", "datatrove"))
    facts = {"documents": 1, "megabytes": 1.0, "python_share": 0.7}
    monkeypatch.setattr(compare, "measured", lambda command: facts)
    figures = data_build.run(rounds=2)
    made = figures["huggingface"]
    assert made["speed_over_datatrove_2"]["median"] == 3.0
    assert made["processor_time_of_datasets_1"]["median"] == 0.5
    assert made["ours_2_workers_over_1"]["median"] == 2.0
    assert made["million_tokens_per_s"]["ours_1"] == [5.0, 5.0]
    assert made["same_tokens"] and not figures["wrong"]["same_tokens"]


def test_the_time_of_orphans_counts_and_their_memory_is_seen():
    child = "import time; x = bytearray(50_000_000); t = time.process_time()\nwhile time.process_time() - t < 0.5: pass"
    code = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {child!r}])"
    with data_build.PeakMemory() as memory:
        _, use = compare.timed([sys.executable, "-c", code])
    assert use["process_cpu_s"] >= 0.5
    assert memory.peak > 50e6
    assert data_build.held(os.getpid()) > 1e6 and data_build.held(-1) == 0
