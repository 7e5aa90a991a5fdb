"""A configuration is written as gin writes it, and uses the bindings that gin would use."""

import json
import os
import subprocess
import sys

import pytest

from espalier.launch.config import gin_config, gin_source
from tests import methods_test

ENTRY = "toy_run:train"


# In a process of its own, because gin keeps what it has registered.
OF_GIN = """
import importlib, json, sys
import gin
files, bindings, entry, root = json.loads(sys.argv[1])
gin.add_config_file_search_path(root)
gin.parse_config_files_and_bindings(files, bindings)
text = gin.config_str()
module, _, name = entry.partition(":")
gin.get_bindings(getattr(importlib.import_module(module), name))
print(json.dumps([text, gin.operative_config_str()]))
"""


def of_gin(files, bindings, entry, toy_modules):
    """The text that gin itself writes, and that of what it used to make the arguments of the entry function."""
    case = json.dumps([files, bindings, entry, gin_source.ROOT])
    path = os.pathsep.join([gin_source.ROOT, str(toy_modules)])
    done = subprocess.run(
        [sys.executable, "-c", OF_GIN, case],
        env={**os.environ, "PYTHONPATH": path},
        cwd=gin_source.ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0, done.stderr
    return tuple(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    ("run", "methods"),
    [
        ("pretrain", ()),
        ("pretrain", ("low_rank/low_rank", "bam/bam", "averaging/recent_mean")),
        ("classify", ("low_rank/low_rank_conv",)),
        ("preference", ("preference/indicators", "adapters/lora", "preference/ipo")),
        ("online", ("preference/ppo",)),
    ],
)
def test_text_and_operative_text_are_those_of_gin(run, methods, toy_modules):
    files, bindings = methods_test.arguments(run, methods)
    config = gin_config.load(files, bindings, entry="espalier.launch.train:train")
    config.arguments()
    assert (config.text, config.operative_text()) == of_gin(
        files, bindings, "espalier.launch.train:train", toy_modules
    )


def test_scopes_and_long_values_are_written_as_gin_writes_them(gin_file, toy_gin, toy_modules):
    """Macros in scopes, a singleton, values of several lines, and modules of one name."""
    text = (
        toy_gin
        + """
import textwrap as toys
import json.decoder
import jax
toy_net.Net.block = @a/b/toy_net.Block
toy_net.Block.dense = @toy_net.Dense
a/toy_net.Block.dense = @toy_net.Factored
a/b/toy_net.Factored.rank = %a/RANK
a/RANK = 3
toy_run.train.names = %NAMES
NAMES = ['a name that is long', 'another name that is long', 'a third name', 'a fourth one']
toys.wrap.width = 2
once/gin.singleton.constructor = @toy_net.Factored
once/toy_net.Factored.width = 2
jax.nn.initializers.normal.stddev = 1e-3
EXTRA = {'one': [1, 2.5, None], 'of': (@once/gin.singleton(), @toys.wrap), 'x': @json.decoder.JSONDecoder}
toy_run.train.optimizer = %EXTRA
"""
    )
    files = [gin_file(text)]
    config = gin_config.load(files, ["MODEL_DIR='/x'"], entry=ENTRY)
    made, again = (config.arguments()["optimizer"]["of"][0] for _ in range(2))
    assert made is again and made.width == 2  # the singleton
    assert (config.text, config.operative_text()) == of_gin(
        files, ["MODEL_DIR='/x'"], ENTRY, toy_modules
    )
