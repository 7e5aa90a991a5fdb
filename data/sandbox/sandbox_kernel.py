"""Linux's means for an unprivileged process to confine itself: namespaces, Landlock, capabilities.

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
_MS_BIND, _MS_REC, _MS_PRIVATE, _MNT_DETACH = 0x1000, 0x4000, 0x40000, 2
_MS_NOSUID, _MS_NODEV = 2, 4
_ATTR_RDONLY, _ATTR_NOSUID, _ATTR_NODEV = 1, 2, 4
_AT_RECURSIVE, _AT_FDCWD = 0x8000, -100
_PDEATHSIG, _DUMPABLE, _KEEP_CAPABILITIES, SECCOMP, NO_NEW_PRIVS = 1, 4, 8, 22, 38
_READ_ALL = 1 << 2  # the capability CAP_DAC_READ_SEARCH
_CAPABILITIES = struct.pack("=Ii", 0x20080522, 0)  # version, and 0 for this process
# Numbers that all architectures share.
_MOUNT_SETATTR, _LANDLOCK_CREATE, _LANDLOCK_ADD, _LANDLOCK_RESTRICT = 442, 444, 445, 446

NOBODY = 65534
DEVICES = ("/dev/null", "/dev/zero", "/dev/urandom", "/dev/random")

_libc = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _check(result: int, what: str) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{what}: {os.strerror(code)}")
    return result


def prctl(option: int, value: int, *more: int) -> None:
    """Calls prctl; raises OSError if the kernel refuses."""
    arguments = [ctypes.c_ulong(x) for x in (value, *more, 0, 0, 0)[:4]]
    _check(_libc.prctl(option, *arguments), f"prctl {option}")


def die_with_parent() -> None:
    """Makes the kernel kill the calling process when its parent ends."""
    prctl(_PDEATHSIG, 9)


def become_user(user: int) -> None:
    """Switches from root to another user, irreversibly; `drop_capabilities` must follow."""
    prctl(_KEEP_CAPABILITIES, 1)
    os.setgroups([])
    os.setresgid(user, user, user)
    os.setresuid(user, user, user)


def may_read_all() -> bool:
    """Returns whether this process may keep the capability to read all files."""
    data = ctypes.create_string_buffer(24)
    _check(_libc.capget(_CAPABILITIES, data), "capget")
    return bool(struct.unpack("=6I", data.raw)[1] & _READ_ALL)


def unshare_pids() -> None:
    """Makes the next child the first process of a PID namespace; when it ends, all processes in it are killed."""
    _check(_libc.unshare(_NEWPID), "unshare of processes")


def enter_namespaces(readable: Sequence[str], work: str) -> None:
    """Enters namespaces without network and with the files `readable` (read-only) and an empty folder `work` only.

    Raises:
      OSError: the kernel does not allow it; the process is then in an undefined state and must end.
    """
    uid, gid = os.geteuid(), os.getegid()
    namespaces = _NEWUSER | _NEWNS | _NEWNET | _NEWIPC | _NEWUTS
    if uid == 0:
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
    _read_only(root, _ATTR_RDONLY, recursive=False)
    os.chdir(root)
    pivot_root = {"x86_64": 155, "aarch64": 41}.get(platform.machine())
    if pivot_root is None:
        raise OSError(errno.ENOSYS, "pivot_root: its number on this machine is not known")
    _check(_libc.syscall(pivot_root, b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount of the old root")
    os.chdir("/")


def mount_work(work: str, work_bytes: int) -> None:
    """Mounts an empty folder in memory, of the user or of nobody if the user is root, at `work`."""
    user, group = (NOBODY, NOBODY) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    options = f"size={work_bytes},nr_inodes=4096,mode=700,uid={user},gid={group}"
    _mount("tmpfs", work, "tmpfs", _MS_NOSUID | _MS_NODEV, options)


def unmount_work(work: str) -> None:
    """Removes the folder of `mount_work` with everything in it, whatever it is."""
    _check(_libc.umount2(os.fsencode(work), _MNT_DETACH), f"umount of {work}")


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
    """Denies access, with Landlock, to all files except these paths and everything below them.

    Newer kernels also deny signals and abstract sockets to processes that are not restricted in the same call.
    """
    prctl(NO_NEW_PRIVS, 1)
    version = _check(_libc.syscall(_LANDLOCK_CREATE, None, 0, 1), "Landlock")
    # Rights by Landlock version: 13 in version 1; 2 adds moving files, 3 truncation, 5 device ioctls.
    rights = (1 << (13 + min(version - 1, 2) + (version >= 5))) - 1
    size = 24 if version >= 6 else 8  # version 6 adds the scopes of abstract sockets and signals
    attributes = ctypes.create_string_buffer(struct.pack("=QQQ", rights, 0, 0b11), 24)
    ruleset = _check(_libc.syscall(_LANDLOCK_CREATE, attributes, size, 0), "Landlock ruleset")
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


def drop_capabilities(*, keep_reading: bool) -> None:
    """Drops all capabilities, those in namespaces too.

    Args:
      keep_reading: whether to keep the one to read all files; Landlock and namespaces still restrict them.
    """
    prctl(NO_NEW_PRIVS, 1)
    but = _READ_ALL if keep_reading else 0
    data = ctypes.create_string_buffer(struct.pack("=6I", but, but, 0, 0, 0, 0), 24)
    _check(_libc.capset(_CAPABILITIES, data), "capset")


def hide_memory() -> None:
    """Denies other processes of the same user access to this one, and starts no crash handler of the machine."""
    prctl(_DUMPABLE, 0)
