"""Outputs of a command that may be below an address: written in a folder of this machine, and copied stage by stage."""

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence

from espalier.common.storage import mirror, paths
from espalier.common.storage.lock import HeldError, StoreLock
from espalier.launch.inference.row_files import RowFileError


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
