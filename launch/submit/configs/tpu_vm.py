"""A TPU slice of 16 v5e chips as virtual machines; the commands are printed, never run."""

from espalier.launch.submit.launch_config import as_config
from espalier.launch.submit.tpu_vm import Settings


def get_config():
    return as_config(Settings(accelerator_type="v5litepod-16"))
