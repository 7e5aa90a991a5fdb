"""The system calls of programs in the sandbox: a seccomp filter that allows only the calls listed here.

The lists hold what Python and its standard library need for one process with threads and files. All other calls
fail: those that start, signal or inspect processes, reach the network, enter namespaces, or change the machine.
"""

import ctypes
import errno
import os
import platform
import struct
import sys

from espalier.data.sandbox import sandbox_kernel as kernel

_MACHINES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
# Allowed calls with their numbers on x86-64 and on ARM (None if ARM lacks the call).
_ALLOWED: dict[str, tuple[int, int | None]] = {
    # files and folders; Landlock or the namespace says which
    "read": (0, 63),
    "write": (1, 64),
    "readv": (19, 65),
    "writev": (20, 66),
    "pread64": (17, 67),
    "pwrite64": (18, 68),
    "preadv": (295, 69),
    "pwritev": (296, 70),
    "preadv2": (327, 286),
    "pwritev2": (328, 287),
    "open": (2, None),
    "openat": (257, 56),
    "creat": (85, None),
    "close": (3, 57),
    "close_range": (436, 436),
    "lseek": (8, 62),
    "stat": (4, None),
    "fstat": (5, 80),
    "lstat": (6, None),
    "newfstatat": (262, 79),
    "statx": (332, 291),
    "statfs": (137, 43),
    "fstatfs": (138, 44),
    "access": (21, None),
    "faccessat": (269, 48),
    "faccessat2": (439, 439),
    "getdents": (78, None),
    "getdents64": (217, 61),
    "getcwd": (79, 17),
    "chdir": (80, 49),
    "fchdir": (81, 50),
    "rename": (82, None),
    "renameat": (264, 38),
    "renameat2": (316, 276),
    "mkdir": (83, None),
    "mkdirat": (258, 34),
    "rmdir": (84, None),
    "link": (86, None),
    "linkat": (265, 37),
    "unlink": (87, None),
    "unlinkat": (263, 35),
    "symlink": (88, None),
    "symlinkat": (266, 36),
    "readlink": (89, None),
    "readlinkat": (267, 78),
    "mknod": (133, None),
    "mknodat": (259, 33),
    "umask": (95, 166),
    "fsync": (74, 82),
    "fdatasync": (75, 83),
    "fallocate": (285, 47),
    "fadvise64": (221, 223),
    "ftruncate": (77, 46),
    "flock": (73, 32),
    "sendfile": (40, 71),
    "copy_file_range": (326, 285),
    "splice": (275, 76),
    "tee": (276, 77),
    "getxattr": (191, 8),
    "lgetxattr": (192, 9),
    "fgetxattr": (193, 10),
    "listxattr": (194, 11),
    "llistxattr": (195, 12),
    "flistxattr": (196, 13),
    # descriptors, pipes and waiting for them
    "dup": (32, 23),
    "dup2": (33, None),
    "dup3": (292, 24),
    "pipe": (22, None),
    "pipe2": (293, 59),
    "poll": (7, None),
    "ppoll": (271, 73),
    "select": (23, None),
    "pselect6": (270, 72),
    "epoll_create": (213, None),
    "epoll_create1": (291, 20),
    "epoll_ctl": (233, 21),
    "epoll_wait": (232, None),
    "epoll_pwait": (281, 22),
    "epoll_pwait2": (441, 441),
    "eventfd": (284, None),
    "eventfd2": (290, 19),
    "timerfd_create": (283, 85),
    "timerfd_settime": (286, 86),
    "timerfd_gettime": (287, 87),
    # pairs of connected sockets, which event loops use
    "recvfrom": (45, 207),
    "recvmsg": (47, 212),
    "shutdown": (48, 210),
    "getsockopt": (55, 209),
    "getsockname": (51, 204),
    "getpeername": (52, 205),
    # memory that the limit on the address space counts
    "brk": (12, 214),
    "mmap": (9, 222),
    "munmap": (11, 215),
    "mremap": (25, 216),
    "mprotect": (10, 226),
    "madvise": (28, 233),
    "msync": (26, 227),
    "mincore": (27, 232),
    "mlock": (149, 228),
    "mlock2": (325, 284),
    "munlock": (150, 229),
    # threads, and the end of them
    "futex": (202, 98),
    "set_robust_list": (273, 99),
    "get_robust_list": (274, 100),
    "set_tid_address": (218, 96),
    "rseq": (334, 293),
    "gettid": (186, 178),
    "getcpu": (309, 168),
    "sched_yield": (24, 124),
    "exit": (60, 93),
    "exit_group": (231, 94),
    "arch_prctl": (158, None),
    "restart_syscall": (219, 128),
    "wait4": (61, 260),
    "waitid": (247, 95),
    # signals to itself
    "rt_sigaction": (13, 134),
    "rt_sigprocmask": (14, 135),
    "rt_sigreturn": (15, 139),
    "rt_sigpending": (127, 136),
    "rt_sigtimedwait": (128, 137),
    "rt_sigsuspend": (130, 133),
    "sigaltstack": (131, 132),
    "pause": (34, None),
    "alarm": (37, None),
    "getitimer": (36, 102),
    "setitimer": (38, 103),
    "signalfd": (282, None),
    "signalfd4": (289, 74),
    # clocks, random numbers
    "nanosleep": (35, 101),
    "clock_nanosleep": (230, 115),
    "clock_gettime": (228, 113),
    "clock_getres": (229, 114),
    "gettimeofday": (96, 169),
    "time": (201, None),
    "times": (100, 153),
    "getrandom": (318, 278),
    # what a process may know of itself
    "getpid": (39, 172),
    "getppid": (110, 173),
    "getuid": (102, 174),
    "geteuid": (107, 175),
    "getgid": (104, 176),
    "getegid": (108, 177),
    "getresuid": (118, 148),
    "getresgid": (120, 150),
    "getgroups": (115, 158),
    "getpgrp": (111, None),
    "getrlimit": (97, 163),
    "setrlimit": (160, 164),
    "getrusage": (98, 165),
    "uname": (63, 160),
    "sysinfo": (99, 179),
    "capget": (125, 90),
    "sched_get_priority_max": (146, 125),
    "sched_get_priority_min": (147, 126),
}
# Calls that change metadata and that Landlock does not block: allowed in a namespace only.
_METADATA: dict[str, tuple[int, int | None]] = {
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
}
_CLONE = 56, 220
_NEW_CALLS = 424  # from here on, numbers are the same everywhere and C libraries expect ENOSYS of older kernels

_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _KILL_PROCESS, _ERROR = 0x7FFF0000, 0x80000000, 0x00050000
_NUMBER_AT, _ARCH_AT = 0, 4
_THREAD = 0x00010000
_NAMESPACES = 0x7E020000  # the flags of clone that make namespaces

_Condition = tuple[
    int, int, int, bool
]  # where the value is, the test, its operand, its wanted result
_Row = tuple[int, int, int, int]


def _argument(index: int, *, high: bool = False) -> int:
    """Returns where the filter reads 32 bits of an argument; the kernel reads only the low ones of an int."""
    return 16 + 8 * index + 4 * high


def _one_of(index: int, *values: int) -> list[list[_Condition]]:
    return [[(_argument(index), _EQUAL, value, True)] for value in values]


def _by_arguments(own: int) -> dict[tuple[int, int], list[list[_Condition]]]:
    """Returns calls that are allowed for some arguments only: alternatives, each a list of conditions."""
    close_on_exec, non_blocking, stream, unix = 0o2000000, 0o4000, 1, 1
    pairs = [
        [(_argument(0), _EQUAL, unix, True), (_argument(1), _EQUAL, stream | flags, True)]
        for flags in (0, close_on_exec, non_blocking, close_on_exec | non_blocking)
    ]
    out_of_band, set_flags, signal_when_ready = 1, 4, 0o20000
    # Without an address and out-of-band data, which signals the receiver.
    send = [(_argument(4), _EQUAL, 0, True), (_argument(4, high=True), _EQUAL, 0, True)]
    send += [(_argument(3), _ANY_BIT, out_of_band, False)]
    # Duplicates, flags of the descriptor (0-3), locks (5-7, 36-38), sizes of pipes; but no owner, signal or lease,
    # with which the kernel signals other processes.
    fcntl = _one_of(1, 0, 1, 2, 3, 5, 6, 7, 36, 37, 38, 1030, 1031, 1032)
    fcntl += [
        [
            (_argument(1), _EQUAL, set_flags, True),
            (_argument(2), _ANY_BIT, signal_when_ready, False),
        ]
    ]
    # Inheritance, non-blocking mode, bytes to read, and whether a descriptor is a terminal and its size.
    ioctl = _one_of(1, 0x5450, 0x5451, 0x5421, 0x541B, 0x5401, 0x802C542A, 0x5413)
    return {
        (62, 129): _one_of(0, own),  # kill
        (234, 131): _one_of(0, own),  # tgkill
        (302, 261): _one_of(0, 0, own),  # prlimit64
        (121, 155): _one_of(0, 0, own),  # getpgid
        (124, 156): _one_of(0, 0, own),  # getsid
        (204, 123): _one_of(0, 0, own),  # sched_getaffinity
        (140, 141): _one_of(1, 0, own),  # getpriority
        (157, 167): _one_of(0, 15, 16),  # prctl: the name of a thread
        (53, 199): pairs,  # socketpair: a datagram socket could send to any address
        (44, 206): [send],  # sendto
        (72, 25): fcntl,
        (16, 29): ioctl,
    }


def knows_system_calls() -> bool:
    """Returns whether `filter_system_calls` supports this machine."""
    return sys.platform == "linux" and platform.machine() in _MACHINES and sys.maxsize > 2**32


def filter_system_calls(*, threads: bool, own_files_only: bool) -> None:
    """Denies, with an irreversible seccomp filter, all system calls except those that programs need.

    Args:
      threads: whether the process may start threads.
      own_files_only: whether the process can only reach its own files; if so, it may change their metadata.

    Raises:
      OSError: the kernel refuses the filter.
    """
    code = _filter(threads=threads, own_files_only=own_files_only)
    instructions = ctypes.create_string_buffer(code, len(code))
    program = struct.pack("@HP", len(code) // 8, ctypes.addressof(instructions))
    buffer = ctypes.create_string_buffer(program, len(program))
    kernel.prctl(kernel.NO_NEW_PRIVS, 1)
    kernel.prctl(kernel.SECCOMP, 2, ctypes.addressof(buffer))


def _filter(*, threads: bool, own_files_only: bool) -> bytes:
    """Returns the filter as BPF instructions of 8 bytes: operation, jump if true, jump if false, value."""
    column, arch = _MACHINES[platform.machine()]
    code: list[_Row] = [
        (_LOAD, 0, 0, _ARCH_AT),
        (_EQUAL, 1, 0, arch),  # not the 32-bit calls of the other kind of machine
        (_RETURN, 0, 0, _KILL_PROCESS),
        (_LOAD, 0, 0, _NUMBER_AT),
        (_AT_LEAST, 0, 1, 0x40000000),  # the 32-bit calls of x86-64
        (_RETURN, 0, 0, _KILL_PROCESS),
    ]
    names = _ALLOWED | _METADATA if own_files_only else _ALLOWED
    for number in (numbers[column] for numbers in names.values()):
        if number is not None:
            code += [(_EQUAL, 0, 1, number), (_RETURN, 0, 0, _ALLOW)]
    calls = _by_arguments(os.getpid())
    if threads:
        # clone3 has its flags in memory, where they cannot be read; the C library falls back on clone.
        flags = _argument(0)
        calls[_CLONE] = [[(flags, _ANY_BIT, _THREAD, True), (flags, _ANY_BIT, _NAMESPACES, False)]]
    denied = _RETURN, 0, 0, _ERROR | errno.EPERM
    for numbers, alternatives in calls.items():
        rows = [row for conditions in alternatives for row in _allow_if(conditions)] + [denied]
        code += [(_EQUAL, 0, len(rows), numbers[column]), *rows]
    code += [(_AT_LEAST, 0, 1, _NEW_CALLS), (_RETURN, 0, 0, _ERROR | errno.ENOSYS), denied]
    return b"".join(struct.pack("=HBBI", *row) for row in code)


def _allow_if(conditions: list[_Condition]) -> list[_Row]:
    """Returns instructions that allow the call if all conditions hold, and else continue after them."""
    rows: list[_Row] = []
    for place, (offset, test, operand, wanted) in enumerate(conditions):
        after = 2 * (len(conditions) - place - 1) + 1
        jumps = (0, after) if wanted else (after, 0)
        rows += [(_LOAD, 0, 0, offset), (test, *jumps, operand)]
    return [*rows, (_RETURN, 0, 0, _ALLOW)]
