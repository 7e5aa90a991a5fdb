"""The report of the reproduction."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from launch.papers.mov import claims, figures, measure, parameters, rows, sweep
from launch.papers.mov.arms import ACCURACY, BASE, LEARNED, TUNED, Runs
from launch.papers.shared import claim, domains, page

_TEXT = [
    "- *model*: T5 1.1 of two layers in each stack, width 128, four heads, MLPs of 256 "
    "(t5x_configs/experiments/mov/cpu): span corruption of English and docstrings, then eight operations on four letters "
    f"({sweep.SINGLE_STEPS:,} updates, rate {sweep.BASE_RATE:g}) and all compositions of one that moves letters and one that replaces "
    f"them ({sweep.BASE_STEPS:,} updates), in the words "
    f"{', '.join(rows.KNOWN_WORDS.values())}, with {rows.NEW_WORDS_SHARE:g} single operations in the words of the arms for each "
    "composition. A letter and its place are one piece of the vocabulary, since T5 has no positions in "
    "cross-attention. This is the **frozen model**; a seed whose frozen model has a loss above "
    f"{LEARNED} on other strings is left out.",
    f"- *arms*: each continues it for {sweep.STEPS} updates of about 70 examples of 36 compositions, in the words "
    f"{', '.join(rows.NEW_WORDS.values())}: "
    f"full tuning (rate {sweep.FULL_RATE:g}), (IA)3 and MoV ({sweep.VECTOR_RATE:g}), LoRA and MoLORA ({sweep.LORA_RATE:g}, "
    f"experts of rank {sweep.RANK}), Adam without decay. LoRA has MoLORA's sites. *top-1*, *top-2*: a token uses only its most "
    "probable experts, whose weights are their probabilities, as in the paper's code, or sum to 1 (*renormalised*); their balance "
    f"loss has a weight of {sweep.BALANCE:g}. "
    "*Routed by layers' inputs*: a router reads what attention or MLP reads, not the tensor that it rescales; *by sentences*: the "
    "mean embedding of the inputs, the same for all tokens of an example.",
    f"- *judged*: {rows.HELD_OUT_ROWS} rows of each of {len(rows.held_out())} compositions that no arm was tuned on, in the new "
    f"words, with {rows.CHOICES} answer choices, among them each operation alone; the choice with the greatest "
    "log-likelihood is the answer (`launch.evaluate ranks`).",
    "- *routers*: what they choose is read on the same compositions, by kind of site and layer; keys, values and heads count "
    "alike.",
    "- *where it falls short*: the paper's models are of 770 million to 11 billion parameters and its tasks are natural "
    "language; here tasks are generated, and the frozen model knows the held-out ones in other words. The embedding of a "
    "sentence is the mean of the frozen model's embeddings of the inputs, the paper's is another model's.",
]


def _setup(parts: Mapping[str, Any]) -> list[str]:
    out, missing = list(_TEXT), []
    for runs in parts.values():
        unlearned = [f"seed {seed} (a loss of {x:.2f})" for seed, x in runs.unlearned.items()]
        out.insert(0, f"- *runs*: {runs.amount()}. Left out: {', '.join(unlearned) or 'none'}.")
        missing = runs.missing((BASE, *TUNED), runs.seeds)
    return [*out, *page.missing(missing, tuple(measure.PARTS), parts)]


def _tables(parts: Mapping[str, Any]) -> list[str]:
    lines = []
    for name, runs in parts.items():
        cells = [_cells(runs, arm) for arm in (BASE, *TUNED) if runs.has(arm)]
        header = (
            *("arm", "trained parameters", "per cent"),
            *("accuracy", "loss on trained compositions"),
        )
        lines += page.table(header, cells, f"All arms, {measure.PARTS[name]}")
        lines += domains.load_table(name, runs)
    return [*lines, *_full_size()]


def _cells(runs: Runs, arm: str) -> tuple[str, ...]:
    trained = runs.values(arm, "trained_parameters")
    base = next((row["parameters"] for row in runs.find(arm).values() if row.get("parameters")), 0)
    own = "" if arm == BASE or not trained.size else f"{trained.mean():,.0f}"
    share = f"{100 * trained.mean() / base:.2f}" if own and base else ""
    scores = [
        runs.mean(values, score) if (values := runs.values(arm, score)).size else ""
        for score in (ACCURACY, "trained_loss")
    ]
    return f"{runs.label(arm)} (`{arm}`)", own, share, *scores


def _full_size() -> list[str]:
    """Returns the table of trainable parameters at the paper's sizes."""
    cells = []
    for method in parameters.METHODS:
        shares = [f"{parameters.per_cent(method, size):.3g}" for size in parameters.SIZES]
        reported = [
            f"{value:g} ({size})"
            for (name, size), value in parameters.REPORTED.items()
            if name == method
        ]
        cells.append((method, *shares, ", ".join(reported)))
    header = ("method", *(f"T5 1.1, {size}" for size in parameters.SIZES), "the paper")
    title = "Trained parameters at full size, per cent of the model's, from its shapes"
    return page.table(header, cells, title)


def shuffle(measured: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Returns rows with arms exchanged at random, whether or not they have routers, and with other distances.

    What routers choose stays with its arm; the distances of tasks and of rows are exchanged in half of the runs.
    """
    out = {}
    for part, every in measured.items():
        plain = [_with_routing(row, None) for row in every]
        exchanged = claim.shuffle_arms({part: plain}, rng)[part]
        out[part] = [
            _with_routing(row, _swapped(own["evaluations"].get("routing"), rng))
            for row, own in zip(exchanged, every, strict=True)
        ]
    return out


def _with_routing(row: Mapping[str, Any], routing: Mapping[str, Any] | None) -> dict[str, Any]:
    others = {name: one for name, one in row["evaluations"].items() if name != "routing"}
    return {**row, "evaluations": {**others, **({"routing": routing} if routing else {})}}


def _swapped(
    routing: Mapping[str, Any] | None, rng: np.random.Generator
) -> Mapping[str, Any] | None:
    if not routing or rng.integers(2):
        return routing
    distances = {
        kind: [{**x, "tasks": x["rows"], "rows": x["tasks"]} for x in layers]
        for kind, layers in routing["distances"].items()
    }
    return {**routing, "distances": distances}


def _read(measured: Mapping[str, Any]) -> dict[str, Runs]:
    parts = [part for part in measure.PARTS if measured.get(part)]
    return {part: Runs.judging(measured[part]) for part in parts}


REPORT = page.Report(
    slug="mov",
    title="MoV and MoLORA: the paper's claims on a small T5",
    source="[Pushing Mixture of Experts to the Limit: Extremely Parameter Efficient MoE for Instruction Tuning, arXiv "
    "2309.05444](https://arxiv.org/abs/2309.05444)",
    claims=claims.CLAIMS,
    places=measure.PARTS,
    read=_read,
    figures=figures.figures,
    setup=_setup,
    tables=_tables,
    shuffle=shuffle,
)
