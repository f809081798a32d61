"""The driver of whole-service tests: a real supervisor in a runtime directory of its own, real clients, real kills.

``with Service(runtime_dir, f"ram0={path}") as service`` is a service that is ready, and that must be sound at its end:
no page that nobody of ours placed, no ``bug`` among the events, no traceback in the log, exit status 0 on SIGTERM,
nothing left in the runtime directory. Every wait has a deadline; what is waited for is polled, never slept for.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import zmq

from postcopy_protocol.codec import decode, encode
from postcopy_protocol.messages import (
    AskExport,
    AskProgress,
    AskStatus,
    AskStop,
    ControlRefused,
    EventsAnswer,
    ExportProgress,
    Message,
    ResumeAnswer,
    StatusAnswer,
    StopAnswer,
    StoryAnswer,
)
from tests.system import zygote
from tests.system.zygote import PUPPET, WINGS
from tests.system.zygote import ROOT as ROOT

READY_WITHIN = 40.0
END_WITHIN = 40.0
PAGE = 4096

ANSWERS = (StatusAnswer, ExportProgress, StopAnswer, StoryAnswer, EventsAnswer, ResumeAnswer, ControlRefused)

Found = TypeVar("Found")
Option = str | int | float | list[int]


def until(look: Callable[[], Found], what: str, within: float = 40.0) -> Found:
    """Poll until ``look`` finds something true; fails with ``what`` after ``within`` seconds."""
    deadline, pause = time.monotonic() + within, 0.005
    while not (found := look()):
        assert time.monotonic() < deadline, f"not within {within:g} s: {what}"
        time.sleep(pause)
        pause = min(0.05, 1.3 * pause)
    return found


def environment(**more: str) -> dict[str, str]:
    """That of this test, with the wings of this checkout to import from."""
    paths = [str(ROOT), *(str(ROOT / wing) for wing in WINGS)] + [
        path for path in [os.environ.get("PYTHONPATH")] if path
    ]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **more}


def arguments(directory: Path | str, blocks: tuple[str, ...], options: dict[str, Option]) -> list[str]:
    """The command line of a supervisor."""
    words = [*blocks, "--runtime-dir", str(directory)]
    for name, value in options.items():
        for one in value if isinstance(value, list) else [value]:
            if one is not False:
                words += ["--" + name.replace("_", "-"), *([] if one is True else [str(one)])]
    return [sys.executable, "-m", "postcopy_supervisor", *words]


def word(offset: int, seed: int = 0) -> int:
    """The 64-bit word that stands at this offset of a file of the fixture ``source_file``."""
    return (offset // 8) ^ (seed * 0x9E3779B97F4A7C15 % 2**64)


def alive(pid: int) -> bool:
    """Does this process run (and is no zombie)?"""
    try:
        return Path(f"/proc/{pid}/stat").read_text("utf-8", "replace").rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def stands(pid: int) -> bool:
    """Is each of its threads stopped? SIGSTOP is there when one of them has got the processor to take it."""
    try:
        states = {task.read_text().rpartition(")")[2].split()[0] for task in Path(f"/proc/{pid}/task").glob("*/stat")}
    except OSError:  # a thread has just ended
        return False
    return states <= {"T"}  # none: it is gone already


def called(pid: int) -> str:
    """The name that this process gave itself; nothing when it is gone."""
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""


def end_by_pidfd(pid: int, number: int, name: str) -> None:
    """Signal a process that is called ``name...``, by its pidfd: nobody else is ever hit. After SIGSTOP it stands."""
    pidfd = os.pidfd_open(pid)
    try:
        called = Path(f"/proc/{pid}/comm").read_text().strip()
        assert called.startswith(name), f"process {pid} is {called}, not {name}"
        signal.pidfd_send_signal(pidfd, number)
    finally:
        os.close(pidfd)
    if number == signal.SIGSTOP:
        until(lambda: stands(pid), "it stands still")


def descriptors(pid: int) -> list[str]:
    """What the descriptors of a process refer to."""
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):
            found.append(str(entry.readlink()))
    return found


class PuppetError(Exception):
    """What an order raised in the client: ``kind`` is the name of its class."""

    def __init__(self, kind: str, text: str) -> None:
        super().__init__(f"{kind}: {text}")
        self.kind = kind
        self.text = text


class Authenticator:
    """Before which clients stand that check a block in ``parts``: the first is free, each opening lets them into one
    more. However fast they are and however slow the test is, they are not through, and the block is not whole, before
    it has been opened ``parts - 1`` times."""

    def __init__(self, place: Path, parts: int) -> None:
        self._file, self._parts = place / "gate", parts
        self._file.touch()

    def order(self, path: Path, step: int = 4096, seed: int = 0) -> str:
        """What a client is told: to compare its block with this file, in random order within each part."""
        return f"check_in_parts(b, {str(path)!r}, {str(self._file)!r}, {self._parts}, {step}, {seed})"

    def open(self) -> None:
        with self._file.open("ab") as file:
            file.write(b"o")


class Puppet:
    """A client process (see puppet.py). ``do`` waits for the answer; ``begin`` does not, ``answer`` fetches it."""

    def __init__(self, directory: Path, **more: str) -> None:
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._unread = b""
        self.process = subprocess.Popen(
            [sys.executable, str(PUPPET), str(directory)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            bufsize=0,
            env=environment(**more),
        )
        self.pid = self.process.pid

    def do(self, order: str, within: float = 60.0) -> Any:
        self.begin(order)
        return self.answer(within)

    def begin(self, order: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(order).encode() + b"\n")

    def answered(self, within: float = 0.0) -> bool:
        """Is an answer there?"""
        assert self.process.stdout is not None
        return bool(self._unread) or bool(select.select([self.process.stdout], [], [], within)[0])

    def answer(self, within: float = 60.0) -> Any:
        deadline = time.monotonic() + within
        assert self.process.stdout is not None
        while b"\n" not in self._unread:
            assert self.answered(max(0.0, deadline - time.monotonic())), f"client {self.pid}: no answer in {within:g} s"
            more = self.process.stdout.read(65536)
            assert more, f"client {self.pid} ended with {self.process.wait(5)}: {self.errors()}"
            self._unread += more
        line, _, self._unread = self._unread.partition(b"\n")
        answer = json.loads(line)
        if "error" in answer:
            raise PuppetError(answer["error"], answer["text"])
        return answer["is"]

    def attach(self, name: str = "ram0", mode: str = "private", called: str = "b") -> None:
        """``called`` is the variable of the block in the client."""
        self.do(f"{called} = attach({name!r}, {mode!r})")

    def errors(self) -> str:
        size = os.fstat(self._errors.fileno()).st_size
        return os.pread(self._errors.fileno(), size, 0).decode("utf-8", "replace")

    def status(self, within: float = 40.0) -> int:
        """Wait for its end: exit status, or minus the signal."""
        return self.process.wait(within)

    def kill(self, number: int = signal.SIGKILL) -> None:
        self.process.send_signal(number)

    def close(self) -> None:
        """End it, whatever it does, and forget it."""
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait(10)
        for stream in (self.process.stdin, self.process.stdout, self._errors):
            if stream is not None:
                stream.close()


class Service:
    """A supervisor with all its people. ``blocks`` are NAME=SOURCE; options are those of serve with underscores.

    ``polluting``: this test makes pages that nobody placed, on purpose. ``failing``: tracebacks are expected in the
    log, because it makes programs crash on purpose.
    """

    def __init__(
        self,
        directory: Path,
        *blocks: str,
        polluting: bool = False,
        failing: bool = False,
        preexec: Callable[[], None] | None = None,
        cwd: Path | None = None,
        **options: Option,
    ) -> None:
        self.directory = directory
        self._polluting, self._failing = polluting, failing
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        self._puppets: list[Puppet] = []
        self.blocks, self.options = blocks, options
        self._preexec, self._cwd = preexec, cwd
        self.start()

    def start(self, *, program: tuple[str, ...] = (), **more: Option) -> None:
        """Start the supervisor; ``more`` options for this time, ``program`` in place of the supervisor's."""
        self._begun = os.fstat(self._log.fileno()).st_size
        command = arguments(self.directory, self.blocks, {**self.options, **more})
        self.process = subprocess.Popen(
            [command[0], *program, *command[3:]] if program else command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._log,
            env=environment(),
            preexec_fn=self._preexec,
            cwd=self._cwd,
        )
        self.pid = self.process.pid

    def kill(self) -> None:
        """SIGKILL to the supervisor, and to nobody else."""
        self.process.kill()
        self.process.wait(10)

    def recover(self, **more: Any) -> None:
        """The next supervisor, ready."""
        self.start(recover=True, **more)
        self.await_ready()

    def await_ready(self) -> None:
        until(self._ready, "the supervisor is ready", READY_WITHIN)

    def __enter__(self) -> Service:
        try:
            self.await_ready()
        except BaseException:
            self._drop()
            raise
        return self

    def _ready(self) -> bool:
        status = self.process.poll()
        assert status is None, f"the supervisor ended with {status}: {self.log()}"
        return " ready: " in self.last_log()

    def log(self) -> str:
        return os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, 0).decode("utf-8", "replace")

    def last_log(self) -> str:
        """What was logged since the last start."""
        return os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, self._begun).decode(
            "utf-8", "replace"
        )

    # --- clients ------------------------------------------------------------------------------------------------------

    def client(self, name: str | None = "ram0", mode: str = "private", **more: str) -> Puppet:
        """A new client, attached to ``name`` unless that is None."""
        puppet = Puppet(self.directory, **more)
        self._puppets.append(puppet)
        if name is not None:
            puppet.attach(name, mode)
        return puppet

    def record(self, puppet: Puppet) -> dict[str, Any]:
        """What the status says of this client; empty when it is not there."""
        return next((record for record in self.status()["clients"] if record["pid"] == puppet.pid), {})

    def worker(self, puppet: Puppet) -> int:
        """The pid of its worker, which runs."""

        def running() -> int:
            record = self.record(puppet)
            # It runs, too, while the source of one of its blocks is away.
            return int(record.get("worker_pid") or 0) if record.get("state") in ("running", "paused") else 0

        return until(running, f"client {puppet.pid} has a running worker")

    def kill_worker(self, puppet: Puppet, number: int = signal.SIGKILL) -> int:
        """Send its worker a signal; returns its pid."""
        pid = self.worker(puppet)
        end_by_pidfd(pid, number, "postcopy-w")
        return pid

    # --- control ------------------------------------------------------------------------------------------------------

    def ask(self, question: Message, within: float = 40.0) -> Message:
        with self.dealer() as dealer:
            dealer.send(encode(question))
            assert dealer.poll(int(within * 1000)), f"no answer to {question} in {within:g} s: {self.log()[-2000:]}"
            return decode(dealer.recv(), expect=ANSWERS)

    @contextlib.contextmanager
    def dealer(self, identity: bytes = b"") -> Iterator[zmq.Socket[bytes]]:
        """A connection to the router; ``identity`` may be a lie."""
        dealer = self._context.socket(zmq.DEALER)
        try:
            dealer.setsockopt(zmq.LINGER, 0)
            if identity:
                dealer.setsockopt(zmq.ROUTING_ID, identity)
            address: Any = os.fsencode(f"ipc://{self.directory}/private/router")  # a path may be no UTF-8
            dealer.connect(address)
            yield dealer
        finally:
            dealer.close()

    def status(self, audit: bool = False) -> dict[str, Any]:
        answer = self.ask(AskStatus(audit))
        assert isinstance(answer, StatusAnswer), answer
        document = json.loads(answer.document)
        assert isinstance(document, dict)
        return document

    def block(self, name: str = "ram0") -> dict[str, Any]:
        """What the status says of this block."""
        found = next(block for block in self.status()["blocks"] if block["name"] == name)
        assert isinstance(found, dict)
        return found

    def await_received(self, pages: int, name: str = "ram0") -> None:
        """Wait until the received map says so: a page's mark is stored a moment after its toucher runs again."""
        until(lambda: self.block(name)["received"] >= pages, f"{pages} pages of {name} are marked")
        assert self.block(name)["received"] == pages

    def events(self, kind: str) -> list[str]:
        """The details of all events of this kind, oldest first."""
        return [event["detail"] for event in self.status()["events"] if event["kind"] == kind]

    def export(self, path: Path, name: str = "ram0") -> Message:
        return self.ask(AskExport(name, str(path)))

    def progress(self, job: int, cancel: bool = False) -> ExportProgress:
        answer = self.ask(AskProgress(job, cancel))
        assert isinstance(answer, ExportProgress), answer
        return answer

    def stop(self, keep_workers: bool = False) -> None:
        """AskStop, and the end of the process."""
        answer = self.ask(AskStop(keep_workers))
        assert isinstance(answer, StopAnswer) and answer.pid == self.pid, answer

    # --- the end ------------------------------------------------------------------------------------------------------

    def audit(self) -> None:
        """Nothing in the blocks that nobody of ours placed, and no event that we could not handle."""
        document = self.status(audit=True)
        strange = [event for event in document["events"] if event["kind"] in ("bug", "failed")]
        assert not strange, strange
        if not self._polluting:
            assert document["totals"]["polluted"] == 0, document["blocks"]
            assert document["totals"]["repaired"] == 0, document["events"]

    def wait(self, within: float = END_WITHIN) -> int:
        return self.process.wait(within)

    def end(self) -> None:
        """SIGTERM; exit status 0 and a clean log."""
        self.process.send_signal(signal.SIGTERM)
        assert self.wait() == 0, self.log()
        self.check_log()

    def check_log(self) -> None:
        assert self._failing or "Traceback" not in self.log(), self.log()

    def people(self) -> list[int]:
        """Pids of the custodian and of all workers that live."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                if not entry.name.isdigit() or b"postcopy_workers" not in (entry / "cmdline").read_bytes():
                    continue
                if zygote.of_this_test(int(entry.name)) and alive(int(entry.name)):
                    found.append(int(entry.name))
        return found

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            if error is None and self.process.poll() is None:
                self.audit()
                self.end()
            elif error is not None:
                print(f"--- log of the supervisor ---\n{self.log()[-6000:]}", file=sys.stderr)
                for puppet in self._puppets:
                    print(f"--- client {puppet.pid} ---\n{puppet.errors()[-1000:]}", file=sys.stderr)
        finally:
            self._drop()

    def _drop(self) -> None:
        for puppet in self._puppets:
            puppet.close()
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(END_WITHIN)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(10)
        if self.process.returncode == -signal.SIGKILL:
            self._end_orphans()
        self._context.term()
        self._log.close()

    def _end_orphans(self) -> None:
        """A custodian outlives a supervisor that was killed, in the hope of another."""
        for pid in self.people():
            with contextlib.suppress(OSError, AssertionError):
                end_by_pidfd(pid, signal.SIGKILL, "postcopy-")
        for name in ("door", "private/router", "private/custodian"):
            (self.directory / name).unlink(missing_ok=True)


def refused(
    directory: Path | str, *blocks: str, options: dict[str, Option] | None = None, cwd: Path | None = None
) -> tuple[int, str]:
    """Start a supervisor that cannot stand: its exit status and what it said on stderr. Nothing may be on stdout."""
    command = arguments(directory, blocks, options or {})
    done = subprocess.run(command, capture_output=True, env=environment(), cwd=cwd, timeout=END_WITHIN, check=False)
    assert done.stdout == b""
    return done.returncode, done.stderr.decode("utf-8", "replace").strip()
