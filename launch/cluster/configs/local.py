"""This machine: one process that uses all its devices, started again after a loss."""

from espalier.launch.cluster.group import Settings
from espalier.launch.cluster.launch_config import as_config


def get_config():
    return as_config(Settings())
