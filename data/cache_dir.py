"""Where corpora, vocabularies and other derived files are kept between runs."""

import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Callable

VARIABLE = "ESPALIER_CACHE"


def cache_dir(*parts: str, override: str | os.PathLike | None = None) -> pathlib.Path:
    """`parts` under `override`, else under $ESPALIER_CACHE, else under ~/.cache/espalier."""
    if override is None:
        override = os.environ.get(VARIABLE) or "~/.cache/espalier"
    return pathlib.Path(override).expanduser().joinpath(*parts)


def build_directory(target: pathlib.Path, build: Callable[[pathlib.Path], None]) -> None:
    """Fills a directory so that it exists whole or not at all.

    `build` writes into a temporary sibling, which is then renamed. Where another process was
    faster, its directory stays: both hold the same content, for their name is a hash of all inputs.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        build(temporary)
        temporary.chmod(0o755)
        try:
            temporary.rename(target)
        except OSError:
            if not target.is_dir():
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(path: pathlib.Path, content: dict) -> None:
    """Writes JSON so that a reader sees the old file or the new one."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(content, file, indent=1, ensure_ascii=False)
    os.replace(temporary, path)
