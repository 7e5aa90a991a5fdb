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
    statistics,
)
from espalier.launch.papers.influence import report as influence_report
from espalier.launch.papers.influence.small_corpus import (
    ADD_ONE,
    FACT,
    GROUPS,
    REVERSE,
    Document,
    Query,
)
from espalier.launch.papers.shared import claim

FACTS = {"command": "a command", "versions": {"jax": "1"}, "criteria": None}
LDS = {
    **{"ekfac_cg": 0.6, "ekfac": 0.45, "kfac": 0.4, "identity": 0.2, "cosine": 0.25},
    **{"trak": 0.3, "embedding": 0.1, "bm25": 0.15, "tfidf": 0.12, "random": 0.0},
}
REMOVAL = {
    "fact": {"ekfac": 0.5, "ekfac_cg": 0.55, "identity": 0.2, "bm25": 0.5, "random": 0.0},
    "procedure": {"ekfac": 0.3, "ekfac_cg": 0.32, "identity": 0.1, "bm25": 0.12, "random": 0.0},
}
EXACT = {
    "pbrf": (0.96, 0.99, 0.989, 0.9, 0.89, 0.7),
    "loo": (0.99, 0.97, 0.968, 0.88, 0.87, 0.7),
    "lds": (0.92, 0.91, 0.9, 0.85, 0.84, 0.7),
    "with_gauss_newton": (0.97, 1.0, 0.999, 0.92, 0.9, 0.7),
}


def shown(group, method):
    """Multipliers of sources at both ends: own worked examples and code on top, as EK-FAC has them."""
    best = method.startswith("ekfac")
    table = dict.fromkeys(statistics.SOURCES, 0.5)
    table[group] = 4.0 if best else 2.0
    if group != FACT:
        table[f"{group}_code"] = 1.5 if best else 0.9
        table[REVERSE if group == ADD_ONE else ADD_ONE] = 0.3 if best else 1.9
    return {"top": table, "bottom": {**table, f"{group}_code": 1.4}}


def scores_record():
    methods = {
        method: {
            "correlations": {
                **{"same procedure": 0.3, "two procedures": 0.0},
                **{"facts": 0.01, "fact and procedure": 0.0},
            },
            "answers": {
                group: {"top": 0.9 if group == FACT else 0.05, "corpus": 1.0} for group in GROUPS
            },
            "sources": {
                group: {name: shown(group, method) for name in ("first", "share")}
                for group in GROUPS
            },
        }
        for method in scoring.METHODS
    }
    masses = {
        method: {group: {"mass": 7.0 if group == FACT else 5.5, "slope": -0.4} for group in GROUPS}
        for method in scoring.GRADIENTS
    }
    return {
        **{"nats": dict.fromkeys(GROUPS, 0.4), "answered": dict.fromkeys(GROUPS, 0.9)},
        **{"masses": masses, "methods": methods},
    }


def losses_record():
    names = [*corpus.half_names(), "model"]
    return {
        "lds": {m: dict.fromkeys(("all", *GROUPS), value) for m, value in LDS.items()},
        "removal": REMOVAL,
        "losses": {name: dict.fromkeys(GROUPS, 0.5) for name in names},
    }


def noisy(value, rng):
    """The same numbers with a little noise."""
    if isinstance(value, dict):
        return {name: noisy(one, rng) for name, one in value.items()}
    return value + 1e-3 * float(rng.normal()) if isinstance(value, float) else value


def measured(change=None):
    """What `experiment.run` returns with five seeds; `change` alters the records of each seed."""
    rng, out = np.random.default_rng(0), {"exact": [], "corpus": []}
    for seed in range(10, 15):
        tables = {
            kind: dict(zip(exact.METHODS, values, strict=True)) for kind, values in EXACT.items()
        }
        row = {"seed": seed, "seconds": 9.0, "loss": 1.0, **tables}
        records = {"scores": scores_record(), "losses": losses_record(), "exact": row}
        records = copy.deepcopy(records)
        if change:
            change(records)
        out["exact"].append(noisy(records.pop("exact"), rng))
        out["corpus"].append({"seed": seed, "seconds": 60.0, **noisy(records, rng)})
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


EKFAC = ("scores", "methods", "ekfac")


@pytest.mark.parametrize(
    ("change", "name", "verdict"),
    [
        (setter("exact", "pbrf", "gauss_newton", value=0.9), "V1", "fails"),
        (setter("exact", "pbrf", "ekfac", value=0.71), "V2", "mixed"),
        (setter("exact", "with_gauss_newton", "ekfac_cg", value=0.95), "V3", "fails"),
        (setter(*EKFAC, "correlations", "same procedure", value=-0.1), "I1", "fails"),
        (setter("scores", "masses", "ekfac", REVERSE, "mass", value=8.0), "I2", "mixed"),
        (setter(*EKFAC, "answers", FACT, "top", value=0.3), "I3", "mixed"),
        (setter(*EKFAC, "sources", ADD_ONE, "first", "top", ADD_ONE, value=0.1), "I4", "mixed"),
        (setter(*EKFAC, "sources", ADD_ONE, "first", "top", ADD_ONE, value=0.1), "I5", "mixed"),
        (
            setter(*EKFAC, "sources", ADD_ONE, "share", "top", "add_one_code", value=0.5),
            "I6",
            "mixed",
        ),
        (
            setter(*EKFAC, "sources", REVERSE, "share", "bottom", "reverse_code", value=0.5),
            "I7",
            "mixed",
        ),
        (setter("losses", "lds", "bm25", "all", value=0.6), "I8", "mixed"),
        (setter("losses", "lds", "ekfac_cg", "all", value=0.4), "I9", "fails"),
        (setter("losses", "removal", "fact", "ekfac", value=-0.1), "I10", "fails"),
        (setter("losses", "removal", "procedure", "identity", value=0.4), "I11", "mixed"),
        (setter("losses", "removal", "procedure", "bm25", value=0.4), "I12", "fails"),
        (setter("losses", "lds", "random", "all", value=0.3), "I13", "fails"),
    ],
)
def test_verdicts_follow_the_numbers(change, name, verdict):
    assert verdicts(change)[name] == verdict


def test_a_model_that_does_not_complete_the_queries_gives_no_verdict():
    found = verdicts(setter("scores", "answered", REVERSE, value=0.5))
    assert found["I1"] == found["I4"] == "not measured"
    assert found["V1"] == "holds"
    missing = verdicts(lambda records: records.update(losses=None))
    assert missing["I8"] == "not measured" and missing["I3"] == "holds"


def test_no_claim_holds_often_on_shuffled_measurements():
    held = dict.fromkeys((one.name for one in influence_report.CLAIMS), 0)
    for draw in range(60):
        shuffled = influence_report.REPORT.shuffle(measured(), np.random.default_rng(draw))
        for one in influence_report.REPORT.judge(shuffled):
            held[one.name] += one.verdict == claim.HOLDS
    assert max(held.values()) <= 6, held


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
    assert json.loads((tmp_path / "influence" / "results.json").read_text())["claims"]
    nothing = figures.figures({})
    assert all(figure is None for figure, _ in nothing.values())
    influence_report.REPORT.write({}, tmp_path / "empty", FACTS)
    assert "Missing from this page" in (tmp_path / "empty" / "influence.md").read_text()


DOCUMENTS = [
    Document("ada says the capital of a is b.", FACT),
    Document("add one 123: 1 to 2, 2 to 3, 3 to 4. 234", ADD_ONE),
    Document("reverse 123: take 3, take 2, take 1. 321", REVERSE),
    Document("reverse('345') == '543'", "reverse_code"),
]
QUERIES = [
    Query(FACT, "the capital of a is", " b.", "b"),
    Query(ADD_ONE, "add one 345:", "", "456"),
    Query(REVERSE, "reverse 432:", "", "234"),
]
SCORES = np.array([[3.0, 0.0, 0.5], [0.0, 2.0, 1.0], [0.0, 1.0, 4.0], [0.0, 0.0, 2.0]])


def test_statistics_of_an_example_by_hand(monkeypatch):
    monkeypatch.setattr(statistics, "TOP", 2)
    monkeypatch.setattr(statistics, "SHARE", 0.5)
    found = statistics.of_scores(SCORES, DOCUMENTS, QUERIES)
    two = np.corrcoef(SCORES[:, 1], SCORES[:, 2])[0, 1]
    assert found["correlations"]["two procedures"] == pytest.approx(two)
    assert np.isnan(found["correlations"]["facts"])  # there is one
    assert found["answers"][FACT] == {"top": 1.0, "corpus": 1.0}
    assert found["answers"][REVERSE] == {"top": 0.0, "corpus": 1.0}
    assert found["answers"][ADD_ONE] == {"top": 0.0, "corpus": 0.0}
    top = found["sources"][REVERSE]["first"]["top"]
    assert (top[REVERSE], top["reverse_code"], top[FACT]) == (2.0, 2.0, 0.0)
    assert statistics.own_share(found, REVERSE) == 2.0
    assert statistics.code_share(found, REVERSE) == 2.0
    assert found["sources"][REVERSE]["share"]["bottom"][FACT] == 2.0


def test_masses_are_per_nat_and_slopes_are_of_the_power_law(monkeypatch):
    monkeypatch.setattr(statistics, "SHARE", 0.5)
    scores = np.zeros((8, 3))
    scores[:4] = np.arange(1, 5)[:, None] ** -0.5 * np.array([4.0, 1.0, 1.0])
    found = statistics.masses(scores, np.array([2.0, 1.0, 0.01]), QUERIES)
    total = (np.arange(1, 5) ** -0.5).sum()
    assert found[FACT] == pytest.approx({"mass": np.log(2 * total), "slope": -0.5})
    assert found[REVERSE]["mass"] == pytest.approx(np.log(total / statistics.MIN_NATS))


def test_documents_are_ranked_for_a_group_and_losses_are_read(monkeypatch):
    assert statistics.ranked_for(SCORES, QUERIES, (REVERSE,)).tolist() == [2, 3, 1, 0]
    assert statistics.ranked_for(SCORES, QUERIES, (FACT,))[0] == 0
    monkeypatch.setattr(corpus, "HALVES", 6)
    halves = corpus.halves(4, np.random.default_rng(0))
    assert halves.shape == (6, 4) and (halves.sum(1) == 2).all()
    runs = dict(zip(corpus.half_names(), -halves.astype(float) @ SCORES, strict=True))
    for what in scoring.REMOVED_FOR:
        for i, method in enumerate(scoring.REMOVED_BY):
            runs[scoring.without(method, what)] = np.full(3, float(i))
    found = losses.of_losses(runs, {"true": SCORES, "random": 0 * SCORES}, halves, QUERIES)
    assert set(found["lds"]) == {"true", "random"}
    assert found["lds"]["true"] == pytest.approx(dict.fromkeys(("all", *GROUPS), 1.0))
    assert found["lds"]["random"]["all"] == 0
    assert found["removal"]["fact"] == {
        method: i - 4.0 for i, method in enumerate(scoring.REMOVED_BY)
    }


def test_results_are_gathered_by_seed(tmp_path, monkeypatch):
    (tmp_path / losses.RECORD).write_text('{"lds": 1}')
    rows = [
        experiment.with_records({"arm": arm, "seed": 10, "seconds": 2.0}, tmp_path)
        for arm in ("model", "losses", "scores")
    ]
    assert experiment.by_seed(rows) == [
        {"seed": 10, "seconds": 6.0, "scores": None, "losses": {"lds": 1}}
    ]
    calls = []
    monkeypatch.setattr(exact, "run", lambda seed: calls.append(seed) or {"loss": 1.0})
    for _ in range(2):
        found = experiment.run(model_dir=str(tmp_path), seeds=2, parts=["exact"])
    assert [row["seed"] for row in found["exact"]] == calls == [15, 16]
