"""A bad network connection, as a process: relays bytes between its peers and a target; delays, stalls and cuts.

``python relay.py LISTEN TARGET``, both ``unix:PATH`` or ``tcp:HOST:PORT`` (port 0 to listen: one is chosen). Says
``ready ADDRESS``, then obeys one order a line on stdin and answers ``ok`` to each:

* ``delay SECONDS``: every byte arrives that much later, in both directions; order is kept
* ``stall``: nothing arrives any more, and nothing is reported; ``go`` ends it
* ``cut``: every connection breaks; new ones are accepted again
* ``refuse``: ... and new ones break at once, until ``accept``

``Relay`` starts one and gives the orders. It ends with its stdin.
"""

from __future__ import annotations

import select
import socket
import subprocess
import sys
import time
from collections import deque
from contextlib import suppress
from pathlib import Path
from types import TracebackType

MOST = 8 << 20
"""Bytes on their way in one direction; beyond them the sender feels it."""


def _address(text: str) -> tuple[int, str | tuple[str, int]]:
    kind, _, place = text.partition(":")
    if kind == "unix":
        return socket.AF_UNIX, place
    host, _, port = place.rpartition(":")
    return socket.AF_INET, (host, int(port))


class _Way:
    """One direction: bytes from ``source``, each with the time when it is due at ``sink``."""

    def __init__(self, source: socket.socket, sink: socket.socket) -> None:
        self.source, self.sink = source, sink
        self.queue: deque[tuple[float, bytes]] = deque()
        self.waiting = 0
        self.ended = False

    def take(self, delay: float) -> None:
        data = self.source.recv(1 << 16)
        if data:
            self.queue.append((time.monotonic() + delay, data))
            self.waiting += len(data)
        else:
            self.ended = True

    def pass_on(self, now: float) -> None:
        while self.queue and self.queue[0][0] <= now:
            due, data = self.queue[0]
            sent = self.sink.send(data)  # BlockingIOError: the bytes stay
            self.waiting -= sent
            if sent < len(data):
                self.queue[0] = (due, data[sent:])
                return
            self.queue.popleft()


class _Line:
    """Two sockets, both directions."""

    def __init__(self, caller: socket.socket, target: socket.socket) -> None:
        self.sockets = (caller, target)
        for one in self.sockets:
            one.setblocking(False)
            if one.family == socket.AF_INET:
                one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.ways = (_Way(caller, target), _Way(target, caller))

    def over(self) -> bool:
        return any(way.ended and not way.queue for way in self.ways)

    def close(self) -> None:
        for one in self.sockets:
            one.close()


class _Relaying:
    def __init__(self, listen: str, target: str) -> None:
        family, place = _address(listen)
        self.listener = socket.socket(family, socket.SOCK_STREAM)
        self.listener.bind(place)
        self.listener.listen(64)
        self.target = _address(target)
        self.lines: list[_Line] = []
        self.delay, self.stalled, self.refusing = 0.0, False, False

    def run(self) -> None:
        while True:
            now = time.monotonic()
            sources, writable, pause = self._wanted(now)
            readable, free, _ = select.select([sys.stdin, self.listener, *sources], writable, [], pause)
            if sys.stdin in readable:
                order = sys.stdin.readline()
                if not order:
                    return
                self._obey(order.split())
                print("ok", flush=True)
                continue  # sockets may be closed now
            if self.listener in readable:
                self._accept()
            self._relay(set(readable), set(free))

    def _wanted(self, now: float) -> tuple[list[socket.socket], list[socket.socket], float | None]:
        ways = [way for line in self.lines for way in line.ways if not self.stalled]
        readable = [way.source for way in ways if not way.ended and way.waiting < MOST]
        writable = [way.sink for way in ways if way.queue and way.queue[0][0] <= now]
        due = [way.queue[0][0] - now for way in ways if way.queue and way.queue[0][0] > now]
        return readable, writable, min(due) if due else None

    def _relay(self, readable: set[object], free: set[object]) -> None:
        for line in list(self.lines):
            try:
                for way in line.ways:
                    if way.source in readable:
                        way.take(self.delay)
                    if way.sink in free:
                        way.pass_on(time.monotonic())
            except BlockingIOError:
                continue
            except OSError:
                self._drop(line)
                continue
            if line.over():
                self._drop(line)

    def _accept(self) -> None:
        caller, _ = self.listener.accept()
        family, place = self.target
        target = socket.socket(family, socket.SOCK_STREAM)
        try:
            if self.refusing:
                raise ConnectionRefusedError
            target.connect(place)
        except OSError:
            caller.close()
            target.close()
            return
        self.lines.append(_Line(caller, target))

    def _obey(self, order: list[str]) -> None:
        match order:
            case ["delay", seconds]:
                self.delay = float(seconds)
            case ["stall" | "go" as word]:
                self.stalled = word == "stall"
            case ["cut"]:
                self._cut()
            case ["refuse" | "accept" as word]:
                self.refusing = word == "refuse"
                if self.refusing:
                    self._cut()
            case _:
                raise ValueError(f"no such order: {order}")

    def _cut(self) -> None:
        for line in list(self.lines):
            self._drop(line)

    def _drop(self, line: _Line) -> None:
        self.lines.remove(line)
        line.close()

    def address(self) -> str:
        name = self.listener.getsockname()
        return f"unix:{name}" if isinstance(name, str) else f"tcp:{name[0]}:{name[1]}"


class Relay:
    """A relay process. ``address`` is where it listens (as ``unix:PATH`` or ``tcp:HOST:PORT``), ``endpoint`` the same
    for ZeroMQ. Raises AssertionError when it does not come up or does not obey. ``prefix`` comes before its command
    line (such as ``ip netns exec NAME``)."""

    def __init__(self, listen: str, target: str, prefix: tuple[str, ...] = ()) -> None:
        self._listen = listen
        self.process = subprocess.Popen(
            [*prefix, sys.executable, str(Path(__file__)), listen, target],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            bufsize=1,
        )
        word, _, self.address = self._answer().partition(" ")
        assert word == "ready"
        kind, _, place = self.address.partition(":")
        self.endpoint = f"ipc://{place}" if kind == "unix" else f"tcp://{place}"

    def do(self, order: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(order + "\n")
        assert self._answer() == "ok"

    def delay(self, seconds: float) -> None:
        self.do(f"delay {seconds}")

    def stall(self) -> None:
        self.do("stall")

    def go(self) -> None:
        self.do("go")

    def cut(self) -> None:
        self.do("cut")

    def refuse(self) -> None:
        self.do("refuse")

    def accept(self) -> None:
        self.do("accept")

    def close(self) -> None:
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with suppress(BrokenPipeError):
                    pipe.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        if self._listen.startswith("unix:"):
            Path(self._listen.removeprefix("unix:")).unlink(missing_ok=True)

    def __enter__(self) -> Relay:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _answer(self) -> str:
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], 20.0)
        assert ready, "the relay does not answer"
        return self.process.stdout.readline().strip()


if __name__ == "__main__":
    relaying = _Relaying(sys.argv[1], sys.argv[2])
    print(f"ready {relaying.address()}", flush=True)
    relaying.run()
