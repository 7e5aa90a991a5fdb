"""Adds an expert to a mixture of launch.upcycle, or removes one.

Examples, after espalier upcycle made runs/nexus and espalier prepare embed_domains --extend added the domain:

  espalier upcycle extend --moe=runs/nexus --add code=runs/code --domains=domains.json --to=runs/nexus5
  espalier upcycle extend --moe=runs/btx --add code=runs/code --router=reset --to=runs/btx5
  espalier upcycle extend --moe=runs/nexus5 --remove code --to=runs/nexus4

The new model is a branch of the same seed. Its FFN, and its attention where attentions are experts, become the last
expert. Parameters that experts share move towards it by --merge, except the shared FFN and a projection router, which
places the expert by the embedding of its data (arXiv 2408.15901). Scales and redrawn units are as for the other experts.
The result is a run directory like launch.upcycle's: parameters without an optimiser's state. Training from it, with the
files of the mixture's run and EXPERTS one more, begins with a new optimiser.
"""

import argparse
import dataclasses
from typing import Literal

from espalier.launch.config import setting_flags
from espalier.launch.upcycle import upcycle_flags
from espalier.launch.upcycle.upcycle_flags import Params
from espalier.model.transforms.base import TransformError


@dataclasses.dataclass(frozen=True, kw_only=True)
class ExtendFlags:
    """Flags of `launch.upcycle extend`; None if a flag is not set.

    Attributes:
      moe: run or step of a mixture of launch.upcycle.
      add: NAME=DIR of a dense run that started from the same seed.
      remove: an expert of the mixture.
      params: see launch.score.
      to: new run directory.
      unrelated: accept models whose embeddings are not correlated.
      domains: with --add: file of embeddings of domains, by the mixture's encoder.
      merge: with --add: weight of the new model in parameters that experts share; 1 / (number of experts + 1) by
        default, which makes a mean of n models a mean of n + 1; 0 keeps the mixture's parameters.
      router: with --add, of a linear router or an MLP: draw only the new expert's column (append, the default), or
        all of it (reset).
      level: with --add, of a projection: bring the new expert's vectors to the level of the others' (model/nexus/domain_router.py).
      router_seed: with --add: seed of the draw (0). A projection, for which sweeps may set it too, draws nothing.
    """

    moe: str
    to: str
    add: str | None = None
    remove: str | None = None
    params: Params = "auto"
    unrelated: bool = False
    domains: str | None = None
    merge: float | None = None
    router: Literal["append", "reset"] | None = None
    level: bool = False
    router_seed: int | None = None

    def check(self) -> None:
        """Raises TransformError for flags that do not go together, or a weight outside [0, 1]."""
        ignored = ("domains", "merge", "router", "router_seed")
        for name in ignored if self.remove else ():
            if getattr(self, name) is not None:
                raise TransformError(f"--{name} is only for --add: remove it.")
        if self.remove and self.level:
            raise TransformError("--level is only for --add: remove it.")
        if self.merge is not None and not 0 <= self.merge <= 1:
            raise TransformError(f"--merge={self.merge:g} must be between 0 and 1.")


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("mixture")
    change = group.add_mutually_exclusive_group(required=True)
    setting_flags.add(change, ExtendFlags, names=("add", "remove"))
    upcycle_flags.add(group, ExtendFlags, but=("add", "remove"))


if __name__ == "__main__":
    raise SystemExit(
        upcycle_flags.main(
            __doc__, "upcycle extend", "espalier.launch.nexus.extension:extend", add_flags
        )
    )
