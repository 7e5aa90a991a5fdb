"""Reports how a run's gradients are summed across chips that are not there, and what of it changes with the order of the chips.

Example: DPO with LoRA on four chips in two orders, and on a second mesh, a minute on one core (needs the extra `tpu`):

  espalier numerics --topology=v5p:2x2x1 --orders=2 --mesh='{"data": 2, "fsdp": 2}' \\
    --gin_file=t5x_configs/models/tiny.gin --gin_file=t5x_configs/runs/preference.gin \\
    --gin_file=t5x_configs/methods/adapters/lora.gin --gin.TRAIN_STEPS=100 --gin.BATCH_SIZE=16 \\
    --gin.TASK_FEATURE_LENGTHS='{"targets": 128}' --gin.DTYPE="'bfloat16'"

Takes the gin arguments of `train`, reads no data and no directories, and runs nothing: the train step is compiled once for each
order and mesh. For each sum across chips the report has the parameter, the dtype, the number of terms, the algorithm, what else the same
collective sums, and a bound of the error. It warns of an adapter that starts at 0 where rounding can decide the
sign of its first update. It reports a risk; what a chip computes is not known before it runs.
Exit status: 0 no warning, 1 a warning, 2 the configuration is wrong.
"""

import argparse
import dataclasses
from collections.abc import Sequence
from typing import Annotated

from espalier.launch import cli
from espalier.launch.config import setting_flags
from espalier.launch.config.setting_flags import File, Name
from espalier.launch.precompile import tpu_topology
from espalier.launch.precompile.__main__ import RECIPE, UNREAD


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    tpu_topology.prepare_environment()
    return cli.main(
        __doc__,
        entry="espalier.launch.train:train",
        command="numerics",
        extra_flags=_add_flags,
        run=_run,
        arguments=RECIPE,
        unused=UNREAD,
        argv=argv,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayoutFlags:
    """The layouts of `espalier numerics`, and its report.

    Attributes:
      topology: slice to compile for, of several chips: v5p:2x2x1, v5e:4x4, ...; one slice alone.
      orders: number of orders of the chips for each mesh: that of a run, its reverse, then random ones (default 2).
      order: instead of --orders, the chips in the order in which they fill the mesh, such as 3,2,1,0; repeatable.
      mesh: a mesh besides the run's own MESH, such as '{"data": 2, "fsdp": 2}'; repeatable.
      json: also write all of the report to this JSON file.
    """

    topology: Name
    orders: int | None = None
    order: Sequence[Annotated[str, "CHIPS"]] = ()
    mesh: Sequence[Annotated[str, "JSON"]] = ()
    json: File | None = None


def _add_flags(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("layouts")
    setting_flags.add(group, LayoutFlags, names=("topology",))
    either = group.add_mutually_exclusive_group()
    setting_flags.add(either, LayoutFlags, names=("orders", "order"))
    setting_flags.add(group, LayoutFlags, names=("mesh", "json"))


def _run(start: cli.Start) -> int:
    from espalier.launch.numerics import numerics

    flags = setting_flags.filled(start.flags, LayoutFlags)
    warned = numerics.numerics(
        start.config.arguments()["recipe"],
        flags.topology,
        meshes=[numerics.mesh_of(text) for text in flags.mesh],
        orders=numerics.orders_of(flags.order) if flags.order else flags.orders,
        json_file=flags.json,
    )
    return 1 if warned else 0


if __name__ == "__main__":
    raise SystemExit(main())
