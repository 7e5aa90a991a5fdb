"""The reproduction of influence: statistics by hand, verdicts, figures and report on hand-made results."""

import copy
import json

import numpy as np
import pytest

from espalier.launch.influence import analyses, labels
from espalier.launch.papers.influence import (
    corpus,
    exact,
    experiment,
    figures,
    losses,
    scoring,
    small_corpus,
    statistics,
)
from espalier.launch.papers.influence import report as influence_report
from espalier.launch.papers.influence.experiment import (
    HALVES,
    REMOVALS,
    SCORED,
    WIDE_SCORED,
    WORDS,
)
from espalier.launch.papers.influence.small_corpus import (
    ADD_ONE,
    FACT,
    GROUPS,
    GULP,
    PLUG,
    REVERSE,
    Document,
    Query,
)
from espalier.launch.papers.shared import claim, results
from espalier.launch.sweep import file

FACTS = {"command": "a command", "versions": {"jax": "1"}, "criteria": None}
LDS = {
    **{"ekfac_cg": 0.6, "ekfac": 0.45, "kfac": 0.4, "identity": 0.2, "cosine": 0.25},
    **{"trak": 0.3, "embedding": 0.1, "bm25": 0.15, "bm25_characters": 0.14, "tfidf": 0.12},
    "random": 0.0,
}
REMOVAL = {
    **{"ekfac": 0.3, "ekfac_cg": 0.35},
    **{"random_0": 0.01, "random_1": -0.01},
}
EXACT = {
    "pbrf": (0.96, 0.99, 0.989, 0.9, 0.89, 0.7),
    "loo": (0.99, 0.97, 0.968, 0.88, 0.87, 0.7),
    "lds": (0.92, 0.91, 0.9, 0.85, 0.84, 0.7),
    "with_gauss_newton": (0.97, 1.0, 0.999, 0.92, 0.9, 0.7),
}


def method_record(method):
    """Own documents and code on top, as EK-FAC has them."""
    best = method.startswith("ekfac")
    sources = {name: dict.fromkeys(statistics.SOURCES, 0.5) for name in ("top", "bottom")}
    area = 0.8 if best else 0.5
    curve = [0.1] * len(statistics.COUNTS)
    code = {"share": 2.5 if best else 0.9, "curve": curve}
    return {
        "correlations": {
            kind: {"one": 0.3, "two": 0.0, "fac": 0.01}[kind[:3]] for kind in statistics.PAIRS
        },
        "separation": {kind: dict.fromkeys(WORDS, area) for kind in statistics.KINDS},
        "answers": {
            group: {"top": 0.9 if group == FACT else 0.05, "corpus": 1.0, "curve": curve}
            for group in GROUPS
        },
        "sources": {group: {name: sources for name in ("first", "share")} for group in GROUPS},
        "code": {group: {end: dict(code) for end in statistics.ENDS} for group in GROUPS},
    }


def scores_record():
    masses = {
        method: {
            group: {
                "mass": 7.0 if group == FACT else 5.5,
                "slope": -0.4,
                "curve": [1.0] * len(statistics.COUNTS),
            }
            for group in GROUPS
        }
        for method in scoring.GRADIENTS
    }
    queries = (FACT, *WORDS)
    return {
        **{"parameters": 1e5, "nats": dict.fromkeys(queries, 0.4)},
        **{"answered": dict.fromkeys(queries, 0.9), "masses": masses},
        "methods": {method: method_record(method) for method in scoring.METHODS},
    }


RECORDS = {
    SCORED: scores_record(),
    WIDE_SCORED: {**scores_record(), "parameters": 4e5},
    HALVES: {"lds": {m: dict.fromkeys(("all", *GROUPS), value) for m, value in LDS.items()}},
    REMOVALS: {"removal": dict.fromkeys(scoring.REMOVED_FOR, REMOVAL)},
}


def noisy(value, rng):
    """The same numbers with a little noise."""
    if isinstance(value, dict):
        return {name: noisy(one, rng) for name, one in value.items()}
    if isinstance(value, list):
        return [noisy(one, rng) for one in value]
    return value + 1e-3 * float(rng.normal()) if isinstance(value, float) else value


def measured(change=None, seeds=5):
    """What `experiment.run` returns; `change` alters the records of each seed."""
    rng, out = np.random.default_rng(0), {"exact": [], "corpus": []}
    for seed in range(20, 20 + seeds):
        tables = {
            kind: dict(zip(exact.METHODS, values, strict=True)) for kind, values in EXACT.items()
        }
        row = {"seed": seed, "arm": "exact", "seconds": 9.0, "loss": 1.0, **tables}
        records = copy.deepcopy({**RECORDS, "exact": row})
        if change:
            change(records)
        out["exact"].append(noisy(records.pop("exact"), rng))
        for arm in ("model", "half_00", "without_fact_bm25"):
            out["corpus"].append({"arm": arm, "seed": seed, "seconds": 60.0, "record": None})
        for arm, record in records.items():
            noise = noisy(record, rng)
            out["corpus"].append({"arm": arm, "seed": seed, "seconds": 60.0, "record": noise})
    return {**out, "smollm": experiment.of_report(real_model_rows())}


def real_model_rows():
    """Rows of the demonstration's sweep, whose report has two queries and ten documents."""
    scores = np.random.default_rng(1).normal(size=(10, 2))
    found = analyses.analyse(
        analyses.Inputs(
            scores_NQ=scores,
            queries=[labels.Query(prompt="p", completion="c")] * 2,
            **{"nats": [1.0, 2.0], "sources": ["code", "text"] * 5, "matching": {}},
            **{"layers": None, "tokens": [], "method": "ekfac", "others": {"bm25": -scores}},
            within=2,
        )
    )
    hostile = "a | b\n<script>`x`"
    query = {"prompt": "p", "completion": hostile, "nats": 1.0}
    query["top"] = [{"source": "code", "text": hostile, "score": 1.0}]
    report = {"documents": 10, "rank_by": "per_norm", "compression": None, "analyses": found}
    report["queries"] = [query] * 2
    arms_ = {"factors": None, "ekfac": None, "report": report}
    return [{"arm": arm, "seconds": 60.0, "report": one} for arm, one in arms_.items()]


def verdicts(change=None):
    return {one.name: one.verdict for one in influence_report.REPORT.judge(measured(change))}


def test_all_claims_hold_where_they_should():
    assert verdicts() == {one.name: "holds" for one in influence_report.CLAIMS}


def setter(*path, value):
    def change(records):
        *parents, last = path
        for name in parents:
            records = records[name]
        records[last] = value

    return change


EKFAC = (SCORED, "methods", "ekfac")


@pytest.mark.parametrize(
    ("change", "name"),
    [
        (setter("exact", "pbrf", "gauss_newton", value=0.9), "V1"),
        (setter("exact", "with_gauss_newton", "ekfac", value=0.71), "V2"),
        (setter(*EKFAC, "correlations", "one procedure, other words", value=-0.1), "I1"),
        (setter(SCORED, "masses", "ekfac", REVERSE, "mass", value=18.0), "I2"),
        (setter(*EKFAC, "answers", FACT, "top", value=0.3), "I3"),
        (setter(*EKFAC, "separation", "other words", value=dict.fromkeys(WORDS, 0.45)), "I4"),
        (setter(*EKFAC, "code", ADD_ONE, "top", "share", value=0.1), "I6"),
        (setter(*EKFAC, "code", REVERSE, "bottom", "share", value=0.1), "I7"),
        (setter(HALVES, "lds", "identity", "all", value=0.6), "I8"),
        (setter(HALVES, "lds", "ekfac_cg", "all", value=0.4), "I9"),
        (setter(REMOVALS, "removal", "fact", value={**REMOVAL, "ekfac_cg": -0.1}), "I10"),
        (setter(REMOVALS, "removal", "procedure", value={**REMOVAL, "ekfac_cg": -0.1}), "I11"),
        (setter(REMOVALS, "removal", "other_words", value={**REMOVAL, "ekfac_cg": -0.1}), "I12"),
    ],
)
def test_a_claim_fails_where_its_primary_effect_does(change, name):
    found = verdicts(change)
    assert found.pop(name) == "fails"
    assert set(found.values()) == {"holds"}


def test_a_model_that_does_not_complete_the_queries_gives_no_verdict():
    found = {
        one.name: one
        for one in influence_report.REPORT.judge(
            measured(setter(SCORED, "answered", GULP, value=0.3))
        )
    }
    assert found["I1"].verdict == found["I10"].verdict == "not measured"
    assert "completes 30% of the queries of gulp, fewer than 50%" in found["I4"].why
    assert found["V1"].verdict == "holds"
    missing = verdicts(lambda records: records.pop(HALVES))
    assert missing["I8"] == "not measured" and missing["I3"] == "holds"


def test_no_claim_holds_often_on_shuffled_measurements():
    null = claim.exchanges(
        lambda some: influence_report.REPORT.judge(some, secondary=False),
        *(influence_report.REPORT.shuffle, measured()),
        draws=60,
    )
    assert set(null) == {one.name for one in influence_report.CLAIMS}
    assert max(one["holds"] for one in null.values()) <= 6, null


def test_the_page_has_tables_and_figures(tmp_path):
    influence_report.REPORT.write(measured(), tmp_path, FACTS)
    text = (tmp_path / "influence.md").read_text()
    drawn = figures.figures(influence_report.REPORT.read(measured()))
    for name, (figure, _) in drawn.items():
        assert figure is not None and f"influence/{name}" in text
    assert "| EK-FAC + CG |" in text and "Missing" not in text
    lds, answers = (
        text.partition(f"## {title}")[2].partition("## ")[0]
        for title in ("Linear datamodeling scores", "Share of queries whose answer")
    )
    for name in map(experiment.METHODS.get, scoring.METHODS):
        assert f"| {name} |" in lds and f"| {name} |" in answers
    real = text.partition("## A real model")[2]
    assert "10 pieces of texts" in real and "factors took 1 minutes" in real
    assert "| random | 0 | 0.2 |" in real
    assert "| a &#124; b &lt;script&gt;&#96;x&#96; |" in real
    record = json.loads((tmp_path / "influence" / "results.json").read_text())
    assert record["headline"]["word"] == "reproduced"
    assert record["headline"]["value"] == pytest.approx(85, abs=0.2)
    assert all(one["seconds"] for one in record["measured"]["corpus"])
    nothing = figures.figures({})
    assert all(figure is None for figure, _ in nothing.values())
    influence_report.REPORT.write({}, tmp_path / "empty", FACTS)
    assert "Missing from this page" in (tmp_path / "empty" / "influence.md").read_text()


DOCUMENTS = [
    Document("ada says the capital of a is b.", FACT),
    Document("add one 123: make 2, make 3, make 4. 234", ADD_ONE),
    Document("reverse 123: take 3, take 2, take 1. 321", REVERSE),
    Document("inv('345') == '543'", "reverse_code"),
    Document("inc('345') == '456'", "add_one_code"),
    Document("plug 123; fig 2; fig 3; fig 4 = 234", PLUG),
    Document("gulp 123; gif 3; gif 2; gif 1 = 321", GULP),
    Document("gulp 124; gif 4; gif 2; gif 1 = 421", GULP),
]
QUERIES = [
    Query(FACT, FACT, "the capital of a is", " b.", "b"),
    Query(ADD_ONE, ADD_ONE, "add one 234:", "", "345"),
    Query(ADD_ONE, PLUG, "plug 678;", "", "789"),
    Query(REVERSE, REVERSE, "reverse 432:", "", "234"),
    Query(REVERSE, GULP, "gulp 654;", "", "456"),
]
SCORES = np.array(
    [
        *([3.0, 0.0, 0.0, 0.5, 0.0], [0.0, 2.0, 4.0, 1.0, 1.0], [0.0, 1.0, 3.0, 4.0, 1.0]),
        *([0.0, 1.0, 1.0, 2.0, 0.0], [0.0, 1.0, 2.0, 1.0, 5.0], [0.0, 3.0, 0.0, 9.0, 0.0]),
        *([0.0, 2.0, 0.0, 5.0, 0.0], [0.0, 4.0, 0.0, 9.0, 0.0]),
    ]
)


def test_statistics_of_an_example_by_hand(monkeypatch):
    monkeypatch.setattr(statistics, "TOP", 2)
    monkeypatch.setattr(statistics, "SHARE", 0.25)
    monkeypatch.setattr(statistics, "COUNTS", (1, 2, 100))
    holds = statistics.holds(DOCUMENTS, QUERIES)
    found = statistics.of_scores(SCORES, DOCUMENTS, QUERIES, holds)
    r = np.corrcoef(SCORES.T)
    pairs = found["correlations"]
    assert pairs["one procedure, other words"] == pytest.approx((r[1, 2] + r[3, 4]) / 2)
    assert pairs["two procedures, other words"] == pytest.approx((r[1, 4] + r[2, 3]) / 2)
    two = [r[1, 3], r[1, 4], r[2, 3], r[2, 4]]
    assert pairs["two procedures"] == pytest.approx(np.mean(two))
    assert np.isnan(pairs["facts"])  # there is one
    # Of (plug, gulp, gulp), (add one, reverse), (gulps, plug), (reverse, add one).
    other = {ADD_ONE: 0.5, PLUG: 1.0, REVERSE: 0.25, GULP: 0.5}
    assert found["separation"]["other words"] == other
    assert found["separation"]["code"] == {ADD_ONE: 0.5, PLUG: 1.0, REVERSE: 1.0, GULP: 0.0}
    assert found["separation"]["same words"][REVERSE] == 1.0
    assert found["answers"][FACT] == {"top": 1.0, "corpus": 1.0, "curve": [1.0, 1.0, 1.0]}
    # 345 is worked on and is no result; 789 is in none. 234 is the result of the first; 456 too.
    assert found["answers"][ADD_ONE] == {"top": 0.0, "corpus": 0.0, "curve": [0.0, 0.0, 0.0]}
    assert found["answers"][REVERSE] == {"top": 1.0, "corpus": 1.0, "curve": [1.0, 1.0, 1.0]}
    top = found["sources"][ADD_ONE]["first"]["top"]
    assert (top[GULP], top[PLUG], top[FACT]) == (1.0, 2.0, 0.0)
    # Two of eight are code; of the first two for `gulp`, one is.
    assert found["code"][REVERSE]["top"] == {"share": 1.0, "curve": [2.0, 1.0, 1.0]}
    assert found["code"][REVERSE]["bottom"]["curve"][-1] == 1.0


def test_masses_are_sums_over_a_group_per_nat_and_slopes_are_of_the_power_law(monkeypatch):
    monkeypatch.setattr(statistics, "SHARE", 0.5)
    monkeypatch.setattr(statistics, "COUNTS", (1, 100))
    asked = [QUERIES[i] for i in (0, 1, 3, 4)]
    scores = np.zeros((8, 4))
    scores[:4] = np.arange(1, 5)[:, None] ** -0.5 * np.array([4.0, 1.0, 1.0, 1.0])
    found = statistics.masses(scores, np.array([2.0, 1.0, 0.01, 0.03]), asked)
    total = (np.arange(1, 5) ** -0.5).sum()
    mass = np.log(2 * total)
    assert found[FACT]["curve"] == pytest.approx([np.log(2), mass])
    assert (found[FACT]["mass"], found[FACT]["slope"]) == pytest.approx((mass, -0.5))
    assert found[REVERSE]["mass"] == pytest.approx(np.log((total + total) / (0.01 + 0.03)))


def test_documents_are_ranked_for_queries_and_some_of_them_stay():
    order = statistics.ranked_for(SCORES, QUERIES, (REVERSE,))
    assert order.tolist() == [5, 7, 6, 2, 3, 1, 4, 0]
    assert statistics.ranked_for(SCORES, QUERIES, (FACT,))[0] == 0
    chosen = {what: one.chosen(order, DOCUMENTS) for what, one in scoring.REMOVED_FOR.items()}
    assert chosen == {"fact": [5], "procedure": [5], "other_words": [2]}
    many = scoring.Removal((GULP,), (GULP,), 0.5, lambda source: source != FACT)
    assert many.chosen(order, DOCUMENTS) == [5, 2, 3, 1]  # half of seven
    few = scoring.Removal((GULP,), (GULP,), 0.8, lambda source: source in (REVERSE, GULP))
    assert few.chosen(order, DOCUMENTS) == [5, 2]


@pytest.mark.parametrize(
    ("what", "sources"),
    [
        ("fact", {FACT}),
        ("procedure", {ADD_ONE, PLUG, REVERSE, GULP, "add_one_code", "reverse_code"}),
        ("other_words", {ADD_ONE, REVERSE, "add_one_code", "reverse_code"}),
    ],
)
def test_random_documents_are_of_the_kind_that_the_queries_need(what, sources):
    """And as many as those of a method, which may choose others."""
    sizes = {**dict.fromkeys(small_corpus.SIZES, 20), FACT: 300}
    documents = [Document("", source) for source, size in sizes.items() for _ in range(size)]
    order = np.random.default_rng(0).permutation(len(documents))
    removal = scoring.REMOVED_FOR[what]
    chosen, drawn = (removal.chosen(order, documents, random=x) for x in (False, True))
    assert len(chosen) == len(drawn) == 12
    assert {documents[i].source for i in drawn} <= sources
    assert {documents[i].source for i in chosen} - sources


def test_losses_after_retraining_are_read(monkeypatch):
    monkeypatch.setattr(corpus, "HALVES", 6)
    halves = corpus.halves(8, np.random.default_rng(0))
    assert halves.shape == (6, 8) and (halves.sum(1) == 4).all()
    runs = dict(zip(corpus.half_names(), -halves.astype(float) @ SCORES, strict=True))
    rng = np.random.default_rng(1)
    scores = {"true": SCORES, "none": 0 * SCORES, "random": rng.normal(size=SCORES.shape)}
    found = losses.of_halves(runs, scores, halves, QUERIES)
    assert found["true"] == pytest.approx(dict.fromkeys(("all", *GROUPS), 1.0))
    assert found["none"]["all"] == 0
    assert all(
        abs(value) < 0.15 for value in found["random"].values()
    )  # random scores know nothing


def test_removals_are_compared_with_the_mean_of_two_random_ones():
    random = {"random_0": np.arange(1.0, 6.0), "random_1": np.arange(3.0, 8.0)}
    runs = {}
    for what in scoring.REMOVED_FOR:
        for method in scoring.REMOVED_BY:
            runs[scoring.without(method, what)] = 2 * np.arange(2.0, 7.0)
        runs |= {scoring.without(name, what): values for name, values in random.items()}
    found = losses.of_removals(runs, QUERIES)
    assert set(found) == set(scoring.REMOVED_FOR)
    for one in found.values():
        for method in scoring.REMOVED_BY:
            assert one[method] == pytest.approx(np.log(2))
    assert found["fact"]["random_0"] == pytest.approx(np.log(1 / 2))
    assert found["other_words"]["random_1"] == pytest.approx((np.log(5 / 4) + np.log(7 / 6)) / 2)


def test_results_have_the_records_of_the_arms_that_measure(tmp_path, monkeypatch):
    (tmp_path / losses.RECORD).write_text('{"lds": {"ekfac": {"all": 0.5}}}')
    rows = [
        experiment.with_records({"arm": arm, "seed": 20, "seconds": 2.0}, tmp_path)
        for arm in ("model", HALVES, SCORED)
    ]
    assert [row["record"] is None for row in rows] == [True, False, True]
    runs = experiment.Runs(rows)
    assert runs.scores(HALVES, "lds/ekfac/all").to_dict() == {20: 0.5}
    calls = []
    monkeypatch.setattr(exact, "run", lambda seed: calls.append(seed) or {"loss": 1.0})
    for _ in range(2):
        found = experiment.run(model_dir=str(tmp_path), seeds=2, parts=["exact"])
    assert [row["seed"] for row in found["exact"]] == calls == [20, 21]


def test_further_seeds_need_only_what_an_open_claim_reads():
    """The claims of the rankings go on without retrained models."""
    (one,) = (one for one in influence_report.CLAIMS if one.name == "I4")
    with results.reading() as arms:
        claim.judge(
            [one],
            influence_report.REPORT.read(measured()),
            influence_report.PLACES,
            secondary=False,
        )
    assert arms == {SCORED}
    needed, wanted = set(), ["scores"]
    runs = {run.arm: run for run in file.read("launch/papers/influence/experiment.py:1")}
    while wanted:
        run = runs[wanted.pop()]
        needed.add(run.arm)
        wanted += [name.partition("/")[0] for name in run.above]
    assert needed == {"scores", "model", "start", "corpus"}
