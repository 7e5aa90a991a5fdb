"""`espalier prepare vocabulary` over the data files of the repository."""

import json

import pytest

from espalier.data import tasks
from espalier.launch import cli
from espalier.launch.prepare import vocabulary


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "cache"))

    def call(*argv) -> int:
        return cli.main(
            vocabulary.__doc__,
            entry="espalier.launch.prepare.vocabulary:make_vocabulary",
            default_files=lambda flags: ["t5x_configs/runs/vocabulary.gin"],
            part=True,
            argv=list(argv),
        )

    yield call
    tasks.clear()


def test_trains_once_and_shows_every_task(run, tmp_path, capsys):
    arguments = (
        "--gin_file=t5x_configs/data/corpus.gin",
        "--gin.SOURCES=['english', 'python']",
        "--gin.BYTES_PER_SOURCE=200000",
        "--gin.VOCAB_SIZE=700",
    )
    assert run(*arguments) == 0
    out = capsys.readouterr()
    rows = dict(line.split(maxsplit=1) for line in out.out.splitlines() if line[:1].isalpha())
    assert {"english", "python"} <= rows.keys()
    assert all(float(rows[name].split()[-1]) > 1.5 for name in ("english", "python"))
    assert "vocabulary of 700 pieces" in out.err
    assert "held-out text of each task, up to 300 kB:" in out.out
    models = list((tmp_path / "cache" / "vocabularies").glob("*/sentencepiece.model"))
    assert len(models) == 1
    assert run(*arguments) == 0
    assert "vocabulary of 700 pieces" not in capsys.readouterr().err


def test_rows_that_are_no_documents_are_left_out(run, tmp_path, capsys):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    chats = (f"--gin.CHATS='{tmp_path}/chats.jsonl'", "--gin.TOKENIZER='bytes'")
    assert run("--gin_file=t5x_configs/data/chat.gin", *chats) == 0
    assert "chats          its texts are parts of rows" in capsys.readouterr().out


def test_users_files(run, tmp_path, capsys):
    lines = [json.dumps({"body": f"A sentence about number {i} and {i * i}."}) for i in range(800)]
    (tmp_path / "mine.jsonl").write_text("\n".join(lines))
    arguments = ("--gin_file=t5x_configs/data/files.gin", "--gin.VOCAB_SIZE=420")
    assert run(*arguments, f"--gin.FILES='{tmp_path}/*.jsonl'", "--gin.TEXT_KEY='body'") == 0
    assert "420 ids" in capsys.readouterr().out
    assert run(*arguments, f"--gin.FILES='{tmp_path}/*.jsonl'") == cli.USAGE_ERROR
    assert "mine.jsonl, line 1: no key 'text'; present are 'body'" in capsys.readouterr().err
    assert run(*arguments, f"--gin.FILES='{tmp_path}/*.json'") == cli.USAGE_ERROR
    assert "files: files=" in capsys.readouterr().err


def test_unknown_source_is_one_line(run, capsys):
    argv = ("--gin_file=t5x_configs/data/bytes.gin", "--gin.SOURCES=['pyton']")
    assert run(*argv) == cli.USAGE_ERROR
    assert "unknown source 'pyton'; did you mean 'python'?" in capsys.readouterr().err


def test_takes_the_training_command(run, capsys):
    argv = [f"--gin_file=t5x_configs/{name}.gin" for name in ("models/tiny", "data/bytes")]
    argv += ["--gin_file=t5x_configs/runs/pretrain.gin", "--gin.SOURCES=['python']"]
    argv += ["--gin.BYTES_PER_SOURCE=100000", "--gin.MODEL_DIR=/tmp/x", "--gin.TRAIN_STEPS=5"]
    assert run(*argv, "--gin.MIXTURE_OR_TASK_NAME=python") == 0
    assert run(*argv) == 0
    out = capsys.readouterr()
    assert "259 ids" in out.out
    assert "warning" not in out.err


def test_bytes_are_read_of_the_mixtures_own_sources_alone(run, capsys):
    argv = [f"--gin_file=t5x_configs/{name}.gin" for name in ("models/tiny", "data/bytes")]
    argv += ["--gin_file=t5x_configs/runs/pretrain.gin", "--gin.BYTES_PER_SOURCE=100000"]
    assert run(*argv, "--gin.MODEL_DIR=/tmp/x", "--gin.MIXTURE_OR_TASK_NAME=text") == 0
    out = capsys.readouterr()
    assert {"docstrings", "english"} <= set(out.out.split()) | set(out.err.split())
    assert not {"python", "cpp", "markup", "lang_fr"} & set(out.err.split())
