"""This machine: one process that uses all its devices, started again after a loss."""

from espalier.launch.submit.group import Settings
from espalier.launch.submit.launch_config import as_config


def get_config():
    return as_config(Settings())
