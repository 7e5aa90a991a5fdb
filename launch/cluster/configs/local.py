"""This machine: one process that uses all its devices, started again after a loss."""

from launch.cluster.group import Settings
from launch.cluster.launch_config import as_config


def get_config():
    return as_config(Settings())
