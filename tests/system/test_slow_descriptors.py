"""Descriptors whose last close waits, for as long as their maker wishes. Others must not wait with it."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from tests.conftest import SourceFile
from tests.system.service import PAGE, Puppet, Service, end_by_pidfd, until, word
from tests.wire.caller import Caller

ALLOWED, DENIED = 65533, 65000
TOOLS = """
import socket, struct
from postcopy_protocol.codec import encode
from postcopy_protocol.messages import Hello, OfferUserfaultfd
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
    caller = connected()
    caller.send(encode(Hello('x', 'native')))
    return b'cannot' not in caller.recv(100)

def give(caller, message):
    with lingering() as near:
        socket.send_fds(caller, [encode(message)], [near.fileno()] * 2)
"""


def hostile(service: Service, uid: int) -> Puppet:
    client = service.client(None)
    client.do(f"{TOOLS}\nbecome({uid}, -1)")
    return client


@contextmanager
def busy(service: Service) -> Iterator[None]:
    """What comes meanwhile is in its sockets when the supervisor looks."""
    end_by_pidfd(service.pid, signal.SIGSTOP, "postcopy")
    try:
        yield
    finally:
        end_by_pidfd(service.pid, signal.SIGCONT, "postcopy")


def goes_on(service: Service) -> None:
    """Its listener and its main thread answer; a client attaches."""
    with Caller(service.directory) as caller:
        caller.hello()
    client = service.client()
    assert client.do("words(b, [3])") == [word(3 * PAGE)]


def test_nobody_waits_for_the_close_of_a_descriptor(runtime_dir: Path, source_file: SourceFile) -> None:
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
        until(lambda: any("cannot be closed" in text for text in _events(service, unread)), "its user is kept out")

        for client in (stranger, unread):
            client.kill()
        again = hostile(service, ALLOWED)
        until(lambda: again.do("admitted()"), "it may come again")
        again.do("caller = kept[-1]")
        with busy(service):  # in the place of its userfaultfd
            again.do("give(caller, OfferUserfaultfd())")
        goes_on(service)
        again.kill()


def _events(service: Service, client: Puppet) -> list[str]:
    client.do("connected()")
    return service.events("denied")
