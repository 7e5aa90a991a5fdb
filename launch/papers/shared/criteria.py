"""The criteria of claims as they were when the runs that they judge were started."""

import datetime
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.common import files
from launch.papers.shared.claim import Claim

_FILE = "criteria.json"


def fix(folder: pathlib.Path, claims: Sequence[Claim]) -> dict[str, Any]:
    """Writes the criteria into the folder of an experiment before its first run, and returns those in force.

    Returns:
      {'date', 'commit', 'dirty', 'claims': name -> statement, condition and whether it must hold}: those of the first
      call after which the folder got runs.
    """
    from launch.run import run_dir

    path = folder / _FILE
    started = folder.is_dir() and any(one.name != _FILE for one in folder.iterdir())
    if started and path.exists():
        return json.loads(path.read_bytes())
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    fixed = {"date": date, **run_dir.commit(), "late": started, "claims": of(claims)}
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(path, fixed, synced=True)  # its date is before the runs
    return fixed


def of(claims: Sequence[Claim]) -> dict[str, list[Any]]:
    """Returns what a claim may not change after its runs, by name."""
    return {one.name: [one.statement, one.condition, one.required] for one in claims}


def in_words(fixed: Mapping[str, Any] | None, claims: Sequence[Claim]) -> str:
    """Returns when the criteria were fixed and which of them have changed since, as a sentence."""
    if fixed is None:
        return "No record says when the criteria were fixed."
    commit = f" at commit {fixed['commit'][:10]}" if fixed["commit"] else ""
    dirty = " with uncommitted changes" if fixed["dirty"] else ""
    when = "after the first runs" if fixed["late"] else "before the first run"
    now = of(claims)
    changed = [name for name in now if fixed["claims"].get(name) != now[name]]
    since = f"changed since: {', '.join(changed)}" if changed else "none has changed since"
    return f"Criteria were fixed {when}, on {fixed['date']}{commit}{dirty}; {since}."
