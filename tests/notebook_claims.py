"""What the texts of the notebooks say of their results: a function for each, called with the names that the cells define."""

import pathlib
from typing import Any

from espalier.launch.run.metric_rows import read_rows

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
    tokens, run = names["tokens"], names["imported"]
    assert (run.logits([tokens]) == names["base"].logits([tokens])).all()
    assert abs(names["merged"].logits([tokens]) - names["tuned"].logits([tokens])).max() < 1e-3
    losses = [row["eval/chats/loss"] for row in read_rows("lora/run") if "eval/chats/loss" in row]
    assert losses[-1] < 0.6 * losses[0]
    assert names["shares"] == {"base": 0, "with LoRA": 1}
    right = [row["completion"] for row in names["rows"][30:]]
    given = names["given"]["with LoRA"]
    assert sum(a == b for a, b in zip(given, right, strict=True)) <= len(right) / 2


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
    sizes, losses = table["parameters"], table.drop(columns="parameters")
    dense, trained, factorised = (losses.iloc[i] for i in range(3))
    assert (dense < trained).all() and trained.mean() < dense.mean() + 0.25
    assert (factorised > 5 * trained).all()
    assert sizes.iloc[1] == sizes.iloc[2] < 0.51 * sizes.iloc[0]
    ranks = names["mean_rank"]
    assert ranks[1] < 0.9 * ranks[0] and ranks[-1] < 0.9 * ranks[0]


def influence(names: Names) -> None:
    scores, documents = names["scores"], names["documents"]
    query = names["queries"][0]
    assert documents[scores[0].idxmax()]["text"] == f"The gate of {query['answer']}."
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
    for row, kind in enumerate(names["KINDS"]):
        shares = names["shares"]["chosen"][kind]["attention"][1]
        assert shares.index(max(shares)) == row and names["shares"]["experts"][row] == kind
    assert abs(losses.loc["mixture", "mean"] - losses.loc["base", "mean"]) < 0.05
    assert losses.loc["mixture", "mean"] < losses.loc[[*names["KINDS"], "upcycled"], "mean"].min()


def nexus(names: Names) -> None:
    losses, choices = names["losses"], names["choices"]
    two, three, trained = losses.index
    assert losses.loc[three, "code"] < 0.5 * losses.loc[two, "code"]
    for kind in ("stories", "facts"):
        assert losses.loc[two, kind] < losses.loc[three, kind] < losses.loc[two, kind] + 0.15
        share = choices[trained].loc[kind, "code"]
        assert share < choices[trained].loc["code", "code"]
        assert share < choices[three].loc[kind, "code"] - 0.1
    assert (abs(choices[three]["code"] - 0.5) < 0.15).all()
    assert (losses.loc[trained] < losses.loc[three]).all()


def merge_with_search(names: Names) -> None:
    table = names["table"]
    assert table.loc["merged"].mean() < 0.5 * table.drop("merged").mean(axis=1).min()
    for kind in names["KINDS"]:
        assert table[kind].drop("merged").idxmin() == kind
        assert table.loc["merged", kind] < 2 * table.loc[kind, kind]
    ratios = names["ratios"]
    assert (ratios.iloc[4:].max(axis=1) < ratios.iloc[1:4].max(axis=1).min()).all()
    assert ratios.iloc[0].max() < 2.3


def arbitrage(names: Names) -> None:
    right, chosen = names["right"], names["chosen"]
    assert right["arbitrage"] > 1.5 * right.drop("arbitrage").max()
    for kind in names["KINDS"]:
        assert chosen.loc[kind].idxmax() == kind and chosen.loc[kind, kind] > 0.8
    assert names["pair"]["chosen_teacher"] != names["pair"]["rejected_teacher"]


def snapkv(names: Names) -> None:
    table = names["table"]
    assert names["full"] == 1
    assert table.loc[24, "snapkv"] > 0.3
    assert table.loc[24, ["streaming_llm", "random"]].max() < 0.15
    assert table.loc[16].max() < 0.15
    assert max(map(len, names["prompts"])) == 35


def page(names: Names) -> None:
    """docs/use/python.md."""
    assert len(names["answers"]) == 2 and names["metrics"]["loss"] > 0
    assert names["loss"] > 0 and "facts" in names["printed"]
