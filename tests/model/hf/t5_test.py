"""T5 and mT5 compute what transformers computes, packed and padded; goldens/make_t5_parity.py made the numbers."""

import dataclasses

import jax
import numpy as np
import pytest

from espalier.launch.config import gin_config
from espalier.model.hf import registry
from espalier.model.hf.config_fields import UnsupportedConfig
from espalier.model.hf.description import describe
from espalier.model.hf.family import UnsupportedModel
from espalier.model.t5.relative_bias import bucket_table
from espalier.trainers.decoding.decoder import Decoder
from espalier.trainers.decoding.settings import Beams, Sampling, Settings
from espalier.trainers.scoring.scoring import Row, Scorer
from tests.model.hf.cases import ENCODER_DECODERS, GOLDENS
from tests.model.hf.parity_test import TOLERANCE, load

CASES = [
    path
    for path in sorted((GOLDENS / "parity").glob("*.npz"))
    if path.stem.rpartition("_")[0] in ENCODER_DECODERS
]
V1_1 = {
    **{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"], "vocab_size": 32128},
    **{"d_model": 768, "d_kv": 64, "d_ff": 2048, "num_layers": 12, "num_decoder_layers": 12},
    **{"num_heads": 12, "relative_attention_num_buckets": 32, "layer_norm_epsilon": 1e-6},
    **{"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False, "dropout_rate": 0.1},
}
V1_0 = {**V1_1, "d_ff": 3072, "feed_forward_proj": "relu"}
del V1_0["tie_word_embeddings"]  # true unless it is there
MT5 = {**V1_1, "model_type": "mt5", "architectures": ["MT5ForConditionalGeneration"]}
MT5 |= {"vocab_size": 250112}
PUBLISHED = {"t5_1_1_base": V1_1, "t5_1_0_base": V1_0, "mt5_base": MT5}


def rows_of(case, stack):
    """(tokens, segments, positions) of one row with all examples, and of one row for each of them, padded."""
    documents = [case[f"{stack}/{i}"] for i in range(4)]
    width = sum(map(len, documents))
    rows = [documents, *([document] for document in documents)]
    tokens = np.zeros((len(rows), width), np.int32)
    segments, positions = np.zeros_like(tokens), np.zeros_like(tokens)
    for r, row in enumerate(rows):
        start = 0
        for number, document in enumerate(row, 1):
            at = slice(start, start + len(document))
            tokens[r, at], segments[r, at] = document, number
            positions[r, at] = np.arange(len(document))
            start += len(document)
    return tokens, segments, positions


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_log_probabilities_are_those_of_transformers(path):
    case, _, model, params = load(path)
    inputs, targets = rows_of(case, "inputs"), rows_of(case, "targets")
    logits = jax.jit(model.apply)(
        {"params": params},
        targets[0],
        segments_BT=targets[1],
        positions_BT=targets[2],
        encoder_tokens_BS=inputs[0],
        encoder_segments_BS=inputs[1],
        encoder_positions_BS=inputs[2],
    )
    logprobs_BTV = np.asarray(jax.nn.log_softmax(logits, axis=-1))
    for i in range(4):
        want = case[f"logprobs/{i}"]
        for row, segment in ((0, i + 1), (i + 1, 1)):
            got = logprobs_BTV[row, targets[1][row] == segment]
            np.testing.assert_allclose(got, want, rtol=0, atol=TOLERANCE)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_greedy_continuations_and_scores_are_those_of_transformers(path):
    """Inputs of unequal lengths in one batch, with cached keys and values of the encoder's output."""
    case, _, model, params = load(path)
    inputs = [case[f"inputs/{i}"].tolist() for i in range(4)]
    greedy = [case[f"greedy/{i}"].tolist() for i in range(4)]
    settings = Settings(
        max_new_tokens=12, num_ids=61, eos_ids=(1,), sampling=Sampling(temperature=0)
    )
    continued = Decoder(model, params, settings, batch_size=4)(inputs)
    assert [row.tokens for row in continued] == greedy
    rows = [
        Row(context=[0], targets=targets, encoder_inputs=tokens)
        for tokens, targets in zip(inputs, greedy, strict=True)
    ]
    scored = Scorer(model, params, batch_size=4)(rows)
    for row, log_probs in zip(continued, scored, strict=True):
        np.testing.assert_allclose(row.log_probs, log_probs, rtol=0, atol=TOLERANCE)
    if path.stem == "mt5_0":  # every beam is scored as the sequence that it is
        beams = dataclasses.replace(settings, beams=Beams(num_beams=3))
        for row in Decoder(model, params, beams, batch_size=4)(inputs):
            best = sum(row.log_probs) / len(row.tokens)
            assert best == pytest.approx(row.score, abs=1e-4)


@pytest.mark.parametrize("path", CASES, ids=lambda path: path.stem)
def test_buckets_are_those_of_transformers(path):
    case, _, model, _ = load(path)
    settings = model.relative_bias(num_heads=1, bidirectional=True)
    for stack in ("encoder", "decoder"):
        buckets = bucket_table(
            bidirectional=stack == "encoder",
            num_buckets=settings.num_buckets,
            max_distance=settings.max_distance,
        )
        reach = settings.max_distance
        at = np.clip(np.arange(-200, 201), -reach, reach) + reach
        np.testing.assert_array_equal(np.asarray(buckets)[at], case[f"buckets/{stack}"])


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_the_models_of_the_gin_files(name):
    config = gin_config.load(
        [f"t5x_configs/models/{name}.gin", "t5x_configs/runs/pretrain.gin"],
        [
            *("MODEL_DIR='/tmp/x'", "MIXTURE_OR_TASK_NAME='x'", "TASKS=()"),
            "TASK_FEATURE_LENGTHS={'inputs': 8, 'targets': 8}",
        ],
        entry="espalier.launch.train:train",
    )
    assert [str(warning) for warning in config.warnings] == []
    here = describe(config.arguments()["recipe"].model)
    family = registry.family_of_config(PUBLISHED[name])
    there = describe(family.model(PUBLISHED[name]))
    assert {k: (v, there.get(k)) for k, v in here.items() if v != there.get(k)} == {}
    assert set(here) == set(there)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"feed_forward_proj": "gated-tanh"}, "feed_forward_proj = 'gated-tanh': supported are"),
        ({"num_layers": 0}, "num_layers = 0: it must be a whole number above 0"),
        ({"dense_act_fn": "relu"}, "dense_act_fn = 'relu': only 'gelu_new' is supported"),
        ({"is_gated_act": False}, "is_gated_act = False: only True is supported"),
    ],
)
def test_other_settings_are_refused(changes, words):
    config = {**V1_1, **changes, "architectures": None}
    with pytest.raises(UnsupportedConfig, match=words):
        registry.family_of_config(config).model(config)


def test_an_mt5_has_a_head_of_its_own_whatever_is_written():
    model = registry.family_named("mt5").model({**MT5, "tie_word_embeddings": True})
    assert (
        describe(model) == describe(registry.family_named("mt5").model(MT5))
        and not model.tie_embeddings
    )
    with pytest.raises(UnsupportedModel, match="tie_embeddings is True, not False"):
        registry.family_named("mt5").config(model.clone(tie_embeddings=True))


def test_a_scale_of_logits_that_no_t5_has_is_named():
    model = registry.family_named("t5").model(V1_1).clone(logit_scale=0.5)
    with pytest.raises(UnsupportedModel, match="logit_scale is 0.5, not "):
        registry.family_named("t5").config(model)
