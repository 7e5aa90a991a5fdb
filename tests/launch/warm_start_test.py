"""Runs and commands over token caches that exist need neither TensorFlow nor SeqIO, and have the same numbers without them."""

import json
import pathlib
import subprocess
import sys

import pytest

from espalier.trainers.telemetry.metric_writers import read_jsonl

# What a command must not import: TensorFlow, SeqIO, and packages that only they bring along.
SLOW = ("tensorflow", "tensorflow_text", "tensorflow_datasets", "keras", "seqio", "clu", "sklearn")

CHILD = """
import json, runpy, sys
import uvicorn
from starlette.testclient import TestClient

def ask(server, sockets):  # in place of serving until a signal
    client = TestClient(server.config.app, base_url="http://127.0.0.1")
    body = {"model": "first", "prompt": "import ", "max_tokens": 2}
    assert client.post("/v1/completions", json=body).status_code == 200

uvicorn.Server.run = ask
sys.modules.update(dict.fromkeys(%r))
for name, *arguments in json.loads(sys.argv[1]):
    sys.argv = [name, *arguments]
    try:
        runpy.run_module(f"espalier.launch.{name}", run_name="__main__")
    except SystemExit as ended:
        assert not ended.code, (name, arguments)
assert not {"boto3", "google.cloud.storage"} & set(sys.modules)  # tensorboardX would import them
print("all ran")
"""


def flags(folder, **bindings):
    given = {
        "FILES": str(folder / "texts.jsonl"),
        "VALIDATION_FRACTION": 0.1,
        "MIXTURE_OR_TASK_NAME": "files",
        "TASK_FEATURE_LENGTHS": {"targets": 32},
        "BATCH_SIZE": 8,
        "TRAIN_STEPS": 4,
        "EVAL_PERIOD": 2,
        "EVAL_STEPS": 1,
        "CHECKPOINT_PERIOD": 2,
        **bindings,
    }
    files = ("models/tiny", "data/files", "runs/pretrain")
    return [
        *(f"--gin_file=t5x_configs/{file}.gin" for file in files),
        "--gin.VOCABULARY=@vocabularies.byte()",
        *(f"--gin.{name}={value!r}" for name, value in given.items()),
    ]


def preferences(folder, run):
    given = {
        "PAIRS": str(folder / "pairs.jsonl"),
        "PAIRS_VALIDATION_FRACTION": 0.2,
        "TOKENIZER": "bytes",
        "MIXTURE_OR_TASK_NAME": "preferences",
        "INITIAL_CHECKPOINT_PATH": str(folder / "first"),
        "MODEL_DIR": str(folder / run),
        "TRAIN_STEPS": 2,
        "BATCH_SIZE": 8,
        "EVAL_PERIOD": 2,
    }
    files = ("models/tiny", "data/preferences", "runs/preference")
    return [
        *(f"--gin_file=t5x_configs/{file}.gin" for file in files),
        *(f"--gin.{name}={value!r}" for name, value in given.items()),
    ]


def losses(run):
    names = ("loss", "eval/files/loss", "eval/preferences/loss")
    rows = read_jsonl(f"{run}/metrics.jsonl")
    return [(row["step"], *(row[name] for name in names if name in row)) for row in rows]


@pytest.fixture(scope="module")
def folder(train, tmp_path_factory):
    """A folder with two runs of this process, which has SeqIO, and with their caches."""
    import seqio

    folder = tmp_path_factory.mktemp("warm")
    texts = [{"text": f"def f{n}(x):\n    return x + {n}\n"} for n in range(200)]
    pairs = [{"prompt": f"{n}: ", "chosen": f"a{n}", "rejected": f"b{n}"} for n in range(40)]
    for name, rows in (("texts", texts), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "prompts.jsonl").write_text('{"text": "import os"}\n')
    for arguments in (
        flags(folder, MODEL_DIR=str(folder / "first")),
        preferences(folder, "first_dpo"),
    ):
        result = train(*arguments)
        assert result.status == 0, result.err
    assert "files" not in seqio.TaskRegistry.names()  # taken back
    return folder


def test_commands_run_without_tensorflow_and_losses_are_the_same(folder):
    first = f"--checkpoint={folder / 'first'}"
    rows = f"--inputs={folder / 'prompts.jsonl'}"
    commands = [
        ["train", *flags(folder, MODEL_DIR=str(folder / "second"), TRAIN_STEPS=2)],
        ["train", *flags(folder, MODEL_DIR=str(folder / "second"))],  # a restart
        ["train", *preferences(folder, "second_dpo")],
        ["score", first, rows, f"--output={folder / 'scores.jsonl'}"],
        ["generate", first, rows, f"--output={folder / 'texts_out.jsonl'}", "--max_new_tokens=2"],
        ["evaluate", "loss", first, "--trust_config"],
        ["serve", first, "--port=0", "--name=first"],
    ]
    done = subprocess.run(
        [sys.executable, "-c", CHILD % (SLOW,), json.dumps(commands)],
        cwd=pathlib.Path(__file__).parents[2],
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.stdout.endswith("all ran\n"), done.stdout + done.stderr
    assert "tokenising" not in done.stderr  # the caches are those of the runs with SeqIO
    assert losses(folder / "second_dpo") == losses(folder / "first_dpo") != []
    second = [row for row in losses(folder / "second") if row[0] > 2]
    assert second == [row for row in losses(folder / "first") if row[0] > 2] != []
