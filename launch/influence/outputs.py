"""Outputs of the commands: fitted factors, scores with what is beside them, and outputs below an address.

Scores are ranked as they are, and divided by the norm of the document's gradient, which long and repetitive documents win
less often. Outputs below an address are written in a folder of this machine, and copied stage by stage.
"""

import contextlib
import heapq
import json
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from espalier.common.bars import Bar
from espalier.common.storage import mirror, output_files, paths
from espalier.common.storage.lock import HeldError, StoreLock
from espalier.data.text import documents
from espalier.launch.inference import row_files
from espalier.launch.inference.row_files import RowFileError
from espalier.launch.influence import labels
from espalier.launch.load.load_run import LoadError

RECORD = "influence.json"
SAMPLE = "sample.json"
SAMPLED = 1024  # first documents of the fit that the folder has, for `ekfac_cg`
_MAX_RECORD = 64 << 20
_EXAMPLE = '{"scores": [0.1, ...], "norm": 2.0}'
_MAX_BYTES = 1 << 30
# Of each query: the highest and the lowest scores, as they are and divided by the norms of the documents' gradients.
ENDS = ("top", "bottom", "top_per_norm", "bottom_per_norm")
PLACE = ("sequence", "step")  # of a row of training sequences: where it is in training
_Ranked = tuple[float, int, float, dict[str, int]]  # value, negative document, score, place


@contextlib.contextmanager
def opened(
    out: str, *, beside: bool = False, without: Sequence[str] = ()
) -> Iterator[tuple[str, Callable[[], None]]]:
    """Yields a path of this machine with what is at `out`, and a function that copies what has changed to the address.

    For a path of this machine these are the path itself, and a function that does nothing.

    Args:
      out: folder, or with `beside` a file.
      beside: whether `out` is a file, beside which others begin with its name.
      without: folders in `out` that are not copied.

    Raises:
      RowFileError: the address is a whole bucket, or several processes or commands would write there.
      StoreError: the store refuses, or cannot be reached.
    """
    if not paths.is_remote(out):
        yield out, lambda: None
        return
    import jax

    if jax.process_count() > 1:
        raise RowFileError(
            f"--out={out}: several processes need a folder that all of them can read: give one, or use one process."
        )
    out = paths.absolute(out)
    if not paths.split(out)[2]:
        raise RowFileError(f"--out={out} is a whole bucket: give a name in it, {out}/NAME.")
    parent, _, name = out.rpartition("/") if beside else (out, "", "")
    kind = ".beside" if beside else ""  # folders of this machine must not lie in each other
    if beside:
        without = [*without, f"{name}.shards"]  # of a pipeline, whose workers write them
    try:
        held = StoreLock(f"{out}.lock")
    except HeldError as error:
        raise RowFileError(
            f"--out={out} is in use: {error} writes it. Stop it, or give another --out."
        ) from None
    with contextlib.closing(held):
        store = mirror.Mirror(parent, writer=True, without=without, name=kind, beginning=name)

        def push() -> None:
            held.check()
            store.push()

        yield os.path.join(store.path, name), push


def begin(folder: pathlib.Path, record: Mapping[str, Any], *, out: str) -> None:
    """Writes the record of new factors, or checks that the folder's factors have the same record; messages name `out`.

    Raises:
      LoadError: the folder has factors of other settings, documents or parameters.
    """
    import jax

    if (folder / RECORD).exists():
        other = read(str(folder))
        # The place of a checkpoint may change; its digest is compared.
        names = [
            n for n in record if n not in ("checkpoint", "params") and other.get(n) != record[n]
        ]
        if names:
            raise LoadError(
                f"--out={out} has factors of other {', '.join(names)}: give another folder, or delete it to fit them anew."
            )
    elif jax.process_index() == 0:
        folder.mkdir(parents=True, exist_ok=True)
        output_files.write(folder / RECORD, json.dumps(record, indent=1) + "\n")


def local(folder: str) -> pathlib.Path:
    """Returns the folder of factors, or for an address a copy."""
    return pathlib.Path(mirror.local(folder))


def read(folder: str) -> dict[str, Any]:
    """Returns the record of fitted factors.

    Raises:
      LoadError: the folder has none, or a damaged one.
    """
    path = local(folder) / RECORD
    if not path.is_file():
        raise LoadError(
            f"--factors={folder} has no {RECORD}: give the folder that `espalier influence fit --out` wrote."
        )
    try:
        with open(path, "rb") as file:
            record = json.loads(file.read(_MAX_RECORD))
        if not isinstance(record, dict):
            raise ValueError("it is not a JSON object")
        return {**record, "checkpoint": str(record["checkpoint"]), "model": str(record["model"])}
    except (ValueError, KeyError, RecursionError) as error:
        raise LoadError(f"{path} is damaged ({error}): fit the factors again.") from None


def check_model(folder: str, record: Mapping[str, Any], digest: str, checkpoint: str) -> None:
    """Raises LoadError if factors were fitted on other parameters."""
    if record["model"] != digest:
        raise LoadError(
            f"--factors={folder} are of another checkpoint: they were fitted on {record['checkpoint']}, whose parameters "
            f"differ from those of {checkpoint}. Give that checkpoint, or fit factors of this one."
        )


def check_float64(dtype: str) -> None:
    """Raises LoadError for float64 if JAX has it switched off."""
    import jax

    if dtype == "float64" and not jax.config.jax_enable_x64:
        raise LoadError(
            "Factors in float64 (--factor_dtype=float64) need JAX_ENABLE_X64=1 in the environment, to fit them and to score."
        )


def queries_folder(scores: str) -> str:
    """Returns the folder of the queries' gradients and the record of a file of scores."""
    return f"{scores}.queries"


def top_file(scores: str) -> str:
    return f"{scores}.top.json"


def tokens_file(scores: str) -> str:
    """Returns the file of the token scores of top and bottom documents."""
    return f"{scores}.tokens.jsonl"


def texts_file(scores: str) -> str:
    """Returns the file of the texts of top and bottom documents that were read as tokens."""
    return f"{scores}.texts.jsonl"


def completions_file(scores: str) -> str:
    """Returns the file of the queries with the completions that the model has written."""
    return f"{scores}.completions.jsonl"


def check_same(path: str, recorded: Mapping[str, Any], flag: str) -> None:
    """Raises RowFileError if a file is not the one that was scored."""
    try:
        digest = row_files.digest(path, flag)
    except RowFileError as error:
        raise RowFileError(f"{error} If it was moved, give its new place with --{flag}.") from None
    if digest != recorded["sha256"]:
        raise RowFileError(
            f"--{flag}={path} has changed since it was scored: give the file that was scored, or score again with another "
            "--out."
        )


def asked(scores: str, record: Mapping[str, Any], queries: str | None = None) -> list[labels.Query]:
    """Returns the queries of scores with their labels.

    Args:
      scores: file of scores.
      record: of the scores.
      queries: the file of queries, if it was moved.

    Raises:
      RowFileError: the file has changed since it was scored, or a label is of the wrong kind.
    """
    path = queries or record["queries"]["path"]
    check_same(path, record["queries"], "queries")
    if record.get("completions"):
        path = completions_file(scores)
        check_same(path, record["completions"], "scores")
    rows = row_files.read(path, example="{...}", flag="queries")
    return [labels.query(row, where) for where, row in rows]


def local_scores(scores: str) -> str:
    """Returns the path of a file of scores with its accompanying files, of an address a local copy; raises RowFileError without a file."""
    if not paths.is_remote(scores):
        return scores
    for of in (queries_folder, top_file, tokens_file, texts_file, completions_file):
        copy = mirror.place(of(paths.absolute(scores)))
        try:
            mirror.local(of(scores))
        except FileNotFoundError:  # not written, or deleted since it was copied
            shutil.rmtree(copy) if os.path.isdir(copy) else paths.delete(copy)
    return os.fspath(row_files.local(scores, "scores"))


def check_stored(tops: Mapping[str, Any], top: int, flag: str = "top") -> None:
    """Raises RowFileError if fewer than `top` documents of each query are stored; `flag` asks for them."""
    stored = min((len(query[end]) for query in tops["queries"] for end in ENDS), default=0)
    if top > stored and stored < tops["documents"]:
        raise RowFileError(
            f"--{flag}={top}: {stored} documents at each end are stored: run the same `espalier influence score` command with "
            f"--top={top}."
        )


def shown(tops: Mapping[str, Any], count: int) -> list[list[int]]:
    """Returns the documents among the first `count` of each end of each query, without repetition, by query."""
    return [
        list(dict.fromkeys(item["document"] for end in ENDS for item in query[end][:count]))
        for query in tops["queries"]
    ]


def read_rows(path: str) -> Iterator[dict[str, Any]]:
    """Yields the row of each document: `scores`, and `norm` and `layers` where the method has them.

    Raises:
      RowFileError: a row is cut short, is not of `espalier influence score`, or has another number of scores than the first.
    """
    size = None
    again = "run the same `espalier influence score` command again, and it writes the rest"
    try:
        for number, row in documents.read_json_lines(pathlib.Path(path), example=_EXAMPLE):
            scores, norm = row.get("scores"), row.get("norm")
            if not _are_numbers(scores) or size not in (None, len(scores)):
                raise RowFileError(
                    f"{path}, line {number} is not a row of {size or 'the'} scores, such as {_EXAMPLE}: run `espalier influence "
                    "score` again with another --out."
                )
            if not all(map(math.isfinite, (*scores, *([] if norm is None else [norm])))):
                raise RowFileError(
                    f"{path}, line {number} has a score that is not finite: remove this document, or a query whose loss is not "
                    "finite, and run `espalier influence score` with another --out."
                )
            size = len(scores)
            yield row
    except documents.DataError as error:
        raise RowFileError(f"{path} was cut short or damaged ({error}): {again}.") from None


def _are_numbers(scores: Any) -> bool:
    return isinstance(scores, list) and all(type(x) in (int, float) for x in scores)


def read_table(
    scores: str, count: int, each: Callable[[int, dict[str, Any]], None] | None = None
) -> tuple[np.ndarray, np.ndarray | None]:
    """Returns all scores [N, Q] and norms [N], float32; None for norms that the method does not have.

    Args:
      scores: file of scores.
      count: number of its rows, N.
      each: called with the number of each document and its row.

    Raises:
      RowFileError: there are fewer or more rows, or a row that `read_rows` raises for.
    """
    table_NQ, norms_N, rows = np.zeros((count, 0), np.float32), np.zeros(count, np.float32), 0
    has_norms = count > 0
    quiet = None if count > 10_000 else True
    for i, row in enumerate(Bar(read_rows(scores), desc="read", total=count, disable=quiet)):
        rows = i + 1
        if rows > count:
            continue
        if i == 0:
            table_NQ = np.zeros((count, len(row["scores"])), np.float32)
        table_NQ[i] = row["scores"]
        norm = row.get("norm")
        has_norms &= norm is not None
        norms_N[i] = norm or 0.0
        if each is not None:
            each(i, row)
    if rows != count:
        short = "was cut short" if rows < count else "has rows of another file"
        raise RowFileError(
            f"--scores={scores} {short}: it has {rows:,} of {count:,} rows. Run the same `espalier influence score` "
            "command again, and it writes the rest."
        )
    return table_NQ, norms_N if has_norms else None


def check_earlier(path: str, record: Mapping[str, Any], out: str) -> None:
    """Raises LoadError unless a file of scores is new, or its record has these values; `out` is its name in the message."""
    from espalier.trainers.influence import files

    folder = pathlib.Path(queries_folder(path))
    if files.exists(folder):
        _, earlier = files.read(folder)
        if names := sorted(name for name in record if earlier.get(name) != record[name]):
            raise LoadError(
                f"--out={out} has scores of other {', '.join(names)}: give another file, or delete it and {queries_folder(out)}."
            )
    elif os.path.exists(path) and os.path.getsize(path):
        raise LoadError(
            f"--out={out} exists and is not of `espalier influence score`: give another file, or delete it."
        )


def per_norm(scores_NQ: np.ndarray, norms_N: np.ndarray) -> np.ndarray:
    """Returns scores [N, Q] divided by the norms [N] of the documents' gradients; 0 for a gradient of zero."""
    norms_N1 = norms_N[:, None]
    return np.divide(scores_NQ, norms_N1, out=np.zeros_like(scores_NQ), where=norms_N1 > 0)


def ranked_by(
    rank_by: str, scores_NQ: np.ndarray, norms_N: np.ndarray | None, *, method: str
) -> np.ndarray:
    """Returns scores [N, Q] as they are, or for "per_norm" divided by norms; raises RowFileError for a method without norms."""
    if rank_by == "score":
        return scores_NQ
    if norms_N is None:
        raise RowFileError(
            f"--rank_by=per_norm needs norms of gradients, and --method={method} has none: rank by the score."
        )
    return per_norm(scores_NQ, norms_N)


def write_top(scores: str, *, top: int) -> None:
    """Writes the `top` documents at both ends of each query's ranking to `top_file`."""
    best: list[dict[str, list[_Ranked]]] = []
    count = 0
    for document, row in enumerate(read_rows(scores)):
        norm = row.get("norm")
        place = {name: row[name] for name in PLACE if name in row}
        best = best or [{name: [] for name in ENDS} for _ in row["scores"]]
        for query, score in zip(best, row["scores"], strict=True):
            per_norm = score if norm is None else score / norm if norm else 0.0
            for name, value in (("top", score), ("top_per_norm", per_norm)):
                # Of equal scores, the first document ranks first.
                _push(query[name], (value, -document, score, place), top)
                low = name.replace("top", "bottom")
                _push(query[low], (-value, -document, score, place), top)
        count = document + 1
    table = {
        "documents": count,
        "queries": [
            {
                name: [
                    {
                        "document": -item[1],
                        "score": item[2],
                        "value": abs(item[0]) and item[0] * sign,
                        **item[3],
                    }
                    for item in sorted(heap, reverse=True)
                ]
                for name, heap in query.items()
                for sign in [-1.0 if name.startswith("bottom") else 1.0]
            }
            for query in best
        ],
    }
    output_files.write(top_file(scores), json.dumps(table) + "\n")


def _push(heap: list[_Ranked], item: _Ranked, size: int) -> None:
    if len(heap) < size:
        heapq.heappush(heap, item)
    else:
        heapq.heappushpop(heap, item)


def read_top(scores: str) -> dict[str, Any]:
    """Returns the table of `write_top`: `documents`, their number, and of each of the `queries` the ENDS.

    Raises:
      RowFileError: the scores are not complete, or the table is damaged.
    """
    path = top_file(scores)
    if not os.path.isfile(scores):
        raise RowFileError(f"--scores={scores}: there is no such file.")
    if not os.path.isfile(path):
        raise RowFileError(
            f"--scores={scores} is not complete: run the same `espalier influence score` command again, and it continues."
        )
    try:
        with open(path, "rb") as file:
            table = json.loads(file.read(_MAX_BYTES))
        if not isinstance(table["documents"], int) or not isinstance(table["queries"], list):
            raise ValueError("it has no documents and queries")
        for query in table["queries"]:
            for item in (item for end in ENDS for item in query[end]):
                if not 0 <= item["document"] < table["documents"]:
                    raise ValueError(f"it has no document {item['document']}")
                float(item["score"]), float(item["value"])
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise RowFileError(
            f"{path} is damaged ({error}): delete it, and run `espalier influence score` again."
        ) from None
    return table
