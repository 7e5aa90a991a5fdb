"""Environment variables for NVIDIA GPUs; docs/scale/clusters.md has the reasons."""

# Overlap of communication and computation: only of use with several GPUs.
_OVERLAP = (
    "--xla_gpu_enable_latency_hiding_scheduler=true",
    "--xla_gpu_all_reduce_combine_threshold_bytes=134217728",
    "--xla_gpu_all_gather_combine_threshold_bytes=134217728",
    "--xla_gpu_reduce_scatter_combine_threshold_bytes=67108864",
)


def variables(*, several: bool) -> tuple[str, ...]:
    """Returns the variables of a run, each 'NAME=VALUE'; `several`: whether it has more than one GPU."""
    flags = ("--xla_gpu_enable_triton_gemm=false", *(_OVERLAP if several else ()))
    return (
        "XLA_PYTHON_CLIENT_MEM_FRACTION=0.92",
        f"XLA_FLAGS={' '.join(flags)}",
        *(("NCCL_NVLS_ENABLE=1",) if several else ()),
    )
