"""Aya 23's mixture of instructions: sets by group and language, weighed by group and, within a group, by language.

    DATA_DIR/<group>/<set>/<language>.jsonl[.gz, .zst], .parquet; also several files <language>-*.jsonl

A file has rows of data/chats/tasks.py in one language, whose code or tag is the file's name (cs, zh-Hans, arb_Arab). The
paper has four groups and does not state their weights, nor those of languages; WEIGHTS and TEMPERATURE are this
project's. Shares are of tokens.
"""

import os
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.common import spelling
from espalier.common.ranges import Amount, Fraction, Positive
from espalier.data import tasks
from espalier.data.chats import tasks as chats
from espalier.data.languages import table
from espalier.data.stream import mixing
from espalier.data.text import documents

# The paper's groups, with their share of the tokens.
WEIGHTS: Mapping[str, float] = {
    "templated": 0.45,
    "synthetic": 0.30,
    "translated": 0.17,
    "human": 0.08,
}
SAFETY = "safety"  # a group of refusals beside the paper's: t5x_configs/data/safety.gin
TEMPERATURE = 3.33
# The most that a group is read; the human sets are small.
MAX_EPOCHS: Mapping[str, float] = {"human": 8.0}
# The sets of the paper, and where their rows come from.
SETS: Mapping[str, Mapping[str, str]] = {
    "templated": {
        "xp3x": "CohereLabs/xP3x",
        "data_provenance": "DataProvenanceInitiative/Commercial-Flan-Collection-*",
        "aya_collection_templated": "CohereLabs/aya_collection, the configurations templated_*",
    },
    "human": {"aya_dataset": "CohereLabs/aya_dataset"},
    "translated": {
        "aya_collection_translated": "CohereLabs/aya_collection_language_split, the translated sets, 3,000 rows of each",
    },
    "synthetic": {
        "sharegpt_command_r_plus": "not public: translated prompts of ShareGPT, answered by Command R+",
        "dolly_command_r_plus": "not public: translated prompts of Dolly-15k, answered by Command R+",
    },
}


def register_instructions(
    *,
    name: str,
    data_dir: str | os.PathLike,
    vocabulary: Any,
    sets: Mapping[str, Sequence[str]] | None = None,
    weights: Mapping[str, Positive] | None = None,
    safety_weight: Positive = 0.05,
    languages: Sequence[str] | None = None,
    temperature: Positive = TEMPERATURE,
    cap: Amount | None = None,
    validation_fraction: Fraction = 0.01,
    turns: chats.Turns = "all",
    chat_template: str | None = None,
    add_bos: bool | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> None:
    """Registers a task <set>_<language> for each file, and their mixture with shares of tokens as rates.

    A group has its weight of the tokens. Within it a language of n rows has a share proportional to
    n ** (1 / temperature), and within a language the sets have shares proportional to their rows.

    Args:
      name: of the mixture; also name_<group>, the mixture of each group.
      data_dir: directory of the groups.
      vocabulary: a SeqIO vocabulary.
      sets: group -> its sets; None for the paper's.
      weights: group -> its share, normalised over the groups of `sets`; None for WEIGHTS and `safety_weight`.
      safety_weight: of the group SAFETY, beside WEIGHTS.
      languages: codes; None for all of data/languages/table.py. Other files are not read.
      temperature: of languages.
      cap: the most rows of a set in a language that count; None for no limit.
      validation_fraction, turns, chat_template, add_bos, cache_dir: see `data.chats.tasks.register_chats`.

    Raises:
      FileNotFoundError: sets are missing; names each, and where to get the paper's.
      ValueError: an unknown group or language.
      DataError: a malformed file.
    """
    files = find(data_dir, sets, languages)
    known = list(files)
    given = weights or {group: WEIGHTS.get(group, safety_weight) for group in known}
    group_shares = mixing.normalised(given, known, f"{name}: weights")
    for group in group_shares:
        for task, patterns in files[group].items():
            chats.register_chats(
                name=task,
                files=patterns,
                vocabulary=vocabulary,
                validation_fraction=validation_fraction,
                turns=turns,
                chat_template=chat_template,
                add_bos=add_bos,
                cache_dir=cache_dir,
            )
    rates: dict[str, float] = {}
    sources = tasks.sources()
    for group, share in group_shares.items():
        rows = {task: sources[task].num_input_examples("train") for task in files[group]}
        inside = shares(rows, temperature, cap)
        tasks.register_mixture(f"{name}_{group}", inside)
        rates |= {task: share * value for task, value in inside.items()}
    tasks.register_mixture(name, rates)


def shares(
    rows: Mapping[str, int], temperature: float, cap: float | None = None
) -> dict[str, float]:
    """Returns the share of each task <set>_<language> of a group, from its rows; see `register_instructions`."""
    counted = {task: min(count, cap) if cap else count for task, count in rows.items()}
    by_language: dict[str, float] = {}
    for task, count in counted.items():
        by_language[_language(task)] = by_language.get(_language(task), 0) + count
    tempered = mixing.tempered(by_language, temperature)
    total = sum(tempered.values())
    return {
        task: tempered[_language(task)] / total * count / by_language[_language(task)]
        for task, count in counted.items()
    }


def epoch_caps(
    *,
    data_dir: str | os.PathLike,
    sets: Mapping[str, Sequence[str]] | None = None,
    languages: Sequence[str] | None = None,
    caps: Mapping[str, Positive] | None = None,
) -> dict[str, float]:
    """Returns the most epochs of the tasks of some groups, for `max_epochs` of a stream.

    Args:
      data_dir, sets, languages: see `register_instructions`, also for the errors raised.
      caps: group -> the most that its tasks are read; None for MAX_EPOCHS.
    """
    files = find(data_dir, sets, languages)
    caps = MAX_EPOCHS if caps is None else caps
    return {task: caps[group] for group in files if group in caps for task in files[group]}


def find(
    data_dir: str | os.PathLike,
    sets: Mapping[str, Sequence[str]] | None = None,
    languages: Sequence[str] | None = None,
) -> dict[str, dict[str, list[str]]]:
    """Returns {group: {task: its files}}; see `register_instructions`, also for the errors raised."""
    root = pathlib.Path(os.path.abspath(os.path.expandvars(os.path.expanduser(data_dir))))
    wanted = table.codes(table.LANGUAGES if languages is None else languages)
    chosen = {group: list(known) for group, known in SETS.items()} if sets is None else sets
    out: dict[str, dict[str, list[str]]] = {}
    missing, owners = [], {}
    for group, names in chosen.items():
        if group not in (*WEIGHTS, SAFETY):
            nearest = spelling.nearest(group, (*WEIGHTS, SAFETY))
            raise ValueError(f"sets: unknown group {group!r}; {nearest}")
        out[group] = {}
        for name in names:
            if owners.setdefault(name, group) != group:
                raise ValueError(
                    f"the set {name!r} is in {owners[name]} and in {group}: rename one"
                )
            by_language = _files(root / group / name, wanted)
            if not by_language:
                missing.append(_missing(root / group / name, group, name))
            out[group] |= {f"{name}_{code}": paths for code, paths in by_language.items()}
    if missing:
        raise FileNotFoundError(
            f"{len(missing)} sets of the mixture are missing:\n  " + "\n  ".join(missing) + "\n"
            "Write their rows there, a file for each language, or leave them out: INSTRUCTION_SETS = {'group': ['set']}"
        )
    return out


def _files(folder: pathlib.Path, wanted: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for path in sorted(folder.glob("*")) if folder.is_dir() else ():
        if not path.is_file() or path.name.startswith("."):
            continue
        documents.check_suffix(path)
        try:
            language = table.find(path.name.partition(".")[0])
        except ValueError as error:
            raise ValueError(f"{path}: a file's name is its language: {error}") from None
        if language.code in wanted:
            found.setdefault(language.code, []).append(str(path))
    return {code: found[code] for code in wanted if code in found}


def _missing(folder: pathlib.Path, group: str, name: str) -> str:
    origin = SETS.get(group, {}).get(name)
    return f"{name} ({group}): no file in {folder}" + (f"; from {origin}" if origin else "")


def _language(task: str) -> str:
    return task.rpartition("_")[2]
