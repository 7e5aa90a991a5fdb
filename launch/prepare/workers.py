"""The flags of commands that read much data: in how many processes of this machine, or by which pipelines of Apache Beam."""

import argparse
from collections.abc import Callable
from typing import Any

from espalier.common import pipelines
from espalier.common.pipelines import PipelineError
from espalier.data import by_beam
from espalier.data.cache import pool
from espalier.launch import cli
from espalier.launch.config import setting_flags


def add_flags(parser: argparse.ArgumentParser) -> None:
    setting_flags.add(parser, pool.limited)
    pipelines.add_flag(parser)


def used(run: Callable[[cli.Start], Any]) -> Callable[[cli.Start], Any]:
    """Returns a command's `run` that uses these flags, also while gin makes the objects that the command is given."""

    def kept(start: cli.Start) -> Any:
        options = start.flags.beam_pipeline_options
        limit = setting_flags.given(start.flags, pool.limited)
        if options and limit:
            raise PipelineError(
                "--workers is the number of processes of this machine, and --beam_pipeline_options leaves the work to others: give "
                "one of them. Runners have options for the number of their workers."
            )
        with pool.limited(**limit), by_beam.used(options):
            return run(start)

    return kept
