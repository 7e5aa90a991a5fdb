"""XManager: experiments as files, and jobs that its local executor really runs (in .venv-xmanager, `make xmanager`)."""

import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time

import pytest

from espalier.launch.environment import ROOT
from espalier.launch.submit import launch_config
from espalier.launch.submit.base import Job, State, SubmitError

HOSTILE = (
    "a b",
    "$(touch PWNED)",
    "`touch PWNED`",
    "; touch PWNED",
    "'; touch PWNED; '",
    "line\ntouch PWNED",
    "ü",
    "--x=$HOME",
    "",
)
SHOW = "import json, os, sys; print('OUT', json.dumps([sys.argv[1:], [os.environ[f'V{i}'] for i in range(%d)]]))"
PYTHON = os.path.join(ROOT, ".venv-xmanager", "bin", "python")


def submitter(*overrides):
    return launch_config.read("launch/submit/configs/xmanager.py", overrides).submitter()


def shown(*overrides, command=("python", "-m", "espalier.launch.train")):
    queue = submitter(*overrides)
    queue.submit(Job(name="a b", command=command, log="/runs/a/log.txt"))
    note, text = queue.preview().split("\n", 1)
    assert note.endswith("launch/submit/xmanager_script.py --job=/runs/a/log.txt.xm.json")
    return json.loads(text)


@pytest.mark.parametrize("executor", ["vertex", "kubernetes"])
def test_containers_with_accelerators(executor):
    words = (f"executor={executor}", "image=IMAGE", "accelerator=a100", "accelerators=8")
    described = shown(*words)
    assert (described["image"], described["requirements"]) == ("IMAGE", {"a100": 8})
    assert described["arguments"][:3] == ["python", "-m", "espalier.launch.submit.group"]


def test_what_would_run_it_is_said(monkeypatch):
    def notes(*overrides):
        return launch_config.read("launch/submit/configs/xmanager.py", overrides).notes()

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    unknown, python = notes()
    assert unknown == "devices: all that the machines have; the mesh is checked there"
    assert python.startswith(f"xmanager_python: {sys.executable}, this one; give another")
    assert "it has no xmanager: make xmanager" in python
    assert notes("xmanager_python=/x")[-1] == "xmanager_python: /x"
    words = ("executor=vertex", "image=IMAGE", "accelerator=a100", "accelerators=8")
    assert notes(*words)[0] == "devices: 8 accelerators"


def test_a_container_sees_no_folder_of_this_machine():
    read = launch_config.read("launch/submit/configs/xmanager.py", ())
    assert not read.in_container and read.unseen("/data") == ""
    words = ("executor=vertex", "image=IMAGE")
    read = launch_config.read("launch/submit/configs/xmanager.py", words)
    assert read.in_container and "give an address" in read.unseen("/data")


# Builds what the script gives to XManager, as the script does, and prints it.
BUILD = """
import json, sys
from xmanager import xm, xm_local
sys.path.insert(0, "launch/submit")
import xmanager_script as script
job = json.load(sys.stdin)
executor = script.executor_of(job, xm, xm_local)
packageable = xm.Packageable(executable_spec=script.specification(job, xm), executor_spec=executor.Spec())
xm.Job(executable=packageable, executor=executor, args=job["arguments"], env_vars=job["environment"])
wanted = {str(getattr(kind, "name", kind)).lower(): n for kind, n in executor.requirements.task_requirements.items()}
print(json.dumps([type(executor).__name__, packageable.executable_spec.image_path, wanted]))
"""


@pytest.mark.parametrize("executor", ["Vertex", "Kubernetes"])
def test_xmanager_takes_executors_and_images(executor):
    if not os.path.exists(PYTHON):
        pytest.skip("no XManager in .venv-xmanager: make xmanager")
    words = (f"executor={executor.lower()}", "image=IMAGE", "accelerator=a100", "accelerators=8")
    described = json.dumps(shown(*words))
    built = subprocess.run(
        [PYTHON, "-c", BUILD], input=described, cwd=ROOT, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    assert json.loads(built.stdout.splitlines()[-1]) == [executor, "IMAGE", {"a100": 8}]


def test_names_in_arguments_stay_as_they_are():
    words = ("executor=kubernetes", "image=IMAGE")
    assert shown(*words, command=("python", "$(X)"))["arguments"][-1] == "$$(X)"
    with pytest.raises(SubmitError, match=r"Vertex AI replaces \$\(NAME\)"):
        shown("executor=vertex", "image=IMAGE", command=("python", "$(X)"))


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("executor=slurm",), "executor = 'slurm': choose from local, vertex, kubernetes"),
        (("executor=vertex",), "image: give one"),
        (("accelerators=8",), "both accelerator and accelerators"),
        (("executor=vertex", "image=x", "secrets=('A=/f',)"), "use a service account"),
    ],
)
def test_wrong_settings(words, message):
    with pytest.raises(SubmitError, match=message):
        submitter(*words)


def test_a_python_without_xmanager_is_one_error(tmp_path):
    queue = submitter(f"xmanager_python={sys.executable}")
    handle = queue.submit(Job(name="x", command=("true",), log=str(tmp_path / "log")))
    status = ended(queue, handle)
    assert status.exit_status == 2
    assert "error: xmanager cannot be imported here" in pathlib.Path(handle).read_text()
    with pytest.raises(SubmitError, match="'/no/python' cannot be run: No such file"):
        queue = submitter("xmanager_python=/no/python")
        queue.statuses([queue.submit(Job(name="x", command=("true",), log=str(tmp_path / "l")))])


def ended(queue, handle, seconds=200):
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        status = queue.statuses([handle])[handle]
        if status.state is State.ENDED:
            return status
        time.sleep(0.2)
    raise AssertionError(pathlib.Path(handle).read_text())


@pytest.fixture
def local(tmp_path, monkeypatch):
    """XManager's local executor with a database of its own."""
    if not os.path.exists(PYTHON):
        pytest.skip("no XManager in .venv-xmanager: make xmanager")
    monkeypatch.setenv("HOME", str(tmp_path))
    made = []

    def start(*overrides):
        made.append(submitter(f"xmanager_python={PYTHON}", f"folder={tmp_path}", *overrides))
        return made[-1]

    yield start
    for queue in made:
        queue.close()


def test_jobs_of_the_local_executor(local, tmp_path):
    """The words arrive as they were, status 75 starts again, other statuses come back, and a cancelled job saves."""
    env = tuple(f"V{i}={word}" for i, word in enumerate(HOSTILE))
    queue = local(f"env={env!r}", "restarts=1")
    saves = f"trap 'echo saved; exit 75' TERM; touch {tmp_path}/up; while :; do sleep 0.1; done"
    jobs = {
        "words": (sys.executable, "-c", SHOW % len(HOSTILE), *HOSTILE),
        "again": (
            "sh",
            "-c",
            f"echo start; [ -e {tmp_path}/x ] && exit 3; touch {tmp_path}/x; exit 75",
        ),
        "stopped": ("sh", "-c", saves),
    }
    handles = {
        name: queue.submit(Job(name=name, command=command, log=str(tmp_path / name / "log")))
        for name, command in jobs.items()
    }
    queue.statuses(list(handles.values()))
    until = time.monotonic() + 200
    while not (tmp_path / "up").exists():
        assert time.monotonic() < until, pathlib.Path(handles["stopped"]).read_text()
        time.sleep(0.2)
    queue.cancel(handles["stopped"])
    statuses = {name: ended(queue, handle).exit_status for name, handle in handles.items()}
    logs = {name: pathlib.Path(handle).read_text() for name, handle in handles.items()}
    assert statuses == {"words": 0, "again": 3, "stopped": 75}, logs
    (line,) = (x.partition("OUT ")[2] for x in logs["words"].splitlines() if "OUT " in x)
    assert json.loads(line) == [list(HOSTILE), list(HOSTILE)]
    assert logs["again"].count("start\n") == 2 and "saved" in logs["stopped"]
    assert not list(tmp_path.rglob("PWNED"))
