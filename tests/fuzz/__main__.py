"""Fuzzing of everything that takes bytes from outside: ``python -m tests.fuzz [--inputs N] [--seed S] [--only NAME]``.

An input is one frame given to one listener: random bytes, or a valid message with bytes flipped, cut, doubled, spliced,
or with wrong values in its fields; on the return path also one that fits what is open just then. A listener takes it or
refuses it by its own exception (BadMessage, Refusal); any other exception is a finding: it is printed with the seed and
the bytes, and the exit status is 1. Both ends of a return path are what runs (fuzz_return_path.py), and what must hold
there is checked after every word.
"""

from __future__ import annotations

import argparse
import logging
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import fields
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgpack  # type: ignore[import-untyped, unused-ignore]

from postcopy_protocol import codec, counters, zmtp
from postcopy_protocol.attach_conversation import FROM_CLIENT, AttachConversation, Refusal
from postcopy_protocol.codec import decode, encode, unpack_offsets
from postcopy_protocol.errors import BadInput, BadMessage
from postcopy_protocol.messages import (
    VERSION,
    BlockNote,
    ClientNote,
    ControlRefused,
    Fetched,
    Hello,
    Lost,
    Message,
    OfferUserfaultfd,
    Report,
    RequestPages,
    Resumed,
    TakeOver,
    Wake,
    WorkerHello,
)
from postcopy_protocol.qemu_format import MAPPED_RAM
from postcopy_protocol.qemu_ram_file import read_index
from postcopy_protocol.return_path import FROM_SOURCE, FROM_SUPERVISOR, pack_ranges
from postcopy_protocol.sources import parse_named
from postcopy_protocol.vhost_conversation import FrontEnd, Stage, lay_out
from postcopy_protocol.vhost_user import HEADER, FrameReader, ProtocolFeature, Request, VhostUserError
from postcopy_supervisor.clients.client import Clients
from postcopy_supervisor.event_log import EventLog
from postcopy_supervisor.observe import queries
from postcopy_supervisor.observe.queries import LongAnswers, Queries
from postcopy_supervisor.paging.engine import Engine
from postcopy_supervisor.parts import RunState
from postcopy_supervisor.pool.lifecycle import RestartPolicy
from postcopy_supervisor.recovery import plan
from postcopy_supervisor.waits import Waits
from postcopy_workers.takeover_socket import PendingConnection, TakeoverSocket
from tests.fuzz.return_path import SourceEnd, SupervisorEnd
from tests.unit.protocol import qemu_streams

PAGE = 4096
ALL = tuple(codec.MESSAGES.values())
Listener = Callable[[bytes], None]
WIRE_BYTES = 1 << 16
FROM_WORKER = (WorkerHello, Report, Fetched, RequestPages)
TO_WORKER = (Wake, Lost)


class Fuzzer:
    """Inputs by the seed, and the listeners that they are given to, which keep their state from input to input."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.outcomes: Counter[str] = Counter()
        self.source, self.supervisor = SourceEnd(self.random), SupervisorEnd(self.random)
        self.nearly: dict[str, Callable[[], Message | bytes]] = {
            "source": self.source.nearly,
            "qemu": lambda: qemu_streams.nearly(self.random),
            "link": self.supervisor.nearly_of_source,
            "router": self.supervisor.nearly_of_worker,
        }
        self.listeners: dict[str, tuple[Listener, tuple[type[Message], ...]]] = {
            "decode": (lambda data: void(decode(data, expect=ALL)), ALL),
            "door": (self._door, FROM_CLIENT),
            "source": (self.source.hear, FROM_SUPERVISOR),
            "link": (self.supervisor.from_source, FROM_SOURCE),
            "router": (self.supervisor.from_worker, FROM_WORKER),
            "control": (self._control, queries.QUESTIONS),
            "worker": (self._worker, TO_WORKER),
            "resumed": (lambda data: void(unpack_offsets(decode(data, expect=(Resumed,)).released)), (Resumed,)),
            "takeover": (self._takeover, (TakeOver,)),
            "inventory": (self._inventory, (BlockNote, ClientNote)),
            "back-end": (self._back_end, ALL),
            "qemu": (self._qemu, ALL),
            "wire": (self._wire, ALL),
        }
        with tempfile.TemporaryDirectory(prefix="pcf-", dir="/tmp") as directory:
            (Path(directory) / "private").mkdir()
            self.takeover = TakeoverSocket(directory)
        # What a question reads before it names a block or a client that exists.
        parts = SimpleNamespace(
            state=RunState(0.0, "running"),
            shown_state="running",
            recoveries=0,
            blocks={},
            clients=Clients((), cast(Any, None)),
            pool=SimpleNamespace(resume=void, policy=RestartPolicy(), restarts=0, restarts_of=lambda worker: 0),
            zero=SimpleNamespace(faults=0, counters=counters.merge(())),
            paging=SimpleNamespace(links={}, engine=Engine(), placed=0),
            event_log=EventLog(),
            waits=Waits({}, Clients((), cast(Any, None)), Engine()),
            refused={},
            recorder=None,
            transport="native",
        )
        exports, auditor = SimpleNamespace(get=void), SimpleNamespace(now=lambda: iter(()))
        stopper = SimpleNamespace(ask=void)
        self.queries = Queries(*cast(Any, (parts, exports, auditor, stopper)))
        self._fresh()

    def _fresh(self) -> None:
        """New conversations, so that early states are met again and again."""
        self.conversation = AttachConversation()
        if self.random.random() < 0.8:
            self.conversation.on_message(Hello("fuzz", "native"), 0)
            self.conversation.on_message(OfferUserfaultfd(), 1)
            self.conversation.opened(1, "private", 64, PAGE)
        if self.random.random() < 0.3:
            self.source.fresh()
            self.supervisor.fresh()

    def _back_end(self, data: bytes) -> None:
        """A vhost-user back-end answers: anything, or nearly right, under a header that may be a lie."""
        talk, chance = FrontEnd(), self.random
        talk._asked, talk.protocol = set(Request), ProtocolFeature.MQ | ProtocolFeature.CONFIG
        match chance.randrange(8):
            case 0 | 1:
                asked = chance.choice([talk.get_features(), talk.barrier(), talk.get_protocol_features()])
            case 2 | 3:
                asked = chance.choice([talk.get_queue_num(), talk.get_config(0, 8), talk.set_owner()])
            case 4:
                talk.stage = chance.choice([Stage.AGREED, Stage.MAPPED])
                asked = talk.advise() if talk.stage is Stage.AGREED else talk.get_vring_base(0)
            case _:
                talk.stage = Stage.LISTENING
                asked = talk.set_mem_table(lay_out([(0, PAGE, None), (PAGE, PAGE, None)]), [0, 0])
        if chance.random() < 0.7:
            nearly = bytearray(asked.data[HEADER.size :] or bytes(8))
            if chance.random() < 0.5:
                nearly[chance.randrange(len(nearly))] ^= 1 << chance.randrange(8)
            data = bytes(nearly)
        request = asked.request if chance.random() < 0.8 else chance.randrange(1 << 32)
        size = len(data) if chance.random() < 0.8 else chance.randrange(1 << 32)
        reader, stream = FrameReader(), HEADER.pack(request, chance.choice((5, 5, 5, 5, 13, 1, 4)), size) + data
        while stream:
            wanted = reader.wanted
            frame = reader.feed(stream[:wanted], range(chance.choice((0, 0, 0, 0, 0, 1, 9))))
            stream = stream[wanted:]
            if frame is not None:
                return void(talk.heard(asked, frame))

    def _qemu(self, data: bytes) -> None:
        """A migration stream of QEMU, in one slice and in many; or a mapped-ram file."""
        if MAPPED_RAM.encode() in data[:200]:
            return void(read_index(lambda offset, length: data[offset : offset + length], len(data)))
        qemu_streams.judge(data, self.random)

    def _wire(self, data: bytes) -> None:
        """The bytes of a connection: ZMTP around the message, or nearly. Both readers hear the same, whatever it is."""
        chance = self.random
        cuts = sorted(chance.randrange(len(data) + 1) for _ in range(chance.choice((0, 0, 0, 1, 3))))
        parts = [data[start:end] for start, end in zip([0, *cuts], [*cuts, len(data)], strict=True)]
        ready = zmtp.opening(chance.choice((b"", b"w1.1", b"x" * 255)), chance.choice((b"DEALER", b"ROUTER")))
        stream = bytearray(ready + b"".join(map(bytes, zmtp.framed(parts))))
        for _ in range(chance.choice((0, 0, 1, 4))):
            stream += zmtp.command(b"PING", chance.randbytes(chance.randrange(9))) if chance.random() < 0.3 else b""
            stream += b"".join(map(bytes, zmtp.framed([chance.randbytes(chance.randrange(600)) for _ in parts])))
        for _ in range(chance.choice((0, 1, 1, 2, 5))):
            self._mutate(stream)
        plain, placed = zmtp.Reader(WIRE_BYTES), zmtp.PlacedReader(memoryview(bytearray(WIRE_BYTES)))
        heard: list[list[list[bytes]]] = [[], []]
        refused: list[BadMessage | None] = [None, None]
        while stream:
            piece = bytes(stream[: chance.choice((1, 7, 64, 4096))])
            del stream[: len(piece)]
            feeds: tuple[Callable[[bytes], Any], ...] = (plain.feed, partial(_placed, placed))
            for which, feed in enumerate(feeds):
                try:
                    heard[which] += [[one] if isinstance(one, bytes) else list(map(bytes, one)) for one in feed(piece)]
                except BadMessage as error:
                    refused[which] = error
            if refused[1] is not None and "in all" in str(refused[1]):
                raise refused[1]  # of a message's size: this one counts what stands before the frames, too
            assert heard[0] == heard[1] and (refused[0] is None) == (refused[1] is None), (heard, refused)
            if refused[0] is not None:
                raise refused[0]
        if not plain.ready or plain.answer != placed.take_answer():
            raise BadMessage("not whole") if not plain.ready else AssertionError("they answer differently")

    def one(self, only: str = "") -> None:
        """Give one input to a listener: to ``only``, if it is named."""
        if self.random.random() < 0.01:
            self._fresh()
        name = only or self.random.choice(list(self.listeners))
        listen, kinds = self.listeners[name]
        data = self._input(kinds, self.nearly.get(name))
        try:
            listen(data)
            self.outcomes[f"{name}: taken"] += 1
        except (BadInput, BadMessage, Refusal, VhostUserError):
            self.outcomes[f"{name}: refused"] += 1
        except Exception as error:
            raise AssertionError(f"{name} broke on {data!r}: {type(error).__name__}: {error}") from error

    # --- listeners ----------------------------------------------------------------------------------------------------

    def _door(self, data: bytes) -> None:
        self.conversation.on_message(decode(data, expect=FROM_CLIENT), self.random.choice((0, 0, 0, 1, 2)))
        if self.random.random() < 0.3:
            self.conversation.opened(self.random.randrange(3), self.random.choice(("private", "shared")), 64, PAGE)

    def _control(self, data: bytes) -> None:
        question = decode(data, expect=queries.QUESTIONS)
        if isinstance(question, queries.LONG):
            answers: list[Message] = []
            sender = SimpleNamespace(send_answer=lambda _, answer: answers.append(answer), report_bug=found)
            long_answers = LongAnswers(self.queries, cast(Any, sender))
            long_answers.ask(b"", question)
            long_answers.finish()
            (answer,) = answers
        else:
            answer = self.queries.answer(question)
        if isinstance(answer, ControlRefused):
            raise BadMessage(answer.reason)
        encode(answer)

    def _worker(self, data: bytes) -> None:
        message = decode(data, expect=TO_WORKER)
        assert isinstance(message, Wake | Lost)
        unpack_offsets(message.offsets)

    def _takeover(self, data: bytes) -> None:
        """The custodian's own socket; each input is the first word of a visitor."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            theirs.send(data)
            self.takeover._pending[ours.fileno()] = PendingConnection(ours, 0.0)
            taken = self.takeover.read(ours.fileno())
        if taken is None:
            raise BadMessage("not taken")
        taken.close()

    def _inventory(self, data: bytes) -> None:
        """What a custodian says that it keeps, of which the next supervisor makes its plan."""
        key = self.random.choice(("block/1", "client/1"))
        estate = plan.read({"house": (b"", (1, 2, 3)), key: (data, (4, 5, 6)[: self.random.choice((2, 3, 3))])}, ())
        name, source = parse_named("ram0=zero:256K")
        plan.judge(estate, {name: source}, PAGE, {1, 2, PAGE}, {}, {})

    def close(self) -> None:
        self.takeover.close()
        self.source.close()
        self.supervisor.close()

    # --- inputs -------------------------------------------------------------------------------------------------------

    def _input(self, kinds: tuple[type[Message], ...], nearly: Callable[[], Message | bytes] | None) -> bytes:
        if nearly is not None and self.random.random() < 0.7:
            word = nearly()
            fitting = bytearray(encode(word) if isinstance(word, Message) else word)
            if self.random.random() < 0.3:
                self._mutate(fitting)
            return bytes(fitting)
        how = self.random.random()
        if how < 0.05:
            return self.random.randbytes(self.random.randrange(64))
        if how < 0.35:
            return bytes(msgpack.packb(self._wrong_fields(self.random.choice(kinds))))
        data = bytearray(encode_or_pack(self.random.choice(kinds), self._field))
        for _ in range(self.random.choice((0, 0, 1, 1, 2, 8))):
            self._mutate(data)
        return bytes(data)

    def _mutate(self, data: bytearray) -> None:
        at = self.random.randrange(len(data) + 1)
        match self.random.randrange(5):
            case 0:
                data[at:at] = self.random.randbytes(self.random.randrange(1, 5))
            case 1:
                del data[at : at + self.random.randrange(1, 9)]
            case 2:
                del data[at:]
            case 3:
                data[at:at] = data[: self.random.randrange(len(data) + 1)]
            case _ if at < len(data):
                data[at] ^= 1 << self.random.randrange(8)

    def _wrong_fields(self, kind: type[Message]) -> list[Any]:
        values = [self._any(3) for _ in fields(kind)]
        head = [self.random.choice((VERSION, VERSION, VERSION, VERSION + 1, None, True)), kind.TAG]
        return (head + values)[: self.random.choice((None, None, None, 1, 2, 3))]

    def _any(self, depth: int) -> Any:
        simple = (None, True, 1.5, "ram0", "private", b"", b"\0" * 16, *self._numbers())
        choice = self.random.randrange(len(simple) + 2)
        if choice < len(simple):
            return simple[choice]
        below = [self._any(depth - 1) for _ in range(self.random.randrange(4))] if depth else []
        return below if choice == len(simple) else {0: below}

    def _numbers(self) -> tuple[int, ...]:
        return (-1, 0, 1, 2, PAGE, 64 * PAGE, 65 * PAGE, 1 << 47, (1 << 64) - 1, self.random.randrange(1 << 32))

    def _field(self, annotation: str) -> Any:
        pick = self.random.choice
        match annotation:
            case "int":
                return pick(self._numbers()[1:])
            case "bool":
                return pick((True, False))
            case "str":
                return pick(("ram0", "private", "shared", "native", "x", "", "no-such-block", "out-of-phase"))
            case "bytes":
                pages = [
                    (pick((0, 1, 7, 63, 64, 65)) * PAGE, pick((0, 1, 1, 2, 9)) * PAGE) for _ in range(pick((1, 1, 2)))
                ]
                return pick(
                    (b"", b"\0", b"\1", b"\2", pack_ranges(pages), pack_ranges(pages), self.random.randbytes(32))
                )
        return ()


def encode_or_pack(kind: type[Message], make: Callable[[str], Any]) -> bytes:
    """A message with plausible fields, as it goes over the wire; packed by hand where the codec would not take it."""
    values = [make(str(field.type)) for field in fields(kind)]
    try:
        return encode(kind(*values))
    except Exception:
        return bytes(msgpack.packb([VERSION, kind.TAG, *values]))


def _placed(reader: zmtp.PlacedReader, data: bytes) -> list[list[memoryview]]:
    space = reader.space()
    space[: len(data)] = data
    return reader.filled(len(data))


def void(*_: Any, **__: Any) -> None:
    """Takes anything, says nothing."""


def found(_: object, error: Exception) -> None:
    """A bug that the service would live on with."""
    raise error


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 32))
    parser.add_argument("--only", default="", metavar="LISTENER", help="such as qemu; default: each in turn, at random")
    told = parser.parse_args()
    logging.disable()
    fuzzer, began = Fuzzer(told.seed), time.monotonic()
    if told.only and told.only not in fuzzer.listeners:
        parser.error(f"no listener {told.only!r}; there are {', '.join(fuzzer.listeners)}")
    for number in range(told.inputs):
        try:
            fuzzer.one(told.only)
        except AssertionError as finding:
            print(f"seed {told.seed}, input {number}: {finding}", file=sys.stderr)
            return 1
    print(f"{told.inputs} inputs in {time.monotonic() - began:.0f} s, seed {told.seed}, no finding")
    for outcome, number in sorted(fuzzer.outcomes.items()):
        print(f"{number:9d} {outcome}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
