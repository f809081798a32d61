"""A supervisor of a hundred lines, for tests of the client alone: one thread, no workers, blocks from files.

``with FakeSupervisor(directory, {"ram0": path}) as service`` runs it as a process of its own, because a client that
touches a missing page holds its interpreter until the page has come.

Options: ``lost`` (byte offsets that are poisoned when touched), ``slow`` (offsets that never come), ``deaf`` (names of
messages that are not answered), ``old`` (it knows no watchers). SIGTERM ends it in order: holes poisoned,
Ending said.
"""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

from postcopy_kernel.descriptors import close_all, receive_message, send_message
from postcopy_kernel.memory import Mapping, create_memfd, data_runs, reopen
from postcopy_kernel.process import die_with_parent
from postcopy_kernel.userfaultfd import PageFault, Userfaultfd, open_device, open_userfaultfd
from postcopy_protocol.attach_conversation import FROM_CLIENT, AttachConversation, Refusal
from postcopy_protocol.codec import decode, encode
from postcopy_protocol.geometry import page_count
from postcopy_protocol.messages import (
    AskLoss,
    AskOrphanPolicy,
    Attached,
    BlockOpened,
    Blocks,
    Ending,
    Goodbye,
    Hello,
    ListBlocks,
    Listed,
    Loss,
    Mapped,
    Message,
    OfferUserfaultfd,
    OpenBlock,
    OrphanPolicy,
    Unmap,
    Unmapped,
    UserfaultfdAccepted,
    Welcome,
)
from postcopy_protocol.received_map import RECEIVED

PAGE = 4096


class FakeSupervisor:
    """The process, from the test's side."""

    def __init__(self, directory: Path, blocks: dict[str, Path], **options: Any) -> None:
        settings = {"directory": str(directory), "blocks": {name: str(path) for name, path in blocks.items()}}
        self._settings = json.dumps({**settings, **options, "parent": os.getpid()})
        self.directory = directory

    def __enter__(self) -> FakeSupervisor:
        self.process = subprocess.Popen([sys.executable, __file__, self._settings], stdout=subprocess.PIPE)
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == b"ready\n"
        return self

    def end(self, number: int = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(10)
        (self.directory / "door").unlink(missing_ok=True)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end(signal.SIGKILL)
        assert self.process.stdout is not None
        self.process.stdout.close()


class FakeBlock:
    def __init__(self, number: int, path: str) -> None:
        self.number = number
        self.data = Path(path).read_bytes()
        self.size = len(self.data)
        self.pages = page_count(self.size, PAGE)
        self.memory = create_memfd("fake", self.pages * PAGE)
        self.map = create_memfd("fake-map", page_count(self.pages, PAGE) * PAGE)
        self.mapping = Mapping.of(self.memory, self.pages * PAGE)
        self.userfaultfd = open_userfaultfd()
        self.userfaultfd.handshake()
        self.userfaultfd.register(self.mapping.address, self.mapping.length)
        self.stage = Mapping.anonymous(PAGE)
        self.window = self.stage.view()

    def place(self, offset: int) -> None:
        piece = self.data[offset : offset + PAGE]
        self.window[:] = piece + bytes(PAGE - len(piece))
        self.userfaultfd.copy(self.mapping.address + offset, self.stage.address, PAGE)
        os.pwrite(self.map, bytes((RECEIVED,)), offset // PAGE)


@dataclass
class FakeClient:
    sock: socket.socket
    law: AttachConversation = field(default_factory=AttachConversation)
    userfaultfd: Userfaultfd | None = None


class FakeHouse:
    def __init__(self, settings: dict[str, Any]) -> None:
        self.blocks = {name: FakeBlock(n, path) for n, (name, path) in enumerate(settings["blocks"].items())}
        self.lost, self.slow = set(settings.get("lost", ())), set(settings.get("slow", ()))
        self.cause = str(settings.get("cause", ""))
        self.deaf = set(settings.get("deaf", ()))
        self.old = bool(settings.get("old"))
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.listener.bind(str(Path(settings["directory"]) / "door"))
        self.listener.listen(64)
        self.clients: list[FakeClient] = []

    def run(self) -> None:
        try:
            while True:
                self.turn()
        except KeyboardInterrupt:
            self.end()

    def turn(self) -> None:
        poll = select.poll()
        poll.register(self.listener, select.POLLIN)
        for client in self.clients:
            poll.register(client.sock, select.POLLIN)
            if client.userfaultfd is not None:
                poll.register(client.userfaultfd, select.POLLIN)
        ready = {fd for fd, _ in poll.poll(1000)}
        for client in list(self.clients):
            if client.userfaultfd is not None and client.userfaultfd.fd in ready:
                self.resolve(client)
            if client.sock.fileno() in ready:
                self.hear(client)
        if self.listener.fileno() in ready:
            self.clients.append(FakeClient(self.listener.accept()[0]))

    def resolve(self, client: FakeClient) -> None:
        assert client.userfaultfd is not None
        for event in client.userfaultfd.read():
            assert isinstance(event, PageFault)
            found = client.law.regions.find(event.address)
            assert found is not None
            block = next(b for b in self.blocks.values() if b.number == found[0].block)
            page, offset = event.address & -PAGE, found[1] & -PAGE
            if offset in self.lost:
                client.userfaultfd.poison(page, PAGE)
            elif offset not in self.slow:
                block.place(offset)
                client.userfaultfd.wake(page, PAGE)

    def hear(self, client: FakeClient) -> None:
        received = receive_message(client.sock)
        if not received.data:
            client.sock.close()
            self.clients.remove(client)
            return
        message: Message = decode(received.data, expect=FROM_CLIENT)
        if type(message).__name__ in self.deaf:
            close_all(received.fds)
            return
        try:
            client.law.on_message(message, len(received.fds))
            self.answer(client, message, received.fds)
        except Refusal as refusal:
            send_message(client.sock, encode(refusal.message()))

    def answer(self, client: FakeClient, message: Message, fds: tuple[int, ...]) -> None:
        def say(word: Message, *own: int) -> None:
            send_message(client.sock, encode(word), own)
            close_all(own)

        if isinstance(message, Hello):
            say(Welcome(1), open_device())
        elif isinstance(message, OfferUserfaultfd):
            client.userfaultfd = Userfaultfd(fds[0])
            client.userfaultfd.handshake()
            say(UserfaultfdAccepted())
        elif isinstance(message, OpenBlock):
            block = self.blocks.get(message.name)
            if block is None:
                raise Refusal("no-such-block", f"there is no block {message.name}")
            client.law.opened(block.number, message.mode, block.pages, PAGE)
            say(
                BlockOpened(block.number, message.name, block.size, PAGE, block.pages),
                reopen(block.memory, writable=message.mode == "shared"),
                reopen(block.map, writable=False),
            )
        elif isinstance(message, Mapped):
            assert client.userfaultfd is not None
            client.userfaultfd.register(message.address, message.length)
            say(Attached(message.block, message.address))
        elif isinstance(message, Unmap):
            say(Unmapped(message.block, message.address))
        elif isinstance(message, AskLoss):
            say(Loss("ram0", message.offset, self.cause))
        elif isinstance(message, ListBlocks):
            say(Blocks(tuple(Listed(name, block.size, PAGE, False) for name, block in self.blocks.items())))
        elif isinstance(message, AskOrphanPolicy):
            if self.old:
                raise Refusal("bad-message", "unknown tag 9")
            say(OrphanPolicy(0, False))
        elif isinstance(message, Goodbye) and client.userfaultfd is not None:
            client.userfaultfd.close()
            client.userfaultfd = None

    def end(self) -> None:
        for client in self.clients:
            for region in client.law.regions:
                block = next(b for b in self.blocks.values() if b.number == region.block)
                present = {
                    o for start, stop in data_runs(block.memory, 0, region.length) for o in range(start, stop, PAGE)
                }
                for offset in set(range(0, region.length, PAGE)) - present:
                    assert client.userfaultfd is not None
                    client.userfaultfd.poison(region.address + offset, PAGE)
            send_message(client.sock, encode(Ending("told to")))


def main() -> None:
    settings = json.loads(sys.argv[1])
    die_with_parent(settings["parent"])
    service = FakeHouse(settings)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # KeyboardInterrupt: told to end
    print("ready", flush=True)
    service.run()


if __name__ == "__main__":
    main()
