"""SnapKV's measurements on an untrained model, and its page and verdicts from made-up ones."""

import dataclasses
import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from espalier.launch.papers.shared import claim
from espalier.launch.papers.snapkv import accuracy as snapkv_accuracy
from espalier.launch.papers.snapkv import (
    attention,
    claims,
    documentation,
    experiment,
    latency,
    methods,
    needles,
    report,
    results,
    sentences,
)
from espalier.launch.papers.snapkv import retrieval as task
from espalier.model.config import TransformerConfig
from espalier.model.kv_cache.full import StreamingLLM
from espalier.model.transformer import Transformer
from espalier.trainers import initialise
from espalier.trainers.decoding.settings import Settings

CONFIG = TransformerConfig(
    vocab_size=task.VOCAB_SIZE,
    num_layers=2,
    embed_dim=16,
    num_heads=4,
    num_kv_heads=2,
    mlp_dim=16,
    scan_layers=False,
)
SEEDS = (20, 21, 22)
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


def test_prompts_that_are_held_together_answer_as_they_do_apart():
    model = Transformer(config=CONFIG)
    init = jax.jit(lambda key: initialise.variables(model, key))
    chat = methods.CachedModel(model, nn.meta.unbox(init(jax.random.key(0)))["params"])
    rng = np.random.default_rng(0)
    prompts = rng.integers(1, task.VOCAB_SIZE, (2, 1, 20))
    given, counts = rng.integers(1, task.VOCAB_SIZE, (2, 5)), np.array([5, 3])
    recordings = [chat.record(prompts[i], jnp.array([20 - 3 * i])) for i in range(2)]
    settings = Settings(max_new_tokens=4)
    for method, capacity in ((methods.FULL, 0), (methods.pooled(2, 3), 8)):
        held = [chat.hold(one, method, capacity, room=5) for one in recordings]
        both = methods.Held.of(held)
        scores = chat.log_probabilities(both, given, counts)
        answers = chat.generate(both, settings)
        for i, one in enumerate(held):
            alone = chat.log_probabilities(one, given[i : i + 1], counts[i : i + 1])
            np.testing.assert_allclose(scores[i : i + 1], alone, atol=1e-5)
            assert np.array_equal(answers[i : i + 1], chat.generate(one, settings))


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


def _losses(loss, rng, answers=5):
    """Returns losses of answers of five tokens; every method's first token is the whole prompt's."""
    return [[9.0, *(loss + 0.02 * rng.standard_normal(4))] for _ in range(answers)]


def _haystack(number, scores, rng):
    digits = {"full": {"0": _digits(scores.full)}}
    losses = {"full": {"0": _losses(1 - scores.full, rng)}}
    for name, _, capacity in [*needles.cases(), ("before", None, needles.CAPACITY)]:
        share = scores.snapkv if name == "snapkv" else scores.others * rng.integers(2)
        digits.setdefault(name, {})[str(capacity)] = _digits(share)
        loss = 3 - 3 * (share if name == "snapkv" else scores.others)
        if name != "streaming_llm":
            losses.setdefault(name, {})[str(capacity)] = _losses(loss, rng)
    return {
        **{"haystack": number, "seconds": 9.0, "answers": [], "digits": digits, "losses": losses},
        "overlap": {"same": [0.9] * 3, "different": [0.6, 0.6, 0.5 + 0.01 * rng.uniform()]}
        | {"chance": 0.2},
        "hits": [[[10 + w + int(3 * rng.uniform()), 100] for w in [*range(7), 20]]] * 3,
    }


def _context(size, number, scores, rng):
    def loss(share):
        return _losses(3 - 3 * share, rng, answers=4)

    losses = {"none": loss(0.0), "full": loss(1.0)}
    for name in sentences.cases(size):
        losses[name] = loss(scores.snapkv if name == sentences.WIDE else scores.others)
    losses[sentences.PAPER] = loss(0.85 * scores.snapkv)
    overlaps = {name: [0.5 + 0.01 * rng.uniform()] * 4 for name in sentences.ANSWERED}
    facts = {"size": size.tokens, "context": number, "seconds": 60.0, "asked": [], "tokens": 4000}
    return {**facts, "losses": losses, "overlaps": overlaps, "answers": {}}


def measurements(scores=None, of_seeds=None):
    """Returns made-up measurements in the form of `experiment.run`; `of_seeds` are exceptions."""
    scores, rng = scores or Scores(), np.random.default_rng(0)
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
                {"arm": "lines_3", "seed": s, "step": 900, "seconds": 9.0}
                | {"reached": {"last_3": 1.0}}
                for s in SEEDS
            ],
            "models": {str(s): _model((of_seeds or {}).get(s, scores), rng) for s in SEEDS},
        },
        "needles": [_haystack(20 + i, scores, rng) for i in range(needles.HAYSTACKS)],
        "sentences": [
            _context(size, 20 + i, scores, rng)
            for size in sentences.SIZES
            for i in range(size.contexts)
        ],
        "latency": {
            "settings": dict(latency.SETTINGS),
            "seconds": [60.0] * latency.PROCESSES,
            "batches": {"1": cells, "2": cells},
            "prefill_seconds": {name: {"2048": 1.0} for name in ms},
            "longest": {"full": 16384, "snapkv": 131072},
        },
    }


def _judged(measured):
    return {one.name: one for one in report.REPORT.judge(json.loads(json.dumps(measured)))}


def _verdicts(measured):
    return {name: one.verdict for name, one in _judged(measured).items()}


def test_claims_hold_where_the_numbers_say_so_and_the_page_is_written(tmp_path):
    measured = measurements()
    assert set(_verdicts(measured).values()) == {claim.HOLDS}
    report.REPORT.write(measured, tmp_path, FACTS)
    text = (tmp_path / "snapkv.md").read_text()
    assert "left out: none is" in text and "Missing" not in text
    drawn = {path.name for path in (tmp_path / "snapkv").glob("*.png")}
    assert drawn >= set(report.REPORT.figures(results.read(measured)))
    record = json.loads((tmp_path / "snapkv" / "results.json").read_text())
    assert _verdicts(record["measured"]) == _verdicts(measured)


def test_claims_fail_where_snapkv_answers_no_more_than_others():
    verdicts = _verdicts(measurements(Scores(snapkv=0.2, others=0.2)))
    assert {verdicts[name] for name in ("S1", "S2", "S8", "S9")} == {claim.FAILS}
    assert {verdicts[name] for name in ("S3", "S3b", "S10")} <= {claim.FAILS, claim.UNDECIDED}
    assert verdicts["S4"] == verdicts["S7"] == claim.HOLDS


def test_the_first_token_of_an_answer_does_not_count():
    measured = measurements()
    (haystack, *_) = measured["needles"]
    haystack["losses"]["snapkv"][str(needles.CAPACITY)] = [[50.0, 0.1, 0.3]] * 5
    found = results.read(measured)["needles"]
    assert found.scores(results.LOSS, "snapkv")[20] == pytest.approx(0.2)
    assert found.scores(results.EXACT, "full")[20] == 1.0


def test_what_a_context_is_worth_is_shared_out_between_no_context_and_the_whole_one():
    losses = {"none": [[9.0, 4.0]], "full": [[9.0, 2.0]], sentences.PAPER: [[9.0, 2.5]]}
    row = {"size": sentences.MAIN.tokens, "context": 20, "losses": losses, "overlaps": {}}
    found = results.Sentences([row])
    assert found.kept(sentences.PAPER) == {20: 0.75}
    assert found.kept("none") == {20: 0.0} and found.kept("full") == {20: 1.0}
    assert found.unmet == ""
    losses["none"] = [[9.0, 2.1]]
    assert found.unmet == "a context is worth 0.10 nats per token"


def test_a_model_that_did_not_learn_is_left_out_and_named():
    dead = Scores(full=0.4, snapkv=0.4, others=0.4)
    judged = _judged(measurements(of_seeds={21: dead}))
    effects = [judged["S6"].primary]
    effects += [one for each in judged.values() for one in each.others if "retrieval" in one.where]
    assert len(effects) > 5 and all(set(one.by_seed) == {20, 22} for one in effects)
    assert all("left out: seed 21 answers 0.4" in one.note for one in effects)
    assert judged["S6"].verdict == claim.NOT_MEASURED  # two models are too few
    assert judged["S1"].verdict == claim.HOLDS
    # One that does not answer questions before the context is left out of S6 alone.
    by_name = _judged(measurements(of_seeds={21: Scores(first=0.5)}))
    assert 21 not in by_name["S6"].primary.by_seed
    of_models = [one for one in by_name["S1"].others if "retrieval" in one.where]
    assert all(21 in one.by_seed for one in of_models)


def test_a_chat_model_without_answers_judges_nothing():
    measured = {"needles": measurements(Scores(full=0.2, snapkv=0.2))["needles"]}
    judged = _judged(measured)
    assert {one.verdict for one in judged.values()} == {claim.NOT_MEASURED}
    assert judged["S1"].why == "the full cache answers 0.20"


def test_no_claim_holds_on_shuffled_measurements():
    measured, rng = json.loads(json.dumps(measurements())), np.random.default_rng(0)
    held = sum(
        one.verdict == claim.HOLDS
        for _ in range(20)
        for one in report.REPORT.judge(report.REPORT.shuffle(measured, rng), secondary=False)
    )
    assert held <= 0.1 * 20 * len(claims.CLAIMS)


def test_claims_without_measurements_are_reported_as_such(tmp_path):
    judged = report.REPORT.judge({})
    assert {one.verdict for one in judged} == {claim.NOT_MEASURED}
    required = {one.name for one in judged if one.required}
    assert required == {f"S{i}" for i in range(1, 9)}
    report.REPORT.write({}, tmp_path, FACTS)
    assert "**not measured**" in (tmp_path / "snapkv.md").read_text()


def test_documentation_is_asked_for_once_in_order_and_fits():
    listed = [
        documentation.Entry(f"module.name_{i}", " ".join([f"word{i}"] * (20 if i % 4 else 5)))
        for i in range(200)
    ]
    count = lambda text: len(text.split())  # noqa: E731
    made = documentation.context(np.random.default_rng(0), listed, count, 600)
    lines = made.text.split("\n")
    assert count(made.text) <= 600 and len(set(lines)) == len(lines) > 20
    places = [lines.index(entry.line) for entry in made.asked]
    assert places == sorted(places) and len(places) == len(documentation.DEPTHS)
    assert all(entry.asked and documentation.WORDS[0] <= 20 for entry in made.asked)
    again = documentation.context(np.random.default_rng(0), listed, count, 600)
    assert again == made != documentation.context(np.random.default_rng(1), listed, count, 600)


def test_entries_are_first_paragraphs_of_public_names():
    by_name = {entry.name: entry.text for entry in documentation.entries()}
    assert by_name["json.load"].startswith("Deserialize ``fp``")
    assert "\n" not in "".join(by_name.values())
    assert not any(part.startswith("_") for name in by_name for part in name.split("."))
    assert len(set(by_name.values())) == len(by_name)


def test_processes_count_with_their_medians():
    def cell(*ms):
        return {"ms": list(ms), "cache_bytes": 1}

    lengths = latency.SETTINGS["lengths"]
    one, other = (
        {b: {"full": {str(n): cell(x, x + 2) for n in lengths}} for b in ("1", "2")} for x in (1, 5)
    )
    merged = latency.merged([one, other])
    assert merged["2"]["full"]["4096"] == {"ms": [2.0, 6.0], "cache_bytes": 1}
