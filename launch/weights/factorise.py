"""Decomposes the projections of a trained model into factors, or multiplies factors back to kernels.

Examples, after a run in /tmp/espalier_tiny (see python -m launch.train --help):

  python -m launch.upcycle factorise --checkpoint=/tmp/espalier_tiny --to=/tmp/factors --rank=0.5
  python -m launch.upcycle factorise --checkpoint=/tmp/espalier_tiny --to=/tmp/f2 --rank=0.9 --rank_rule=energy
  python -m launch.upcycle factorise --checkpoint=/tmp/factors --to=/tmp/dense --recompose

What it writes is a run directory that every command takes as --checkpoint and training as
INITIAL_CHECKPOINT_PATH. With --calibrate, rows of text as of launch.score, factors change the layers' outputs on
these texts least, instead of the kernels themselves. To train on in factors within one run, see
t5x_configs/methods/low_rank/decompose.gin; a model in factors is recomposed before launch.convert exports it.
"""

if __name__ == "__main__":
    from launch import cli
    from launch.run import load_run

    def add_flags(parser):
        from launch.weights import factorise

        load_run.add_flags(parser)
        factorise.add_flags(parser)

    def start_run(start):
        from launch.weights import factorise

        factorise.run(start(), start.flags)

    raise SystemExit(
        cli.main(
            __doc__,
            entry="launch.run.load_run:RunConfig",
            command="upcycle factorise",
            extra_flags=add_flags,
            run=start_run,
            default_files=load_run.default_files,
            unused={"VOCABULARY": "None"},
        )
    )

import argparse
import dataclasses
import os
import pathlib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from launch.inference import row_files
from launch.run import run_vocabulary
from launch.run.load_run import CONFIG, EXAMPLE, LoadedRun, RunConfig
from launch.weights.import_weights import new_directory
from model.low_rank import decompose as surgery
from model.low_rank import factors, lowrank
from trainers.checkpoints import state_tree, step_dir, stream_checkpoint
from trainers.checkpoints.stream_checkpoint import StreamedArray

RULES = (*factors.RANK_RULES, "energy")
_OWNERS = (
    ("attention", "Attention.dense", "lowrank.LowRankDense", "linear.Dense"),
    ("mlp", "GatedMlp.dense", "lowrank.LowRankDense", "linear.Dense"),
    ("mlp", "Mlp.dense", "lowrank.LowRankDense", "linear.Dense"),
    ("moe", "MoeMlp.expert_dense", "lowrank.LowRankExpertDense", "moe.ExpertDense"),
)


class FactoriseFlagError(ValueError):
    """Flags that do not go together."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """How kernels are decomposed.

    Attributes:
      rank: see `factors.rank_of`; with the rule 'energy' the least part of the squared singular values
        that is kept.
      rule: of RULES.
      layers: patterns of whole paths of modules; of what they match, projections of attention and MLPs
        are decomposed.
    """

    rank: float
    rule: str = "min_dim"
    layers: Sequence[str] = lowrank.PROJECTIONS

    def takes(self, path: str) -> bool:
        matched = any(re.fullmatch(pattern, path) for pattern in self.layers)
        return matched and any(re.fullmatch(known, path) for known in lowrank.PROJECTIONS)

    def check(self, taken: Collection[str]) -> None:
        """Raises FactoriseError for a pattern that matched none of what was decomposed."""
        for pattern in self.layers:
            if not any(re.fullmatch(pattern, path) for path in taken):
                raise surgery.FactoriseError(
                    f"--layers={pattern} matches no projection; there are {', '.join(sorted(taken)[:3])}..."
                )

    def rank_of(self, path: str, values: Any, shape: tuple[int, int]) -> int:
        """The rank of the kernels at `path`, of this shape and with these singular values."""
        rule: Any = self.rule
        try:
            if rule == "energy":
                return factors.rank_for_energy(values, self.rank)
            return factors.rank_of(self.rank, rule, *shape)
        except ValueError as error:
            raise surgery.FactoriseError(f"{path}: {error}") from None


def add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("factors")
    group.add_argument("--to", required=True, metavar="DIR", help="run directory to be made")
    group.add_argument(
        "--recompose", action="store_true", help="multiply factors; no other flag goes with it"
    )
    group.add_argument(
        "--rank", type=float, metavar="R", help="a fraction, or with 'absolute' the rank itself"
    )
    group.add_argument(
        "--rank_rule",
        choices=RULES,
        help="of the smaller side (min_dim, the default), of the parameters (param_ratio), of the squared "
        "singular values (energy)",
    )
    group.add_argument(
        "--layers",
        action="append",
        metavar="REGEX",
        help="whole paths of modules, repeatable (default: attention's and MLPs' projections)",
    )
    group.add_argument("--calibrate", metavar="FILE", help='JSON lines of {"text": "..."}')
    group.add_argument(
        "--calibrate_length", type=int, metavar="N", help="tokens of a row (default 512)"
    )


def run(config: RunConfig, flags: argparse.Namespace) -> None:
    """The command.

    Raises:
      FactoriseFlagError, FactoriseError, ConvertError, LoadError, RowFileError.
    """
    given = ("rank", "rank_rule", "layers", "calibrate", "calibrate_length")
    named = [f"--{name}" for name in given if getattr(flags, name) is not None]
    if flags.recompose and named:
        raise FactoriseFlagError(f"--recompose takes no {named[0]}: it multiplies what there is.")
    if not flags.recompose and flags.rank is None:
        raise FactoriseFlagError("give --rank, such as --rank=0.5, or --recompose.")
    if flags.calibrate_length is not None and not flags.calibrate:
        raise FactoriseFlagError("--calibrate_length is of --calibrate: give both or none.")
    with (
        config.load(flags.checkpoint, params=flags.params) as loaded,
        new_directory(flags.to) as to,
    ):
        if flags.recompose:
            params = surgery.recompose(loaded.params)
            lines = [f"{len(factors.find_factors(loaded.params))} layers are dense again"]
            bindings = _bindings(dense=True)
        else:
            choice = Choice(
                rank=flags.rank,
                rule=flags.rank_rule or "min_dim",
                layers=tuple(flags.layers or lowrank.PROJECTIONS),
            )
            moments: Mapping[str, Any] = {}
            if flags.calibrate:
                moments = _input_moments(loaded, flags.calibrate, flags.calibrate_length or 512)
            params, lines = decomposed(loaded.params, choice, moments)
            found = factors.find_factors(params)
            bindings = [
                *_bindings(dense=False),
                "lowrank.Factorisation.rank_rule = 'absolute'",
                f"lowrank.Factorisation.layers = {tuple(re.escape(x.path) for x in found)!r}",
                f"lowrank.Factorisation.ranks = {tuple((re.escape(x.path), x.rank) for x in found)!r}",
            ]
        _save(to, params, loaded.meta)
        folder = step_dir.run_folder(flags.checkpoint)
        run_vocabulary.copy(folder, to)
        text = pathlib.Path(folder, CONFIG).read_text(encoding="utf-8")
        pathlib.Path(to, CONFIG).write_text("\n".join([text, *bindings, ""]), encoding="utf-8")
    print("\n".join([*lines, f"written to {flags.to}"]))


def decomposed(
    params: Any, choice: Choice, moments: Mapping[str, Any]
) -> tuple[dict[str, Any], list[str]]:
    """Parameters in factors, and lines that say what was lost.

    Args:
      params: of a dense model.
      choice: which, and how far.
      moments: second moments of inputs by path, of layers whose outputs are to be kept.

    Raises:
      FactoriseError: a kernel that is not finite, or nothing to decompose.
      ValueError: a rank that a matrix cannot have.
    """
    if twice := factors.find_factors(params):
        raise surgery.FactoriseError(
            f"{twice[0].path} is factorised already: --recompose the checkpoint first."
        )
    lost: dict[str, float] = {}

    def split(path: str, kernel: Any) -> tuple[Any, Any] | None:
        if not choice.takes(path):
            return None
        surgery.check_finite(path, kernel)
        parts = factors.decomposition(kernel, moments.get(path))
        squares = np.square(np.asarray(parts[1], np.float64))
        rank = choice.rank_of(path, parts[1], kernel.shape[-2:])
        lost[path] = float(squares[..., rank:].sum() / max(squares.sum(), 1e-300))
        u, v = factors.truncated(*parts, rank)
        return u.astype(kernel.dtype), v.astype(kernel.dtype)

    made = surgery.decompose(params, split)
    choice.check(lost)
    lines = factors.table(factors.find_factors(made), lost)
    lines.append("lost: the part of the squared singular values that factors leave out")
    if weighed := [path for path in lost if path in moments]:
        others = (
            "" if len(weighed) == len(lost) else f"; {len(lost) - len(weighed)} others as they are"
        )
        lines.append(f"{len(weighed)} layers as their inputs weigh them{others}")
    return made, lines


def _input_moments(loaded: LoadedRun, path: str, length: int) -> Mapping[str, Any]:
    from trainers.low_rank.input_moments import input_moments

    rows = row_files.read(path, example=EXAMPLE, flag="calibrate")
    ids = [id for where, row in rows for id in loaded.context(loaded.tokens(row, where))]
    if len(ids) < length:
        raise FactoriseFlagError(
            f"--calibrate={path} has {len(ids)} tokens, fewer than one row of {length}: give more text, or "
            "a smaller --calibrate_length."
        )
    count = len(ids) // length
    tokens = np.asarray(ids[: count * length], np.int32).reshape(count, 1, length)
    return input_moments(loaded.model, loaded.params, tokens, total=count)


def _save(folder: str, params: Any, meta: Mapping[str, Any]) -> None:
    def streamed(values: Any) -> StreamedArray:
        array = np.asarray(values)
        start = (0,) * array.ndim
        return StreamedArray(array.shape, array.dtype, array.shape, lambda: iter([(start, array)]))

    arrays = {f"params/{name}": streamed(x) for name, x in state_tree.flatten(params).items()}
    kept = {key: meta[key] for key in ("hf", "vocabulary", "add_bos", "start_token") if key in meta}
    stream_checkpoint.save(os.path.join(folder, step_dir.CHECKPOINTS), arrays, meta=kept)


def _bindings(*, dense: bool) -> list[str]:
    """What makes the layers of any model factorised, or dense again."""
    lines = ["# Of launch.upcycle factorise."]
    lines += [f"from model import {name}" for name in ("attention", "linear", "mlp")]
    lines += ["from model.low_rank import lowrank", "from model.moe import moe"]
    for module, field, low_rank, plain in _OWNERS:
        lines.append(f"{module}.{field} = @{plain if dense else low_rank}")
    if not dense:
        for name in ("LowRankDense", "LowRankExpertDense"):
            lines.append(f"lowrank.{name}.factorisation = @lowrank.Factorisation()")
    return lines
