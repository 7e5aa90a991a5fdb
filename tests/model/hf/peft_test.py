"""Adapters of peft: every field of adapter_config.json and every tensor is read or refused by name."""

import json

import numpy as np
import pytest

from espalier.model.hf import peft
from espalier.model.hf.files.safetensors_files import SafetensorsWriter
from espalier.model.hf.mapping import Piece

QUERY, DOWN = "layers/block_0/attention/query", "layers/block_0/mlp/down"
NAMES = {QUERY: "model.layers.{}.self_attn.q_proj", DOWN: "model.layers.{}.mlp.down_proj"}
SHAPES = {f"{QUERY}/kernel": (2, 8, 6), f"{DOWN}/kernel": (2, 12, 8)}
PIECES = [
    Piece(native=f"{site}/kernel", native_at=(i,), hf=f"{hf.format(i)}.weight", transpose=True)
    for site, hf in NAMES.items()
    for i in range(2)
]
LORA = {"peft_type": "LORA", "r": 4, "lora_alpha": 8, "bias": "none"}
PREFIX = "base_model.model."
Q0 = f"{PREFIX}{NAMES[QUERY].format(0)}"


def tensors(*, dora=False, rank=4):
    rng = np.random.default_rng(0)
    result = {}
    for site, hf in NAMES.items():
        _, columns, rows = SHAPES[f"{site}/kernel"]
        for i in range(2):
            module = f"{PREFIX}{hf.format(i)}"
            result[f"{module}.lora_A.weight"] = rng.normal(size=(rank, columns))
            result[f"{module}.lora_B.weight"] = rng.normal(size=(rows, rank))
            if dora:
                result[f"{module}.lora_magnitude_vector"] = np.ones(rows)
    return {name: value.astype(np.float32) for name, value in result.items()}


def ia3(shape=(6, 1)):
    return {f"{Q0}.ia3_l": np.full(shape, 1.5, np.float32)}


def read(folder, config, arrays):
    (folder / peft.CONFIG).write_text(config if isinstance(config, str) else json.dumps(config))
    layout = {name: (x.dtype, x.shape) for name, x in arrays.items()}
    with SafetensorsWriter(folder, layout, single=peft.WEIGHTS) as writer:
        for name, values in arrays.items():
            writer.write(name, values)
    return peft.read(str(folder), PIECES, SHAPES, lambda path, at: np.ones(SHAPES[path][1:]))


def delta(imported, site, layer=0):
    """Returns s A B of a projection, [in, out]."""
    a, b = (imported.arrays[f"{site}/adapter_lora/lora_{x}"][layer] for x in "ab")
    rank, alpha = imported.settings["LORA_RANK"], imported.settings["LORA_ALPHA"]
    return alpha / (rank**0.5 if imported.settings["RANK_STABILISED"] else rank) * a @ b


@pytest.mark.parametrize(
    "initialisation", [True, False, None, "gaussian", "orthogonal", "eva", "mica"]
)
def test_initialisations_that_leave_the_base_alone_are_read(tmp_path, initialisation):
    fields = {"init_lora_weights": initialisation, "eva_config": {"rho": 2.0}, "loftq_config": {}}
    arrays = tensors()
    imported = read(tmp_path, {**LORA, **fields}, arrays)
    expected = 2 * (arrays[f"{Q0}.lora_B.weight"] @ arrays[f"{Q0}.lora_A.weight"]).T
    np.testing.assert_allclose(delta(imported, QUERY), expected, rtol=1e-5)


def test_absent_fields_have_the_defaults_of_peft(tmp_path):
    imported = read(tmp_path, {"peft_type": "LORA"}, tensors(rank=8))
    assert (imported.settings["LORA_RANK"], imported.settings["LORA_ALPHA"]) == (8, 8.0)
    assert not imported.settings["RANK_STABILISED"] and imported.method == "lora"


def test_patterns_of_alpha_begin_at_a_part_of_the_name(tmp_path):
    arrays = tensors()
    patterns = {"_proj": 1, "model.q_proj": 1, "^mlp.*": 1, r"layers\.(1|2)\..*q_proj": 16}
    imported = read(tmp_path, {**LORA, "alpha_pattern": patterns}, arrays)
    for layer, factor in ((0, 8 / 4), (1, 16 / 4)):
        a, b = (
            arrays[f"{PREFIX}{NAMES[QUERY].format(layer)}.lora_{x}.weight"].astype(np.float64)
            for x in "AB"
        )
        np.testing.assert_allclose(delta(imported, QUERY, layer), factor * (b @ a).T, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        *[
            ({"init_lora_weights": name}, "init_lora_weights = .*path_initial_model_for_weight")
            for name in ("pissa", "pissa_niter_16", "OLoRA", "corda", "loftq", "lora_ga", "new", 3)
        ],
        ({"some_new_method": {"a": 1}}, "some_new_method = "),
        ({"kasa_config": {"beta": 1e-4}}, "kasa_config = "),
        ({"velora_config": {"scale": 1.0}}, "velora_config = "),
        ({"bias": "all"}, "bias = 'all'"),
        ({"use_rslora": "no"}, "use_rslora = 'no': it must be true or false"),
        ({"use_dora": 1}, "use_dora = 1: it must be true or false"),
        ({"r": "4"}, "r = '4': it must be a whole number"),
        ({"r": 0}, "r = 0"),
        ({"lora_alpha": "x"}, "lora_alpha = 'x': it must be a number"),
        ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
        ({"lora_alpha": 0}, "lora_alpha = 0"),
        ({"lora_dropout": "x"}, "lora_dropout = 'x'"),
        ({"lora_dropout": 2}, "lora_dropout = 2"),
        ({"alpha_pattern": [1]}, r"alpha_pattern = \[1\]: it must be an object"),
        ({"alpha_pattern": {"q_proj": "1"}}, "alpha_pattern = .*each with a number"),
        ({"alpha_pattern": {"(": 1}}, "alpha_pattern: the pattern '\\('"),
        ({"rank_pattern": {"(a)\\1": 1}}, "rank_pattern: the pattern .* no back-references"),
        ({"rank_pattern": {"q_proj": 64}}, r"q_proj.lora_A is \[4, 8\], and \[64, 8\] .*r = 64"),
        ({"r": 8}, r"lora_A is \[4, 8\], and \[8, 8\] by adapter_config.json \(r = 8\)"),
        ({"r": 10**9}, "r = 1000000000"),
        ({"use_dora": True}, "q_proj has no lora_magnitude_vector"),
        ({"peft_type": ["LORA"]}, "peft_type"),
        ({"peft_type": "IA3"}, "lora_alpha = 8"),
        ({"peft_type": "VERA"}, "peft_type 'VERA' is not supported"),
    ],
)
def test_fields_with_another_effect_or_type_are_refused(tmp_path, fields, words):
    with pytest.raises(peft.PeftError, match=words) as error:
        read(tmp_path, {**LORA, **fields}, tensors())
    assert len(str(error.value)) < 900


@pytest.mark.parametrize("pattern", [r"((\w|[.])+)+!", "(.*)" * 70 + "!"])
def test_patterns_that_would_not_end_do_not_match(tmp_path, pattern):
    read(tmp_path, {**LORA, "alpha_pattern": {pattern: 16}}, tensors())


def changed(name, change, **kind):
    arrays = tensors(**kind)
    (arrays.pop(name) if change is None else arrays.update({name: change(arrays[name])}))
    return arrays


def broken(value):
    def change(values):
        values[1, 2] = value
        return values

    return change


LAST = f"{PREFIX}{NAMES[DOWN].format(1)}"
DORA = {**LORA, "use_dora": True}


@pytest.mark.parametrize(
    ("config", "arrays", "words"),
    [
        (LORA, changed(f"{LAST}.lora_B.weight", None), "layers.1.mlp.down_proj has no lora_B"),
        (DORA, changed(f"{Q0}.lora_magnitude_vector", None, dora=True), "q_proj has no lora_mag"),
        (DORA, changed(f"{LAST}.lora_magnitude_vector", None, dora=True), "has no lora_magnitude"),
        (LORA, tensors(dora=True), "q_proj has lora_magnitude_vector, .* describes LORA"),
        (LORA, changed(f"{Q0}.lora_A.weight", lambda x: x[None]), r"lora_A is \[1, 4, 8\]"),
        (LORA, changed(f"{Q0}.lora_A.weight", lambda x: x.reshape(-1)), r"lora_A is \[32\]"),
        (LORA, changed(f"{Q0}.lora_A.weight", lambda x: x[:, :-1]), r"lora_A is \[4, 7\]"),
        (LORA, changed(f"{Q0}.lora_B.weight", lambda x: x[:-1]), r"lora_B is \[5, 4\]"),
        (LORA, changed(f"{Q0}.lora_A.weight", lambda x: x.astype(np.int32)), "must be of floats"),
        (LORA, changed(f"{Q0}.lora_A.weight", broken(np.nan)), "lora_A.weight has 1 values of 32"),
        (LORA, changed(f"{Q0}.lora_B.weight", broken(np.inf)), "lora_B.weight has 1 values of 24"),
        (LORA, tensors() | {f"{Q0}.lora_A.default.weight": np.ones((4, 8))}, "q_proj twice"),
        (LORA, ia3(), "q_proj has no lora_A"),
        (LORA, tensors() | ia3(), "q_proj has ia3_l"),
        ({"peft_type": "IA3"}, ia3((6,)), r"ia3_l is \[6\], and \[6, 1\] or \[1, 8\]"),
        ({"peft_type": "IA3"}, ia3((5, 1)), r"ia3_l is \[5, 1\]"),
        ({"peft_type": "IA3"}, tensors(), "q_proj has no ia3_l"),
        (LORA, {f"{PREFIX}x.lora_A.weight": np.ones((4, 8))}, "no projection of the base model"),
    ],
)
def test_tensors_that_do_not_fit_are_refused(tmp_path, config, arrays, words):
    with pytest.raises(peft.PeftError, match=words):
        read(tmp_path, config, arrays)
