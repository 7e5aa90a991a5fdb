"""What all manifests of Kubernetes share: settings of pods, their environment and volumes, and the text that kubectl reads."""

import dataclasses
import os
import re
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

import yaml

from espalier.launch.submit.base import Job
from espalier.launch.submit.launch_config import Launch

# Folders of every image, over which a claim would hide files that programs need.
_OF_IMAGE = re.compile("/(bin|dev|etc|home|lib|opt|proc|root|run|sbin|sys|tmp|usr|var)?")
IMAGE = "REGION-docker.pkg.dev/PROJECT/REPOSITORY/NAME:TAG"
MAIN = "main"  # name of the container that runs a job's command
NAME = r"[a-z0-9]([a-z0-9.-]*[a-z0-9])?"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pods(Launch):
    """Kubernetes: image and volumes of pods.

    Attributes:
      image: of the container, with this project installed.
      namespace: of Kubernetes.
      volumes: mounted claims, each 'NAME=PATH' with the name of a PersistentVolumeClaim.
      service_account: of Kubernetes, for access to buckets.
      cpu, memory: requests of each host, such as '100' and '400Gi'; empty for none.
      folder: of the project in the image.
    """

    ELSEWHERE: ClassVar[bool] = True
    REQUIRED: ClassVar[Mapping[str, str]] = {"image": IMAGE}

    image: str = ""
    namespace: str = "default"
    volumes: tuple[str, ...] = ()
    service_account: str = ""
    cpu: str = ""
    memory: str = ""
    folder: str = "/espalier"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.matching(NAME, "namespace", "service_account", like="default")
        self.matching(r"[\w./:@-]+", "image", like=IMAGE)
        self.matching(rf"{NAME}=/.+", "volumes", like="runs=/runs")
        self.matching(r"\d+(\.\d+)?(m|[KMGT]i?)?", "cpu", "memory", like="400Gi")
        self.matching(rf"[A-Za-z_]\w*={NAME}/[\w.-]+", "secrets", like="WANDB_API_KEY=SECRET/KEY")

    @property
    def in_container(self) -> bool:
        return True

    @property
    def join_flags(self) -> tuple[str, ...]:
        return ()  # the manifest adds them, because $(NAME) in them is for Kubernetes

    def unseen(self, path: str) -> str:
        mounts = [path for _, path in self._claims]
        if any(f"{path}/".startswith(f"{mount.rstrip('/')}/") for mount in mounts):
            return ""
        if path.startswith(f"{self.folder}/"):
            return "the image's project has no such file: give an absolute path in a volume"
        below = f"give a path below {' or '.join(mounts)}, " if mounts else ""
        folder = os.path.dirname(path)
        # The image's own folders stay as they are.
        volumes = (*self.volumes, f"CLAIM={'/NAME' if _OF_IMAGE.fullmatch(folder) else folder}")
        return (
            f"pods do not see it, since volumes = {self.volumes}: {below}{'or ' if below else ''}mount the claim that holds it, "
            f'--config.volumes="{volumes}", or give an address (docs/scale/remote_storage.md says for what)'
        )

    @property
    def _claims(self) -> list[tuple[str, str]]:
        """Returns (claim, path) of each volume."""
        return [(name, path) for name, _, path in (x.partition("=") for x in self.volumes)]

    @property
    def account(self) -> dict[str, str]:
        """The entry of a pod with the service account; empty without one."""
        return {"serviceAccountName": self.service_account} if self.service_account else {}

    @property
    def requests(self) -> dict[str, str]:
        asked = {"cpu": self.cpu, "memory": self.memory}
        return {key: value for key, value in asked.items() if value}

    def mounts(self, *own: tuple[str, str]) -> list[dict[str, str]]:
        """Returns the mounts of a container: (volume, path) of the pod's own ones, and the claims."""
        return [{"name": name, "mountPath": path} for name, path in (*own, *self._claims)]

    def pod_volumes(self, **own: Any) -> list[dict[str, Any]]:
        """Returns the volumes of a pod: its own empty folders by name, and the claims."""
        empty = [{"name": name, "emptyDir": how} for name, how in own.items()]
        claims = [
            {"name": name, "persistentVolumeClaim": {"claimName": name}} for name, _ in self._claims
        ]
        return [*empty, *claims]

    def environment(self, job: Job) -> list[dict[str, Any]]:
        """Returns the variables of a container."""
        variables = {**self.variables, **job.environment}
        entries: list[dict[str, Any]] = [
            {"name": name, "value": literal(value)} for name, value in variables.items()
        ]
        for name, place in self.secret_places.items():
            secret, _, key = place.partition("/")
            reference = {"secretKeyRef": {"name": secret, "key": key}}
            entries.append({"name": name, "valueFrom": reference})
        return entries


def literal(text: str) -> str:
    """Returns a text in which Kubernetes replaces no $(NAME)."""
    return text.replace("$", "$$")


class _Dumper(yaml.SafeDumper):
    """Writes equal parts twice instead of as anchors, which kubectl takes but people do not read."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def text_of(manifests: Iterable[Mapping[str, Any]]) -> str:
    """Returns manifests as the YAML that kubectl reads."""
    return yaml.dump_all(manifests, Dumper=_Dumper, sort_keys=False, width=2**31)
