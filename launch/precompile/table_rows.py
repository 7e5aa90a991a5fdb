"""Full-size configurations of the papers that `precompile tables` compiles for absent TPUs, and the page of their tables.

Each paper lists its own as ROWS in a file of its folder. model_rows.py has those of models that are of no one paper.
"""

import dataclasses
import hashlib
import importlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from espalier.launch import cli
from espalier.launch.precompile.tpu_topology import CHIPS, GIB

TITLES = {
    "llama": "Llama 2 7B on every generation",
    "cohere2_moe": "Cohere's mixtures",
    "long_rows": "Rows of 131,072 tokens",
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
writes this page and [its numbers](precompile_tables.json); [a page](../scale/precompile_report.md) explains what they count.

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
_BUSY = {"compute": "matrix units", "hbm": "HBM", "links": "links", "network": "network"}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Row:
    """One program of a table.

    Attributes:
      name: unique among all papers.
      title: what is compiled, for a reader.
      files: gin files.
      topology: see launch/precompile/tpu_topology.py.
      bindings: 'NAME=VALUE'. Values of macros that only data need may be any.
      flags: further flags of `precompile`.
      note: a sentence for the page.
      fits: whether the program fits its chips; a row that is there because it does not has a note that says why.
      hbm_gb: the most memory of a chip, in GB (1e9 bytes); None without a bound.
      sent_gb: the most that a chip sends, in GB; None without a bound.
      bounds_from: where the bounds come from.
    """

    name: str
    title: str
    files: tuple[str, ...]
    topology: str
    bindings: tuple[str, ...] = ()
    flags: tuple[str, ...] = ()
    note: str = ""
    fits: bool = True
    hbm_gb: float | None = None
    sent_gb: float | None = None
    bounds_from: str = ""

    @property
    def words(self) -> list[str]:
        """Arguments of `espalier precompile`."""
        files = [f"--gin_file={file}" for file in self.files]
        bindings = [f"--gin.{binding}" for binding in self.bindings]
        return [*files, f"--topology={self.topology}", *bindings, *self.flags]

    def digest(self, versions: dict[str, str]) -> str:
        """Returns a digest of the program's definition and of the compiler's versions.

        The definition is the final value of each binding, wherever the files have it, and the command's flags.
        """
        from espalier.launch.config import gin_config, moved

        checked = gin_config.check(self.files, self.bindings, fragment=True)
        values = {name: bound.meaning() for name, bound in checked.macros.items()}
        for (scope, target, argument), bound in checked.bindings.items():
            values[f"{scope}/{target}.{argument}"] = bound.meaning()
        definition = [values, self.topology, self.flags, versions]
        text = moved.as_before(json.dumps(definition, sort_keys=True, default=str))
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def broken(self, report: Mapping[str, Any]) -> list[str]:
        """Returns what a report breaks of what the row states: whether it fits, and its bounds."""
        if report["fits"] != self.fits:
            return ["does not fit" if self.fits else "fits, but its row says that it does not"]
        sent = sum(total["bytes"] for total in (report["collectives"] or {}).values())
        figures = {"HBM": (report["hbm_bytes"]["peak"], self.hbm_gb), "sent": (sent, self.sent_gb)}
        return [
            f"{name}: {size / 1e9:.2f} GB of at most {bound:.2f} ({self.bounds_from})"
            for name, (size, bound) in figures.items()
            if bound is not None and size > bound * 1e9
        ]


def tokens(rows: int, length: int) -> tuple[str, str]:
    """Returns the bindings of a batch of rows of tokens."""
    return (f"BATCH_SIZE={rows}", f'TASK_FEATURE_LENGTHS={{"targets": {length}}}')


def mesh(rules: str, **sizes: int) -> tuple[str, str]:
    """Returns the bindings of a mesh and a rule set."""
    return (f"MESH={json.dumps(sizes)}", f"recipe.Recipe.rules='{rules}'")


def rows() -> dict[str, tuple[Row, ...]]:
    """Returns {paper or model: its rows}.

    Raises:
      ValueError: a name that two rows have.
    """
    models = importlib.import_module("espalier.launch.precompile.model_rows")
    tables: dict[str, tuple[Row, ...]] = dict(models.ROWS)
    for paper, module in cli.papers_with(r"^ROWS\b"):
        tables[paper] = importlib.import_module(module).ROWS
    names = [row.name for table in tables.values() for row in table]
    if twice := {name for name in names if names.count(name) > 1}:
        raise ValueError(f"launch/papers/ has several rows named {sorted(twice)}.")
    return tables


_Compiled = Sequence[tuple[Row, Mapping[str, Any]]]


def page(tables: Mapping[str, Sequence[Row]], records: Mapping[str, Any]) -> str:
    """Returns the page in Markdown.

    Args:
      tables: rows of each paper.
      records: what `precompile tables` stores by row.
    """
    parts = [_HEAD, _versions(records)]
    for paper, rows in tables.items():
        cells = (_row(row, records.get(row.name)) for row in rows)
        parts.append(_section(TITLES.get(paper, paper), "", _COLUMNS, cells))
        notes = [f"- {row.title}: {row.note}" for row in rows if row.note]
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


def _digits(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _section(title: str, text: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Returns a heading, a sentence, and a table."""
    table = (header, ["---"] * len(header), *rows)
    lines = (f"| {' | '.join(cells)} |" for cells in table)
    return "\n".join([f"## {title}", "", *([text, ""] if text else []), *lines]) + "\n"


def _row(row: Row, record: Mapping[str, Any] | None) -> Sequence[str]:
    report = record and record["report"]
    if not record or not report:
        why = record["problem"] if record else "not compiled yet"
        return [_title(row), row.topology, why, *[""] * (len(_COLUMNS) - 3)]
    title = _title(row)
    if record["digest"] != row.digest(report["versions"]):
        title += ", compiled from an earlier configuration"
    times, flops = report["roofline_seconds"], report["flops"]
    hbm = f"{report['hbm_bytes']['peak'] / 1e9:.2f} of {report['hbm_available_bytes'] / 1e9:.1f} GB"
    if not report["fits"]:
        start = (title, row.topology, _layout(report), _batch(report))
        return [*start, f"**{hbm}**: does not fit", *[""] * 4]
    share = f" ({flops['analytic'] / flops['compiled']:.0%})" if flops["analytic"] else ""
    mfu = times["mfu_bound"]
    return [
        title,
        row.topology,
        _layout(report),
        _batch(report),
        hbm,
        f"{_digits(flops['compiled'] / 1e12)} T{share}" if flops["compiled"] else "",
        _sent(report),
        _range(seconds(times["step"]), seconds(times["step_one_ring"]))
        + f" ({_BUSY[times['bound_by']]})",
        "" if mfu is None else _range(f"{mfu:.0%}", f"{times['mfu_bound_one_ring']:.0%}"),
    ]


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
    rows = []
    for row, report in compiled:
        times = report["roofline_seconds"]
        cells = [seconds(times[name]) if times[name] else "" for name in names]
        rows.append([f"`{row.name}`", *cells])
    text = "What each resource takes at its published rate; HBM's traffic is an estimate."
    return _section("Time by resource", text, ["row", *names.values()], rows)


def _collectives(compiled: _Compiled) -> str:
    """Returns the table of collectives: executions with loops counted, and bytes sent."""
    kinds = sorted({kind for _, report in compiled for kind in report["collectives"]})
    if not kinds:
        return ""
    rows = []
    for row, report in compiled:
        totals = (report["collectives"].get(kind) for kind in kinds)
        cells = [f"{t['count']:,}: {t['bytes'] / 1e9:.3g} GB" if t else "" for t in totals]
        rows.append([f"`{row.name}`", *cells])
    text = "Executions, trips of loops included, and bytes that a chip sends in them."
    return _section("Collectives", text, ["row", *kinds], rows)


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
    text = (
        "Published rates of a chip: Google's pages on [v4](https://docs.cloud.google.com/tpu/docs/v4), "
        "[v5e](https://docs.cloud.google.com/tpu/docs/v5e), [v5p](https://docs.cloud.google.com/tpu/docs/v5p) and "
        "[v6e](https://docs.cloud.google.com/tpu/docs/v6e), for links "
        "[How to scale your model](https://jax-ml.github.io/scaling-book/tpus). The memory is what the compiler grants."
    )
    rows = [
        [
            *(name, f"{chip.hbm_bytes / GIB:.2f} GiB", f"{chip.peak_flops / 1e12:.0f} TFLOP/s"),
            *(f"{chip.hbm_rate / 1e9:,.0f} GB/s", f"{chip.link_rate / 1e9:.0f} GB/s"),
            *(str(2 * chip.dimensions), f"{chip.network_rate / 1e9:.3g} GB/s"),
        ]
        for name, chip in CHIPS.items()
    ]
    return _section("Chips", text, head, rows)


def _versions(records: Mapping[str, Any]) -> str:
    reports = [record["report"] for record in records.values() if record["report"]]
    known = {tuple(sorted(report["versions"].items())) for report in reports}
    named = "; ".join(", ".join(f"{n} {v}" for n, v in one) for one in sorted(known))
    return f"Compiled with {named}.\n" if named else ""
