"""The pages of the site that are made from the code: commands, macros, gin files, families, metrics, refusals, the API.

They are made whenever the site is built, and are not in the repository: they cannot be out of date, and changes that are made
side by side do not meet in them. Without the site, the same facts are in `espalier COMMAND --help`, the headers of gin files and
docstrings. `docs/build.py` calls `pages`; a name that no longer exists is an error.
"""

import argparse
import collections
import contextlib
import importlib
import inspect
import io
import json
import os
import pathlib
import re
import runpy
import sys
from collections.abc import Iterable, Mapping, Sequence

import metric_names
from api_names import API, SHAPES

ROOT = pathlib.Path(__file__).resolve().parent.parent
CONFIGS = ROOT / "t5x_configs"
RECORDED = ROOT / "tests" / "launch" / "goldens" / "earlier_runs"  # small runs that tests continue
_EXPERIMENTS = "experiments/"
_SHOWN_FILES = 4  # in a row of the table of macros
_SHOWN_VALUE = 48  # characters


class Parsed(Exception):  # noqa: N818
    """Ends a command when its flags are known; its argument is the parser."""


def pages() -> dict[str, str]:
    """Returns the text of each generated page by its name."""
    return {
        **commands(),
        "reference/macros.md": macros(),
        "reference/gin_files.md": gin_files(),
        "reference/families.md": families(),
        "reference/metrics.md": metrics(),
        "reference/refusals.md": refusals(),
        **api(),
    }


def _plain(text: str) -> str:
    """Returns text of the code with no meaning in Markdown."""
    return re.sub(r"([<*\[\]$\\])", r"\\\1", text)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    cells = [[cell.replace("|", "\\|").replace("\n", " ") for cell in row] for row in rows]
    lines = [head, ["---"] * len(head), *cells]
    return "\n".join("| " + " | ".join(row) + " |" for row in lines)


def _code(text: str) -> str:
    return f"`{text}`" if text else ""


def _tree(names: Iterable[str]) -> str:
    return "\n".join(["```{toctree}", ":maxdepth: 1", "", *names, "```"])


def _parser_of(module: str) -> argparse.ArgumentParser | None:
    """Returns the parser of a command, which does not run; None if its flags depend on its first argument."""
    from espalier.launch import cli

    def stop(parser: argparse.ArgumentParser, *args: object, **options: object) -> None:
        raise Parsed(parser)

    before, words = cli._Parser.parse_known_args, sys.argv
    cli._Parser.parse_known_args, sys.argv = stop, [module]  # type: ignore[method-assign]
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            importlib.import_module(module).main([])
    except Parsed as parsed:
        return parsed.args[0]
    except SystemExit:
        return None
    finally:
        cli._Parser.parse_known_args, sys.argv = before, words  # type: ignore[method-assign]
    raise RuntimeError(f"{module} has no flags")


def _help_of(module: str) -> str:
    """Returns what a command prints for --help."""
    shown, words = io.StringIO(), sys.argv
    sys.argv = [module, "--help"]
    sys.modules.pop(module, None)  # it runs as a program
    try:
        with contextlib.redirect_stdout(shown), contextlib.suppress(SystemExit):
            runpy.run_module(module, run_name="__main__")
    finally:
        sys.argv = words
    return shown.getvalue()


def _flag_rows(parser: argparse.ArgumentParser, group: argparse._ArgumentGroup) -> list[list[str]]:
    rows = []
    formatter = parser._get_formatter()
    for action in group._group_actions:
        if isinstance(action, argparse._HelpAction) or action.help == argparse.SUPPRESS:
            continue
        value = ""
        if action.nargs != 0:
            choices = action.choices and "{" + ",".join(map(str, action.choices)) + "}"
            value = str(action.metavar or choices or action.dest.upper())
        names = ", ".join(action.option_strings)
        flag = f"{names}{'=' if names and value else ''}{value}"
        default = "required" if action.required and names else ""
        if action.default not in (None, argparse.SUPPRESS, [], False):
            default = _code(str(action.default))
        says = formatter._expand_help(action) if action.help else ""
        rows.append([_code(flag), _plain(says), default])
    return rows


def _command(title: str, module: str) -> str:
    """Returns the section of a command: its use, flags and examples."""
    from espalier.launch import cli

    command = importlib.import_module(module)
    main = getattr(command, "main", None)
    if main is not None and not inspect.signature(main).parameters:  # another project's flags
        return f"{title}\n\n```\n{str(command.__doc__).strip()}\n```"
    parser = None if main is None else _parser_of(module)
    if parser is None:
        return f"{title}\n\n```\n{_help_of(module).strip()}\n```"
    parts = [title, _plain(parser.description or cli.summary(module))]
    parts.append(f"```\n{parser.format_usage().strip()}\n```")
    for group in parser._action_groups:
        if rows := _flag_rows(parser, group):
            parts.append(f"{str(group.title).capitalize()}:")
            parts.append(_table(("flag", "meaning", "default"), rows))
    if parser.epilog:
        parts.append(f"```\n{parser.epilog.strip()}\n```")
    return "\n\n".join(parts)


def commands() -> dict[str, str]:
    """Returns a page for each command, and one that lists them."""
    from espalier.launch import cli

    os.environ["COLUMNS"] = "100"  # of the help texts
    texts = {}
    rows = []
    for name in cli.command_names():
        module = cli.module_of(name)
        parts = [_command(f"# `espalier {name}`", module)]
        for part, its_module in cli.sub_commands(name).items():
            parts.append(_command(f"## `espalier {name} {part}`", its_module))
        texts[f"reference/commands/{name}.md"] = "\n\n".join(parts) + "\n"
        rows.append([f"[`{name}`](commands/{name}.md)", cli.summary(module)])
    text = [
        "# Commands",
        "`espalier COMMAND --help` prints the same.",
        _table(("command", "what it does"), rows),
        _tree(f"commands/{name}" for name in cli.command_names()),
    ]
    texts["reference/commands.md"] = "\n\n".join(text) + "\n"
    return texts


def _gin_sources() -> dict[str, str]:
    return {
        str(path.relative_to(CONFIGS)): path.read_text("utf-8")
        for path in sorted(CONFIGS.rglob("*.gin"))
    }


def _meanings() -> dict[str, str]:
    """Returns what the table of macros in docs/reference/configuration.md says, by macro."""
    text = (ROOT / "docs/reference/configuration.md").read_text("utf-8")
    rows = re.findall(r"^\| (`[A-Z_`, ]+`) \| (.*) \|$", text, re.MULTILINE)
    plain = {names: re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", meaning) for names, meaning in rows}
    return {name: says for names, says in plain.items() for name in re.findall(r"[A-Z_]+", names)}


def macros() -> str:
    """Returns the page of macros: defaults and files, and what comments or the configuration page say."""
    found: dict[str, list[tuple[str, str, str]]] = collections.defaultdict(list)
    for file, text in _gin_sources().items():
        for name, value, comment in re.findall(
            r"^([A-Z][A-Z0-9_]*) = (.*?)(?:  # (.*))?$", text, re.MULTILINE
        ):
            found[name].append((file, value, comment))
    meanings, rows = _meanings(), []
    for name, places in sorted(found.items()):
        general = [p for p in places if not p[0].startswith(_EXPERIMENTS)] or places
        values = collections.Counter(value for _, value, _ in general)
        comments = dict.fromkeys(comment for _, _, comment in general if comment)
        one = len(values) == 1 and len(next(iter(values))) <= _SHOWN_VALUE
        value = _code(next(iter(values))) if one else "see the files"
        files = [_code(file) for file, _, _ in general]
        more = len(files) - _SHOWN_FILES
        shown = ", ".join(files[:_SHOWN_FILES]) + (f" and {more} more" if more > 0 else "")
        meaning = meanings.get(name) or _plain("; ".join(comments))
        rows.append([_code(name), meaning, value.replace("%gin.REQUIRED", "required"), shown])
    head = (
        "# Macros\n\nA macro is a setting of a gin file in capitals: `--gin.NAME=VALUE` sets it. "
        f"These are all {len(rows)} that files of `t5x_configs/` set; of experiments only where no other file sets them."
    )
    return f"{head}\n\n{_table(('macro', 'meaning', 'value', 'files'), rows)}\n"


def gin_files() -> str:
    """Returns the page of gin files: what the header of each says, by folder."""
    folders: dict[str, list[list[str]]] = collections.defaultdict(list)
    for file, text in _gin_sources().items():
        header = re.match(r"(?:#.*\n)*", text)
        lines = [line.lstrip("#").strip() for line in (header[0] if header else "").splitlines()]
        includes = re.findall(r"^include 't5x_configs/(.*)'", text, re.MULTILINE)
        folder, _, name = file.rpartition("/")
        folders[folder].append(
            [_code(name), _plain(" ".join(lines)), ", ".join(map(_code, includes))]
        )
    parts = ["# Gin files", "The files of `t5x_configs/`, by folder, with their own headers."]
    for folder, rows in folders.items():
        parts += [f"## {folder}", _table(("file", "what it says", "includes"), rows)]
    return "\n\n".join(parts) + "\n"


def families() -> str:
    """Returns the page of the model families that are exchanged with Hugging Face."""
    from espalier.model.hf.registry import FAMILIES

    rows = []
    for family in FAMILIES:
        only = [f"`{key}` = `{value!r}`" for key, value in family.neutral.items()]
        model = getattr(family.model_class, "__name__", "")
        rows.append([_code(family.name), _code(family.architecture), _code(model), "; ".join(only)])
    head = ("`model_type`", "architecture", "model here", "fields with one supported value")
    return "\n\n".join(
        [
            "# Model families",
            "Models of these families are read from Hugging Face's `config.json` and safetensors and written to them. A model is "
            "supported if the `config.json` that is written from its description is read back as the same model; a field with "
            "another value than the one that is supported, and a field that is not understood, are errors that name the field.",
            _table(head, rows),
            "",
        ]
    )


def metrics() -> str:
    """Returns the page of the metrics of docs/metric_names.py and of indicators.

    Raises:
      ValueError: a recorded run has a metric without a row.
    """
    for path in sorted(RECORDED.glob("*/metrics.jsonl")):
        names = {name for line in path.read_text("utf-8").splitlines() for name in json.loads(line)}
        if lost := metric_names.unexplained(sorted(names)):
            raise ValueError(f"{path}: add {', '.join(lost)} to docs/metric_names.py.")
    parts = [
        "# Metrics",
        "`metrics.jsonl` has a row for each period. A metric is the mean since the row before, unless its meaning says otherwise. A word in "
        "capitals stands for any text: `eval/TASK/NAME` is a metric of held-out data, with the name and unit that it has in training.",
    ]
    for title, metrics_of in metric_names.METRICS.items():
        rows = [[_code(name), unit, _plain(says)] for name, (unit, says) in metrics_of.items()]
        parts += [f"## {title}", _table(("name", "unit", "meaning"), rows)]
    text = (ROOT / "docs/use/preference_indicators.md").read_text("utf-8")
    numbers = [
        row
        for part in re.findall(r"^\| `indicators/` .*\n.*\n((?:\|.*\n)+)", text, re.MULTILINE)
        for row in re.findall(r"^\| (.*?) \| (.*?) \| .*\|$", part, re.MULTILINE)
    ]
    parts += [
        "## Indicators",
        "With `methods/preference/indicators.gin`, below `indicators/`: [their page](../use/preference_indicators.md) has notes on each.",
        _table(("name", "meaning"), numbers),
        "",
    ]
    return "\n\n".join(parts)


def refusals() -> str:
    """Returns the matrix of methods that cannot be combined, from the table that tests/methods_test.py checks."""
    text = (ROOT / "docs/reference/methods_together.md").read_text("utf-8")
    pairs: dict[frozenset[str], int] = {}
    reasons: dict[str, int] = {}
    for left, right, reason in re.findall(
        r"^\| (`.*?`) with (.*?) \| (.*) \|$", text, re.MULTILINE
    ):
        number = reasons.setdefault(re.sub(r"^layers/\S+ ", "A layer ", reason), len(reasons) + 1)
        for one in re.findall("`(.*?)`", left):
            for other in re.findall("`(.*?)`", right):
                pairs.setdefault(frozenset((one, other)), number)
    names = sorted({name for pair in pairs for name in pair})
    rows = []
    for row, one in enumerate(names):
        cells = [pairs.get(frozenset((one, other)), "") for other in names[:row]]
        marks = [f"[{n}](#reason-{n})" if n else "" for n in cells]
        rows.append([f"{row + 1} `{one}`", *marks, *[""] * (len(names) - row)])
    matrix = _table(("method", *map(str, range(1, len(names) + 1))), rows)
    parts = [f"(reason-{n})=\n{n}. {reason}" for reason, n in reasons.items()]
    return "\n\n".join(
        [
            "# Which methods refuse each other",
            "Two files of `t5x_configs/methods/` can be combined, in any order, where the cell of their row and column is empty. A number is the "
            "reason below. [Methods together](methods_together.md) has the same facts as a list, and runs that a method cannot be part of.",
            matrix,
            "## Reasons",
            *parts,
            "",
        ]
    )


def _entry(name: str) -> str:
    """Returns the directive of a public name, `module:name`.

    Raises:
      AttributeError: the module does not have it.
    """
    module, _, attribute = name.partition(":")
    value = getattr(importlib.import_module(f"espalier.{module}"), attribute)
    full = f"espalier.{module}.{attribute}"
    if inspect.isclass(value):
        return f".. autoclass:: {full}\n   :members:\n   :no-undoc-members:\n   :exclude-members: parent, name\n"
    return f".. autofunction:: {full}\n" if callable(value) else f".. autodata:: {full}\n"


def api() -> dict[str, str]:
    """Returns the pages of the curated names in Python."""
    texts = {}
    for name, (title, intro, names) in API.items():
        parts = [f"# {title}", intro]
        for one in names:
            heading = one.rpartition(":")[2]
            parts.append(f"## `{heading}`\n\n```{{eval-rst}}\n{_entry(one)}```")
        texts[f"reference/api/{name}.md"] = "\n\n".join(parts) + "\n"
    head = [
        "# Python API",
        "Names that programs may rely on. Everything else is for those who change Espalier itself.",
        "Arrays are named by their dimensions: `x_BTD` has a batch, a length and a width. The letters:",
        _table(("letter", "dimension"), [[_code(letter), what] for letter, what in SHAPES.items()]),
        _tree(f"api/{name}" for name in API),
    ]
    texts["reference/api.md"] = "\n\n".join(head) + "\n"
    return texts


def llms(texts: Mapping[str, str], order: Sequence[str]) -> str:
    """Returns llms.txt: what the project is, and the source of every page with its first sentence."""
    lines = [
        "# Espalier",
        "",
        "> Run, combine and check recent methods for making language models, in JAX.",
        "",
    ]
    for name in order:
        text = texts.get(name, "")
        title = re.search(r"^# (.*)", text, re.MULTILINE)
        body = re.sub(
            r"^(#.*|!\[.*|\|.*|```(?s:.*?)```|\(.*\)=)$", "", text, flags=re.MULTILINE
        ).strip()
        first = " ".join(body.partition("\n\n")[0].split())
        first = re.sub(r"\[\]\(([^)]*/)?(\w+)\.md[^)]*\)", r"\2", first)
        first = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", first)
        sentence = re.match(r".*?\.(?=\s|$)", first)
        if title:
            lines.append(
                f"- [{title[1]}](_sources/{name}.txt): {sentence[0] if sentence else first}"
            )
    return "\n".join(lines) + "\n"
