"""The criteria of an experiment, fixed before its first run: claims, bounds, seeds, sweeps and configurations."""

import datetime
import hashlib
import json
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.common import files
from espalier.launch import environment
from espalier.launch.papers.shared import sweeps
from espalier.launch.papers.shared.claim import Claim, finite

_FILE = "criteria.json"
_PART = 4  # of `_bounds`
_INCLUDE = re.compile(r"^include\s+['\"]([^'\"]+)['\"]", flags=re.MULTILINE)


def fix(
    folder: pathlib.Path,
    claims: Sequence[Claim],
    experiment: Any,
    before: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Writes the criteria into the folder of an experiment before its first run, and returns those in force.

    Args:
      folder: of the runs.
      claims: of the paper.
      experiment: its module, with SWEEPS, SEEDS and EARLIER.
      before: criteria of parts that were judged elsewhere, of `kept`: they keep their own date.

    Returns:
      {'date', 'commit', 'dirty', 'late', 'earlier': the rounds before this one, 'claims': name -> what the claim may not
      change, 'design': part -> digest of its runs}: those of the first call after which the folder got runs. A part that the
      experiment got later is in 'later', part -> {'date', 'commit', 'dirty', 'late'}: its runs and claims are those of the
      first call after it came. And what `today` adds.
    """
    path = folder / _FILE
    started = folder.is_dir() and any(one.name != _FILE for one in folder.iterdir())
    design = _design(experiment)
    if started and path.exists():
        fixed = json.loads(path.read_bytes())
        known, fixed = fixed, _with_later(fixed, folder, claims, design)
        if fixed != known:
            files.write_json(path, fixed, synced=True)
        if before is not None and "design" in fixed:
            fixed = _with_others(fixed, before)
        return today(fixed, experiment)
    if before is not None and not started:
        fixed = _with_later({**before}, folder, claims, design)
    else:
        fixed = {
            **_now(late=started),
            **{"earlier": list(experiment.EARLIER), "claims": _bounds(claims), "design": design},
        }
    folder.mkdir(parents=True, exist_ok=True)
    files.write_json(path, fixed, synced=True)  # its date is before the runs
    return today(fixed, experiment)


def today(fixed: Mapping[str, Any], experiment: Any) -> dict[str, Any]:
    """Returns criteria with 'changed': the parts whose runs are others now, and 'lost': commits that HEAD does not descend from."""
    design, known = _design(experiment), fixed.get("design", {})
    changed = [part for part in known if design.get(part) != known[part]]
    commits = {one["commit"] for one in (fixed, *fixed.get("later", {}).values()) if one["commit"]}
    lost = sorted(commit for commit in commits if not environment.in_history(commit))
    return {**fixed, "changed": changed, "lost": lost}


def kept(
    fixed: Mapping[str, Any], parts: Sequence[str], claims: Sequence[Claim], experiment: Any
) -> dict[str, Any]:
    """Returns what criteria say of the parts of a page that are kept, as `before` of `fix`.

    Args:
      fixed: criteria that the page has.
      parts: that are kept.
      claims: of the paper.
      experiment: its module.

    Raises:
      ValueError: claims or runs of these parts are others now.
    """
    now, design = _bounds([one for one in claims if one.part in parts]), _design(experiment)
    changed = [f"the part `{part}`" for part in parts if part not in experiment.PARTS]
    changed += [f"the claim {name}" for name in now if fixed["claims"].get(name) != now[name]]
    some = [part for part in parts if part in design]
    changed += [f"the runs of `{one}`" for one in some if fixed["design"].get(one) != design[one]]
    if changed:
        raise ValueError(f"{', '.join(changed)} changed since they were judged")
    of_parts = {
        name: {part: one for part, one in fixed.get(name, {}).items() if part in parts}
        for name in ("design", "later")
    }
    return {**fixed, **of_parts, "claims": now, "changed": []}


def unmeasured(fixed: Mapping[str, Any], measured: Mapping[str, Any]) -> list[str]:
    """Returns the parts of a page that have claims, and no measurements yet."""
    judged = (bounds[_PART] for bounds in fixed["claims"].values())
    return [part for part in dict.fromkeys(judged) if part not in measured]


def _now(*, late: bool) -> dict[str, Any]:
    date = datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%d %H:%M UTC")
    return {"date": date, **environment.commit(), "late": late}


def _with_later(
    fixed: dict[str, Any], folder: pathlib.Path, claims: Sequence[Claim], design: Mapping[str, str]
) -> dict[str, Any]:
    """Returns criteria in force with the parts that the experiment did not have when they were fixed."""
    if "design" not in fixed:  # a record without parts says nothing of them
        return fixed
    known = _parts(fixed)
    now = dict.fromkeys((*design, *(one.part for one in claims)))
    if not (new := [part for part in now if part not in known]):
        return fixed
    later = {part: _now(late=(folder / part).is_dir()) for part in new}
    of_new = _bounds([one for one in claims if one.part in new])
    return {
        **fixed,
        "claims": {**fixed["claims"], **of_new},
        "design": {**fixed["design"], **{one: design[one] for one in new if one in design}},
        "later": {**fixed.get("later", {}), **later},
    }


def _with_others(fixed: dict[str, Any], others: Mapping[str, Any]) -> dict[str, Any]:
    """Returns criteria in force with those of parts that were judged elsewhere, which were fixed there."""
    names = ("date", "commit", "dirty", "late")
    here, there = ({name: one[name] for name in names} for one in (fixed, others))
    later = fixed.get("later", {}) | {
        part: others.get("later", {}).get(part, there) for part in _parts(others)
    }
    return {
        **fixed,
        "claims": {**fixed["claims"], **others["claims"]},
        "design": {**fixed["design"], **others["design"]},
        "later": {part: one for part, one in later.items() if one != here},
    }


def _parts(fixed: Mapping[str, Any]) -> set[str]:
    """Returns the parts that criteria are of."""
    return {*fixed["design"], *(bounds[_PART] for bounds in fixed["claims"].values())}


def _bounds(claims: Sequence[Claim]) -> dict[str, list[Any]]:
    """Returns what the claims may not change after their runs, by name."""
    return {
        one.name: [
            *(one.statement, one.condition, one.required, one.group, one.part),
            *(finite(one.above), finite(one.below), list(one.looks)),
        ]
        for one in claims
    }


def _design(experiment: Any) -> dict[str, str]:
    """Returns the digests of all runs of the sweeps, by part."""
    seeds = max(experiment.SEEDS or (0,))
    return {part: _digest(text.format(seeds=seeds)) for part, text in experiment.SWEEPS.items()}


def _digest(sweep: str) -> str:
    """Returns the SHA-256 of the runs of a sweep: arms, seeds, settings, evaluations, and what their gin files say."""
    name, _, argument = sweep.partition(":")
    runs = sweeps.planned(name, argument)
    wanted = [file for run in runs for file in run.gin_files]
    texts: dict[str, str] = {}
    for file in wanted:  # the loop appends to `wanted`
        if file not in texts:
            text = pathlib.Path(environment.ROOT, file).read_text(encoding="utf-8")
            texts[file] = re.sub(r"^\s*(#.*)?\n", "", text, flags=re.MULTILINE)
            wanted += _INCLUDE.findall(text)
    planned = [
        [run.name, run.parent, run.gin_files, run.bindings, run.made, run.evaluations]
        for run in runs
    ]
    content = json.dumps([planned, sorted(texts.items())], sort_keys=True)
    # Where packages are installed is no part of a design.
    content = re.sub(r"[^\s'\"]*/site-packages/", "", content)
    return hashlib.sha256(content.encode()).hexdigest()


def _place(fixed: Mapping[str, Any], lost: Sequence[str]) -> str:
    commit = f" at commit {fixed['commit'][:10]}" if fixed["commit"] else ""
    gone = " (not in this repository's history)" if fixed["commit"] in lost else ""
    return f"{fixed['date']}{commit}{gone}{' with uncommitted changes' if fixed['dirty'] else ''}"


def in_words(fixed: Mapping[str, Any] | None, claims: Sequence[Claim]) -> str:
    """Returns when the criteria were fixed and which of them have changed since, as sentences."""
    if fixed is None:
        return "No record says when the criteria were fixed."
    lost = fixed.get("lost", ())
    when = "after the first runs" if fixed["late"] else "before the first run"
    said = f"{when}, on {_place(fixed, lost)}"
    for part, one in fixed.get("later", {}).items():
        when = "after its first runs" if one["late"] else "before its first run"
        said += f", those of the part `{part}` {when}, on {_place(one, lost)}"
    # A record without designs is of before there were parts.
    known = _parts(fixed) if "design" in fixed else {one.part for one in claims}
    to_come = dict.fromkeys(one.part for one in claims if one.part not in known)
    now = _bounds([one for one in claims if one.part in known])
    changed = [name for name in now if fixed["claims"].get(name) != now[name]]
    changed += [f"the runs of the part `{part}`" for part in fixed["changed"]]
    since = f"changed since: {', '.join(changed)}" if changed else "none has changed since"
    if to_come:
        since += f"; nothing has run yet of the part {', '.join(f'`{part}`' for part in to_come)}"
    rounds = "No earlier round of runs bears on them."
    if earlier := fixed["earlier"]:
        rounds = f"Rounds of runs before this one: {len(earlier)} ({'; '.join(earlier)})."
    return f"Criteria (claims, bounds, arms, seeds, configurations) were fixed {said}; {since}.\n{rounds}"
