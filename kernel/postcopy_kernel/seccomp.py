"""A seccomp filter for processes that only answer page faults: calls that they never make are refused (EPERM).

Such a process starts no program or process, traces no other, opens and changes nothing by path, has only AF_UNIX
sockets and never listens, mounts nothing, makes no executable memory and signals only itself. A system call of another
architecture kills the process: its numbers mean other calls, which would bypass the filter.

The filter lists denied calls, not allowed ones. Python, libc and libzmq choose their calls by kernel and version, and
the purpose is to deny tools to an attacker who controls the process. Calls that are allowed by number alone (read,
ioctl and all others of the fault path) cost nothing since Linux 5.11: the kernel finds them in a bitmap and does not
run the filter.

No binding is used: pyseccomp (last release 2021) needs libseccomp, and the library's own binding is not on PyPI.

Example::

    found = prepare()
    if found is not None:
        found.restrict()
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import struct
from dataclasses import dataclass
from typing import Final

from .process import set_no_new_privs

_LOAD: Final = 0x20  # BPF_LD | BPF_W | BPF_ABS
_EQUAL: Final = 0x15  # BPF_JMP | BPF_JEQ | BPF_K
_AT_LEAST: Final = 0x35  # BPF_JMP | BPF_JGE | BPF_K
_ANY_BIT: Final = 0x45  # BPF_JMP | BPF_JSET | BPF_K
_RETURN: Final = 0x06  # BPF_RET | BPF_K

_NUMBER, _ARCHITECTURE, _ARGUMENTS = 0, 4, 16  # offsets in struct seccomp_data
ALLOW: Final = 0x7FFF0000
KILL: Final = 0x80000000
DENY: Final = 0x00050000 | errno.EPERM
NO_SUCH_CALL: Final = 0x00050000 | errno.ENOSYS

_X32: Final = 0x40000000  # marks calls of the x32 ABI, which have numbers of their own
_CLONE_THREAD: Final = 0x10000
_PROT_EXEC: Final = 4
_SET_MODE_FILTER: Final = 1
_SPECULATION: Final = 4  # without the mitigations of old kernels, which would slow every fault

_X86_64, _AARCH64 = 0xC000003E, 0xC00000B7

_TABLE: Final = {
    # name, number on x86_64, number on aarch64 (-: there is no such call). From 424 on they are the same everywhere.
    "programs and processes": """
        execve 59 221, execveat 322 281, fork 57 -, vfork 58 -, ptrace 101 117, process_vm_readv 310 270,
        process_vm_writev 311 271, process_madvise 440 440, process_mrelease 448 448, pidfd_getfd 438 438,
        pidfd_send_signal 424 424, kcmp 312 272, tkill 200 130, rt_sigqueueinfo 129 138,
        rt_tgsigqueueinfo 297 240, unshare 272 97, setns 308 268, personality 135 92""",
    "sockets, except those that it connects": "bind 49 200, listen 50 201, accept 43 202, accept4 288 242",
    "paths": """
        open 2 -, openat 257 56, openat2 437 437, creat 85 -, open_by_handle_at 304 265,
        name_to_handle_at 303 264, truncate 76 45, chmod 90 -, fchmod 91 52, fchmodat 268 53, fchmodat2 452 452,
        chown 92 -, fchown 93 55, lchown 94 -, fchownat 260 54, link 86 -, linkat 265 37, symlink 88 -,
        symlinkat 266 36, unlink 87 -, unlinkat 263 35, rename 82 -, renameat 264 38, renameat2 316 276,
        mkdir 83 -, mkdirat 258 34, rmdir 84 -, mknod 133 -, mknodat 259 33, utime 132 -, utimes 235 -,
        futimesat 261 -, utimensat 280 88, setxattr 188 5, lsetxattr 189 6, removexattr 197 14,
        lremovexattr 198 15, setxattrat 463 463, removexattrat 466 466, fanotify_init 300 262""",
    "file systems": """
        mount 165 40, umount2 166 39, pivot_root 155 41, chroot 161 51, move_mount 429 429, open_tree 428 428,
        open_tree_attr 467 467, fsopen 430 430, fsconfig 431 431, fsmount 432 432, fspick 433 433,
        mount_setattr 442 442, swapon 167 224, swapoff 168 225, quotactl 179 60, quotactl_fd 443 443""",
    "the kernel itself": """
        bpf 321 280, perf_event_open 298 241, io_uring_setup 425 425, io_uring_enter 426 426,
        io_uring_register 427 427, add_key 248 217, request_key 249 218, keyctl 250 219, kexec_load 246 104,
        kexec_file_load 320 294, init_module 175 105, finit_module 313 273, delete_module 176 106, reboot 169 142,
        acct 163 89, syslog 103 116, vhangup 153 58, iopl 172 -, ioperm 173 -, modify_ldt 154 -,
        settimeofday 164 170, clock_settime 227 112, adjtimex 159 171, clock_adjtime 305 266, sethostname 170 161,
        setdomainname 171 162, move_pages 279 239, migrate_pages 256 238""",
}
DENIED: Final[dict[str, tuple[int | None, int | None]]] = {
    name: (None if first == "-" else int(first), None if second == "-" else int(second))
    for calls in _TABLE.values()
    for name, first, second in map(str.split, calls.split(","))
}

Instruction = tuple[int, int, int, int]
"""Code, jump if true, jump if false (instructions to skip), operand."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long


@dataclass(frozen=True, slots=True)
class Architecture:
    """Its audit number, its column in ``DENIED``, and the numbers of the calls with a condition."""

    audit: int
    column: int
    seccomp: int
    socket: int
    socketpair: int
    clone: int
    kill: int
    tgkill: int
    mmap: int
    mprotect: int
    pkey_mprotect: int


ARCHITECTURES: Final = {
    "x86_64": Architecture(_X86_64, 0, 317, 41, 53, 56, 62, 234, 9, 10, 329),
    "aarch64": Architecture(_AARCH64, 1, 277, 198, 199, 220, 129, 131, 222, 226, 288),
}
_CLONE3: Final = 435
_INSTRUCTION: Final = struct.Struct("=HBBI")
_OPERAND: Final = 4
_OWN_PID: Final = 0x7FFFFFFF  # stands for the pid until it is known


class _Program(ctypes.Structure):
    """struct sock_fprog."""

    _fields_ = (("length", ctypes.c_ushort), ("instructions", ctypes.c_void_p))


def architecture() -> Architecture | None:
    """The architecture of this process, if there is a filter for it."""
    return ARCHITECTURES.get(os.uname().machine) if struct.calcsize("P") == 8 else None


def available() -> bool:
    """Whether this kernel has seccomp filters, and there is a filter for its architecture."""
    return architecture() is not None and os.path.exists("/proc/sys/kernel/seccomp/actions_avail")


def program(of: Architecture, pid: int) -> list[Instruction]:
    """The filter, for a process with this pid."""
    code: list[Instruction] = [(_LOAD, 0, 0, _ARCHITECTURE), (_EQUAL, 1, 0, of.audit), (_RETURN, 0, 0, KILL)]
    code.append((_LOAD, 0, 0, _NUMBER))
    if of.audit == _X86_64:
        code += [(_AT_LEAST, 0, 1, _X32), (_RETURN, 0, 0, KILL)]
    for number in (of.socket, of.socketpair):
        code += _conditional(number, 0, (_EQUAL, socket.AF_UNIX), ALLOW, DENY)
    code += _conditional(of.clone, 0, (_ANY_BIT, _CLONE_THREAD), ALLOW, DENY)
    code += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, NO_SUCH_CALL)]  # its flags are in memory: libc uses clone then
    for number in (of.kill, of.tgkill):  # abort() is the second
        code += _conditional(number, 0, (_EQUAL, pid), ALLOW, DENY)
    for number in (of.mmap, of.mprotect, of.pkey_mprotect):
        code += _conditional(number, 2, (_ANY_BIT, _PROT_EXEC), DENY, ALLOW)
    refused = sorted(found for numbers in DENIED.values() if (found := numbers[of.column]) is not None)
    return [*code, *_search(refused)]


def _search(refused: list[int]) -> list[Instruction]:
    """Binary search for the number: when a filter is installed, for every worker, the kernel runs it for every
    number."""
    if len(refused) <= 3:
        code = [(_EQUAL, len(refused) - at, 0, number) for at, number in enumerate(refused)]
        return [*code, (_RETURN, 0, 0, ALLOW), (_RETURN, 0, 0, DENY)]
    half = len(refused) // 2
    low, high = _search(refused[:half]), _search(refused[half:])
    # A jump skips 255 instructions at most, which is enough for a list of some 200 numbers.
    return [(_AT_LEAST, len(low), 0, refused[half]), *low, *high]


def _conditional(number: int, argument: int, test: tuple[int, int], true: int, false: int) -> list[Instruction]:
    """A call that depends on an argument (on its lower 32 bits; both architectures are little-endian)."""
    jump, operand = test
    return [
        (_EQUAL, 0, 4, number),
        (_LOAD, 0, 0, _ARGUMENTS + 8 * argument),
        (jump, 0, 1, operand),
        (_RETURN, 0, 0, true),
        (_RETURN, 0, 0, false),
    ]


class Filter:
    """The filter, assembled once. Every process that a custodian forks inserts its own pid and installs it."""

    def __init__(self, of: Architecture) -> None:
        self._call = of.seccomp
        code = program(of, _OWN_PID)
        places = [at for at, line in enumerate(code) if line == (_EQUAL, 0, 1, _OWN_PID)]
        self._pid_at = [at * _INSTRUCTION.size + _OPERAND for at in places]
        packed = b"".join(_INSTRUCTION.pack(*line) for line in code)
        self._buffer = ctypes.create_string_buffer(packed, len(packed))
        self._program = _Program(len(code), ctypes.addressof(self._buffer))

    def restrict(self) -> bool:
        """Install the filter for the calling thread and its children: call it before there are other threads.

        Returns False if this kernel has no filters. Sets no_new_privs. Raises OSError."""
        for at in self._pid_at:
            struct.pack_into("=I", self._buffer, at, os.getpid())
        set_no_new_privs()
        arguments = ctypes.c_long(_SET_MODE_FILTER), ctypes.c_long(_SPECULATION), ctypes.byref(self._program)
        if _libc.syscall(ctypes.c_long(self._call), *arguments) == 0:
            return True
        code = ctypes.get_errno()
        if code in (errno.ENOSYS, errno.EINVAL):  # a kernel without filters
            return False
        raise OSError(code, f"seccomp: {os.strerror(code)}")


def prepare() -> Filter | None:
    """The filter for this machine, or None."""
    here = architecture()
    return Filter(here) if here is not None else None
