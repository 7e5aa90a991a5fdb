"""Decomposes the projections of a trained model into factors, or multiplies factors back to kernels.

Examples, after a run in /tmp/espalier_tiny (see espalier train --help):

  espalier upcycle factorise --checkpoint=/tmp/espalier_tiny --to=/tmp/factors --rank=0.5
  espalier upcycle factorise --checkpoint=/tmp/espalier_tiny --to=/tmp/f2 --rank=0.9 --rank_rule=energy
  espalier upcycle factorise --checkpoint=/tmp/factors --to=/tmp/dense --recompose

The result is a run directory that every command takes as --checkpoint and training as INITIAL_CHECKPOINT_PATH. With
--calibrate, rows of text as for launch.score, factors change the layers' outputs on these texts least, rather than the
kernels themselves. To continue a dense run in factors, see t5x_configs/methods/low_rank/decompose.gin. Recompose a model
in factors before launch.convert exports it.
"""

import argparse
import dataclasses
from typing import Literal

from espalier.launch.run import load_run
from espalier.launch.upcycle import upcycle_flags
from espalier.launch.upcycle.upcycle_flags import Params
from espalier.model.transforms.base import TransformError


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactoriseFlags:
    """Flags of `launch.upcycle factorise`; None if a flag is not set.

    Attributes:
      checkpoint, params: see launch.score.
      to: new run directory.
      recompose: multiply factors; excludes the flags below.
      rank: a fraction, or with 'absolute' the rank itself.
      rank_rule: rank is a fraction of the smaller side (min_dim, the default), of the parameters (param_ratio), or of
        the squared singular values (energy).
      layers: patterns of whole paths of modules, repeatable (default: attention's and MLPs' projections).
      calibrate: file of JSON lines {"text": "..."}.
      calibrate_length: tokens of a row (512).
    """

    checkpoint: str
    to: str
    params: Params = "auto"
    recompose: bool = False
    rank: float | None = None
    rank_rule: Literal["min_dim", "param_ratio", "absolute", "energy"] | None = None
    layers: tuple[str, ...] = ()
    calibrate: str | None = None
    calibrate_length: int | None = None

    def check(self) -> None:
        """Raises TransformError for flags that do not go together."""
        names = ("rank", "rank_rule", "layers", "calibrate", "calibrate_length")
        named = [name for name in names if getattr(self, name) not in (None, ())]
        if self.recompose and named:
            raise TransformError(f"--recompose does not use --{named[0]}: remove one of them.")
        if not self.recompose and self.rank is None:
            raise TransformError("Give --rank, such as --rank=0.5, or --recompose.")
        if self.calibrate_length is not None and not self.calibrate:
            raise TransformError("--calibrate_length is only for --calibrate: give both or none.")


def add_flags(parser: argparse.ArgumentParser) -> None:
    load_run.add_flags(parser)
    group = parser.add_argument_group("factors")
    upcycle_flags.add(group, FactoriseFlags, but=("checkpoint", "params", "layers"))
    group.add_argument(
        "--layers",
        action="append",
        metavar="REGEX",
        default=[],
        help="whole paths of modules, repeatable (default: attention's and MLPs' projections)",
    )


if __name__ == "__main__":
    raise SystemExit(
        upcycle_flags.main(
            __doc__, "upcycle factorise", "espalier.launch.low_rank.factorisation:run", add_flags
        )
    )
