"""Words that hide the meaning of a sentence, and what to write instead; `make lint` reports them with file and line.

They are looked for in pages and their templates, outside code, and in docstrings, help texts and titles of claims.

Example:
  python -m tests.words
"""

import ast
import fnmatch
import pathlib
import re
import subprocess
import sys
from collections.abc import Iterator

ROOT = pathlib.Path(__file__).parent.parent
# A pattern of what not to write, and what to write.
WORDS = {
    r"anew": "again",
    r"bit by bit": "'bit for bit', or 'bit-identical'",
    r"whereof|thereof|therein|thereby|wherein|hitherto|henceforth": "'of which', 'in it', 'so', or a sentence of its own",
    r"go(es)? on (with|from|where|as|until|at|in)": "'continues'",
    r"in (the )?place of": "'instead of'",
    r"(those|such) whose": "the noun, with 'that have' or 'with'",
    r"is of (it|them|its)": "who has what",
    r"less (that|those|the one|the mean|what|where|at) (of|in|at|with|\w+s)": "'minus'",
    r"(than|as) (that|those) of": "the noun itself",
    r"of (\w+ ){1,3}of (\w+ ){1,3}of (\w+ ){1,3}of": "shorter phrases",
}
# A title, or the first cell of a row, is met alone.
WORDS |= {
    r"^(#+|\|) (and|so (is|are|do|does)|the same|they|it|these|others)": "a title that says its subject",
}
# The changelog is history, and pages of results are written from other files.
NOT_CHECKED = (
    *("CHANGELOG.md", "tests/*"),
    *("docs/evidence/scorecard.md", "docs/reproductions/*"),
)
_CODE = re.compile(
    r"^( *)(```|~~~).*?^\1\2|`[^`\n]+`|\]\([^)\n]*\)|<[^>\n]*>|https?://\S+",
    re.DOTALL | re.MULTILINE,
)
# A claim of a paper, whose words are fixed before its runs.
_CLAIM = re.compile(r"^<!-- [A-Z]+\d+\w* -->\n.*?(?=^<!--|\Z)", re.DOTALL | re.MULTILINE)


def texts(path: pathlib.Path) -> Iterator[tuple[int, str]]:
    """Yields (first line, text) of what a reader sees of a file."""
    source = path.read_text("utf-8")
    if path.suffix == ".md":
        yield 1, _CLAIM.sub(_blank, source)
        return
    called = "papers" in path.parts  # titles of claims and figures are arguments
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            if ast.get_docstring(node, clean=False) is not None:
                yield node.body[0].lineno, ast.get_docstring(node, clean=False) or ""
        elif called and isinstance(node, ast.Call):
            yield from _strings(*node.args)
        elif isinstance(node, ast.keyword) and node.arg in ("help", "what", "title", "xlabel"):
            yield from _strings(node.value)


def _strings(*nodes: ast.expr) -> Iterator[tuple[int, str]]:
    for part in (part for node in nodes for part in ast.walk(node)):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.lineno, part.value


def _blank(match: re.Match[str]) -> str:
    return re.sub(r"[^\n]", "\0", match[0])


def faults(path: pathlib.Path) -> Iterator[str]:
    """Yields a line for each word in a file that has a replacement."""
    for first, text in texts(path):
        text = _CODE.sub(_blank, text)
        for pattern, instead in WORDS.items():
            for match in re.finditer(
                rf"(?<!\w)(?:{pattern})(?!\w)".replace(" ", r"\s+"),
                text,
                re.IGNORECASE | re.MULTILINE,
            ):
                line = first + text.count("\n", 0, match.start())
                yield f"{path.relative_to(ROOT)}:{line}: {' '.join(match[0].split())!r}: write {instead}"


def main() -> int:
    """Prints the words that have a replacement; returns 1 if there are any."""
    listed = ["git", "ls-files", "*.md", "*.py"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    paths = [
        ROOT / name
        for name in names.split()
        if not any(fnmatch.fnmatch(name, pattern) for pattern in NOT_CHECKED)
    ]
    found = list(dict.fromkeys(fault for path in paths for fault in faults(path)))
    print("\n".join([*found, f"{len(found)} words to replace"] if found else ["words: all good"]))
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
