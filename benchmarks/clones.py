"""``clones``: from a running virtual machine to S3, and to clones of it on two hosts that help each other.

The walk of docs/storage.md, with figures. SeaweedFS and both hosts are in network namespaces with a line between each
two; an answer of the store comes 20 ms later. Each clone is a guest of KVM: it reads the whole working set and the sum
that it finds is checked. Needs root, iproute2 and /dev/kvm."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import postcopy
from postcopy.queries import Control

from . import store_client
from .bench import PAGE, Bench, BenchmarkFailed
from .figures import Row, value_row

DELAY = 0.02
PORT = 7001


def run(bench: Bench) -> list[Row]:
    """The walk, once."""
    return bench.part("clones", _walk)


def _walk(bench: Bench) -> list[Row]:
    return walk(bench.scale.of(50, 6), bench.scale.of(16, 2), bench.say)


def walk(count: int, scale: int, say: Any = lambda what: None) -> list[Row]:
    """So many clones of a machine of ``scale`` times 4 MiB. Raises BenchmarkFailed when one finds something wrong."""
    from tests.system.stores import SeaweedFS, free_ports
    from tests.wire.networks import Hosts, inside
    from tests.wire.relay import Relay

    before = dict(os.environ)
    with ExitStack() as stack:
        stack.callback(os.environ.update, before)
        stack.callback(os.environ.clear)
        place = stack.enter_context(tempfile.TemporaryDirectory(prefix="pc-walk-", dir="/tmp"))
        hosts = stack.enter_context(Hosts("s", "a", "b"))
        with inside(hosts.namespace("s")):
            server = SeaweedFS("0.0.0.0")
            stack.callback(server.close)
            os.environ.update(server.variables)
            server.await_ready()
            relay = stack.enter_context(Relay(f"tcp:0.0.0.0:{free_ports(1)[0]}", f"tcp:127.0.0.1:{server.port}"))
            relay.delay(DELAY / 2)  # each way
        site = _Site(hosts, int(relay.endpoint.rpartition(":")[2]), place, scale)
        say("clones: a machine runs, and is packed")
        packed = site.pack_a_machine()
        say("clones: one run is recorded on host A")
        recorded = site.record()
        say(f"clones: {count} on two hosts")
        return [*packed, recorded, *site.clones(count)]


class _Site:
    """Store and hosts."""

    def __init__(self, hosts: Any, port: int, place: str, scale: int) -> None:
        self.hosts, self.port, self.place, self.scale = hosts, port, Path(place), scale
        self.image = str(self.place / "machine")
        self.right = store_client.make("kvm", self.image, scale)

    @contextmanager
    def on(self, host: str) -> Iterator[None]:
        """What is started in here is on that host, and finds the store."""
        from tests.wire.networks import inside

        address = self.hosts.address("s", host) if host != "s" else "127.0.0.1"
        os.environ["AWS_ENDPOINT_URL"] = f"http://{address}:{self.port}"
        os.environ["POSTCOPY_CHUNK_CACHE"] = str(self.place / f"chunks-{host}")
        with inside(self.hosts.namespace(host)):
            yield

    def guest(self, directory: str) -> subprocess.Popen[str]:
        words = [sys.executable, "-m", "benchmarks.store_client", "kvm", directory, "machine", str(self.scale)]
        return subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)

    def check(self, guests: list[subprocess.Popen[str]]) -> None:
        for guest in guests:
            found, errors = guest.communicate(timeout=300)
            if guest.returncode or float(found) != self.right:
                raise BenchmarkFailed(f"a clone found {found.strip()}, not {self.right}: {errors.strip()[-300:]}")

    def pack_a_machine(self) -> list[Row]:
        with self.on("a"), postcopy.Supervisor({"machine": self.image}) as supervisor:
            self.check([self.guest(supervisor.runtime_dir)])
            began = time.monotonic()
            words = ["pack", "machine", "s3://snapshots/vm", "--from", supervisor.runtime_dir, "--json"]
            done = subprocess.run([sys.executable, "-m", "postcopy", *words], capture_output=True, text=True)
            seconds = time.monotonic() - began
        if done.returncode:
            raise BenchmarkFailed(done.stderr.strip())
        packed = json.loads(done.stdout)
        detail = f"{packed['size'] >> 20} MiB, {packed['uploaded'] >> 20} MiB uploaded"
        return [value_row("pack a block of a running machine to S3", [seconds], "s", detail=detail)]

    def record(self) -> Row:
        options: dict[str, Any] = {"background_rate": 0, "fault_around": PAGE, "record_working_set": True}
        began = time.monotonic()
        source = {"machine": "store:s3://snapshots/vm"}
        with self.on("s"), postcopy.Supervisor(source, **options) as supervisor:
            self.check([self.guest(supervisor.runtime_dir)])
        return value_row("record one run", [time.monotonic() - began], "s")

    def clones(self, count: int) -> list[Row]:
        rows = []
        with ExitStack() as stack:
            directories = []
            for host, other in (("a", "b"), ("b", "a")):
                with self.on(host):
                    stack.enter_context(self.helper(host, other))
                    near = f"tcp://{self.hosts.address(other, host)}:{PORT}/machine"
                    source = {"machine": f"peers:{near},store:s3://snapshots/vm"}
                    before = [self.hosts.received(host, sender) for sender in ("s", other)]
                    began = time.monotonic()
                    supervisor = postcopy.Supervisor(source, background_rate=0, replay=True, plain_tcp=True)
                    stack.enter_context(supervisor)
                    directories.append(supervisor.runtime_dir)
                    self.check([self.guest(supervisor.runtime_dir)])
                    seconds = time.monotonic() - began
                    after = [self.hosts.received(host, sender) for sender in ("s", other)]
                from_store, from_other = ((now - then) / 1e6 for now, then in zip(after, before, strict=True))
                detail = f"{from_store:.1f} MB from the store, {from_other:.1f} MB from host {other.upper()}"
                rows.append(
                    value_row(f"host {host.upper()}: from nothing to its first clone", [seconds], "s", detail=detail)
                )
            began = time.monotonic()
            self.check([self.guest(directories[number % 2]) for number in range(count)])
            seconds = time.monotonic() - began
            requests = [_requests(directory) for directory in directories]
        detail = f"{requests[0]} and {requests[1]} requests of clients for missing pages"
        return [*rows, value_row(f"{count} clones at once on both hosts, all right", [seconds], "s", detail=detail)]

    @contextmanager
    def helper(self, host: str, other: str) -> Iterator[None]:
        """The program that gives what the chunk cache of this host holds to the other."""
        listen = f"tcp://{self.hosts.address(host, other)}:{PORT}"
        words = ["machine=store:s3://snapshots/vm", "--listen", listen, "--plain-tcp", "--log-level", "warning"]
        words += ["--die-with-parent", str(os.getpid())]
        process = subprocess.Popen([sys.executable, "-m", "postcopy_sources", *words], stdin=subprocess.DEVNULL)
        try:
            yield
        finally:
            process.terminate()
            process.wait(30)


def _requests(directory: str) -> int:
    with Control(directory) as control:
        return int(control.status()["sources"][0]["requests"])
