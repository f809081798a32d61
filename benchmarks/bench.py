"""What every benchmark needs: compiled C, a warm file, supervisors and client processes, and who runs on which CPU.

CPU placement decides the latency of a single fault on virtual machines more than anything that we or C can do: toucher
and handler on one CPU hand over without an interrupt between processors. So a latency is told twice: everything
pinned to one CPU (which compares the handlers), and nothing pinned (which compares what a user sees). Affinity is
inherited, so a program is pinned by starting it pinned.
"""

from __future__ import annotations

import json
import os
import random
import select
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import postcopy
from postcopy.errors import PostcopyError
from postcopy.queries import Control

from .figures import Row, failed_row
from .machine import ROOT

PAGE = 4096
RANDOM_PIECE = 64 << 20
LEAST_PAGES = 16384
BLOCK_SECONDS = 0.15
ANSWER_WITHIN = 60.0
WORKER_WITHIN = 30.0
AT_ONCE = 8
HERE = os.path.dirname(os.path.abspath(__file__))


class BenchmarkFailed(Exception):
    """Something that must hold did not: no compiler, a wrong byte, a program that ended or does not answer."""


@dataclass(frozen=True, slots=True)
class Scale:
    """How much is measured. ``quick`` proves that a benchmark runs; its figures mean nothing."""

    quick: bool = False
    stretch: bool = False
    pairs: int = 7

    def of(self, full: int, quick: int) -> int:
        """``full``, or ``quick`` where only the shape matters."""
        return quick if self.quick else full


class Measure(Protocol):
    """Measures something and gives its rows."""

    def __call__(self, bench: Bench, /) -> list[Row]: ...


def available_memory() -> int:
    """Bytes that programs can allocate now without swapping (MemAvailable)."""
    with open("/proc/meminfo", encoding="utf-8") as lines:
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))


class ClientProcess:
    """A ``benchmarks.client`` process: ask it, one answer a question; a context manager."""

    def __init__(self, spec: Mapping[str, Any], keep: Sequence[int] = (), python: str = sys.executable) -> None:
        command = [python, "-m", "benchmarks.client", json.dumps(spec)]
        # A process group of its own, because a floor client has a handler as its child and both must end.
        self._process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=keep, process_group=0
        )
        self.pid = self._process.pid

    def hear(self) -> dict[str, Any]:
        """The next answer. Raises BenchmarkFailed when it does not come, or says that bytes were wrong."""
        assert self._process.stdout is not None
        if not select.select([self._process.stdout], [], [], ANSWER_WITHIN)[0]:
            raise BenchmarkFailed(f"client process {self.pid} has not answered within {ANSWER_WITHIN:.0f} s")
        line = self._process.stdout.readline()
        if not line:
            raise BenchmarkFailed(f"client process {self.pid} ended with status {self._process.wait()}")
        answer: dict[str, Any] = json.loads(line)
        if answer.get("wrong"):
            raise BenchmarkFailed(f"client process {self.pid} read wrong bytes: {answer['wrong']} pages")
        return answer

    def tell(self, **order: Any) -> None:
        """Send an order; ``hear`` has the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()

    def ask(self, **order: Any) -> dict[str, Any]:
        """Send an order and wait for its answer."""
        self.tell(**order)
        return self.hear()

    def close(self) -> None:
        """End the client and whatever it has started."""
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            with suppress(OSError):
                stream.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(10)
        with suppress(ProcessLookupError):
            os.killpg(self.pid, signal.SIGKILL)
        self._process.wait()

    def __enter__(self) -> ClientProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Served(dict[str, str]):
    """The SOURCE of each block of a page source, and the pid of that program."""

    def __init__(self, sources: Iterable[tuple[str, str]], pid: int) -> None:
        super().__init__(sources)
        self.pid = pid


class Bench:
    """A temporary directory with the compiled C and the files, and the ways to start what is measured."""

    def __init__(self, scale: Scale) -> None:
        self.scale = scale
        self.pages = scale.of(4096, 512)
        self.cpu = max(os.sched_getaffinity(0))
        self._stack = ExitStack()
        self.directory = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="postcopy-bench-"))
        # Not $TMPDIR if it can be helped: a socket's path may have 107 bytes.
        short = "/tmp" if os.access("/tmp", os.W_OK | os.X_OK) else None
        self.sockets = self._stack.enter_context(tempfile.TemporaryDirectory(prefix="pc-", dir=short))
        self.library = self.compile("toucher.c", "toucher.so", "-shared", "-fPIC")
        self.floor = [self.compile("floor.c", "floor")]
        self.chain = [self.compile("chain.c", "chain")]
        if not scale.quick:
            self.pages = self._pages()
        self.length = self.pages * PAGE
        self.touches = scale.of(self.pages // 4, 200)
        """How many pages one client touches at random for the latency of a fault."""
        self.file = self.warm_file("ram", self.length)

    def say(self, progress: str) -> None:
        """Progress, for people, on stderr."""
        print(progress, file=sys.stderr, flush=True)

    def part(self, name: str, measure: Measure) -> list[Row]:
        """The rows of one part of a benchmark. One that fails gives a failed row, so the other parts keep theirs."""
        try:
            return measure(self)
        except (BenchmarkFailed, PostcopyError, OSError, subprocess.SubprocessError) as error:
            reason = " ".join(f"{error}".split())
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {error}"
        self.say(f"benchmarks: {name}: {reason}")
        return [failed_row(name, reason)]

    def length_for(self, seconds: float, rate: float, least: int) -> int:
        """Bytes that take ``seconds`` at ``rate`` bytes a second: at least ``least``, at most an eighth of the memory
        that is available now, in whole steps of 64 MiB (a quick run: ``least``)."""
        if self.scale.quick:
            return least
        wanted = min(max(least, int(seconds * rate)), available_memory() // 8)
        return max(1, wanted // RANDOM_PIECE) * RANDOM_PIECE

    def _pages(self) -> int:
        """Pages of the block: what the C handler serves in BLOCK_SECONDS, so that a faster machine is not done in no
        time; at least LEAST_PAGES, at most a 64th of the available memory."""
        self.length = self.pages * PAGE
        self.file = self.warm_file("ram", self.length)
        with self.floor_client(pinned=True) as client:
            span = client.ask(do="touch", seed=1, count=self.pages)["span"]
        rate = self.pages / max(1e-6, (span[1] - span[0]) / 1e9)
        wanted = min(int(rate * BLOCK_SECONDS), available_memory() // 64 // PAGE)
        return max(LEAST_PAGES, wanted // 1024 * 1024)

    # --- CPUs ---------------------------------------------------------------------------------------------------------

    @contextmanager
    def placed(self, pinned: bool) -> Iterator[None]:
        """Whatever is started inside is pinned to one CPU, with all its children, or is not."""
        before = os.sched_getaffinity(0)
        if pinned:
            os.sched_setaffinity(0, {self.cpu})
        try:
            yield
        finally:
            os.sched_setaffinity(0, before)

    def check_placed(self, pinned: bool, pids: Sequence[int]) -> None:
        """Raises BenchmarkFailed when one of these processes does not run where it should."""
        wanted = {self.cpu} if pinned else os.sched_getaffinity(0)
        for pid in pids:
            if os.sched_getaffinity(pid) != wanted:
                raise BenchmarkFailed(f"process {pid} may run on {os.sched_getaffinity(pid)}, not on {wanted}")

    # --- what is measured ---------------------------------------------------------------------------------------------

    @contextmanager
    def source(
        self,
        blocks: Sequence[str],
        *,
        pinned: bool = False,
        file: str = "",
        python: str = sys.executable,
        name: str = "source",
    ) -> Iterator[Served]:
        """A page source that serves the warm file (or ``file``) under each of these names: the SOURCE of each."""
        endpoint = f"ipc://{self.sockets}/{name}"
        command = [python, "-m", "postcopy_sources", *(f"{name}={file or self.file}" for name in blocks)]
        command += ["--listen", endpoint, "--die-with-parent", str(os.getpid()), "--log-level", "warning"]
        with self.placed(pinned):
            process = subprocess.Popen(command, stdin=subprocess.DEVNULL)
        try:
            yield Served(((block, f"{endpoint}/{block}") for block in blocks), process.pid)  # a client waits for it
            if process.poll() is not None:
                raise BenchmarkFailed(f"the page source ended with status {process.returncode}")
        finally:
            process.terminate()
            process.send_signal(signal.SIGCONT)
            process.wait(10)

    def supervisor(
        self, blocks: Sequence[str] | Mapping[str, str], *, pinned: bool = False, **options: Any
    ) -> postcopy.Supervisor:
        """A fresh supervisor that serves the warm file under each of these names, or these SOURCEs."""
        sources = blocks if isinstance(blocks, Mapping) else dict.fromkeys(blocks, self.file)
        with self.placed(pinned):
            return postcopy.Supervisor(sources, **options)

    def client(
        self, *, pinned: bool = False, keep: Sequence[int] = (), python: str = sys.executable, **spec: Any
    ) -> ClientProcess:
        """A client process of ``spec`` (see client.py), ready."""
        with self.placed(pinned):
            client = ClientProcess(self._known() | spec, keep, python)
        try:
            client.hear()
        except BaseException:
            client.close()
            raise
        return client

    def crowd(self, stack: ExitStack, count: int, **spec: Any) -> list[ClientProcess]:
        """``count`` clients of ``spec``, ready, which ``stack`` closes. Some start at the same time: quicker."""
        crowd: list[ClientProcess] = []
        while len(crowd) < count:
            starting = min(AT_ONCE, count - len(crowd))
            some = [stack.enter_context(ClientProcess(self._known() | spec)) for _ in range(starting)]
            for client in some:
                client.hear()
            crowd += some
        return crowd

    def _known(self) -> dict[str, Any]:
        return {"parent": os.getpid(), "library": self.library, "file": self.file, "length": self.length}

    def floor_client(self, *, pinned: bool = False, memory: int = -1) -> ClientProcess:
        """A shared client of the C floor: over the block ``memory``, or over one of its own."""
        keep = [memory] if memory >= 0 else []
        return self.client(pinned=pinned, keep=keep, handler=self.floor, memory=memory)

    def chain_client(self, mode: str, *, pinned: bool = False) -> ClientProcess:
        """A client of the C chain of four processes: the floor of a remote fault."""
        return self.client(pinned=pinned, handler=self.chain, mode=mode)

    def product_client(
        self, supervisor: postcopy.Supervisor, block: str, mode: str, *, pinned: bool = False
    ) -> ClientProcess:
        """A client of ours, attached to ``block``; its worker is where it should be."""
        client = self.client(pinned=pinned, runtime_dir=supervisor.runtime_dir, block=block, mode=mode)
        try:
            self.check_placed(pinned, [client.pid, worker_of(supervisor, client.pid)])
        except BaseException:
            client.close()
            raise
        return client

    def start_time(self) -> int:
        """An instant shortly ahead at which several processes may begin together (CLOCK_MONOTONIC, ns)."""
        return time.monotonic_ns() + 100_000_000

    # --- files --------------------------------------------------------------------------------------------------------

    def compile(self, source: str, name: str, *flags: str) -> str:
        """A source of this folder, compiled into the temporary directory; BenchmarkFailed when it cannot be."""
        target = os.path.join(self.directory, name)
        command = ["cc", "-O2", "-Wall", "-Wextra", *flags, "-o", target, os.path.join(HERE, source)]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        except FileNotFoundError as error:
            raise BenchmarkFailed("cc is missing: the floor is C and is compiled when needed (install gcc)") from error
        if done.returncode:
            raise BenchmarkFailed(f"cc cannot compile {source}: {done.stderr.strip()}")
        return target

    def warm_file(self, name: str, length: int) -> str:
        """A file of random bytes that lies in the page cache."""
        path = os.path.join(self.directory, name)
        with open(path, "wb") as file:
            chance = random.Random(length)
            for written in range(0, length, RANDOM_PIECE):
                file.write(chance.randbytes(min(RANDOM_PIECE, length - written)))
            file.flush()
            os.fsync(file.fileno())  # or its write-back disturbs the first pairs
        with open(path, "rb") as file:
            while file.read(1 << 20):
                pass
        return path

    def close(self) -> None:
        """Remove the temporary directory."""
        self._stack.close()

    def __enter__(self) -> Bench:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def worker_of(supervisor: postcopy.Supervisor, pid: int) -> int:
    """The pid of the worker that serves the youngest client of process ``pid``."""
    deadline = time.monotonic() + WORKER_WITHIN
    with Control(supervisor.runtime_dir, timeout=WORKER_WITHIN) as control:
        while time.monotonic() < deadline:
            clients = [client for client in control.status()["clients"] if client["pid"] == pid]
            if clients:
                newest = max(clients, key=lambda client: client["id"])
                worker = int(newest["worker_pid"] or 0)
                if newest["state"] == "running" and worker:
                    return worker
            time.sleep(0.005)
    raise BenchmarkFailed(f"the client of process {pid} has no running worker")
