"""Descriptors of other users. The last close of one that they send waits as long as they like; and of what they do not
receive the kernel allows our user only some."""

from __future__ import annotations

import resource
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import SourceFile
from tests.system.service import PAGE, Puppet, Service, end_by_pidfd, until, word
from tests.wire.caller import Caller

ALLOWED, DENIED = 65533, 65000
TOOLS = """
import contextlib, socket, struct
from tests.wire.caller import FROM_SUPERVISOR
from postcopy_protocol.codec import decode, encode
from postcopy_protocol.messages import Hello, OfferUserfaultfd, OpenBlock, Welcome
from tests.wire.caller import Caller
'127.0.0.1'.encode('idna')  # later this user cannot load it
door, kept = directory + '/door', []

def lingering(seconds=600):
    '''A socket that has more to send than its peer will read: its last close waits.'''
    server = socket.create_server(('127.0.0.1', 0))
    near = socket.create_connection(server.getsockname())
    kept.extend((server, server.accept()[0]))
    near.setblocking(False)
    try:
        while True:
            near.send(bytes(65536))
    except BlockingIOError:
        pass
    near.setblocking(True)
    near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, seconds))
    return near

def connected():
    caller = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    caller.connect(door)
    kept.append(caller)
    return caller

def admitted():
    try:
        caller = connected()
    except PermissionError:  # the kernel keeps this user out
        return False
    with contextlib.suppress(BrokenPipeError):  # it is refused, and the answer says why
        caller.send(encode(Hello('x', 'native')))
    answer = caller.recv(1000)
    return answer != b'' and isinstance(decode(answer, expect=FROM_SUPERVISOR), Welcome)

def flood(connections):
    '''Connect and send a descriptor each; how often that succeeds.'''
    near, count = lingering(), 0
    kept.append(near)
    with contextlib.suppress(PermissionError):
        for _ in range(connections):
            socket.send_fds(connected(), [encode(Hello('x', 'native'))], [near.fileno()])
            count += 1
    return count

def give(caller, message):
    with lingering() as near:
        socket.send_fds(caller, [encode(message)], [near.fileno()] * 2)
"""


def hostile(service: Service, uid: int, more: str = "") -> Puppet:
    client = service.client(None)
    client.do(f"{TOOLS}{more}\nbecome({uid}, -1)")
    return client


def refusals(service: Service, client: Puppet) -> list[str]:
    client.do("with contextlib.suppress(PermissionError): connected()")
    return service.events("denied")


@contextmanager
def busy(service: Service) -> Iterator[None]:
    """What comes meanwhile is in its sockets when the supervisor looks."""
    end_by_pidfd(service.pid, signal.SIGSTOP, "postcopy")
    try:
        yield
    finally:
        end_by_pidfd(service.pid, signal.SIGCONT, "postcopy")


def descriptors_of(service: Service) -> int:
    return len(list(Path(f"/proc/{service.pid}/fd").iterdir()))


def goes_on(service: Service) -> None:
    """Its listener and its main thread answer; a client attaches."""
    with Caller(service.directory) as caller:
        caller.hello()
    client = service.client()
    assert client.do("words(b, [3])") == [word(3 * PAGE)]


def test_no_other_user_waits_for_a_close(runtime_dir: Path, source_file: SourceFile) -> None:
    with Service(runtime_dir, f"ram0={source_file(8 * PAGE)}", allow_uid=[ALLOWED]) as service:
        stranger = hostile(service, DENIED)
        with busy(service):
            stranger.do("give(connected(), Hello('x', 'native'))")
        goes_on(service)

        unread = hostile(service, ALLOWED)  # a connection that ends while it has messages
        unread.do("caller = connected()")
        with busy(service):
            unread.do("caller.send(b'nonsense')\nfor _ in range(3): give(caller, OfferUserfaultfd())\ncaller.close()")
        goes_on(service)
        until(lambda: any("cannot be closed" in text for text in refusals(service, unread)), "its user is kept out")
        before = descriptors_of(service)
        with busy(service):
            assert unread.do("flood(100)") == 0
        goes_on(service)
        assert descriptors_of(service) < before + 20

        for client in (stranger, unread):
            client.kill()
        again = hostile(service, ALLOWED)
        until(lambda: again.do("admitted()"), "it may come again")
        again.do("caller = kept[-1]")
        with busy(service):  # in the place of its userfaultfd
            again.do("give(caller, OfferUserfaultfd())")
        goes_on(service)
        again.kill()


UNREAD = """
def not_read(connections):
    for _ in range(connections):
        try:
            caller = Caller(directory)
            kept.append(caller)
            caller.hello()
            caller.offer()
            caller.socket.settimeout(5)
            for _ in range(500):
                caller.say(OpenBlock('ram0', 'private'))
        except (OSError, AssertionError):
            pass

def received():
    '''How many descriptors are in what was not read.'''
    count = 0
    for caller in kept:
        caller.socket.settimeout(0.5)
        try:
            while (got := socket.recv_fds(caller.socket, 8192, 16))[0]:
                count += len(got[1])
                for fd in got[1]: os.close(fd)
        except OSError:
            pass
    return count
"""


def test_answers_that_are_not_read(runtime_dir: Path, source_file: SourceFile) -> None:
    """They count against the supervisor's user, also when their client is gone: beyond ``ulimit -n`` it could send no
    descriptor to anybody, not even to its custodian. (root may send more.)"""
    most = 512

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))

    with Service(runtime_dir, f"ram0={source_file(8 * PAGE)}", allow_uid=[ALLOWED], preexec=limited) as service:
        client = hostile(service, ALLOWED, UNREAD)
        client.do("not_read(40)", 60)
        assert any("does not read its answers" in text for text in service.events("denied"))
        found = client.do("received()", 60)
        assert 10 < found <= most // 4 + 2 * most // 16
        until(lambda: client.do("admitted()"), "what is read counts no more")
        goes_on(service)
