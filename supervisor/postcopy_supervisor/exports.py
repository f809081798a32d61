"""Exports: a thread writes a whole block to a file from the supervisor's own mapping, while its pages arrive.

It calls write(2) on missing memory. The kernel stops it there, without the GIL, until client zero's fault is resolved.
The file gets its name only when it is complete. Its directory is opened once, and every name is looked up in it without
following a link: another user may have made one there, and may rename the directory meanwhile. A partial file of a
killed supervisor is recognised by its lock, which no process holds any more, and is removed when the next export to the
same name begins."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import threading
import time

from postcopy_protocol.errors import BadInput
from postcopy_protocol.messages import ExportProgress

from .blocks import RamBlock

PIECE = 1 << 20
FORGET_AFTER = 16 << 20
"""Bytes after which page tables of written pages are dropped: they count as the supervisor's memory."""
UNASKED_SECONDS = 10.0
_NEW_FILE = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC


class Export(threading.Thread):
    """One job. ``progress`` may be called from any thread."""

    def __init__(self, job: int, block: RamBlock, path: str) -> None:
        super().__init__(name=f"export-{block.name}", daemon=True)
        self.job, self.block = job, block
        self.asked = time.monotonic()
        self._directory, self._name = os.path.split(path)
        self._partial = f"{self._name}.partial-{os.getpid()}-{job}"
        self._written = 0
        self._state = "running"
        self._detail = ""
        self._cancelled = False
        with contextlib.ExitStack() as stack:
            try:
                self._place = os.open(self._directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
                stack.callback(os.close, self._place)
                _refuse_others(self._place, self._name, path)
                _remove_left(self._place, self._name)
                self._file = os.open(self._partial, _NEW_FILE, 0o600, dir_fd=self._place)
                with contextlib.suppress(OSError):  # a file system without locks
                    fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                raise BadInput(f"cannot write {path}: {error.strerror}") from None
            stack.pop_all()

    def run(self) -> None:
        try:
            state = self._finish()
        except OSError as error:
            lost = error.errno == errno.EFAULT
            self._detail = f"a page at or behind byte {self._written} is lost" if lost else str(error.strerror)
            state = "cancelled" if self._cancelled else "failed"
        finally:
            os.close(self._file)
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self._partial, dir_fd=self._place)
            os.close(self._place)
        # Last of all: after it no partial file is left, and an ending supervisor waits for exports that run.
        self._state = state

    def _finish(self) -> str:
        self._write()
        if self._cancelled:
            return "cancelled"
        os.fsync(self._file)
        os.fchmod(self._file, 0o666 & ~_umask())
        os.replace(self._partial, self._name, src_dir_fd=self._place, dst_dir_fd=self._place)
        return "done"

    def _write(self) -> None:
        view = self.block.mapping.view(self.block.size, writable=False)
        forgotten = 0
        while self._written < self.block.size and not self._cancelled:
            self._written += os.write(self._file, view[self._written : self._written + PIECE])
            if self._written - forgotten >= FORGET_AFTER:
                forgotten = self._written
                self.block.forget_own_pages()

    def cancel(self) -> None:
        """Stop between two pieces; client zero must give up the page that the thread waits for."""
        self._cancelled = True

    @property
    def running(self) -> bool:
        return self._state == "running"

    def progress(self) -> ExportProgress:
        return ExportProgress(self.job, self._state, self._written, self.block.size, self._detail)


class Exports:
    """Jobs by number. An export is cancelled when its progress is not asked for: its asker has died."""

    def __init__(self) -> None:
        self._jobs: dict[int, Export] = {}
        self._next = 1

    def start(self, block: RamBlock, path: str) -> Export:
        """Start a job. Raises BadInput when the file cannot be made, or the block is being exported already."""
        if not os.path.isabs(path):
            raise BadInput(f"{path}: an export needs an absolute path")
        if not os.path.basename(path):
            raise BadInput(f"cannot write {path}: it is a directory")
        if any(export.running and export.block is block for export in self._jobs.values()):
            raise BadInput(f"block {block.name} is being exported already")
        export = self._jobs[self._next] = Export(self._next, block, path)
        self._next += 1
        export.start()
        return export

    def get(self, job: int) -> Export | None:
        """The job; asking for it keeps it alive."""
        export = self._jobs.get(job)
        if export is not None:
            export.asked = time.monotonic()
        return export

    def unasked(self) -> list[Export]:
        """Running jobs that were not asked for in UNASKED_SECONDS; finished ones are forgotten then."""
        late = time.monotonic() - UNASKED_SECONDS
        old = [export for export in self._jobs.values() if export.asked < late]
        for export in old:
            if not export.running:
                del self._jobs[export.job]
        return [export for export in old if export.running]

    @property
    def running(self) -> list[Export]:
        return [export for export in self._jobs.values() if export.running]


def _refuse_others(place: int, name: str, path: str) -> None:
    """Raises BadInput for a name that is there and no regular file."""
    with contextlib.suppress(FileNotFoundError):
        mode = os.stat(name, dir_fd=place, follow_symlinks=False).st_mode
        if stat.S_ISLNK(mode):
            raise BadInput(f"cannot write {path}: it is a symbolic link; name the file that it points to")
        if not stat.S_ISREG(mode):
            raise BadInput(f"cannot write {path}: it is there and no regular file")


def _remove_left(place: int, name: str) -> None:
    """Remove partial files that killed supervisors left for ``name`` in the directory ``place``."""
    beginning = name + ".partial-"
    with contextlib.suppress(OSError), os.scandir(place) as entries:
        for entry in entries:
            numbers = entry.name.removeprefix(beginning).split("-")
            if entry.name.startswith(beginning) and len(numbers) == 2 and all(number.isdigit() for number in numbers):
                _remove_if_left(place, entry.name)


def _remove_if_left(place: int, partial: str) -> None:
    """Remove a partial file of this user that no process is writing: its writer holds the lock while it lives."""
    try:
        flags = os.O_WRONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        file = os.open(partial, flags, dir_fd=place)
    except OSError:
        return
    try:
        found = os.fstat(file)
        if stat.S_ISREG(found.st_mode) and found.st_uid == os.geteuid():
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            os.unlink(partial, dir_fd=place)
    except OSError:
        return
    finally:
        os.close(file)


def _umask() -> int:
    """The process's umask; umask(2) could only be read by setting it."""
    with open("/proc/self/status", encoding="ascii", errors="replace") as status:
        for line in status:
            if line.startswith("Umask:"):
                return int(line.split()[1], 8)
    return 0o077
