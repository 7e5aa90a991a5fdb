"""Writes documents of real text, and queries, for the demonstration with SmolLM2.

  python -m espalier.launch.papers.influence.smollm_files --to=DIR --documents=2000

In DIR are documents.jsonl ({"text", "source"}), pieces of the texts of installed packages, equally many of each source, and
queries.jsonl. Pieces that have the answer of a query come first, up to ANSWERS for each, so that there is something to retrieve.
"""

if __name__ == "__main__":
    from espalier.launch.papers.influence import smollm_files

    raise SystemExit(smollm_files.main())

import argparse
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from espalier.launch import cli
from espalier.launch.inference import row_files
from espalier.launch.influence import labels

DOCUMENTS, QUERIES = "documents.jsonl", "queries.jsonl"
SOURCES = ("text", "code", "markup")
ANSWERS = 4  # pieces with the answer of each query
_SHORTEST, _LONGEST = 200, 480  # characters of a piece: some 128 tokens
_SOURCE_BYTES = 3_000_000


def _fact(prompt: str, completion: str, answer: Any) -> dict[str, Any]:
    return {
        **{"prompt": prompt, "completion": completion, "kind": "factual", "task": "facts"},
        "answer": answer,
    }


def _worked(
    task: str, prompt: str, completion: str, answer: str, procedure: list[str]
) -> dict[str, Any]:
    return {
        **{"prompt": f"{prompt} Think step by step.", "completion": completion},
        **{"kind": "reasoning", "task": task, "answer": answer, "procedure": [procedure]},
    }


ASKED: tuple[Mapping[str, Any], ...] = (
    _fact("In the beginning God created the heaven and the", " earth.", "the heaven and the earth"),
    _fact("The LORD is my shepherd; I shall not", " want.", "I shall not want"),
    _fact(
        "In Python, an anonymous function is written with the keyword",
        " lambda.",
        [["anonymous", "lambda"], ["lambda expression"]],
    ),
    _fact(
        "The GNU General Public License was written by the Free Software",
        " Foundation.",
        "Free Software Foundation",
    ),
    _worked(
        *("arithmetic", "Calculate the answer: (7 - 4) * 7."),
        " First, 7 - 4 = 3. Then, 3 * 7 = 21. The answer is 21.",
        *("3 * 7 = 21", ["subtract", "multiply"]),
    ),
    _worked(
        *("arithmetic", "Calculate the answer: (2 + 9) * 5."),
        " First, 2 + 9 = 11. Then, 11 * 5 = 55. The answer is 55.",
        *("11 * 5 = 55", ["add", "multiply"]),
    ),
    _worked(
        *("slopes", "What is the slope of the line through (1, 2) and (3, 8)?"),
        " The slope is (8 - 2) / (3 - 1) = 6 / 2 = 3.",
        *("6 / 2 = 3", ["slope"]),
    ),
    _worked(
        *("slopes", "What is the slope of the line through (2, 5) and (6, 13)?"),
        " The slope is (13 - 5) / (6 - 2) = 8 / 4 = 2.",
        *("8 / 4 = 2", ["slope"]),
    ),
    _worked(
        *("equations", "Solve for x: 5x + 21 = 91."),
        " Subtract 21 from both sides: 5x = 70. Divide by 5: x = 14.",
        *("x = 14", ["solve", "equation"]),
    ),
    _worked(
        *("equations", "Solve for x: 3x + 7 = 25."),
        " Subtract 7 from both sides: 3x = 18. Divide by 3: x = 6.",
        *("x = 6", ["solve", "equation"]),
    ),
    {
        **{"prompt": "def factorial(n):\n", "kind": "code", "task": "code"},
        "completion": "    if n == 0:\n        return 1\n    return n * factorial(n - 1)\n",
        **{"answer": "factorial(n - 1)", "procedure": "def factorial"},
    },
    {
        **{"prompt": "for name in sorted(os.listdir(folder)):\n", "kind": "code", "task": "code"},
        "completion": "    path = os.path.join(folder, name)\n",
        **{"answer": "os.path.join(folder, name)", "procedure": [["os.listdir", "os.path.join"]]},
    },
)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    return cli.run_command(__doc__, "smollm_files", _run, add_flags=_add_flags, argv=argv)


def _add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--to", required=True, metavar="DIR", help="write the results to this folder"
    )
    parser.add_argument("--documents", type=int, default=2000, help="number of documents")


def _run(flags: argparse.Namespace) -> None:
    from espalier.data.text import corpus

    texts = corpus.assemble(sources=SOURCES, bytes_per_source=_SOURCE_BYTES)
    by_source = {
        source: [piece for one in texts.documents(source, "train") for piece in pieces(one.text)]
        for source in texts.sources
    }
    folder = pathlib.Path(flags.to)
    folder.mkdir(parents=True, exist_ok=True)
    row_files.write(str(folder / DOCUMENTS), draw(by_source, flags.documents))
    row_files.write(str(folder / QUERIES), ASKED)


def pieces(text: str) -> list[str]:
    """Returns a text in pieces that end at white space, without short ones."""
    cut = re.findall(rf"(?s)(?<!\S)\S.{{0,{_LONGEST - 1}}}(?=\s|$)", text)
    return [piece for piece in cut if len(piece) >= _SHORTEST]


def draw(by_source: Mapping[str, Sequence[str]], count: int) -> list[dict[str, str]]:
    """Returns different documents in random order, the same ones at each call.

    Args:
      by_source: pieces of each source.
      count: number of documents.

    Raises:
      ValueError: there are fewer pieces.
    """
    rng = np.random.default_rng(2411_12580)
    waiting = {
        source: [texts[i] for i in rng.permutation(len(texts))]
        for source, own in by_source.items()
        for texts in [[*dict.fromkeys(own)]]
    }
    if (known := sum(map(len, waiting.values()))) < count:
        raise ValueError(
            f"--documents={count:,}: the texts of installed packages have {known:,} pieces: ask for fewer."
        )
    chosen = {source: _with_answers(own) for source, own in waiting.items()}
    for own in chosen.values():
        del own[max(1, count // len(chosen)) :]
    rest = {source: [x for x in own if x not in chosen[source]] for source, own in waiting.items()}
    while sum(map(len, chosen.values())) < count:
        source = min((s for s in rest if rest[s]), key=lambda s: len(chosen[s]))
        chosen[source].append(rest[source].pop())
    rows = [{"text": text, "source": source} for source, own in chosen.items() for text in own]
    return [rows[i] for i in rng.permutation(len(rows))]


def _with_answers(texts: Sequence[str]) -> list[str]:
    """Returns texts of a source with the answer of a query, at most ANSWERS for each query."""
    patterns = {i: labels.pattern(one["answer"]) for i, one in enumerate(ASKED)}
    by_query = labels.matches(texts, patterns)
    return [*dict.fromkeys(texts[i] for own in by_query.values() for i in own[:ANSWERS])]
