"""Draws docs/images/architecture.svg from the code: `python docs/architecture.py`.

Packages, their imports, each paper's folders and the seams that its code or its gin files use are read from the sources; only the
names of the seams are written here. `tests/docs_test.py` compares the picture with the code.
"""

import ast
import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).resolve().parent.parent
PICTURE = ROOT / "docs" / "images" / "architecture.svg"

PACKAGES = {
    "launch": "commands, gin",
    "trainers": "anything that runs steps",
    "model": "parameters and maths",
    "data": "texts, tokens, batches",
    "common": "files, stores, tables",
}
COMMON = "espalier/common"


@dataclasses.dataclass(frozen=True)
class Seam:
    """A place where a method joins a package.

    Attributes:
      name: as in docs/extend/seams.md, or shorter.
      imports: modules, or names in them, of which a method that uses the seam imports one.
      bindings: a pattern for what the method's gin files bind.
      files: a glob below launch/papers/NAME, of which a method that uses the seam has a file.
    """

    name: str
    imports: tuple[str, ...] = ()
    bindings: str = "(?!)"
    files: str = ""


LAYERS = r"(transformer\.Block|attention\.\w+|mlp\.\w+|moe\.MoeMlp|moa\.MixtureOfAttention|resnet\.ResNet)"
FACTORIES = r"(attention|cross_attention|mlp|norm|dense|conv|router|shared|expert_dense)"
SEAMS = {
    "launch": (
        Seam("command", ("launch.cli",)),
        Seam("upcycling", ("launch.upcycle",)),
        Seam("judge", ("launch.evaluate.judges",)),
        Seam("suite of benchmarks", files="suite.py"),
        Seam("claims of a paper", files="report.py"),
    ),
    "trainers": (
        Seam("objective", ("trainers.objectives.base.Objective",), r"recipe\.Recipe\.objective"),
        Seam("inputs of a batch", (), r"recipe\.Recipe\.inputs"),
        Seam("feed of own samples", (), r"rollouts\.Rollouts\."),
        Seam("reward", ("trainers.rewards",), r"verifiers\."),
        Seam("stored reference", ("trainers.objectives.frozen_model",), r"frozen_model\."),
        Seam(
            "step extension",
            ("trainers.extensions",),
            r"recipe\.Recipe\.(moving_reference|extensions)",
        ),
        Seam("gradient term", ("trainers.optim.gradient_terms",), r"gradient_terms\.named\."),
        Seam("hook", ("trainers.hooks.Hook",), r"hooks\.named\."),
        Seam("report", (), r"reports\.named\."),
    ),
    "model": (
        Seam("layer factory", (), rf"(\w+/)?{LAYERS}\.{FACTORIES}"),
        Seam("adapter", ("model.adapters.adapter.Adapter",), r"adapter\.named\."),
        Seam("tree transform", ("model.transforms",)),
        Seam("cache policy", ("model.kv_cache.base",)),
        Seam("tap of activations", ("model.kernels.taps",)),
    ),
    "data": (
        Seam("task", ("data.tasks", "data.task")),
        Seam("filter of documents", ("data.text.document_filters",)),
        Seam("mixture, phases", ("data.stream.mixing",), r"stream\.make_stream\.phases"),
    ),
    "common": (),
}


def folder(package: str) -> pathlib.Path:
    """Returns the folder of a package's code."""
    return ROOT / (COMMON if package == "common" else package)


@functools.cache
def imported(path: pathlib.Path) -> frozenset[str]:
    """Returns what a file imports of the project: `model.config.TransformerConfig` for a name of espalier.model.config."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(n.removeprefix("espalier.") for n in names if n.startswith("espalier."))


def edges() -> list[tuple[str, str]]:
    """Returns which package imports which, without imports that follow from others."""
    direct = {
        package: {
            name.partition(".")[0]
            for path in folder(package).rglob("*.py")
            for name in imported(path)
        }
        & (set(PACKAGES) - {package})
        for package in PACKAGES
    }

    def reached(package: str) -> set[str]:
        return set().union(*({other} | reached(other) for other in direct[package]), set())

    return [
        (package, other)
        for package in PACKAGES
        for other in PACKAGES
        if other in direct[package]
        and not any(other in reached(between) for between in direct[package])
    ]


def papers() -> list[str]:
    """Returns the names of the papers in the order of PAPERS.md."""
    text = (ROOT / "PAPERS.md").read_text(encoding="utf-8")
    return re.findall(r"^\| \[(\w+)\]\(launch/papers/\1/README\.md\)", text, re.MULTILINE)


def code(package: str, paper: str) -> list[pathlib.Path]:
    """Returns a paper's files in a package: those of its folder, and a file of its name elsewhere."""
    named = [p for p in folder(package).rglob(f"{paper}.py") if "papers" not in p.parts]
    return [*(folder(package) / paper).rglob("*.py"), *named]


def uses(paper: str, seam: Seam) -> bool:
    """Whether a paper's code or gin files use a seam."""
    if seam.files:
        return any((ROOT / "launch" / "papers" / paper).glob(seam.files))
    names = {n for package in PACKAGES for path in code(package, paper) for n in imported(path)}
    if any((name + ".").startswith(module + ".") for module in seam.imports for name in names):
        return True
    gin = [
        path
        for kind in ("methods", "experiments")
        for path in sorted((ROOT / "t5x_configs" / kind / paper).rglob("*.gin"))
    ]
    pattern = re.compile(rf"^{seam.bindings}[\w.]* *=", re.MULTILINE)
    return any(pattern.search(path.read_text(encoding="utf-8")) for path in gin)


LEFT, LABELS, FIRST, STEP, RIGHT = 60, 70, 262, 48, 752
TOP, ROW, HEAD, GAP = 116, 19, 25, 16
INK, BAND, EDGE, PLUG, CABLE = "#1f2937", "#f2f5f9", "#9aa5b5", "#1d4f91", "#c9d8ec"


def text(x: float, y: float, words: str, size: float = 12.5, **more: str) -> str:
    """Returns the SVG of a line of text."""
    attributes = "".join(f' {name.replace("_", "-")}="{value}"' for name, value in more.items())
    return f'<text x="{x:g}" y="{y:g}" font-size="{size:g}" fill="{INK}"{attributes}>{words}</text>'


def heights() -> dict[str, tuple[int, int]]:
    """Returns top and height of each package's band."""
    result, y = {}, TOP
    for package in PACKAGES:
        height = HEAD + ROW * len(SEAMS[package]) + 5 * bool(SEAMS[package])
        result[package] = (y, height)
        y += height + GAP
    return result


def arrows(bands: dict[str, tuple[int, int]]) -> Iterator[str]:
    """Yields the arrows of imports: straight to the next band, or around those between."""
    order, lane = list(PACKAGES), 36
    line = f'fill="none" stroke="{INK}" stroke-width="1.6" marker-end="url(#tip)"'
    for upper, lower in edges():
        start, end = sum(bands[upper]), bands[lower][0]
        if order.index(lower) == order.index(upper) + 1:
            yield f'<path d="M{LEFT + 26} {start}V{end}" {line}/>'
        else:
            y1, y2 = bands[upper][0] + HEAD / 2, end + HEAD / 2
            yield f'<path d="M{LEFT} {y1:g}H{lane}V{y2:g}H{LEFT}" {line}/>'
            lane -= 18


def draw() -> str:
    """Returns the picture as SVG."""
    bands = heights()
    last_top, last_height = bands["common"]
    bottom = last_top + last_height
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 800 {bottom + 46}" '
        'font-family="Helvetica, Arial, sans-serif">',
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" '
        f'orient="auto"><path d="M0 0L10 5L0 10z" fill="{INK}"/></marker></defs>',
        f'<rect width="800" height="{bottom + 46}" fill="white"/>',
        text(LEFT, 26, "Ten papers as plugs", 15, font_weight="bold"),
        text(LEFT, 46, "in the seams of four packages"),
    ]
    for y, height in bands.values():
        parts.append(
            f'<rect x="{LEFT}" y="{y}" width="{RIGHT - LEFT}" height="{height}" rx="6" fill="{BAND}" stroke="{EDGE}"/>'
        )
    for number, paper in enumerate(papers()):
        x = FIRST + STEP * number + STEP / 2
        used = [
            bands[package][0] + HEAD + ROW * row + ROW / 2
            for package, seams in SEAMS.items()
            for row, seam in enumerate(seams)
            if uses(paper, seam)
        ]
        own = [bands[package][0] + HEAD / 2 for package in PACKAGES if code(package, paper)]
        parts += [
            f'<path d="M{x:g} {TOP - 6}V{max(used + own):g}" stroke="{CABLE}" stroke-width="7"/>',
            text(
                x - 4,
                TOP - 14,
                paper,
                font_weight="bold",
                transform=f"rotate(-38 {x - 4:g} {TOP - 14})",
            ),
        ]
        parts += [
            f'<rect x="{x - 13:g}" y="{y - 7:g}" width="26" height="14" rx="3" fill="{PLUG}"/>'
            for y in own
        ]
        parts += [f'<circle cx="{x:g}" cy="{y:g}" r="5.5" fill="{PLUG}"/>' for y in used]
    for package, (y, _) in bands.items():
        parts += [
            text(LABELS, y + 17, package, 14, font_weight="bold"),
            text(LABELS + 66, y + 17, PACKAGES[package], 11.5),
        ]
        for row, seam in enumerate(SEAMS[package]):
            centre = y + HEAD + ROW * row + ROW / 2
            parts.append(text(LABELS + 12, centre + 4, seam.name))
    parts += [
        *arrows(bands),
        f'<rect x="{LEFT}" y="{bottom + 19}" width="26" height="14" rx="3" fill="{PLUG}"/>',
        text(LEFT + 34, bottom + 31, "code of its own in the package"),
        f'<circle cx="{LEFT + 242}" cy="{bottom + 26}" r="5.5" fill="{PLUG}"/>',
        text(LEFT + 254, bottom + 31, "uses the seam"),
        f'<path d="M{LEFT + 372} {bottom + 26}H{LEFT + 396}" stroke="{INK}" stroke-width="1.6" marker-end="url(#tip)"/>',
        text(LEFT + 404, bottom + 31, "imports (never the other way)"),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


if __name__ == "__main__":
    PICTURE.write_text(draw(), encoding="utf-8")
