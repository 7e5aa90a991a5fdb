"""Adapters of peft: every field of adapter_config.json and every tensor is read or refused by name."""

import json
import re

import numpy as np
import pytest
import safetensors.numpy

from espalier.model.hf import peft, peft_writer
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


# A mixture's experts as Mixtral's files name them, of 3 experts in 2 layers.
E, D, F = 3, 8, 6
MLP = "layers/block_0/mlp"
SIDES = {"gate": (D, F), "up": (D, F), "down": (F, D)}
EXPERT_SHAPES = {f"{MLP}/{name}/kernel": (2, E, *sides) for name, sides in SIDES.items()}
EXPERT_PIECES = [
    Piece(
        native=f"{MLP}/{name}/kernel",
        native_at=(i, e),
        hf=f"model.layers.{i}.block_sparse_moe.experts.{e}.{hf}.weight",
        transpose=True,
    )
    for name, hf in (("gate", "w1"), ("up", "w3"), ("down", "w2"))
    for i in range(2)
    for e in range(E)
]
MODULE = "model.layers.{}.mlp.experts"


def factors_of(name, rank, seed=0):
    rows, columns = SIDES[name]
    rng = np.random.default_rng(seed + rows * columns)
    shapes = {"lora_a": (2, E, rows, rank), "lora_b": (2, E, rank, columns)}
    return {leaf: rng.normal(size=shape).astype(np.float32) for leaf, shape in shapes.items()}


def pefts_delta(folder, layer, parameter):
    """The change of a stacked parameter [E, out, in] by peft's own sum, and the tensors' depth below the module."""
    config = json.loads((folder / peft.CONFIG).read_text())
    targets = [x.rpartition(".")[2] for x in config["target_parameters"]]
    there = [x for x in ("gate_up_proj", "down_proj") if x in targets]
    depth = len(there) - 1 - there.index(parameter)
    name = f"{MODULE.format(layer)}.{parameter}"
    rank, alpha = (
        next((v for k, v in config[f"{x}_pattern"].items() if re.fullmatch(k, name)), config[y])
        for x, y in (("rank", "r"), ("alpha", "lora_alpha"))
    )
    tensors = safetensors.numpy.load_file(folder / peft.WEIGHTS)
    a, b = (
        tensors[f"{PREFIX}{MODULE.format(layer)}{'.base_layer' * depth}.lora_{side}.weight"]
        for side in "AB"
    )
    a, b = a.reshape(E, -1, a.shape[-1]), b.reshape(len(b), -1, E)
    assert a.shape[1] == b.shape[1] == rank
    scale = alpha / (rank**0.5 if config["use_rslora"] else rank)
    return scale * np.einsum("ore,eri->eoi", b.astype(np.float64), a)


@pytest.mark.parametrize("stabilised", [False, True])
@pytest.mark.parametrize(
    "ranks",
    [{"gate": 2}, {"up": 2, "down": 3}, {"gate": 2, "up": 2, "down": 2}, {"gate": 3, "up": 1}],
)
def test_experts_of_gate_up_or_both_become_pefts_stacked_parameter(tmp_path, ranks, stabilised):
    """Gate and up have an A each, of which peft has one: both ranks beside each other, with zeros in B."""
    settings = {"alpha": 3.0, "rank_stabilised": stabilised, "dora": False}
    sites = {f"{MLP}/{name}": factors_of(name, rank) for name, rank in ranks.items()}
    parts = (EXPERT_PIECES, EXPERT_SHAPES, lambda *_: None)
    peft_writer.write(str(tmp_path), settings, sites, *parts, encodes=False)
    read = peft.read(str(tmp_path), *parts)
    again = tmp_path / "again"
    again.mkdir()
    back = {**settings, "alpha": read.settings["LORA_ALPHA"]}
    own = {f"{MLP}/{x}": {} for x in ("gate", "up", "down")}
    for path, values in read.arrays.items():
        own[path.partition("/adapter_")[0]][path.rpartition("/")[2]] = values
    peft_writer.write(str(again), back, {x: y for x, y in own.items() if y}, *parts, encodes=False)
    for parameter, names in (("gate_up_proj", ("gate", "up")), ("down_proj", ("down",))):
        if not {*names} & {*ranks}:
            continue
        for layer in range(2):
            expected = []
            for name in names:
                rank, (rows, columns) = ranks.get(name, 1), SIDES[name]
                factors = sites.get(f"{MLP}/{name}")
                scale = 3.0 / (rank**0.5 if stabilised else rank)
                expected.append(
                    scale * (factors["lora_a"][layer].astype(np.float64) @ factors["lora_b"][layer])
                    if factors
                    else np.zeros((E, rows, columns))
                )
            expected = np.concatenate(expected, -1).transpose(0, 2, 1)
            for folder in (tmp_path, again):
                np.testing.assert_allclose(
                    pefts_delta(folder, layer, parameter), expected, rtol=1e-5, atol=1e-5
                )


def expert_tensors(*, rank=2, exchanged=False, square=False):
    rows, columns = (D, D) if square else SIDES["down"]
    rng = np.random.default_rng(0)
    shapes = {"A": (rank * E, rows), "B": (columns, rank * E)}
    if exchanged:
        shapes = {"A": (rank * E, columns), "B": (rows, rank * E)}
    return {
        f"{PREFIX}{MODULE.format(i)}.lora_{side}.weight": rng.normal(size=shape).astype(np.float32)
        for i in range(2)
        for side, shape in shapes.items()
    }


STACKED = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_parameters": ["experts.down_proj"]}


def read_experts(folder, config, arrays, shapes=EXPERT_SHAPES):
    (folder / peft.CONFIG).write_text(json.dumps(config))
    safetensors.numpy.save_file(arrays, folder / peft.WEIGHTS)
    return peft.read(str(folder), EXPERT_PIECES, shapes, lambda *_: None)


@pytest.mark.parametrize("square", [False, True])
def test_before_0_19_1_peft_exchanged_the_sides_of_a_parameter(tmp_path, square):
    """There A reads the parameter's second dimension, [E, out, in], which is the output."""
    arrays = expert_tensors(exchanged=True, square=square)
    shapes = {**EXPERT_SHAPES, f"{MLP}/down/kernel": (2, E, D, D) if square else (2, E, F, D)}
    read = read_experts(tmp_path, {**STACKED, "peft_version": "0.18.1"}, arrays, shapes)
    a, b = (arrays[f"{PREFIX}{MODULE.format(1)}.lora_{x}.weight"] for x in "AB")
    a, b = a.reshape(E, -1, a.shape[-1]), b.reshape(len(b), -1, E)
    change = np.einsum("ore,eri->eio", b, a)  # [E, second, third dimension]
    got = [read.arrays[f"{MLP}/down/adapter_lora/lora_{x}"][1] for x in "ab"]
    np.testing.assert_allclose(got[0] @ got[1], change.transpose(0, 2, 1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "arrays", "words"),
    [
        (
            {"target_parameters": ["gate.weight"]},
            {},
            "target_parameters names 'gate.weight', .*router",
        ),
        (
            {"target_parameters": "down_proj"},
            {},
            "target_parameters = 'down_proj': .* list of names",
        ),
        ({"target_parameters": None}, {}, "experts.lora_A.* belongs to no projection"),
        ({"target_parameters": ["gate_up_proj", "down_proj"]}, {}, "gate_up_proj, has no lora_A"),
        (
            {"rank_pattern": {"experts.down_proj": 3}},
            {},
            r"lora_A \[6, 6\] and lora_B \[8, 6\], and \[9, 6\]",
        ),
        ({"use_dora": True}, {}, "use_dora = True"),
        ({"lora_dropout": 0.1}, {}, "lora_dropout = 0.1"),
        ({"peft_type": "IA3"}, {}, "lora_alpha"),
        (
            {},
            {f"{MODULE}.lora_magnitude_vector": np.ones(3, np.float32)},
            "lora_magnitude_vector, which peft",
        ),
    ],
)
def test_settings_that_peft_has_not_at_stacked_experts_are_refused(tmp_path, change, arrays, words):
    more = {PREFIX + name.format(0): value for name, value in arrays.items()}
    with pytest.raises(peft.PeftError, match=words):
        read_experts(tmp_path, {**STACKED, **change}, {**expert_tensors(), **more})


def test_square_experts_without_a_version_are_refused(tmp_path):
    shapes = {**EXPERT_SHAPES, f"{MLP}/down/kernel": (2, E, D, D)}
    with pytest.raises(peft.PeftError, match="Set peft_version in adapter_config.json"):
        read_experts(tmp_path, STACKED, expert_tensors(square=True), shapes)


def test_what_peft_has_not_beside_or_at_experts_is_refused(tmp_path):
    dense = Piece(
        native="layers/block_1/mlp/up/kernel",
        hf="model.layers.9.mlp.up_proj.weight",
        transpose=True,
    )
    shapes = {**EXPERT_SHAPES, dense.native: (D, F)}
    settings = {"alpha": 3.0, "rank_stabilised": False, "dora": False}
    own = {"lora_a": np.ones((D, 2), np.float32), "lora_b": np.ones((2, F), np.float32)}
    vector = {"output_scale": np.ones((2, E, 1, F), np.float32)}
    for sites, words in (
        ({"layers/block_1/mlp/up": own}, "takes the name of model.layers.9.mlp.up_proj for"),
        ({f"{MLP}/up": vector}, "mlp/up: its experts are one parameter .* have output_scale"),
    ):
        with pytest.raises(peft.PeftError, match=words):
            peft_writer.write(
                str(tmp_path),
                settings,
                sites,
                [*EXPERT_PIECES, dense],
                shapes,
                lambda *_: None,
                encodes=False,
            )
