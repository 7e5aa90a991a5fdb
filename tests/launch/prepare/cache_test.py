"""The command that builds token caches, on tasks held in memory."""

import json

import pytest
import seqio
import tensorflow as tf

from espalier.data import tasks
from espalier.data.cache import store
from espalier.data.stream import stored_plan, stream
from espalier.launch import cli
from espalier.launch.config import gin_config
from espalier.launch.prepare import cache as command


def register(add_eos=True):
    """Two tasks, one of them without a validation split, and their mixture."""

    def read(split, shuffle_files):
        return tf.data.Dataset.from_tensor_slices({"targets": [f"{split} {i}" for i in range(5)]})

    for name, splits in (("cmd_a", ("train", "validation")), ("cmd_b", ("train",))):
        if name in seqio.TaskRegistry.names():
            seqio.TaskRegistry.remove(name)
        seqio.TaskRegistry.add(
            name,
            source=seqio.FunctionDataSource(read, splits=splits),
            preprocessors=[seqio.preprocessors.tokenize, seqio.preprocessors.append_eos],
            output_features={"targets": seqio.Feature(seqio.ByteVocabulary(), add_eos=add_eos)},
        )
    if "cmd" in seqio.MixtureRegistry.names():
        seqio.MixtureRegistry.remove("cmd")
    seqio.MixtureRegistry.add("cmd", [("cmd_a", 1.0), ("cmd_b", 1.0)])


def test_builds_what_a_run_then_finds(tmp_path, capsys):
    settings = {"mixture_or_task_name": "cmd", "cache_dir": tmp_path}
    built = command.build_caches(tasks=[register], **settings)
    train, validation = 5 * len("train 0$"), 5 * len("validation 0$")
    assert built == {"cmd_a": {"train": train, "validation": validation}, "cmd_b": {"train": train}}
    assert str(tmp_path) in capsys.readouterr().out
    row = {"task_feature_lengths": {"targets": 16}, "batch_size": 2, **settings}
    assert stream.make_stream(**row).source_names == ("cmd_a", "cmd_b")
    assert "tokenising" not in capsys.readouterr().err

    # The tasks change: a run refuses, the command builds beside, and --replace deletes.
    register(add_eos=False)
    with pytest.raises(ValueError, match="Changed since then: vocabulary.*espalier prepare cache"):
        stream.make_stream(**row)
    built = command.build_caches(**settings)
    assert built["cmd_b"]["train"] == train - 5
    stream.make_stream(**row)
    parent = tmp_path / "tokens" / "cmd_b" / "train"
    assert len(list(parent.iterdir())) == 2
    command.build_caches(replace=True, **settings)
    assert len(list(parent.iterdir())) == 1


def test_a_task_without_the_splits_is_refused(tmp_path):
    register()
    with pytest.raises(ValueError, match="'cmd_b' has none of the splits validation"):
        command.build_caches(mixture_or_task_name="cmd", splits=("validation",), cache_dir=tmp_path)


@pytest.fixture
def run(tmp_path, monkeypatch):
    """The command on the arguments of a training command."""
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "cache"))
    yield lambda *argv: cli.main(
        command.__doc__,
        entry="espalier.launch.prepare.cache:build_caches",
        default_files=lambda flags: ["t5x_configs/runs/cache.gin"],
        part=True,
        argv=argv,
    )
    tasks.clear()


MODEL, DATA, RUN = (
    f"--gin_file=t5x_configs/{name}.gin" for name in ("models/tiny", "data/files", "runs/pretrain")
)


def test_takes_the_training_command_and_parts_of_it(tmp_path, run, capsys):
    lines = [json.dumps({"text": f"text {number}"}) for number in range(300)]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    data = (
        DATA,
        f"--gin.FILES='{tmp_path}/a.jsonl'",
        "--gin.VOCABULARY=@vocabularies.byte()",
        "--gin.MIXTURE_OR_TASK_NAME=files",
    )
    assert run(*data) == 0
    assert run(MODEL, *data) == 0
    assert run(MODEL, RUN, *data) == 0
    whole = (MODEL, RUN, *data, "--gin.MODEL_DIR=/tmp/x", "--gin.TRAIN_STEPS=5")
    assert run(*whole, "--gin.transformer.Block.layout='parallel'") == 0
    assert "warning" not in capsys.readouterr().err
    assert run(*whole, "--gin.TRAIN_STEP=5") == cli.USAGE_ERROR
    assert "Nearest: TRAIN_STEPS" in capsys.readouterr().err
    assert run(MODEL, RUN, "--gin.MIXTURE_OR_TASK_NAME=files") == cli.USAGE_ERROR
    assert "macro 'TASKS' has no value" in capsys.readouterr().err


def test_rows_of_very_large_caches_are_planned_for_the_run(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stored_plan, "IN_MEMORY", 0)
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "some text " * 60}) + "\n")
    data = (
        DATA,
        f"--gin.FILES='{tmp_path}/a.jsonl'",
        "--gin.VOCABULARY=@vocabularies.byte()",
        "--gin.MIXTURE_OR_TASK_NAME=files",
        "--gin.VALIDATION_FRACTION=0",
    )
    assert command.main(data) == 0
    (cache,) = (tmp_path / "cache").glob("tokens/files/train/*/manifest.json")
    plans = cache.parent.with_name(f"{cache.parent.name}.plans")
    assert not plans.exists()  # the rows of the run are not known
    lengths = "--gin.TASK_FEATURE_LENGTHS={'targets': 50}"
    packing = "--gin.stream.make_stream.packing='concat'"
    assert command.main((*data[:1], RUN, *data[1:], lengths, packing)) == 0
    assert "rows of {'targets': 50} are planned" in capsys.readouterr().out
    (index,) = plans.glob("*/plan.json")
    # The run finds the plan; a damaged one is made again with --replace.
    opened = store.open_cache(cache.parent)
    how = {"packing": "concat", "long_documents": "split", "inputs_prefix": ()}
    monkeypatch.setattr(stored_plan, "_make", None)
    made = stored_plan.open_plan(opened, {"targets": 50}, **how)
    monkeypatch.undo()
    monkeypatch.setattr(stored_plan, "IN_MEMORY", 0)
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "cache"))
    index.write_text("{}")
    assert command.main((*data[:1], RUN, *data[1:], lengths, packing)) == cli.USAGE_ERROR
    assert "plan.json" in capsys.readouterr().err
    assert command.main((*data[:1], RUN, *data[1:], lengths, packing, "--replace")) == 0
    assert stored_plan.open_plan(opened, {"targets": 50}, **how).num_rows == made.num_rows


@pytest.mark.parametrize(
    ("file", "bindings"),
    [
        ("files", ("FILES='*.txt'",)),
        ("tfds", ("TFDS_NAME='x'",)),
        ("bytes", ()),
        ("corpus", ()),
    ],
)
def test_data_files_have_no_warnings(file, bindings):
    files = [f"t5x_configs/data/{file}.gin"]
    config = gin_config.load(
        files,
        [*bindings, "MIXTURE_OR_TASK_NAME='x'"],
        entry="espalier.launch.prepare.cache:build_caches",
        defaults=["t5x_configs/runs/cache.gin"],
        part=True,
    )
    assert config.warnings == ()
    config = gin_config.load(
        ["t5x_configs/models/tiny.gin", *files, "t5x_configs/runs/pretrain.gin"],
        [*bindings, "MODEL_DIR='x'", "MIXTURE_OR_TASK_NAME='x'"],
        entry="espalier.launch.train:train",
    )
    assert config.warnings == ()
    assert "make_stream.changed_cache = 'build'" in config.text
    assert "make_eval_stream.changed_cache = 'build'" in config.text


def test_rows_that_are_left_out_are_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("ESPALIER_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "one"}\n{"text": \n{"text": "two"}\n')
    flags = ["--gin_file=t5x_configs/data/hf_files.gin", "--gin.MIXTURE_OR_TASK_NAME=files"]
    flags += ["--gin.TOKENIZER='bytes'", f"--gin.FILES={str(path)!r}", "--gin.VALIDATION_FRACTION=0.0"]  # fmt: skip
    assert command.main([*flags, "--gin.ON_BAD_ROW='skip'"]) == 0
    assert (
        f"1 rows cannot be used and are left out, the first is {path}:2:16"
        in capsys.readouterr().out
    )
    assert command.main(flags) == 2
    assert f"{path}, line 2: malformed JSON" in capsys.readouterr().err
