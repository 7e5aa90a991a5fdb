"""A configured function is described by the bindings that its call reads, and by no others."""

import pytest

from espalier.launch.config import gin_check, gin_config
from espalier.launch.config.build import Configuration
from espalier.trainers.programs.description import digest

ENTRY = "toy_run:train"
FACTORED = """
toy_net.Block.dense = @toy_net.Factored
toy_net.Factored.rank = %RANK
RANK = 3
"""
SCOPED = """
toy_net.Net.block = @a/toy_net.Block
a/toy_net.Block.dense = @b/toy_net.Factored
b/toy_net.Factored.rank = 3
"""


@pytest.fixture
def model_of(gin_file, toy_gin):
    """(gin text, bindings) -> the model that the configuration makes."""

    def load(text, *bindings):
        bindings = ["MODEL_DIR=/x", *bindings]
        config = gin_config.load([gin_file(toy_gin + text)], bindings, entry=ENTRY)
        return config.entry()["model"]

    return load


@pytest.mark.parametrize(
    ("text", "same", "other"),
    [
        (FACTORED, "MODEL_DIR=/y", "RANK=4"),
        (FACTORED, "TRAIN_STEPS=7", "toy_net.Factored.rank=5"),
        (SCOPED, "MODEL_DIR=/y", "b/toy_net.Factored.rank=4"),
        (SCOPED, "TRAIN_STEPS=7", "a/toy_net.Block.dense=@toy_net.Factored"),
    ],
)
def test_bindings_that_a_call_reads_count(text, same, other, model_of):
    first = digest(model_of(text))
    assert digest(model_of(text)) == first
    assert digest(model_of(text, same)) == first
    assert digest(model_of(text, other)) != first


def test_a_factory_of_an_isolated_configuration_does_not_depend_on_its_file(gin_file):
    text = "from __gin__ import dynamic_registration\nimport toy_net\n"
    text += "BLOCK = @toy_net.Block\ntoy_net.Block.dense = @toy_net.Factored\n"

    def block(name, rank):
        file = gin_file(f"{text}toy_net.Factored.rank = {rank}\n", name)
        return digest(Configuration(gin_check.check([file], fragment=True)).macro("BLOCK"))

    assert block("one.gin", 3) == block("another.gin", 3) != block("one.gin", 4)
