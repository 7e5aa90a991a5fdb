"""SnapKV's measurements on an untrained model, and its page and verdicts from made-up ones."""

import dataclasses
import json

import flax.linen as nn
import jax
import numpy as np
import pytest

from espalier.launch.papers.shared import claim
from espalier.launch.papers.snapkv import accuracy as snapkv_accuracy
from espalier.launch.papers.snapkv import attention, experiment, latency, needles, report, results
from espalier.launch.papers.snapkv import retrieval as task
from espalier.model.config import TransformerConfig
from espalier.model.kv_cache.full import StreamingLLM
from espalier.model.transformer import Transformer
from espalier.trainers import initialise

CONFIG = TransformerConfig(
    vocab_size=task.VOCAB_SIZE,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=16,
    scan_layers=False,
)
SEEDS = (10, 11, 12, 13, 14)
FACTS = {"command": "a command", "versions": {"jax": "1"}}


def test_everything_is_measured_for_an_untrained_model():
    model = Transformer(config=CONFIG)
    init = jax.jit(lambda key: initialise.variables(model, key))
    params = nn.meta.unbox(init(jax.random.key(0)))["params"]
    retriever = snapkv_accuracy.Retriever(model, params)
    sizes = {"prompts": 8, "lines": 9}
    names = ("snapkv", "kernel_1", "oracle", "h2o")
    accuracy = snapkv_accuracy.accuracy(retriever, **sizes, capacities=(24,), names=names)
    kept = attention.kept_hits(retriever, **sizes, question="first", capacity=24)
    run = {
        "agnostic": snapkv_accuracy.question_agnostic(retriever, **sizes, capacity=24),
        "positions": snapkv_accuracy.question_positions(retriever, **sizes, capacity=24),
        "hits": attention.hit_rates(retriever, **sizes, windows=3),
        "overlaps": attention.overlaps(retriever, **sizes, capacity=24),
    }
    assert accuracy["length"] == 7 + 5 * 9
    cells = [cell for by in accuracy["right"].values() for cell in by.values()]
    # The first token follows from the whole prompt, whatever is kept.
    assert len({cell["tokens"][0] for cell in cells}) == 1
    assert all(len(cell["depths"]) == snapkv_accuracy.FIFTHS for cell in cells)
    assert np.shape(run["hits"]["hits"]) == (2, 3, 2)
    # The tokens' counts are the last window's, one by one.
    assert np.array_equal(
        np.sum(run["hits"]["tokens"], axis=1), np.array(run["hits"]["hits"])[:, -1]
    )
    hit, attended = np.moveaxis(np.asarray(kept), -1, 0)
    assert (hit <= attended).all() and attended.any()
    assert all(0 <= share <= 1 for key in ("same", "different") for share in run["overlaps"][key])
    json.dumps(run)


def test_streaming_llm_gets_slots_for_what_is_generated():
    policy = snapkv_accuracy.METHODS["streaming_llm"].at(48)
    assert isinstance(policy, StreamingLLM) and policy.capacity == 48 + task.ANSWER_TOKENS
    assert snapkv_accuracy.METHODS["snapkv"].at(48).capacity == 48
    assert "pyramidkv" not in snapkv_accuracy.METHODS


@pytest.mark.parametrize(
    ("answer", "right"),
    [
        (" 48213.", [1, 1, 1, 1, 1]),
        (" 48273", [1, 1, 1, 0, 1]),
        (" 482", [1, 1, 1, 0, 0]),
        (" 482135", [1, 1, 1, 1, 0]),  # another number
        (" none", [0, 0, 0, 0, 0]),
    ],
)
def test_digits_are_right_in_their_place(answer, right):
    assert needles.right_digits(answer, "48213") == right


def test_a_haystack_holds_every_needle_once_in_order_and_fits():
    lines = [f"This is verse {i}; and it goes on for a while." for i in range(400)]
    hay = needles.haystack(np.random.default_rng(0), lines, lambda text: len(text.split()), 300)
    assert len(hay.text.split()) <= 300
    places = [
        hay.text.index(f"of {name} is {number}.")
        for name, number in zip(hay.names, hay.numbers, strict=True)
    ]
    assert places == sorted(places)
    assert all(hay.text.count(name) == 1 for name in hay.names)
    words = [word for name in hay.names for word in name.split()]
    assert len(set(words)) == len(words)  # no two needles share a word


def _digits(share):
    """Returns digits of five needles, of which a share is right."""
    return [[int(i < round(5 * share))] * 5 for i in range(5)]


def _candidate(best):
    cells = {name: {"192": _digits(0.2)} for name, _, _ in needles.candidates()}
    return {"digits": {**cells, best: {"192": _digits(0.8)}}}


def test_window_and_kernel_are_the_best_that_suffice():
    assert needles.chosen([_candidate("snapkv 16 11")]) == {
        "window": 16,
        "kernel": 11,
        "h2o_window": 8,
    }
    # A kernel that cannot keep five digits is not chosen; of equals, the smaller is.
    assert needles.chosen([_candidate("snapkv 8 7")]) == {"window": 8, "kernel": 9, "h2o_window": 8}


@dataclasses.dataclass(kw_only=True)
class Scores:
    """Shares of exact answers of which measurements are made up."""

    full: float = 1.0
    snapkv: float = 1.0
    others: float = 0.2
    first: float = 1.0  # with the question first
    noise: float = 0.01


def _model(scores, rng):
    def cell(share):
        share = float(np.clip(share + scores.noise * rng.standard_normal(), 0, 1))
        return {"exact": share, "tokens": [share] * 4, "depths": [share] * 5}

    right = {
        name: {str(c): cell(scores.others) for c in experiment.CAPACITIES}
        for name in snapkv_accuracy.METHODS
    }
    right["snapkv"] = {str(c): cell(scores.snapkv) for c in experiment.CAPACITIES}
    right["full"] = {"247": cell(scores.full)}
    shorter = {name: right[name] for name in ("full", "snapkv", "h2o", "streaming_llm")}
    hits = [[[10 + w + int(3 * rng.uniform()), 100] for w in [*range(15), 40]]] * 2
    return {
        "accuracy": {"length": 247, "right": right},
        **{f"accuracy_{n}": {"length": 7 + 5 * n, "right": shorter} for n in experiment.SHORTER},
        "agnostic": {"full": 1.0, "before": scores.others / 2, "after": scores.snapkv},
        "positions": {
            "last": {"full": scores.full, "snapkv": scores.snapkv},
            "first": {"full": scores.first, "snapkv": scores.snapkv},
        },
        "hits": {"hits": hits, "tokens": [[[5, 10]] * 3] * 2, "prefix": 119, "chosen": 12},
        "overlaps": {
            "same": [0.9, 0.9],
            "different": [0.5, 0.6 + 0.01 * rng.uniform()],
            "chance": 0.2,
        },
        "kept_last": [[60, 100], [61, 100]],
        "kept_first": [[58, 100], [int(59 + 3 * rng.uniform()), 100]],
    }


def _haystack(grid, number, scores, sizes, rng):
    digits = {"full": {"0": _digits(scores.full)}}
    for name, _, capacity in needles.cases(grid, **sizes):
        share = scores.snapkv if name == "snapkv" else scores.others * rng.integers(2)
        digits.setdefault(name, {})[str(capacity)] = _digits(share)
    facts = {"tokens": grid.tokens, "haystack": number, "answers": [], "digits": digits}
    if grid.names:  # it does not judge
        return facts
    digits["before"] = {str(grid.fifth): _digits(0.0)}
    return {
        **facts,
        "overlap": {"same": [0.9] * 3, "different": [0.6, 0.6, 0.5], "chance": 0.2},
        "hits": [[[10 + w, 100] for w in range(8)]] * 3,
    }


def measurements(scores=None, of_seeds=None):
    """Returns made-up measurements in the form of `experiment.run`; `of_seeds` are exceptions."""
    scores, rng = scores or Scores(), np.random.default_rng(0)
    sizes = {"window": 8, "kernel": 9, "h2o_window": 8}
    ms = {"full": 1.0, "snapkv": 0.01}
    cells = {
        name: {
            str(n): {
                "ms": [1 + slope * n / 1024 * (1 + 0.01 * i) for i in range(5)],
                **{"compress_ms": 3.0, "cache_bytes": 2**20, "peak_bytes": 2**21},
            }
            for n in latency.SETTINGS["lengths"]
        }
        for name, slope in ms.items()
    }
    return {
        "retrieval": {
            "phases": [
                {
                    "arm": "lines_3",
                    "seed": s,
                    "step": 900,
                    "seconds": 9.0,
                    "reached": {"last_3": 1.0},
                }
                for s in SEEDS
            ],
            "models": {str(s): _model((of_seeds or {}).get(s, scores), rng) for s in SEEDS},
        },
        "needles": {
            "candidates": [_candidate("snapkv 8 9")],
            "chosen": sizes,
            "haystacks": [
                _haystack(grid, i, scores, sizes, rng)
                for grid in needles.GRIDS
                for i in range(grid.haystacks)
            ],
        },
        "latency": {
            "settings": dict(latency.SETTINGS),
            "batches": {"1": cells, "2": cells},
            "prefill_seconds": {name: {"1024": 1.0} for name in ms},
            "longest": {"full": 16384, "snapkv": 131072},
        },
    }


def _verdicts(measured):
    judged = report.REPORT.judge(json.loads(json.dumps(measured)))
    return {one.name: one.verdict for one in judged}


def test_claims_hold_where_the_numbers_say_so_and_the_page_is_written(tmp_path):
    measured = measurements()
    assert set(_verdicts(measured).values()) == {claim.HOLDS}
    report.REPORT.write(measured, tmp_path, FACTS)
    text = (tmp_path / "snapkv.md").read_text()
    assert "SnapKV is not behind TOVA" in text and "left out: none is" in text
    drawn = {path.name for path in (tmp_path / "snapkv").glob("*.png")}
    assert drawn >= set(report.REPORT.figures(results.read(measured)))
    record = json.loads((tmp_path / "snapkv" / "results.json").read_text())
    assert _verdicts(record["measured"]) == _verdicts(measured)


def test_claims_fail_where_snapkv_answers_no_more_than_others():
    verdicts = _verdicts(measurements(Scores(snapkv=0.2, others=0.2)))
    failing = ("S1", "S2", "S3")
    assert {verdicts[name] for name in failing} == {claim.FAILS}
    assert verdicts["S4"] == verdicts["S7"] == claim.HOLDS


def test_a_model_that_did_not_learn_is_left_out_and_named():
    dead = Scores(full=0.4, snapkv=0.4, others=0.4)
    judged = report.REPORT.judge(json.loads(json.dumps(measurements(of_seeds={12: dead}))))
    effects = [one for each in judged for one in each.by_part.get("retrieval", ())]
    assert effects and all(set(one.by_seed) == set(SEEDS) - {12} for one in effects)
    assert all("left out: seed 12 answers 0.4" in one.note for one in effects)
    assert {one.verdict for one in judged} == {claim.HOLDS}
    # One that does not answer questions before the context is left out of S6 alone.
    half = measurements(of_seeds={12: Scores(first=0.5)})
    by_name = {one.name: one for one in report.REPORT.judge(json.loads(json.dumps(half)))}
    assert 12 not in by_name["S6"].effects[0].by_seed and 12 in by_name["S1"].effects[0].by_seed
    # Three models are enough; two are not.
    few = measurements(of_seeds={seed: dead for seed in SEEDS[:3]})
    judged = report.REPORT.judge(json.loads(json.dumps({"retrieval": few["retrieval"]})))
    verdicts = {one.name: one.verdict for one in judged}
    assert set(verdicts.values()) == {claim.NOT_MEASURED}


def test_a_chat_model_without_answers_judges_nothing():
    measured = {"needles": measurements(Scores(full=0.2, snapkv=0.2))["needles"]}
    assert set(_verdicts(measured).values()) == {claim.NOT_MEASURED}


def test_no_claim_holds_on_shuffled_measurements():
    measured, rng = measurements(), np.random.default_rng(0)
    held = sum(
        verdict == claim.HOLDS
        for _ in range(20)
        for verdict in _verdicts(report.REPORT.shuffle(measured, rng)).values()
    )
    assert held <= 0.1 * 20 * len(report.CLAIMS)


def test_claims_without_measurements_are_reported_as_such(tmp_path):
    judged = report.REPORT.judge({})
    assert {one.verdict for one in judged} == {claim.NOT_MEASURED}
    required = {one.name for one in judged if one.required}
    assert required == {f"S{i}" for i in range(1, 9)}
    report.REPORT.write({}, tmp_path, FACTS)
    assert "**not measured**" in (tmp_path / "snapkv.md").read_text()
