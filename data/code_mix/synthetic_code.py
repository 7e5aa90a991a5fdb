"""Verified synthetic code: Python problems with solutions and tests that have passed.

The paper on code in pre-training (arXiv 2408.10914) gains most from a set of formally verified problems,
which is not released; this source has the same form. A problem is drawn from a family
(data/code_mix/synthetic/) with random numbers, names, layout and tests. The expected results in its tests
are computed in another way than in its solution. Each document is a program; it runs in the sandbox, and
is dropped if it does not pass. To measure this filter, a share of further documents has one fault in the
solution: they are never used as data, and the manifest counts how many of them pass.
"""

import dataclasses
import functools
import itertools
import json
import os
import pathlib
import random
import sys
from collections.abc import Iterator
from typing import Any

from espalier.common import files
from espalier.common.bars import Bar
from espalier.common.ranges import Fraction, Seed, Size
from espalier.data import tasks
from espalier.data.cache import cache_dir as cache
from espalier.data.cache import fingerprint
from espalier.data.code_mix.synthetic import lists, structures, texts
from espalier.data.code_mix.synthetic.render import Rendered, render
from espalier.data.sandbox import code_sandbox
from espalier.data.text import documents, splits
from espalier.data.text.document_files import DocumentFiles

_OPEN_ENDED_WEIGHT = 8  # other families repeat themselves after some hundreds of documents
FAMILIES = lists.FAMILIES + texts.FAMILIES + structures.FAMILIES
_WEIGHTS = [_OPEN_ENDED_WEIGHT if family in lists.OPEN_ENDED else 1 for family in FAMILIES]
FORMAT = documents.Format(text_key="text", id_key="id")
MANIFEST = "manifest.json"
_LIMITS = code_sandbox.Limits(cpu_seconds=2, wall_seconds=20.0)
_ROUND = 400  # documents drawn and run at a time
_GROUP = 20  # documents run in one process at first
_IDLE_ROUNDS = 10  # rounds without a new document, after which `build` gives up


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A document that has not been run yet."""

    family: str  # name of its family
    document: Rendered  # its text and key
    mutated: bool  # whether a fault was put into its solution


def draw(seed: int, *, mutated_share: float = 0.05) -> Iterator[Candidate]:
    """Yields documents without end, the same for the same seed; some repeat."""
    for number in itertools.count():
        rng = random.Random(f"{seed} {number}")
        (family,) = rng.choices(FAMILIES, _WEIGHTS)
        mutated = rng.random() < mutated_share
        document = render(family(rng), rng, mutate=mutated)
        if document is not None:
            yield Candidate(family.__name__, document, mutated)


def verify(sandbox: code_sandbox.Sandbox, programs: list[str]) -> list[bool]:
    """Returns for each program whether it runs to its end.

    Programs first run in groups, one process per group, each program in its own namespace. Where a group
    fails, its programs run one by one. Programs must not interfere with each other; those that the
    families generate do not.
    """
    groups = [programs[i : i + _GROUP] for i in range(0, len(programs), _GROUP)]
    joined = [
        "".join(f"exec({program!r}, {{'__name__': 'program'}})\n" for program in group)
        for group in groups
    ]
    verdicts: list[bool] = []
    for group, result in zip(groups, _results(sandbox, joined), strict=True):
        if result.passed:
            verdicts += [True] * len(group)
        else:
            verdicts += [single.passed for single in _results(sandbox, group)]
    return verdicts


def _results(sandbox: code_sandbox.Sandbox, programs: list[str]) -> list[code_sandbox.Result]:
    return [future.result() for future in [sandbox.submit(program) for program in programs]]


def build(
    *,
    num_documents: Size = 5000,
    seed: Seed = 0,
    variants: Size = 3,
    mutated_share: Fraction = 0.05,
    validation_fraction: Fraction = 0.05,
    cache_dir: str | os.PathLike | None = None,
) -> pathlib.Path:
    """Generates the documents, or reuses those in the cache from the same settings and code.

    Args:
      num_documents: number of documents, both splits together.
      seed: seed of all random choices.
      variants: most documents of one problem; they differ in names, layout and tests.
      mutated_share: share of drawn documents with a fault; they measure the filter and are not data.
      validation_fraction: share of problems to hold out, with all their variants.
      cache_dir: directory of the documents; default $ESPALIER_CACHE or ~/.cache/espalier.

    Returns:
      A folder with `train.jsonl`, `validation.jsonl` and `manifest.json`, which counts drawn, accepted and
      dropped documents.

    Raises:
      ValueError: a setting is out of range, or no more new documents pass.
    """
    if num_documents < 1 or variants < 1:
        raise ValueError(
            f"synthetic_code: num_documents = {num_documents} and variants = {variants} must be at least 1."
        )
    settings = {
        "num_documents": num_documents,
        "seed": seed,
        "variants": variants,
        "mutated_share": mutated_share,
        "validation_fraction": validation_fraction,
    }
    for name in ("mutated_share", "validation_fraction"):
        if not 0 <= settings[name] < 1:
            raise ValueError(f"synthetic_code: {name} = {settings[name]} must be in [0, 1).")
    key = fingerprint.of_json([settings, _code_digest()])[:16]
    folder = cache.cache_dir("synthetic_code", key, override=cache_dir)
    if not (folder / MANIFEST).is_file():
        files = [MANIFEST, *(f"{split}.jsonl" for split in splits.SPLITS)]
        cache.build_directory(folder, lambda target: _build(target, settings), expected=files)
        print(f"synthetic code written to {folder}", file=sys.stderr)
    return folder


def _build(target: pathlib.Path, settings: dict[str, Any]) -> None:
    problem_of: dict[str, str] = {}  # text -> key of the problem
    problems: dict[str, int] = {}
    families: dict[str, int] = {}
    counts = {"drawn": 0, "dropped": 0, "mutated": 0, "mutated_passed": 0}
    drawn = draw(settings["seed"], mutated_share=settings["mutated_share"])
    idle = 0
    bar = Bar(total=settings["num_documents"], desc="synthetic code", file=sys.stderr)
    with code_sandbox.Sandbox(_LIMITS) as sandbox, bar:
        while len(problem_of) < settings["num_documents"]:
            new: dict[str, Candidate] = {}
            for candidate in itertools.islice(drawn, _ROUND):
                text, key = candidate.document.text, candidate.document.key
                if text not in problem_of and problems.get(key, 0) < settings["variants"]:
                    new[text] = candidate
            counts["drawn"] += len(new)
            whole = [text for text, entry in new.items() if not entry.mutated]
            faulty = [text for text, entry in new.items() if entry.mutated]
            counts["mutated"] += len(faulty)
            counts["mutated_passed"] += sum(entry.passed for entry in _results(sandbox, faulty))
            before = len(problem_of)
            for text, passed in zip(whole, verify(sandbox, whole), strict=True):
                key = new[text].document.key
                counts["dropped"] += not passed
                room = problems.get(key, 0) < settings["variants"]
                if passed and room and len(problem_of) < settings["num_documents"]:
                    problem_of[text] = key
                    problems[key] = problems.get(key, 0) + 1
                    families[new[text].family] = families.get(new[text].family, 0) + 1
            bar.update(len(problem_of) - before)
            idle = 0 if len(problem_of) > before else idle + 1
            if idle == _IDLE_ROUNDS:
                raise ValueError(
                    f"synthetic_code: after {len(problem_of):,} documents, none of the last "
                    f"{_IDLE_ROUNDS * _ROUND:,} drawn is new and passes. Raise variants, or run failing "
                    "programs with espalier evaluate code, which prints the reasons."
                )
    lines: dict[str, list[str]] = {split: [] for split in splits.SPLITS}
    for number, (text, key) in enumerate(problem_of.items()):
        held_out = splits.in_validation(key, settings["validation_fraction"])
        line = json.dumps({"id": f"synthetic:{number}", "text": text})
        lines["validation" if held_out else "train"].append(line + "\n")
    for split, split_lines in lines.items():
        (target / f"{split}.jsonl").write_text("".join(split_lines), encoding="utf-8")
    manifest = {
        "settings": settings,
        "documents": {split: len(split_lines) for split, split_lines in lines.items()},
        "problems": len(problems),
        "families": dict(sorted(families.items())),
        **counts,
    }
    files.write_json(target / MANIFEST, manifest, synced=False)  # build_directory syncs it


@functools.cache
def _code_digest() -> str:
    """Returns the hash of the generating code."""
    this = pathlib.Path(__file__)
    return fingerprint.of_code([this, *sorted(this.parent.glob("synthetic/*.py"))])


def register(
    *,
    vocabulary: Any,
    name: str = "synthetic_code",
    num_documents: Size = 5000,
    seed: Seed = 0,
    variants: Size = 3,
    mutated_share: Fraction = 0.05,
    validation_fraction: Fraction = 0.05,
    add_bos: bool = False,
    add_eos: bool = True,
    cache_dir: str | os.PathLike | None = None,
) -> None:
    """Registers a task over verified synthetic code; generates the documents if the cache has none.

    Args:
      vocabulary: a SeqIO vocabulary, as `data.tokenizers.vocabularies` makes.
      name: name of the task.
      num_documents, seed, variants, mutated_share, validation_fraction: see `build`.
      add_bos: begin each document with BOS.
      add_eos: end each document with EOS.
      cache_dir: directory of the documents; default $ESPALIER_CACHE or ~/.cache/espalier.
    """
    folder = build(
        num_documents=num_documents,
        seed=seed,
        variants=variants,
        mutated_share=mutated_share,
        validation_fraction=validation_fraction,
        cache_dir=cache_dir,
    )
    sizes = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))["documents"]
    files = {split: [str(folder / f"{split}.jsonl")] for split, count in sizes.items() if count}
    tasks.register_source(
        name,
        DocumentFiles.of(name, files, format=FORMAT, cache_dir=cache_dir),
        origin="synthetic_code.register",
        vocabulary=vocabulary,
        add_bos=add_bos,
        add_eos=add_eos,
    )
