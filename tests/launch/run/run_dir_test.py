"""What a run directory says about its run, and whose it is."""

import errno
import json
import os
import re
import subprocess
from types import SimpleNamespace

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from espalier.common import files
from espalier.launch import environment
from espalier.launch.config import text as config_text
from espalier.launch.run import run_dir
from espalier.launch.run.run_dir import RunDirectoryError
from espalier.launch.run.run_messages import parameter_table

CONFIG = """\
from __gin__ import dynamic_registration
from espalier.model import transformer
import toy_run

BATCH_SIZE = 8
MODEL_DIR = '/x'
TRAIN_STEPS = 10

toy_run.train.model = @a/transformer.Transformer()
toy_run.train.steps = %TRAIN_STEPS
toy_run.train.mesh = {'data': 1, 'tensor': 2}
"""


def begin(path):
    """A start that got as far as training."""
    run = run_dir.prepare(str(path), CONFIG)
    (path / "metrics.jsonl").write_text('{"step": 1}\n')
    return run


def test_first_start_describes_the_run(tmp_path):
    path = tmp_path / "run"
    run = run_dir.prepare(str(path), CONFIG)
    run.record(mesh={"axes": {"data": 8}}, data_fingerprint="abc")
    run.write("operative_config.gin", "toy_run.train.steps = 10\n")
    facts = json.loads((path / "run.json").read_text())
    head = subprocess.run(
        ["git", "-C", environment.ROOT, "rev-parse", "HEAD"], capture_output=True, text=True
    ).stdout.strip()
    assert facts["commit"] == (head or None)
    assert facts["dirty"] in (True, False, None)
    assert facts["versions"]["jax"] == jax.__version__
    assert facts["command"]
    assert facts["host"]["name"]
    assert facts["data_fingerprint"] == "abc"
    assert (path / "config.gin").read_text() == CONFIG
    assert (path / "operative_config.gin").read_text()
    assert not list(path.glob("*.partial"))


def test_a_directory_in_use_is_refused_until_it_is_free(tmp_path):
    run = run_dir.prepare(str(tmp_path), CONFIG)
    with pytest.raises(RunDirectoryError, match=rf"in use: process {os.getpid()} on .* MODEL_DIR"):
        run_dir.prepare(str(tmp_path), CONFIG)
    run_dir.prepare(str(tmp_path), CONFIG, writer=False)  # the other processes of the run
    run.close()
    run_dir.prepare(str(tmp_path), CONFIG).close()
    with pytest.raises(RunDirectoryError, match="another configuration"):
        begin(tmp_path).close()
        run_dir.prepare(str(tmp_path), CONFIG.replace("BATCH_SIZE = 8", "BATCH_SIZE = 4"))
    begin(tmp_path).close()  # a start that was refused holds nothing


@pytest.mark.parametrize("name", [".", "./", "../{0}"])
def test_the_working_directory_is_a_run_or_is_refused(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.txt").write_text("mine")
    name = name.format(tmp_path.name)
    with pytest.raises(RunDirectoryError, match="MODEL_DIR = .* is the working directory"):
        run_dir.prepare(name, CONFIG)
    assert os.listdir() == ["mine.txt"]
    os.unlink("mine.txt")
    for _ in range(2):  # an empty directory, and one with a run
        run_dir.prepare(name, CONFIG).close()


def test_secrets_of_the_environment_are_not_recorded(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cret-value")
    monkeypatch.setenv("XLA_FLAGS", "--xla_something=1")
    run_dir.prepare(str(tmp_path), CONFIG)
    text = (tmp_path / "run.json").read_text()
    assert "s3cret-value" not in text
    assert "--xla_something=1" in text


def test_a_continued_run_may_change_how_long_it_runs_and_keeps_its_history(tmp_path):
    begin(tmp_path).record(data_fingerprint="abc", held_out_fingerprints={"one": "1"})
    longer = CONFIG.replace("TRAIN_STEPS = 10", "TRAIN_STEPS = 20")
    again = run_dir.prepare(str(tmp_path), longer)
    again.record(data_fingerprint="abc", held_out_fingerprints={"other": "2"})
    with pytest.raises(RunDirectoryError, match="held-out data of one of the run .* have changed"):
        again.record(data_fingerprint="abc", held_out_fingerprints={"one": "3"})
    facts = run_dir.read_run(str(tmp_path))
    assert len(facts["earlier"]) == 1
    assert facts["earlier"][0]["data_fingerprint"] == "abc"
    assert "earlier" not in facts["earlier"][0]
    assert (tmp_path / "config.gin").read_text() == longer


@pytest.mark.parametrize(
    ("old", "new", "named"),
    [
        ("BATCH_SIZE = 8", "BATCH_SIZE = 16", "BATCH_SIZE was 8 there and is 16 now"),
        ("BATCH_SIZE = 8", "", "BATCH_SIZE was 8 there and is not set now"),
        ("TRAIN_STEPS = 10", "TRAIN_STEPS = 10\nNEW = 1", "NEW is 1 now and was not set there"),
        ("@a/", "@b/", "toy_run.train.model was @a/espalier.model.transformer.Transformer() there"),
        ("'tensor': 2", "'tensor': 4", "toy_run.train.mesh was {'data': 1, 'tensor': 2} there"),
    ],
)
def test_another_configuration_is_refused_by_the_first_difference(tmp_path, old, new, named):
    begin(tmp_path)
    with pytest.raises(RunDirectoryError) as caught:
        run_dir.prepare(str(tmp_path), CONFIG.replace(old, new))
    message = str(caught.value)
    assert str(tmp_path) in message
    assert named in message
    assert "another MODEL_DIR" in message
    assert (tmp_path / "config.gin").read_text() == CONFIG


def test_a_setting_that_a_gin_file_has_got_since_is_no_other_configuration(tmp_path):
    begin(tmp_path).close()
    more = CONFIG + "NAMES = None\ntoy_run.train.names = %NAMES\ntoy_run.train.optimizer = None\n"
    run_dir.prepare(str(tmp_path), more).close()
    begin(tmp_path).close()  # as it was
    for old, new, named in (
        ("NAMES = None", "NAMES = ['a']", "NAMES is ['a'] now and was not set there"),
        ("optimizer = None", "optimizer = 'sgd'", "toy_run.train.optimizer is 'sgd' now"),
    ):
        with pytest.raises(RunDirectoryError, match=re.escape(named)):
            run_dir.prepare(str(tmp_path), more.replace(old, new))


def test_a_vocabulary_in_another_place_is_no_other_configuration(tmp_path):
    """Vocabularies are compared by their digests, with the checkpoints and the data."""
    head = CONFIG.replace(
        "import toy_run\n", "import toy_run\nfrom espalier.data.tokenizers import vocabularies\n"
    )
    own = "VOCABULARY = @run_vocabulary.of()\nrun_vocabulary.of.path = '/run'\n"
    texts = [
        f"{head}VOCABULARY = @vocabularies.sentencepiece()\nvocabularies.sentencepiece.size = 9\n",
        f"{head}VOCABULARY = @vocabularies.huggingface()\nvocabularies.huggingface.path = '/run'\n",
        f"{head}from espalier.launch.run import run_vocabulary\n{own}vocabularies.sentencepiece.size = 9\n",
    ]
    for old, new in ((0, 2), (1, 2), (2, 0)):
        folder = tmp_path / f"{old}{new}"
        folder.mkdir()
        run_dir.prepare(str(folder), texts[old]).close()
        (folder / "metrics.jsonl").write_text('{"step": 1}\n')
        changed = (
            texts[new]
            if old != 1
            else texts[2].replace("vocabularies.sentencepiece.size = 9\n", "")
        )
        run_dir.prepare(str(folder), changed).close()
    with pytest.raises(RunDirectoryError, match="sentencepiece.size was 9 there and is 8 now"):
        run_dir.prepare(str(tmp_path / "02"), texts[2].replace("size = 9", "size = 8"))


def test_a_start_that_failed_before_training_may_be_corrected(tmp_path):
    run_dir.prepare(str(tmp_path), CONFIG).record(data_fingerprint="abc")
    # A start that fails between opening the writers and the first row leaves these.
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "checkpoints").mkdir()
    corrected = CONFIG.replace("BATCH_SIZE = 8", "BATCH_SIZE = 16")
    run_dir.prepare(str(tmp_path), corrected).record(data_fingerprint="xyz")
    assert (tmp_path / "config.gin").read_text() == corrected
    # A start that fails in its first step may have evaluated before it.
    (tmp_path / "metrics.jsonl").write_text('{"step": 0, "eval/a/loss": 3.5}\n')
    run_dir.prepare(str(tmp_path), CONFIG).record(data_fingerprint="abc")
    for row in ('{"step": 0}\n{"step": 1}\n', '{"step": 0}\n{"st'):
        (tmp_path / "metrics.jsonl").write_text(row)
        with pytest.raises(RunDirectoryError, match="another configuration"):
            run_dir.prepare(str(tmp_path), corrected)


def test_names_that_may_change_are_the_callers_choice(tmp_path):
    begin(tmp_path)
    changed = CONFIG.replace("BATCH_SIZE = 8", "BATCH_SIZE = 16").replace(
        "'tensor': 2", "'tensor': 4"
    )
    run_dir.prepare(str(tmp_path), changed, may_change=("BATCH_SIZE", "train.mesh"))


def test_whole_classes_may_change_and_meshes_may_but_similar_names_may_not():
    old = CONFIG + "MESH = {'data': 8}\n"
    new = CONFIG + "MESH = {'data': 2}\nfrom espalier.trainers.telemetry import profiler\n"
    new += "profiler.ProfilerWindow.num_steps = 3\na/profiler.ProfilerWindow.first_step = 1\n"
    assert config_text.first_difference(old, new, run_dir.MAY_CHANGE) is None
    assert config_text.first_difference(old, new, ("MESH", "Profiler")) is not None
    other = CONFIG.replace("train.steps", "train.more_steps")
    assert config_text.first_difference(CONFIG, other, ("train.steps",)) is not None


def test_the_same_configuration_written_otherwise_is_the_same():
    other = """\
# Another order, another alias, a block, other quotes.
from __gin__ import dynamic_registration
from espalier.model import transformer as t
import toy_run as r
r.train:
    steps = %TRAIN_STEPS
    mesh = {"tensor": 2, "data": 1}
r.train.model = @a/t.Transformer()
TRAIN_STEPS = 10
BATCH_SIZE = 8
MODEL_DIR = "/x"
"""
    assert config_text.first_difference(CONFIG, other) is None


def test_changed_data_is_refused(tmp_path):
    begin(tmp_path).record(data_fingerprint="abc")
    run = run_dir.prepare(str(tmp_path), CONFIG)
    with pytest.raises(RunDirectoryError, match="was abc and is now xyz"):
        run.record(data_fingerprint="xyz")


def test_checkpoints_of_an_unknown_run_are_refused(tmp_path):
    (tmp_path / "checkpoints" / "10").mkdir(parents=True)
    with pytest.raises(RunDirectoryError, match="no config.gin"):
        run_dir.prepare(str(tmp_path), CONFIG)


def test_damaged_files_are_named(tmp_path):
    begin(tmp_path)
    (tmp_path / "run.json").write_text('{"commit": ')
    with pytest.raises(RunDirectoryError, match="run.json is damaged"):
        run_dir.prepare(str(tmp_path), CONFIG)
    (tmp_path / "run.json").unlink()
    (tmp_path / "config.gin").write_text("BATCH_SIZE = = 8")
    with pytest.raises(RunDirectoryError, match="config.gin"):
        run_dir.prepare(str(tmp_path), CONFIG)


def test_an_address_of_an_unknown_kind_is_refused_and_makes_no_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(run_dir.RunDirectoryError, match="MODEL_DIR = 'hdfs://host/run'.*gs://"):
        run_dir.prepare("hdfs://host/run", "")
    assert not list(tmp_path.iterdir())


def test_only_the_writer_writes(tmp_path):
    run = run_dir.prepare(str(tmp_path / "run"), CONFIG, writer=False)
    run.record(mesh=1)
    run.write("operative_config.gin", "x")
    assert not (tmp_path / "run").exists()


def test_parameter_table():
    spec = jax.ShapeDtypeStruct
    boxed = {
        "layers": {
            "kernel": nn.LogicallyPartitioned(
                spec((4, 16, 32), jnp.float32), names=("layers", "embed", "mlp")
            )
        },
        "scale": spec((16,), jnp.bfloat16),
    }
    shardings = {
        "layers": {"kernel": PartitionSpec(None, ("data", "fsdp"), "tensor")},
        "scale": PartitionSpec(),
    }
    table = parameter_table(boxed, shardings)
    placed = jax.tree.map(
        lambda spec: SimpleNamespace(sharding=SimpleNamespace(spec=spec)), shardings
    )
    assert parameter_table(boxed, placed) == table
    lines = table.splitlines()
    assert [cell.strip() for cell in lines[2].split("  ") if cell] == [
        "layers/kernel",
        "4x16x32",
        "float32",
        "(layers, embed, mlp)",
        "(-, data+fsdp, tensor)",
        "2,048",
    ]
    assert lines[3].split() == ["scale", "16", "bfloat16", "-", "replicated", "16"]
    assert lines[-1] == "total 2,064 parameters in 2 arrays, 0.0 MiB"
    assert len({len(line) for line in lines[:-1]}) == 1


@pytest.mark.parametrize(
    ("name", "problem"),
    [
        ("", "is no path"),
        (" ", "is no path"),
        ("a\0b", "is no path"),
        ("file", "File exists"),
        ("file/below", "Not a directory"),
        ("loop", "symbolic links"),
        ("dangling", "File exists"),
        ("a" * 300, "File name too long"),
        ("a/" * 3000, "File name too long"),
        ("/proc", "No such file"),
        ("/dev/null/x", "Not a directory"),
        ("lock", r"Is a directory: '.*/lock/.lock'"),
    ],
)
def test_a_path_that_cannot_be_a_run_is_one_error(tmp_path, name, problem):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "dangling").symlink_to("nowhere/x")
    (tmp_path / "lock" / ".lock").mkdir(parents=True)
    with pytest.raises(RunDirectoryError, match=f"MODEL_DIR = .*{problem}"):
        run_dir.prepare(os.path.join(tmp_path, name) if name.strip() else name, CONFIG)


@pytest.mark.parametrize("name", [*run_dir._FILES, *run_dir._FOLDERS])
def test_an_entry_of_the_wrong_kind_or_without_permission_is_named(tmp_path, name, monkeypatch):
    path = tmp_path / name
    is_folder = name in run_dir._FOLDERS
    path.touch() if is_folder else path.mkdir()
    with pytest.raises(RunDirectoryError, match=re.escape(str(path))):
        run_dir.prepare(str(tmp_path), CONFIG)
    path.unlink() if is_folder else path.rmdir()
    path.mkdir() if is_folder else path.touch()
    monkeypatch.setattr(os, "access", lambda where, _: where != str(path))
    with pytest.raises(
        RunDirectoryError, match=f"{re.escape(str(path))} cannot be read and written"
    ):
        run_dir.prepare(str(tmp_path), CONFIG)
    if name != ".lock":
        monkeypatch.undo()
        path.rmdir() if is_folder else path.unlink()
        path.symlink_to("nowhere")
        with pytest.raises(RunDirectoryError, match=f"{re.escape(str(path))} is a dangling link"):
            run_dir.prepare(str(tmp_path), CONFIG)


def test_a_flipped_bit_in_config_or_run_json_is_named_as_damage(tmp_path, monkeypatch):
    monkeypatch.setattr(environment, "describe", lambda: {"command": ["train"]})  # no git
    begin(tmp_path).close()
    for name, bit in ((n, b) for n in ("config.gin", "run.json") for b in (1, 7)):
        path = tmp_path / name
        good = path.read_bytes()
        for position in range(0, len(good), 7):
            damaged = bytearray(good)
            damaged[position] ^= 1 << bit
            path.write_bytes(damaged)
            try:
                run_dir.prepare(str(tmp_path), CONFIG).close()
            except RunDirectoryError as error:
                assert f"{path} is damaged" in str(error)
                assert "another configuration" not in str(error)
            path.write_bytes(good)
    for text in ("[]", '{"earlier": 3}', '{"earlier": [3]}', "[" * 5000):
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(RunDirectoryError, match="run.json is damaged"):
            run_dir.read_run(str(tmp_path))


def test_a_file_system_without_locks_is_one_warning(tmp_path, monkeypatch, caplog):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(files.fcntl, "flock", refuse)
    run_dir.prepare(str(tmp_path), CONFIG).close()
    [warning] = caplog.messages
    assert str(tmp_path) in warning
    assert "No locks available" in warning
