"""What the texts of the notebooks say of their results: a function for each, called with the names that the cells define."""

import pathlib
from typing import Any

Names = dict[str, Any]


def start_to_finish(names: Names) -> None:
    metrics, losses = names["metrics"], names["losses"]["loss"]
    assert 120 <= names["stopped"] < 300 == metrics.index[-1]
    assert metrics["loss"].dropna().iloc[-1] < 0.1 * metrics["loss"].dropna().iloc[0]
    assert losses["stories"] == losses.min()
    answers = [answer.text.strip() for answer in names["answers"]]
    assert answers == ["owl followed Ada home.", "white.", "return peel(x, 'mango')"]
    assert names["gates"]["Olden"] == "white"
    assert names["run"].decode([int(names["ids"][0])]) == "o" and names["values"][0] > 0.9


def import_and_lora(names: Names) -> None:
    pass


def dpo_and_indicators(names: Names) -> None:
    gentle, hard = (names["runs"][name] for name in ("gentle", "hard"))
    last = names["table"]
    assert abs(last.loc["hard", "accuracy"] - last.loc["gentle", "accuracy"]) < 0.15
    assert last.loc["hard", "llh_gap"] > 2 * last.loc["gentle", "llh_gap"]
    first = gentle["indicators/llh_gap"].dropna().iloc[0]
    assert last.loc["gentle", "llh_gap"] > first
    reward = gentle["indicators/reward"].dropna()
    assert abs(reward.iloc[-1] - reward.iloc[0]) < 0.15 and reward.iloc[0] > 0.35
    assert hard["indicators/reward"].dropna().iloc[-1] < 0.15
    assert last.loc["hard", "llh_chosen"] < last.loc["gentle", "llh_chosen"] - 1
    assert last.loc["hard", "entropy"] > 2 * last.loc["gentle", "entropy"]
    assert last.loc["hard", "kl"] > 5 > last.loc["gentle", "kl"]


def low_rank(names: Names) -> None:
    table = names["table"]
    kinds = ["stories", "facts", "code"]
    means = table[kinds].mean(axis=1)
    dense, trained, factorised = means
    assert dense < trained + 0.02 and trained < factorised
    assert table["parameters"].iloc[1] == table["parameters"].iloc[2] < table["parameters"].iloc[0]
    assert names["mean_rank"][-1] < names["mean_rank"][0]


def influence(names: Names) -> None:
    scores, documents = names["scores"], names["documents"]
    for number, query in enumerate(names["queries"]):
        assert query["answer"] in documents[scores[number].idxmax()]["text"]
    table = names["table"]
    assert (table["in the five first documents"] > 10 * table["in all documents"]).all()
    letters, values = names["letters"], names["values"]
    largest = max(range(len(values)), key=values.__getitem__)
    assert letters[largest] == names["queries"][0]["completion"].strip()[0]
    assert values[largest] > 5 * max(abs(x) for i, x in enumerate(values) if i != largest)
    assert pathlib.Path("influence/report/viewer.html").exists()


def bam(names: Names) -> None:
    losses = names["losses"]
    for kind in names["KINDS"]:
        assert losses.loc[[*names["KINDS"]], kind].idxmin() == kind
    assert losses.loc["mixture", "mean"] < losses.loc[[*names["KINDS"], "upcycled"], "mean"].min()


def nexus(names: Names) -> None:
    chosen = names["choices"]["three experts"]
    assert chosen.loc["code"].idxmax() == "code"


def merge_with_search(names: Names) -> None:
    table = names["table"]
    assert table.loc["merged"].mean() < 0.5 * table.drop("merged").mean(axis=1).min()
    for kind in names["KINDS"]:
        assert table[kind].drop("merged").idxmin() == kind
        assert table.loc["merged", kind] < 2 * table.loc[kind, kind]
    ratios = names["ratios"]
    assert (ratios.iloc[4:].max(axis=1) < ratios.iloc[1:4].max(axis=1).min()).all()


def arbitrage(names: Names) -> None:
    right, chosen = names["right"], names["chosen"]
    assert right["arbitrage"] > 1.5 * right.drop("arbitrage").max()
    for kind in names["KINDS"]:
        assert chosen.loc[kind].idxmax() == kind and chosen.loc[kind, kind] > 0.8
    assert names["pair"]["chosen_teacher"] != names["pair"]["rejected_teacher"]


def snapkv(names: Names) -> None:
    shares = {name: sum(some) / len(some) for name, some in names["right"].items()}
    assert shares["full"] > 0.9 and shares["snapkv"] > 0.9
    assert max(shares["streaming_llm"], shares["random"]) < 0.5


def page(names: Names) -> None:
    """docs/use/python.md."""
    assert len(names["answers"]) == 2 and names["metrics"]["loss"] > 0
    assert names["loss"] > 0 and "facts" in names["printed"]
