"""A run's model.json is data: whatever it holds, reading it calls only the registered parts of models."""

import copy
import importlib
import inspect
import itertools
import json
import pathlib
import random
import sys

import pytest

from espalier.launch.config import gin_config, gin_reader, gin_source, model_file
from espalier.launch.config.build import Configuration
from espalier.launch.config.gin_config import ConfigError
from espalier.launch.config.model_file import REGISTERED, ModelFileError
from espalier.launch.load import load_run
from espalier.launch.run import model_record

ENTRY = "espalier.launch.load.load_run:RunConfig"
LOAD_RUN = "t5x_configs/runs/load_run.gin"
OBJECTS = {
    name: getattr(importlib.import_module(module), attribute)
    for name, (module, attribute) in REGISTERED.items()
}


def record_of(folder, *files, bindings=()):
    """Records the model of gin files in `folder`; returns its JSON form."""
    names = [name if name.endswith(".gin") else f"t5x_configs/{name}.gin" for name in files]
    bound = ["VOCABULARY=None", *bindings]
    config = gin_config.load(names, bound, entry=ENTRY, defaults=[LOAD_RUN], part=True)
    pathlib.Path(folder, "config.gin").write_text(config.text)
    model_record.write(folder)
    return json.loads(pathlib.Path(folder, "model.json").read_text())


def write(folder, record):
    path = pathlib.Path(folder, "model.json")
    path.write_text(record if isinstance(record, str) else json.dumps(record))
    return str(path)


def load(path, own=()):
    return gin_config.load(
        own, entry=ENTRY, unused={"VOCABULARY": "None"}, defaults=[LOAD_RUN, path]
    )


def test_few_things_can_be_named_and_all_only_build_parts_of_models():
    assert len(REGISTERED) <= 63
    for name, value in OBJECTS.items():
        home = value.__module__
        assert home.startswith(("espalier.model.", "jax.nn.initializers")), name
        assert callable(value) and not inspect.ismodule(value)
        assert not home.startswith(("espalier.model.hf", "espalier.model.transforms")), (
            name
        )  # these read files


def test_every_shipped_model_and_method_is_recorded_by_registered_names(tmp_path):
    folder = pathlib.Path(gin_source.ROOT, "t5x_configs")
    models = [f"models/{path.stem}" for path in folder.glob("models/*.gin")]
    methods = [
        str(path.relative_to(folder).with_suffix("")) for path in folder.glob("methods/*/*.gin")
    ]
    names = set()
    for name in (*models, *methods):
        base = ("models/cnn_tiny",) if "conv" in name else ("models/tiny",)
        files = (*base, name) if name.startswith("methods/") else (name,)
        checked = gin_reader.Reader()
        for file in files:
            checked.read_file(f"t5x_configs/{file}.gin")
        record = model_record._record(checked.checked)
        write(tmp_path, record)
        names |= set(json.dumps(record).split('"'))
        given = {
            k for k, x in checked.checked.macros.items() if not gin_reader.is_required(x.value)
        }
        if checked.checked.macros_read.keys() <= given:  # else a user sets the others
            assert not model_file.read(tmp_path / "model.json").foreign, name
    used = {name for name in REGISTERED if name in names}
    assert {"moa.MixtureOfAttention", "lowrank.factorised", "resnet.Bottleneck"} <= used


@pytest.mark.parametrize(
    "files",
    [("models/tiny",), ("models/tiny", "methods/low_rank/low_rank", "methods/nexus/nexus_bam")],
)
def test_the_equal_gin_text_gives_the_same_record(tmp_path, files):
    record = record_of(tmp_path, *files)
    (tmp_path / "config.gin").write_text(model_file.read(tmp_path / "model.json").gin())
    model_record.write(tmp_path)
    assert json.loads((tmp_path / "model.json").read_text()) == record


def test_values_come_back_with_their_types(tmp_path):
    gin_text = (
        "from __gin__ import dynamic_registration\nfrom espalier.model import config\nMODEL = @config.TransformerConfig()\n"
        "config.TransformerConfig.layer_pattern = ('full',)\nconfig.TransformerConfig.dtype = %A\n"
        "A = [1, -2.5e-7, True, None, (), {'a': ('b', [\"it's\"])}]\n"
    )
    (tmp_path / "config.gin").write_text(gin_text)
    model_record.write(tmp_path)
    reader = gin_reader.Reader()
    reader.read_file(str(tmp_path / "model.json"))
    assert reader.checked.macros["A"].value == [1, -2.5e-7, True, None, (), {"a": ("b", ["it's"])}]
    key = ("", "espalier.model.config.TransformerConfig", "layer_pattern")
    assert reader.checked.bindings[key].value == ("full",)


def test_gin_files_and_bindings_change_a_recorded_model(tmp_path):
    record_of(tmp_path, "models/tiny")
    path = str(tmp_path / "model.json")
    for how in ({"defaults": [LOAD_RUN, path]}, {"files": [path], "defaults": [LOAD_RUN]}):
        bindings = ["config.TransformerConfig.num_layers=7", "DTYPE='bfloat16'", "VOCABULARY=None"]
        config = gin_config.load(bindings=bindings, entry=ENTRY, **how).entry().model.config
        assert (config.num_layers, config.dtype) == (7, "bfloat16")


BIG = "x" * 900_000
CALL = {"call": "transformer.Transformer"}
LAUGHS = {f"A{i}": [{"macro": f"A{i + 1}"}] * 10 for i in range(9)} | {
    "A9": 1,
    "MODEL": {"macro": "A0"},
}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "it is damaged"),
        ("\x80", "it is damaged"),
        ("[" * 100_000, "it is damaged"),
        ("{}", '"format" is not'),
        (" " * (1 << 20) + "{}", "larger than 1 MiB"),
        ({"macros": []}, '"macros" and "settings" must be objects'),
        ({"settings": {"transformer.Transformer": 1}}, "'transformer.Transformer' is not the name of a"),
        ({"settings": {"os.system.command": "id"}}, "'os.system' is not a part of a model"),
        ({"macros": {"MODEL": {"call": "espalier.data.text.user_data:import_mixtures"}}}, "'espalier.data.text.user_data:import_mixtures' is not a part"),
        ({"macros": {"MODEL": {"call": "launch:cli"}}}, "'launch:cli' is not a part of a model"),
        ({"macros": {"MODEL": {"dict": [[[1], 2]]}}}, "has a key that is not a literal"),
        ({"macros": {"MODEL": {"call": "step_dir.remove"}}}, "'step_dir.remove' is not a part of a model"),
        ({"macros": {"MODEL": {"call": "jax.numpy.load"}}}, '"call": "jax.numpy.load"} is not a value'),
        ({"macros": {"MODEL": {"call": "x:y.z"}}}, "is not a value"),
        ({"macros": {"MODEL": {"call": "a\nimport os:x"}}}, "is not a value"),
        ({"macros": {"MODEL\nimport os\nX": 1}}, "is not the name of a macro"),
        ({"macros": {"MODEL": {"macro": "ABSENT"}}}, "MODEL: there is no macro 'ABSENT'"),
        ({"macros": {"MODEL": {"macro": "MODEL"}}}, "'%MODEL' is a part of itself"),
        ({"macros": {"MODEL": CALL}, "settings": {"transformer.Transformer.config": CALL}}, "a part of itself"),
        ({"macros": LAUGHS}, "more than 100000 parts"),
        ({"macros": {f"A{i}": {"macro": f"A{i + 1}"} for i in range(60)} | {"A60": 1}}, "more than 50 parts inside"),
        ('{"format": "espalier model 1", "macros": {"A": NaN}, "settings": {}}', "NaN is not a number"),
        ('{"format": "espalier model 1", "macros": {"A": 1e999}, "settings": {}}', "A: inf is not a value"),
    ],
)  # fmt: skip
def test_a_damaged_or_hostile_file_is_one_error(tmp_path, text, message):
    if isinstance(text, dict):
        text = {"format": model_file.FORMAT, "macros": {}, "settings": {}, **text}
    path = write(tmp_path, text)
    if text == "\x80":
        pathlib.Path(path).write_bytes(b"\x80")
    with pytest.raises(ModelFileError) as error:
        model_file.read(path)
    assert message in str(error.value) and path in str(error.value)
    with pytest.raises(ConfigError) as error:
        load(path)
    assert message in str(error.value)


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A module that leaves a trace when it is imported; the trace."""
    trace = tmp_path / "trace"
    text = f"from os import system\nopen({str(trace)!r}, 'w')\ndef model(): pass\n"
    (tmp_path / "evil_module.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield trace
    sys.modules.pop("evil_module", None)


def foreign(name):
    return {"format": model_file.FORMAT, "macros": {"MODEL": {"call": name}}, "settings": {}}


def test_a_module_of_someone_else_is_refused_before_it_is_imported(tmp_path, gin_file, evil):
    path = write(tmp_path, foreign("evil_module:model"))
    with pytest.raises(ConfigError) as error:
        load(path)
    text = str(error.value)
    assert text.startswith("1 problem ") and "import evil_module in a gin file of your own" in text
    assert f"{path}: the model uses 'evil_module.model', which is not of this project" in text
    outer = gin_file(f"include '{path}'\n", "outer.gin")
    with pytest.raises(ConfigError, match="uses 'evil_module.model'"):
        gin_config.load([outer], entry=ENTRY, defaults=[LOAD_RUN])
    assert not evil.exists()


def test_the_users_own_files_may_bring_it_in_with_what_it_defines(tmp_path, gin_file, evil):
    own = gin_file("from __gin__ import dynamic_registration\nimport evil_module\n", "own.gin")
    load(write(tmp_path, foreign("evil_module:model")), [own])
    assert evil.exists()
    with pytest.raises(ConfigError, match="uses 'evil_module.system'"):
        load(write(tmp_path, foreign("evil_module:system")), [own])


@pytest.mark.parametrize(
    "name",
    [
        "espalier.data.text.user_data:import_mixtures",
        "espalier.trainers.checkpoints.checkpoint:Checkpointer",
    ],
)
def test_the_users_own_files_bring_in_nothing_of_this_project(tmp_path, gin_file, name):
    """Files of data and runs import such modules."""
    module = name.partition(":")[0]
    package, _, last = module.rpartition(".")
    text = f"from __gin__ import dynamic_registration\nfrom {package} import {last}\n"
    with pytest.raises(ConfigError, match="is not a part of a model that this version knows"):
        load(write(tmp_path, foreign(name)), [gin_file(text, "own.gin")])


def test_a_model_sets_no_macro_of_the_command(tmp_path, trained_run):
    record = json.loads(pathlib.Path(trained_run.path, "model.json").read_text())
    record["macros"] |= {
        "CHAT_TEMPLATE": "/etc/passwd",
        "MESH": {"dict": [["fsdp", 3]]},
        "ADD_BOS": True,
    }
    write(tmp_path, record)
    (tmp_path / "checkpoints").symlink_to(f"{trained_run.path}/checkpoints")
    config = load_run.config_of(str(tmp_path))
    assert (config.chat_template, config.add_bos, config.mesh) == (None, None, {"fsdp": -1})


@pytest.mark.parametrize(
    ("part", "name", "value", "message"),
    [
        ("macros", "MODEL", BIG, "is no model"),
        ("macros", "MODEL", [1] * 100_000, "is no model"),
        ("settings", "config.TransformerConfig.layer_pattern", [BIG], "layer_pattern names 'xxx"),
    ],
)
def test_a_huge_wrong_value_is_a_short_error(
    part, name, value, message, tmp_path, trained_run, command, capsys
):
    record = json.loads(pathlib.Path(trained_run.path, "model.json").read_text())
    record[part][name] = value
    write(tmp_path, record)
    (tmp_path / "checkpoints").symlink_to(f"{trained_run.path}/checkpoints")
    (tmp_path / "x.jsonl").write_text('{"text": "import os"}\n')
    files = (f"--inputs={tmp_path}/x.jsonl", f"--output={tmp_path}/y.jsonl")
    assert command("score", f"--checkpoint={tmp_path}", *files) == 2
    error = capsys.readouterr().err
    assert message in error and len(error) < 10_000


def mutated(record, rng):
    """A copy of a record in which a few values are replaced, moved or removed."""
    record = copy.deepcopy(record)
    names = [
        *REGISTERED,
        "os.system",
        "jax.numpy.load",
        "subprocess:run",
        "builtins:exec",
        "step_dir.remove",
    ]
    for _ in range(rng.randint(1, 3)):
        part = record[rng.choice(("macros", "settings"))]
        key = rng.choice(list(part))
        choice = rng.randrange(6)
        if choice == 0:
            part[key] = {rng.choice(("call", "factory")): rng.choice(names)}
        elif choice == 1:
            part[key] = rng.choice(
                [[], {}, "../../etc/passwd", -1, 1 << 70, 1e300, True, [[1]], {"tuple": [1]}]
            )
        elif choice == 2:
            part[f"{rng.choice(names)}.{rng.choice(('path', 'file', 'features', 'config'))}"] = (
                part[key]
            )
        elif choice == 3:
            part[key] = {"macro": rng.choice(list(record["macros"]))}
        elif choice == 4:
            del part[key]
            part.setdefault("A", 1) if part is record["macros"] else None
        else:
            part[key] = copy.deepcopy(rng.choice(list(part.values())))
    return record


_AUDITED: list[str] | None = None


def _audit(event, arguments):
    if _AUDITED is None:
        return
    writes = event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+")
    if writes or event.startswith(
        ("subprocess.", "os.system", "os.exec", "os.fork", "os.remove", "socket.", "shutil.")
    ):
        _AUDITED.append(f"{event} {arguments}")


def test_no_change_to_a_record_calls_anything_else_writes_a_file_or_starts_a_process(
    tmp_path, monkeypatch
):
    record = record_of(tmp_path, "models/tiny", "methods/bam/btx")
    allowed = {id(value) for value in OBJECTS.values()}
    called = []
    call = Configuration.call

    def recorded(self, target, *args, **kwargs):
        called.append(target.value)
        return call(self, target, *args, **kwargs)

    monkeypatch.setattr(Configuration, "call", recorded)
    sys.addaudithook(_audit)
    rng = random.Random(0)
    built = refused = 0
    text = json.dumps(record)
    for case in itertools.count():
        if case == 2000:
            break
        if case % 3:
            content = json.dumps(mutated(record, rng)).encode()
        else:
            content = bytearray(text.encode())
            for _ in range(rng.randint(1, 4)):
                content[rng.randrange(len(content))] = rng.randrange(256)
        (tmp_path / "model.json").write_bytes(content)
        globals()["_AUDITED"] = []
        try:
            reader = gin_reader.Reader()
            reader.read_file(str(tmp_path / "model.json"))
            if reader.refused or reader.checked.problems:
                refused += 1
                continue
            Configuration(reader.checked).macro("MODEL")
            built += 1
        except (ValueError, TypeError):
            refused += 1
        finally:
            events, _ = _AUDITED, globals().update(_AUDITED=None)
            assert events == []
    assert built > 200 and refused > 200
    assert {id(value) for value in called} <= allowed and called


def test_a_checkpoints_configuration_is_not_read(trained_run, tmp_path, command, evil):
    """Whatever config.gin holds, commands with --checkpoint read the model and the vocabulary beside it."""
    for name in ("model.json", "vocabulary.json"):
        (tmp_path / name).write_bytes(pathlib.Path(trained_run.path, name).read_bytes())
    (tmp_path / "checkpoints").symlink_to(f"{trained_run.path}/checkpoints")
    (tmp_path / "config.gin").write_text("import evil_module\nMODEL = @evil_module.model()\n")
    (tmp_path / "x.jsonl").write_text('{"text": "import os"}\n')
    files = (f"--inputs={tmp_path}/x.jsonl", f"--output={tmp_path}/y.jsonl")
    assert command("score", f"--checkpoint={tmp_path}", *files) == 0
    first = (tmp_path / "y.jsonl").read_text()
    assert command("score", f"--checkpoint={trained_run.path}", *files) == 0
    assert (tmp_path / "y.jsonl").read_text() == first and not evil.exists()
