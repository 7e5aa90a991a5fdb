"""Outputs of the commands: the folder of fitted factors, and outputs below an address.

The latter are written in a folder of this machine, and copied stage by stage.
"""

import contextlib
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from espalier.common.storage import mirror, output_files, paths
from espalier.common.storage.lock import HeldError, StoreLock
from espalier.launch.inference.row_files import RowFileError
from espalier.launch.run.load_run import LoadError


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


RECORD = "influence.json"
SAMPLE = "sample.json"
SAMPLED = 1024  # first documents of the fit that the folder has, for `ekfac_cg`
_MAX_BYTES = 64 << 20


def begin(folder: pathlib.Path, record: Mapping[str, Any], *, out: str) -> None:
    """Writes the record of new factors, or checks that the folder's factors have the same one; `out` is for messages.

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
            f"--factors={folder} has no {RECORD}: give the folder that `launch.influence fit --out` wrote."
        )
    try:
        with open(path, "rb") as file:
            record = json.loads(file.read(_MAX_BYTES))
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
