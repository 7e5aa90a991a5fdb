"""Writes the tasks of the CPU reproduction: two operations on four letters, worded by several prompt templates.

    reverse then shift1: d1b2b3a4  ->  b1c2c3e4
    mirror then next: d1b2b3a4     ->  b1c2c3e4

Letters have their places beside them, as one piece of the vocabulary: a T5 has no positions in cross-attention, and its relative
positions move by at most the learning rate an update, so that it would spend thousands of updates on counting.

The operations are those of launch/papers/mov/compositions.py, each with two words. The frozen model knows all compositions in the first words, and
single operations in both; what is tuned and judged are compositions in the others. So it has the knowledge, and answers some of these
requests right before it is tuned, as a pre-trained model does.

A row has four answer choices: the result, and what other operations make of the same letters, first of all each operation alone. It
writes sets of rows with their templates as `register_instructions` reads them: in the first words `operations/single`, of one operation and
`copy`, and `operations/known`, of all compositions and of single operations in the other words; in these `operations/pairs`, of the compositions
that are tuned.

  python -m espalier.launch.papers.mov.rows --to=DIR --seed=0
"""

if __name__ == "__main__":
    from espalier.launch.papers.mov import rows

    raise SystemExit(rows.main())

import argparse
import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch import cli
from espalier.launch.inference import row_files
from espalier.launch.papers.mov import compositions
from espalier.launch.papers.mov.compositions import LETTERS, OPERATIONS, Pair

KNOWN_WORDS = {letter: name for letter, (name, _) in OPERATIONS.items()}
NEW_WORDS = {
    **{"R": "mirror", "O": "turn", "H": "exchange", "W": "cross"},
    **{"B": "retreat", "E": "border", "M": "inner", "L": "lead"},
    **{"P": "next", "S": "second", "Q": "third", "U": "fourth"},
    **{"F": "fifth", "V": "seventh", "N": "eighth", "I": "ninth", "C": "keep"},
}
# Name -> what is read. The last one has the operations in the other order.
TEMPLATES = {
    "then": "{first} then {second}: {letters}",
    "with": "with {letters} do {first} and {second}",
    "after": "{second} after {first} of {letters}",
}
CHOICES = 4
# Of the frozen model, which reads its rows about once, and of the arms.
FIRST_ROWS, TRAIN_ROWS, VALIDATION_ROWS = 48000, 16000, 256
NEW_WORDS_SHARE = 0.3  # single operations in their other words, for each known composition
FOLDER = "operations"
SINGLE, KNOWN, PAIRS = (f"{FOLDER}/{name}" for name in ("single", "known", "pairs"))


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return cli.run_command(__doc__, "rows", _run, add_flags=_add_flags, argv=argv)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--to", required=True, metavar="DIR", help="write the results to this folder"
    )
    parser.add_argument("--seed", type=int, default=0, help="random seed of the rows")


def _run(flags: argparse.Namespace) -> None:
    write(pathlib.Path(flags.to), flags.seed)


def write(folder: pathlib.Path, seed: int) -> None:
    """Writes all sets and their templates into a folder."""
    rng = np.random.default_rng(seed)
    trained, held_out = compositions.split_pairs(0)
    sizes = {"train": (FIRST_ROWS, TRAIN_ROWS), "validation": (VALIDATION_ROWS,) * 2}
    for split, (first, size) in sizes.items():
        _write(
            folder / SINGLE / f"{split}.jsonl", draw(compositions.SINGLE, first, rng, KNOWN_WORDS)
        )
        known = draw([*trained, *held_out], first, rng, KNOWN_WORDS)
        known += draw(compositions.SINGLE, round(first * NEW_WORDS_SHARE), rng)
        _write(folder / KNOWN / f"{split}.jsonl", [known[i] for i in rng.permutation(len(known))])
        _write(folder / PAIRS / f"{split}.jsonl", draw(trained, size, rng))
    file = folder / FOLDER / "templates.yaml"
    file.write_text(json.dumps({"templates": [*map(_template, TEMPLATES)]}, indent=1) + "\n")


def _write(path: pathlib.Path, rows: Sequence[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    row_files.write(str(path), rows)


def _template(name: str) -> dict[str, Any]:
    """Returns a template; JSON is YAML too."""
    fields = {key: f"{{{{{key}}}}}" for key in ("first", "second", "letters")}
    return {
        "name": name,
        "jinja": f"{TEMPLATES[name].format(**fields)} ||| {{{{choices[label]}}}}",
        "answer_choices": "{{choices | join(' ||| ')}}",
        "metadata": {"original_task": True, "choices_in_prompt": False, "metrics": ["Accuracy"]},
    }


def pieces() -> tuple[str, ...]:
    """Returns what is one piece of the vocabulary: the words of operations, and each letter at each place, such as 'd1'."""
    letters = (
        f"{letter}{place}" for place in range(1, compositions.LENGTH + 1) for letter in LETTERS
    )
    return (*KNOWN_WORDS.values(), *NEW_WORDS.values(), *letters)


def name_of(pair: Pair) -> str:
    """Returns the name of a composition, such as 'reverse_shift1'."""
    return compositions.task_name(pair).removeprefix("mov_")


def draw(
    pairs: Sequence[Pair],
    count: int,
    rng: np.random.Generator,
    words: Mapping[str, str] = NEW_WORDS,
) -> list[dict[str, Any]]:
    """Returns rows of compositions in turn, on random letters, with these words for the operations."""
    strings = rng.integers(len(LETTERS), size=(count, compositions.LENGTH))
    return [_row(pairs[i % len(pairs)], letters, rng, words) for i, letters in enumerate(strings)]


def _row(
    pair: Pair, letters: np.ndarray, rng: np.random.Generator, words: Mapping[str, str]
) -> dict[str, Any]:
    first, second = pair
    copy, others = compositions.COPY, rng.permutation([*OPERATIONS])
    wrong = [(first, copy), (second, copy), *((first, str(x)) for x in others)]
    choices = [text(compositions.solve(pair, letters))]
    right = choices[0]
    for other in wrong:
        made = text(compositions.solve(other, letters))
        if made not in choices:
            choices.append(made)
        if len(choices) == CHOICES:
            break
    choices = [choices[i] for i in rng.permutation(len(choices))]
    return {
        "first": words[first],
        "second": words[second],
        "letters": text(letters),
        "choices": choices,
        "label": choices.index(right),
    }


def text(numbers: np.ndarray) -> str:
    """Returns letters with their places, such as 'd1b2b3'."""
    return "".join(f"{LETTERS[number]}{place}" for place, number in enumerate(numbers, 1))
