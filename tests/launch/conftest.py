"""A small program for configuration tests: modules `toy_net` and `toy_run`, and gin files."""

import sys
import textwrap

import pytest

NET = '''
"""Sub-layers."""

from typing import Literal

import flax.linen as nn
import jax


class Dense(nn.Module):
    width: int
    bias: bool = False

    @nn.compact
    def __call__(self, x):
        return nn.Dense(self.width, use_bias=self.bias, name="dense")(x)


class Factored(nn.Module):
    width: int
    rank: int = 2

    @nn.compact
    def __call__(self, x):
        x = nn.Dense(self.rank, use_bias=False, name="down")(x)
        return nn.Dense(self.width, use_bias=False, name="up")(x)


class Block(nn.Module):
    dense: object = Dense

    @nn.compact
    def __call__(self, x, _):
        return x + nn.tanh(self.dense(width=x.shape[-1], name="inner")(x)), None


class Net(nn.Module):
    block: object = Block
    layers: int = 3

    @nn.compact
    def __call__(self, x):
        stack = nn.scan(
            nn.remat(self.block),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=self.layers,
        )
        return stack(name="layers")(x, None)[0]


def optimizer(*, rate: float, kind: Literal["adam", "lion"] = "adam", decay: float | None = None):
    return (kind, rate, decay)
'''

RUN = '''
"""Runs the toy.

Example: python -m toy_run --gin_file=run.gin
"""

if __name__ == "__main__":
    from launch import cli

    raise SystemExit(cli.main(__doc__, entry="toy_run:train"))

CALLS = []


class OwnError(ValueError):
    """Stands for an error of the project."""


def where(*, steps: int = 1):
    """Prints what a process of its own sees."""
    import os
    import sys

    names = ("GLIBC_TUNABLES", "JAX_COMPILATION_CACHE_DIR")
    print("seen", [os.environ.get(name) for name in names], sorted({"jax", "tensorflow"} & set(sys.modules)))


def processes(*, steps: int = 1):
    """Adds one number of each process."""
    import jax
    from jax.experimental import multihost_utils

    total = multihost_utils.process_allgather(jax.numpy.float32(jax.process_index() + steps))
    print("total", jax.process_index(), jax.process_count(), float(total.sum()))


def train(*, model, optimizer=None, steps: int = 10, model_dir: str | None = None):
    """Keeps what it was called with."""
    if steps < 0:
        raise OwnError(f"steps = {steps} must not be negative.")
    CALLS.append(dict(model=model, optimizer=optimizer, steps=steps, model_dir=model_dir))
    return CALLS[-1]
'''

GIN = """
from __gin__ import dynamic_registration

import toy_net
import toy_run

MODEL_DIR = %gin.REQUIRED
TRAIN_STEPS = 10
RATE = 0.5

toy_run.train.model = @toy_net.Net()
toy_run.train.optimizer = @toy_net.optimizer()
toy_run.train.steps = %TRAIN_STEPS
toy_run.train.model_dir = %MODEL_DIR
toy_net.Net.block = @toy_net.Block
toy_net.Block.dense = @toy_net.Dense
toy_net.optimizer.rate = %RATE
"""


@pytest.fixture(scope="session", autouse=True)
def toy_modules(tmp_path_factory):
    """Gin keeps what it has registered, so the modules are made once."""
    folder = tmp_path_factory.mktemp("toy")
    (folder / "toy_net.py").write_text(NET)
    (folder / "toy_run.py").write_text(RUN)
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture
def gin_file(tmp_path):
    """Writes gin text to a file; returns its path."""

    def write(text: str, name: str = "run.gin") -> str:
        path = tmp_path / name
        path.write_text(textwrap.dedent(text))
        return str(path)

    return write


@pytest.fixture
def toy_gin():
    return GIN
