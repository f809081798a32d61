"""A worker's channel over libzmq."""

from __future__ import annotations

import os
import select
import threading
from collections import deque

import zmq

from postcopy_protocol.zmtp import LARGEST

from .libzmq import RETRY_MOST_MS, Context, Dealer, can_receive
from .transport import Action

_LAST, _RCVMORE = int(zmq.DONTWAIT), int(zmq.RCVMORE)


class LibzmqChannel:
    """See ``transport.Channel``. One lock guards the socket, because libzmq sockets belong to one thread at a time."""

    def __init__(self, endpoint: str, identity: bytes, hello: bytes, on_held: Action) -> None:
        self._endpoint = endpoint
        self._identity = identity
        self._hello = hello
        self._on_held = on_held
        self._lock = threading.Lock()
        self._outbox: deque[bytes] = deque()
        self._context: Context = zmq.Context()
        self._dealer: Dealer | None = None
        self._epoll = select.epoll()
        self._wakeup = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        """A sender has found that a message arrived: its send consumed the edge that the receiver waits for."""
        self._epoll.register(self._wakeup, select.EPOLLIN)
        self.connected = False

    @property
    def retry_in(self) -> float:
        """libzmq connects again in its own thread."""
        return RETRY_MOST_MS / 1000

    def holds(self) -> bool:
        return bool(self._outbox)

    def fileno(self) -> int:
        return self._epoll.fileno() if self._dealer is not None else -1

    def connect(self) -> bool:
        """Make the socket; from then on libzmq connects, and connects again."""
        with self._lock:
            if self._dealer is None:
                dealer = Dealer(self._context, self._endpoint, 1000, LARGEST, identity=self._identity)
                for socket in (dealer.socket, dealer.monitor):
                    self._epoll.register(int(socket.getsockopt(zmq.FD)), select.EPOLLIN)
                self._dealer = dealer
        return True

    def send(self, data: bytes) -> None:
        with self._lock:
            dealer = self._dealer
            if dealer is None or not self.connected:
                return
            if not self._outbox and self._accepted(dealer, data):
                self._wake_receiver(dealer)
                return
            self._outbox.append(data)
        self._on_held()

    def flush(self) -> None:
        with self._lock:
            if self._dealer is not None and self._outbox:
                self._flush(self._dealer)
                self._wake_receiver(self._dealer)

    def receive(self) -> list[bytes]:
        self.connect()
        while not (messages := self.receive_now()):
            self._epoll.poll()
        return messages

    def receive_now(self) -> list[bytes]:
        """Never waits."""
        with self._lock:
            dealer = self._dealer
            if dealer is None:
                return []
            self._clear_wakeup()
            if dealer.new_connection():
                self._outbox.clear()
                dealer.connected = self._accepted(dealer, self._hello)
            self.connected = dealer.connected
            self._flush(dealer)
            messages: list[bytes] = []
            while can_receive(dealer.socket):
                message = dealer.socket.recv()
                while dealer.socket.get(_RCVMORE):  # the last frame is the message
                    message = dealer.socket.recv()
                messages.append(message)
            return messages

    def close(self) -> None:
        if self._dealer is not None:
            self._dealer.close()
        self._context.term()
        self._epoll.close()
        os.close(self._wakeup)

    def _accepted(self, dealer: Dealer, data: bytes) -> bool:
        try:
            dealer.send(data, _LAST)
        except zmq.Again:
            return False
        return True

    def _flush(self, dealer: Dealer) -> None:
        while self._outbox and self._accepted(dealer, self._outbox[0]):
            self._outbox.popleft()

    def _wake_receiver(self, dealer: Dealer) -> None:
        if can_receive(dealer.socket):
            os.eventfd_write(self._wakeup, 1)

    def _clear_wakeup(self) -> None:
        try:
            os.eventfd_read(self._wakeup)
        except BlockingIOError:
            return
