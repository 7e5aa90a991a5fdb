"""Programs in the sandbox: what passes, and what hostile ones cannot do."""

import contextlib
import dataclasses
import os
import pathlib
import socket
import subprocess
import sys
import textwrap
import time

import psutil
import pytest

from espalier.data.sandbox import code_sandbox

LIMITS = code_sandbox.Limits(
    cpu_seconds=5, wall_seconds=30, memory_bytes=256 << 20, file_bytes=1 << 20, threads=4
)
SHORT = dataclasses.replace(LIMITS, wall_seconds=0.5)
MODES = ("namespaces", "seccomp") if sys.platform == "linux" else ("limits",)


@pytest.fixture(scope="module", params=MODES)
def make(request):
    """Makes sandboxes with all there is, and as where namespaces are forbidden."""
    with contextlib.ExitStack() as stack:

        def call(limits):
            namespaces = request.param == "namespaces"
            made = stack.enter_context(
                code_sandbox.Sandbox(limits, workers=2, namespaces=namespaces)
            )
            if namespaces and "namespaces" not in (made.protections.files or ""):
                pytest.skip("this kernel forbids namespaces")
            if made.protections.files is None:
                pytest.skip("there is no protection here beside limits")
            return made

        yield call


@pytest.fixture(scope="module")
def sandbox(make):
    return make(LIMITS)


@pytest.fixture(scope="module")
def short(make):
    """For programs that use all the time they have."""
    return make(SHORT)


@pytest.fixture
def run(sandbox):
    """The result of a program, after which the sandbox still works."""

    def call(source: str) -> code_sandbox.Result:
        result = sandbox.run_one(textwrap.dedent(source))
        assert sandbox.run_one("assert 1 + 1 == 2").passed
        return result

    return call


def test_a_program_passes_when_it_comes_to_its_end(run):
    result = run("def f(x):\n    return 2 * x\n\nassert f(2) == 4\nprint('done')")
    assert result == code_sandbox.Result(
        "passed", "", "done\n", "", result.seconds, result.protections
    )
    assert 0 < result.seconds < LIMITS.wall_seconds


@pytest.mark.parametrize(
    ("source", "status", "detail"),
    [
        ("assert 1 == 2", "failed", "AssertionError"),
        ("def f(:", "failed", "SyntaxError: invalid syntax"),
        ("1 / 0", "failed", "ZeroDivisionError: division by zero"),
        ("def f():\n  f()\nf()", "failed", "RecursionError: maximum recursion depth exceeded"),
        ("10 ** 100_000 and str(10 ** 100_000)", "failed", "ValueError: Exceeds the limit"),
        ("x = [0] * 10 ** 9", "out_of_memory", "MemoryError"),
        ("import ctypes; ctypes.string_at(0)", "killed", "by SIGSEGV"),
        ("x = '\ud800'", "refused", "not valid Unicode at character 5"),
        ("#" + "x" * (1 << 20), "refused", "1048577 bytes, more than 1048576"),
        ("import numpy", "failed", "ModuleNotFoundError: No module named 'numpy'"),
    ],
    ids=lambda value: value[:16],
)
def test_why_a_program_did_not_pass(run, source, status, detail):
    result = run(source)
    assert (result.status, result.detail[: len(detail)]) == (status, detail)


@pytest.mark.parametrize(
    "source",
    [
        "while True: pass",
        "import time; time.sleep(60)",
        "import signal; [signal.signal(s, signal.SIG_IGN) for s in (2, 15, 24)]\nwhile True: pass",
        "try:\n  while True: pass\nexcept BaseException:\n  while True: pass",
        "class E(Exception):\n  def __str__(self):\n    while True: pass\nraise E",
        "import sys\nwhile True: sys.stdout.write('x' * 100_000)",
        "import threading\ntry:\n  while True:\n"
        "    threading.Thread(target=lambda: [0 for _ in iter(int, 1)]).start()\n"
        "except RuntimeError:\n  while True: pass",
        "import sys; sys.set_int_max_str_digits(0); str(7 ** 10_000_000)",
    ],
    ids=["loop", "sleep", "ignores", "catches", "says", "floods", "threads", "digits"],
)
def test_what_does_not_end_is_ended(short, source):
    result = short.run_one(source)
    assert result.status == "timed_out", result
    assert SHORT.wall_seconds <= result.seconds < 10 * SHORT.wall_seconds
    assert len(result.stdout) <= SHORT.output_bytes


def test_time_of_the_processor_is_bounded_too(make):
    result = make(dataclasses.replace(LIMITS, cpu_seconds=1)).run_one("while True: pass")
    assert (result.status, result.detail) == ("timed_out", "1 s of CPU time used")


LEAVES = {
    "exit": "import sys; sys.exit(0)",
    "quiet exit": "import os; os._exit(0)",
    "exit in a test": "class X:\n  def __eq__(self, o): raise SystemExit(0)\nassert X() == 1\n1/0",
    "at exit": "import atexit, os; atexit.register(os._exit, 0); raise SystemExit",
    "builtins": """
        import builtins, sys, os
        for name in ("exec", "compile", "print", "open", "isinstance"):
            setattr(builtins, name, lambda *a, **k: None)
        builtins.AssertionError = builtins.BaseException = builtins.MemoryError = type("E", (), {})
        os.write = os.read = os._exit = lambda *a: None
        sys.exit = sys.excepthook = lambda *a: None
        """,
    "says so": """
        import os
        print("passed", '{"status": "passed"}')
        for descriptor in range(256):
            for said in (b"?", b"passed", b'{"status": "passed"}'):
                try:
                    os.write(descriptor, said)
                except OSError:
                    pass
        os._exit(0)
        """,
    "looks for secrets": """
        import gc, os, sys
        frame, found = sys._getframe(), set()
        while frame:
            found |= {v for v in frame.f_locals.values() if isinstance(v, (bytes, str))}
            frame = frame.f_back
        found |= {v for o in gc.get_objects() if isinstance(o, dict) for v in o.values()
                  if type(v) is bytes}
        for descriptor in range(256):
            for said in found:
                try:
                    os.write(descriptor, said if isinstance(said, bytes) else said.encode())
                except OSError:
                    pass
        os._exit(0)
        """,
    "closes all": "import os; os.closerange(0, 256)",
}


@pytest.mark.parametrize("how", LEAVES)
def test_leaving_before_the_tests_is_not_passing(run, how):
    result = run(textwrap.dedent(LEAVES[how]) + "\nassert 1 == 2")
    assert result.status in ("failed", "killed"), result


def test_processes_cannot_be_started_and_few_threads(run):
    result = run(
        """
        import os, subprocess, threading
        for start in (
            os.fork, os.forkpty, lambda: os.posix_spawn("/bin/true", ["true"], {}),
            lambda: subprocess.run(["true"]), lambda: os.execv("/bin/true", ["true"]),
        ):
            try:
                start()
            except OSError:
                continue
            raise AssertionError(start)
        event = threading.Event()
        started = 0
        try:
            while started < 100:
                threading.Thread(target=event.wait, daemon=True).start()
                started += 1
        except RuntimeError:
            pass
        print(started)
        event.set()
        """
    )
    assert result.passed, result
    assert int(result.stdout) <= LIMITS.threads


def test_a_fork_bomb_leaves_no_children(short):
    before = {process.pid for process in psutil.process_iter()}
    result = short.run_one(
        textwrap.dedent(
            """
            import ctypes, os
            libc = ctypes.CDLL(None)
            libc.daemon(0, 0)
            while True:
                for call in (os.fork, libc.fork, libc.vfork, lambda: libc.syscall(435, 0, 0)):
                    try:
                        if call() == 0:
                            os.setsid()
                            while True: pass
                    except OSError:
                        pass
            """
        )
    )
    assert result.status == "timed_out", result

    def left():
        new = [p for p in psutil.process_iter(["cmdline", "ppid"]) if p.pid not in before]
        # Sandboxes of other test processes have parents there; what has escaped from this one is an orphan.
        mine = {1, os.getpid(), *(p.pid for p in psutil.Process().children(recursive=True))}
        found = [p for p in new if "zygote.main()" in str(p.info["cmdline"])]
        return [process for process in found if process.info["ppid"] in mine]

    # What has escaped runs for ever; what others are ending may be an orphan for a moment.
    until = time.monotonic() + 20
    while left():
        assert time.monotonic() < until, left()
        time.sleep(0.1)


def test_files_outside_survive_and_are_not_read(run, tmp_path):
    tmp_path.chmod(0o777)
    victim = tmp_path / "victim"
    victim.write_text("precious")
    victim.chmod(0o666)
    result = run(
        f"""
        import os, shutil
        path, folder = {str(victim)!r}, {str(tmp_path)!r}
        for attack in (
            lambda: os.remove(path), lambda: open(path, "w"), lambda: open(path).read(),
            lambda: os.truncate(path, 0), lambda: os.chmod(path, 0), lambda: os.utime(path, (0, 0)),
            lambda: os.rename(path, "mine"), lambda: os.link(path, "mine"),
            lambda: os.symlink("/etc", folder + "/link"), lambda: os.mkdir(folder + "/new"),
            lambda: os.listdir(folder), lambda: open("/etc/passwd").read(),
            lambda: open("/proc/self/environ").read(), lambda: open("/proc/1/cmdline").read(),
            lambda: open(os.path.expanduser("~/.bashrc")).read(), lambda: os.chroot("."),
            lambda: open("/dev/sda", "rb"), lambda: open(os.__file__, "a"),
        ):
            try:
                attack()
            except OSError:
                continue
            raise AssertionError(attack.__code__.co_firstlineno, attack.__code__.co_names)
        for tree in (folder, os.path.dirname(os.__file__) + "/json"):
            shutil.rmtree(tree, ignore_errors=True)
        import json
        """
    )
    assert result.passed, result
    assert victim.read_text() == "precious"
    assert victim.stat().st_mode & 0o777 == 0o666 and victim.stat().st_mtime > 1e9
    assert [path.name for path in tmp_path.iterdir()] == ["victim"]


def test_nothing_is_left_for_the_next_program(run):
    leave = """
        import os
        os.makedirs("a/b"); open("a/b/c", "w").write("secret"); os.symlink("/", "a/root")
        open("d", "w").write("secret")
        try:
            os.chmod("a/b", 0); os.chmod("a", 0)
        except OSError:
            pass
        """
    assert run(leave).passed and run(leave).passed
    assert run("import os; assert os.listdir('.') == [], os.listdir('.')").passed


def test_a_file_and_all_files_have_a_largest_size(sandbox, run):
    big = run("with open('big', 'ab', 0) as f: f.write(bytes(1 << 20)); f.write(b'x')")
    assert big.detail.startswith("OSError: [Errno 27] File too large")
    if "namespaces" in sandbox.protections.files:
        many = run("for i in range(999): open(str(i), 'wb').write(bytes(1 << 20))")
        assert many.detail.startswith("OSError: [Errno 28] No space left on device")
    files = run("found = [open(str(i), 'w') for i in range(999)]")
    assert files.detail.startswith("OSError: [Errno 24] Too many open files")


def test_memory_is_bounded_by_whatever_way_it_is_taken(run):
    result = run(
        """
        import ctypes, mmap, os
        libc = ctypes.CDLL(None)
        def shared():
            assert libc.shmget(0, 1 << 30, 0o1600) >= 0
        for take in (
            lambda: bytearray(1 << 30), lambda: mmap.mmap(-1, 1 << 30), shared,
            lambda: os.memfd_create("m"),
        ):
            try:
                take()
            except (MemoryError, OSError, AssertionError):
                continue
            raise RuntimeError(take.__code__.co_names)
        """
    )
    assert result.passed, result
    assert run("x = []\nwhile True: x.append(bytearray(1 << 20))").status == "out_of_memory"


def test_no_connection_reaches_a_local_server(run):
    server = socket.create_server(("127.0.0.1", 0))
    abstract = socket.socket(socket.AF_UNIX)
    abstract.bind(f"\0espalier-{os.getpid()}")
    abstract.listen()
    try:
        result = run(
            f"""
            import socket
            for family, address in (
                (socket.AF_INET, ("127.0.0.1", {server.getsockname()[1]})),
                (socket.AF_UNIX, {abstract.getsockname()!r}),
            ):
                try:
                    socket.socket(family).connect(address)
                except OSError:
                    continue
                raise AssertionError(family)
            """
        )
        assert result.passed, result
        for listener in (server, abstract):
            listener.settimeout(0)
            with pytest.raises(BlockingIOError):
                listener.accept()
    finally:
        server.close()
        abstract.close()


def test_signals_reach_no_other_process(run):
    bystander = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        result = run(
            f"""
            import ctypes, os, resource, signal
            libc = ctypes.CDLL(None)
            parent, bystander = os.getppid(), {bystander.pid}
            for whom in (-1, 0, -os.getpid(), 1 if os.getpid() != 1 else 2, parent, bystander):
                for send in (
                    lambda: os.kill(whom, signal.SIGKILL),
                    lambda: os.killpg(os.getpgid(0), signal.SIGKILL),
                    lambda: signal.pidfd_send_signal(os.pidfd_open(whom), signal.SIGKILL),
                    lambda: resource.prlimit(whom, resource.RLIMIT_CORE, (0, 0)),
                    lambda: os.setpriority(os.PRIO_PROCESS, whom, 19),
                    lambda: os.sched_setaffinity(whom, {{0}}),
                ):
                    try:
                        send()
                    except (OSError, ValueError, OverflowError):
                        continue
                    if whom != 0 or "prlimit" not in send.__code__.co_names:
                        raise AssertionError(whom, send.__code__.co_names)
                assert libc.syscall(200, whom, 9) == -1 and libc.ptrace(16, whom, 0, 0) == -1
            """
        )
        assert result.passed, result
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_the_program_sees_nothing_of_the_environment(run, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    result = run(
        """
        import os, sys
        assert not os.environ and sys.argv == ["-c"], (os.environ, sys.argv)
        assert sys.stdin.read() == ""
        assert sys.dont_write_bytecode  # beside the package's own modules
        for number in range(3, 256):
            try:
                os.fstat(number)
            except OSError:
                continue
            print(number)
        """
    )
    assert result.passed, result
    assert result.stdout == "3\n"  # by which its end is told


def test_many_programs_come_back_in_order(sandbox):
    programs = [f"assert {i} % 3, {i}" for i in range(40)]
    results = list(sandbox.run(programs))
    assert [r.passed for r in results] == [bool(i % 3) for i in range(40)]
    assert results[9].detail == "AssertionError: 9"


def test_a_sandbox_that_loses_a_process_goes_on_and_leaves_none():
    before = set(psutil.Process().children(recursive=True))

    def started():
        return set(psutil.Process().children(recursive=True)) - before

    with code_sandbox.Sandbox(LIMITS, workers=1) as sandbox:
        (zygote,) = set(psutil.Process().children()) - before
        zygote.kill()
        assert sandbox.run_one("pass").passed  # on a new process
        folder = pathlib.Path(sandbox._folder.name)
        pending = sandbox._threads.submit(sandbox.run_one, "while True: pass")
        deadline = time.monotonic() + 10
        while len(found := started()) < 3:
            assert time.monotonic() < deadline
        # The program runs again on a new process; one that loses two processes is taken for their killer.
        next(process for process in found if process.ppid() == os.getpid()).kill()
        while len(again := started() - set(found)) < 3:
            assert time.monotonic() < deadline
        next(process for process in again if process.ppid() == os.getpid()).kill()
        lost = pending.result()
        assert (lost.status, lost.detail) == ("killed", "the sandbox's own process was killed")
        found |= again
        # The supervisor and its program end with the process that was to serve them.
        assert not psutil.wait_procs(found, timeout=5)[1]
    assert not folder.exists() and not started()


def test_settings_that_make_no_sense_and_protection_that_is_not_there(monkeypatch):
    with pytest.raises(ValueError, match=r"Limits.wall_seconds = 0 must be above 0"):
        code_sandbox.Limits(wall_seconds=0)
    with pytest.raises(ValueError, match=r"Limits.cpu_seconds = 0.5 must be whole"):
        code_sandbox.Limits(cpu_seconds=0.5)


def test_people_are_told_once_what_is_open(monkeypatch, capsys):
    def without(self, message, seconds):
        return {"protections": {"network": None, "files": None, "processes": "seccomp"}}

    monkeypatch.setattr(code_sandbox._Zygote, "_exchange", without)
    monkeypatch.setattr(code_sandbox, "_warned", set())
    for _ in range(2):
        code_sandbox.Sandbox(workers=1).close()
    assert capsys.readouterr().err.count("can access network and files") == 1
    assert "root" not in capsys.readouterr().err
    monkeypatch.setattr(
        code_sandbox._Zygote,
        "_exchange",
        lambda *_: {"protections": {"network": "x", "files": "x", "processes": "x", "root": True}},
    )
    for _ in range(2):
        code_sandbox.Sandbox(workers=1).close()
    assert capsys.readouterr().err.count("untrusted programs keep the user id of root") == 1
    monkeypatch.setattr(code_sandbox._Zygote, "_exchange", without)
    with pytest.raises(code_sandbox.SandboxError, match="cannot block files on this machine"):
        code_sandbox.Sandbox(workers=1, require=["files", "processes"])
