"""Settings of Hugging Face models there and back: from config.json to a model, and from any model.

goldens/published_configs.json holds what published config.json files say, older spellings included; what
is left out there says nothing of the maths. Aya 23's is of its report (arXiv 2405.15032) and model card,
those of Cohere2-MoE are of other readers of its released models, the others' of their model cards. Those of
SmolLM3 and Apertus were checked with the defaults of transformers' classes, and where these differ (SmolLM3's
base; Apertus's MLP and heads of keys and values) with other readers.
"""

import functools
import json

import numpy as np
import pytest

from espalier.launch.config import gin_config
from espalier.model.hf import config_fields, registry
from espalier.model.hf.description import describe
from espalier.model.mlp import by_kind
from espalier.model.rope import Rope
from tests.model.hf.cases import CASES, PUBLISHED, SMALL, load


def within(fields, more):
    """Whether an object, as of a rotation, has all fields of another; YaRN's defaults are written too."""
    if not isinstance(fields, dict):
        return fields == more
    return isinstance(more, dict) and all(within(x, more.get(key)) for key, x in fields.items())


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_settings_come_back(path):
    config, family, model, _ = load(path)
    written = json.loads(json.dumps(family.config(model)))
    assert describe(family.model(written)) == describe(model)
    # Every field that transformers wrote, but for those that say nothing of the function.
    silent = {*config_fields.SILENT, *family.silent, *family.neutral, "is_decoder"}
    silent -= {"architectures", "model_type", "dtype", "sliding_window", "tie_word_embeddings"}
    for key, value in config.items():
        if key in silent:
            continue
        if key == "n_inner" and value is None:
            value = 4 * config["n_embd"]
        if key in (
            "sliding_window",
            "layer_types",
            "use_sliding_window",
        ) and "sliding_attention" not in config.get("layer_types", ["sliding_attention"]):
            continue  # a window that no layer has
        names = {"gelu_new": "gelu_pytorch_tanh"}
        got = written[key]
        assert (
            names.get(got, got) == names.get(value, value)
            if isinstance(got, str)
            else (got == value or within(value, got))
        ), key


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name != "llama2_7b"])
def test_published_configs_are_the_models_of_the_gin_files(name):
    """What gin builds and what config.json builds is one model, and the right family is found for it."""
    config = gin_config.load(
        [f"t5x_configs/models/{name}.gin", "t5x_configs/runs/pretrain.gin"],
        ["MODEL_DIR='/tmp/x'", "MIXTURE_OR_TASK_NAME='x'", "TASKS=()"],
        entry="espalier.launch.train:train",
    )
    model = config.arguments()["recipe"].model
    family = registry.family_of_config(PUBLISHED[name])
    assert registry.family_of_model(model) is family
    written = family.config(model)
    here = describe(model)
    there = describe(family.model(PUBLISHED[name]))
    assert {k: v for k, v in here.items() if v != there.get(k)} == {}
    assert set(here) == set(there)
    assert written["model_type"] == family.name
    assert set(family.shapes(family.model(PUBLISHED[name]))) == set(
        family.shapes(family.model(written))
    )


@pytest.mark.parametrize(
    ("name", "non_embedding", "embedding"),
    [("aya23_8b", 6_979_457_024, 1_048_576_000), ("aya23_35b", 32_883_679_232, 2_097_152_000)],
)
def test_aya_has_the_reported_parameters(name, non_embedding, embedding):
    """Aya 23's report counts both parts exactly (arXiv 2405.15032, section 2)."""
    family = registry.family_of_config(PUBLISHED[name])
    sizes = {k: int(np.prod(v)) for k, v in family.shapes(family.model(PUBLISHED[name])).items()}
    assert sizes.pop("model.embed_tokens.weight") == embedding
    assert sum(sizes.values()) == non_embedding
    assert "lm_head.weight" not in sizes


@pytest.mark.parametrize(
    ("name", "parameters"), [("apertus_8b", 8_053_338_240), ("smollm3_3b", 3_075_098_624)]
)
def test_models_have_the_parameters_of_their_sizes(name, parameters):
    """The sums of the tensors' sizes, by hand: of names that say 8 and 3 billion."""
    family = registry.family_of_config(PUBLISHED[name])
    assert sum(map(np.prod, family.shapes(family.model(PUBLISHED[name])).values())) == parameters


def test_every_factory_is_a_partial_of_a_class():
    for name, config in SMALL.items():
        model = registry.family_of_config(config).model(config)
        waiting, seen = [getattr(model, f) for f in ("block", "norm", "position_embed")], 0
        while waiting:
            factory = waiting.pop()
            if factory is None:
                continue
            assert isinstance(factory, functools.partial), name
            assert isinstance(factory.func, type) or factory.func is by_kind, name
            assert not factory.args
            assert getattr(
                __import__(factory.func.__module__, fromlist=["x"]), factory.func.__name__
            )
            seen += 1
            waiting += [v for v in factory.keywords.values() if callable(v) and type(v) is not Rope]
        assert seen >= 5
