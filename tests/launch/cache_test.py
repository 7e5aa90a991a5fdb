"""The command that builds token caches, on tasks held in memory."""

import pytest
import seqio
import tensorflow as tf

from data import stream
from launch import cache as command


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
    with pytest.raises(ValueError, match="changed since: vocabulary.*python -m launch.cache"):
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
