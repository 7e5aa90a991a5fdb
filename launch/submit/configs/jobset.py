"""GKE: a v5e slice of 16 chips as a JobSet. Give the image, and the claim that holds MODEL_DIR, the caches and the data.

For GPUs: --config.topology= --config.accelerator=nvidia-h100-80gb --config.nodes=2 --config.gpus_per_node=8
"""

from espalier.launch.submit.jobset import Settings
from espalier.launch.submit.launch_config import as_config


def get_config():
    return as_config(
        Settings(
            accelerator="tpu-v5-lite-podslice",
            topology="4x4",
            volumes=("runs=/runs",),
            env=("ESPALIER_CACHE=/runs/cache",),
        )
    )
