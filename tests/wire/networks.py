"""Network namespaces with lines between them, for tests and benchmarks.

They are made here (iproute2, root) and live as long as the context. A process is put into one by being started from a
thread that is in it.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

CLONE_NEWNET = 0x40000000
HERE, THERE = "10.88.0.1", "10.88.0.2"
libc = ctypes.CDLL(None, use_errno=True)


def ip(*words: str) -> None:
    _run("ip", *words)


def _run(program: str, *words: str) -> None:
    found = shutil.which(program, path=os.environ.get("PATH", "") + ":/usr/sbin:/sbin")
    assert found, f"network namespaces are made with {program}(8): install iproute2 (scripts/install does)"
    done = subprocess.run([found, *words], capture_output=True, text=True, timeout=20)
    assert done.returncode == 0, f"{program} {' '.join(words)}: {done.stderr.strip()} (network namespaces want root)"


@contextmanager
def inside(namespace: str) -> Iterator[None]:
    """Whatever this thread starts in here lives in that namespace."""
    before = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _enter(f"/run/netns/{namespace}")
        yield
    finally:
        _enter(f"/proc/self/fd/{before}")
        os.close(before)


def _enter(path: str) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        assert libc.setns(fd, CLONE_NEWNET) == 0, os.strerror(ctypes.get_errno())
    finally:
        os.close(fd)


@dataclass(frozen=True)
class Networks:
    """Two namespaces with one line between them; HERE is the address of the ``source``'s, THERE the other."""

    source: str
    clients: str


@contextmanager
def two_networks() -> Iterator[Networks]:
    """For as long as the context."""
    made = Networks(f"pcs{os.getpid()}", f"pcc{os.getpid()}")
    try:
        for name in (made.source, made.clients):
            ip("netns", "add", name)
            ip("-n", name, "link", "set", "lo", "up")
        ip("link", "add", "line", "netns", made.source, "type", "veth", "peer", "name", "line", "netns", made.clients)
        for name, address in ((made.source, HERE), (made.clients, THERE)):
            ip("-n", name, "address", "add", f"{address}/24", "dev", "line")
            ip("-n", name, "link", "set", "line", "up")
        yield made
    finally:
        for name in (made.source, made.clients):
            if Path(f"/run/netns/{name}").exists():
                ip("netns", "del", name)


class Hosts:
    """Namespaces by name, with a line between each two of them."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self._lines = {pair: number for number, pair in enumerate(combinations(names, 2))}

    def namespace(self, name: str) -> str:
        return f"pch{os.getpid()}{name}"

    def address(self, name: str, seen_from: str) -> str:
        """Where ``name`` is on its line to ``seen_from``."""
        pair = next(pair for pair in self._lines if set(pair) == {name, seen_from})
        return f"10.88.{10 + self._lines[pair]}.{1 + pair.index(name)}"

    def cut(self, name: str, *, mend: bool = False) -> None:
        """All lines of this host go dead, silently; or they work again."""
        for pair in self._lines:
            if name in pair:
                for one in pair:
                    word = "up" if mend else "down"
                    ip("-n", self.namespace(one), "link", "set", f"line{self._lines[pair]}", word)

    def received(self, name: str, sender: str) -> int:
        """Bytes that this host has received over its line to another."""
        pair = next(pair for pair in self._lines if set(pair) == {name, sender})
        words = ["ip", "-n", self.namespace(name), "-s", "-j", "link", "show", "dev", f"line{self._lines[pair]}"]
        found = json.loads(subprocess.run(words, capture_output=True, text=True, check=True, timeout=20).stdout)
        return int(found[0]["stats64"]["rx"]["bytes"])

    def __enter__(self) -> Hosts:
        try:
            for name in self.names:
                ip("netns", "add", self.namespace(name))
                ip("-n", self.namespace(name), "link", "set", "lo", "up")
            for pair, number in self._lines.items():
                one, other = map(self.namespace, pair)
                line = f"line{number}"
                ip("link", "add", line, "netns", one, "type", "veth", "peer", "name", line, "netns", other)
                for name, other in (pair, pair[::-1]):
                    place = self.namespace(name)
                    ip("-n", place, "address", "add", f"{self.address(name, other)}/24", "dev", line)
                    ip("-n", place, "link", "set", line, "up")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        for name in map(self.namespace, self.names):
            if Path(f"/run/netns/{name}").exists():
                ip("netns", "del", name)


def limit(namespace: str, rate: float) -> None:
    """What leaves this namespace over the line passes at ``rate`` bytes a second; what waits is kept in order."""
    line = ("-n", namespace, "qdisc", "add", "dev", "line", "root", "tbf")
    _run("tc", *line, "rate", f"{int(rate * 8)}bit", "burst", "64kb", "latency", "2s")
