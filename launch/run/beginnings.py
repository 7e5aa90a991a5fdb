"""How the prompts of a run begin: as its own checkpoints record, else as the model was trained that it starts from.

Example: `DOCUMENT_START = @beginnings.start_token()`.
"""

import os
from collections.abc import Mapping
from typing import Any

from espalier.trainers.checkpoints import step_dir
from espalier.trainers.checkpoints.manifest import DamagedCheckpointError


def start_token(
    *, model_dir: str | os.PathLike | None = None, checkpoint: str | os.PathLike | None = None
) -> int | None:
    """Returns the id before the first token of a document; None for no id, as with most imported models.

    Args:
      model_dir: directory of this run.
      checkpoint: run or step directory of the model that this run starts from. A model without a record has 0.
    """
    return _recorded(model_dir, checkpoint).get("start_token", 0)


def add_bos(
    *, model_dir: str | os.PathLike | None = None, checkpoint: str | os.PathLike | None = None
) -> bool:
    """Returns whether texts begin with BOS; arguments as for `start_token`. A model without a record has False."""
    return bool(_recorded(model_dir, checkpoint).get("add_bos", False))


def _recorded(*checkpoints: str | os.PathLike | None) -> Mapping[str, Any]:
    for path in checkpoints:
        # What is missing or damaged is reported when the state is restored.
        try:
            if path is not None:
                return step_dir.newest_good(path, step_dir.read_record)["meta"]
        except (FileNotFoundError, DamagedCheckpointError):
            pass
    return {}
