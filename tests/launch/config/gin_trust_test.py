"""A configuration beside a checkpoint runs nothing but the model it describes."""

import sys

import pytest

from launch import cli
from launch.config import gin_config
from launch.config.gin_config import ConfigError

HEAD = "from __gin__ import dynamic_registration\nfrom launch.run import load_run\n"
ENTRY = "launch.run.load_run:RunConfig"


def load(found, own=(), bindings=()):
    return gin_config.load(
        own, bindings, entry=ENTRY, unused={"VOCABULARY": "None"}, untrusted=found
    )


def refused(found, own=()) -> str:
    with pytest.raises(ConfigError) as caught:
        load(found, own)
    return str(caught.value)


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module that leaves a trace when it is imported; the trace."""
    trace = tmp_path / "trace"
    (tmp_path / "evil_module.py").write_text(f"open({str(trace)!r}, 'w')\ndef model(): pass\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield trace
    sys.modules.pop("evil_module", None)


RUN = (
    "load_run.RunConfig.model = %MODEL\n"
    "load_run.RunConfig.vocabulary = @load_run.vocabulary\nload_run.vocabulary.value = None\n"
)


def test_a_module_of_someone_else_is_refused_before_it_is_imported(gin_file, evil):
    path = gin_file(HEAD + "import evil_module\nMODEL = @evil_module.model()\n" + RUN, "config.gin")
    text = refused([path])
    assert text.startswith("1 problem ")
    assert f"{path}:3: a configuration beside a checkpoint may not import 'evil_module'" in text
    assert f"--gin_file={path}" in text
    outer = gin_file(f"include '{path}'\n", "outer.gin")
    assert f"{path}:3: a configuration beside a checkpoint" in refused([outer])
    assert not evil.exists()


def test_the_users_own_files_may_bring_it_in(gin_file, evil):
    path = gin_file(HEAD + "import evil_module\nMODEL = @evil_module.model()\n" + RUN, "config.gin")
    own = gin_file("from __gin__ import dynamic_registration\nimport evil_module\n", "own.gin")
    load([path], [own])
    assert evil.exists()
    load([path], [path])


@pytest.mark.parametrize(
    ("imports", "name"),
    [
        ("import subprocess", "subprocess.getoutput"),
        ("import os.path", "os.system"),
        ("from trainers.checkpoints import checkpoint", "checkpoint.os.replace"),
        ("from launch.run import run_dir", "run_dir.subprocess.getoutput"),
        ("from launch import benchmarks", "benchmarks.compare.measured"),
        ("from data.text import user_data", "user_data.import_mixtures"),
        ("from data.text import user_data", "user_data.importlib.import_module"),
        ("from launch import convert", "convert.main"),
        ("from launch.run import load_run", "load_run.config_of"),
        ("import jax", "jax.experimental.serialize_executable.deserialize_and_load"),
        ("from jax._src import pickle_util", "pickle_util.loads"),
        ("from launch.run import load_run", "load_run.restore.__globals__.get"),
    ],
)
def test_what_could_run_anything_is_refused(gin_file, imports, name):
    if name.startswith("jax.experimental"):
        import jax.experimental.serialize_executable  # noqa: F401 (an attribute once imported)
    path = gin_file(f"{HEAD}{imports}\nMODEL = @{name}()\n{RUN}", "config.gin")
    text = refused([path])
    assert text.startswith("1 problem ")
    assert f"{path}:" in text and "could run anything" in text


def test_models_of_this_project_and_jax_may_be_named(gin_file):
    include = "include 't5x_configs/models/code_mix_470m.gin'\n"
    assert load([gin_file(HEAD + include + RUN, "config.gin")]).entry is not None


def test_commands_read_what_lies_beside_a_checkpoint_so(gin_file, evil, capsys, monkeypatch):
    import os

    before = dict(os.environ)
    path = gin_file(HEAD + "import evil_module\nMODEL = @evil_module.model()\n" + RUN, "config.gin")
    status = cli.main(
        "Generates.", ENTRY, default_files=lambda flags: [path], argv=[], run=lambda start: start()
    )
    os.environ.clear()
    os.environ.update(before)
    assert status == cli.USAGE_ERROR
    assert "may not import 'evil_module'" in capsys.readouterr().err
    assert not evil.exists()
