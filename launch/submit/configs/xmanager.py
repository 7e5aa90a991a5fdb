"""XManager: processes of this machine, Vertex AI or Kubernetes.

For Vertex AI: --config.executor=vertex --config.image=IMAGE --config.accelerator=a100 --config.accelerators=8
"""

from espalier.launch.submit.launch_config import as_config
from espalier.launch.submit.xmanager_backend import Settings


def get_config():
    return as_config(Settings())
