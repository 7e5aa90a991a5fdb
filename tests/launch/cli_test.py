"""Entry points: flags, environment, errors, and that --help loads nothing heavy."""

import fnmatch
import importlib
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
from gin import utils as gin_utils

from espalier.launch import cli, environment, input_errors
from espalier.launch.submit import slurm
from tests import transcripts
from tests.processes import free_port

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
DOC = """Does a thing.

Example:
  python -m toy_run --gin_file=run.gin
"""


@pytest.fixture(autouse=True)
def own_environment(monkeypatch):
    """What entry points set must not reach other tests."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def start(argv, entry="toy_run:train", **kwargs):
    return cli.main(DOC, entry, argv=argv, **kwargs)


def command(toy_modules, *arguments, **variables):
    """Environment and command of a process that finds the project and the toy modules."""
    env = {k: v for k, v in os.environ.items() if k not in ("GLIBC_TUNABLES", "XLA_FLAGS")}
    env.update(PYTHONPATH=f"{ROOT}{os.pathsep}{toy_modules}", JAX_PLATFORMS="cpu", **variables)
    return {"args": [sys.executable, *arguments], "env": env, "text": True}


def run(toy_modules, *arguments, **variables):
    done = subprocess.run(
        **command(toy_modules, *arguments, **variables), capture_output=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_calls_the_entry_by_its_module_name(gin_file, toy_gin):
    import toy_run

    toy_run.CALLS.clear()
    assert start([f"--gin_file={gin_file(toy_gin)}", "--gin.MODEL_DIR=/x"]) == 0
    assert toy_run.CALLS[0]["model_dir"] == "/x"


def test_run_as_a_script_is_not_main(toy_modules, gin_file, toy_gin):
    # Were the entry taken from __main__, gin would configure another function of the same name.
    path = gin_file(toy_gin)
    code = (
        "import runpy, sys; sys.argv = ['toy_run', sys.argv[1], '--gin.MODEL_DIR=/x']\n"
        "try: runpy.run_module('toy_run', run_name='__main__', alter_sys=True)\n"
        "except SystemExit as stop: assert stop.code == 0\n"
        "import toy_run; print(toy_run.CALLS[0]['model_dir'], toy_run.train.__module__)"
    )
    out = run(toy_modules, "-c", code, f"--gin_file={path}", ESPALIER_HUGE_PAGES="0")
    assert out.split() == ["/x", "toy_run"]


def test_config_errors_end_without_a_traceback(gin_file, toy_gin, capsys):
    status = start([f"--gin_file={gin_file(toy_gin)}", "--gin.TRAIN_STEP=3"])
    error = capsys.readouterr().err
    assert status == cli.USAGE_ERROR
    assert "2 problems" in error
    assert "Nearest: TRAIN_STEPS" in error
    assert "Traceback" not in error


def test_errors_of_the_project_are_printed_and_bugs_are_raised(
    gin_file, toy_gin, capsys, monkeypatch
):
    argv = [f"--gin_file={gin_file(toy_gin)}", "--gin.MODEL_DIR=/x", "--gin.TRAIN_STEPS=-1"]
    with pytest.raises(ValueError, match="negative"):
        start(argv)  # toy_run is not one of the project's packages.
    monkeypatch.setattr(input_errors, "PACKAGE", "toy_run")
    capsys.readouterr()
    assert start(argv) == cli.USAGE_ERROR
    assert capsys.readouterr().err == "\nerror: steps = -1 must not be negative.\n"


def test_a_long_message_keeps_its_beginning_and_its_remedy(capsys):
    input_errors.report(ValueError(f"x.json: {'y' * 900_000}: remove it."))
    printed = capsys.readouterr().err
    assert printed.startswith("\nerror: x.json: yyy") and printed.endswith("y: remove it.\n")
    assert len(printed) < 7000


def test_errors_about_memory_lead_to_the_page_of_what_saves_it(capsys):
    import jax.numpy as jnp
    import numpy as np

    for too_large, words in (
        (lambda: jnp.zeros(2**50).block_until_ready(), "a device is out of memory (Out of memory"),
        (lambda: np.zeros(2**50), "this host is out of memory (Unable to allocate 8.00 PiB"),
    ):
        with pytest.raises(Exception) as caught:  # noqa: PT011, B017
            too_large()
        assert input_errors.reason(caught.value) is caught.value
        input_errors.report(caught.value)
        printed = capsys.readouterr().err
        assert printed.startswith(f"\nerror: {words}")
        page = re.search(r"\. (docs/\S+\.md) has what saves memory, and how much\.\n$", printed)[1]
        assert pathlib.Path(ROOT, page).is_file()


def test_a_plain_value_error_raised_on_purpose_is_for_people_one_from_below_is_not():
    from espalier.model.config import TransformerConfig

    def caught(call):
        try:
            call()
        except ValueError as error:
            return error

    wrong_sizes = caught(
        lambda: TransformerConfig(vocab_size=8, num_layers=0, embed_dim=4, num_heads=1, mlp_dim=4)
    )
    assert input_errors.reason(wrong_sizes)
    assert input_errors.reason(caught(lambda: int("x"))) is None


def raising(error, cause=None):
    raise error from cause


def fill(path):
    with open(path, "wb", buffering=0) as file:
        file.write(b"x")


def undecodable(path):
    path.write_bytes(b"a\xffb")
    return path.read_text("utf-8")


@pytest.mark.parametrize(
    ("mistake", "parts"),
    [
        (lambda p: (p / "none").read_text(), ["none: No such file or directory", "Check this path"]),
        (lambda p: p.read_text(), [": Is a directory", "Check|folder"]),
        (lambda p: (p / ("a" * 300)).mkdir(), ["File name too long", "Give a shorter path"]),
        (lambda p: (p / "loop" / "x").mkdir(), ["loop/x: Too many levels of symbolic links"]),
        (lambda p: (p / "file" / "x").mkdir(), ["file/x: Not a directory", "A part of this path"]),
        (lambda p: (p / "file").mkdir(), ["file: File exists", "move it"]),
        (lambda p: (p / "file").rename(p / "no" / "x"), [r"file -> .*no/x: No such file"]),
        (lambda p: (p / "a\0b").mkdir(), ["a path holds the character NUL"]),
        (lambda p: raising(PermissionError(13, "Permission denied", "/x")), ["/x: .*permissions"]),
        (lambda p: raising(RuntimeError("outer"), OSError(30, "Read-only", "/x")), ["/x: Read-only"]),
        (lambda p: fill("/dev/full"), ["/dev/full: No space .*Free some space"]),
        (lambda p: undecodable(p / "text"), ["text is not UTF-8 text .byte 1"]),
    ],
)  # fmt: skip
@pytest.mark.parametrize("by_gin", [False, True])
def test_mistakes_with_paths_are_one_error_whoever_uses_them(
    mistake, parts, by_gin, tmp_path, capsys
):
    (tmp_path / "file").touch()
    (tmp_path / "loop").symlink_to("loop")

    def call():
        try:
            mistake(tmp_path)
        except Exception as error:
            if not by_gin:
                raise
            gin_utils.augment_exception_message_and_reraise(
                error, "\n  In call to configurable 'x'"
            )

    assert cli.status_of(call) == cli.USAGE_ERROR
    error = capsys.readouterr().err
    assert all(re.search(part, error) for part in parts), error
    assert error.count("\n") == 2
    assert "configurable" not in error


@pytest.mark.parametrize(
    "bug",
    [OSError("of no file"), BrokenPipeError(32, "Broken pipe"), KeyError("x"), ValueError("no path")],
)  # fmt: skip
def test_other_errors_are_bugs_also_after_a_mistake_with_a_path(bug):
    def call():
        try:
            os.stat("/none/at/all")
        except OSError:
            raise bug from None

    with pytest.raises(type(bug)):
        cli.status_of(call)


def test_several_files_and_search_paths(gin_file, toy_gin, tmp_path):
    import toy_run

    gin_file(toy_gin, "one.gin")
    gin_file("TRAIN_STEPS = 7\n", "two.gin")
    argv = ["--gin_file=one.gin", "--gin_file", "two.gin", f"--gin_search_paths=/no,{tmp_path}"]
    assert start([*argv, "--gin.MODEL_DIR=/x"]) == 0
    assert toy_run.CALLS[-1]["steps"] == 7


def test_own_flags_default_files_and_run(gin_file, toy_gin):
    path = gin_file(toy_gin)
    seen = {}

    def extra(parser):
        parser.add_argument("--checkpoint", required=True)

    def body(start):
        seen.update(start.config.arguments(), checkpoint=start.flags.checkpoint)
        seen["called"] = start(steps=99)["steps"]

    argv = ["--checkpoint=abc", "--gin.MODEL_DIR=/x"]
    assert start(argv, extra_flags=extra, run=body, default_files=lambda flags: [path]) == 0
    assert seen["checkpoint"] == "abc"
    assert seen["steps"] == 10
    assert seen["called"] == 99


def test_errors_raised_by_the_command_module_itself_are_messages(command, tmp_path, capsys):
    assert command("sweep", f"--out={tmp_path}") == cli.USAGE_ERROR
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "espalier sweep: starting",
        "",
        "error: give --sweep FILE.py, or --status.",
    ]


def test_a_sweep_in_an_object_store_is_refused(command, capsys):
    assert command("sweep", "--out=gs://bucket/x", "--status") == cli.USAGE_ERROR
    message = "argument --out: gs://bucket/x is an address; give a path of this machine"
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--gin.STEPS"], "needs a value: --gin.STEPS=VALUE"),
        (["--gin_fil=x"], "unrecognized arguments"),
        (["--gin_file="], "--gin_file: the path is empty"),
        (["--gin_file=gs://bucket/x.gin"], "--gin_file: gs://bucket/x.gin is an address"),
        (["--process_count=2"], "go together"),
        (["--coordinator_address=h:1", "--process_index=0"], "go together"),
        (["--coordinator_address=auto", "--process_index=0"], "go together"),
    ],
)
def test_wrong_flags(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        start(argv)
    assert stop.value.code == cli.USAGE_ERROR
    assert message in capsys.readouterr().err


def test_help_shows_the_example_and_imports_nothing_heavy(toy_modules):
    code = (
        "import runpy, sys; sys.argv = ['toy_run', '--help']\n"
        "try: runpy.run_module('toy_run', run_name='__main__', alter_sys=True)\n"
        "except SystemExit: pass\n"
        "print('heavy', {'jax', 'gin', 'flax', 'numpy', 'tensorflow'} & set(sys.modules))"
    )
    out = run(toy_modules, "-c", code)
    assert "Example: python -m toy_run --gin_file=run.gin" in out
    assert "--gin_search_paths" in out
    assert "heavy set()" in out


def test_environment_is_set_before_anything_is_imported(toy_modules, tmp_path):
    code = "import sys; sys.argv = ['x']; from espalier.launch import cli; cli.main('Doc.', 'toy_run:where')"
    variables = {"ESPALIER_CACHE": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": ""}
    env = {k: v for k, v in variables.items() if v}
    os.environ.pop("JAX_COMPILATION_CACHE_DIR", None)
    pages = "'glibc.malloc.hugetlb=1'" if _helps() else "None"
    out = run(toy_modules, "-c", code, **env)
    assert f"seen [{pages}, '{tmp_path}/xla'] []" in out
    out = run(toy_modules, "-c", code, ESPALIER_HUGE_PAGES="0", **env)
    assert f"seen [None, '{tmp_path}/xla'] []" in out
    other = "glibc.malloc.hugetlb=0"
    out = run(toy_modules, "-c", code, GLIBC_TUNABLES=other, JAX_COMPILATION_CACHE_DIR="/mine")
    assert f"seen ['{other}', '/mine'] []" in out


def test_a_home_in_the_cache_is_expanded_for_compiled_programs_too(monkeypatch):
    from espalier.data.cache import cache_dir

    monkeypatch.setenv("ESPALIER_CACHE", "~/zz")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    environment.prepare()
    assert os.environ["JAX_COMPILATION_CACHE_DIR"] == os.path.expanduser("~/zz/xla")
    assert environment.cache_dir() == str(cache_dir.cache_dir())


def _helps() -> bool:
    return environment._huge_pages_help()


def have_devices(monkeypatch, devices):
    monkeypatch.setattr(environment.glob, "glob", lambda pattern: fnmatch.filter(devices, pattern))


@pytest.mark.parametrize(
    ("variables", "devices", "expected"),
    [
        ({"JAX_PLATFORMS": "cpu"}, ["/dev/nvidiactl"], True),
        ({"JAX_PLATFORMS": "cuda"}, [], False),
        ({"JAX_PLATFORMS": ""}, ["/dev/accel2"], False),
        ({"JAX_PLATFORMS": ""}, ["/dev/vfio/3"], False),
        ({"JAX_PLATFORMS": ""}, ["/dev/vfio/vfio", "/dev/accel/accel0"], True),
        ({"JAX_PLATFORMS": ""}, [], True),
        ({"JAX_PLATFORMS": "cpu", "ESPALIER_HUGE_PAGES": "0"}, [], False),
    ],
)
def test_huge_pages_are_for_cpu_hosts(monkeypatch, variables, devices, expected):
    monkeypatch.delenv("ESPALIER_HUGE_PAGES", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    have_devices(monkeypatch, devices)
    monkeypatch.setattr(environment.platform, "libc_ver", lambda: ("glibc", "2.41"))
    monkeypatch.setattr(environment.sys, "platform", "linux")
    monkeypatch.setattr(environment, "_thp_available", lambda: True)
    assert environment._huge_pages_help() is expected


@pytest.mark.parametrize(
    ("before", "devices", "libtpu", "after"),
    [
        (None, [], True, "cpu"),
        (None, ["/dev/accel0"], True, None),
        (None, ["/dev/vfio/1"], True, None),
        (None, ["/dev/nvidiactl"], True, None),
        (None, [], False, None),
        ("proxy", [], True, "proxy"),
    ],
)
def test_libtpu_stays_unread_where_there_is_no_chip(monkeypatch, before, devices, libtpu, after):
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setattr(environment, "_before", {})
    if before:
        monkeypatch.setenv("JAX_PLATFORMS", before)
    have_devices(monkeypatch, devices)
    spec = importlib.util.spec_from_loader("libtpu", None) if libtpu else None
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: spec)
    environment.prepare()
    assert os.environ.get("JAX_PLATFORMS") == after
    # A job on another machine may have what this one lacks.
    assert environment.of_user().get("JAX_PLATFORMS") == before


def test_a_job_of_slurm_inherits_the_users_variables_alone(monkeypatch, tmp_path):
    (tmp_path / "squeue").write_text('#!/bin/sh\necho "${JAX_PLATFORMS-unset} $XLA_FLAGS"\n')
    (tmp_path / "squeue").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("JAX_PLATFORMS")
    monkeypatch.setenv("XLA_FLAGS", "--mine")
    monkeypatch.setattr(environment, "_before", {})
    have_devices(monkeypatch, [])
    monkeypatch.setattr(environment.importlib.util, "find_spec", lambda name: name)
    environment.prepare()
    assert os.environ["JAX_PLATFORMS"] == "cpu" and "optimization" in os.environ["XLA_FLAGS"]
    assert slurm._slurm("squeue") == "unset --mine\n"


@pytest.mark.parametrize(
    ("before", "platforms", "after"),
    [
        ("", "cpu", "--xla_backend_optimization_level=2"),
        ("--a=1", "cpu", "--a=1 --xla_backend_optimization_level=2"),
        ("--xla_backend_optimization_level=0", "cpu", "--xla_backend_optimization_level=0"),
        ("--a=1", "cuda", "--a=1"),
    ],
)
def test_programs_for_cpus_are_optimised_as_far_as_it_pays(monkeypatch, before, platforms, after):
    monkeypatch.setenv("XLA_FLAGS", before)
    monkeypatch.setenv("JAX_PLATFORMS", platforms)
    environment.prepare()
    assert os.environ["XLA_FLAGS"] == after


@pytest.mark.multiprocess
def test_two_processes_find_each_other(toy_modules):
    code = "from espalier.launch import cli; cli.main('Doc.', 'toy_run:processes')"
    flags = [f"--coordinator_address=localhost:{free_port()}", "--process_count=2"]
    started = [
        subprocess.Popen(
            **command(toy_modules, "-c", code, *flags, f"--process_index={i}"),
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for i in range(2)
    ]
    done = [process.communicate(timeout=120) for process in started]
    for i, (out, error) in enumerate(done):
        assert f"total {i} 2 3.0" in out, error


def test_console_lists_commands_and_names_the_nearest(capsys, monkeypatch):
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["espalier"])
    assert cli.console() == cli.USAGE_ERROR
    assert re.search(r"train +Trains ", capsys.readouterr().out)
    monkeypatch.setattr(sys, "argv", ["espalier", "trian"])
    assert cli.console() == cli.USAGE_ERROR
    assert "espalier: no command 'trian'; did you mean 'train'" in capsys.readouterr().err


def test_modules_of_a_user_may_have_the_names_of_folders_of_the_project(tmp_path):
    for name in ("data.py", "model.py"):
        (tmp_path / name).write_text("SIZE = 3\n")
    (tmp_path / "own.py").write_text(
        "import data, model\n\ndef size(*, of=model.SIZE): print('size', of, data.SIZE)\n"
    )
    code = "from espalier.launch import cli; from espalier.model import config; cli.main('Doc.', 'own:size')"
    done = subprocess.run(
        **command(ROOT, "-c", code), cwd=tmp_path, capture_output=True, timeout=60
    )
    assert "size 3 3" in done.stdout, done.stderr


def test_a_module_that_imports_by_a_former_name_gets_the_name_of_today(tmp_path):
    (tmp_path / "own.py").write_text("from trainers.optim import schedules\n")
    (tmp_path / "own.gin").write_text("from __gin__ import dynamic_registration\nimport own\n")
    (tmp_path / "installed").mkdir()
    (tmp_path / "installed" / "espalier").symlink_to(pathlib.Path(ROOT, "espalier"))
    for root in (ROOT, tmp_path / "installed"):  # there is a folder trainers/, or none
        started = command(ROOT, "-m", "espalier.launch.train", "--gin_file=own.gin")
        started["env"]["PYTHONPATH"] = str(root)
        done = subprocess.run(**started, cwd=tmp_path, capture_output=True, timeout=60)
        assert done.returncode == cli.USAGE_ERROR
        assert "mport espalier.trainers" in done.stderr, done.stderr


def test_the_console_finds_modules_of_the_working_directory_last(tmp_path):
    (tmp_path / "bin").mkdir()
    (tmp_path / "own").mkdir()
    for name in ("gzip", "my_tasks"):
        (tmp_path / "own" / f"{name}.py").write_text("")
    script = tmp_path / "bin" / "script.py"
    script.write_text(
        "from espalier.launch import cli\nimport importlib, sys\nsys.argv[1:] = ['--help']\ncli.console()\n"
        "for name in ('gzip', 'my_tasks'): print(importlib.import_module(name).__file__)\n"
    )
    for flags, found in (((), True), (("-P",), False)):
        started = command(ROOT, *flags, str(script))
        done = subprocess.run(**started, cwd=tmp_path / "own", capture_output=True, timeout=60)
        *_, gzip, tasks = done.stdout.splitlines() if found else [*done.stdout.split(), ""]
        assert str(tmp_path) not in gzip
        if found:
            assert tasks == f"{tmp_path}/own/my_tasks.py"
        else:
            assert "No module named 'my_tasks'" in done.stderr


def test_python_runs_the_package_as_the_console():
    assert re.search(r"train +Trains ", run(ROOT, "-m", "launch", "--help"))


COMMANDS = {
    *("train", "evaluate", "lm_eval", "score", "generate", "serve", "convert", "merge", "upcycle"),
    *("prepare", "influence", "precompile", "numerics", "submit", "sweep", "reproduce", "report"),
    "quickstart",
}
GROUPS = ("evaluate", "prepare", "influence")  # their first argument names a sub-command


def test_the_top_of_launch_holds_the_commands_and_what_they_share():
    launch = pathlib.Path(ROOT, "launch")
    files = {path.stem for path in launch.glob("*.py")}
    shared = {"cli", "environment", "in_process", "input_errors", "predictions"}
    folders = {path.parent.name for path in launch.glob("*/__main__.py")}
    assert files | folders == {*COMMANDS, *shared, "__init__", "__main__"}
    assert set(cli.command_names()) == COMMANDS


def test_commands_import_no_paper():
    launch = pathlib.Path(ROOT, "launch")
    folders = ("evaluate", "prepare", "inference")
    files = {*launch.glob("*.py")} - {launch / "reproduce.py"}
    files |= {path for folder in folders for path in (launch / folder).rglob("*.py")}
    imports = re.compile(
        r"^\s*(?:from|import) espalier\.launch\.papers\b(?!\.shared)|^\s*from espalier\.launch import .*papers",
        re.M,
    )
    assert [str(path) for path in files if imports.search(path.read_text(encoding="utf-8"))] == []


def test_every_command_of_the_project_has_a_summary_and_an_example():
    for name in COMMANDS:
        assert cli.summary(cli.module_of(name)).endswith("."), name
        head = pathlib.Path(ROOT, "launch", name, "__main__.py")
        with open(
            head if head.exists() else head.parent.with_suffix(".py"), encoding="utf-8"
        ) as file:
            assert f"espalier {name}" in file.read().split('"""')[1], name


def test_a_help_text_whose_reader_has_ended_is_no_error():
    """As in `espalier train --help | head`."""
    reader, writer = os.pipe()
    os.close(reader)
    for words in (["--help"], ["sweep", "--help"]):
        command = [sys.executable, "-m", "launch", *words]
        done = subprocess.run(
            command, cwd=ROOT, stdout=writer, stderr=subprocess.PIPE, text=True, timeout=120
        )
        assert (done.returncode, done.stderr) == (0, "")
    os.close(writer)


# Prints, as JSON, the help text of every command and sub-command, and the slow packages that were imported for them.
HELP = """
import contextlib, importlib, io, json, sys, warnings
from espalier.launch import cli
warnings.simplefilter("ignore")

def text(*words):
    sys.argv[:] = ["espalier", *words, "--help"]
    out, status = io.StringIO(), None
    with contextlib.redirect_stdout(out):
        try:
            status = cli.console()
        except SystemExit as end:
            status = end.code
    assert status == 0, (words, status)
    return out.getvalue()

pages = {}
for program in sys.argv[1].split():
    pages[program] = text(program)
    if program in ("evaluate", "precompile", "prepare", "upcycle"):
        for name in importlib.import_module(cli.module_of(program)).COMMANDS:
            pages[f"{program} {name}"] = text(program, name)
print(json.dumps([pages, sorted({"jax", "gin", "tensorflow", "seqio"} & set(sys.modules))]))
"""


@pytest.fixture(scope="module")
def help_texts():
    """The help text of each command and sub-command, and the slow packages that they import."""
    named = " ".join(sorted(COMMANDS - {"lm_eval"}))  # whose help text is the harness's
    return json.loads(run(ROOT, "-c", HELP, named))


def test_flags_of_commands_that_pages_show_exist(help_texts):
    texts, _ = help_texts
    shown = 0
    for page in transcripts.pages():
        text = re.sub(r"\\\n\s*", " ", (pathlib.Path(ROOT) / page).read_text("utf-8"))
        for line in re.findall(r"\bespalier (\w+ .*)", text):
            name, part, *_ = [*line.split(), ""]
            command = f"{name} {part}" if f"{name} {part}" in texts else name
            if name not in texts or name == "reproduce" or (command == name and part[:1].isalpha()):
                continue  # flags that depend on what comes before; influence: commands_test.py
            ours = re.split(r" -- | \| | > |`", line)[0]
            for flag in re.findall(r"(?<!\S)--([a-z]\w*)(?=[= ]|$)", ours):
                assert re.search(rf"--{flag}\b", texts[command]), f"{page}: {command} --{flag}"
                shown += 1
    assert shown > 300


def test_texts_name_commands_as_they_are_typed():
    """`espalier score`, and not the module of an earlier name of the command."""
    module = re.compile(rf"(?<![\w./])(?<!-m )launch\.({'|'.join(COMMANDS)})\b(?![.(:]\w|\")")
    for package in ("launch", "model", "trainers"):
        for path in pathlib.Path(ROOT, package).rglob("*.py"):
            lines = path.read_text("utf-8").split("\n")
            found = [x for x in lines if module.search(x) and not re.match(r"\s*(from|import) ", x)]
            assert not found, f"{path}: {found}"


def test_help_of_every_command_is_quick_and_says_how_the_command_is_called(help_texts):
    pages, slow = help_texts
    assert slow == []
    assert {"evaluate loss", "prepare cache", "upcycle extend"} < pages.keys()
    for command, page in pages.items():
        if command not in (*GROUPS, "reproduce"):
            assert page.startswith(f"usage: espalier {command} "), page[:200]
        assert f"espalier {command.split()[0]}" in page, command
        # Their judges and scorers may need no model.
        optional = command in ("evaluate win_rate", "evaluate safety", "prepare best_of_n")
        assert ("[--gin_file=FILE]" in page.partition("\n")[0]) == optional, command
    for group in GROUPS:
        names = [command.split()[1] for command in pages if command.startswith(f"{group} ")]
        for name in names:
            summary = cli.summary(importlib.import_module(cli.module_of(group)).COMMANDS[name])
            assert re.search(rf"^  {name} +{re.escape(summary)}$", pages[group], re.MULTILINE)
