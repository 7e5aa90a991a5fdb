"""Which checkpoint a policy is compared with: found at a run's first start, and the same at every later one.

A run directory may gain checkpoints while another run compares with it, so that its newest step is no answer: what was found
is kept in the comparing run's directory.
"""

import dataclasses
import hashlib
import json
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from trainers.checkpoints import agreement, step_dir

FILE = "reference.json"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Found:
    """A reference's step directory.

    Attributes:
      step: its path.
      arrays: digest of the parameters.
      meta: what its run recorded that a comparison depends on: vocabulary, start_token, add_bos.
    """

    step: str
    arrays: str
    meta: Mapping[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class ReferenceCheckpoint:
    """A reference as gin names it.

    Attributes:
      path: step or run directory; most often what the policy starts from.
      model_dir: of the run that compares with it.
      use_ema: read the moving average of its parameters, as where the policy starts from that.
    """

    path: str | None
    model_dir: str
    use_ema: bool = False

    def __post_init__(self):
        if self.path is None:
            raise ValueError(
                "REFERENCE is None: name the checkpoint that the policy is compared with, which is most often "
                "what it starts from (INITIAL_CHECKPOINT_PATH)."
            )

    def find(self) -> Found:
        """The step that this run has always compared with; the newest good one at its first start.

        Raises:
          ValueError: this run began with another REFERENCE.
          DamagedCheckpointError, FileNotFoundError: of the checkpoint.
        """
        assert self.path is not None  # see __post_init__
        kept = pathlib.Path(self.model_dir, FILE)
        # One process looks, so that all see the same.
        recorded = agreement.gather(kept.read_text() if kept.exists() else None)[0]
        asked = {"reference": os.path.abspath(self.path), "use_ema": self.use_ema}
        if recorded is not None:
            found = json.loads(recorded)
            began = {name: found.pop(name) for name in asked}
            if began != asked:
                raise ValueError(
                    f"REFERENCE = {self.path} (use_ema {self.use_ema}), but this run began with "
                    f"{began['reference']} (use_ema {began['use_ema']}): give that, or start in another MODEL_DIR."
                )
            return Found(**found)
        found = dataclasses.asdict(step_dir.newest_good(self.path, self._read))
        if agreement.is_primary():
            step_dir.write_file(kept, json.dumps({**asked, **found}, indent=1).encode())
        return Found(**found)

    def _read(self, step: Any) -> Found:
        recorded = step_dir.read_manifest(step)
        root = "ema_params/" if self.use_ema else "params/"
        arrays = {
            name.removeprefix(root): [str(entry), f"{entry.digest:016x}"]
            for name, entry in recorded.arrays.items()
            if name.startswith(root)
        }
        if not arrays:
            raise ValueError(
                f"REFERENCE: {step} holds no moving average; set REFERENCE_USE_EMA to False."
            )
        told = step_dir.read_record(step, recorded)["meta"]
        text = json.dumps(arrays, sort_keys=True).encode()
        return Found(
            step=os.fspath(step),
            arrays=hashlib.blake2b(text, digest_size=16).hexdigest(),
            meta={k: told[k] for k in ("vocabulary", "start_token", "add_bos") if k in told},
        )
