"""Linux's means for an unprivileged process to confine itself: namespaces, Landlock and seccomp.

The module uses only the standard library, with `ctypes`, because it runs in an interpreter without packages. Each
function either applies its protection completely or raises OSError.
"""

import contextlib
import ctypes
import errno
import os
import platform
import struct
import sys
from collections.abc import Iterator, Sequence

_NEWNS, _NEWUTS, _NEWIPC = 0x00020000, 0x04000000, 0x08000000
_NEWUSER, _NEWPID, _NEWNET = 0x10000000, 0x20000000, 0x40000000
_THREAD = 0x00010000
_MS_BIND, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 0x1000, 0x4000, 0x40000, 2
_MS_NOSUID, _MS_NODEV = 2, 4
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_AT_RECURSIVE, _AT_FDCWD = 0x8000, -100
_PDEATHSIG, _SECCOMP, _NO_NEW_PRIVS = 1, 22, 38
# Numbers that all architectures share.
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446

NOBODY = 65534
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")

# Denied system calls with their numbers on x86-64 and on ARM (None if ARM lacks the call). Calls that need privileges
# are not listed: the program has no privileges, and cannot enter a namespace in which it would have some.
_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_DENIED = {
    # other processes: to start, to signal, to look into or to slow down
    "fork": (57, None),
    "vfork": (58, None),
    "execve": (59, 221),
    "execveat": (322, 281),
    "tkill": (200, 130),
    "rt_sigqueueinfo": (129, 138),
    "rt_tgsigqueueinfo": (297, 240),
    "pidfd_open": (434, 434),
    "pidfd_send_signal": (424, 424),
    "ptrace": (101, 117),
    "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271),
    "kcmp": (312, 272),
    "process_madvise": (440, 440),
    "migrate_pages": (256, 238),
    "move_pages": (279, 239),
    "setpriority": (141, 140),
    "ioprio_set": (251, 30),
    "sched_setparam": (142, 118),
    "sched_setscheduler": (144, 119),
    "sched_setaffinity": (203, 122),
    "sched_setattr": (314, 274),
    # the network; socketpair, which event loops use, stays allowed
    "socket": (41, 198),
    # memory that the limit on the address space does not count
    "memfd_create": (319, 279),
    "memfd_secret": (447, 447),
    "shmget": (29, 194),
    "semget": (64, 190),
    "msgget": (68, 186),
    "mq_open": (240, 180),
    # namespaces, and parts of the kernel that have been ways out of sandboxes
    "unshare": (272, 97),
    "setns": (308, 268),
    "bpf": (321, 280),
    "perf_event_open": (298, 241),
    "io_uring_setup": (425, 425),
    "userfaultfd": (323, 282),
    "add_key": (248, 217),
    "request_key": (249, 218),
    "keyctl": (250, 219),
    "name_to_handle_at": (303, 264),
    "open_by_handle_at": (304, 265),
    "fanotify_init": (300, 262),
}
# Calls that change files and that Landlock does not block.
_DENIED_OUTSIDE = {
    "chmod": (90, None),
    "fchmod": (91, 52),
    "fchmodat": (268, 53),
    "fchmodat2": (452, 452),
    "chown": (92, None),
    "lchown": (94, None),
    "fchown": (93, 55),
    "fchownat": (260, 54),
    "utime": (132, None),
    "utimes": (235, None),
    "futimesat": (261, None),
    "utimensat": (280, 88),
    "truncate": (76, 45),
    "setxattr": (188, 5),
    "lsetxattr": (189, 6),
    "fsetxattr": (190, 7),
    "setxattrat": (463, 463),
    "removexattr": (197, 14),
    "lremovexattr": (198, 15),
    "fremovexattr": (199, 16),
    "removexattrat": (466, 466),
    "file_setattr": (469, 469),
}
_CLONE, _CLONE3, _KILL, _TGKILL, _PRLIMIT = (56, 220), 435, (62, 129), (234, 131), (302, 261)

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def _prctl(option: int, value: int, *more: int) -> None:
    arguments = [ctypes.c_ulong(x) for x in (value, *more, 0, 0, 0)[:4]]
    _check(_libc.prctl(option, *arguments), f"prctl {option}")


def die_with_parent() -> None:
    """Makes the kernel kill the calling process when its parent ends."""
    _prctl(_PDEATHSIG, 9)


def become_nobody() -> None:
    """Switches from root to the user nobody, irreversibly."""
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)


def unshare_pids() -> None:
    """Makes the next child the first process of a PID namespace; when it ends, all processes in it are killed."""
    _check(_libc.unshare(_NEWPID), "unshare of processes")


def enter_namespaces(readable: Sequence[str], work: str, work_bytes: int) -> None:
    """Enters namespaces without network and with the files `readable` (read-only) and `work` only.

    `work` is a new folder in memory. Its files belong to the user, or to nobody if the user is root.

    Raises:
      OSError: the kernel does not allow it; the process is then in an undefined state and must end.
    """
    uid, gid = os.geteuid(), os.getegid()
    namespaces = _NEWUSER | _NEWNS | _NEWNET | _NEWIPC | _NEWUTS
    if uid == 0:
        uid = gid = NOBODY
        with _mapping_helper():
            _check(_libc.unshare(namespaces), "unshare of namespaces")
    else:
        _check(_libc.unshare(namespaces), "unshare of namespaces")
        _write_maps("self", uid, gid)
    os.umask(0o022)
    _mount("none", "/", None, _MS_REC | _MS_PRIVATE)
    root = "/tmp"  # any existing folder; the mount hides its content from this process only
    # Readable paths are opened first, because the mount may hide some of them.
    handles = {path: os.open(path, os.O_PATH) for path in readable if not os.path.islink(path)}
    links = {path: os.readlink(path) for path in readable if os.path.islink(path)}
    _mount("tmpfs", root, "tmpfs", _MS_NOSUID | _MS_NODEV, "size=1m,mode=755")
    for path, target in links.items():
        os.makedirs(root + os.path.dirname(path), exist_ok=True)
        os.symlink(target, root + path)
    for path, handle in handles.items():
        if os.path.isdir(f"/proc/self/fd/{handle}"):
            os.makedirs(root + path, exist_ok=True)
        else:
            os.makedirs(root + os.path.dirname(path), exist_ok=True)
            open(root + path, "w").close()
        _mount(f"/proc/self/fd/{handle}", root + path, None, _MS_BIND | _MS_REC)
        os.close(handle)
        if path not in DEVICES:
            _read_only(root + path, _ATTR_RDONLY | _ATTR_NOSUID | _ATTR_NODEV)
    os.mkdir(root + work)
    options = f"size={work_bytes},nr_inodes=4096,mode=700,uid={uid},gid={gid}"
    _mount("tmpfs", root + work, "tmpfs", _MS_NOSUID | _MS_NODEV, options)
    _read_only(root, _ATTR_RDONLY, recursive=False)
    os.chdir(root)
    pivot_root = {"x86_64": 155, "aarch64": 41}.get(platform.machine())
    if pivot_root is None:
        raise OSError(errno.ENOSYS, "pivot_root: its number on this machine is not known")
    _check(_libc.syscall(pivot_root, b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount of the old root")
    os.chdir("/")


def _write_maps(process: int | str, uid: int, gid: int) -> None:
    """Writes the user and group maps of a namespace: one user; root too if root writes them."""
    root = "0 0 1\n" if os.geteuid() == 0 else ""
    maps = [("uid_map", f"{root}{uid} {uid} 1"), ("gid_map", f"{root}{gid} {gid} 1")]
    if not root:
        maps.insert(0, ("setgroups", "deny"))
    for name, text in maps:
        with open(f"/proc/{process}/{name}", "w") as file:
            file.write(text)


@contextlib.contextmanager
def _mapping_helper() -> Iterator[None]:
    """Maps root and nobody from a helper process outside the namespace.

    Mapping two users needs root's privileges, which the calling process loses when it enters the namespace.
    """
    process = os.getpid()
    ready, make_ready = os.pipe()
    helper = os.fork()
    if not helper:
        os.close(make_ready)
        code = 1
        try:
            if os.read(ready, 1):
                _write_maps(process, NOBODY, NOBODY)
                code = 0
        finally:
            os._exit(code)
    os.close(ready)
    try:
        yield
        os.write(make_ready, b"1")
    finally:
        os.close(make_ready)
        code = os.waitstatus_to_exitcode(os.waitpid(helper, 0)[1])
    if code:
        raise OSError(errno.EPERM, "the users of the namespace cannot be mapped")


def _mount(source: str, target: str, kind: str | None, flags: int, options: str = "") -> None:
    encoded = None if kind is None else kind.encode()
    result = _libc.mount(
        os.fsencode(source), os.fsencode(target), encoded, ctypes.c_ulong(flags), options.encode()
    )
    _check(result, f"mount of {target}")


def _read_only(path: str, attributes: int, *, recursive: bool = True) -> None:
    wanted = ctypes.create_string_buffer(struct.pack("=QQQQ", attributes, 0, 0, 0), 32)
    flags = _AT_RECURSIVE if recursive else 0
    result = _libc.syscall(_MOUNT_SETATTR, _AT_FDCWD, os.fsencode(path), flags, wanted, 32)
    _check(result, f"mount_setattr of {path}")


_READ, _READ_FILE = 0b1101, 0b0101  # execute, read files and list folders
_WRITE_FILE = 0b0010
_FILE_RIGHTS = 0b1100_0000_0000_0111


def restrict_files(readable: Sequence[str], writable: Sequence[str]) -> None:
    """Denies access, with Landlock, to all files except the given paths and everything below them."""
    _prctl(_NO_NEW_PRIVS, 1)
    version = _check(_libc.syscall(_LANDLOCK_CREATE, None, 0, 1), "Landlock")
    # Rights by Landlock version: 13 in version 1; 2 adds moving files, 3 truncation, 5 device ioctls.
    rights = (1 << (13 + min(version - 1, 2) + (version >= 5))) - 1
    attributes = ctypes.create_string_buffer(struct.pack("=Q", rights), 8)
    ruleset = _check(_libc.syscall(_LANDLOCK_CREATE, attributes, 8, 0), "Landlock ruleset")
    devices = [(path, _READ_FILE | _WRITE_FILE) for path in DEVICES]
    for path, allowed in (
        *((path, _READ) for path in readable if path not in DEVICES),
        *devices,
        *((path, rights) for path in writable),
    ):
        handle = os.open(path, os.O_PATH)
        if not os.path.isdir(path):
            allowed &= _FILE_RIGHTS
        rule = ctypes.create_string_buffer(struct.pack("=Qi", allowed & rights, handle), 12)
        _check(_libc.syscall(_LANDLOCK_ADD, ruleset, 1, rule, 0), f"Landlock rule for {path}")
        os.close(handle)
    _check(_libc.syscall(_LANDLOCK_RESTRICT, ruleset, 0), "Landlock")
    os.close(ruleset)


def drop_capabilities() -> None:
    """Drops all capabilities, those in namespaces too."""
    _prctl(_NO_NEW_PRIVS, 1)
    header = ctypes.create_string_buffer(struct.pack("=Ii", 0x20080522, 0), 8)
    _check(_libc.capset(header, ctypes.create_string_buffer(24)), "capset")


def knows_system_calls() -> bool:
    """Returns whether `filter_system_calls` supports this machine."""
    return sys.platform == "linux" and platform.machine() in _MACHINES and sys.maxsize > 2**32


def filter_system_calls(*, threads: bool, own_files_only: bool) -> None:
    """Denies, with an irreversible seccomp filter, new processes, the network and access to other processes.

    Args:
      threads: whether the process may start threads.
      own_files_only: whether the process can only reach its own files; if so, it may change their metadata.
    """
    _prctl(_NO_NEW_PRIVS, 1)
    code = _filter(threads=threads, own_files_only=own_files_only)
    instructions = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(instructions))
    buffer = ctypes.create_string_buffer(program, len(program))
    _prctl(_SECCOMP, 2, ctypes.addressof(buffer))


_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL_PROCESS, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER_AT, _ARCH_AT, _ARGUMENT_AT = 0, 4, 16


def _filter(*, threads: bool, own_files_only: bool) -> bytes:
    """Returns the filter as BPF instructions of 8 bytes: operation, jump if true, jump if false, value."""
    column, arch = _MACHINES[platform.machine()]
    denied = _RETURN, 0, 0, _ERROR | errno.EPERM
    code = [
        (_LOAD, 0, 0, _ARCH_AT),
        (_EQUAL, 1, 0, arch),
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_AT_LEAST, 0, 1, 0x40000000),  # the 32-bit calls of x86-64
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_EQUAL, 0, 1, _CLONE3),  # its flags cannot be read here; the C library falls back on clone
        (_RETURN, 0, 0, _ERROR | errno.ENOSYS),
    ]
    names = _DENIED if own_files_only else _DENIED | _DENIED_OUTSIDE
    for number in (numbers[column] for numbers in names.values()):
        if number is not None:
            code += [(_EQUAL, 0, 1, number), denied]

    def where(numbers, test, values):
        """Allows a call only if its first argument passes the test with one of the values."""
        rows = []
        for value in values:
            rows += [(test, 0, 1, value), (_RETURN, 0, 0, _ALLOW)]
        rows = [(_LOAD, 0, 0, _ARGUMENT_AT), *rows, denied]
        code.extend([(_EQUAL, 0, len(rows), numbers[column]), *rows])

    own = os.getpid()
    where(_CLONE, _ANY_BIT, [_THREAD] if threads else [])
    where(_KILL, _EQUAL, [own])
    where(_TGKILL, _EQUAL, [own])
    where(_PRLIMIT, _EQUAL, [0, own])
    code.append((_RETURN, 0, 0, _ALLOW))
    return b"".join(struct.pack("=HBBI", *row) for row in code)
