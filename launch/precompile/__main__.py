"""Compiles runs for absent TPUs: memory, FLOPs, traffic and least time per chip; searches layouts, makes tables.

  espalier precompile \\
    --gin_file=t5x_configs/models/llama2_7b.gin --gin_file=t5x_configs/runs/pretrain.gin \\
    --topology=v5e:4x4 --gin.BATCH_SIZE=16 --gin.TASK_FEATURE_LENGTHS='{"targets": 2048}'
  espalier precompile tables --rows llama2_7b_v5e_4x4

`espalier precompile --help` shows the flags that compile one run or search, and `espalier precompile tables
--help` those of the full-size configurations of all papers.
"""

from espalier.launch import cli

COMMANDS = {"tables": "espalier.launch.precompile.tables"}

if __name__ == "__main__":
    raise SystemExit(
        cli.subcommand(__doc__, COMMANDS, default="espalier.launch.precompile.command")
    )
