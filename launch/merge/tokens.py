"""The vocabulary of a merge of models with different tokenizers: its tokenizer, and which rows make each model's table.

A token that a model lacks gets, in this order: the base's row, the row of the only model that has it, the mean of the rows
of those that do; zeros if none does.
"""

import dataclasses
import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.common import checkpoint_files
from espalier.common.storage import mirror
from espalier.data.tokenizers import hf_tokenizer
from espalier.launch.merge.checks import tokenizer_of
from espalier.launch.merge.models import CONFIG, HfModel, Model, Read
from espalier.launch.merge.settings import Merge, MergeError, Tokens, TokenSource


@dataclasses.dataclass(frozen=True)
class Vocabulary:
    """The output's vocabulary.

    Attributes:
      folder: folder of the tokenizer that the output's is made of.
      content: tokenizer.json of the output.
      size: number of rows of the tables, padding included.
      ids: id of each token.
      own: ids of the tokens in each model, by path; tokens beyond a model's table are left out.
      sizes: rows of each model's tables.
      tokens: overrides.
      base: path of the base, or None.
    """

    folder: pathlib.Path
    content: bytes
    size: int
    ids: Mapping[str, int]
    own: Mapping[str, Mapping[str, int]]
    sizes: Mapping[str, int]
    tokens: Mapping[str, TokenSource]
    base: str | None


def build(merge: Merge, models: Mapping[str, Model]) -> Vocabulary | None:
    """Returns the output's vocabulary; None if the configuration does not ask for one.

    Raises:
      MergeError: a model has no tokenizer, or the vocabulary cannot be made.
    """
    tokens = merge.tokens
    if tokens is None:
        return None
    paths = merge.models()
    folders = {path: x.folder for path, x in models.items() if isinstance(x, HfModel)}
    source = paths[0] if tokens.source in ("union", "base") else tokens.source
    if tokens.source == "base" and merge.base is None:
        raise MergeError(f"{merge.file}: tokenizer_source: base needs a base_model.")
    if source not in folders:
        folders[source] = pathlib.Path(mirror.local(source))
    texts = {path: _content(merge, folders[path]) for path in dict.fromkeys([source, *paths])}
    vocabularies = {path: hf_tokenizer.load(text).get_vocab(True) for path, text in texts.items()}
    sizes = {path: _rows(merge, models[path]) for path in paths}
    own = {
        path: {token: i for token, i in vocabularies[path].items() if i < sizes[path]}
        for path in paths
    }
    record = json.loads(texts[source])
    # Ids beyond the table of the donor's own model are of no row.
    _strip(record, sizes.get(source))
    new: dict[str, dict[str, Any]] = {}
    if tokens.source == "union":
        for path in paths:
            settings = {x["content"]: x for x in json.loads(texts[path]).get("added_tokens") or []}
            for token in sorted(own[path], key=own[path].__getitem__):
                new.setdefault(token, settings.get(token, {}))
    for token in tokens.tokens:
        new.setdefault(token, {})
    content = _extended(record, new)
    ids = hf_tokenizer.load(content).get_vocab(True)
    size = max(ids.values(), default=-1) + 1
    multiple = tokens.pad_to_multiple_of or 1
    size = -(-size // multiple) * multiple
    base = merge.base
    vocabulary = Vocabulary(folders[source], content, size, ids, own, sizes, tokens.tokens, base)
    _check_overrides(merge, tokens, vocabulary)
    chosen = {x for x, source in tokens.tokens.items() if source.zero or source.model}
    if nowhere := sorted(ids.keys() - chosen - {x for rows in own.values() for x in rows}):
        print(
            f"warning: {merge.file}: {len(nowhere)} tokens of the output, such as {nowhere[0]!r}, have a row in none of the models, and "
            "get zeros.",
            file=sys.stderr,
        )
    return vocabulary


def with_token_ids(
    config: Mapping[str, Any], vocabulary: Vocabulary, donor: HfModel
) -> dict[str, Any]:
    """Returns config.json of the donor, the first model, with ids `..._token_id` of the output's vocabulary.

    An id is that of config.json beside the output's tokenizer; where that has none, the id of the token with the same text. Ids of
    tokens that the output lacks are removed, with a warning.

    Raises:
      CheckpointFileError: config.json beside the tokenizer is damaged.
    """
    if vocabulary.folder == donor.folder:
        return dict(config)
    beside = checkpoint_files.read_json(vocabulary.folder, CONFIG)
    texts = {i: token for token, i in vocabulary.own[donor.path].items()}
    result, changed = dict(config), list[str]()
    for key in (x for x in config if x.endswith("_token_id") and config[x] is not None):
        several = isinstance(config[key], list)
        before = config[key] if several else [config[key]]
        known = [texts[i] for i in before if type(i) is int and texts.get(i) in vocabulary.ids]
        after = [vocabulary.ids[token] for token in known]
        result[key] = after if several else after[0] if after else None
        if not after:
            del result[key]
        if len(after) < len(before) and key not in beside:
            changed.append(key)
    if changed:
        print(
            f"warning: config.json: {', '.join(changed)}: ids of tokens that the output lacks are removed.",
            file=sys.stderr,
        )
    return result | {key: x for key, x in beside.items() if key.endswith("_token_id")}


def _content(merge: Merge, folder: pathlib.Path) -> bytes:
    content = tokenizer_of(folder)
    if content is None:
        raise MergeError(
            f"{merge.file}: tokenizer: {folder} has no tokenizer.json: put the model's there, or remove the tokenizer block."
        )
    return content


def _rows(merge: Merge, model: Model) -> int:
    size = model.config.get("vocab_size") if isinstance(model, HfModel) else None
    if type(size) is not int or size < 1:
        raise MergeError(f"{merge.file}: {model.path}/config.json has no vocab_size: add it.")
    return size


def _strip(record: dict[str, Any], size: int | None) -> None:
    """Removes tokens without a row from a tokenizer.json, with the merges that make them."""
    vocab = record.get("model", {}).get("vocab")
    if size is None or not isinstance(vocab, dict):
        return
    gone = {token for token, i in vocab.items() if i >= size}
    record["added_tokens"] = [x for x in record.get("added_tokens") or [] if x["id"] < size]
    if not gone:
        return
    for token in gone:
        del vocab[token]

    def made_of(merge: Any) -> set[str]:
        parts = merge.split(" ") if isinstance(merge, str) else merge
        return {*parts, "".join(parts)}

    merges = record["model"].get("merges")
    if merges is not None:
        record["model"]["merges"] = [x for x in merges if not made_of(x) & gone]


def _extended(record: dict[str, Any], new: Mapping[str, dict[str, Any]]) -> bytes:
    """Returns tokenizer.json with further tokens, which are matched as a whole before the text is split."""
    tokenizer = hf_tokenizer.load(json.dumps(record).encode())
    there = tokenizer.get_vocab(True)
    following = max(there.values(), default=-1) + 1
    added = list(record.get("added_tokens") or [])
    for token, settings in new.items():
        if token in there:
            continue
        plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
        added.append({**plain, "special": False, **settings, "content": token, "id": following})
        following += 1
    record["added_tokens"] = added
    return json.dumps(record, ensure_ascii=False).encode()


def _check_overrides(merge: Merge, tokens: Tokens, vocabulary: Vocabulary) -> None:
    for token, source in tokens.tokens.items():
        if source.model is None:
            continue
        key = f"{merge.file}: tokenizer.tokens.{token}.source"
        if source.model not in vocabulary.own:
            raise MergeError(
                f"{key}: {source.model} is not merged: give one of {', '.join(vocabulary.own)}."
            )
        other = token if source.token is None else source.token
        there = vocabulary.own[source.model]
        inside = (
            other in there
            if isinstance(other, str)
            else 0 <= other < vocabulary.sizes[source.model]
        )
        if not inside:
            raise MergeError(f"{key}: {source.model} has no token {other!r}: give another.")


@dataclasses.dataclass(frozen=True)
class Rows:
    """The rows of one table of the output for one model.

    Attributes:
      index: for each row of the output, the row of each model's table; -1 if it does not take part: [models, rows].
      padding: first row of padding, which has the mean of the rows before.
    """

    index: np.ndarray
    padding: int


def rows_of(vocabulary: Vocabulary, paths: Sequence[str], path: str) -> Rows:
    """Returns the rows of a model's table, as rows of the tables of `paths` to average."""
    index = np.full((len(paths), vocabulary.size), -1, np.int64)
    position = {name: i for i, name in enumerate(paths)}
    base = vocabulary.base if vocabulary.base in position else None
    for token, row in vocabulary.ids.items():
        override = vocabulary.tokens.get(token)
        own = vocabulary.own[path].get(token)
        if own is not None and not (override and override.force):
            index[position[path], row] = own
            continue
        if override is not None and (override.zero or override.model in position):
            if override.model is not None:
                other = token if override.token is None else override.token
                there = vocabulary.own[override.model]
                index[position[override.model], row] = (
                    there[other] if isinstance(other, str) else other
                )
            continue
        having = [name for name in paths if token in vocabulary.own[name]]
        for name in [base] if base in having else having:
            assert name is not None  # it is in `having`
            index[position[name], row] = vocabulary.own[name][token]
    used = max(vocabulary.ids.values(), default=-1) + 1
    return Rows(index, used)


def reader(rows: Rows, reads: Sequence[Read], width: int, dtype: np.dtype) -> Read:
    """Returns the function that reads a model's table by the output's rows.

    Args:
      rows: of the model.
      reads: of each model's table.
      width: values of a row.
      dtype: of the result.
    """
    padding = _mean_row(rows, reads, width) if rows.padding < rows.index.shape[1] else None

    def read(low: int, high: int) -> np.ndarray:
        first, last = low // width, -(-high // width)
        table = _gather(rows.index[:, first:last], reads, width)
        if padding is not None and last > rows.padding:
            table[max(0, rows.padding - first) :] = padding
        return table.astype(dtype).reshape(-1)[low - first * width : high - first * width]

    return read


def _gather(index: np.ndarray, reads: Sequence[Read], width: int) -> np.ndarray:
    """Returns the means of the rows of an index [models, rows], as float32 (float64 of float64)."""
    parts = [_rows_at(rows, read, width) for rows, read in zip(index, reads, strict=True)]
    work = np.float64 if any(part.dtype == np.float64 for part in parts) else np.float32
    total = np.zeros((index.shape[1], width), work)
    for rows, part in zip(index, parts, strict=True):
        total[rows >= 0] += part
    return total / np.maximum((index >= 0).sum(0), 1)[:, None].astype(work)


def _rows_at(rows: np.ndarray, read: Callable[[int, int], np.ndarray], width: int) -> np.ndarray:
    """Returns the rows with indices >= 0, in their order; neighbouring rows are read together."""
    wanted = rows[rows >= 0]
    if not wanted.size:
        return np.zeros((0, width), np.float32)
    starts = np.flatnonzero(np.r_[True, np.diff(wanted) != 1])
    ends = np.r_[starts[1:], wanted.size]
    pieces = [
        read(int(wanted[a]) * width, (int(wanted[b - 1]) + 1) * width).reshape(-1, width)
        for a, b in zip(starts, ends, strict=True)
    ]
    return np.concatenate(pieces).astype(
        np.float64 if pieces[0].dtype == np.float64 else np.float32
    )


def _mean_row(rows: Rows, reads: Sequence[Read], width: int, step: int = 4096) -> np.ndarray:
    """Returns the mean of all rows that are no padding."""
    total = np.zeros(width)
    for first in range(0, rows.padding, step):
        last = min(first + step, rows.padding)
        total += _gather(rows.index[:, first:last], reads, width).sum(0, dtype=np.float64)
    return total / max(1, rows.padding)
