"""The model card of an exported checkpoint, README.md, written from the record of its run."""

import json
import os
import pathlib
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from espalier.launch.run import metric_rows, run_dir
from espalier.trainers.checkpoints import step_dir
from espalier.trainers.telemetry.progress import held_out_text

NAME = "README.md"
_MOST_PARENTS = 10
_UNKNOWN = "not recorded"


def page(title: str, body: str, *, of: str, tags: str = "") -> str:
    """Returns a model card; `of` names what its licence depends on, `tags` is a line of its head."""
    return f"""---
library_name: transformers
pipeline_tag: text-generation
{tags}# license: fill in, such as apache-2.0
---

# {title}

{body}

## Licence

**To be filled in.** It depends on the licences of {of}.
"""


def write(
    folder: str,
    run: pathlib.Path,
    step: Mapping[str, Any],
    *,
    weights: str,
    architecture: str,
    average: bool,
) -> None:
    """Writes the model card into the folder of an export.

    Args:
      folder: holds the exported files.
      run: directory of the run that was exported.
      step: the record of the exported step, with 'step' and 'meta'.
      weights: description of the weights, see `exchange.described`.
      architecture: class of transformers.
      average: whether the weights are an average of the trained ones.
    """
    updates, meta = step["step"], step["meta"]
    record, rows = _record(run, updates)
    none = "none: it began with new parameters" if record else _UNKNOWN
    facts = {
        "architecture": f"`{architecture}`",
        "weights": weights + (" (an average of the trained parameters)" if average else ""),
        "objective": metric_rows.objective_of(run).name or _UNKNOWN,
        "trained": _trained(record, updates),
        "held-out loss": _held_out(rows),
        "parents": "; ".join(_parents(record, meta)) or none,
        "code": f"Espalier, commit `{str(record.get('commit') or _UNKNOWN)[:12]}`",
    }
    lines = ["| | |", "|---|---|"]
    lines += [f"| {name} | {_plain(value)} |" for name, value in facts.items()]
    use = _use(folder, meta, architecture)
    lines += ["", "## Data", "", *_data(record, rows), "", "## Use", "", *use]
    of = "the data and of the parent checkpoints above"
    text = page(_plain(run.name), "\n".join(lines), of=of)
    pathlib.Path(folder, NAME).write_text(text, encoding="utf-8")


def _record(run: str | os.PathLike, updates: int) -> tuple[Mapping[str, Any], list[dict[str, Any]]]:
    """Returns a run's run.json and its metrics up to a step; what cannot be read is empty, with a note."""
    record: Mapping[str, Any] = {}
    rows: list[dict[str, Any]] = []
    try:
        record = run_dir.read_run(os.fspath(run))
        if os.path.exists(os.path.join(run, "metrics.jsonl")):
            rows = [row for row in metric_rows.read_rows(run) if row["step"] <= updates]
    except (OSError, ValueError) as error:
        print(f"note: {NAME} is incomplete: {error}", file=sys.stderr)
    return record, rows


def _plain(text: str) -> str:
    """Returns text that stays in one cell of a table."""
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def _mapping(value: Any, *keys: str) -> Mapping[str, Any]:
    """Returns the object below keys of a record; an empty one where there is none."""
    for key in keys:
        value = value.get(key) if isinstance(value, Mapping) else None
    return value if isinstance(value, Mapping) else {}


def _trained(record: Mapping[str, Any], updates: int) -> str:
    """Returns the number of updates, and of the tokens with a loss in them."""
    if not record:
        return "no training is recorded"
    data = _mapping(record, "data")
    phases = data.get("phases") or []
    try:
        starts = [phase["first_step"] for phase in phases] + [updates]
        tokens = sum(
            max(0, min(end, updates) - phase["first_step"]) * phase["tokens_per_step"]
            for phase, end in zip(phases, starts[1:], strict=True)
        )
    except (TypeError, KeyError, ValueError):
        tokens = 0
    text = f"{updates:,} updates"
    return f"{text} on about {tokens:,.0f} tokens with a loss" if tokens else text


def _held_out(rows: Iterable[Mapping[str, Any]]) -> str:
    """Returns the newest held-out losses with their step."""
    for row in reversed(list(rows)):
        if text := held_out_text(row):
            return f"{text}, at step {row['step']:,}"
    return _UNKNOWN


def _parents(record: Mapping[str, Any], meta: Mapping[str, Any]) -> Iterator[str]:
    """Yields the checkpoints that the run descends from, nearest first."""
    experts = _mapping(meta, "upcycled").get("experts")
    if isinstance(experts, list):
        yield f"experts {', '.join(f'`{name}`' for name in experts)}"
    if isinstance(made_of := meta.get("made_of"), list):
        yield f"made of {'; '.join(map(str, made_of))}"
    family = _mapping(meta, "hf").get("family")
    for _ in range(_MOST_PARENTS):
        path = _mapping(record, "initial").get("path") or _mapping(meta, "initial").get("path")
        if not isinstance(path, str):
            break
        step = pathlib.Path(path)
        run = step_dir.folder_of(step)  # type: ignore[arg-type]  # a Path has what it needs
        name = metric_rows.objective_of(run).name
        yield f"`{run.name}`, step {step.name}" + (f" ({name})" if name else "")
        try:
            record, meta = run_dir.read_run(os.fspath(run)), {}
        except (OSError, ValueError):
            break
    if family:
        yield f"a checkpoint in Hugging Face format of the family {family}"


def _data(record: Mapping[str, Any], rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yields a table of the sources of the run's own training."""
    sources = _mapping(record, "data", "sources")
    if not sources:
        yield "No data are recorded: see the parent checkpoints."
        return
    read: dict[str, float] = {}
    for row in rows:
        read |= {name: value for name, value in row.items() if name.startswith("epochs/")}
    yield from ("| source | tokens in it | times read |", "|---|---|---|")
    for name, facts in sources.items():
        tokens, epochs = _mapping(facts).get("tokens"), read.get(f"epochs/{name}")
        cells = [
            f"`{name}`",
            f"{tokens:,}" if isinstance(tokens, int) else "",
            "" if epochs is None else f"{epochs:.3g}",
        ]
        yield f"| {' | '.join(map(_plain, cells))} |"


def _use(folder: str, meta: Mapping[str, Any], architecture: str) -> Iterator[str]:
    """Yields how transformers loads the export, and what texts must begin with."""
    has_tokenizer = any(
        os.path.exists(os.path.join(folder, name))
        for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json")
    )
    chat = os.path.exists(os.path.join(folder, "chat_template.jinja")) or _has_template(folder)
    encodes = architecture.endswith("ForConditionalGeneration")
    model = "AutoModelForSeq2SeqLM" if encodes else "AutoModelForCausalLM"
    yield from ("```python", f"from transformers import {model}, AutoTokenizer", "")
    yield f'model = {model}.from_pretrained("FOLDER")'
    if has_tokenizer:
        yield 'tokenizer = AutoTokenizer.from_pretrained("FOLDER")'
    if has_tokenizer and chat:
        yield 'messages = [{"role": "user", "content": "Hello"}]'
        yield "inputs = tokenizer.apply_chat_template("
        yield '    messages, add_generation_prompt=True, return_tensors="pt", return_dict=True'
        yield ")"
    elif has_tokenizer:
        yield 'inputs = tokenizer("Once upon a time", return_tensors="pt")'
    if has_tokenizer:
        yield "print(tokenizer.decode(model.generate(**inputs, max_new_tokens=50)[0]))"
    yield "```"
    if not has_tokenizer:
        yield from ("", "The run has no tokenizer in this format: the model takes token ids.")
    # transformers puts the start token of an encoder-decoder before its targets.
    if (start := meta.get("start_token")) is not None and not encodes:
        yield ""
        yield (
            f"Training put token {start} before every document. transformers does not add it: put it before texts."
        )


def _has_template(folder: str) -> bool:
    """Returns whether the tokenizer's files have a chat template."""
    path = pathlib.Path(folder, "tokenizer_config.json")
    try:
        return bool(json.loads(path.read_bytes()).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False
