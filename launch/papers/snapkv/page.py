"""The report of the reproduction."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from launch.papers.shared import page
from launch.papers.snapkv import claims, figures, measure, needles, null, results, sweep
from launch.papers.snapkv.results import BAR, CHAT, SMALL, Latency, Needles, Retrieval

_PLACES = {"retrieval": SMALL, "needles": CHAT, "latency": "random weights, 4 layers"}


def _setup(parts: page.Parts) -> list[str]:
    out: list[str] = []
    if runs := parts.get("retrieval"):
        out += _of_models(runs)
    if answers := parts.get("needles"):
        out += _of_haystacks(answers)
    if timed := parts.get("latency"):
        s = timed.settings
        out.append(
            f"- *Latency*: 4 layers of width 256, random weights; {s['new_tokens']} tokens after prompts of random keys and "
            f"values, by one compiled loop without an end token; {s['repeats']} repeats, the two caches in turn, compilation "
            f"apart. C = {s['capacity']:,}."
        )
    return [
        *out,
        "- Policies see the same prompt, read once, and hold C of its tokens beside those that are generated; StreamingLLM, "
        "whose slots hold both, gets slots for the answer too. The first answer token follows from the whole prompt, so the "
        "tokens after it are what tests a policy.",
        *page.missing((), tuple(_PLACES), parts),
    ]


def _of_models(runs: Retrieval) -> list[str]:
    left_out = "; ".join(f"seed {seed} {why}" for seed, why in runs.excluded.items())
    return [
        f"- *{SMALL}*: 2 layers of width 64, trained here on a synthetic task, seeds "
        f"{', '.join(map(str, runs.models))}. A phase of training ends at {_ends()} exact answers, or at its limit of updates, so "
        f"that seeds differ in their numbers of updates. A model whose full cache answers less than {BAR} of the judged "
        f"prompts is left out: {left_out or 'none is'}. Each seed has {measure.PROMPTS} prompts of its own of "
        f"{runs.length} tokens: 48 lines of a key and four values, one answered question, and the question. Window 8, max "
        "pooling over 7. PyramidKV is not measured here: of two layers it would leave the last a twentieth of C - w.",
    ]


def _ends() -> str:
    """Returns the shares of exact answers that end the phases."""
    first, *middle, last = (f"{100 * phase.share:.0f}" for phase in sweep.PHASES.values())
    return f"{', '.join([first, *middle])} and {last} %"


def _of_haystacks(answers: Needles) -> list[str]:
    sizes, grid = answers.chosen, needles.JUDGED
    return [
        f"- *{CHAT}*: SmolLM2-135M-Instruct from 4-bit weights. Haystacks of the King James Bible: "
        f"{len(answers.of_length(grid.tokens))} of {grid.tokens:,} tokens, which judge, and "
        f"{len(answers.of_length(needles.LONG.tokens))} of {needles.LONG.tokens:,}, too few to judge; five needles in each, "
        "all asked for, question last in the chat format, the answer opened by "
        '"The magic number of ... is". The needles of a haystack are distractors of each other.',
        f"- Window {sizes['window']} and max pooling over {sizes['kernel']}, and a window of {sizes['h2o_window']} for H2O, "
        f"are the best on {len(answers.candidates)} other haystacks (the table of choices). {_of_tova(answers)}",
    ]


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
        cells = [list(runs.exact(name, c).values()) for c in measure.CAPACITIES]
        tokens = [
            cell["tokens"]
            for seed in runs.sound
            if (cell := runs.right(seed, name, measure.CAPACITY)) is not None
        ]
        shares = [f"{np.mean(cell):.2f}" if cell else "" for cell in cells]
        by_token = " ".join(f"{share:.2f}" for share in np.mean(tokens, 0)) if tokens else ""
        rows.append((name, *shares, by_token))
    header = (
        "method",
        *(f"C = {c}" for c in measure.CAPACITIES),
        f"token by token at {measure.CAPACITY}",
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
    intro="The retrieval models give one number for each seed. The chat model gives one for each haystack, with intervals "
    "from a bootstrap over haystacks; the dots of its effects are haystacks.",
    claims=claims.CLAIMS,
    places=_PLACES,
    read=results.read,
    figures=figures.figures,
    setup=_setup,
    tables=_tables,
    shuffle=null.shuffle,
    figures_last=True,
)
