"""Programs of this checkout start warm in tests: as forks of an interpreter that has imported them already.

The imports of a supervisor, its custodian, a source or a command cost 0.2 to 0.4 s of processor time, and the tests
start some thousands. Each test process has one zygote, ``python -m tests.system.zygote``; its children run the program
as ``__main__``, with their own arguments, environment, standard streams and session. ``subprocess.Popen`` starts a
program there where that makes no difference, and otherwise as ever. POSTCOPY_TEST_COLD=1 makes it so for all.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import gc
import json
import os
import resource
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from postcopy_kernel import crashpoints

ROOT = Path(__file__).resolve().parents[2]
WINGS = ("protocol", "kernel", "wire", "supervisor", "workers", "sources", "client")
PUPPET = Path(__file__).with_name("puppet.py")
CUSTODIAN = "postcopy_workers.custodian"
PROGRAMS = ("postcopy", "postcopy_sources", "postcopy_supervisor", "benchmarks.client")
"""What starts warm as ``-m PROGRAM``, beside the puppet."""
IMPORTED = (
    *("postcopy.client", "postcopy.sigbus", "postcopy.commands", "postcopy.supervisor", "random"),
    "postcopy.watching",
    *("postcopy_kernel.program_start", "postcopy_wire.router", "prctl", "rich.progress", "rich.table"),
    *("postcopy_supervisor.settings", "postcopy_supervisor.assembly", "postcopy_sources.serving"),
    # Not the custodian itself, which runs as __main__.
    *("postcopy_workers.forking", "postcopy_workers.takeover_socket", "postcopy_workers.life_records"),
)
AT_IMPORT = ("PYTHON", "LD_", "LC_", "LANG", "COVERAGE", "POSTCOPY_PURE", "POSTCOPY_TEST_COLD")
"""How environment variables begin that an interpreter or an import reads."""
LIMITS = (resource.RLIMIT_NOFILE, resource.RLIMIT_AS, resource.RLIMIT_NPROC, resource.RLIMIT_FSIZE)
PR_GET_TID_ADDRESS = 40
SYS_CLONE3 = 435
CLONE_PARENT, CLONE_CHILD_CLEARTID, CLONE_CHILD_SETTID = 0x8000, 0x200000, 0x1000000
MAX_REQUEST = 1 << 17
TITLE = "x" * 160
"""An argument of no meaning: a program writes its title over its arguments."""


class Popen(subprocess.Popen[Any]):
    """``subprocess.Popen``, with warm starts. The process is a child of this one, as it would be otherwise."""

    def _execute_child(self, args: Any, *rest: Any) -> None:
        words, env, pipes = _words(args), rest[5], rest[9:15]
        plain = not any(rest[:2]) and all(right in (None, -1) for right in rest[16:20])
        plain = plain and (rest[4] is None or Path(rest[4]) == Path.cwd())
        environment = dict(os.environ if env is None else env)
        if zygote is None or not (words and plain and zygote.fits(environment)):
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        sys.audit("subprocess.Popen", sys.executable, words, None, environment)
        ends = (pipes[0], pipes[3], pipes[5])  # the child's of stdin, stdout, stderr; -1: ours
        streams = [end if end >= 0 else number for number, end in enumerate(ends)]
        self.pid = zygote.fork(words, environment, [*streams, *rest[3]], [0, 1, 2, *rest[3]])
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


def _words(command: Any) -> list[str]:
    """What a program that starts warm is given, ``-m PROGRAM ARGUMENT...`` or a file first; nothing for another."""
    given = [command] if isinstance(command, (str, bytes, Path)) else list(command)
    words: list[str] = [os.fsdecode(word) for word in given]
    if words[0] == sys.executable:
        del words[: 2 if words[1:2] == ["-P"] else 1]
        if words[:1] == [str(PUPPET)] or (words[:1] == ["-m"] and words[1] in PROGRAMS):
            return words
    return []


class Zygote:
    """The parent of warm processes."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._conditions = _conditions(environment)
        self._lock = threading.Lock()
        self._socket, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            command = [sys.executable, "-m", "tests.system.zygote", str(theirs.fileno()), TITLE]
            self._process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=dict(environment))
        self.pid = self._process.pid

    def fits(self, environment: Mapping[str, str]) -> bool:
        """Would a fork run under the same conditions as a process that is started here and now?"""
        return _conditions(environment) == self._conditions

    def fork(self, words: list[str], environment: dict[str, str], descriptors: list[int], numbers: list[int]) -> int:
        """Returns the pid; ``numbers`` are those of the descriptors in the child."""
        request = {"words": words, "environment": environment, "numbers": numbers}
        request["processors"] = [*os.sched_getaffinity(0)]
        with self._lock:
            socket.send_fds(self._socket, [json.dumps(request).encode()], descriptors)
            answer = self._socket.recv(64)
        assert answer, "the zygote has ended"
        sessions.add(int(answer))
        return int(answer)

    def close(self) -> None:
        self._socket.close()
        self._process.wait(10)


def _conditions(environment: Mapping[str, str]) -> tuple[Any, ...]:
    """What a fork inherits from the zygote and a new process from the test."""
    ours = {str(ROOT), *(str(ROOT / wing) for wing in WINGS), ""}
    return (
        {name: value for name, value in environment.items() if name.startswith(AT_IMPORT) and name != "PYTHONPATH"},
        {*environment.get("PYTHONPATH", "").split(os.pathsep)} - ours,
        Path.cwd(),
        [Path(f"/proc/thread-self/ns/{kind}").readlink() for kind in ("net", "mnt", "user")],
        [resource.getrlimit(limit) for limit in LIMITS],
        Path("/proc/thread-self/cgroup").read_text(),
        os.getresuid(),
        signal.pthread_sigmask(signal.SIG_BLOCK, []),
        os.umask(os.umask(0o022)),
    )


zygote: Zygote | None = None
"""The zygote of this test process; None before ``open_zygote``."""
sessions: set[int] = set()
"""Those of the programs that the test of this moment has started warm: their orphans are in them."""
_ordinary = subprocess.Popen


def open_zygote(environment: Mapping[str, str]) -> None:
    global zygote
    if not os.environ.get("POSTCOPY_TEST_COLD"):
        zygote = Zygote(environment)
        subprocess.Popen = Popen  # type: ignore[misc]


def close_zygote() -> None:
    global zygote
    if zygote is not None:
        subprocess.Popen = _ordinary  # type: ignore[misc]
        zygote.close()
        zygote = None


def of_this_test(pid: int) -> bool:
    """Was this process started by the test that runs, or by a process of it? Raises OSError when it is gone."""
    if os.getsid(pid) in sessions:
        return True
    mark = f"POSTCOPY_TEST_ID={os.environ['POSTCOPY_TEST_ID']}".encode()
    return mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")


# --- the process of the zygote ----------------------------------------------------------------------------------------


class _WithCustodian(subprocess.Popen[Any]):
    """``subprocess.Popen`` in a supervisor: the process of its first custodian is there, and gets its arguments."""

    def _execute_child(self, args: list[str], *rest: Any) -> None:
        if CUSTODIAN not in args or not _prepared:
            super()._execute_child(args, *rest)  # type: ignore[misc]
            return
        self.pid, connection = _prepared.popitem()
        pass_fds, env, pipes = list(rest[3]), rest[5], rest[9:15]
        request = {"words": args[args.index("-m") :], "environment": dict(env), "numbers": pass_fds}
        with connection:
            socket.send_fds(connection, [json.dumps(request).encode()], pass_fds)
        self._child_created = True
        self._close_pipe_fds(*pipes)  # type: ignore[attr-defined]


_prepared: dict[int, socket.socket] = {}
"""The custodian of this supervisor by its pid, before it is started."""


def _prepare_custodian() -> dict[str, Any] | None:
    """Fork what will be this supervisor's custodian, as long as there is no memory of a block and no thread. Returns
    None in the supervisor, and in the custodian what it must run."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    pid = os.fork()
    if pid:
        theirs.close()
        _prepared[pid] = ours
        subprocess.Popen = _WithCustodian  # type: ignore[misc]
        return None
    ours.close()
    message, descriptors, _flags, _address = socket.recv_fds(theirs, MAX_REQUEST, 8)
    theirs.close()
    if not message:  # the supervisor was refused, or has ended
        os._exit(0)
    request: dict[str, Any] = json.loads(message)
    null = os.open(os.devnull, os.O_RDWR)
    _place([null, null, *descriptors], [0, 1, *request["numbers"]])
    return request


def _place(descriptors: list[int], numbers: list[int]) -> None:
    """Give descriptors these numbers, which may be numbers of others of them."""
    high = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, 64 + max(numbers)) for descriptor in descriptors]
    for descriptor in {*descriptors} - {0, 1, 2}:
        os.close(descriptor)
    for descriptor, number in zip(high, numbers, strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)


def _fork_sibling() -> int:
    """Fork a child of our parent: as os.fork() otherwise, with CLONE_PARENT."""
    libc, python = ctypes.PyDLL(None, use_errno=True), ctypes.pythonapi
    thread_id = ctypes.c_void_p()  # where the C library keeps it
    if libc.prctl(PR_GET_TID_ADDRESS, ctypes.byref(thread_id)):
        raise OSError(ctypes.get_errno(), "PR_GET_TID_ADDRESS")
    flags = CLONE_PARENT | CLONE_CHILD_SETTID | CLONE_CHILD_CLEARTID
    arguments = (ctypes.c_uint64 * 8)(flags, 0, thread_id.value or 0)
    python.PyOS_BeforeFork()
    pid: int = libc.syscall(SYS_CLONE3, arguments, ctypes.sizeof(arguments))
    if pid:
        python.PyOS_AfterFork_Parent()
        return pid
    python.PyOS_AfterFork_Child()
    return 0


def _serve(connection: socket.socket) -> dict[str, Any] | None:
    """Answer requests until the test process ends; in each child return what it must run."""
    while True:
        message, descriptors, _flags, _address = socket.recv_fds(connection, MAX_REQUEST, 16)
        if not message:
            return None
        pid = _fork_sibling()
        if pid == 0:
            request: dict[str, Any] = json.loads(message)
            connection.close()
            os.setsid()
            os.sched_setaffinity(0, request["processors"])
            _place(descriptors, request["numbers"])
            if "postcopy_supervisor" in request["words"] and "--recover" not in request["words"]:
                return _prepare_custodian() or request
            return request
        for descriptor in descriptors:
            os.close(descriptor)
        connection.send(str(pid).encode())


def main() -> None:
    connection = socket.socket(fileno=int(sys.argv[1]))
    connection.set_inheritable(False)
    for module in IMPORTED:
        with contextlib.suppress(ImportError):  # what is missing is so for every start
            import_module(module)
    import_module("postcopy.commands").application()  # imports each command
    gc.collect()
    gc.freeze()  # what is imported stays shared
    try:
        request = _serve(connection)
    except KeyboardInterrupt:  # Ctrl-C for the whole run
        return
    if request is None:
        return
    tempfile.tempdir = None
    os.environ.clear()
    os.environ.update(request["environment"])
    crashpoints.arm(os.environ.get(crashpoints.VARIABLE, ""))
    # Those that are there know of the zygote's files whether they can seek.
    sys.stdin = sys.__stdin__ = open(0, closefd=False)  # type: ignore[misc]  # noqa: SIM115
    sys.stdout = sys.__stdout__ = open(1, "w", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    sys.stderr = sys.__stderr__ = open(2, "w", 1, errors="backslashreplace", closefd=False)  # type: ignore[misc]  # noqa: SIM115
    option, *arguments = request["words"]
    if option == "-m":
        sys.argv = arguments
        runpy.run_module(arguments[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv = [option, *arguments]
        runpy.run_path(option, run_name="__main__")


if __name__ == "__main__":
    main()
