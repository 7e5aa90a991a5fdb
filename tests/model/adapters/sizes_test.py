"""docs/use/adapters.md has the share of parameters that each method's defaults add to SmolLM2-135M."""

import math
import pathlib
import re

import jax
import pytest

from espalier.launch.config import gin_config
from espalier.trainers import initialise

PAGE = pathlib.Path(__file__).parents[3] / "docs" / "use" / "adapters.md"
SIZES = {
    "num_layers": 30,
    "embed_dim": 576,
    "num_heads": 9,
    "num_kv_heads": 3,
    "mlp_dim": 1536,
    "vocab_size": 49152,
}
METHODS = {
    "LoRA": "adapters/lora",
    "DoRA": "adapters/dora",
    "(IA)3": "adapters/ia3",
    "bottlenecks": "adapters/bottleneck",
    "prompt tuning": "adapters/prompt",
    "MoV": "mov/mov",
    "MoLORA": "mov/molora",
}


def sizes(method):
    """(parameters of the base model, of the adapters) with a method's file."""
    names = ("models/tiny", "runs/finetune", f"methods/{method}")
    config = gin_config.load(
        [f"t5x_configs/{name}.gin" for name in names],
        [
            *(f"config.TransformerConfig.{name}={value}" for name, value in SIZES.items()),
            "transformer.Block.layout='sequential'",
            "INITIAL_CHECKPOINT_PATH='/x'",
            *(["PROMPT_FIRST_ID=3"] if method.endswith("prompt") else []),
        ],
        entry="espalier.launch.train:train",
        unused={"MODEL_DIR": "''", "MIXTURE_OR_TASK_NAME": "''", "TASKS": "()"},
    )
    variables = initialise.abstract_variables(config.arguments()["recipe"].model)
    counts = [0, 0]
    leaves = jax.tree_util.tree_leaves_with_path(initialise.shapes_of(variables["params"]))
    for path, leaf in leaves:
        counts["adapter_" in jax.tree_util.keystr(path)] += math.prod(leaf.shape)
    return counts


@pytest.mark.parametrize("title", METHODS)
def test_the_page_has_the_share_of_parameters(title):
    base, added = sizes(METHODS[title])
    assert base == 134_515_008
    row = re.search(rf"^\| \[{re.escape(title)}\]\S* \| .*? \| (\S+) % \|", PAGE.read_text(), re.M)
    assert row is not None
    shown = row[1]
    digits = len(shown.partition(".")[2])
    assert f"{100 * added / base:.{digits}f}" == shown
