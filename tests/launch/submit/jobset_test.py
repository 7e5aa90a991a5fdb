"""GKE: manifests, checked against schemas, and the answers of kubectl."""

import json
import os
import pathlib
import re

import pytest
import yaml

from espalier.launch.submit import launch_config
from espalier.launch.submit.base import Job, State, SubmitError

HOSTILE = (
    "a b",
    "$(touch PWNED)",
    "$HOME",
    "$$(X)",
    "'\"; x",
    "line\nkey: value",
    "- x",
    "{{x}}",
    "ü⚡",
    "%",
    "",
)
SCHEMA = pathlib.Path(__file__).parent / "jobset.schema.json"
GPUS = ("topology=", "accelerator=nvidia-h100-80gb", "nodes=2", "gpus_per_node=8")
JOB = Job(
    name="My run",
    command=("python", "-m", "espalier.launch.train"),
    log="/runs/My run/logs/log.txt",
)


def read(*overrides):
    return launch_config.read("launch/submit/configs/jobset.py", ("image=IMAGE", *overrides))


def rendered(*overrides, job=JOB):
    queue = read(*overrides).submitter()
    queue.submit(job)
    return yaml.safe_load(queue.preview())


def expanded(text, variables):
    """What Kubernetes makes of a text in a container's command, arguments or variables."""
    reference = re.compile(r"\$(\$|\((\w+)\))")
    return reference.sub(lambda m: "$" if m[1] == "$" else variables.get(m[2], m[0]), text)


@pytest.mark.parametrize(
    "overrides",
    [
        (),
        (
            "spot=True",
            "max_days=3",
            "service_account=trainer",
            "cpu=100",
            "memory=400Gi",
        ),
        (*GPUS, "secrets=('WANDB_API_KEY=wandb/key',)"),
    ],
)
def test_manifests_follow_the_schemas(overrides):
    kubernetes_validate = pytest.importorskip("kubernetes_validate")
    jsonschema = pytest.importorskip("jsonschema")
    whole = rendered(*overrides)
    jsonschema.validate(whole, json.loads(SCHEMA.read_text()))
    for group in whole["spec"]["replicatedJobs"]:
        job = {
            "apiVersion": "batch/v1",
            "kind": "Job",
            "metadata": {"name": "x"},
            **group["template"],
        }
        kubernetes_validate.validate(job, "1.35", strict=True)
        job["spec"]["template"]["spec"]["restartPolice"] = "Never"  # the check sees misspelt fields
        with pytest.raises(kubernetes_validate.ValidationError):
            kubernetes_validate.validate(job, "1.35", strict=True)


def test_slices_hosts_and_what_exit_codes_mean():
    whole = rendered("slices=2")
    (group,) = whole["spec"]["replicatedJobs"]
    spec = group["template"]["spec"]
    assert (group["replicas"], spec["completions"], spec["parallelism"]) == (2, 4, 4)
    (container,) = spec["template"]["spec"]["containers"]
    assert container["resources"]["limits"] == {"google.com/tpu": 4}
    assert container["args"] == ["--coordinator_address=auto"]
    actions = {
        tuple(rule["onExitCodes"]["values"]): rule["action"]
        for rule in spec["podFailurePolicy"]["rules"]
        if "onExitCodes" in rule
    }
    assert actions == {(2,): "FailJob", (75,): "Ignore"}
    assert whole["spec"]["failurePolicy"]["rules"] == [
        {"action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    ]
    assert spec["backoffLimit"] == 0  # any other code fails the Job, which the JobSet counts


def test_hosts_with_gpus_join_the_first_one():
    whole = rendered(*GPUS)
    name = whole["metadata"]["name"]
    (group,) = whole["spec"]["replicatedJobs"]
    (container,) = group["template"]["spec"]["template"]["spec"]["containers"]
    assert [expanded(word, {"JOB_COMPLETION_INDEX": "1"}) for word in container["args"]] == [
        f"--coordinator_address={name}-hosts-0-0.{name}:1234",
        "--process_count=2",
        "--process_index=1",
    ]


def test_a_container_gets_the_words_as_they_were():
    env = tuple(f"V{i}={word}" for i, word in enumerate(HOSTILE))
    job = Job(name=HOSTILE[1], command=HOSTILE, log=f"/x/{HOSTILE[1]}/{HOSTILE[5]}")
    whole = rendered(f"env={env!r}", job=job)
    (group,) = whole["spec"]["replicatedJobs"]
    (container,) = group["template"]["spec"]["template"]["spec"]["containers"]
    dangerous = {"touch": "PWNED", "X": "PWNED", "HOME": "PWNED"}
    assert tuple(expanded(word, dangerous) for word in container["command"]) == HOSTILE
    assert tuple(expanded(entry["value"], dangerous) for entry in container["env"]) == HOSTILE
    assert re.fullmatch("touch-pwned-[0-9a-f]{6}", whole["metadata"]["name"])


def test_secrets_are_references():
    whole = rendered("secrets=('WANDB_API_KEY=wandb/key',)")
    (group,) = whole["spec"]["replicatedJobs"]
    (container,) = group["template"]["spec"]["template"]["spec"]["containers"]
    reference = {"secretKeyRef": {"name": "wandb", "key": "key"}}
    assert {"name": "WANDB_API_KEY", "valueFrom": reference} in container["env"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("gpus_per_node=8",), "topology for TPUs, or gpus_per_node"),
        (("topology=3x5",), "15 chips, no multiple of the 4"),
        (("topology=x",), "topology = 'x'"),
        (("accelerator=tpu-v99",), "unknown; give chips_per_host"),
        (("nodes=2",), "nodes = 2 is for GPUs: give slices"),
        ((*GPUS, "slices=2"), "slices = 2 is for TPUs: give nodes"),
        (("image=",), "image: there is no default; give --config.image=REGION-docker.pkg.dev/"),
        (("image=a b",), "image = 'a b'"),
        (("secrets=('A=/file',)",), "secrets = .A=/file. *: give"),
        (("env=('API_TOKEN=x',)",), "API_TOKEN looks like a secret"),
    ],
)
def test_wrong_settings_name_the_key(overrides, message):
    with pytest.raises(SubmitError, match=message):
        read(*overrides)


def test_the_devices_are_added_up_and_one_slice_is_the_default():
    (group,) = rendered("topology=8x8")["spec"]["replicatedJobs"]
    assert group["replicas"] == 1
    assert read("topology=8x8").notes() == ["devices: 1 slice x 64 chips = 64 chips"]
    assert read("topology=4x8", "slices=2").notes() == ["devices: 2 slices x 32 chips = 64 chips"]
    assert read(*GPUS).notes() == ["devices: 2 nodes x 8 GPUs = 16 GPUs"]


def test_the_manifest_says_why_containers_with_chips_are_privileged():
    def text(*overrides):
        queue = read(*overrides).submitter()
        queue.submit(JOB)
        return queue.preview()

    assert "privileged: true" in text()
    assert text().startswith("# Containers with TPUs are privileged: libtpu")
    assert "rivileged" not in text(*GPUS)


def test_a_path_is_seen_in_a_volume_alone():
    assert read().unseen("/runs/a") == "" == read("volumes=('a=/data/x/',)").unseen("/data/x")
    assert "volumes = ('runs=/runs',)" in read().unseen("/runs2")
    # No claim hides the image's own files.
    reason = read().unseen("/tmp/q")
    assert "give a path below /runs, or mount the claim" in reason and "CLAIM=/NAME" in reason
    assert "below" not in read("volumes=()").unseen("/data/q")
    # The remedy keeps the other volumes, and holds.
    remedy = re.search(r'--config.(volumes=.*)"', read().unseen("/data/tokenizer"))[1]
    mended = read(remedy.replace('"', "").replace("CLAIM", "data"))
    assert mended.unseen("/data/tokenizer") == mended.unseen("/runs/a") == ""


KUBECTL = """#!/bin/bash
echo "$@" >>"$CALLS"
case "$*" in
*create*) cat >"$CALLS.yaml"; cp "$ANSWERS/created.json" "$ANSWERS/jobset.json";;
*delete*) rm "$ANSWERS/jobset.json";;
*"get pods"*) cat "$ANSWERS/pods.json";;
*get*) if [ -e "$ANSWERS/jobset.json" ]; then cat "$ANSWERS/jobset.json"; else echo 'Error (NotFound): no' >&2; exit 1; fi;;
esac
"""


def test_states_and_kubernetes_own_words(tmp_path, monkeypatch):
    program = tmp_path / "kubectl"
    program.write_text(KUBECTL)
    program.chmod(0o755)
    for name, value in {"CALLS": tmp_path / "calls", "ANSWERS": tmp_path}.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    settings = read()
    queue = settings.submitter()
    handle = queue.submit(JOB)
    answers, pods = tmp_path / "jobset.json", tmp_path / "pods.json"
    pods.write_text('{"items": []}')
    created = {"metadata": rendered()["metadata"]}
    (tmp_path / "created.json").write_text(json.dumps(created))
    states = [queue.statuses([handle])[handle]]
    for status in (
        {"replicatedJobsStatus": [{"ready": 1}]},
        {"conditions": [{"type": "Completed", "status": "True"}]},
        {"conditions": [{"type": "Failed", "status": "True"}]},
    ):
        answers.write_text(json.dumps({**created, "status": status}))
        states.append(queue.statuses([handle])[handle])
    assert [(s.state, s.exit_status) for s in states] == [
        (State.WAITING, None),
        (State.RUNNING, None),
        (State.ENDED, 0),
        (State.ENDED, 1),
    ]
    assert (tmp_path / "calls").read_text().count("create --filename=-") == 1
    assert yaml.safe_load((tmp_path / "calls.yaml").read_text()) == rendered()
    # The same command again, after its end, starts anew; while it runs, it is taken over.
    again = settings.submitter()
    again.submit(JOB)
    assert again.statuses([handle])[handle].state is State.WAITING
    again = settings.submitter()
    again.submit(JOB)
    again.statuses([handle])
    calls = (tmp_path / "calls").read_text()
    assert (calls.count("create"), calls.count("delete")) == (2, 1)
    # An earlier version kept no settings in the JobSet.
    annotations = created["metadata"].pop("annotations")
    answers.write_text(json.dumps(created))
    again = settings.submitter()
    again.submit(JOB)
    assert again.statuses([handle])[handle].state is State.WAITING
    assert (tmp_path / "calls").read_text().count("create") == 2
    created["metadata"]["annotations"] = annotations
    answers.write_text(json.dumps(created))
    waiting = {"waiting": {"reason": "ErrImagePull", "message": "no such image"}}
    pods.write_text(
        json.dumps({"items": [{"status": {"containerStatuses": [{"state": waiting}]}}]})
    )
    with pytest.raises(SubmitError, match="cannot start .*: ErrImagePull: no such image"):
        settings.submitter().statuses([handle])
    # The image is mended: the old one's pods say nothing before the creation, nor after the cancelling.
    mended = read("image=MENDED", "restarts=5").submitter()
    mended.submit(JOB)
    with pytest.raises(
        SubmitError, match=f"^{handle} has not ended.* another image, restarts: cancel"
    ):
        mended.statuses([handle])
    created["metadata"]["deletionTimestamp"] = "2026-12-01T00:00:00Z"
    answers.write_text(json.dumps(created))
    assert queue.statuses([handle])[handle].state is State.WAITING
    mended.submit(JOB)
    pods.write_text('{"items": []}')
    assert mended.statuses([handle])[handle].state is State.WAITING
    calls = (tmp_path / "calls").read_text()
    assert (calls.count("create"), calls.count("delete")) == (3, 2)
    queue.cancel(handle)
    assert queue.statuses([handle])[handle].state is State.DROPPED
    assert f"delete jobset/{handle} --wait=false" in (tmp_path / "calls").read_text()
    program.write_text("#!/bin/bash\necho 'error: no cluster' >&2; exit 1\n")
    with pytest.raises(SubmitError, match="Kubernetes refused .*: error: no cluster"):
        queue.statuses([handle])
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(SubmitError, match="no kubectl here: .* --dry_run"):
        queue.statuses([handle])
