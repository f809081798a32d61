"""Stands between ``postcopy source qemu`` and a real QEMU: something happens at a certain command, or in the middle of
the stream."""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from tests.system.qemu import Vm

Act = Callable[[], object]
EARLY = 3 << 20  # bytes of a stream, of which much is still to come


class Between:
    """``options`` are those of the source. ``at`` is called once, when the source has sent ``command``. The stream of
    the migration is held after ``most`` bytes, until ``go_on``; ``held`` is set then."""

    def __init__(self, vm: Vm, place: Path, command: str = "", at: Act = bool, most: int = 1 << 60) -> None:
        self.options = ("--migration", f"unix:{place}/mig", "--qmp", f"{place}/between")
        self.held, self._go_on = threading.Event(), threading.Event()
        self._command, self._at, self._most = f'"{command}"'.encode(), at, most
        self._source, self._here = f"{place}/mig", f"{place}/stream"
        self._sockets: list[socket.socket] = []
        self._threads: list[threading.Thread] = []
        self._listen(f"{place}/between", vm.qmp, self._edit, bytes)
        self._listen(self._here, self._source, self._hold, bytes)

    def go_on(self) -> None:
        self._go_on.set()

    def _listen(self, path: str, target: str, there: Callable[[bytes], bytes], back: Callable[[bytes], bytes]) -> None:
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(4)
        self._sockets.append(listener)

        def accept() -> None:
            with contextlib.suppress(OSError):
                while True:
                    near, _ = listener.accept()
                    far = socket.socket(socket.AF_UNIX)
                    self._sockets += [near, far]
                    if far.connect_ex(target):  # as if nothing listened here
                        near.close()
                        continue
                    self._run(lambda: _pump(near, far, there))  # noqa: B023 (used before the next one)
                    self._run(lambda: _pump(far, near, back))  # noqa: B023

        self._run(accept)

    def _run(self, work: Act) -> None:
        thread = threading.Thread(target=work, daemon=True)
        self._threads.append(thread)
        thread.start()

    def _edit(self, data: bytes) -> bytes:
        if self._command != b'""' and self._command in data:
            self._command = b'""'
            self._at()
        return data.replace(self._source.encode(), self._here.encode())

    def _hold(self, data: bytes) -> bytes:
        self._most -= len(data)
        if self._most < 0 and not self._go_on.is_set():
            self.held.set()
            self._go_on.wait()
        return data

    def close(self) -> None:
        self._go_on.set()
        for one in self._sockets:
            with contextlib.suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
            one.close()
        for thread in self._threads:
            thread.join(10)

    def __enter__(self) -> Between:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _pump(near: socket.socket, far: socket.socket, edit: Callable[[bytes], bytes]) -> None:
    with contextlib.suppress(OSError):
        while data := near.recv(1 << 16):
            far.sendall(edit(data))
    for one in (near, far):  # the end of one side is the end of both
        with contextlib.suppress(OSError):
            one.shutdown(socket.SHUT_RDWR)
