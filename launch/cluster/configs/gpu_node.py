"""One machine with NVIDIA GPUs, one process for all of them; docs/clusters.md has the reasons for the flags.

`--config=launch/cluster/configs/gpu_node.py:1` is for one GPU; without a number it is for eight.
"""

from launch.cluster.group import Settings
from launch.cluster.launch_config import as_config

# Overlap of communication and computation: only of use with several GPUs.
_OVERLAP = (
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_all_reduce_combine_threshold_bytes=134217728",
    "--xla_gpu_all_gather_combine_threshold_bytes=134217728",
    "--xla_gpu_reduce_scatter_combine_threshold_bytes=67108864",
)


def get_config(gpus: str = "8"):
    count = int(gpus)
    flags = ("--xla_gpu_enable_triton_gemm=false", *(_OVERLAP if count > 1 else ()))
    env = (
        "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92",
        f"XLA_FLAGS={' '.join(flags)}",
        *(("NCCL_NVLS_ENABLE=1",) if count > 1 else ()),
    )
    return as_config(Settings(devices_here=count, env=env))
