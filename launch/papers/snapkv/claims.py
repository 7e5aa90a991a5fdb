"""The eight claims that must hold, with what was measured for each."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from launch.papers.shared.claim import Claim, Evidence
from launch.papers.snapkv import measure, needle_run
from launch.plots import intervals

BASELINES = ("h2o", "streaming_llm", "random")
SMALL, CHAT = "retrieval model", "SmolLM2-135M"


def small_exact(found: Mapping[str, Any], method: str, capacity: int, first: int = 0) -> np.ndarray:
    """Whether each prompt of all seeds is answered, by its tokens from `first` on; [] if not measured."""
    rows = [
        np.asarray(one["accuracy"]["correct"][method][str(capacity)])[:, first:].all(-1)
        for one in found.get("retrieval", {}).values()
    ]
    return np.concatenate(rows) if rows else np.zeros(0)


def small_full(found: Mapping[str, Any], first: int = 0) -> np.ndarray:
    """The same of the full cache."""
    lengths = [one["accuracy"]["length"] for one in found.get("retrieval", {}).values()]
    return small_exact(found, "full", lengths[0], first) if lengths else np.zeros(0)


def needle_digits(
    found: Mapping[str, Any], method: str, capacity: int, tokens: int | None = None
) -> np.ndarray:
    """Right digits [needles, 5] of the haystacks of a length."""
    rows = [
        np.asarray(one["digits"][method][str(capacity)])
        for one in found.get("needles", [])
        if one["tokens"] == tokens
    ]
    return np.concatenate(rows) if rows else np.zeros((0, 5))


def claims(found: Mapping[str, Any]) -> list[Claim]:
    """All of them, of what `experiment.run` has found."""
    return [
        _small_caches(found),
        _pooling(found),
        _baselines(found),
        _last_window(found),
        _questions(found),
        _position(found),
        _latency(found),
        _agnostic(found),
    ]


def _grids(found: Mapping[str, Any]) -> list[needle_run.Grid]:
    there = {one["tokens"] for one in found.get("needles", [])}
    return [grid for grid in needle_run.GRIDS if grid.tokens in there]


def _pairs(found: Mapping[str, Any], one: str, other: str) -> list[tuple[str, Any, Any]]:
    """(where, values, values) of two methods on the same prompts, at a fifth of the prompt."""
    out = []
    if found.get("retrieval"):

        def small(name: str) -> np.ndarray:
            if name == "full":
                return small_full(found)
            return small_exact(found, name, measure.CAPACITY)

        out.append((f"{SMALL}, C = {experiment.CAPACITY}", small(one), small(other)))
    for grid in _grids(found):

        def chat(name: str, grid: needle_run.Grid = grid) -> np.ndarray:
            capacity = 0 if name == "full" else grid.fifth
            return needle_digits(found, name, capacity, grid.tokens).all(-1)

        where = f"{CHAT}, {grid.tokens} tokens, C = {grid.fifth}"
        out.append((where, chat(one), chat(other)))
    return out


def _compare(ones: np.ndarray, others: np.ndarray, names: tuple[str, str]) -> tuple[str, Any]:
    gap = intervals.difference(ones, others)
    shares = [intervals.text(intervals.share(values)) for values in (ones, others)]
    words = f"{names[0]} {shares[0]}, {names[1]} {shares[1]}: difference {intervals.text(gap)}"
    return f"{words} of {len(ones)} prompts", gap


def _small_caches(found: Mapping[str, Any]) -> Claim:
    evidence = []
    for where, ones, others in _pairs(found, "snapkv", "full"):
        words, gap = _compare(ones, others, ("SnapKV", "full cache"))
        evidence.append(Evidence(where, words, gap["value"] >= -0.05))
    big = needle_run.GRIDS[-1]  # where 1,024 tokens are kept
    ones = needle_digits(found, "snapkv", big.others[-1], big.tokens).all(-1)
    if len(ones):
        others = needle_digits(found, "full", 0, big.tokens).all(-1)
        words, gap = _compare(ones, others, ("SnapKV", "full cache"))
        where = f"{CHAT}, {big.tokens} tokens, C = {big.others[-1]}"
        evidence.append(Evidence(where, words, gap["value"] >= -0.01))
    return Claim(
        "S1",
        "Small caches preserve retrieval",
        "SnapKV within 0.05 of the full cache at C = T / 5 (within 0.01 at C = 1,024)",
        evidence,
    )


def _pooling(found: Mapping[str, Any]) -> Claim:
    evidence = []
    for where, ones, others in _pairs(found, "snapkv", "kernel_1"):
        words, gap = _compare(ones, others, ("pooling over 7", "none"))
        evidence.append(Evidence(where, words, gap["low"] > 0))
    return Claim(
        "S2",
        "Pooling is essential for answers of several tokens",
        "max pooling over 7 beats none; the interval of the difference lies above 0",
        evidence,
    )


def _baselines(found: Mapping[str, Any]) -> Claim:
    evidence = []
    for baseline in BASELINES:
        for where, ones, others in _pairs(found, "snapkv", baseline):
            words, gap = _compare(ones, others, ("SnapKV", baseline))
            evidence.append(Evidence(where, words, gap["value"] >= 0.3))
    return Claim(
        "S3",
        "SnapKV beats H2O, StreamingLLM and a random choice",
        "a gap of 0.3 at C = T / 5",
        evidence,
    )


def window_rates(found: Mapping[str, Any]) -> np.ndarray | None:
    """Hit rates [layers, windows] over all seeds."""
    hits = [one["hits"]["hits"] for one in found.get("retrieval", {}).values()]
    if not hits:
        return None
    total_LW2 = np.concatenate([np.asarray(h) for h in hits], axis=2).sum(2)
    return total_LW2[..., 0] / np.maximum(total_LW2[..., 1], 1)


def _last_window(found: Mapping[str, Any]) -> Claim:
    evidence = []
    rates_LW = window_rates(found)
    if rates_LW is not None:
        mean_W = rates_LW.mean(0)
        layers = ", ".join(f"layer {i} {r[-1]:.2f} ({r[0]:.2f})" for i, r in enumerate(rates_LW))
        words = (
            f"last window {mean_W[-1]:.2f}, best of the others {mean_W[:-1].max():.2f}, all others "
            f"on average {mean_W[:-1].mean():.2f}; last (first) of {len(mean_W)}: {layers}"
        )
        evidence.append(Evidence(SMALL, words, bool(mean_W.argmax() == len(mean_W) - 1)))
    return Claim(
        "S4",
        "The last window of the prompt foresees what generation attends to",
        "its choices have the highest hit rate, on average over layers",
        evidence,
    )


def _questions(found: Mapping[str, Any]) -> Claim:
    evidence = []
    runs = list(found.get("retrieval", {}).values())
    parts: list[tuple[str, Any, Any, float]] = []
    if runs:
        same, different = (
            np.concatenate([np.mean(run["overlaps"][key], axis=0) for run in runs])
            for key in ("same", "different")
        )
        parts.append((SMALL, same, different, runs[0]["overlaps"]["chance"]))
    if needles := found.get("needles"):
        same, different = ([n["overlap"][key] for n in needles] for key in ("same", "different"))
        chance = float(np.mean([n["overlap"]["chance"] for n in needles]))
        parts.append((CHAT, same, different, chance))
    for where, same, different, chance in parts:
        gap = intervals.difference(different, same)
        words = (
            f"overlap {intervals.text(intervals.mean(different))} of two questions, "
            f"{intervals.text(intervals.mean(same))} of one question asked twice (by chance "
            f"{chance:.2f}): difference {intervals.text(gap)}"
        )
        evidence.append(Evidence(where, words, gap["high"] < 0))
    return Claim(
        "S5",
        "What is kept depends on the question",
        "different questions share less than the same question does; the interval lies below 0",
        evidence,
    )


def _position(found: Mapping[str, Any]) -> Claim:
    evidence = []
    if runs := list(found.get("retrieval", {}).values()):
        rates = {}
        for question in ("last", "first"):
            hits_E2 = np.concatenate([np.asarray(r[f"kept_{question}"]).sum(0) for r in runs])
            rates[question] = intervals.ratio(hits_E2[:, 0], hits_E2[:, 1])
        exact = {
            (question, name): intervals.share(
                np.concatenate([r["positions"][question][name] for r in runs])
            )
            for question in ("last", "first")
            for name in ("full", "snapkv")
        }
        words = "; ".join(
            f"question {question}: hit rate {intervals.text(rates[question])}, exact match "
            f"{intervals.text(exact[question, 'full'])} full, "
            f"{intervals.text(exact[question, 'snapkv'])} SnapKV"
            for question in ("last", "first")
        )
        near = abs(rates["last"]["value"] - rates["first"]["value"]) <= 0.1
        # Where the model does not answer, what it attends to says nothing about answers.
        near &= all(exact[question, "full"]["value"] >= 0.5 for question in ("last", "first"))
        where = "{lines} lines, C = {capacity}".format(**measure.POSITIONS)
        evidence.append(Evidence(f"{SMALL}, {where}", words, near))
    return Claim(
        "S6",
        "The question may stand before the context or after it",
        "the full cache answers half of both, and hit rates of what is kept differ by 0.1 at most",
        evidence,
    )


def _latency(found: Mapping[str, Any]) -> Claim:
    evidence = []
    if latency := found.get("latency"):
        slopes = {}
        for name, lengths in latency["result"].items():
            medians = [float(np.median(one["ms"])) for one in lengths.values()]
            slopes[name] = intervals.slope([int(n) / 1024 for n in lengths], medians)
        words = ", ".join(f"{name} {s * 1e3:.0f}" for name, s in slopes.items())
        evidence.append(
            Evidence(
                "random weights, 4 layers",
                f"microseconds per token and 1,024 tokens of prompt: {words}",
                abs(slopes["snapkv"]) <= 0.1 * slopes["full"],
            )
        )
    return Claim(
        "S7",
        "Decoding takes as long after a long prompt as after a short one",
        "the slope with SnapKV is at most a tenth of the full cache's",
        evidence,
    )


def _agnostic(found: Mapping[str, Any]) -> Claim:
    evidence = []
    names = ("compressed before the question", "after it")
    if runs := list(found.get("retrieval", {}).values()):
        before, after = (
            np.concatenate([run["agnostic"][key] for run in runs])
            for key in ("before the question", "after the question")
        )
        words, gap = _compare(before, after, names)
        where = f"{SMALL}, C = {experiment.CAPACITY}"
        evidence.append(Evidence(where, words, gap["value"] <= -0.3))
    for grid in _grids(found):
        before, after = (
            needle_digits(found, name, grid.fifth, grid.tokens).all(-1)
            for name in ("before the question", "snapkv")
        )
        words, gap = _compare(before, after, names)
        where = f"{CHAT}, {grid.tokens} tokens, C = {grid.fifth}"
        evidence.append(Evidence(where, words, gap["value"] <= -0.3))
    return Claim(
        "S8",
        "Compressing before the question is known fails",
        "exact match falls by 0.3 at least",
        evidence,
    )
