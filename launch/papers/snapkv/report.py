"""The claims of SnapKV and the effects that judge them, with the page.

The retrieval models give one number for each seed. The chat model gives one for each haystack, with intervals from a
bootstrap over haystacks, since the needles of one are not independent.
"""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch.papers.shared import page
from espalier.launch.papers.shared.claim import Claim, Effect
from espalier.launch.papers.shared.page import Prose
from espalier.launch.papers.snapkv import experiment, figures, needles, results
from espalier.launch.papers.snapkv.results import (
    BAR,
    CHAT,
    SMALL,
    Latency,
    Needles,
    Retrieval,
    chat_unmet,
    compared,
    means,
    on_haystacks,
    over_haystacks,
    over_models,
    pair,
    rates,
    together,
)

_PROSE = Prose.of(__name__)

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
    lines, capacity = experiment.POSITIONS["lines"], experiment.POSITIONS["capacity"]
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
    place = f"{where}, C = {experiment.CAPACITY}"
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
    _PROSE.claim(
        "S1", compared("snapkv", "full", ("SnapKV", "the full cache"), above=-LOSS), required=True
    ),
    _PROSE.claim(
        "S2", compared("snapkv", "kernel_1", ("max pooling", "none"), above=CLEAR), required=True
    ),
    _PROSE.claim(
        "S3",
        together(
            *(
                compared("snapkv", name, ("SnapKV", label), relative=True, above=LEAD)
                for name, label in BASELINES.items()
            )
        ),
        required=True,
    ),
    _PROSE.claim("S3b", compared("snapkv", "tova", ("SnapKV", "TOVA"), relative=True, above=0.0)),
    _PROSE.claim(
        "S4", {"retrieval": [last_window], "needles": [last_window_of_chat]}, required=True
    ),
    _PROSE.claim("S5", {"retrieval": [questions], "needles": [questions_of_chat]}, required=True),
    _PROSE.claim("S6", {"retrieval": [position]}, required=True),
    _PROSE.claim("S7", {"latency": [latency]}, required=True),
    _PROSE.claim("S8", {"retrieval": [agnostic], "needles": [agnostic_of_chat]}, required=True),
)


_PLACES = {"retrieval": SMALL, "needles": CHAT, "latency": "random weights, 4 layers"}


def _setup(parts: page.Parts) -> list[str]:
    out: list[str] = []
    if runs := parts.get("retrieval"):
        out.append(_of_models(runs))
    if answers := parts.get("needles"):
        out.append(_of_haystacks(answers))
    if timed := parts.get("latency"):
        names = ("new_tokens", "repeats", "capacity")
        out.append(_PROSE("latency", **{name: timed.settings[name] for name in names}))
    return [*out, _PROSE("policies"), *page.missing((), tuple(_PLACES), parts)]


def _of_models(runs: Retrieval) -> str:
    left_out = "; ".join(f"seed {seed} {why}" for seed, why in runs.excluded.items())
    return _PROSE(
        "models",
        seeds=", ".join(map(str, runs.models)),
        ends=_ends(),
        left_out=left_out or "none is",
        length=runs.length,
    )


def _ends() -> str:
    """Returns the shares of exact answers that end the phases."""
    first, *middle, last = (f"{100 * phase.share:.0f}" for phase in experiment.PHASES.values())
    return f"{', '.join([first, *middle])} and {last} %"


def _of_haystacks(answers: Needles) -> str:
    return _PROSE(
        "haystacks",
        judged=len(answers.of_length(needles.JUDGED.tokens)),
        long=len(answers.of_length(needles.LONG.tokens)),
        candidates=len(answers.candidates),
        tova=_of_tova(answers),
        **answers.chosen,
    )


def _of_tova(answers: Needles) -> str:
    grid = needles.JUDGED
    tova, snapkv = (
        float(answers.exact(grid.tokens, name, grid.fifth).mean()) for name in ("tova", "snapkv")
    )
    if tova > snapkv:
        words, shares = "TOVA, which asks the last query alone, is ahead of SnapKV", (tova, snapkv)
    else:
        words, shares = "SnapKV is not behind TOVA, which asks the last query alone", (snapkv, tova)
    return f"{words}, at C = {grid.fifth}: {shares[0]:.2f} against {shares[1]:.2f} exact answers."


def _tables(parts: page.Parts) -> Iterable[str]:
    if runs := parts.get("retrieval"):
        yield from _phases(runs)
        yield from _accuracy(runs)
    if answers := parts.get("needles"):
        yield from _choices(answers)
        for grid in needles.GRIDS:
            yield from _needles(answers, grid)
    if timed := parts.get("latency"):
        yield from _latency(timed)


def _phases(runs: Retrieval) -> list[str]:
    rows = [
        (
            str(row["seed"]),
            row["arm"],
            f"{row['step']:,}",
            ", ".join(f"{name} {share:.2f}" for name, share in row["reached"].items()),
            f"{row['seconds']:.0f}",
        )
        for row in sorted(runs.phases, key=lambda row: row["seed"])
    ]
    header = (
        "seed",
        "phase",
        "updates",
        "exact answers at its end, by question and lines",
        "seconds",
    )
    return page.table(header, rows, "Retrieval models: phases of training")


def _accuracy(runs: Retrieval) -> list[str]:
    """Returns the table of exact answers, and of right tokens one by one at a fifth of the prompt."""
    names = list(next(iter(runs.models.values()))["accuracy"]["right"])
    rows = []
    for name in names:
        cells = [list(runs.exact(name, c).values()) for c in experiment.CAPACITIES]
        tokens = [
            cell["tokens"]
            for seed in runs.sound
            if (cell := runs.right(seed, name, experiment.CAPACITY)) is not None
        ]
        shares = [f"{np.mean(cell):.2f}" if cell else "" for cell in cells]
        by_token = " ".join(f"{share:.2f}" for share in np.mean(tokens, 0)) if tokens else ""
        rows.append((name, *shares, by_token))
    header = (
        "method",
        *(f"C = {c}" for c in experiment.CAPACITIES),
        f"token by token at {experiment.CAPACITY}",
    )
    return page.table(header, rows, "Retrieval models: exact answers, means over seeds")


def _choices(answers: Needles) -> list[str]:
    capacity = str(needles.CHOOSING.fifth)

    def shown(name: str) -> str:
        right = np.array([one["digits"][name][capacity] for one in answers.candidates])
        return f"{right.all(-1).mean():.2f} ({right.mean():.2f})"

    rows = [
        (str(w), *(shown(f"snapkv {w} {k}") for k in needles.KERNELS), shown(f"h2o {w}"))
        for w in needles.WINDOWS
    ]
    header = ("window", *(f"kernel {k}" for k in needles.KERNELS), "H2O")
    count = needles.CHOOSING.haystacks * 5
    title = f"Choices on {count} needles: exact answers (right digits) at C = {capacity}"
    return page.table(header, rows, title)


def _needles(answers: Needles, grid: needles.Grid) -> list[str]:
    of_length = answers.of_length(grid.tokens)
    if not of_length:
        return []
    cells: Mapping[str, Any] = next(iter(of_length.values()))["digits"]
    rows = [
        (name, capacity if int(capacity) else "all", *_right(answers, grid, name, int(capacity)))
        for name, capacities in cells.items()
        for capacity in sorted(capacities, key=int)
    ]
    header = ("method", "C", "exact answers", "right digits", "digit by digit")
    return page.table(header, rows, f"Needles in {grid.tokens:,} tokens")


def _right(answers: Needles, grid: needles.Grid, name: str, capacity: int) -> tuple[str, ...]:
    digits = answers.digits(grid.tokens, name, capacity)
    by_digit = " ".join(f"{share:.2f}" for share in digits.mean((0, 1)))
    return f"{digits.all(-1).mean():.2f}", f"{digits.mean():.2f}", by_digit


def _latency(timed: Latency) -> list[str]:
    rows = []
    for batch, methods in timed.batches.items():
        for name, lengths in methods.items():
            for length, cell in lengths.items():
                prefill = timed.prefill_seconds[name].get(length) if batch == "1" else None
                rows.append(
                    (
                        *(batch, name, f"{int(length):,}"),
                        f"{np.median(cell['ms']):.2f}",
                        f"{min(cell['ms']):.2f}",
                        "" if prefill is None else f"{prefill:.2f}",
                        f"{cell['compress_ms']:.0f}",
                        f"{cell['cache_bytes'] / 2**20:.0f}",
                        f"{cell['peak_bytes'] / 2**20:.0f}",
                    )
                )
    header = (
        *("batch", "cache", "prompt", "ms per token, median", "least", "reading the prompt, s"),
        *("compression, ms", "cache, MiB", "peak of decoding, MiB"),
    )
    full, snapkv = (timed.longest[name] for name in ("full", "snapkv"))
    return [
        *page.table(header, rows, "Latency"),
        f"Where the full cache of 32 such layers fits prompts of {full:,} tokens at batch 2, SnapKV's fits {snapkv:,}, "
        f"{snapkv / full:.1f} times as many (calculated; the paper: 8.2 times).",
        "",
    ]


REPORT = page.Report(
    slug="snapkv",
    title="SnapKV: the paper's claims, measured",
    source="[arXiv 2404.14469](https://arxiv.org/abs/2404.14469)",
    intro=_PROSE("intro"),
    claims=CLAIMS,
    places=_PLACES,
    read=results.read,
    figures=figures.figures,
    setup=_setup,
    tables=_tables,
    shuffle=results.shuffle,
    figures_last=True,
)
