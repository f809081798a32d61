"""The runtime directory, claimed for one supervisor and cleaned after a crashed one; notifications to systemd."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import logging
import os
import socket
import stat
from collections.abc import Iterator

from postcopy_protocol.errors import BadInput
from postcopy_protocol.runtime_paths import (
    CUSTODIAN,
    DOOR,
    LOCK,
    PRIVATE,
    ROUTER,
    custodian_path,
    door_path,
    router_endpoint,
)

log = logging.getLogger(__name__)

OUR_MODE, PRIVATE_MODE = 0o711, 0o700
OUR_NAMES = frozenset({DOOR, PRIVATE})


class RuntimeDirectory:
    """Claimed from construction to ``close``. Raises BadInput, in one line, when it cannot be claimed."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.door = door_path(path)
        self.endpoint = router_endpoint(path)
        self.router = os.path.join(path, ROUTER)
        self.custodian = custodian_path(path)
        self._make()
        self._lock = self._claim()
        self._clean()

    def _make(self) -> None:
        _make(self.path, OUR_MODE)
        _make(os.path.join(self.path, PRIVATE), PRIVATE_MODE)

    def claim_again(self) -> None:
        """Make the directory again, without sockets, and claim it: it was removed or renamed. Raises BadInput when that
        fails, or another supervisor has claimed it since."""
        self._make()
        if not self._is_ours():
            fresh = self._claim()
            os.close(self._lock)
            self._lock = fresh
        self._clean()

    def _is_ours(self) -> bool:
        """Is the lock at our path the one that we hold? The directory may have been renamed, and made by another."""
        try:
            return os.path.samestat(os.fstat(self._lock), os.lstat(os.path.join(self.path, LOCK)))
        except OSError:
            return False

    def _claim(self) -> int:
        path = os.path.join(self.path, LOCK)
        try:
            lock = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        except OSError as error:
            raise BadInput(f"runtime directory {self.path}: cannot make {LOCK}: {error.strerror}") from None
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EAGAIN, errno.EACCES):
                os.close(lock)
                raise BadInput(
                    f"runtime directory {self.path}: its file system has no locks ({error.strerror}); "
                    "choose a --runtime-dir on a local one, such as /run"
                ) from None
            owner = os.pread(lock, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(lock)
            raise BadInput(
                f"runtime directory {self.path} is already served by process {owner}; "
                "stop it (postcopy stop) or choose another --runtime-dir"
            ) from None
        try:
            # Overwrite, then truncate: on a full disk a successor needs no disk block that its predecessor had not.
            os.ftruncate(lock, os.pwrite(lock, b"%d\n" % os.getpid(), 0))
        except OSError as error:
            os.unlink(path)
            os.close(lock)
            self._remove_directories()
            raise BadInput(f"runtime directory {self.path}: cannot write {LOCK}: {error.strerror}") from None
        return lock

    def _clean(self) -> None:
        """Remove the sockets of a dead supervisor; the lock is ours."""
        for name in (DOOR, ROUTER, CUSTODIAN):
            path = os.path.join(self.path, name)
            if os.path.isdir(path):
                text = f"{name} is a directory; remove it, or choose another with --runtime-dir"
                raise BadInput(f"runtime directory {self.path}: {text}")
            if name == CUSTODIAN:  # it may live
                continue
            try:
                os.unlink(path)
            except FileNotFoundError:
                continue
            except OSError as error:
                raise BadInput(f"runtime directory {self.path}: cannot remove {name}: {error.strerror}") from None

    def remove_custodian_socket(self) -> None:
        """After the end of the custodian; one that was killed while ending leaves its socket behind."""
        if not self._is_ours():
            return
        with contextlib.suppress(OSError):
            os.unlink(self.custodian)

    def close(self) -> None:
        """Remove the sockets and give up the claim. The directory stays if other files are in it."""
        ours = self._is_ours()
        for name in (DOOR, ROUTER, LOCK) if ours else ():
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(self.path, name))
        os.close(self._lock)
        if ours:
            self._remove_directories()

    def _remove_directories(self) -> None:
        for directory in (os.path.join(self.path, PRIVATE), self.path):
            with contextlib.suppress(OSError):
                os.rmdir(directory)


@contextlib.contextmanager
def binding(path: str) -> Iterator[None]:
    """Wrap the bind of the socket ``path``: raises BadInput, in one line, when it fails (a full disk, say)."""
    try:
        yield
    except OSError as error:
        raise BadInput(f"cannot make the socket {path}: {os.strerror(error.errno or 0)}") from None


def _make(path: str, mode: int) -> None:
    """Make a directory of this mode, or take one that is there, if it is ours alone. Raises BadInput for others, and
    leaves them as they are."""
    try:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        with contextlib.suppress(FileExistsError):
            os.mkdir(path, mode)
        _check_ours(path)
        if mode == PRIVATE_MODE or not set(os.listdir(path)) - OUR_NAMES:
            os.chmod(path, mode)  # mkdir obeys the umask; a directory with other files in it keeps its mode
    except OSError as error:
        raise BadInput(f"runtime directory {path}: {error.strerror}; choose another with --runtime-dir") from None


def _check_ours(path: str) -> None:
    """Raise BadInput unless only this user may make and remove files in the directory, and all in it are its own."""
    found, own = os.lstat(path), os.geteuid()
    another = "choose another with --runtime-dir"
    if not stat.S_ISDIR(found.st_mode):
        raise BadInput(f"runtime directory {path} is not a directory")
    if found.st_uid != own:
        raise BadInput(f"runtime directory {path} belongs to user {found.st_uid}, and this is user {own}; {another}")
    if found.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        mode = stat.S_IMODE(found.st_mode)
        raise BadInput(f"runtime directory {path} is shared: other users may write to it (mode {mode:o}); {another}")
    for entry in os.scandir(path):
        if (owner := entry.stat(follow_symlinks=False).st_uid) != own:
            raise BadInput(f"runtime directory {path} has a file of user {owner}: {entry.name}; {another}")


def cgroup_procs(directory: str) -> int:
    """Open the file of a cgroup into which workers write themselves: they inherit it and need no path or privilege."""
    path = os.path.join(directory, "cgroup.procs")
    try:
        opened = os.open(path, os.O_WRONLY | os.O_CLOEXEC)
    except OSError as error:
        raise BadInput(
            f"--worker-cgroup {directory}: {path} cannot be written: {error.strerror}; "
            "make the cgroup (mkdir) and let this user write its cgroup.procs"
        ) from None
    return opened


def notify(state: str, patience: float = 2.0) -> None:
    """Send a state to the service manager, if there is one (sd_notify(3)). Waits for one that does not read at most
    ``patience`` seconds, because clients are waiting: its queue is short."""
    path = os.environ.get("NOTIFY_SOCKET")
    if not path:
        return
    address = "\0" + path[1:] if path.startswith("@") else path
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.settimeout(patience)
            channel.sendto(state.encode(), address)
    except OSError as error:
        log.warning("cannot notify %s: %s", path, error)


class Heartbeat:
    """Sends WATCHDOG=1 to a service manager that asks for it (sd_watchdog_enabled(3)), twice as often as it asks. The
    main loop calls it. When that hangs, the manager ends the supervisor and the next one recovers."""

    def __init__(self) -> None:
        wanted, whose = os.environ.get("WATCHDOG_USEC", ""), os.environ.get("WATCHDOG_PID", "")
        ours = whose in ("", str(os.getpid()))
        self._every = int(wanted) / 2e6 if wanted.isdigit() and ours else 0.0
        self._sent = 0.0

    def tick(self, now: float) -> None:
        """``now`` in seconds, monotonic."""
        if self._every and now - self._sent >= self._every:
            self._sent = now
            notify("WATCHDOG=1", 0.0)
