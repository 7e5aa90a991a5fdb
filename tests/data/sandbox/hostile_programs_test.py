"""Hostile programs: none changes the result of the next, reaches a process outside, or forges its own result."""

import contextlib
import os
import socket
import subprocess
import sys
import textwrap

import pytest

from espalier.data.sandbox import code_sandbox, work_folder

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="macOS has the limits only")
LIMITS = code_sandbox.Limits(wall_seconds=30, memory_bytes=256 << 20, file_bytes=1 << 20, threads=4)
INNOCENT = """
import fcntl, json, os, threading
assert os.listdir(".") == []
assert open("new", "w").write(json.dumps([1])) == 3
threads = [threading.Thread(target=int) for _ in range(2)]
[t.start() for t in threads], [t.join() for t in threads]
assert not fcntl.fcntl(0, fcntl.F_GETFL) & os.O_NONBLOCK
assert os.umask(0o022) == 0o077 and not os.environ
"""


@pytest.fixture(scope="module", params=["namespaces", "seccomp"])
def sandbox(request):
    namespaces = request.param == "namespaces"
    with code_sandbox.Sandbox(LIMITS, workers=1, namespaces=namespaces) as made:
        if namespaces and "namespaces" not in (made.protections.files or ""):
            pytest.skip("this kernel forbids namespaces")
        if made.protections.files is None or made.protections.processes is None:
            pytest.skip("this kernel has neither namespaces, nor Landlock and seccomp")
        yield made
    assert not os.path.exists(made._folder.name)


@pytest.fixture
def run(sandbox):
    """Runs a program and then an innocent one, which passes on the same process."""

    def call(source: str) -> code_sandbox.Result:
        before = sandbox._all[0]
        result = sandbox.run_one(textwrap.dedent(source))
        after = sandbox.run_one(INNOCENT)
        assert after.passed, after
        assert sandbox._all == [before]
        return result

    return call


LEFTOVERS = {
    "deep": "import os\nfor _ in range(1200):\n  os.mkdir('d' * 99); os.chdir('d' * 99)",
    "many": "for i in range(3000): open(str(i), 'w').close()",
    "odd": r"""
        import os, socket
        for name in (b"\xff\n", b"-rf", b" ", "\u202e".encode(), b"x" * 255):
            os.mkdir(name); open(name + b"/\x01" if len(name) < 255 else b"y", "w").close()
        os.mkfifo("fifo"); os.symlink("/", "root"); os.symlink("loop", "loop"); os.link("y", "z")
        os.umask(0o777); os.mkdir("closed"); open("none", "w").close()
        """,
    "closed inside": """
        import os
        os.makedirs("a/b/c/d")
        os.umask(0o777); os.mkdir("a/b/c/d/e"); os.mkdir("a/b/f")
        try:
            os.chmod("a/b/c", 0); os.chmod("a", 0)
        except OSError:
            pass
        """,
    "open": """
        import fcntl, mmap, os, resource
        files = [open(str(i), "w+b", 0) for i in range(8)]
        for file in files:
            file.write(bytes(4096)); fcntl.lockf(file, fcntl.LOCK_EX); os.unlink(file.name)
        fcntl.flock(0, fcntl.LOCK_EX); fcntl.fcntl(0, fcntl.F_SETFL, os.O_NONBLOCK)
        maps = [mmap.mmap(file.fileno(), 4096) for file in files]
        resource.setrlimit(resource.RLIMIT_NOFILE, (9, 9)); resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
        """,
    "full": """
        try:
            for i in range(80):
                with open(str(i), "wb") as file: file.write(bytes(1 << 20))
        except OSError:
            pass
        """,
}


@pytest.mark.parametrize("name", LEFTOVERS)
def test_what_a_program_leaves_does_not_reach_the_next(run, name):
    result = run(LEFTOVERS[name])
    assert result.passed, result


FORGERIES = {
    "echo": """
        import os
        os.write(3, b"?"); os.write(3, os.read(3, 64)); os._exit(0)
        """,
    "stack": """
        import gc, os, sys
        frame, values = sys._getframe(), []
        while frame:
            values += [*frame.f_locals.values(), *frame.f_globals.values(), *gc.get_referents(frame)]
            frame = frame.f_back
        gc.unfreeze()
        values += [v for o in gc.get_objects() for v in gc.get_referents(o)]
        for value in {v for v in values if type(v) is bytes and len(v) == 16}:
            os.write(3, value)
        os._exit(0)
        """,
    "flush": """
        import atexit, gc, os, sys
        class Output:
            def write(self, text): pass
            def flush(self):
                frame = sys._getframe()
                while frame := frame.f_back:
                    for value in gc.get_referents(frame):
                        if type(value) is bytes: os.write(3, value)
                os._exit(0)
        sys.stdout = Output(); atexit.register(os._exit, 0); sys.excepthook = lambda *_: os._exit(0)
        os.write = os.write; raise SystemExit(0)
        """,
    "harness": """
        import sys
        frame = sys._getframe()
        while frame := frame.f_back:
            frame.f_globals.update(_say=lambda *_: None, _RAISED=0, _NO_MEMORY=0, _execute=lambda *_: None)
        """,
}


@pytest.mark.parametrize("name", FORGERIES)
def test_no_python_code_forges_the_proof(run, name):
    result = run(textwrap.dedent(FORGERIES[name]) + "\nassert 1 == 2")
    assert result.status in ("failed", "killed"), result


def test_the_kernel_signals_no_other_process_for_a_program(run):
    bystander = subprocess.Popen(["sleep", "60"])
    try:
        result = run(
            f"""
            import ctypes, fcntl, os, socket, struct
            libc = ctypes.CDLL(None, use_errno=True)
            a, b = socket.socketpair()
            victim = {bystander.pid}
            attacks = [
                lambda: fcntl.fcntl(a, fcntl.F_SETOWN, victim),
                lambda: fcntl.fcntl(a, 15, struct.pack("ii", 1, victim)),
                lambda: fcntl.fcntl(a, fcntl.F_SETSIG, 9),
                lambda: fcntl.fcntl(a, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK),
                lambda: fcntl.fcntl(a, fcntl.F_SETLEASE, fcntl.F_RDLCK),
                lambda: fcntl.fcntl(os.open(".", os.O_RDONLY), fcntl.F_NOTIFY, 2),
            ]
            for request in (0x8901, 0x8902, 0x5452, 0x5412):  # FIOSETOWN, SIOCSPGRP, FIOASYNC, TIOCSTI
                attacks.append(lambda r=request: fcntl.ioctl(a, r, struct.pack("i", victim)))
            for attack in attacks:
                try:
                    attack()
                except OSError as error:
                    assert error.errno == 1, error
                    continue
                raise AssertionError(attack.__code__.co_consts)
            a.setblocking(False); b.send(b"x"); assert a.recv(1) == b"x"
            for number in (  # of x86-64 and all machines: none is allowed on any machine as these numbers
                101, 310, 311, 312, 141, 203, 200, 297, 129, 321, 298, 323, 272, 308, 165, 166, 155, 161,
                246, 248, 249, 250, 303, 304, 300, 253, 179, 169, 175, 313, 163, 135, 42, 46, 49, 50, 288,
                307, 29, 64, 68, 240, 319, 59, 322, 162, 222, 424, 425, 426, 427, 428, 432, 434, 435, 438, 440,
            ) if os.uname().machine == "x86_64" else (424, 425, 434, 435, 438):
                assert libc.syscall(number, victim, 0, 0, 0, 0, 0) == -1, number
                assert ctypes.get_errno() in (1, 38), (number, ctypes.get_errno())
            """
        )
        assert result.passed, result
        assert bystander.poll() is None
    finally:
        bystander.kill()
        bystander.wait()


def test_no_datagram_reaches_a_local_server(run, tmp_path):
    tmp_path.chmod(0o777)
    with contextlib.ExitStack() as stack:
        servers = [
            stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)) for _ in "ab"
        ]
        servers[0].bind(f"\0espalier-datagram-{os.getpid()}")
        servers[1].bind(str(tmp_path / "socket"))
        os.chmod(tmp_path / "socket", 0o777)
        result = run(
            f"""
            import socket
            for address in {[server.getsockname() for server in servers]!r}:
                for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
                    for send in (
                        lambda s: s.connect(address), lambda s: s.sendto(b"x", address),
                        lambda s: s.sendmsg([b"x"], [], 0, address), lambda s: s.bind("mine"),
                        lambda s: s.send(b"x", socket.MSG_OOB),
                    ):
                        try:
                            pair = socket.socketpair(socket.AF_UNIX, kind)
                            send(pair[0])
                        except PermissionError:
                            continue
                        raise AssertionError(kind, send.__code__.co_names)
            """
        )
        assert result.passed, result
        for server in servers:
            server.setblocking(False)
            with pytest.raises(BlockingIOError):
                server.recv(1)


def test_programs_are_not_root_and_see_no_process(run):
    result = run(
        f"""
        import os
        assert 0 not in (*os.getresuid(), *os.getresgid(), *os.getgroups())
        for path in ("/proc/self/mem", "/proc/{os.getpid()}/environ", "/proc", "/sys", "/dev/shm", "/etc/passwd"):
            for flags in (os.O_RDONLY, os.O_WRONLY):
                try:
                    os.open(path, flags)
                except OSError:
                    continue
                raise AssertionError(path)
        for look in (os.getsid, os.getpgid, os.sched_getaffinity):
            try:
                look({os.getpid()})
            except OSError:
                continue
            raise AssertionError(look)
        """
    )
    assert result.passed, result


@pytest.mark.skipif(os.uname().machine != "x86_64", reason="32-bit calls of x86-64")
def test_calls_of_other_architectures_end_the_program(run):
    result = run(
        r"""
        import ctypes, mmap
        memory = mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC)
        memory.write(b"\xb8\x14\x00\x00\x00\xcd\x80\xc3")  # getpid by int 0x80
        ctypes.CFUNCTYPE(ctypes.c_int)(ctypes.addressof(ctypes.c_char.from_buffer(memory)))()
        """
    )
    assert result.status == "killed", result
    result = run("import ctypes; ctypes.CDLL(None).syscall(0x40000000 + 39)")
    assert (result.status, result.detail) == ("killed", "by SIGSYS")


def test_a_program_ends_with_its_supervisor(run):
    result = run(
        "import ctypes; assert ctypes.CDLL(None).prctl(1, 0) == -1"
    )  # the signal of a parent's end
    assert result.passed, result


def test_folders_are_removed_in_bounded_time_and_links_are_not_followed(tmp_path):
    outside, folder = tmp_path / "outside", tmp_path / "folder"
    outside.mkdir()
    (outside / "file").write_text("precious")
    (folder / "a" / "b").mkdir(parents=True)
    (folder / "a" / "link").symlink_to(outside)
    (folder / "a").chmod(0)
    assert not work_folder.remove(str(folder), seconds=-1) and folder.exists()
    assert work_folder.remove(str(folder)) and not folder.exists()
    assert work_folder.remove(str(folder))
    assert (outside / "file").read_text() == "precious"
