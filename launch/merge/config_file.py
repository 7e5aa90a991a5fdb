"""Reads the configuration of merges: a YAML file in mergekit's dialect, with one or several documents.

Extras of this project are, in a value with conditions, `pattern` (a regular expression instead of `filter`'s substring) and
`non_layer` (the value of tensors outside of layers).
"""

import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from espalier.common.storage import mirror
from espalier.launch.merge.document import Document
from espalier.launch.merge.settings import Merge, MergeError

_MAX_BYTES = 1 << 18
_MAX_NODES = 50_000
_MAX_DEPTH = 20
_MAX_BRACKETS = 50  # inside each other; PyYAML takes quadratic time for them
# Not octal (010), of base 60 (1:30) or with underscores, as in YAML 1.1.
_DECIMAL = re.compile(
    r"[-+]?((0|[1-9]\d*)(\.\d*)?|\.\d+)([eE][-+]?\d+)?|[-+]?\.(inf|nan)", re.I | re.A
)


def read(path: str) -> list[Merge]:
    """Returns the merges of a file, in an order in which each comes after those that it uses.

    What begins with a brace is no path but the text itself.

    Raises:
      MergeError: the file is not a configuration of merges.
    """
    documents, path = _documents(path), _name(path)
    merges = [Document(path, i, len(documents)).merge(x) for i, x in enumerate(documents)]
    names = [merge.name for merge in merges]
    if twice := [name for name in names if names.count(name) > 1]:
        shown = "documents without a name" if twice[0] is None else f"documents named {twice[0]!r}"
        raise MergeError(f"{path} has {len(twice)} {shown}: give each its own `name:`.")
    return _in_order(path, merges)


def content(path: str) -> dict[str, Any]:
    """Returns the only document of a file, whose keys nobody has checked; raises MergeError."""
    documents = _documents(path)
    if len(documents) != 1 or not isinstance(documents[0], dict):
        raise MergeError(f"{path} must be one mapping, such as merge_method: ties.")
    return documents[0]


def one(file_or_content: str | Mapping[str, Any], *, name: str = "MERGE") -> Merge:
    """Returns the only merge of a file, or of a document's content as Python values, which messages call `name`.

    Raises:
      MergeError: it is not the configuration of one merge.
    """
    if isinstance(file_or_content, str):
        merges = read(file_or_content)
    else:
        # Configurations of gin have tuples where YAML has lists.
        content = json.loads(json.dumps(file_or_content))
        merges = [Document(name, 0, 1).merge(content)]
    if len(merges) > 1:
        raise MergeError(
            f"{file_or_content} has {len(merges)} documents, and one merge is read here: make the others with espalier merge, "
            "and name their results."
        )
    return merges[0]


def _name(path: str) -> str:
    """Returns what messages call a configuration: its file, or the flag that has its text."""
    return "--config" if path.startswith("{") else path


def _documents(path: str) -> list[Any]:
    import yaml

    class Loader(yaml.SafeLoader):
        """Plain data only; a key that occurs twice is an error, and so is a number that versions of YAML read otherwise."""

        def number(self, node: Any) -> Any:
            if not _DECIMAL.fullmatch(node.value):
                raise MergeError(
                    f"{path}, line {node.start_mark.line + 1}: {node.value[:80]} is a number in another notation, which versions "
                    "of YAML read differently: write it as a decimal number, or in quotes."
                )
            kind = node.tag.rpartition(":")[2]
            return (
                self.construct_yaml_int(node) if kind == "int" else self.construct_yaml_float(node)
            )

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if (text := str(key.value)) in seen and text != "<<":
                    line = key.start_mark.line + 1
                    raise MergeError(f"{path}, line {line}: {text!r} occurs twice: remove one.")
                seen.add(text)
            return super().construct_mapping(node, deep)

    for kind in ("int", "float"):
        Loader.add_constructor(f"tag:yaml.org,2002:{kind}", Loader.number)
    if path.startswith("{"):
        content = path.encode()
    else:
        with open(mirror.local(path), "rb") as file:
            content = file.read(_MAX_BYTES + 1)
    path = _name(path)
    if len(content) > _MAX_BYTES:
        raise MergeError(
            f"{path} is longer than {_MAX_BYTES:,} bytes: is it a merge configuration?"
        )
    depth = 0
    for bracket in re.findall(rb"[][{}]", content):
        depth += 1 if bracket in b"[{" else -1
        if depth > _MAX_BRACKETS:
            raise MergeError(f"{path} has more than {_MAX_BRACKETS} brackets inside each other.")
    try:
        loader = Loader(content.decode("utf-8"))
        documents = []
        while loader.check_data():
            documents.append(loader.get_data())
    except UnicodeDecodeError as error:
        raise MergeError(f"{path} is not UTF-8 text ({error.reason}): convert it.") from None
    except MergeError:
        raise
    except (yaml.YAMLError, RecursionError, ValueError, TypeError) as error:
        text = " ".join(str(error).split())[:300]
        raise MergeError(f"{path} is not YAML of plain values: {text}") from None
    _check_size(path, documents)
    if documents and documents[-1] is None:
        documents.pop()  # after a trailing ---
    if not documents:
        raise MergeError(f"{path} is empty: write a merge configuration, see docs/use/merging.md.")
    return documents


def _check_size(path: str, documents: Any) -> None:
    """Raises MergeError if aliases multiply to a huge or endless document."""
    count, open_ = 0, [(documents, 0)]
    while open_:
        value, depth = open_.pop()
        count += 1
        if count > _MAX_NODES or depth > _MAX_DEPTH:
            raise MergeError(f"{path} has too many values, or too deep ones: remove aliases.")
        children = (
            value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        )
        open_ += [(child, depth + 1) for child in children]


def _in_order(path: str, merges: Sequence[Merge]) -> list[Merge]:
    by_name = {merge.name: merge for merge in merges if merge.name is not None}
    done: list[Merge] = []

    def visit(merge: Merge, chain: tuple[str, ...]) -> None:
        if merge in done:
            return
        for model in merge.models():
            if model in chain:
                raise MergeError(f"{path}: {' needs '.join([*chain, model])}: break this circle.")
            if model in by_name:
                visit(by_name[model], (*chain, model))
        done.append(merge)

    for merge in merges:
        visit(merge, (merge.name,) if merge.name else ())
    return done
