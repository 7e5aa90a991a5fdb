"""Dataflow: the commands that send the image and start the driver of a pipeline, printed and never run.

The driver is the command itself, on this machine: it lists the shards, asks Dataflow for machines, and waits until the work is
done. Machines run the image of the Dockerfile's target `beam`. They cost money, so a person runs the commands.
"""

import dataclasses
import re
import shlex
from collections.abc import Mapping
from typing import ClassVar

from espalier.launch.submit import pods
from espalier.launch.submit.base import ADDRESS, Job, Printed, SubmitError, name_of, numbered
from espalier.launch.submit.beam import settings as beam
from espalier.launch.submit.launch_config import texts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Settings(beam.Beam):
    """Dataflow: project, machines and image.

    Attributes:
      project, region: of Google Cloud.
      bucket: address of a folder for what Dataflow stages, such as 'gs://BUCKET/dataflow'.
      image: of the workers, the Dockerfile's target `beam`.
      machine_type: of the workers.
      cores: of a worker; 0 for the number at the end of the machine's name.
      disk_gb: of each worker; copies of object stores are on it.
      service_account: address of the account of the workers; empty for the project's default.
      subnetwork: of the workers; empty for the project's default.
      public_ips: whether workers have public addresses.
      options: further options of the pipeline, each '--name=value'.
    """

    BACKEND: ClassVar[str] = "dataflow"
    ELSEWHERE: ClassVar[bool] = True
    REQUIRED: ClassVar[Mapping[str, str]] = {
        "project": "NAME, the project of Google Cloud",
        "bucket": "gs://BUCKET/dataflow, where Dataflow stages files",
        "image": pods.IMAGE,
    }

    project: str = ""
    region: str = "us-central1"
    bucket: str = ""
    image: str = ""
    machine_type: str = "n2-standard-8"
    cores: int = 0
    disk_gb: int = 50
    service_account: str = ""
    subnetwork: str = ""
    public_ips: bool = True
    options: tuple[str, ...] = ()
    python: str = ".venv-beam/bin/python"

    def __post_init__(self) -> None:
        super().__post_init__()
        self.at_least(0, "cores")
        self.at_least(30, "disk_gb")  # the least that holds the system and the image
        self.matching(r"gs://[\w.-]+(/[\w./-]*)?", "bucket", like="gs://BUCKET/dataflow")
        self.matching(r"[\w./:@-]+", "image", like=pods.IMAGE)
        self.matching(r"[\w.:/@-]+", "project", "region", "machine_type", like="us-central1")
        self.matching(
            r"[\w.:/@-]+", "service_account", "subnetwork", like="regions/R/subnetworks/S"
        )
        self.matching(r"--[a-z]\w*(=.+)?", "options", like="--experiments=NAME")
        if self.secrets:
            raise SubmitError("secrets: Dataflow has none: give a service_account.")
        if not self.public_ips and not self.subnetwork:
            raise SubmitError(
                "public_ips = False needs a subnetwork with private access to Google's services: give subnetwork."
            )
        for option in self.options:
            if (name := option[2:].partition("=")[0]) in self.pipeline_options(1):
                raise SubmitError(f"options: --{name} follows from the other settings: set these.")
        if not self.cores_of_worker:
            raise SubmitError(
                f"cores: those of machine_type = {self.machine_type!r} are unknown: give --config.cores=N."
            )

    @property
    def cores_of_worker(self) -> int:
        match = re.fullmatch(r"[a-z]\w*-[a-z]+-(\d+)", self.machine_type)
        return self.cores or (int(match[1]) if match else 0)

    def unseen(self, path: str) -> str:
        del path
        return f"the workers of Dataflow see no folder of this machine: {ADDRESS}"

    def pipeline_options(self, processes: int, job: str = "") -> dict[str, object]:
        """Returns the options of a pipeline by name; a worker has one process for each core, or one alone."""
        folder = self.bucket.rstrip("/")
        return {
            "runner": "DataflowRunner",
            "project": self.project,
            "region": self.region,
            "job_name": job,
            "staging_location": f"{folder}/staging",
            "temp_location": f"{folder}/temp",
            "sdk_container_image": self.image,
            "worker_machine_type": self.machine_type,
            "num_workers": self.workers,
            "max_num_workers": self.workers,
            "disk_size_gb": self.disk_gb,
            "number_of_worker_harness_threads": 1,
            "experiments": "no_use_multiple_sdk_containers" if processes == 1 else "",
            "service_account_email": self.service_account,
            "subnetwork": self.subnetwork,
            "no_use_public_ips": "" if self.public_ips else True,
        }

    def submitter(self) -> Printed:
        return Printed(lambda job: commands(self, job), "the commands for Dataflow")


def commands(settings: Settings, job: Job) -> str:
    """Returns the commands for one pipeline, each with a comment before it, after what they start and cost."""
    name, words = name_of(job), beam.words_of(job)
    flag = beam.flag(**settings.pipeline_options(settings.processes_of_worker(words), name))
    flag = ",".join([flag, *settings.options])
    variables = [f"{key}={shlex.quote(value)}" for key, value in settings.variables.items()]
    driver = " ".join([*variables, shlex.join([*texts(job.command), flag])])
    where = f"--project={settings.project} --region={settings.region}"
    jobs = f"gcloud dataflow jobs list {where} --status=active --filter=name={name}"
    steps = {
        "Build the image of the workers, and send it.": [
            f"docker build --target=beam --tag={settings.image} .",
            f"docker push {settings.image}",
        ],
        "Start, from the same commit (this is where costs begin); it waits until all is done.": [
            driver
        ],
        "Watch, in another terminal.": [jobs],
        "Stop (this is where costs end). The same start goes on later: finished shards stay.": [
            f"gcloud dataflow jobs cancel {where} $({jobs} --format='value(id)')"
        ],
    }
    cores = settings.workers * settings.cores_of_worker
    head = [
        f"{beam.command_of(words)} with Apache Beam on Dataflow. Nothing is sent: a person runs these commands.",
        f"Starts: {settings.workers:,} machines {settings.machine_type} ({cores:,} cores) with {settings.disk_gb} GB each, in "
        f"{settings.region} of {settings.project}, with the image {settings.image}; the driver on this machine.",
        f"Reads and writes: {', '.join([settings.bucket, *beam.addresses(settings, words)])}",
        *settings.costs(words),
    ]
    return "\n".join([beam.comment(head), *numbered(steps.items())])
