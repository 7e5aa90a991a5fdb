"""Configurations in mergekit's dialect are read, and what is wrong in one is named."""

import re

import pytest

from espalier.launch.merge import config_file
from espalier.launch.merge.settings import Condition, MergeError
from espalier.model.transforms.merge_methods import METHODS
from tests.benchmarks import merge as bench

# The forms of mergekit's own examples: a weighted mean, layers stacked from two models, SLERP whose share varies by layer and
# part of it, deltas with densities, filters and a base, several documents, and vocabularies.
EXAMPLES = {
    "linear": """
models:
  - model: one/seven-b
    parameters: {weight: 1.0}
  - model: two/seven-b
    parameters: {weight: 0.3}
merge_method: linear
dtype: float16
""",
    "stacked": """
slices:
  - sources: [{model: one/thirteen-b, layer_range: [0, 24]}]
  - sources:
      - model: two/thirteen-b
        layer_range: [20, 40]
merge_method: passthrough
dtype: float16
""",
    "slerp": """
slices:
  - sources:
      - {model: one/thirteen-b, layer_range: [0, 40]}
      - {model: two/thirteen-b, layer_range: [0, 40]}
merge_method: slerp
base_model: one/thirteen-b
parameters:
  t:
    - filter: self_attn
      value: [0, 0.5, 0.3, 0.7, 1]
    - filter: mlp
      value: [1, 0.5, 0.7, 0.3, 0]
    - value: 0.5  # all others
dtype: float16
""",
    "ties": """
models:
  - model: one/thirteen-b
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: two/thirteen-b
    parameters:
      density: 0.5
      weight: [0, 0.3, 0.7, 1]
  - model: three/thirteen-b
    parameters:
      density: 0.33
      weight:
        - filter: mlp
          value: 0.5
        - value: 0
merge_method: ties
base_model: base/thirteen-b
parameters: {normalize: true, int8_mask: true}
dtype: float16
""",
    "dare": """
models:
  - model: base/seven-b
  - model: one/seven-b
    parameters: {weight: 0.6, density: 5.3e-1}
merge_method: dare_ties
tokenizer_source: union
base_model: base/seven-b
parameters: {int8_mask: true}
dtype: bfloat16
""",
    "stages": """
slices:
- sources:
  - {model: first, layer_range: [0, 40]}
  - {model: second, layer_range: [0, 40]}
merge_method: slerp
base_model: first
parameters: {t: 0.5}
name: last
---
models:
- {model: a/x, parameters: {weight: 1}}
merge_method: linear
name: second
---
models:
- {model: a/y, parameters: {weight: 1}}
merge_method: linear
name: first
""",
    "tokens": """
merge_method: linear
models:
  - {model: one, parameters: {weight: 1}}
  - {model: two, parameters: {weight: 1}}
tokenizer:
  source: union
  tokens:
    <|im_start|>: {source: one}
    <|im_end|>:
      source: {kind: model_token, model: two, token_id: 2}
      force: true
  pad_to_multiple_of: 64
chat_template: chatml
""",
    "modules": """
merge_method: nearswap
base_model: one
parameters: {t: 1e-4}
modules:
  text_decoder: {models: [{model: one}, {model: two}]}
  encoder:
    slices:
      - base_model: three
        sources: [{model: three, layer_range: [0, 2]}, {model: two, layer_range: [0, 2]}]
        parameters: {t: 0.1}
""",
    **{
        f"method {method}": f"merge_method: {method}\nmodels: [{{model: a}}, {{model: b}}]\n"
        for method in METHODS
    },
}


def read(tmp_path, text):
    path = tmp_path / "merge.yml"
    path.write_text(text)
    return config_file.read(str(path))


@pytest.mark.parametrize("name", EXAMPLES)
def test_forms_of_the_dialect_are_accepted(tmp_path, name):
    assert read(tmp_path, EXAMPLES[name])


def test_values(tmp_path):
    (slerp,) = read(tmp_path, EXAMPLES["slerp"])
    assert slerp.parameters["t"][1] == Condition([1, 0.5, 0.7, 0.3, 0], "mlp")
    (ties,) = read(tmp_path, EXAMPLES["ties"])
    first, *_, last = ties.modules[""].slices[0].sources
    assert first.parameters == {"density": (Condition([1, 0.7, 0.1]),), "weight": (Condition(1.0),)}
    assert last.parameters["weight"] == (Condition(0.5, "mlp"), Condition(0))
    assert ties.models()[0] == "base/thirteen-b" and len(ties.models()) == 4
    (near,) = read(tmp_path, EXAMPLES["modules"])
    assert near.parameters["t"] == (Condition(1e-4),)  # a text in YAML 1.1
    assert [merge.name for merge in read(tmp_path, EXAMPLES["stages"])] == [
        "first",
        "second",
        "last",
    ]
    (tokens,) = read(tmp_path, EXAMPLES["tokens"])
    assert tokens.tokens.tokens["<|im_end|>"].token == 2 and tokens.tokens.pad_to_multiple_of == 64


LINEAR = "merge_method: linear\nmodels: [{model: a, parameters: {weight: 1}}]\n"
ERRORS = {
    "": "is empty",
    "- a": "must be a mapping",
    "{": "is not YAML",
    "a: !!python/object/apply:os.system [id]": "is not YAML of plain values",
    "models: [{model: a}]": "merge_method: is missing",
    "merge_method: lineer\nmodels: [{model: a}]": "no method 'lineer'; did you mean 'linear'",
    LINEAR + "wieght: 1": "wieght: is not a known key",
    LINEAR + "dtyp: float32": "dtyp: is not a known key; did you mean 'dtype'",
    LINEAR + "dtype: float8": "dtype: 'float8' is not supported",
    LINEAR + "merge_method: ties": "line 3: 'merge_method' occurs twice",
    LINEAR + "slices: []": r"exactly one of models, slices and modules, not models and slices",
    LINEAR.replace("weight", "wieght"): r"models\[0\]\.parameters\.wieght: linear has no parameter 'wieght'; did you mean 'weight'",
    LINEAR.replace("weight", "density"): "linear has no parameter 'density'",
    LINEAR.replace("weight: 1", "normalize: true"): "is one value for all models: move it",
    LINEAR.replace("weight: 1", "weight: true"): r"weight: must be a number, not True",
    LINEAR.replace("weight: 1", "weight: .inf"): "must be a finite number",
    LINEAR.replace("weight: 1", "weight: []"): "at least one entry",
    LINEAR.replace("weight: 1", "weight: [{filter: a}]"): "has no value",
    LINEAR.replace("weight: 1", "weight: [{fliter: a, value: 1}]"): "did you mean 'filter'",
    LINEAR.replace("weight: 1", "weight: [{pattern: '(', value: 1}]"): "is not a regular expression",
    LINEAR.replace("weight: 1", "weight: [{pattern: '(a)\\1', value: 1}]"): "no back-references",
    **{
        LINEAR.replace("weight: 1", f"weight: {number}"): f"line 2: {number} is a number in another notation"
        for number in ("010", "-07", "1:30", "1:30.5", "0x10", "1_000", "0b11")
    },
    LINEAR.replace("model: a", "model: a@main"): "a revision .* is not read",
    LINEAR.replace("model: a", "model: a+lora"): "LoRA .* merge the LoRA first",
    LINEAR.replace("model: a", "modle: a"): "did you mean 'model'",
    LINEAR + "name: ../x": "must be a plain name",
    LINEAR + "tokenizer: {source: union}\ntokenizer_source: base": "either tokenizer or tokenizer_source",
    LINEAR + "tokenizer: {pad_to_multiple_of: 0}": "positive whole number",
    "merge_method: ties\nmodels: [{model: a, parameters: {density: 2}}]": "density: must be at least 0 and at most 1, not 2",
    "merge_method: karcher\nparameters: {max_iter: 1.5}\nmodels: [{model: a}]": "a whole number",
    "merge_method: linear\nslices: [{sources: [{model: a}]}]": r"layer_range: must be \[first, end\]",
    "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [3, 2]}]}]": "layer_range",
    "merge_method: linear\nslices: [{sources: [{model: a, layer_range: [0, 2]}, {model: b, layer_range: [0, 3]}]}]": "equal ranges",
    LINEAR.replace("]\n", ", {model: a}]\n"): "lists a model twice",
    f"{LINEAR}---\n{LINEAR}": "2 documents without a name",
    "name: x\nmerge_method: linear\nmodels: [{model: y}]\n---\nname: y\nmerge_method: linear\nmodels: [{model: x}]": "break this circle",
    "a: &a [1, 1, 1, 1, 1, 1, 1, 1, 1, 1]\nb: &b [*a, *a, *a, *a, *a, *a, *a, *a, *a, *a]\nc: &c [*b, *b, *b, *b, *b, *b, *b, *b]\nd: &d [*c, *c, *c, *c, *c, *c]\ne: [*d, *d, *d, *d, *d, *d, *d, *d, *d, *d, *d]": "too many values",
    "a: " + "[" * 100_000: "more than 50 brackets",
    "a: " + "{b: " * 45 + "1": "is not YAML",
    "#" * 300_000: "longer than",
}  # fmt: skip


@pytest.mark.parametrize("text", ERRORS)
def test_errors_name_the_key(tmp_path, text):
    with pytest.raises(MergeError) as error:
        read(tmp_path, text)
    assert re.search(ERRORS[text], str(error.value)), error.value
    assert str(error.value).startswith(str(tmp_path / "merge.yml"))


def test_decimal_numbers_are_read(tmp_path):
    numbers = {"10": 10, "0.5": 0.5, ".5": 0.5, "-0": 0, "1.0e+3": 1000.0, "'010'": 10, "1e3": 1000}
    for text, value in numbers.items():
        (linear,) = read(tmp_path, LINEAR.replace("weight: 1", f"weight: {text}"))
        assert linear.modules[""].slices[0].sources[0].parameters["weight"] == (Condition(value),)


def test_a_pattern_that_would_not_end_matches_nothing(tmp_path):
    pattern = r"{pattern: '((\w|[.])+)+!', value: 1}, {value: 2}"
    (linear,) = read(tmp_path, LINEAR.replace("weight: 1", f"weight: [{pattern}]"))
    first, last = linear.modules[""].slices[0].sources[0].parameters["weight"]
    name = "model.layers.10.self_attn.q_proj.weight"
    assert not first.matches([name]) and last.matches([name])


def test_the_benchmark_merges_as_it_says(tmp_path):
    for method, case in bench.METHODS.items():
        (merge,) = config_file.read(bench.write_config(str(tmp_path), method))
        assert merge.method == method and len(merge.models()) == len(case["models"]) + (
            method == "ties"
        )
