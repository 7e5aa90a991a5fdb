"""docs/start/released_mixture.md runs as shown, with a smaller model and fewer steps, and what it says of the mixture holds."""

import json
import pathlib
import re
import shlex

import numpy as np
import pytest
import safetensors.numpy

from espalier.data import tasks
from espalier.model.hf.files.safetensors_files import SINGLE

PAGE = pathlib.Path(__file__).parents[2] / "docs" / "start" / "released_mixture.md"
SIZES = {"num_layers": 2, "embed_dim": 16, "num_heads": 2, "num_kv_heads": 1, "mlp_dim": 16}
SMALL = [f"--gin.config.TransformerConfig.{name}={size}" for name, size in SIZES.items()]
FEWER = {r"TRAIN_STEPS=\d+": "TRAIN_STEPS=2", "'targets': 128": "'targets': 32"}
FEWER |= {
    "BATCH_SIZE=16": "BATCH_SIZE=8",
    "batch_size=16": "batch_size=8",
    "length=64": "length=32",
}


def blocks(language):
    text = PAGE.read_text(encoding="utf-8")
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE)
    return [block for name, block in found if name == language]


def commands():
    """The words of every command of the page, in order."""
    shown = "".join(blocks("bash")).replace("\\\n", " ")
    words = [shlex.split(line) for line in shown.splitlines()]
    assert words.pop(0) == ["python", "make_files.py"]
    assert {first for first, *_ in words} == {"espalier"}
    return [rest for _, *rest in words]


def smaller(words):
    for pattern, fewer in FEWER.items():
        words = [re.sub(pattern, fewer, word) for word in words]
    words += SMALL if "--gin.MODEL_DIR=runs/seed" in words else []
    # Of the three projections of each MLP, one has factors: less to compile.
    fit = ["--sweep_documents=0", "--modules=.*mlp/(shared/)?down"]
    return words + (fit if words[:2] == ["influence", "fit"] else [])


def read(name):
    return [json.loads(line) for line in pathlib.Path(name).read_text().splitlines()]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The working directory, with the files of the page."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "cache"))
    make_files, _ = blocks("python")
    exec(compile(make_files, "make_files.py", "exec"), {"__name__": "__main__"})
    documents = read("documents.jsonl")[
        ::19
    ]  # 8, which are one batch and so one length to compile for
    pathlib.Path("documents.jsonl").write_text("".join(json.dumps(x) + "\n" for x in documents))
    (merge,) = blocks("yaml")
    (tmp_path / "merge.yml").write_text(merge)
    return tmp_path


def test_a_mixture_of_three_parents_is_trained_merged_aligned_released_and_used(
    folder, command, capsys
):
    refused = "--to_hf=released_bam"
    printed = {}
    for words in commands():
        status = command(*smaller(words))
        tasks.clear()
        out, err = capsys.readouterr()
        assert status == (2 if refused in words else 0), err
        printed[" ".join(words)] = out, err

    config = json.loads((folder / "released" / "config.json").read_text())
    want = {"model_type": "cohere2_moe", "num_experts": 3, "num_experts_per_tok": 2}
    want |= {"num_shared_experts": 1, "shared_expert_combination_strategy": "sum"}
    assert want.items() <= config.items()
    assert config["layer_types"] == ["sliding_attention", "full_attention"]
    tensors = safetensors.numpy.load_file(folder / "released" / SINGLE)
    routers = [tensors[f"model.layers.{i}.mlp.gate.weight"] for i in range(2)]
    assert all(router.shape == (3, 16) and router.std() > 0 for router in routers)
    for there, here in zip(read("run.jsonl"), read("read_back.jsonl"), strict=True):
        np.testing.assert_allclose(here["logprobs"], there["logprobs"], atol=1e-5)

    assert not (folder / "released_bam").exists()
    shown = next(x for x in blocks("") if "MixtureOfAttention" in x)
    (err,) = (err for words, (_, err) in printed.items() if refused in words)
    assert " ".join(shown.split()) in " ".join(err.split())

    documents = read("documents.jsonl")
    scores = read("scores.jsonl")
    assert [len(row["scores"]) for row in scores] == [3] * len(documents)
    assert np.std([row["scores"] for row in scores]) > 0
    (report,) = (out for words, (out, _) in printed.items() if "influence report" in words)
    assert "The gate of" in report
