"""TPU VM: the commands, run by programs that only write down what they get."""

import json
import os
import subprocess
import sys

import pytest

from espalier.launch.submit import launch_config
from espalier.launch.submit.base import Job, SubmitError

HOSTILE = (
    "a b",
    "$(touch PWNED)",
    "`touch PWNED`",
    "'; touch PWNED; '",
    '"x"',
    "line\ntouch PWNED",
    "ü",
    "",
)
RECORD = "import json, sys; open({file!r}, 'a').write(json.dumps(sys.argv[1:]) + chr(10))\n"


def read(*overrides):
    given = ("project=mine", "repository=https://host/fork.git", *overrides)
    return launch_config.read("launch/submit/configs/tpu_vm.py", given)


def commands(*overrides, command=("python", "-m", "espalier.launch.train")):
    queue = read(*overrides).submitter()
    queue.submit(Job(name="a b", command=command, log="/runs/a b/log.txt"))
    return queue.preview()


def test_commands_from_creating_to_deleting(tmp_path):
    """Runs all printed commands with a `gcloud` that writes down its words, and then the start script."""
    record = tmp_path / "words.jsonl"
    gcloud = tmp_path / "gcloud"
    gcloud.write_text(f"#!{sys.executable}\n{RECORD.format(file=str(record))}")
    gcloud.chmod(0o755)
    env = tuple(f"V{i}={word}" for i, word in enumerate(HOSTILE))
    text = commands(f"env={env!r}", "slices=2", "spot=True", command=("python", *HOSTILE))
    own = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    subprocess.run(["bash"], input=text, text=True, check=True, env=own, cwd=tmp_path)
    calls = [json.loads(line) for line in record.read_text().splitlines()]
    create, delete = calls[0], calls[-1]
    assert create[:4] == ["compute", "tpus", "queued-resources", "create"]
    assert {"--node-count=2", "--spot", "--accelerator-type=v5litepod-16"} <= set(create)
    assert delete[3] == "delete"
    remote = [call[-1].removeprefix("--command=") for call in calls if "--worker=all" in call]
    (write,) = {script for script in remote if "base64" in script}
    # What a host does with it.
    host = tmp_path / "host"
    (host / "espalier").mkdir(parents=True)
    subprocess.run(["bash", "-c", write], check=True, cwd=host)
    python = host / "espalier/.venv/bin/python"
    python.parent.mkdir(parents=True)
    show = "import json, os, sys; print(json.dumps([sys.argv[1:], [os.environ[f'V{i}'] for i in range(%d)]]))"
    python.write_text(f"#!{sys.executable}\n{show % len(HOSTILE)}\n")
    python.chmod(0o755)
    done = subprocess.run(
        ["bash", "start.sh"], check=True, cwd=host / "espalier", capture_output=True, text=True
    )
    words, variables = json.loads(done.stdout)
    assert words == [
        "-m",
        "espalier.launch.submit.group",
        "--restarts=20",
        "--",
        "python",
        *HOSTILE,
    ]
    assert variables == list(HOSTILE)
    assert not list(tmp_path.rglob("PWNED"))


def test_nothing_is_ever_sent():
    queue = read().submitter()
    handle = queue.submit(Job(name="x", command=("true",), log="/x"))
    with pytest.raises(SubmitError, match="for a person: see them with --dry_run"):
        queue.statuses([handle])


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("project=",), "project: there is no default; give --config.project=NAME"),
        (("repository=",), "repository: there is no default; give --config.repository=URL"),
        (("chips=8",), "chips = 8, but accelerator_type = 'v5litepod-16' has 16: remove chips"),
        *(
            (
                (f"accelerator_type={kind}-8",),
                "the software of this TPU is not known .*of v4, v5l.*give runtime_version",
            )
            for kind in ("v3", "v7x")
        ),
        (
            ("accelerator_type=v6e-8", "runtime_version=v2-alpha-tpuv5-lite"),
            "is of another TPU than accelerator_type = 'v6e-8', whose software is v2-alpha-tpuv6e",
        ),
    ],
)
def test_what_is_missing_or_contradicts_itself_is_refused_by_name(overrides, message):
    with pytest.raises(SubmitError, match=message):
        read(*overrides)


@pytest.mark.parametrize(
    ("kind", "chips"),
    # Cloud TPU names slices by TensorCores for v4 and v5p, whose two act as one device, and by chips for v5e and v6e.
    # The two TensorCores of a v3 chip are two devices: its slices are left to the machines.
    [("v5litepod-16", 16), ("v6e-8", 8), ("v5p-16", 8), ("v4-32", 16), ("v3-8", None), ("x", None)],
)
def test_the_chips_of_a_slice_follow_from_its_name(kind, chips):
    settings = read(f"accelerator_type={kind}", "slices=2", "runtime_version=other")
    assert settings.devices == (None if chips is None else 2 * chips)
    total = f"2 slices x {chips} chips = {2 * (chips or 0)} chips"
    told = "all that the machines have; the mesh is checked there" if chips is None else total
    assert settings.notes() == [f"devices: {told}"]


@pytest.mark.parametrize(
    ("overrides", "runtime"),
    # The versions for JAX in Google's list of TPU software.
    [
        ((), "v2-alpha-tpuv5-lite"),
        (("accelerator_type=v6e-8",), "v2-alpha-tpuv6e"),
        (("accelerator_type=v5p-16",), "v2-alpha-tpuv5"),
        (("accelerator_type=v4-8",), "tpu-ubuntu2204-base"),
        (("accelerator_type=v6e-8", "runtime_version=newer"), "newer"),
        (("accelerator_type=v9-8", "runtime_version=newer"), "newer"),
    ],
)
def test_the_software_of_a_machine_is_that_of_its_tpu(overrides, runtime):
    assert f"--runtime-version={runtime} \n" in commands(*overrides).replace("\n", " \n")
