"""Decomposes the projections of a trained model into factors, or multiplies factors back to kernels.

Examples, after a run in /tmp/espalier_tiny (see espalier train --help):

  espalier upcycle factorise --checkpoint=/tmp/espalier_tiny --to=/tmp/factors --rank=0.5
  espalier upcycle factorise --checkpoint=/tmp/espalier_tiny --to=/tmp/f2 --rank=0.9 --rank_rule=energy
  espalier upcycle factorise --checkpoint=/tmp/factors --to=/tmp/dense --recompose

The result is a run directory that every command takes as --checkpoint and training as INITIAL_CHECKPOINT_PATH. With
--calibrate, rows of text as for espalier score, factors change the layers' outputs on these texts least, rather than the
kernels themselves. To continue a dense run in factors, see t5x_configs/methods/low_rank/decompose.gin. Recompose a model
in factors before espalier convert exports it.
"""

import argparse
import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from espalier.common.bars import Bar
from espalier.common.ranges import Size
from espalier.launch.load import load_run
from espalier.launch.load.load_run import LoadError, RunConfig
from espalier.launch.upcycle import upcycle_flags
from espalier.launch.upcycle.upcycle_flags import Params
from espalier.model.transforms import base
from espalier.model.transforms.base import Recipe, Shapes, TransformError

if TYPE_CHECKING:  # flags are parsed before it is imported
    from espalier.launch.weights.source_models import SourceModel

_OWNERS = (
    ("attention", "Attention.dense", "lowrank.LowRankDense", "linear.Dense"),
    ("attention", "CrossAttention.dense", "lowrank.LowRankDense", "linear.Dense"),
    ("mlp", "GatedMlp.dense", "lowrank.LowRankDense", "linear.Dense"),
    ("mlp", "Mlp.dense", "lowrank.LowRankDense", "linear.Dense"),
    ("moe", "MoeMlp.expert_dense", "lowrank.LowRankExpertDense", "moe.ExpertDense"),
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class FactoriseFlags:
    """Flags of `espalier upcycle factorise`; None if a flag is not set.

    Attributes:
      checkpoint, params: see espalier score.
      to: new run directory.
      recompose: multiply factors; excludes the flags below.
      rank: a fraction, or with 'absolute' the rank itself.
      rank_rule: rank is a fraction of the smaller side (min_dim, the default), of the parameters (param_ratio), or of
        the squared singular values (energy).
      layers: patterns of factorise modules whose whole path matches REGEX; repeatable (default: the projections of attention and MLPs).
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
    calibrate_length: Size | None = None

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
        help="factorise modules whose whole path matches REGEX; repeatable (default: the projections of attention and MLPs)",
    )


class Decomposition:
    """Ranks and factors of kernels, and the error of each.

    Args:
      options: flags that choose kernels and ranks.
      moments: second moments of inputs by path, for layers whose output error is minimised.

    Attributes:
      lost: fraction of the squared singular values that the factors do not represent, by path.
    """

    def __init__(self, options: FactoriseFlags, moments: Mapping[str, Any]):
        self.moments = moments
        self.lost: dict[str, float] = {}
        self._options = options
        self._made: dict[str, tuple[Any, Any]] = {}

    def ranks(self, source: "SourceModel") -> dict[str, int]:
        """Returns the rank of each chosen kernel, by path of its module.

        The rule 'energy' decomposes all kernels here, and stores the factors for `split`.

        Raises:
          TransformError: no kernels, a kernel with values that are not finite, or an impossible rank.
        """
        from espalier.model.low_rank import decompose, factors

        shapes, rule = source.abstract.shapes, self._options.rank_rule
        ranks: dict[str, int] = {}
        paths = chosen(shapes, self._options.layers)
        for path in Bar(paths, desc="ranks", unit="matrix", leave=False, delay=5):
            try:
                if rule == "energy":
                    kernel = source.open(f"{path}/kernel").read()
                    decompose.check_finite(path, kernel)
                    parts = factors.decomposition(kernel, self.moments.get(path))
                    ranks[path] = factors.rank_for_energy(parts[1], self._options.rank)
                    self._made[path] = self._truncated(path, parts, ranks[path])
                else:
                    sides = shapes[f"{path}/kernel"][-2:]
                    ranks[path] = factors.rank_of(self._options.rank, rule or "min_dim", *sides)
            except TransformError:
                raise
            except ValueError as error:
                raise TransformError(f"{path}: {error}") from None
        return ranks

    def split(self, path: str, kernel: Any, rank: int) -> tuple[Any, Any]:
        """See decompose.Split."""
        from espalier.model.low_rank import factors

        if path in self._made:
            return self._made.pop(path)
        parts = factors.decomposition(kernel, self.moments.get(path))
        return self._truncated(path, parts, rank)

    def _truncated(self, path: str, parts: tuple[Any, Any, Any], rank: int) -> tuple[Any, Any]:
        from espalier.model.low_rank import factors

        squares = np.square(np.asarray(parts[1], np.float64))
        self.lost[path] = float(squares[..., rank:].sum() / max(squares.sum(), 1e-300))
        return factors.truncated(*parts, rank)


def chosen(shapes: Shapes, layers: Sequence[str]) -> list[str]:
    """Returns the modules whose kernels are decomposed: projections of attention and MLPs, filtered by `layers`.

    Raises:
      TransformError: the model already has factors, or a pattern matches no projection.
    """
    from espalier.model.low_rank import decompose, lowrank

    if twice := decompose.factorised_modules(shapes):
        raise TransformError(f"{twice[0]} is already factorised: --recompose the checkpoint first.")

    def matching(paths: Sequence[str], patterns: Sequence[str]) -> list[str]:
        return [path for path in paths if any(re.fullmatch(x, path) for x in patterns)]

    owners = [path.removesuffix("/kernel") for path in shapes if path.endswith("/kernel")]
    taken = matching(matching(owners, lowrank.PROJECTIONS), layers or (".*",))
    if not taken:
        raise TransformError("No projection matches --layers: give other patterns.")
    for pattern in layers:
        if not matching(taken, [pattern]):
            raise TransformError(
                f"--layers={pattern} matches no projection: give a pattern of {', '.join(sorted(taken)[:3])}..."
            )
    return taken


def run(config: RunConfig, flags: argparse.Namespace) -> None:
    """The command.

    Raises:
      TransformError, ConvertError, LoadError, RowFileError, DamagedCheckpointError.
    """
    from espalier.launch.weights import transformed_run
    from espalier.launch.weights.source_models import SourceModel
    from espalier.model.config import TransformerConfig
    from espalier.model.low_rank.decompose import Decompose, Recompose

    options: FactoriseFlags = upcycle_flags.parsed(flags, FactoriseFlags)
    if not isinstance(config.model.config, TransformerConfig):
        raise LoadError(
            f"{options.checkpoint} is a {type(config.model).__name__}, not a language model: give another one."
        )
    source = SourceModel(options.checkpoint, options.params)
    transform: base.TreeTransform = Recompose()
    bindings = _bindings(dense=True)
    if not options.recompose:
        moments = _input_moments(config, options) if options.calibrate else {}
        decomposition = Decomposition(options, moments)
        ranks = decomposition.ranks(source)
        transform = Decompose(decomposition.split)
        bindings = [
            *_bindings(dense=False),
            "lowrank.Factorisation.rank_rule = 'absolute'",
            f"lowrank.Factorisation.layers = {tuple(map(re.escape, ranks))!r}",
            f"lowrank.Factorisation.ranks = {tuple((re.escape(x), r) for x, r in ranks.items())!r}",
        ]
    recipes = transformed_run.write(
        options.to,
        transform,
        [source],
        config=bindings,
        gin_files=flags.gin_file,
        whole_config=flags.trust_config,
        meta=source.origin_meta(),
    )
    notes, totals = ({}, []) if options.recompose else _sizes(recipes, decomposition)
    print("\n".join([*base.table(recipes, notes), *totals, f"written to {options.to}"]))


def _input_moments(config: RunConfig, options: FactoriseFlags) -> Mapping[str, Any]:
    """Returns second moments of the layers' inputs on the texts of --calibrate, by path."""
    from espalier.launch.weights.transformed_run import token_rows
    from espalier.trainers.low_rank.input_moments import input_moments

    with config.load(options.checkpoint, params=options.params) as loaded:
        length = options.calibrate_length
        rows_CBT = token_rows(loaded, options.calibrate, flag="calibrate", length=length)
        return input_moments(loaded.model, loaded.params, rows_CBT, total=len(rows_CBT))


def _sizes(recipes: Sequence[Recipe], made: Decomposition) -> tuple[dict[str, str], list[str]]:
    """Returns notes on size and error of the factors, by path of U, and lines with the totals."""
    notes, dense, small = {}, 0, 0
    for recipe in recipes:
        if len(recipe.outputs) == 1:
            continue
        (path, u_shape), (_, v_shape) = recipe.outputs.items()
        kernel = math.prod(u_shape[:-1]) * v_shape[-1]
        factors_size = math.prod(u_shape) + math.prod(v_shape)
        dense, small = dense + kernel, small + factors_size
        larger = " LARGER" if factors_size > kernel else ""
        lost_energy = made.lost[path.removesuffix("/u")]
        notes[path] = f", {factors_size / kernel:.3f} of its size{larger}, lost {lost_energy:.2%}"
    lines = [
        f"decomposed {len(notes)} kernels: {dense:,} parameters to {small:,} ({small / dense:.3f})"
    ]
    lines.append("lost: the fraction of the squared singular values that factors lack")
    weighted = [path for path in made.lost if path in made.moments]
    if weighted:
        num_unweighted = len(made.lost) - len(weighted)
        unweighted = f"; {num_unweighted} others are not" if num_unweighted else ""
        lines.append(f"{len(weighted)} kernels are weighted by their inputs{unweighted}")
    return notes, lines


def _bindings(*, dense: bool) -> list[str]:
    """Returns the gin lines that make the layers of any model factorised, or dense again."""
    lines = ["# Of espalier upcycle factorise."]
    lines += [f"from espalier.model import {name}" for name in ("attention", "linear", "mlp")]
    lines += ["from espalier.model.low_rank import lowrank", "from espalier.model.moe import moe"]
    for module, field, low_rank, plain in _OWNERS:
        lines.append(f"{module}.{field} = @{plain if dense else low_rank}")
    if not dense:
        for name in ("LowRankDense", "LowRankExpertDense"):
            lines.append(f"lowrank.{name}.factorisation = @lowrank.Factorisation()")
    return lines


if __name__ == "__main__":
    raise SystemExit(
        upcycle_flags.main(
            __doc__, "upcycle factorise", "espalier.launch.low_rank.factorise:run", add_flags
        )
    )
