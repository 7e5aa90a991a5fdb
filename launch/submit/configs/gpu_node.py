"""One machine with NVIDIA GPUs, one process for all of them; docs/scale/clusters.md has the reasons for the flags.

`--config=launch/submit/configs/gpu_node.py:1` is for one GPU; without a number it is for eight.
"""

from espalier.launch.submit.gpus import variables
from espalier.launch.submit.group import Settings
from espalier.launch.submit.launch_config import as_config


def get_config(gpus: str = "8"):
    count = int(gpus)
    return as_config(Settings(devices_here=count, env=variables(several=count > 1)))
