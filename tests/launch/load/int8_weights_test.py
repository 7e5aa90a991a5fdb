"""Commands with --weights_dtype=int8: results of the rounded weights, what is in memory while they are read, and refusals."""

import json

import numpy as np
import pytest
from flax import traverse_util

from espalier.launch.load.load import load
from espalier.model.hf import load as loading
from espalier.model.hf import plan
from espalier.model.transforms import int8_weights
from espalier.trainers.checkpoints import array_files, manifest, restore_params
from tests.launch.load.hf_checkpoint_test import llama  # noqa: F401  # a fixture

INT8 = "--weights_dtype=int8"


def rounded(run):
    """A run with float weights that are what int8 ones mean, from float64."""
    flat = traverse_util.flatten_dict(run.params, sep="/")
    count = 0
    for path, value in flat.items():
        if path.endswith("/kernel"):
            w = np.asarray(value, np.float64)
            scale = abs(w).max(-2, keepdims=True) / 127
            flat[path] = (np.rint(w / scale) * scale).astype(np.float32)
            count += 1
    assert count >= 7
    return run.with_params(traverse_util.unflatten_dict(flat, sep="/"))


@pytest.fixture
def rows(command, tmp_path):
    """Runs a command on texts; returns the rows that it writes."""

    def run(name, checkpoint, *flags):
        source, made = tmp_path / "x.jsonl", tmp_path / "y.jsonl"
        source.write_text('{"text": "import os"}\n{"text": "def f(x"}\n')
        files = (f"--checkpoint={checkpoint}", f"--inputs={source}", f"--output={made}")
        assert command(name, *files, *flags) == 0
        return [json.loads(line) for line in made.read_text().splitlines()]

    return run


def test_results_are_those_of_the_rounded_weights(rows, trained_run, monkeypatch):
    read, checked = [], []
    kept = array_files.read_arrays, manifest.check_files
    monkeypatch.setattr(
        array_files, "read_arrays", lambda path, x: read.append(sorted(x)) or kept[0](path, x)
    )
    monkeypatch.setattr(
        manifest, "check_files", lambda path, x: checked.append(len(x)) or kept[1](path, x)
    )
    found = {
        "generate": rows("generate", trained_run.path, INT8, "--max_new_tokens=6"),
        "score": rows("score", trained_run.path, INT8),
    }
    # An array at a time, and the files are checked once by each command.
    assert {len(names) for names in read} == {1}
    assert sum(map(bool, checked)) == 2
    run = rounded(load(trained_run.path))
    continued = run.generate(["import os", "def f(x"], max_new_tokens=6, token_healing=False)
    for row, wanted in zip(found["generate"], continued, strict=True):
        assert row["tokens"] == wanted.tokens
        np.testing.assert_allclose(row["logprobs"], wanted.logprobs, atol=1e-4)
    whole = rows("score", trained_run.path)
    for row, other, text in zip(found["score"], whole, ("import os", "def f(x"), strict=True):
        tokens = run.encode(text)
        logits_TV = np.asarray(run.logits([tokens])[0], np.float64)
        table = logits_TV - np.log(np.exp(logits_TV).sum(-1, keepdims=True))
        wanted = table[np.arange(len(tokens) - 1), tokens[1:]]
        np.testing.assert_allclose(row["logprobs"], wanted, atol=1e-4)
        assert abs(np.subtract(row["logprobs"], other["logprobs"])).max() > 1e-3


def test_a_folder_of_hugging_face_is_read_as_its_import(llama, rows, command, tmp_path):  # noqa: F811
    assert command("convert", f"--from_hf={llama}", f"--to={tmp_path}/run") == 0
    direct, imported, whole = (
        rows("score", *given) for given in ((llama, INT8), (tmp_path / "run", INT8), (llama,))
    )
    for row, other in zip(direct, imported, strict=True):
        np.testing.assert_allclose(row["logprobs"], other["logprobs"], atol=1e-5)
    assert max(abs(a["sum"] - b["sum"]) for a, b in zip(direct, whole, strict=True)) > 1e-3


def test_a_kernel_is_int8_before_the_next_ones_are_read(llama, monkeypatch):  # noqa: F811
    monkeypatch.setattr(loading, "_THREADS", 1)
    read, events = plan.Plan.fill, []
    monkeypatch.setattr(
        plan.Plan,
        "fill",
        lambda self, into, piece, *at: events.append(piece.native) or read(self, into, piece, *at),
    )
    quantised = int8_weights.quantised
    monkeypatch.setattr(
        int8_weights,
        "quantised",
        lambda path, x: events.append(f"{path} done") or quantised(path, x),
    )
    with pytest.raises(
        ValueError, match="weights_dtype is 'float8'; it must be one of None, 'int8'"
    ):
        load(llama, weights_dtype="float8")
    run = load(llama, weights_dtype="int8")
    assert events[1::2] == [f"{path} done" for path in events[::2]]
    sizes = {
        x.dtype.name
        for p, x in traverse_util.flatten_dict(run.params, sep="/").items()
        if p.endswith("/kernel")
    }
    assert sizes == {"int8"}
    with pytest.raises(ValueError, match="int8 weights are for inference"):
        run.save("nowhere")


def test_layers_in_another_layout_are_read_together(trained_run, tmp_path):
    run = load(trained_run.path)
    flat = traverse_util.flatten_dict(run.params, sep="/")
    assert run.model.config.scan_layers
    wanted = {p: x[0] if p.startswith("layers/") else x for p, x in flat.items()}
    found = restore_params.restore_params(
        trained_run.path,
        traverse_util.unflatten_dict(wanted, sep="/"),
        use_ema=True,
        finish=int8_weights.quantised,
    )
    found = traverse_util.flatten_dict(found, sep="/")
    path = "layers/block_0/mlp/up/kernel"
    for name, value in int8_weights.quantised(path, wanted[path]).items():
        np.testing.assert_array_equal(found[name], value)


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("train", [INT8], "unrecognized arguments: --weights_dtype=int8"),
        (
            "convert",
            ["--from={run}", "--to_hf={out}", INT8],
            "unrecognized arguments: --weights_dtype",
        ),
        ("train", ["--gin_file={run}/config.gin", "--gin.WEIGHTS_DTYPE='int8'"], "WEIGHTS_DTYPE"),
        (
            "influence fit",
            [
                "--checkpoint={run}",
                "--documents={rows}",
                "--out={out}",
                "--gin.WEIGHTS_DTYPE='int8'",
            ],
            "remove WEIGHTS_DTYPE",
        ),
        (
            "score",
            ["--checkpoint={run}", "--inputs={rows}", "--output={out}", "--weights_dtype=int4"],
            "'int4'",
        ),
        (
            "evaluate loss",
            ["--checkpoint={run}", "--trust_config", INT8],
            "unrecognized arguments: --weights_dtype",
        ),
    ],
)
def test_what_trains_or_writes_weights_refuses_int8(
    name, flags, message, command, trained_run, tmp_path, capsys
):
    (tmp_path / "rows.jsonl").write_text('{"text": "import os"}\n')
    places = {"run": trained_run.path, "out": tmp_path / "out", "rows": tmp_path / "rows.jsonl"}
    assert command(name, *(flag.format(**places) for flag in flags)) == 2
    assert message in capsys.readouterr().err
