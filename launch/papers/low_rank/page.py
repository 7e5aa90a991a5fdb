"""The report of the reproduction."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from launch.papers.low_rank import claims, figures, timing
from launch.papers.low_rank import sweep as lm
from launch.papers.low_rank.arms import PLACES, Results, arm_name
from launch.papers.shared import claim, page
from launch.plots import intervals

_COLUMNS = {
    "lm": ("parameters", "perplexity", "effective_rank", "effective_step"),
    "vision": ("parameters", "accuracy", "effective_rank", "effective_step"),
}
_FORMATS = {"parameters": "{:,.0f}", "effective_step": "{:.2e}"}
_RUNS = {
    "lm": "decoders of 2 layers (width 64, four heads, MLP of 256, contexts of 32) read Python's "
    f"standard library character by character, 1,500 updates of 512 characters ({lm.LONG:,} where long; Adam, rate "
    f"3e-3, halved where noted; t5x_configs/experiments/low_rank/cpu). Ranks are {lm.MAIN} of a matrix's smaller side by "
    "default, with `ratio` they leave that share of its parameters; decay is part of the loss. Perplexity is of held-out "
    "modules",
    "vision": "small convolutional networks with batch normalisation, 2,400 updates by SGD on generated textures "
    "(t5x_configs/experiments/low_rank/cpu), factors of 0.3 of the smaller side; the dense network is decayed by L2, "
    "factors by either decay of the same weight, all at the full and at half the rate",
}


def _setup(parts: Mapping[str, Any]) -> list[str]:
    out = [
        f"- *{PLACES[part]}*: {text}. {parts[part].amount()}."
        for part, text in _RUNS.items()
        if part in parts
    ]
    if times := parts.get("timing"):
        first = next(iter(times["seconds"].values()))
        out.append(
            f"- *steps*: the compiled training steps of the language models, in turns on one machine: {len(first)} "
            f"rounds of {timing.STEPS} steps for each arm; ratios are of one round."
        )
    out.append(
        "- *effective rank*: nuclear over operator norm at the end, mean over factorised matrices; *effective step*: the "
        "learning rate at the end over their mean squared Frobenius norm."
    )
    out.append(
        "- *two explanations*: L7 and L8 are one statistic of the same pairs of runs, for two causes; where both hold, neither "
        "shows that it is the cause. Their notes have it over all decays and across the two rates too."
    )
    language = parts.get("lm")
    missing = language.missing(list(lm.get_config().arms), language.seeds) if language else []
    return [*out, *page.missing(missing, tuple(PLACES), parts)]


def _tables(parts: Mapping[str, Any]) -> list[str]:
    out = []
    for part, columns in _COLUMNS.items():
        if runs := parts.get(part):
            rows = [
                (arm_name(arm), *(_cell(runs, arm, column) for column in columns))
                for arm in runs.arms
            ]
            header = ("arm", *map(arm_name, columns))
            out += page.table(header, rows, f"{PLACES[part].capitalize()}: all arms")
    if times := parts.get("timing"):
        rows = [
            (
                arm_name(arm),
                f"{1e3 * float(np.median(seconds)):.2f}",
                intervals.text(intervals.over_seeds(timing.ratios(times, arm))),
            )
            for arm, seconds in times["seconds"].items()
        ]
        header = ("arm", "milliseconds, median round", "over dense, mean of rounds")
        out += page.table(header, rows, "Time of a training step")
    return out


def _cell(runs: Results, arm: str, column: str) -> str:
    values = runs.values(arm, column)
    if not values.size:
        return ""
    if column in _FORMATS:
        return _FORMATS[column].format(values.mean())
    return runs.mean(values, column)


def _shuffle(measured: Mapping[str, Any], rng: np.random.Generator) -> dict[str, Any]:
    """Returns the rows with arms exchanged at random, and the times of a round too."""
    out = claim.shuffle_arms(measured, rng)
    if times := out.get("timing"):
        rounds = [rng.permutation(one) for one in zip(*times["seconds"].values(), strict=True)]
        by_arm = zip(times["seconds"], np.transpose(rounds).tolist(), strict=True)
        out["timing"] = {**times, "seconds": dict(by_arm)}
    return out


def _read(measured: Mapping[str, Any]) -> dict[str, Any]:
    results = {part: Results(measured[part]) for part in _COLUMNS if measured.get(part)}
    return results | ({"timing": measured["timing"]} if measured.get("timing") else {})


REPORT = page.Report(
    slug="low_rank",
    title="Low-rank training: the paper's claims on small models",
    source="[Exploring Low Rank Training of Deep Neural Networks, arXiv 2209.13569](https://arxiv.org/abs/2209.13569)",
    claims=claims.CLAIMS,
    places=PLACES,
    read=_read,
    figures=figures.figures,
    setup=_setup,
    tables=_tables,
    shuffle=_shuffle,
)
