"""Every family computes what transformers computes, whatever the rows look like.

The numbers are transformers' own, see goldens/make_parity.py, which also makes other cases: with
PARITY_CASES=DIR the cases of that directory are compared instead of the goldens.
"""

import json
import os
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.model.hf import registry
from espalier.model.transforms import layer_stack
from tests.model.hf import arrays
from tests.model.hf.cases import ENCODER_DECODERS

GOLDENS = pathlib.Path(__file__).parent / "goldens" / "parity"
ALL_CASES = sorted(pathlib.Path(os.environ.get("PARITY_CASES") or GOLDENS).glob("*.npz"))
CASES = [path for path in ALL_CASES if path.stem.rpartition("_")[0] not in ENCODER_DECODERS]
# float32 of two libraries; toy models agree to about a tenth of it.
TOLERANCE = 1e-4


def load(path):
    with np.load(path) as file:
        case = dict(file)
    config = json.loads(str(case["config"]))
    tensors = {
        name.partition("/")[2]: value.astype(np.float32)
        for name, value in case.items()
        if name.startswith("tensor/")
    }
    family = registry.family_of_config(config)
    model = family.model(config)
    return case, family, model, arrays.to_native(family, model, tensors)


def rows_of(case):
    """(tokens, segments, positions, documents) of rows of one length; documents: (start, log-probs).

    Every document by itself padded right, then left; all of them packed; the last one far away.
    """
    count = sum(name.startswith("tokens/") for name in case)
    documents = [(case[f"tokens/{i}"], case[f"logprobs/{i}"]) for i in range(count)]
    width = sum(len(tokens) for tokens, _ in documents)
    far = (case["tokens/3"] if count > 3 else documents[-1][0], case["shifted"])
    placed = [[(0, *document)] for document in documents]
    placed += [[(width - len(document[0]), *document)] for document in documents]
    starts = np.cumsum([0, *(len(tokens) for tokens, _ in documents)])
    placed.append([(start, *document) for start, document in zip(starts, documents, strict=False)])
    placed.append([(2, *far)])
    tokens = np.zeros((len(placed), width), np.int32)
    segments, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    for row, parts in enumerate(placed):
        offset = int(case["offset"]) if row == len(placed) - 1 else 0
        for segment, (start, ids, _) in enumerate(parts, start=1):
            at = slice(start, start + len(ids))
            tokens[row, at], segments[row, at] = ids, segment
            positions[row, at] = np.arange(len(ids)) + offset
    expected = [[(start, logprobs) for start, _, logprobs in parts] for parts in placed]
    return tokens, segments, positions, expected


def worst(model, params, case):
    """The largest difference of log-probabilities by kind of row."""
    tokens, segments, positions, expected = rows_of(case)
    logits = jax.jit(model.apply)(
        {"params": params}, tokens, positions_BT=positions, segments_BT=segments
    )
    found = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    assert found.dtype == np.float32
    errors = [
        max(np.abs(found[row, s : s + len(lp)] - lp).max() for s, lp in parts)
        for row, parts in enumerate(expected)
    ]
    alone = (len(errors) - 2) // 2
    return {
        "right padding": max(errors[:alone]),
        "left padding": max(errors[alone:-2]),
        "packed": errors[-2],
        "far": errors[-1],
    }


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_log_probabilities_are_those_of_transformers(path):
    case, _, model, params = load(path)
    errors = worst(model, params, case)
    assert max(errors.values()) < TOLERANCE, errors


def test_there_are_cases_of_every_family():
    named = {path.stem.rpartition("_")[0] for path in ALL_CASES}
    assert named == {family.name for family in registry.FAMILIES}


@pytest.mark.parametrize("name", sorted({f.name for f in registry.FAMILIES} - ENCODER_DECODERS))
def test_unrolled_layers_import_the_same_function(name):
    path = next(path for path in CASES if path.stem.rpartition("_")[0] == name)
    case, family, model, params = load(path)
    flat = layer_stack.unrolled(model)
    tensors = {
        key.partition("/")[2]: v.astype(np.float32) for key, v in case.items() if "tensor/" in key
    }
    flat_params = arrays.to_native(family, flat, tensors)
    expected = layer_stack.unroll(params, model.config)
    jax.tree.map(np.testing.assert_array_equal, flat_params, expected)
    if name not in ("gemma3_text", "mixtral"):  # layers of two kinds, and mixtures, stand for all
        return
    tokens = jnp.asarray(case["tokens/2"])[None]
    logits = jax.jit(flat.apply)({"params": flat_params}, tokens)
    log_probs_TV = jax.nn.log_softmax(logits[0], axis=-1)
    np.testing.assert_allclose(log_probs_TV, case["logprobs/2"], rtol=0, atol=TOLERANCE)
