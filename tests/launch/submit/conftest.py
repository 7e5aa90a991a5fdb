"""A real SLURM cluster of one host: munged, slurmctld and slurmd in a temporary folder, as root and without systemd."""

import os
import pathlib
import shutil
import socket
import subprocess
import tempfile
import time

import pytest

from tests.processes import free_port

PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "squeue", "scancel")
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={controller_port}
SlurmdPort={node_port}
SlurmUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
SlurmdParameters=config_overrides
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerParameters=batch_sched_delay=1,sched_interval=1,bf_interval=1
SchedulerTimeSlice=5
KillWait=20
MinJobAge=300
ReturnToService=2
NodeName={host} NodeAddr=127.0.0.1 CPUs=4 State=UNKNOWN
PartitionName=low Nodes=ALL Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=60
PartitionName=high Nodes=ALL MaxTime=INFINITE State=UP PriorityTier=10 PreemptMode=OFF
"""


@pytest.fixture(scope="session")
def slurm():
    """Starts the cluster and sets SLURM_CONF; skips the test where SLURM is not installed."""
    path = f"{os.environ['PATH']}:/usr/sbin:/sbin"
    missing = [name for name in PROGRAMS if shutil.which(name, path=path) is None]
    if missing:
        pytest.skip(f"no {', '.join(missing)} here: apt-get install slurm-wlm munge")
    if os.geteuid() != 0:
        pytest.skip("slurmd starts jobs as root only")
    folder = pathlib.Path(tempfile.mkdtemp(prefix="slurm-"))
    folder.chmod(0o755)  # munged refuses other paths
    for name in ("state", "spool"):
        (folder / name).mkdir()
    (folder / "munge.key").write_bytes(os.urandom(128))
    (folder / "munge.key").chmod(0o600)
    ports = {"controller_port": free_port(), "node_port": free_port()}
    conf = CONF.format(host=socket.gethostname().partition(".")[0], folder=folder, **ports)
    (folder / "slurm.conf").write_text(conf)
    (folder / "cgroup.conf").write_text("CgroupPlugin=disabled\n")
    before = {name: os.environ.get(name) for name in ("SLURM_CONF", "PATH")}
    os.environ |= {"SLURM_CONF": str(folder / "slurm.conf"), "PATH": path}
    log = open(folder / "daemons.log", "wb")  # noqa: SIM115 (open as long as the daemons)
    munge = [
        f"--{key}={folder}/munge.{key.partition('-')[0]}"
        for key in ("key-file", "socket", "pid-file", "seed-file", "log-file")
    ]
    commands = (
        ["munged", "--foreground", "--force", "--num-threads=2", *munge],
        ["slurmctld", "-D"],
        ["slurmd", "-D"],
    )
    daemons = []
    try:
        for command in commands:
            daemons.append(subprocess.Popen(command, stdout=log, stderr=log))
            if command[0] == "munged":
                _wait((folder / "munge.socket").exists, daemons, folder)
        _wait(lambda: b"idle" in _output("sinfo", "--noheader"), daemons, folder)
        yield folder
    finally:
        _output("scancel", "--signal=KILL", "--full", "--user=root")
        _output("scancel", "--user=root")
        for daemon in reversed(
            daemons
        ):  # one after another: slurmd waits for those that it talks to
            daemon.terminate()
            try:
                daemon.wait(timeout=20)
            except subprocess.TimeoutExpired:
                daemon.kill()
                daemon.wait()
        log.close()
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
        shutil.rmtree(folder, ignore_errors=True)


def _output(*words):
    return subprocess.run(words, capture_output=True, check=False, timeout=60).stdout


def _wait(ready, daemons, folder):
    until = time.monotonic() + 60
    while not ready():
        if time.monotonic() > until or any(daemon.poll() is not None for daemon in daemons):
            logs = "\n".join(
                file.read_text(errors="replace")[-2000:] for file in folder.glob("*.log")
            )
            raise AssertionError(f"the cluster did not start:\n{logs}")
        time.sleep(0.2)
