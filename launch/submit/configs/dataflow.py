"""Dataflow: a corpus in ten machines of eight cores. Give the project, a bucket, the image, and the address of the caches.

For example --config.project=P --config.bucket=gs://B/dataflow --config.image=I --config.env="('ESPALIER_CACHE=gs://B/cache',)"
"""

from espalier.launch.submit.beam.dataflow import Settings
from espalier.launch.submit.launch_config import as_config


def get_config():
    return as_config(Settings())
