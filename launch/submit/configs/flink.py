"""Flink on Kubernetes: a corpus in ten pods of eight cores. Give the image, and the claim that holds the caches and the data."""

from espalier.launch.submit.beam.flink import Settings
from espalier.launch.submit.launch_config import as_config


def get_config():
    return as_config(Settings(volumes=("data=/data",), env=("ESPALIER_CACHE=/data/cache",)))
