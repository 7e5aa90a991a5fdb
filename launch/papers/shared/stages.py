"""Stages of an experiment: what has been measured with the same settings is not measured again."""

import dataclasses
import json
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

from data.cache import cache_dir


@dataclasses.dataclass(frozen=True)
class Stages:
    """Results by stage, a JSON file each.

    Attributes:
      folder: of the files.
    """

    folder: pathlib.Path

    def get(
        self, name: str, settings: Mapping[str, Any], measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """The result of a stage: read if its settings are the same, else measured and kept."""
        path = self.folder / f"{name}.json"
        wanted = json.loads(json.dumps(settings))
        if path.exists():
            kept = json.loads(path.read_bytes())
            if kept["settings"] == wanted:
                print(f"{name}: already measured ({path})", flush=True)
                return kept
        print(f"{name}: measuring", flush=True)
        began = time.monotonic()
        result = measure()
        kept = {
            "settings": wanted,
            "seconds": round(time.monotonic() - began, 1),
            "result": json.loads(json.dumps(result)),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        cache_dir.write_json(path, kept)
        return kept
