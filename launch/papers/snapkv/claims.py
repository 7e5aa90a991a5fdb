"""The claims of SnapKV and the effects that judge them.

The retrieval models give one number for each seed. The chat model gives one for each haystack, with intervals from a
bootstrap over haystacks, since the needles of one are not independent.
"""

from collections.abc import Collection, Sequence

import numpy as np

from launch.papers.shared.claim import Claim, Effect, RequiredClaim
from launch.papers.snapkv import measure, needles
from launch.papers.snapkv.effects import (
    chat_unmet,
    compared,
    means,
    on_haystacks,
    over_haystacks,
    over_models,
    pair,
    together,
)
from launch.papers.snapkv.results import BAR, CHAT_BAR, Latency, Needles, Retrieval, rates

BASELINES = {"h2o": "H2O", "streaming_llm": "StreamingLLM", "random": "a random choice"}
LOSS = 0.05  # of exact answers, or of kept positions, that counts as none
CLEAR = 0.1  # of exact answers that counts as a clear gain
LEAD = 0.3  # of the full cache's exact answers
SIMILAR = 0.1  # difference of hit rates that counts as none
FEW = 0.1  # exact answers, of which no share can be lost
LOST = 0.5  # of what compressing after the question keeps
FLAT = 0.1  # of the full cache's slope


_LEAD = "hit rate on average over layers, last window less the best other"


def last_window(runs: Retrieval, where: str) -> list[Effect]:
    """Compares the hit rate of the prompt's last window with the best of those before it."""
    by_seed = {seed: runs.window_rates(seed).mean(0) for seed in runs.sound}
    leads = {seed: _lead(mean_W) for seed, mean_W in by_seed.items()}
    return [over_models(runs, where, _LEAD, leads, above=0.0, note=_averaged(by_seed.values()))]


def last_window_of_chat(results: Needles, where: str) -> list[Effect]:
    """Makes the same comparison on haystacks."""
    haystacks = results.of_length(needles.JUDGED.tokens).values()
    means_W = [rates(one["hits"]).mean(0) for one in haystacks]
    if not means_W:
        return []
    leads = [_lead(mean_W) for mean_W in means_W]
    settings = {"above": 0.0, "unmet": chat_unmet(results), "note": _averaged(means_W)}
    return [over_haystacks(results, where, _LEAD, leads, np.ones(len(leads)), **settings)]


def _lead(mean_W: np.ndarray) -> float:
    return float(mean_W[-1] - mean_W[:-1].max())


def _averaged(means_W: Collection[np.ndarray]) -> str:
    """Returns the hit rates of the last and the best other window after averaging, by which no window is best by luck."""
    if not means_W:
        return ""
    *others, last = np.mean([*means_W], axis=0)
    return f"averaged before windows are compared: last {last:.3f}, best other {max(others):.3f}"


_OVERLAP = "share of kept positions in common, one question asked twice less two questions"


def questions(runs: Retrieval, where: str) -> list[Effect]:
    """Compares the positions kept for two questions with those kept for one question asked twice."""
    overlaps = {seed: runs.models[seed]["overlaps"] for seed in runs.sound}
    same, different = (
        {seed: float(np.mean(one[key])) for seed, one in overlaps.items()}
        for key in ("same", "different")
    )
    gaps = pair(same, different, lambda a, b: a - b)
    note = ""
    if gaps:
        chance = [one["chance"] for one in overlaps.values()]
        note = means(
            ("one question", same.values()), ("two", different.values()), ("by chance", chance)
        )
    return [over_models(runs, where, _OVERLAP, gaps, above=LOSS, note=note)]


def questions_of_chat(results: Needles, where: str) -> list[Effect]:
    """Makes the same comparison on haystacks."""
    overlaps = [one["overlap"] for one in results.of_length(needles.JUDGED.tokens).values()]
    if not overlaps:
        return []
    same, different = (
        np.array([np.mean(one[key]) for one in overlaps]) for key in ("same", "different")
    )
    chance = [one["chance"] for one in overlaps]
    note = means(("one question", same), ("two", different), ("by chance", chance))
    settings = {"above": LOSS, "note": note, "unmet": chat_unmet(results)}
    return [
        over_haystacks(results, where, _OVERLAP, same - different, np.ones_like(same), **settings)
    ]


def position(runs: Retrieval, where: str) -> list[Effect]:
    """Compares questions after the context with questions before it."""
    seeds = runs.sound_at_both
    gaps = {seed: runs.kept_rate(seed, "last") - runs.kept_rate(seed, "first") for seed in seeds}
    words = []
    for question in ("last", "first") if seeds else ():
        rate = np.mean([runs.kept_rate(seed, question) for seed in seeds])
        shares = [runs.models[seed]["positions"][question] for seed in seeds]
        full, snapkv = (np.mean([one[name] for one in shares]) for name in ("full", "snapkv"))
        words.append(
            f"question {question}: hit rate {rate:.2f}, exact {full:.2f} full, {snapkv:.2f} SnapKV"
        )
    lines, capacity = measure.POSITIONS["lines"], measure.POSITIONS["capacity"]
    if left_out := [seed for seed in runs.sound if seed not in seeds]:
        words.append(f"seeds {left_out} do not answer both")
    return [
        over_models(
            runs,
            f"{where}, {lines} lines, C = {capacity}",
            "hit rate of what is kept, question last less question first",
            gaps,
            above=-SIMILAR,
            below=SIMILAR,
            note="; ".join(words),
        )
    ]


def latency(results: Latency, where: str) -> list[Effect]:
    """Compares how decoding time grows with the prompt, once it is longer than the capacity."""
    effects = []
    for batch in results.batches:
        full, snapkv = (results.slopes(batch, name) for name in ("full", "snapkv"))
        note = f"{1e3 * np.median(full):.0f} and {1e3 * np.median(snapkv):.0f} microseconds"
        by_repeat = dict(enumerate((snapkv / full).tolist()))
        effects.append(
            Effect(
                where=f"{where}, batch {batch}",
                what="growth per token of prompt, SnapKV's as a share of the full cache's",
                by_seed=by_repeat,
                above=-FLAT,
                below=FLAT,
                note=f"per 1,024 tokens, full and SnapKV: {note}; one number for each repeat",
            )
        )
    return effects


_LOSS = "exact answers that compressing before the question loses, as a share of those after it"


def agnostic(runs: Retrieval, where: str) -> list[Effect]:
    """Compares compression before the question with compression after it."""
    shares = {seed: runs.models[seed]["agnostic"] for seed in runs.sound}
    before, after = (
        {seed: one[key] for seed, one in shares.items()} for key in ("before", "after")
    )
    lost = {seed: 1 - before[seed] / after[seed] for seed in after if after[seed]}
    note = means(("before", before.values()), ("after", after.values())) if shares else ""
    place = f"{where}, C = {measure.CAPACITY}"
    return [over_models(runs, place, _LOSS, lost, above=LOST, note=note)]


def agnostic_of_chat(results: Needles, where: str) -> list[Effect]:
    """Makes the same comparison on haystacks."""
    before, after = (on_haystacks(results, name) for name in ("before", "snapkv"))
    if not (before.size and after.any()):
        return []
    settings = {"above": LOST, "note": means(("before", before), ("after", after))}
    place, unmet = f"{where}, C = {needles.JUDGED.fifth}", chat_unmet(results)
    if after.mean() < FEW:
        unmet = f"compressing after the question answers {after.mean():.2f}"
    return [over_haystacks(results, place, _LOSS, after - before, after, unmet=unmet, **settings)]


_JUDGES = f"models that answer at least {BAR} with the full cache"

CLAIMS: Sequence[Claim] = (
    RequiredClaim(
        "S1",
        "Small caches preserve retrieval",
        f"at C = T / 5 SnapKV's share of exact answers is at most {LOSS} below the full cache's; {_JUDGES}, and haystacks "
        f"of a chat model that answers at least {CHAT_BAR}",
        compared("snapkv", "full", ("SnapKV", "the full cache"), above=-LOSS),
        paper="retrieval from 140K tokens with 1,024 kept",
    ),
    RequiredClaim(
        "S2",
        "Pooling is essential for answers of several tokens",
        f"max pooling over at least 2 * (answer tokens) - 1 positions gives at least {CLEAR} more exact answers than none",
        compared("snapkv", "kernel_1", ("max pooling", "none"), above=CLEAR),
        paper="LongEval-Lines: pooling over 5 against none, as a figure",
    ),
    RequiredClaim(
        "S3",
        "SnapKV beats H2O, StreamingLLM and a random choice",
        f"at C = T / 5 it answers more, by at least {LEAD} of what the full cache answers (a fixed distance is out of reach "
        "where the full cache answers little)",
        together(
            *(
                compared("snapkv", name, ("SnapKV", label), relative=True, above=LEAD)
                for name, label in BASELINES.items()
            )
        ),
        paper="SnapKV with 1,024 against H2O with 4,096 on LongBench, Mistral: 41.45 against 40.45",
    ),
    Claim(
        "S3b",
        "SnapKV beats TOVA, which asks the last query alone (not a claim of the paper)",
        "at C = T / 5 it answers more, by any amount, as a share of what the full cache answers",
        compared("snapkv", "tova", ("SnapKV", "TOVA"), relative=True, above=0.0),
    ),
    RequiredClaim(
        "S4",
        "The last window of the prompt foresees what generation attends to",
        "its choices have a higher hit rate than those of every other window, on average over layers",
        {"retrieval": [last_window], "needles": [last_window_of_chat]},
        paper="overlap with generation is highest for the last of 20 windows, as a figure",
    ),
    RequiredClaim(
        "S5",
        "The positions kept depend on the question",
        f"two questions share fewer of their positions than one question asked twice, by more than the {LOSS} that S1 counts "
        "as no difference",
        {"retrieval": [questions], "needles": [questions_of_chat]},
        paper="overlap of two questions on one document falls with depth, as a figure",
    ),
    RequiredClaim(
        "S6",
        "The question may be before the context or after it",
        f"hit rates of what is kept differ by less than {SIMILAR}; models that answer at least {BAR} of both with the full "
        "cache",
        {"retrieval": [position]},
        paper="hit rates stay high for both, as a figure",
    ),
    RequiredClaim(
        "S7",
        "Decoding takes as long after a long prompt as after a short one",
        f"for prompts of at least C tokens the slope with SnapKV is between -{FLAT} and {FLAT} of the full cache's",
        {"latency": [latency]},
        paper="below 40 ms a token against above 100 at 16K tokens, batch 2",
    ),
    RequiredClaim(
        "S8",
        "Compressing before the question is known fails",
        f"it loses more than {LOST} of the exact answers that compressing after the question gives at C = T / 5",
        {"retrieval": [agnostic], "needles": [agnostic_of_chat]},
    ),
)
