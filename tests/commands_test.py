"""The training commands that README and help texts show are configurations that load and resolve; influence's have their flags."""

import argparse
import importlib
import itertools
import pathlib
import re
import shlex

import pytest

from espalier.data.tokenizers import vocabularies
from espalier.launch import cli
from espalier.launch.config import gin_config, gin_writer
from espalier.launch.run import run_vocabulary
from espalier.launch.submit import launch_config
from espalier.model.config import TransformerConfig
from espalier.model.transformer import Transformer
from espalier.trainers.optim.schedules import Span

ROOT = pathlib.Path(__file__).parent.parent


def commands():
    """(where, gin files, bindings, launch words) of each `train`, `precompile`, `numerics` and `submit` command shown."""
    found = [
        ROOT / "README.md",
        ROOT / "PAPERS.md",
        *ROOT.glob("docs/**/*.md"),
        *ROOT.glob("launch/papers/*/README.md"),
        *ROOT.glob("launch/*.py"),
    ]
    for path in sorted(str(file.relative_to(ROOT)) for file in found):
        text = (ROOT / path).read_text(encoding="utf-8").replace("\\\\\n", "\\\n")
        for number, match in enumerate(
            re.finditer(
                r"espalier (?:train|precompile|numerics|submit) ((?:.*\\\n)+.*|--gin_file=.*)", text
            )
        ):
            words = shlex.split(match[1].replace("\\\n", " "))
            files = [w.partition("=")[2] for w in words if w.startswith("--gin_file=")]
            bindings = [w.removeprefix("--gin.") for w in words if w.startswith("--gin.")]
            shown_for_its_errors = "mine.gin" in files or "TRAIN_STEP=100" in bindings
            if (
                not shown_for_its_errors and "--" not in words
            ):  # other commands: submit/beam_test.py
                launch = [w for w in words if w.startswith("--config")]
                yield pytest.param(files, bindings, launch, id=f"{path}-{number}")


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """The config.gin of an imported model, for commands that begin with `RUN/config.gin`, its vocabulary beside it."""
    path = tmp_path_factory.mktemp("imported") / "config.gin"
    sizes = {"vocab_size": 264, "num_layers": 1, "embed_dim": 8, "num_heads": 1, "mlp_dim": 8}
    path.write_text(gin_writer.write(Transformer(config=TransformerConfig(**sizes))))
    run_vocabulary.save(path.parent, vocabularies.byte())
    return str(path)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """The config.gin of a run on files, for commands with this file alone."""
    path = tmp_path_factory.mktemp("trained") / "config.gin"
    files = [f"t5x_configs/{name}.gin" for name in ("models/tiny", "data/files", "runs/pretrain")]
    bindings = ["MODEL_DIR='/x'", "FILES='/x'", "MIXTURE_OR_TASK_NAME='files'"]
    path.write_text(gin_config.load(files, bindings, entry="espalier.launch.train:train").text)
    return str(path)


@pytest.mark.parametrize(("files", "bindings", "launch"), commands())
def test_a_command_that_is_shown_resolves_to_a_recipe(files, bindings, launch, imported, trained):
    run = imported if len(files) > 1 else trained
    files = [run if file.endswith("/config.gin") else file for file in files]
    unused = {"MODEL_DIR": "''", "MIXTURE_OR_TASK_NAME": "''", "TASKS": "()"}
    config = gin_config.load(files, bindings, entry="espalier.launch.train:train", unused=unused)
    recipe = config.arguments()["recipe"].with_span(Span(total_steps=100_000, stopped_at=1e-4))
    assert float(recipe.learning_rate(1)) > 0
    if launch:
        devices = settings_of(launch).devices
        assert devices is None or recipe.program(devices=devices)


def settings_of(words):
    """The launch configuration that a command shows."""
    named = dict(word.removeprefix("--config").partition("=")[::2] for word in words)
    overrides = [f"{name[1:]}={value}" for name, value in named.items() if name]
    return launch_config.read(named[""], overrides)


def test_sweeps_that_are_shown_on_a_cluster_have_one_process_a_run():
    shown = 0
    for page in ROOT.glob("docs/**/*.md"):
        text = page.read_text(encoding="utf-8").replace("\\\n", " ")
        for match in re.finditer(r"espalier sweep .*--cluster.*", text):
            words = shlex.split(match[0])
            place = words.index("--cluster")
            settings = [
                w for before, w in itertools.pairwise(words) if before == "--cluster_setting"
            ]
            read = launch_config.read(words[place + 1], settings)
            assert read.SWEEPS and read.processes == 1
            assert (ROOT / words[words.index("--sweep") + 1]).is_file()
            shown += 1
    assert shown == 1


INFLUENCE_PAGES = (
    "docs/use/influence.md",
    "docs/use/influence_settings.md",
    "docs/start/trace_an_answer.md",
    "docs/start/released_mixture.md",
)
PARTS = [f"launch/influence/{part}.py" for part in ("fit", "score", "report", "remove")]


def influence_commands():
    """(where, part, flags) of each `launch.influence` command shown."""
    for path in ("launch/influence/__main__.py", *INFLUENCE_PAGES, *PARTS):
        text = (ROOT / path).read_text(encoding="utf-8").replace("\\\\\n", "\\\n")
        text = text.replace("\\\n", " ")  # a command on several lines
        shown = re.finditer(r"espalier influence (fit|score|report|remove) (--.*)", text)
        for number, match in enumerate(shown):
            words = shlex.split(match[2].rstrip("`"))
            yield pytest.param(match[1], words, id=f"{path}-{number}")


@pytest.mark.parametrize(("part", "words"), influence_commands())
def test_a_command_of_influence_that_is_shown_has_these_flags(part, words, monkeypatch):
    parser = argparse.ArgumentParser(exit_on_error=False, allow_abbrev=False)
    monkeypatch.setattr(cli, "main", lambda *_, extra_flags, **__: extra_flags(parser))
    monkeypatch.setattr(cli, "run_command", lambda *_, add_flags, **__: add_flags(parser))
    importlib.import_module(f"espalier.launch.influence.{part}").main([])
    flags, rest = parser.parse_known_args(words)
    assert rest == [] and vars(flags)
