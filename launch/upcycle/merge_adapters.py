"""Merges the adapters of a run into its base model, which is then an ordinary model.

Examples, after a run with adapters in /tmp/lora (t5x_configs/methods/adapters/lora.gin):

  espalier upcycle merge --checkpoint=/tmp/lora --to=/tmp/merged
  espalier convert --from=/tmp/merged --to_hf=/tmp/merged_hf

LoRA, DoRA and (IA)3 are merged exactly. The weights of a mixture (MoV, MoLORA) depend on the token. With --average, a file of
rows as for launch.score, each expert gets its mean weight over these texts, and the largest error of a logit on them is
printed. The result is a run directory that every command takes as --checkpoint.
"""

import argparse
import dataclasses

from espalier.launch.run import load_run
from espalier.launch.upcycle import upcycle_flags
from espalier.launch.upcycle.upcycle_flags import Params
from espalier.model.transforms.base import TransformError


@dataclasses.dataclass(frozen=True, kw_only=True)
class MergeFlags:
    """Flags of `launch.upcycle merge`; None if a flag is not set.

    Attributes:
      checkpoint, params: see launch.score.
      to: new run directory.
      average: file of JSON lines {"text": "..."}; merges mixtures with their mean weights on it.
      average_length: tokens of a row (512).
    """

    checkpoint: str
    to: str
    params: Params = "auto"
    average: str | None = None
    average_length: int | None = None

    def check(self) -> None:
        """Raises TransformError for flags that do not go together."""
        if self.average_length is not None and not self.average:
            raise TransformError("--average_length is only for --average: give both or none.")


def add_flags(parser: argparse.ArgumentParser) -> None:
    load_run.add_flags(parser)
    group = parser.add_argument_group("adapters")
    upcycle_flags.add(group, MergeFlags, but=("checkpoint", "params"))


if __name__ == "__main__":
    raise SystemExit(
        upcycle_flags.main(
            __doc__, "upcycle merge", "espalier.launch.upcycle.merged_adapters:run", add_flags
        )
    )
