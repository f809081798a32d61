"""Who may do what at the attach socket: modes, users, identity, and floods that cost only their sender."""

from __future__ import annotations

import os
import re
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import pytest

from postcopy_protocol.codec import encode
from postcopy_protocol.errors import AttachDenied
from postcopy_protocol.messages import Attached, Hello, Mapped, OpenBlock, Refused, Resume, Resumed, Welcome
from postcopy_sources.supervisor_source import SupervisorSource
from tests.conftest import SourceFile
from tests.system.remote import Source
from tests.system.service import PAGE, Puppet, PuppetError, Service, arguments, environment, until, word
from tests.wire.caller import Caller

ONE, TWO, DENIED = 65533, 65532, 65000


def as_user(service: Service, uid: int, gid: int = -1, tools: str = "") -> Puppet:
    client = service.client(None)
    client.do(f"{tools}\nbecome({uid}, {gid})")
    return client


def denied(client: Puppet, name: str = "ram0", mode: str = "private") -> str:
    """The text of the refusal."""
    with pytest.raises(PuppetError) as refused:
        client.attach(name, mode)
    assert refused.value.kind == "AttachDenied", refused.value
    return refused.value.text


# --- modes ------------------------------------------------------------------------------------------------------------


def test_an_allowed_user_may_not_write(runtime_dir: Path, source_file: SourceFile) -> None:
    with Service(runtime_dir, f"ram0={source_file(8 * PAGE)}", allow_uid=[ONE]) as service:
        client = as_user(service, ONE)
        text = denied(client, mode="shared")
        assert f"user {ONE} may attach block ram0 only private" in text and f"--shared-uid {ONE}" in text
        client.attach("ram0", "private")
        assert client.do("words(b, [3])") == [word(3 * PAGE)]
        assert service.client("ram0", "shared").do("words(b, [4])") == [word(4 * PAGE)], "our own user may"
        until(lambda: any("only private" in text for text in service.events("denied")), "an event tells of it")


def test_users_and_groups_that_may_write(runtime_dir: Path, source_file: SourceFile) -> None:
    """All blocks or one; being named is being allowed, and says nothing of the other blocks' mode."""
    paths = source_file(8 * PAGE), source_file(8 * PAGE, 5, "other.bin")
    blocks = (f"ram0={paths[0]}", f"ram1={paths[1]}")
    options = {"shared_uid": [ONE], "shared_gid": ["ram1=7001"]}
    with Service(runtime_dir, *blocks, **options) as service:  # type: ignore[arg-type]
        writer, member = as_user(service, ONE), as_user(service, TWO, 7001)
        writer.attach("ram0", "shared")
        writer.do(f"write(b, {PAGE}, '0700000000000000')")
        assert service.client().do("words(b, [1, 2])") == [7, word(2 * PAGE)]
        assert "only private" in denied(member, "ram0", "shared")
        member.attach("ram0", "private")
        member.attach("ram1", "shared", "c")
        assert member.do("words(c, [1])") == [word(PAGE, 5)]


def test_a_client_that_speaks_the_protocol_itself(runtime_dir: Path, source_file: SourceFile) -> None:

    def ask(caller: Caller) -> str:
        caller.hello()
        caller.offer()
        caller.say(OpenBlock("ram0", "shared"))
        return caller.refusal()

    with Service(runtime_dir, f"ram0={source_file(PAGE)}", allow_uid=[ONE]):
        assert in_child(runtime_dir, ONE, ask) == "denied"


# --- identity ---------------------------------------------------------------------------------------------------------


def in_child(directory: Path, uid: int, body: Callable[[Caller], str]) -> str:
    """What ``body`` returns in a process of this user, with a connection to the attach socket."""
    reading, writing = os.pipe()
    pid = os.fork()
    if not pid:
        try:
            os.setgroups([])
            os.setresgid(uid, uid, uid)
            os.setresuid(uid, uid, uid)
            with Caller(directory) as caller:
                os.write(writing, body(caller).encode())
        except BaseException as error:
            os.write(writing, f"{type(error).__name__}: {error}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as answer:
        said = answer.read().decode()
    os.waitpid(pid, 0)
    return said


IN_NAMESPACE = """
import ctypes, os, signal, sys
assert ctypes.CDLL(None).unshare(0x20000000) == 0
pid = os.fork()
if not pid:
    os.execv(sys.executable, [sys.executable, "-m", "postcopy_supervisor", *sys.argv[1:]])
signal.signal(signal.SIGTERM, lambda *_: os.kill(pid, signal.SIGTERM))
while True:
    try:
        sys.exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
    except InterruptedError:
        pass
"""


@contextmanager
def in_pid_namespace(directory: Path, *blocks: str) -> Iterator[None]:
    """A supervisor that sees every client's pid as 0."""
    command = [sys.executable, "-c", IN_NAMESPACE, *arguments(directory, blocks, {})[3:]]
    process = subprocess.Popen(command, env=environment(), stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert any(" ready: " in line for line in process.stderr)
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0
        process.stderr.close() if process.stderr else None


def resumed(caller: Caller, number: int) -> str:
    caller.say(Hello("again", "native"))
    caller.get(Welcome)
    caller.say(Resume(number))
    answer = caller.hear()
    return answer.code if isinstance(answer, Refused) else type(answer).__name__


def test_no_other_process_takes_over_a_session(runtime_dir: Path, source_file: SourceFile) -> None:
    """In a pid namespace all clients outside have pid 0: still only the same process may resume."""
    with in_pid_namespace(runtime_dir, f"ram0={source_file(8 * PAGE)}"), Caller(runtime_dir) as caller:
        number = caller.hello().client
        ufd = caller.offer()
        opened, memory = caller.open("ram0", "private")
        with caller.map(opened, memory, shared=False) as mapping:
            caller.say(Mapped(opened.block, mapping.address, mapping.length, 0))
            caller.get(Attached)
            caller.socket.close()
            assert in_child(runtime_dir, 0, lambda other: resumed(other, number)) == "denied"
            with Caller(runtime_dir) as again:
                assert resumed(again, number) == Resumed.__name__
            assert ufd.fd >= 0


UNMAPPED = """
import ctypes, os
libc = ctypes.CDLL(None)
assert libc.unshare(0x10000000) == 0
for name, text in (("setgroups", "deny"), ("gid_map", "0 0 1"), ("uid_map", "0 0 1")):
    open(f"/proc/self/{name}", "w").write(text)
from postcopy_kernel.process import unmapped_ids
print(unmapped_ids())
"""


def test_a_user_without_a_number_is_named_as_such() -> None:
    done = subprocess.run([sys.executable, "-c", UNMAPPED], env=environment(), capture_output=True, text=True)
    numbers = [Path(f"/proc/sys/kernel/overflow{kind}").read_text().strip() for kind in ("uid", "gid")]
    assert done.stdout.strip() == f"({', '.join(numbers)})", done.stderr


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_a_denied_user_always_hears_why(runtime_dir: Path, source_file: SourceFile) -> None:
    """Also when it has sent its Hello before the refusal; the refusals are one line and one event, ever more rarely."""

    def ask(_: Caller) -> str:
        heard = set()
        for _turn in range(100):
            with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
                sock.settimeout(20)
                sock.connect(f"{runtime_dir}/door")
                with suppress(BrokenPipeError):
                    sock.send(encode(Hello("demo", "native")))
                try:
                    heard.add("denied" if b"denied" in sock.recv(65536) else "another")
                except OSError as error:
                    heard.add(str(error.strerror))
        return " ".join(heard)

    with Service(runtime_dir, f"ram0={source_file(PAGE)}") as service:
        assert in_child(runtime_dir, DENIED, ask) == "denied"
        until(lambda: any("times)" in line for line in service.events("denied")), "an event has a count")
        lines = service.events("denied")
        assert f"user {DENIED} may not attach here" in lines[0]
        assert len(lines) < 20, "100 refusals"
        event = next(event for event in service.status()["events"] if event["kind"] == "denied")
        assert event["uid"] == DENIED
        assert re.search(rf"WARNING denied: .* event=denied uid={DENIED}", service.log())


def test_one_user_leaves_room_for_others(runtime_dir: Path, source_file: SourceFile) -> None:
    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (512, 512))

    with Service(runtime_dir, f"ram0={source_file(PAGE)}", allow_uid=[ONE], preexec=limited) as service:
        said = as_user(service, ONE, tools=HOLD).do("hold()")
        assert said[0] == 512 // 16 + 1 and "limit" in said[1] and "half of what fits" in said[1]
        assert service.client().do("words(b, [0])") == [word(0)], "there is room for others"


HOLD = """
import contextlib
from tests.wire.caller import Caller
from postcopy_protocol.messages import Hello, Refused
held = []
def hold():
    while len(held) < 100:
        held.append(Caller(directory))
        with contextlib.suppress(BrokenPipeError):  # it is refused already
            held[-1].say(Hello('one more', 'native'))
        answer = held[-1].hear()
        if isinstance(answer, Refused):
            return [len(held), answer.code + ' ' + answer.reason]
"""


# --- floods -----------------------------------------------------------------------------------------------------------


FLOOD = """
import socket
def flood(seconds):
    end, count = time.monotonic() + seconds, 0
    while time.monotonic() < end:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            try:
                sock.connect(directory + '/door')
            except PermissionError:  # kept out
                time.sleep(0.001)
            count += 1
    return count
"""
WALK = """
def walk(pages):
    times = []
    for page in pages:
        began = time.monotonic()
        words(b, [page])
        times.append(time.monotonic() - began)
        time.sleep(0.01)
    times.sort()
    return [times[len(times) // 2], times[-len(times) // 50]]
"""


@pytest.mark.parametrize("uid", [DENIED, TWO], ids=["denied", "allowed"])
def test_connections_that_come_and_go_keep_no_fault_waiting(
    runtime_dir: Path, source_file: SourceFile, uid: int
) -> None:
    """The faults of a remote block go through the supervisor's main thread, the connections too."""
    path = source_file(1024 * PAGE)
    with (
        Source(f"ram0={path}") as source,
        Service(runtime_dir, source.block(), allow_uid=[ONE, TWO], fault_around="4K", background_rate=0) as service,
    ):
        client, other = as_user(service, ONE, tools=WALK), as_user(service, uid, tools=FLOOD)
        client.attach()
        calm = client.do(f"walk({list(range(0, 400, 2))})", 60)
        other.begin("flood(4)")
        flooded = client.do(f"walk({list(range(400, 800, 2))})", 60)
        began = time.monotonic()
        service.status()
        assert time.monotonic() - began < 5, "the operator is answered"
        assert service.client().do("words(b, [900])") == [word(900 * PAGE)], "and who is let in is served"
        assert other.answer(60) > 100
        assert flooded[1] < max(1.0, 10 * calm[1]), (calm, flooded)
        until(lambda: service.events("denied"), "an event tells of it")
        assert len(service.log()) < 20_000


def test_the_kernel_keeps_out_a_user_who_connects_without_end(runtime_dir: Path, source_file: SourceFile) -> None:
    """Its connections no longer fill the backlog, so another user gets a place at once, without waiting for one."""

    def connect_at_once() -> int:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
            connection.setblocking(False)
            return connection.connect_ex(str(runtime_dir / "door"))

    def places(_: Caller) -> str:
        until(lambda: not any(connect_at_once() for _turn in range(20)), "20 places one after the other", 10)
        return "found"

    with Service(runtime_dir, f"ram0={source_file(PAGE)}", allow_uid=[ONE, TWO]) as service:
        for uid in (DENIED, ONE):
            other = as_user(service, uid, tools=FLOOD)
            other.begin("flood(3)")
            until(lambda: any("keeps it out for" in line for line in service.events("denied")), "an event tells of it")
            assert in_child(runtime_dir, TWO, places) == "found"
            assert (runtime_dir / "door").stat().st_mode & 0o777 == 0o666
            assert other.answer(60) > 100
        until(lambda: in_child(runtime_dir, DENIED, lambda _: "in") == "in", "the ban ends", 20)


def test_a_source_of_a_denied_user_hears_why(runtime_dir: Path, source_file: SourceFile) -> None:
    """It is refused before it has sent anything, or just after."""

    def ask(_: Caller) -> str:
        said = set()
        for _turn in range(20):
            try:
                SupervisorSource(str(runtime_dir), "ram0")
            except AttachDenied as error:
                said.add("denied" if "may not attach here" in str(error) else str(error))
        return " ".join(said)

    with Service(runtime_dir, f"ram0={source_file(PAGE)}"):
        assert in_child(runtime_dir, DENIED, ask) == "denied"
