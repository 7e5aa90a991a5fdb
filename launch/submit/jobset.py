"""GKE: a run as a Kubernetes JobSet, rendered here and sent by kubectl.

Every slice of a TPU, or the hosts with GPUs, are one Job of the set. Exit codes decide what a failure means:

  2      the Job fails for good, and with it the JobSet: an error in the input would come again
  75     the pod is started again and nothing is counted: the run has saved, or has lost another process
  other  the whole JobSet starts again, at most `restarts` times
"""

import dataclasses
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

from espalier.launch.submit import pods
from espalier.launch.submit.base import Handle, Job, State, Status, SubmitError, answer, name_of
from espalier.launch.submit.launch_config import texts

_API = "jobset.x-k8s.io/v1alpha2"
_GROUP = "hosts"  # the replicated job's name
_PORT = 1234
_SETTINGS = "espalier/settings"  # the annotation with those of the submission
_PRIVILEGED = """\
# Containers with TPUs are privileged: libtpu maps the chips' memory and locks pages, for which it raises its own limits.
"""
# Chips of a host, by accelerator of GKE; the largest host of the kind, for slices of several hosts.
_CHIPS = {
    "tpu-v4-podslice": 4,
    "tpu-v5p-slice": 4,
    "tpu-v5-lite-podslice": 4,
    "tpu-v5-lite-device": 8,
    "tpu-v6e-slice": 4,
    "tpu7x": 4,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(pods.Pods):
    """GKE: hosts of a JobSet.

    Attributes:
      accelerator: of TPUs, such as 'tpu-v5-lite-podslice'; of GPUs, such as 'nvidia-h100-80gb'.
      topology: of a TPU slice, such as '4x4'; empty for GPUs.
      slices: TPU slices.
      nodes: hosts with GPUs.
      gpus_per_node: GPUs of each host; 0 for TPUs.
      chips_per_host: chips of a TPU host; 0 for the usual number of this accelerator.
      restarts: restarts of the JobSet after an exit code other than 2 and 75.
      grace_seconds: time to save after SIGTERM.
      max_days: days after which the JobSet is ended; 0 for no limit.
      spot: whether spot hosts are asked for.
    """

    BACKEND: ClassVar[str] = "jobset"

    accelerator: str = "tpu-v5-lite-podslice"
    topology: str = "4x4"
    slices: int = 1
    nodes: int = 1
    gpus_per_node: int = 0
    chips_per_host: int = 0
    restarts: int = 3
    grace_seconds: int = 300
    max_days: int = 0
    spot: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "slices", "nodes", "grace_seconds")
        self.at_least(0, "gpus_per_node", "chips_per_host", "restarts", "max_days")
        self.matching(pods.NAME, "accelerator", like="nvidia-h100-80gb")
        self.matching(r"\d+x\d+(x\d+)?", "topology", like="4x4")
        if bool(self.topology) == bool(self.gpus_per_node):
            raise SubmitError("give topology for TPUs, or gpus_per_node for GPUs, and not both.")
        if self.topology and self.nodes != 1:
            raise SubmitError(
                f"nodes = {self.nodes} is for GPUs: give slices, whose hosts are known."
            )
        if not self.topology and self.slices != 1:
            raise SubmitError(f"slices = {self.slices} is for TPUs: give nodes.")
        if self.topology:
            if not self.chips_of_host:
                raise SubmitError(
                    f"accelerator = {self.accelerator!r}: unknown; give chips_per_host, or one of {sorted(_CHIPS)}."
                )
            if self.chips > self.chips_of_host and self.chips % self.chips_of_host:
                raise SubmitError(
                    f"topology = {self.topology!r} has {self.chips} chips, no multiple of the {self.chips_of_host} chips "
                    "of a host: give another topology, or chips_per_host."
                )

    @property
    def chips(self) -> int:
        """Chips of a TPU slice."""
        return math.prod(map(int, self.topology.split("x")))

    @property
    def chips_of_host(self) -> int:
        usual = _CHIPS.get(self.accelerator, 0)
        return self.chips_per_host or min(usual, self.chips)

    @property
    def hosts(self) -> int:
        """Hosts of a slice, or all hosts with GPUs."""
        return self.chips // self.chips_of_host if self.topology else self.nodes

    @property
    def processes(self) -> int:
        return self.hosts * self.slices if self.topology else self.nodes

    @property
    def parts(self) -> tuple[tuple[int, str], ...]:
        if self.topology:
            return (self.slices, "slices"), (self.chips, "chips")
        return (self.nodes, "nodes"), (self.gpus_per_node, "GPUs")

    def submitter(self) -> "JobSetSubmitter":
        return JobSetSubmitter(self)


def manifest(settings: Settings, job: Job) -> dict[str, Any]:
    """Returns the JobSet of a job."""
    name = name_of(job)
    tpu = bool(settings.topology)
    replicated = {
        "name": _GROUP,
        "replicas": settings.slices if tpu else 1,
        "template": {"spec": _job(settings, job, name)},
    }
    annotations = {_SETTINGS: json.dumps(dataclasses.asdict(settings))}
    metadata = {"name": name, "namespace": settings.namespace, "annotations": annotations}
    if tpu and settings.slices > 1:  # a slice is a node pool, and takes one Job
        key = "alpha.jobset.sigs.k8s.io/exclusive-topology"
        annotations[key] = "cloud.google.com/gke-nodepool"
    return {
        "apiVersion": _API,
        "kind": "JobSet",
        "metadata": metadata,
        "spec": {
            "failurePolicy": {
                "maxRestarts": settings.restarts,
                # A Job fails with this reason after exit code 2 only.
                "rules": [{"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}],
            },
            "network": {"enableDNSHostnames": True, "subdomain": name},
            "replicatedJobs": [replicated],
        },
    }


def _job(settings: Settings, job: Job, name: str) -> dict[str, Any]:
    """Returns the spec of the Job of a slice, or of the hosts with GPUs."""
    codes = {"containerName": pods.MAIN, "operator": "In"}
    limit = {"activeDeadlineSeconds": 86400 * settings.max_days} if settings.max_days else {}
    return {
        "completionMode": "Indexed",
        "completions": settings.hosts,
        "parallelism": settings.hosts,
        "backoffLimit": 0,
        **limit,
        "podReplacementPolicy": "Failed",  # a process of the same index has ended
        "podFailurePolicy": {
            "rules": [
                {"action": "FailJob", "onExitCodes": {**codes, "values": [2]}},
                {"action": "Ignore", "onExitCodes": {**codes, "values": [75]}},
                {"action": "Ignore", "onPodConditions": [_condition("DisruptionTarget")]},
            ]
        },
        "template": {"spec": _pod(settings, job, name)},
    }


def _condition(kind: str) -> dict[str, str]:
    return {"type": kind, "status": "True"}


def _pod(settings: Settings, job: Job, name: str) -> dict[str, Any]:
    tpu = bool(settings.topology)
    selector = {"cloud.google.com/gke-accelerator": settings.accelerator}
    if tpu:
        selector = {
            "cloud.google.com/gke-tpu-accelerator": settings.accelerator,
            "cloud.google.com/gke-tpu-topology": settings.topology,
        }
    tolerations = [] if tpu else [_toleration("nvidia.com/gpu")]
    if settings.spot:
        selector["cloud.google.com/gke-spot"] = "true"
        tolerations.append(_toleration("cloud.google.com/gke-spot"))
    device, count = "nvidia.com/gpu", settings.gpus_per_node
    if tpu:
        device, count = "google.com/tpu", settings.chips_of_host
    container = {
        "name": pods.MAIN,
        "image": settings.image,
        "command": [pods.literal(word) for word in texts(job.command)],
        "args": list(_join_flags(settings, name)),
        "workingDir": settings.folder,
        "env": settings.environment(job),
        "resources": {"limits": {device: count}, "requests": {device: count, **settings.requests}},
        "volumeMounts": settings.mounts(("shm", "/dev/shm")),
    }
    if tpu:
        container["securityContext"] = {"privileged": True}  # see _PRIVILEGED
    return {
        **settings.account,
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": settings.grace_seconds,
        "nodeSelector": selector,
        "tolerations": tolerations,
        "containers": [container],
        "volumes": settings.pod_volumes(shm={"medium": "Memory"}),
    }


def _toleration(key: str) -> dict[str, str]:
    return {"key": key, "operator": "Exists", "effect": "NoSchedule"}


def _join_flags(settings: Settings, name: str) -> tuple[str, ...]:
    """Returns flags with which the processes join; Kubernetes fills in the index."""
    if settings.processes == 1:
        return ()
    if settings.topology:
        return ("--coordinator_address=auto",)
    return (
        f"--coordinator_address={name}-{_GROUP}-0-0.{name}:{_PORT}",
        f"--process_count={settings.processes}",
        "--process_index=$(JOB_COMPLETION_INDEX)",
    )


def _deleted(jobset: Mapping[str, Any]) -> bool:
    """Whether a JobSet ends because it was deleted."""
    return "deletionTimestamp" in jobset.get("metadata", {})


def _state(jobset: Mapping[str, Any]) -> Status:
    """Returns the status of a JobSet as Kubernetes has it."""
    if not jobset:
        return Status(state=State.DROPPED)
    status = jobset.get("status") or {}
    for condition in status.get("conditions", ()):
        if condition.get("status") == "True" and condition.get("type") in ("Completed", "Failed"):
            return Status(state=State.ENDED, exit_status=int(condition["type"] == "Failed"))
    jobs = status.get("replicatedJobsStatus") or ()
    ready = any(entry.get("ready") for entry in jobs)
    return Status(state=State.RUNNING if ready else State.WAITING)


class JobSetSubmitter:
    """JobSets of a Kubernetes cluster; see launch.submit.base.Queue."""

    def __init__(self, settings: Settings):
        self._settings = settings
        self._new: dict[Handle, Job] = {}

    def handle(self, job: Job) -> Handle:
        return name_of(job)

    def submit(self, job: Job) -> Handle:
        if job.after:
            raise SubmitError(
                "a JobSet cannot wait for another one: use --config of SLURM or this machine."
            )
        handle = self.handle(job)
        self._new[handle] = job
        return handle

    def preview(self) -> str:
        return self._text(self._new.values())

    def statuses(self, handles: Sequence[Handle]) -> Mapping[Handle, Status]:
        while self._new:
            handle, job = self._new.popitem()
            jobset = self._get(handle)
            if _state(jobset).state is State.ENDED or _deleted(jobset):  # of an earlier start
                self._kubectl("delete", f"jobset/{handle}", "--wait=true")
                jobset = {}
            before = jobset.get("metadata", {}).get("annotations", {}).get(_SETTINGS, "{}")
            if not jobset:
                self._kubectl("create", "--filename=-", text=self._text([job]))
            elif other := self._settings.changed(json.loads(before)):
                raise SubmitError(
                    f"{handle} has not ended, and was submitted with another {', '.join(other)}: cancel it first (--cancel)."
                )
        return {handle: self._status(handle) for handle in handles}

    def _text(self, jobs: Iterable[Job]) -> str:
        manifests = [manifest(self._settings, job) for job in jobs]
        text = pods.text_of(manifests)
        return f"{_PRIVILEGED}{text}" if self._settings.topology else text

    def cancel(self, handle: Handle) -> None:
        if self._new.pop(handle, None) is None:
            self._kubectl("delete", f"jobset/{handle}", "--wait=false")

    def close(self) -> None:
        self._new = {}

    def _get(self, handle: Handle) -> dict[str, Any]:
        """Returns a JobSet as Kubernetes has it; empty if there is none."""
        try:
            return json.loads(self._kubectl("get", f"jobset/{handle}", "--output=json"))
        except SubmitError as error:
            if "NotFound" in str(error):
                return {}
            raise

    def _status(self, handle: Handle) -> Status:
        jobset = self._get(handle)
        status = _state(jobset)
        if status.state is State.WAITING and not _deleted(jobset):
            self._check_pods(handle)
        return status

    def _check_pods(self, handle: Handle) -> None:
        """Raises SubmitError with Kubernetes' words if a pod cannot start, for example without its image."""
        selector = f"--selector=jobset.sigs.k8s.io/jobset-name={handle}"
        pods = json.loads(self._kubectl("get", "pods", selector, "--output=json"))["items"]
        for pod in pods:
            for container in pod.get("status", {}).get("containerStatuses", ()):
                waiting = container.get("state", {}).get("waiting") or {}
                if re.search("Image|CreateContainer", waiting.get("reason", "")):
                    raise SubmitError(
                        f"Kubernetes cannot start {handle}: {waiting['reason']}: {waiting.get('message', '')}"
                    )

    def _kubectl(self, *words: str, text: str | None = None) -> str:
        """Runs kubectl and returns its output; raises SubmitError with its words."""
        return answer(
            ("kubectl", f"--namespace={self._settings.namespace}", *words),
            missing="install it and choose a cluster, or see the manifest with --dry_run",
            refused=f"Kubernetes refused (kubectl {words[0]})",
            text=text,
        )
