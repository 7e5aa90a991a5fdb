"""A SLURM cluster: two hosts with eight GPUs each, one process for each GPU.

For hosts without GPUs: --config.gpus_per_node=0 --config.tasks_per_node=1. Without a `memory` a host gives the cluster's
default, which is often a few GB for each core: --config.memory=0 asks for all of it.
"""

from espalier.launch.submit.gpus import variables
from espalier.launch.submit.launch_config import as_config
from espalier.launch.submit.slurm import Settings


def get_config():
    return as_config(
        Settings(
            nodes=2,
            tasks_per_node=8,
            gpus_per_node=8,
            cpus_per_task=8,
            time_limit="24:00:00",
            env=variables(several=True),
        )
    )
