"""Flink on Kubernetes: a session cluster of the Flink operator, and a Job with the driver of a pipeline, printed and never sent.

A task manager has a second container, which starts Beam's Python workers with the image of the Dockerfile's target `beam`. The
driver packs the pipeline into the archive of Beam's job server, which its first container brings, and hands it to Flink, so that
no job server and no folder for staged files are needed.
"""

import dataclasses
from typing import Any, ClassVar

from espalier.launch.submit import pods
from espalier.launch.submit.base import Job, Printed, SubmitError, name_of
from espalier.launch.submit.beam import settings as beam
from espalier.launch.submit.launch_config import texts

_JARS = "/jars"
_JAR = "beam-runners-flink-job-server.jar"  # in the image of Beam's job server
_POOL_PORT = 50000  # of Beam's worker pool
_KEEP_MS = 600_000  # workers keep what they have loaded between two stages


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(pods.Pods, beam.Beam):
    """Flink on Kubernetes: versions and task managers.

    Attributes:
      image: of the Python workers and of the driver, the Dockerfile's target `beam`.
      flink_version: of Flink, for which Beam has a job server.
      beam_version: of Apache Beam in the image.
      flink_account: Kubernetes' account that may start task managers; the operator makes it.
      cores: of the Python workers of a pod.
      memory: of the Python workers of a pod.
      flink_memory: of Flink itself in a pod.
      restarts: starts of the driver after the first.
      service_account: of the driver.
    """

    BACKEND: ClassVar[str] = "flink"

    flink_version: str = "1.20"
    beam_version: str = "2.77.0"
    flink_account: str = "flink"
    cores: int = 8
    memory: str = "32Gi"
    flink_memory: str = "4096m"
    restarts: int = 3

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(1, "cores")
        self.at_least(0, "restarts")
        self.matching(r"\d+\.\d+", "flink_version", like="1.20")
        self.matching(r"\d+\.\d+\.\d+", "beam_version", like="2.77.0")
        self.matching(pods.NAME, "flink_account", like="flink")
        self.matching(r"\d+[mg]", "flink_memory", like="4096m")
        if self.cpu:
            raise SubmitError(
                f"cpu = {self.cpu!r}: give cores, by which Flink also divides the work."
            )

    @property
    def cores_of_worker(self) -> int:
        return self.cores

    def submitter(self) -> Printed:
        return Printed(lambda job: text(self, job), "the manifests for Flink")


def text(settings: Settings, job: Job) -> str:
    """Returns the manifests of one pipeline as YAML, after comments on what they start and cost."""
    name, words = name_of(job), beam.words_of(job)
    kubectl = f"kubectl --namespace={settings.namespace}"
    head = [
        f"{beam.command_of(words)} with Apache Beam on Flink. Nothing is sent: a person gives this text to kubectl.",
        f"Starts: {settings.workers:,} pods with {settings.cores} cores and {settings.memory} for Python workers and "
        f"{settings.flink_memory} for Flink, with the image {settings.image}; one pod with Flink's job manager, one with the driver.",
        f"Reads and writes: {', '.join([*settings.volumes, *beam.addresses(settings, words)])}",
        *settings.costs(words),
        "Needs: the Flink operator in the cluster, and the image: docker build --target=beam --tag=IMAGE . && docker push IMAGE",
        f"Start (this is where costs begin): {kubectl} create --filename=FILE, with this text in FILE.",
        f"Watch: {kubectl} logs --follow job/{name}",
        f"End (this is where costs end): {kubectl} delete job/{name} flinkdeployment/{name}. Started again, the work goes on:"
        " finished shards stay.",
    ]
    processes = settings.processes_of_worker(words)
    return beam.comment(head) + pods.text_of(
        [_cluster(settings, job, name, processes), _driver(settings, job, name, processes)]
    )


def _cluster(settings: Settings, job: Job, name: str, processes: int) -> dict[str, Any]:
    """Returns the session cluster; Flink starts as many task managers as the pipeline's parallelism needs."""
    resources = {"cpu": str(settings.cores), "memory": settings.memory}
    pool = {
        "name": "beam-worker-pool",
        "image": settings.image,
        "args": ["--worker_pool"],  # of the image's entry point
        "workingDir": settings.folder,
        "ports": [{"containerPort": _POOL_PORT}],
        "env": settings.environment(job),
        "resources": {"limits": {"memory": settings.memory}, "requests": resources},
        "volumeMounts": settings.mounts(),
    }
    # The operator completes the container of this name.
    pod = {
        "containers": [{"name": "flink-main-container"}, pool],
        "volumes": settings.pod_volumes(),
    }
    return {
        "apiVersion": "flink.apache.org/v1beta1",
        "kind": "FlinkDeployment",
        "metadata": {"name": name, "namespace": settings.namespace},
        "spec": {
            "image": f"flink:{settings.flink_version}",
            "flinkVersion": f"v{settings.flink_version.replace('.', '_')}",
            "serviceAccount": settings.flink_account,
            "flinkConfiguration": {"taskmanager.numberOfTaskSlots": str(processes)},
            "jobManager": {"resource": {"cpu": 1, "memory": "2048m"}},
            "taskManager": {
                "resource": {"cpu": 1, "memory": settings.flink_memory},
                "podTemplate": {"apiVersion": "v1", "kind": "Pod", "spec": pod},
            },
        },
    }


def _driver(settings: Settings, job: Job, name: str, processes: int) -> dict[str, Any]:
    """Returns the Job that runs the command, which hands the pipeline to the cluster and waits."""
    flag = beam.flag(
        runner="FlinkRunner",
        job_name=name,
        flink_master=f"http://{name}-rest:8081",
        flink_submit_uber_jar=True,
        flink_job_server_jar=f"{_JARS}/{_JAR}",
        environment_type="EXTERNAL",
        environment_config=f"localhost:{_POOL_PORT}",
        environment_cache_millis=_KEEP_MS,
        parallelism=settings.workers * processes,
        sdk_worker_parallelism=processes,
    )
    jars = settings.mounts(("jars", _JARS))
    archive = {
        "name": "job-server",
        "image": f"apache/beam_flink{settings.flink_version}_job_server:{settings.beam_version}",
        "command": ["cp", f"/opt/apache/beam/jars/{_JAR}", _JARS],
        "volumeMounts": jars[:1],
    }
    main = {
        "name": pods.MAIN,
        "image": settings.image,
        "command": [pods.literal(word) for word in texts([*job.command, flag])],
        "workingDir": settings.folder,
        "env": settings.environment(job),
        "resources": {"requests": {"cpu": "1", "memory": "4Gi"}},
        "volumeMounts": jars,
    }
    wrong_input = {"containerName": pods.MAIN, "operator": "In", "values": [2]}
    return {
        "apiVersion": "batch/v1",
        "kind": "Job",
        "metadata": {"name": name, "namespace": settings.namespace},
        "spec": {
            "backoffLimit": settings.restarts,
            "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": wrong_input}]},
            "template": {
                "spec": {
                    **settings.account,
                    "restartPolicy": "Never",
                    "initContainers": [archive],
                    "containers": [main],
                    "volumes": settings.pod_volumes(jars={}),
                }
            },
        },
    }
