"""`submit`: launch configurations, checks before anything is sent, and a run on this machine."""

import os
import pathlib
import re
import signal
import subprocess
import sys
import time

import pytest

from espalier.launch.environment import ROOT
from espalier.launch.submit import __main__ as submit
from espalier.launch.submit import group, launch_config
from espalier.launch.submit.base import SubmitError
from tests.processes import with_devices

TINY = (
    "--gin_file=t5x_configs/models/tiny.gin",
    "--gin_file=t5x_configs/data/bytes.gin",
    "--gin_file=t5x_configs/runs/pretrain.gin",
    "--gin.MODEL_DIR=/tmp/espalier_tiny",
    "--gin.MIXTURE_OR_TASK_NAME=python",
    "--gin.TRAIN_STEPS=50",
)
JOBSET, TPU_VM = (f"launch/submit/configs/{name}.py" for name in ("jobset", "tpu_vm"))
CONFIGS = sorted(
    str(path.relative_to(ROOT))
    for path in pathlib.Path(ROOT, "launch/submit/configs").glob("[a-z]*.py")
    if path.stem not in ("dataflow", "flink")  # which do not train
)


# What has no default, and a MODEL_DIR that the pods of JOBSET see.
GIVEN = {
    JOBSET: ("--config.image=IMAGE", "--gin.MODEL_DIR=/runs/tiny"),
    TPU_VM: ("--config.project=mine", "--config.repository=https://host/fork.git"),
}


@pytest.mark.parametrize("config", CONFIGS)
def test_every_configuration_shows_what_it_would_send(config, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")  # nothing can be sent
    given = GIVEN.get(config, ())
    assert submit.main([f"--config={config}", "--dry_run", *TINY, *given]) == 0
    out, err = capsys.readouterr()
    assert err.count("devices: ") == 1
    for placeholder in ("OWNER", "PROJECT", "REGION"):
        assert placeholder not in out
    assert "espalier.launch.train" in out and "--gin.TRAIN_STEPS=50" in out
    if config.endswith(("slurm.py", "jobset.py", "tpu_vm.py")):
        assert "--coordinator_address=auto" in out


def test_a_dry_run_here_shows_variables_and_folder_and_creates_nothing(capsys, tmp_path):
    (tmp_path / "there").mkdir()
    words = ["--config=launch/submit/configs/local.py", f"--config.folder={tmp_path}/there"]
    words += ["--config.env=('GREETING=a b',)", "--dry_run", *TINY, "--gin.MODEL_DIR=runs/tiny"]
    assert submit.main(words) == 0
    out = capsys.readouterr().out
    assert out.startswith("GREETING='a b' ")
    assert f"--folder={tmp_path}/there " in out
    assert f"--log={tmp_path}/there/runs/tiny/logs/log.txt" in out
    assert [path.name for path in tmp_path.rglob("*")] == ["there"]
    assert submit.main([*words, f"--config.folder={tmp_path}/no"]) == 2
    assert f"folder = '{tmp_path}/no': there is no such folder" in capsys.readouterr().err


def test_processes_of_a_group_work_in_its_folder(tmp_path):
    assert group.main([f"--folder={tmp_path}", "--", "sh", "-c", "pwd >here"]) == 0
    assert (tmp_path / "here").read_text() == f"{tmp_path}\n"


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--config=no.py",), "no.py: there is no such Python file: copy one of"),
        (("--config=launch/environment.py",), "environment.py: get_config.. could not be called"),
        (("--config.node=2",), "node: no such setting; did you mean 'nodes'"),
        (("--config.nodes=many",), "nodes=many: invalid literal"),
        (("--config.env=('A',)",), "env: 'A' is not NAME=VALUE"),
        (("--config.time_limit=a day",), "time_limit = 'a day': give a text like 24:00:00"),
        (("--gin.MESH={'data': 3}",), "has 16 devices: MESH = .* does not cover the 16"),
        (("--gin.BATCH_SIZE=15",), "has 16 devices: Mesh .*\n.*BATCH_SIZE .* = 15 is not a"),
        (("--gin.TRAIN_STEP=3",), "TRAIN_STEP"),
        (("--coordinator_address=auto",), "the back end sets it"),
    ],
)
def test_what_is_wrong_is_one_error_before_anything_is_sent(words, message, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "/nowhere")
    given = any(word.startswith("--config=") for word in words)
    config = [] if given else ["--config=launch/submit/configs/slurm.py"]
    assert submit.main([*config, *TINY, *words]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error


def test_a_command_of_one_process_is_not_sent_to_several(tmp_path, capsys):
    config = ["--config=launch/submit/configs/slurm.py", f"--config.logs={tmp_path}", "--dry_run"]
    assert submit.main([*config, "--", "evaluate", "language", "--inputs=/tmp/a.jsonl"]) == 2
    assert "evaluate language runs in one process, and the launch" in capsys.readouterr().err
    assert submit.main([*config, "--", "score", "--checkpoint=/runs/a", "--inputs=/tmp/a"]) == 0


# A model of 8 key/value heads on 16 chips: its data, tokenizer and parent are on the cluster alone.
AYA = (
    "--gin_file=t5x_configs/experiments/aya23/full/8b.gin",
    "--gin.MODEL_DIR=/runs/aya",
    "--gin.TOKENIZER=/data/tokenizer",
    "--gin.INITIAL_CHECKPOINT_PATH=/data/parent",
    "--gin.INSTRUCTIONS_DIR=/data/instructions",
)


def test_a_mesh_is_proposed_and_accepted_only_if_the_run_accepts_it(capsys):
    words = [f"--config={JOBSET}", "--config.image=IMAGE", "--dry_run", *AYA]
    assert submit.main(words) == 2  # the file's own mesh is for 32 chips and more
    proposed = re.search('--gin.MESH="(.*)"', capsys.readouterr().err)[1]
    assert proposed == "{'fsdp': 16}"
    assert submit.main([*words, f"--gin.MESH={proposed}"]) == 0
    assert "devices: 1 slice x 16 chips = 16 chips" in capsys.readouterr().err
    assert submit.main([*words, "--gin.MESH={'tensor': -1}"]) == 2
    assert "num_kv_heads = 8 is not a multiple of the 16 shards" in capsys.readouterr().err


def test_a_tensor_axis_over_several_nodes_is_a_warning(capsys):
    words = [
        "--config=launch/submit/configs/slurm.py",
        "--config.nodes=2",
        "--config.gpus_per_node=4",
        "--config.tasks_per_node=1",
        "--dry_run",
        *AYA,
    ]
    assert submit.main([*words, "--gin.MESH={'tensor': -1}"]) == 0
    assert "'tensor' = 8 does not divide the 4 GPUs of one of the nodes" in capsys.readouterr().err
    assert submit.main([*words, "--gin.MESH={'fsdp': 2, 'tensor': 4}"]) == 0
    assert "'tensor'" not in capsys.readouterr().err


def test_paths_that_the_machines_do_not_see_are_named(capsys):
    mesh = "--gin.MESH={'fsdp': 16}"
    words = [f"--config={JOBSET}", "--config.image=IMAGE", "--dry_run", *AYA, mesh]
    assert submit.main(words) == 0
    (warning,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("warning"))
    for macro, place in (("TOKENIZER", "tokenizer"), ("INITIAL_CHECKPOINT_PATH", "parent")):
        assert f"{macro} = '/data/{place}'" in warning
    assert "INSTRUCTIONS_DIR" in warning and "MODEL_DIR" not in warning
    assert """--config.volumes="('runs=/runs', 'CLAIM=/data')\"""" in warning
    mounted = "--config.volumes=('runs=/runs','data=/data')"
    assert submit.main([*words, mounted]) == 0
    assert "warning" not in capsys.readouterr().err
    assert submit.main([*words, "--gin.MODEL_DIR=/tmp/aya"]) == 2  # lost with the pod
    assert "error: MODEL_DIR = '/tmp/aya': pods do not see it" in capsys.readouterr().err
    there = [f"--config={TPU_VM}", *GIVEN[TPU_VM], "--dry_run", *AYA, mesh]
    assert submit.main(there) == 0
    assert "warning: MODEL_DIR = '/runs/aya', " in capsys.readouterr().err
    away = [f"--gin.{name}=gs://bucket/{name}" for name in ("MODEL_DIR", "INITIAL_CHECKPOINT_PATH")]
    assert submit.main([*there, *away]) == 0
    assert "MODEL_DIR" not in capsys.readouterr().err.replace("warning: INSTR", "")


def test_relative_files_are_seen_if_the_project_has_them(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.gin").write_text("VALIDATION_FILES = 'held/*.jsonl'\n")
    words = [f"--config={JOBSET}", *GIVEN[JOBSET], "--dry_run"]
    files = [
        f"--gin_file=t5x_configs/{n}.gin" for n in ("models/tiny", "data/files", "runs/pretrain")
    ]
    words += [
        *files,
        "--gin_file=own.gin",
        "--gin.FILES='t5x_configs/*/*.gin'",
        "--gin.TRAIN_STEPS=5",
        "--gin.MIXTURE_OR_TASK_NAME=files",
        "--gin.VOCABULARY=@vocabularies.byte()",
        "--gin.VOCAB_SIZE=264",
    ]
    assert submit.main(words) == 0
    (warning,) = (x for x in capsys.readouterr().err.splitlines() if x.startswith("warning"))
    assert (
        "VALIDATION_FILES = 'held/*.jsonl', --gin_file = 'own.gin': the image's project has no"
        in warning
    )


def test_another_command_needs_a_place_for_its_log(capsys, tmp_path):
    words = [
        "--config=launch/submit/configs/slurm.py",
        "--config.nodes=1",
        "--config.tasks_per_node=1",
    ]
    command = ["--", "evaluate", "loss", "--checkpoint=/runs/a b"]
    assert submit.main([*words, "--dry_run", *command]) == 2
    assert "needs --config.logs=DIR" in capsys.readouterr().err
    assert submit.main([*words, "--dry_run", f"--config.logs={tmp_path}", *command]) == 0
    out = capsys.readouterr().out
    assert (
        "-m espalier.launch.evaluate loss '--checkpoint=/runs/a b')" in out
        and f"log={tmp_path}/log.txt" in out
    )
    assert submit.main([*words, "--dry_run", f"--config.logs={tmp_path}", "--", "evalute"]) == 2
    assert "did you mean 'evaluate'" in capsys.readouterr().err


def test_flags_of_train_may_stand_after_the_dashes(capsys):
    words = ["--config=launch/submit/configs/local.py", "--dry_run", "--"]
    assert submit.main([*words, *TINY]) == 0
    assert "espalier.launch.train" in capsys.readouterr().out


def test_a_local_job_needs_no_status(capsys):
    assert submit.main(["--config=launch/submit/configs/local.py", "--status", *TINY]) == 2
    assert "Ctrl-C there saves its work" in capsys.readouterr().err


def test_settings_come_back_from_their_configuration(tmp_path):
    file = tmp_path / "mine.py"
    file.write_text(
        "from espalier.launch.submit.group import Settings\n"
        "from espalier.launch.submit.launch_config import as_config\n"
        "def get_config(number='2'):\n"
        "    return as_config(Settings(processes_here=int(number), env=('A=b c',)))\n"
    )
    settings = launch_config.read(f"{file}:3", ["restarts=7"])
    assert settings == group.Settings(processes_here=3, restarts=7, env=("A=b c",))
    with pytest.raises(SubmitError, match="invalid literal for int"):
        launch_config.read(f"{file}:x")


def test_a_group_starts_again_after_75_and_not_after_an_error(tmp_path, capfd):
    count = f"echo x >>{tmp_path}/starts; n=$(wc -l <{tmp_path}/starts); "
    assert group.run(["sh", "-c", f"{count} [ $n -gt 2 ] || exit 75"], restarts=5) == 0
    assert (tmp_path / "starts").read_text() == "x\n" * 3
    assert group.run(["sh", "-c", "exit 75"], restarts=1) == 75
    assert "status 75 after 1 restarts, the limit" in capfd.readouterr().err
    # The second process fails; `sh` ignores the flags with which processes join.
    log = tmp_path / "log"
    script = 'echo "$@"; case "$@" in *--process_index=1) exit 2;; esac; exit 75'
    assert group.run(["sh", "-c", script, "sh"], processes=2, restarts=3, log=str(log)) == 2
    output = (tmp_path / "log.task1").read_text()
    assert output.count("--process_count=2 --process_index=1\n") == 1


@pytest.mark.parametrize("signal_name", ["KILL", "STOP"])
def test_a_group_starts_again_after_a_process_is_lost(signal_name, tmp_path, monkeypatch):
    """Without memory, or hanging: the other process ends with 75."""
    monkeypatch.setattr(group, "_PEER_SECONDS", 0.3)
    script = f'case "$@" in *=1) echo x >>{tmp_path}/starts; kill -{signal_name} $$;; esac; exit 75'
    assert group.run(["sh", "-c", script, "sh"], processes=2, restarts=2) == 75
    assert (tmp_path / "starts").read_text() == "x\n" * 3


def test_a_group_kills_what_outlives_a_lost_process(tmp_path, monkeypatch):
    monkeypatch.setattr(group, "_PEER_SECONDS", 0.3)
    script = f'case "$@" in *=1) echo x >>{tmp_path}/starts; kill -KILL $$;; esac; sleep 60'
    assert group.run(["sh", "-c", script, "sh"], processes=2, restarts=1) == 75
    assert (tmp_path / "starts").read_text() == "x\n" * 2


def test_a_secret_comes_from_a_file_and_is_shown_nowhere(tmp_path, capfd):
    secret = tmp_path / "secret"
    secret.write_text("s3cr3t\n")
    main = [
        f"--secret=WANDB_API_KEY={secret}",
        "--",
        "sh",
        "-c",
        f"printf %s $WANDB_API_KEY >{tmp_path}/seen",
    ]
    assert group.main(main) == 0
    assert (tmp_path / "seen").read_text() == "s3cr3t"
    assert group.main(["--secret=WANDB_API_KEY=/no/such", "--", "true"]) == 2
    output = capfd.readouterr()
    assert "'/no/such' of WANDB_API_KEY cannot be read" in output.err
    assert "s3cr3t" not in output.out + output.err


def test_a_signal_reaches_every_process_once_and_nothing_starts_again(tmp_path):
    script = f"trap 'echo stop >>{tmp_path}/stops; exit 75' TERM; echo up >>{tmp_path}/ups; while :; do sleep 0.1; done"
    words = ("--processes=2", "--restarts=3", f"--log={tmp_path}/log", "--", "sh", "-c", script)
    process = subprocess.Popen(
        [sys.executable, "-m", "espalier.launch.submit.group", *words],
        cwd=ROOT,
        start_new_session=True,
    )
    until = time.monotonic() + 60
    while not (tmp_path / "ups").exists() or (tmp_path / "ups").read_text() != "up\nup\n":
        assert time.monotonic() < until
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGTERM)  # as a terminal or a local submitter does
    assert process.wait(timeout=60) == 75
    assert (tmp_path / "stops").read_text() == "stop\nstop\n"
    assert (tmp_path / "ups").read_text() == "up\nup\n"


def test_xla_accepts_the_flags_for_gpus():
    """XLA ends a process at a flag that it does not know, also on CPU."""
    settings = launch_config.read("launch/submit/configs/gpu_node.py:8")
    assert settings.devices == 8 and launch_config.read(CONFIGS[0] + ":1").devices == 1
    # Hosts of a cluster have the same flags, unless one wants none.
    assert launch_config.read("launch/submit/configs/slurm.py", ["env=()"]).variables == {}
    assert launch_config.read("launch/submit/configs/slurm.py").variables == settings.variables
    code = "import jax; print(jax.devices())"
    environment = {**os.environ, **settings.variables, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.multiprocess
def test_two_processes_of_this_machine_train(train, tmp_path, capfdbinary, monkeypatch):
    """The words reach `train`; the log comes to the terminal, and each process has one."""
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    folder = tmp_path / "a 'b' $(touch PWNED)"
    bindings = (
        f"MODEL_DIR={str(folder)!r}",
        f"DIRECTORY={train.cache + '/text'!r}",
        "TRAIN_STEPS=3",
        "LENGTH=32",
        "recipe.Recipe.mesh={'fsdp': 2}",
    )
    words = [
        "--config=launch/submit/configs/local.py",
        "--config.processes_here=2",
        "--config.devices_here=2",
        f"--config.env=('XLA_FLAGS={with_devices(1)['XLA_FLAGS']}',)",
        f"--gin_file={train.programs}/small_text.gin",
        *(f"--gin.{binding}" for binding in bindings),
    ]
    assert submit.main(words) == 0, capfdbinary.readouterr()
    out = capfdbinary.readouterr().out.decode()
    assert "(2 x cpu)" in out and "done at step 3" in out
    assert "done at step 3" in (folder / "logs/log.txt").read_text()
    assert (folder / "logs/log.txt.task1").exists() and not (folder / ".hosts").exists()
    # A shell would run in the working directory of the job, which is that of the tests.
    assert not pathlib.Path("PWNED").exists() and not list(tmp_path.rglob("PWNED"))
