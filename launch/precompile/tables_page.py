"""The page of tables that `precompile tables` writes from its reports."""

from collections.abc import Mapping, Sequence
from typing import Any

from espalier.launch.precompile.chips import CHIPS, GIB
from espalier.launch.precompile.table_rows import Row

TITLES = {
    "llama": "Llama 2 7B on every generation",
    "code_mix": "Code in pre-training",
    "low_rank": "Low-rank training",
    "mov": "Mixtures of vectors",
    "bam": "BAM",
    "nexus": "Nexus",
    "preference": "Preference optimisation",
    "aya23": "Aya 23",
    "aya_expanse": "Aya Expanse",
    "snapkv": "SnapKV",
    "influence": "Influence functions",
}
_HEAD = """\
# Full-size configurations on absent TPUs

The full-size programs of the papers, compiled for TPU slices on a CPU host; nothing was run. `espalier precompile tables`
writes this page and [its numbers](precompile_tables.json); [precompile](precompile.md) explains how they are counted.

All figures are of one chip and one execution: an update of a training run, a batch that is read, or a token of each row.

- **HBM**: the most memory in use at one time, of what the chip has.
- **FLOPs**: of the compiled program, recomputation included, and in brackets the share of the model's own. These are the usual
  count, so their share is above 100% where the compiler leaves something out, such as products with the padding of images. Products
  with a single row are not done by the matrix units, and are not counted.
- **sent**: bytes that a chip sends to chips of its slice; after a plus sign, to other slices.
- **least time**: the busiest resource's, at its published rate, if all others work meanwhile. In brackets which one it is.
  A range ends with the time if collectives use the links of one dimension of the torus only.
- **MFU below**: the model's FLOPs in that time, as a share of the chip's peak. Real steps are slower: see it as what a layout
  cannot exceed.

`--rows NAME` compiles single rows, also those that are marked as not compiled yet.
"""
_COLUMNS = (
    "program",
    "chips",
    "layout",
    "batch",
    "HBM",
    "FLOPs",
    "sent",
    "least time",
    "MFU below",
)
_Compiled = Sequence[tuple[Row, Mapping[str, Any]]]
_BUSY = {"compute": "matrix units", "hbm": "HBM", "links": "links", "network": "network"}


def page(tables: Mapping[str, Sequence[Row]], records: Mapping[str, Any]) -> str:
    """Returns the page in Markdown.

    Args:
      tables: rows of each paper.
      records: what `precompile tables` stores by row.
    """
    parts = [_HEAD, _versions(records)]
    for paper, rows in tables.items():
        lines = [_line(_COLUMNS), _line("---" for _ in _COLUMNS)]
        lines += [_row(row, records.get(row.name)) for row in rows]
        notes = [f"- {row.title}: {row.note}" for row in rows if row.note]
        parts.append("\n".join([f"## {TITLES.get(paper, paper)}", "", *lines, ""]))
        parts += ["\n".join(notes) + "\n"] if notes else []
    compiled = [
        (row, report)
        for rows in tables.values()
        for row in rows
        if (report := records.get(row.name, {}).get("report")) and report["fits"]
    ]
    parts += [_times(compiled), _collectives(compiled), _chips()]
    return "\n".join(part for part in parts if part)


def summary(record: Mapping[str, Any]) -> str:
    """Returns the main figures of a record in a line, or why there are none."""
    report = record["report"]
    if report is None:
        return record["problem"]
    hbm, times = report["hbm_bytes"]["peak"], report["roofline_seconds"]
    fits = "fits" if report["fits"] else "does NOT fit"
    line = f"{fits}, {hbm / 1e9:.2f} GB"
    return line + (f", at least {seconds(times['step'])}" if times else "")


def seconds(value: float) -> str:
    """Returns a time with three digits."""
    if value >= 1:
        return f"{value:.3g} s"
    return f"{value * 1e3:.3g} ms"


def _row(row: Row, record: Mapping[str, Any] | None) -> str:
    report = record and record["report"]
    if not record or not report:
        why = record["problem"] if record else "not compiled yet"
        return _line([_title(row), row.topology, why, *[""] * (len(_COLUMNS) - 3)])
    title = _title(row)
    if record["digest"] != row.digest(report["versions"]):
        title += ", compiled from an earlier configuration"
    times, flops = report["roofline_seconds"], report["flops"]
    hbm = f"{report['hbm_bytes']['peak'] / 1e9:.2f} of {report['hbm_available_bytes'] / 1e9:.1f} GB"
    if not report["fits"]:
        return _line(
            [title, row.topology, _layout(report), _batch(report), f"**{hbm}**: does not fit"]
            + [""] * 4
        )
    share = f" ({flops['analytic'] / flops['compiled']:.0%})" if flops["analytic"] else ""
    mfu = times["mfu_bound"]
    return _line(
        [
            title,
            row.topology,
            _layout(report),
            _batch(report),
            hbm,
            f"{flops['compiled'] / 1e12:.3g} T{share}" if flops["compiled"] else "",
            _sent(report),
            _range(seconds(times["step"]), seconds(times["step_one_ring"]))
            + f" ({_BUSY[times['bound_by']]})",
            "" if mfu is None else _range(f"{mfu:.0%}", f"{times['mfu_bound_one_ring']:.0%}"),
        ]
    )


def _title(row: Row) -> str:
    return f"{row.title} (`{row.name}`)"


def _range(first: str, last: str) -> str:
    return first if first == last else f"{first} to {last}"


def _layout(report: Mapping[str, Any]) -> str:
    sizes = [f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1]
    parts = [" x ".join(sizes) or "one chip", f"`{report['rules']}`"]
    if report["program"] == "train" and report["remat"] != "none":
        parts.append(f"remat {report['remat']}")
    return ", ".join(parts)


def _batch(report: Mapping[str, Any]) -> str:
    if report["unit"] == "images":
        return f"{report['batch_size']} images"
    return f"{report['batch_size']} x {report['length']:,}"


def _sent(report: Mapping[str, Any]) -> str:
    kinds = report["collectives"].items()
    between = sum(total["bytes"] for kind, total in kinds if kind.startswith("between"))
    within = sum(total["bytes"] for _, total in kinds) - between
    text = f"{within / 1e9:.3g} GB" if within else "0"
    return text + (f" + {between / 1e9:.3g} GB" if between else "")


def _times(compiled: _Compiled) -> str:
    """Returns the table of what each resource takes at its published rate."""
    if not compiled:
        return ""
    names = {
        "compute": "matrix units",
        "hbm": "HBM",
        "links": "links",
        "one_ring": "links of one ring",
        "network": "network between slices",
    }
    lines = [
        "## Time by resource",
        "",
        "What each resource takes at its published rate; HBM's traffic is an estimate.",
        "",
        _line(["row", *names.values()]),
        _line(["---"] * (len(names) + 1)),
    ]
    for row, report in compiled:
        times = report["roofline_seconds"]
        cells = [seconds(times[name]) if times[name] else "" for name in names]
        lines.append(_line([f"`{row.name}`", *cells]))
    return "\n".join(lines) + "\n"


def _collectives(compiled: _Compiled) -> str:
    """Returns the table of collectives: executions with loops counted, and bytes sent."""
    kinds = sorted({kind for _, report in compiled for kind in report["collectives"]})
    if not kinds:
        return ""
    lines = [
        "## Collectives",
        "",
        "Executions, trips of loops included, and bytes that a chip sends in them.",
        "",
        _line(["row", *kinds]),
        _line(["---"] * (len(kinds) + 1)),
    ]
    for row, report in compiled:
        totals = (report["collectives"].get(kind) for kind in kinds)
        cells = [f"{t['count']:,}: {t['bytes'] / 1e9:.3g} GB" if t else "" for t in totals]
        lines.append(_line([f"`{row.name}`", *cells]))
    return "\n".join(lines) + "\n"


def _chips() -> str:
    head = (
        "chip",
        "HBM for a program",
        "bfloat16",
        "HBM",
        "a link, one direction",
        "links",
        "network",
    )
    lines = [
        "## Chips",
        "",
        "Published rates of a chip: Google's pages on [v4](https://docs.cloud.google.com/tpu/docs/v4), "
        "[v5e](https://docs.cloud.google.com/tpu/docs/v5e), [v5p](https://docs.cloud.google.com/tpu/docs/v5p) and "
        "[v6e](https://docs.cloud.google.com/tpu/docs/v6e), for links "
        "[How to scale your model](https://jax-ml.github.io/scaling-book/tpus). The memory is what the compiler grants.",
        "",
        _line(head),
        _line(["---"] * len(head)),
    ]
    for name, chip in CHIPS.items():
        lines.append(
            _line(
                [
                    *(
                        name,
                        f"{chip.hbm_bytes / GIB:.2f} GiB",
                        f"{chip.peak_flops / 1e12:.0f} TFLOP/s",
                    ),
                    *(f"{chip.hbm_rate / 1e9:,.0f} GB/s", f"{chip.link_rate / 1e9:.0f} GB/s"),
                    *(str(2 * chip.dimensions), f"{chip.network_rate / 1e9:.3g} GB/s"),
                ]
            )
        )
    return "\n".join(lines) + "\n"


def _versions(records: Mapping[str, Any]) -> str:
    reports = [record["report"] for record in records.values() if record["report"]]
    known = {tuple(sorted(report["versions"].items())) for report in reports}
    named = "; ".join(", ".join(f"{n} {v}" for n, v in one) for one in sorted(known))
    return f"Compiled with {named}.\n" if named else ""


def _line(cells) -> str:
    return "| " + " | ".join(cells) + " |"
