"""The page of SnapKV: how its claims were measured, with tables."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from espalier.launch.papers.shared import page
from espalier.launch.papers.shared.page import Prose
from espalier.launch.papers.snapkv import (
    claims,
    documentation,
    experiment,
    figures,
    needles,
    results,
    sentences,
)
from espalier.launch.papers.snapkv.results import (
    LABELS,
    LOSS,
    OVERLAP,
    Latency,
    Needles,
    Retrieval,
    Sentences,
)

_PROSE = Prose.of(__name__)


def _setup(parts: page.Parts) -> list[str]:
    out: list[str] = []
    if runs := parts.get("retrieval"):
        out.append(_of_models(runs))
    if answers := parts.get("needles"):
        out.append(
            _PROSE("haystacks", judged=len(answers.haystacks), minutes=_minutes(answers.haystacks))
        )
    if answers := parts.get("sentences"):
        long = f"{len(answers.of(sentences.LONG))} of {sentences.LONG.tokens:,}"
        out.append(
            _PROSE(
                "sentences",
                judged=len(answers.of(sentences.MAIN)),
                long=long,
                minutes=_minutes(answers.contexts),
                questions=len(documentation.DEPTHS),
                words=" to ".join(map(str, documentation.WORDS)),
            )
        )
    if timed := parts.get("latency"):
        names = ("new_tokens", "repeats", "capacity")
        settings = {name: timed.settings[name] for name in names}
        out.append(_PROSE("latency", processes=len(timed.seconds), **settings))
    return [*out, _PROSE("policies"), *page.missing((), tuple(results.PLACES), parts)]


def _minutes(rows: Iterable[Mapping[str, Any]]) -> str:
    return f"{sum(one['seconds'] for one in rows) / 60:.0f} minutes"


def _of_models(runs: Retrieval) -> str:
    left_out = "; ".join(f"seed {seed} {why}" for seed, why in runs.excluded.items())
    return _PROSE(
        "models",
        seeds=", ".join(map(str, runs.models)),
        ends=_ends(),
        left_out=left_out or "none is",
        length=runs.length,
        minutes=_minutes(runs.phases),
    )


def _ends() -> str:
    """Returns the shares of exact answers that end the phases."""
    first, *middle, last = (f"{100 * phase.share:.0f}" for phase in experiment.PHASES.values())
    return f"{', '.join([first, *middle])} and {last} %"


def _tables(parts: page.Parts) -> Iterable[str]:
    if runs := parts.get("retrieval"):
        yield from _phases(runs)
        yield from _accuracy(runs)
    if answers := parts.get("needles"):
        yield from _needles(answers)
    if answers := parts.get("sentences"):
        for size in sentences.SIZES:
            yield from _sentences(answers, size)
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


def _needles(answers: Needles) -> list[str]:
    if not answers.haystacks:
        return []
    rows = []
    for name, capacities in answers.haystacks[0]["digits"].items():
        for capacity in sorted(map(int, capacities)):
            digits = answers.digits((name, capacity))
            losses = list(answers.scores(LOSS, (name, capacity)).values())
            loss = f"{np.mean(losses):.3f}" if losses else ""
            by_digit = " ".join(f"{share:.2f}" for share in digits.mean((0, 1)))
            shares = f"{digits.all(-1).mean():.2f}", f"{digits.mean():.2f}"
            rows.append((name, str(capacity or "all"), loss, *shares, by_digit))
    header = ("method", "C", "loss", "exact answers", "right digits", "digit by digit")
    return page.table(header, rows, f"Numbers in {needles.TOKENS:,} tokens")


def _sentences(answers: Sentences, size: sentences.Size) -> list[str]:
    contexts = answers.of(size)
    rows = []
    for name in next(iter(contexts.values()))["losses"] if contexts else ():
        values = answers.scores(LOSS, name, size), answers.kept(name, size)
        overlaps = answers.scores(OVERLAP, name, size)
        cells = [f"{np.mean(list(one.values())):.3f}" for one in values]
        overlap = f"{np.mean(list(overlaps.values())):.3f}" if overlaps else ""
        capacity = sentences.capacities(size).get(name)
        rows.append((LABELS[name], f"{capacity:,}" if capacity else "", *cells, overlap))
    header = ("method", "C", "loss", "share of the context's worth kept", OVERLAP)
    return page.table(header, rows, f"Sentences in {size.tokens:,} tokens") if rows else []


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
    claims=claims.CLAIMS,
    places=results.PLACES,
    read=results.read,
    figures=figures.figures,
    setup=_setup,
    tables=_tables,
    shuffle=results.shuffle,
    figures_last=True,
    headline=page.Headline(
        claim="S1",
        what="score of answers with a compressed cache against the full one",
        unit="%",
        paper=-2.6,
        measure=claims.in_per_cent,
        part="needles",
        why=_PROSE("why"),
        mind=_PROSE("mind"),
    ),
)
