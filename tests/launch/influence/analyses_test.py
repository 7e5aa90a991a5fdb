"""Analyses of influence against closed forms, examples by hand, and scipy."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
from scipy import stats

from espalier.launch.inference.row_files import RowFileError
from espalier.launch.influence import analyses, labels, pages, scorers, statistics, tables
from espalier.model import layer_groups


def test_correlations_are_those_of_scipy_and_a_constant_column_has_none():
    scores = np.random.default_rng(0).normal(size=(50, 3))
    scores[:, 2] = np.exp(scores[:, 0])  # the same ranks
    pearson, spearman = statistics.pearson(scores), statistics.spearman(scores)
    for i, j in ((0, 1), (0, 2), (1, 2)):
        assert pearson[i, j] == pytest.approx(stats.pearsonr(scores[:, i], scores[:, j])[0])
        assert spearman[i, j] == pytest.approx(stats.spearmanr(scores[:, i], scores[:, j])[0])
    assert spearman[0, 2] == pytest.approx(1) and pearson[0, 2] < 0.95
    constant = np.stack([scores[:, 0], np.full(50, 0.1)], axis=1)
    assert np.isnan(statistics.pearson(constant)[0, 1])


def test_overlap_counts_common_top_documents_and_ties_go_to_the_first():
    scores = np.array([[3, 0], [2, 0], [1, 5], [0, 4]], float)
    assert statistics.top_overlap(scores, 2).tolist() == [[1, 0], [0, 1]]
    assert statistics.top_overlap(scores, 3)[0, 1] == pytest.approx(2 / 3)
    assert statistics.ranked(scores)[:, 1].tolist() == [2, 3, 0, 1]


def test_the_mean_of_a_block_omits_the_diagonal_and_its_interval_draws_queries():
    values = np.array([[1, 0.2, 0.4], [0.2, 1, 0.6], [0.4, 0.6, 1]])
    own = statistics.block_mean(values, [0, 1, 2], [0, 1, 2])
    assert own["value"] == pytest.approx(0.4)
    assert math.isnan(own["low"]) and math.isnan(own["high"])  # of too few queries
    assert statistics.block_mean(values, [0], [1, 2])["value"] == pytest.approx(0.3)
    u = np.array([0.1, 0.2, 0.3, 0.4, 0.5])
    for few, shown in ((4, False), (5, True)):
        got = statistics.block_mean(np.outer(u, u), range(few), range(few))
        assert np.isfinite([got["low"], got["high"]]).all() == shown
    # Draws of two queries' pairs alone reach beyond the smallest and the largest mean of five.
    assert 0.02 <= got["low"] < got["value"] < got["high"] <= 0.2
    assert math.isnan(statistics.block_mean(values, [0], [0])["value"])


def test_the_bootstrap_of_a_block_has_the_spread_of_its_queries():
    """Correlations u_i u_j have the mean of u squared, whose standard error over n queries is 2 E[u] std(u) / sqrt(n)."""
    u = np.random.default_rng(1).normal(1, 0.2, size=60)
    every = list(range(60))
    got = statistics.block_mean(np.outer(u, u), every, every)
    error = 2 * u.mean() * u.std() / math.sqrt(60)
    assert got["high"] - got["low"] == pytest.approx(2 * 1.96 * error, rel=0.15)


def test_the_difference_of_blocks_is_exact_and_its_interval_has_the_spread_of_its_queries():
    """Correlations u_i u_j of queries with mean 1 and controls with mean 0.5: pairs differ by 1 x (1 - 0.5)."""
    r = np.random.default_rng(2)
    u = np.concatenate([r.normal(1, 0.2, size=60), r.normal(0.5, 0.2, size=60)])
    own, stated = [*range(60)], [*range(60, 120)]
    got = statistics.block_difference(np.outer(u, u), own, stated)
    pairs = [u[i] * u[j] for i, j in itertools.combinations(own, 2)]
    assert got["value"] == pytest.approx(np.mean(pairs) - u[:60].mean() * u[60:].mean())
    # By the delta method, d/dmean of m^2 - m c is 2 m - c, and of c -m.
    m, c = u[:60].mean(), u[60:].mean()
    error = math.hypot((2 * m - c) * u[:60].std(), m * u[60:].std()) / math.sqrt(60)
    assert got["high"] - got["low"] == pytest.approx(2 * 1.96 * error, rel=0.15)
    assert math.isnan(statistics.block_difference(np.outer(u, u), [0], [1])["value"])


def test_a_power_law_has_its_slope_and_noise_stays_within_the_interval():
    rank = np.arange(1, 401)
    shuffled = np.random.default_rng(2).permutation(3.0 * rank**-0.36)
    fit = statistics.power_law(np.append(shuffled, [-5.0, 0.0]), top=400)
    assert fit["slope"] == pytest.approx(-0.36) and fit["r2"] == pytest.approx(1)
    assert math.exp(fit["intercept"]) == pytest.approx(3) and fit["documents"] == 400
    # Small noise leaves the order as it is, so that residuals are independent.
    noise = np.exp(np.random.default_rng(3).normal(size=20) * 0.05)
    fit = statistics.power_law(np.arange(1, 21) ** -2.0 * noise, top=20)
    assert fit["low"] < -2 < fit["high"] and fit["high"] - fit["low"] < 0.2
    assert statistics.power_law(np.array([1.0, 2, -1, -2]), top=4) is None


def test_cumulative_influence_is_a_sum_of_positive_scores():
    scores = np.array([5.0, -9, 3, 0, 2] + [0] * 5)
    one, most, every = statistics.cumulative(scores, 2.0, shares=(0.1, 0.25, 1.0))
    assert (one["documents"], one["per_nat"], one["share"]) == (1, 2.5, 0.5)
    assert (most["documents"], most["per_nat"]) == (3, 5)
    assert every["share"] == 1
    assert statistics.cumulative(-scores[:1], None, shares=(1.0,))[0] == {
        **{"part": 1.0, "documents": 1, "share": None, "per_nat": None},
        **{"random_share": None, "random_per_nat": None},
    }


def test_random_documents_have_their_part_of_the_positive_influence():
    """Beside the mean over all sets of three of ten documents."""
    scores = np.array([5.0, -9, 3, 0, 2] + [0] * 5)
    (row,) = statistics.cumulative(scores, 2.0, shares=(0.3,))
    sums = [sum(max(x, 0) for x in own) for own in itertools.combinations(scores, 3)]
    assert row["random_per_nat"] == pytest.approx(np.mean(sums) / 2)
    assert row["random_share"] == pytest.approx(np.mean(sums) / 10)


def test_multipliers_are_shares_of_the_top_over_shares_of_all():
    kinds = ["code"] * 25 + ["text"] * 75
    scores = np.stack([np.arange(100.0), -np.arange(100.0)], axis=1)
    ranked = statistics.ranked(scores)
    made = analyses.represented(ranked, kinds, {"all": [0, 1], "first": [0]})
    assert made["shares"] == {"text": 0.75, "code": 0.25}
    rows = made["rows"]
    by = {(row["end"], row["documents"], row["group"]): row["multipliers"] for row in rows}
    assert {key[1] for key in by} == {10, 50}  # at most half of the documents
    assert by["top", 10, "first"]["code"]["value"] == 0
    assert math.isnan(by["top", 10, "all"]["code"]["low"])  # of two queries
    assert by["bottom", 10, "first"]["code"]["value"] == 4
    assert by["bottom", 50, "first"]["code"]["value"] == 2
    assert by["bottom", 50, "first"]["text"]["value"] == pytest.approx(0.6667, abs=1e-4)
    assert by["top", 10, "all"]["code"]["value"] == 2


def test_many_sources_become_the_largest_and_the_others():
    every = [f"s{i}" for i in range(30)] + ["big"] * 5
    names, numbers = analyses.largest(every)
    assert len(names) == 12 and names[0] == "big" and names[-1] == labels.OTHER_SOURCES
    assert (numbers == 11).sum() == 30 - 10 and numbers[-1] == 0
    assert analyses.largest(["b", "a", "b"])[0] == ["b", "a"]
    assert labels.source({"source": {"site": 1}}) == '{"site": 1}'
    assert labels.source({}) == labels.source({"source": ""}) == labels.NO_SOURCE
    assert len(labels.source({"source": "x" * 500})) == 100


def test_answers_in_the_top_are_counted_by_those_answered_correctly():
    ranked = np.array([[0, 3, 1], [1, 2, 0], [2, 1, 2], [3, 0, 3]])
    matching = {0: np.array([1]), 1: np.array([0]), 2: np.array([], int)}
    single = labels.per_query(ranked, matching, 2)
    assert single[0] == {
        "top": 1,
        "rank": 2,
        "corpus": 1,
        "chance": pytest.approx(0.5),
        "expected": 0.5,
    }
    assert single[1]["rank"] is None and single[2]["chance"] == 0
    rows = labels.presence_table(
        ranked, matching, {"facts": [0, 1, 2], "other": []}, [True, False, True], top=2
    )
    every, correct, wrong = rows
    assert [row["queries"] for row in rows] == [3, 2, 1]
    assert every["share"]["value"] == pytest.approx(1 / 3, abs=1e-4) and every["in_corpus"] == 2
    assert correct["share"]["value"] == 0.5 and wrong["share"]["value"] == 0
    assert (every["times"], every["distinct"], every["expected"]) == (1, 1, 1)
    low, high = stats.binomtest(1, 2).proportion_ci(method="wilson")
    assert (correct["share"]["low"], correct["share"]["high"]) == pytest.approx(
        (low, high), abs=1e-4
    )


def test_chance_is_that_of_drawing_without_replacement():
    from espalier.launch.influence import labels

    assert labels.chance(10, 3, 2) == pytest.approx(1 - (7 / 10) * (6 / 9))
    assert labels.chance(10, 0, 5) == 0 and labels.chance(4, 1, 9) == 1


def test_methods_are_compared_with_the_first():
    first = np.array([[4.0], [3], [2], [1]])
    rows = analyses.compared(
        {"ekfac": first, "other": -first},
        {"answer": {0: np.array([0])}},
        top=2,
    )
    assert rows[0] == {"method": "ekfac", "spearman": 1, "overlap": 1, "answer": 1}
    assert rows[1] == {"method": "other", "spearman": pytest.approx(-1), "overlap": 0, "answer": 0}


def test_random_rankings_are_beside_the_methods():
    """Beside the means over all rankings of five documents."""
    scores = np.array([[5.0], [4], [3], [2], [1]])
    matching = np.array([1, 4])
    last = analyses.compared({"ekfac": scores}, {"answer": {0: matching}}, top=2)[-1]
    orders = np.array([*itertools.permutations(range(5))])
    overlaps = [len({0, 1} & {*order[:2]}) / 2 for order in orders]
    found = [bool({*order[:2]} & {*matching}) for order in orders]
    assert last == {
        **{"method": "random", "spearman": 0, "overlap": pytest.approx(np.mean(overlaps))},
        "answer": pytest.approx(np.mean(found)),
    }


def test_rankings_of_another_model_are_compared_by_query_and_kind():
    r = np.random.default_rng(5)
    first = r.normal(size=(30, 4))
    other = first + r.normal(size=(30, 4))
    got = analyses.by_query({"small": first, "large": other, "none": 0 * first}, top=6)
    assert list(got) == ["large", "none"]
    for q, one in enumerate(got["large"]):
        tops = [{*np.argsort(x[:, q])[-6:].tolist()} for x in (first, other)]
        want = stats.spearmanr(first[:, q], other[:, q])[0], len(tops[0] & tops[1]) / 6
        assert (one["spearman"], one["overlap"]) == pytest.approx(want)
    facts, constant = analyses.by_kind(got, {"facts": [0, 2]})
    own = [got["large"][q]["spearman"] for q in (0, 2)]
    assert facts["spearman"]["value"] == pytest.approx(np.mean(own))
    assert facts["most"] == max(own) and facts["queries"] == 2
    assert constant["spearman"] is None and constant["most"] is None


def test_scores_of_scanned_blocks_are_named_by_their_layers():
    """A dense layer, and twice two kinds of layers: block 1 has layers 1 and 3, block 2 has layers 2 and 4."""
    shapes = {f"layers/block_{block}/up": (1 + (block > 0), 8) for block in range(3)}
    stacks = layer_groups.in_stacks(shapes, scanned=True)
    rows = {0: [[0]], 1: [[1], [3]], 2: [[2], [4]]}
    scores = {f"layers/block_{block}/up": np.array(own) for block, own in rows.items()}
    got = scorers.Gradients._by_layer(
        SimpleNamespace(_stacks=stacks), scores | {"head": np.ones(1)}
    )
    assert got == {"head": [1.0], **{f"layers/block_{i}/up": [i] for i in range(5)}}


def test_shares_of_layers_add_up_and_follow_the_scores():
    sums = statistics.LayerSums([[0, 1], [1]])
    up = "layers/block_{}/mlp/up".format
    sums.add(0, {up(0): [1, 9], up(12): [2, 9], "head": [1.0, 9]})
    sums.add(1, {up(0): [1, 1], up(12): [3, 1], "head": [0.0, 2]})
    sums.add(2, {up(0): [7, 7], up(12): [7, 7], "head": [7.0, 7]})  # not among the top
    got = sums.shares([0])
    assert got["layers"] == pytest.approx({"0": 2 / 8, "12": 5 / 8, "other": 1 / 8})
    assert got["matrices"] == pytest.approx({"layers/mlp/up": 7 / 8, "head": 1 / 8})
    assert sums.shares([0, 1])["layers"]["other"] == pytest.approx((1 / 8 + 2 / 4) / 2)
    assert statistics.LayerSums([[]]).shares([0]) == {"layers": {}, "matrices": {}}


def test_tokens_with_most_influence_are_summed_over_documents():
    rows = [
        {"query": 0, "texts": [" a", "b"], "scores": [3.0, -1.0], "spurious": False},
        {"query": 0, "texts": ["a", " "], "scores": [2.0, 9.0], "spurious": True},
        {"query": 1, "texts": ["c"], "scores": [0.0], "spurious": False},
    ]
    first, second = statistics.token_table(rows, {"facts": [0], "none": [2], "other": [1]})
    assert first["tokens"] == [["a", 5.0], ["b", -1.0]] and first["spurious"] == 1
    assert first["tenth_share"] == pytest.approx((3 / 4 + 9 / 11) / 2)
    assert second["group"] == "other" and second["tenth_share"] is None
    assert statistics.tenth_share([1.0] * 20) == pytest.approx(0.1)


def query(**labels_):
    return labels.Query(prompt="p", completion="c", **labels_)


def given(**changed):
    scores = np.random.default_rng(4).normal(size=(40, 4))
    scores[:, 1] = scores[:, 0]
    facts = {"kind": "factual", "task": "capitals", "answer": [["paris"]]}
    sums = {"kind": "reasoning", "task": "sums", "procedure": [["add"]]}
    settings = {
        "scores_NQ": scores,
        "queries": [query(**facts, correct=True), query(**facts), query(**sums), query(**sums)],
        "nats": [1.0, 2.0, 0.5, 1.0],
        "sources": ["code"] * 20 + ["text"] * 20,
        "matching": {
            ("answer", 0): np.array([3]),
            ("answer", 1): np.array([int(scores[:, 0].argmax())]),
        },
        **{
            "layers": None,
            "tokens": [],
            "method": "ekfac",
            "others": {"bm25": -scores},
            "within": 5,
        },
    }
    return analyses.Inputs(**{**settings, **changed})


def test_all_analyses_become_tables_and_what_is_not_possible_is_named():
    got = analyses.analyse(given())
    within = {(r["task"], r["other_task"]): r for r in got["correlations"]}
    assert within["capitals", "capitals"]["pearson"]["value"] == pytest.approx(1)
    assert abs(within["capitals", "sums"]["pearson"]["value"]) < 0.5
    assert got["answer_of_queries"][1]["rank"] == 1
    assert {row["group"] for row in got["cumulative"]} == {labels.ALL, "factual", "reasoning"}
    assert got["methods"][1]["spearman"] == pytest.approx(-1)
    assert [text.split()[0] for text in got["omitted"]] == ["The", "Controls", "Layers", "Tokens"]
    made = tables.tables(got)
    titles = {table["title"]: table for table in made}
    assert {"Methods", "Correlations of queries", "Power law", "Answers in documents"} <= set(
        titles
    )
    for table in made:
        assert all(len(row) == len(table["header"]) for row in table["rows"])
    first = titles["Correlations of queries"]["rows"][0]
    assert first[:4] == ["factual: capitals", "factual: capitals", "1", "1.00"]
    assert "an overlap of 0.12 in expectation" in titles["Correlations of queries"]["text"]
    assert [row[0] for row in titles["Methods"]["rows"]] == ["ekfac", "bm25", "random"]
    bare = analyses.analyse(
        given(sources=None, matching=None, others={}, queries=[query()] * 4, nats=[None] * 4)
    )
    assert {"sources", "answer", "methods"}.isdisjoint(bare) and len(bare["omitted"]) == 6
    assert all(row["per_nat"] is None for row in bare["curves"])
    tables.tables(bare)


def test_controls_are_apart_and_compared_with_queries_of_their_kind():
    """Queries 0 and 1 have equal scores, and control 2 others."""
    scores = np.random.default_rng(6).normal(size=(40, 4))
    scores[:, 1] = scores[:, 0]
    first = int(scores[:, 0].argmax())
    fact = {"kind": "factual", "answer": [["paris"]]}
    made = given(
        scores_NQ=scores,
        queries=[
            *(query(**fact), query(**fact), query(**fact, control=True)),
            query(kind="reasoning"),
        ],
        matching={("answer", q): np.array([first]) for q in (0, 2)},
        nats=[1.0, 2.0, 0.5, 1.0],
    )
    got = analyses.analyse(made)
    rows = {row["measure"]: row for row in got["controls"]}
    assert {row["kind"] for row in got["controls"]} == {"factual"} and len(rows) == 3
    tops = [{*np.argsort(-column)[:5].tolist()} for column in scores.T]
    for name, own in (
        ("pearson", np.corrcoef(scores.T)),
        ("spearman", stats.spearmanr(scores)[0]),
        ("overlap", np.array([[len(x & y) / 5 for y in tops] for x in tops])),
    ):
        assert rows[name]["of_queries"]["value"] == pytest.approx(1)
        assert rows[name]["between"]["value"] == pytest.approx(own[0, 2])
        assert rows[name]["difference"]["value"] == pytest.approx(1 - own[0, 2])
        assert math.isnan(rows[name]["of_controls"]["value"])  # a single one
    shares = {row["group"]: row["share"]["value"] for row in got["answer"]}
    assert shares["factual"] == 1 and shares["factual (control)"] == (first in tops[2])
    groups = {row["group"] for row in got["cumulative"]}
    assert groups == {labels.NOT_CONTROLS, "factual", "factual (control)", "reasoning"}
    assert {row["kind"] for row in got["correlations"]} >= {"factual", "factual (control)"}
    (table,) = (one for one in tables.tables(got) if one["title"] == "Queries and controls")
    assert [row[:3] for row in table["rows"]] == [["factual", name, "1.00"] for name in rows]


def test_curves_are_sums_of_the_first_documents_per_nat():
    scores = np.array([[3.0, 1], [-1, 1], [2, 0], [5, 2], [0, 2]] + [[0, 0]] * 7)
    made = given(
        scores_NQ=scores,
        queries=[query()] * 2,
        nats=[2.0, 1.0],
        matching={},
        others={},
        sources=None,
    )
    rows = analyses.analyse(made)["curves"]
    counts = [row["documents"] for row in rows]
    assert counts == [1, 2, 5, 10, 12] and {row["group"] for row in rows} == {labels.ALL}
    firsts = [(5 / 2 + 2) / 2, (8 / 2 + 4) / 2] + [(10 / 2 + 6) / 2] * 3
    assert [row["per_nat"]["value"] for row in rows] == pytest.approx(firsts)
    random = [(10 / 2 + 6) / 2 * k / 12 for k in counts]
    assert [row["random_per_nat"]["value"] for row in rows] == pytest.approx(random)
    half = stats.t.ppf(0.975, 1) * np.std([5 / 2, 2], ddof=1) / math.sqrt(2)
    assert rows[0]["per_nat"]["high"] == pytest.approx(firsts[0] + half)
    drawn = pages.curves([{**row, "group": r"$\x$ of _"} for row in rows])
    assert drawn.startswith("<svg") and drawn.count("<path") > 10
    assert pages.curves([{**row, "per_nat": None} for row in rows]) is None
    # A part of so many documents is so many, whatever its rounding.
    for count in (*range(1, 400), 4_999_999):
        part = statistics.cumulative(np.ones(count), 1.0, shares=[k / count for k in (1, count)])
        assert [row["documents"] for row in part] == [1, count]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"correct": "yes"}, "'correct' is 'yes': give true or false"),
        ({"control": 1}, "'control' is 1: give true or false"),
        ({"control": True, "answer": "q"}, "the prompt of a control states the answer"),
        ({"task": 3}, "'task' must be a text"),
        ({"kind": "x" * 200}, "'kind' must be a text of at most 100"),
        ({"answer": {"a": 1}}, "'answer' is not what can be searched for"),
        ({"answer": ["", "b"]}, "a text of it is empty"),
        ({"procedure": [[]]}, "neither a text nor a list of texts"),
    ],
)
def test_a_bad_label_names_its_place(row, message):
    with pytest.raises(RowFileError, match=f"q.jsonl, line 7: .*{message}"):
        labels.query({"prompt": "p", "completion": "c", **row}, "q.jsonl, line 7")


def test_searched_documents_are_a_hundredth_within_bounds():
    assert [analyses.searched(n) for n in (4, 100, 2_000, 10**6)] == [4, 10, 20, 500]
