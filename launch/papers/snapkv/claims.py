"""The eight claims of SnapKV and how each is measured."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from launch.papers.shared.claim import Claim, Evidence
from launch.papers.snapkv import measure, needles
from launch.papers.snapkv.results import CHAT, SMALL, Results
from launch.plots import intervals

BASELINES = ("h2o", "streaming_llm", "random")
_QUESTIONS = ("last", "first")
Case = tuple[str, np.ndarray, np.ndarray]  # where, and values of two methods on the same prompts


def _at_a_fifth(results: Results, one: str, other: str) -> list[Case]:
    """Returns two methods on the retrieval models and on haystacks, at a fifth of the prompt."""
    cases: list[Case] = []
    if results.runs:
        small = (results.exact(name, measure.CAPACITY) for name in (one, other))
        cases.append((f"{SMALL}, C = {measure.CAPACITY}", *small))
    return [
        *cases,
        *(_on_haystacks(results, grid, grid.fifth, one, other) for grid in results.grids),
    ]


def _on_haystacks(results: Results, grid: needles.Grid, capacity: int, *methods: str) -> Case:
    ones, others = (results.digits(name, capacity, grid.tokens).all(-1) for name in methods)
    return f"{CHAT}, {grid.tokens} tokens, C = {capacity}", ones, others


def _judge(
    cases: Sequence[Case],
    names: tuple[str, str],
    holds: Callable[[Mapping[str, float]], bool],
) -> list[Evidence]:
    """Returns the evidence of a condition on the differences of two methods."""
    evidence = []
    for where, ones, others in cases:
        gap = intervals.difference(ones, others)
        shares = [intervals.text(intervals.share(values)) for values in (ones, others)]
        words = f"{names[0]} {shares[0]}, {names[1]} {shares[1]}: difference {intervals.text(gap)}"
        evidence.append(Evidence(where, f"{words} of {len(ones)} prompts", holds(gap)))
    return evidence


def small_caches(results: Results, _: str) -> list[Evidence]:
    """Compares SnapKV with the full cache."""
    names = ("SnapKV", "full cache")
    cases = _at_a_fifth(results, "snapkv", "full")
    evidence = _judge(cases, names, lambda gap: gap["value"] >= -0.05)
    big = needles.GRIDS[-1]  # where 1,024 tokens are kept
    if big in results.grids:
        case = _on_haystacks(results, big, big.others[-1], "snapkv", "full")
        evidence += _judge([case], names, lambda gap: gap["value"] >= -0.01)
    return evidence


def pooling(results: Results, _: str) -> list[Evidence]:
    """Compares pooling of the votes with none."""
    cases = _at_a_fifth(results, "snapkv", "kernel_1")
    return _judge(cases, ("pooling over 7", "none"), lambda gap: gap["low"] > 0)


def baselines(results: Results, _: str) -> list[Evidence]:
    """Compares SnapKV with other policies."""
    return [
        evidence
        for baseline in BASELINES
        for evidence in _judge(
            _at_a_fifth(results, "snapkv", baseline),
            ("SnapKV", baseline),
            lambda gap: gap["value"] >= 0.3,
        )
    ]


def last_window(results: Results, _: str) -> list[Evidence]:
    """Compares the hit rate of the prompt's last window with those of windows before it."""
    rates_LW = results.window_rates
    if rates_LW is None:
        return []
    mean_W = rates_LW.mean(0)
    layers = ", ".join(f"layer {i} {r[-1]:.2f} ({r[0]:.2f})" for i, r in enumerate(rates_LW))
    words = (
        f"last window {mean_W[-1]:.2f}, best of the others {mean_W[:-1].max():.2f}, all others "
        f"on average {mean_W[:-1].mean():.2f}; last (first) of {len(mean_W)}: {layers}"
    )
    return [Evidence(SMALL, words, bool(mean_W.argmax() == len(mean_W) - 1))]


def questions(results: Results, _: str) -> list[Evidence]:
    """Compares the positions kept for two questions with those kept for one question asked twice."""
    cases: list[tuple[str, Any, Any, float]] = []
    if runs := results.runs:
        same, different = (
            np.concatenate([np.mean(run["overlaps"][key], axis=0) for run in runs])
            for key in ("same", "different")
        )
        cases.append((SMALL, same, different, runs[0]["overlaps"]["chance"]))
    if overlaps := [one["overlap"] for one in results.needles]:
        same, different, chance = (
            [one[key] for one in overlaps] for key in ("same", "different", "chance")
        )
        cases.append((CHAT, same, different, float(np.mean(chance))))
    evidence = []
    for where, same, different, chance in cases:
        gap = intervals.difference(different, same)
        words = (
            f"overlap {intervals.text(intervals.mean(different))} of two questions, "
            f"{intervals.text(intervals.mean(same))} of one question asked twice (by chance "
            f"{chance:.2f}): difference {intervals.text(gap)}"
        )
        evidence.append(Evidence(where, words, gap["high"] < 0))
    return evidence


def position(results: Results, _: str) -> list[Evidence]:
    """Compares questions after the context with questions before it."""
    if not (runs := results.runs):
        return []
    rates, full, words = {}, {}, []
    for question in _QUESTIONS:
        hits_E2 = np.concatenate([np.asarray(r[f"kept_{question}"]).sum(0) for r in runs])
        rates[question] = intervals.ratio(hits_E2[:, 0], hits_E2[:, 1])
        full[question], snapkv = (
            intervals.share(np.concatenate([r["positions"][question][name] for r in runs]))
            for name in ("full", "snapkv")
        )
        words.append(
            f"question {question}: hit rate {intervals.text(rates[question])}, exact match "
            f"{intervals.text(full[question])} full, {intervals.text(snapkv)} SnapKV"
        )
    near = abs(rates["last"]["value"] - rates["first"]["value"]) <= 0.1
    # Where the model does not answer, its attention says nothing about answers.
    near &= all(full[question]["value"] >= 0.5 for question in _QUESTIONS)
    where = "{lines} lines, C = {capacity}".format(**measure.POSITIONS)
    return [Evidence(f"{SMALL}, {where}", "; ".join(words), near)]


def latency(results: Results, _: str) -> list[Evidence]:
    """Compares how decoding time grows with the prompt."""
    if not results.latency:
        return []
    slopes = {}
    for name, lengths in results.latency["result"].items():
        medians = [float(np.median(one["ms"])) for one in lengths.values()]
        slopes[name] = intervals.slope([int(n) / 1024 for n in lengths], medians)
    shown = ", ".join(f"{name} {s * 1e3:.0f}" for name, s in slopes.items())
    words = f"microseconds per token and 1,024 tokens of prompt: {shown}"
    flat = abs(slopes["snapkv"]) <= 0.1 * slopes["full"]
    return [Evidence("random weights, 4 layers", words, flat)]


def agnostic(results: Results, _: str) -> list[Evidence]:
    """Compares compression before the question with compression after it."""
    cases: list[Case] = []
    if runs := results.runs:
        before, after = (
            np.concatenate([run["agnostic"][f"{when} the question"] for run in runs])
            for when in ("before", "after")
        )
        cases.append((f"{SMALL}, C = {measure.CAPACITY}", before, after))
    cases += [
        _on_haystacks(results, grid, grid.fifth, "before the question", "snapkv")
        for grid in results.grids
    ]
    names = ("compressed before the question", "after it")
    return _judge(cases, names, lambda gap: gap["value"] <= -0.3)


CLAIMS = (
    Claim(
        "S1",
        "Small caches preserve retrieval",
        "SnapKV within 0.05 of the full cache at C = T / 5 (within 0.01 at C = 1,024)",
        {"all": [small_caches]},
    ),
    Claim(
        "S2",
        "Pooling is essential for answers of several tokens",
        "max pooling over 7 beats none; the interval of the difference lies above 0",
        {"all": [pooling]},
    ),
    Claim(
        "S3",
        "SnapKV beats H2O, StreamingLLM and a random choice",
        "a gap of 0.3 at C = T / 5",
        {"all": [baselines]},
    ),
    Claim(
        "S4",
        "The last window of the prompt foresees what generation attends to",
        "its choices have the highest hit rate, on average over layers",
        {"all": [last_window]},
    ),
    Claim(
        "S5",
        "The positions kept depend on the question",
        "different questions share less than the same question does; the interval lies below 0",
        {"all": [questions]},
    ),
    Claim(
        "S6",
        "The question may be before the context or after it",
        "the full cache answers half of both, and hit rates of what is kept differ by 0.1 at most",
        {"all": [position]},
    ),
    Claim(
        "S7",
        "Decoding takes as long after a long prompt as after a short one",
        "the slope with SnapKV is at most a tenth of the full cache's",
        {"all": [latency]},
    ),
    Claim(
        "S8",
        "Compressing before the question is known fails",
        "exact match falls by 0.3 at least",
        {"all": [agnostic]},
    ),
)
