"""The sockets of the runtime directory: made again when the directory is removed or renamed while we serve.

Cleaners of /tmp and the end of a login session do that. Without the sockets no client could attach, no new worker could
connect, and no later supervisor could take over; what is connected already goes on."""

from __future__ import annotations

import os
import socket
from contextlib import suppress

from postcopy_protocol.errors import BadInput
from postcopy_wire.transport import Router

from .event_log import RecordEvent
from .listener import Listener
from .pool.custodian_client import CustodianClient
from .runtime import RuntimeDirectory, binding

KIND = "runtime-dir"
BACKLOG = 4096  # the kernel's own limit, net.core.somaxconn, is as high


def listen_for_workers(router: Router, runtime: RuntimeDirectory) -> None:
    """Bind the router's socket, or bind it again. Raises BadInput."""
    with binding(runtime.router):
        router.listen(runtime.endpoint)


def listen_for_clients(runtime: RuntimeDirectory) -> socket.socket:
    """A new attach socket. Raises BadInput."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    listening.setblocking(False)
    with binding(runtime.door):
        listening.bind(runtime.door)
        os.chmod(runtime.door, 0o666)
    listening.listen(BACKLOG)
    return listening


class Entrances:
    """Watches the attach socket and the router's socket by their paths. Only the main thread calls it."""

    def __init__(
        self,
        runtime: RuntimeDirectory,
        router: Router,
        attach_socket: socket.socket,
        listener: Listener,
        custodian: CustodianClient,
        event: RecordEvent,
    ) -> None:
        self._runtime, self._router, self._attach_socket = runtime, router, attach_socket
        self._listener, self._custodian, self._event = listener, custodian, event
        self._made = self._found()
        self._failed = ""  # why the last attempt has failed, which is reported once

    def _found(self) -> list[tuple[int, int]]:
        """What is at the two paths now."""
        found = []
        for path in (self._runtime.door, self._runtime.router):
            with suppress(OSError):
                at = os.lstat(path)
                found.append((at.st_dev, at.st_ino))
        return found

    def tick(self) -> None:
        """Once a second."""
        if self._found() == self._made:
            return
        path = self._runtime.path
        try:
            self._make_again()
        except (BadInput, OSError) as error:
            if str(error) != self._failed:
                self._failed = str(error)
                text = f"{path} was removed or renamed, and cannot be made again: until it can, no client attaches"
                self._event(KIND, f"{text}, and no new worker connects", cause=self._failed)
            return
        self._made, self._failed = self._found(), ""
        self._event(KIND, f"{path} was removed or renamed, or its sockets were; it is made again")

    def _make_again(self) -> None:
        self._runtime.claim_again()
        with listen_for_clients(self._runtime) as fresh:
            os.dup2(fresh.fileno(), self._attach_socket.fileno(), inheritable=False)  # every holder has the new one
        self._listener.watch_attach_socket()
        listen_for_workers(self._router, self._runtime)
        self._custodian.fill_stores()
        if self._custodian.channel is not None and not os.path.lexists(self._runtime.custodian):
            self._custodian.kill()  # its successor, which gets everything that it keeps, makes its socket again
