"""A source that lies, floods, sends bad messages or none: no wrong byte, no crash, and no other source is affected."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import msgpack  # type: ignore[import-untyped, unused-ignore]
import pytest

from postcopy_protocol.codec import encode
from postcopy_protocol.messages import AskStop
from postcopy_protocol.return_path import Advise, Advised, Pages, Pong, RequestRanges, SourceRefused, pack_ranges
from tests.conftest import SourceFile
from tests.system.remote import kinds
from tests.system.service import Service, refused, until, word
from tests.wire.evil import PAGE, EvilSource, Frames, Script, odd

WRONG = b"\xee" * PAGE
PAGES = 256
LAST = PAGES * PAGE


def version(number: int) -> Script:
    """A right answer of another version of the protocol."""

    def script(evil: EvilSource, message: RequestRanges) -> list[Frames]:
        head, *frames = evil.pages(message)
        fields = msgpack.unpackb(head)
        fields[0] += number
        return [[msgpack.packb(fields), *frames]]

    return script


NONSENSE: dict[str, Script] = {
    "garbage": lambda *_: [[random.Random(5).randbytes(200)], [b""], [b"\xc1"], [b"\x93\x01"]],
    "a message of the other direction": lambda *_: [[encode(Advise("ram0", PAGE, ()))]],
    "a message of another conversation": lambda *_: [[encode(AskStop(False))]],
    "a version from the future": version(1),
    "a page too short": lambda _, message: odd(message, WRONG[:-1]),
    "a page too long": lambda _, message: odd(message, WRONG + b"x"),
    "an empty page": lambda _, message: odd(message, b""),
    "no page": lambda _, message: odd(message),
    "a page too many": lambda _, message: odd(message, WRONG, WRONG),
    "not aligned": lambda _, message: odd(message, WRONG, ranges=[(8, PAGE)]),
    "half a page": lambda _, message: odd(message, WRONG[:2048], ranges=[(0, 2048)]),
    "outside the block": lambda _, message: odd(message, WRONG, ranges=[(LAST, PAGE)]),
    "far outside": lambda _, message: odd(message, WRONG, ranges=[((1 << 64) - PAGE, PAGE)]),
    "no length": lambda _, message: odd(message, b"", ranges=[(0, 0)]),
    "overlapping": lambda _, message: odd(message, WRONG, WRONG, ranges=[(0, PAGE), (0, PAGE)]),
    "too many ranges": lambda _, message: odd(message, *[WRONG] * 257, ranges=[(0, PAGE)] * 257),
    "too many bytes": lambda _, message: odd(message, kinds=b"\1", ranges=[(0, 1 << 40)]),
    "an unknown kind": lambda _, message: odd(message, kinds=b"\3"),
    "too few kinds": lambda _, message: odd(message, WRONG, WRONG, kinds=b"\0", ranges=[(0, PAGE), (PAGE, PAGE)]),
    "data under the name of zeros": lambda _, message: odd(message, WRONG, kinds=b"\1"),
    "advised unasked": lambda evil, _: [[encode(Advised("ram0", evil.stream + 50, LAST, "evil", ()))]],
    "a block that was not asked for": lambda *_: [[encode(Advised("ram9", 7, LAST, "evil", ()))]],
}
HARMLESS: dict[str, Script] = {
    "a stream that was not asked for": lambda _, message: odd(message, WRONG, stream=99999),
    "another request's number": lambda evil, message: [evil.pages(_renumbered(message, 77777))],
    "twice": lambda evil, message: [evil.pages(message)] * 2,
    "pongs that were not asked for": lambda *_: [[encode(Pong(number))] for number in range(50)],
    "a refusal for no reason": lambda *_: [[encode(SourceRefused("limit", "ram0", "tired"))]],
}
LATE: dict[str, Script] = {
    "other bytes for what has come": lambda _, message: odd(message, WRONG),
    "zeros for what has come": lambda _, message: odd(message, kinds=b"\1"),
    "a loss of what has come": lambda _, message: odd(message, kinds=b"\2"),
}


def _renumbered(message: RequestRanges, request: int) -> RequestRanges:
    return RequestRanges(request, message.stream, message.urgent, message.ranges)


@pytest.fixture
def path(source_file: SourceFile) -> Path:
    return source_file(LAST)


def test_bad_messages_around_every_answer(runtime_dir: Path, path: Path, source_file: SourceFile) -> None:
    """Each kind before the right answer to a request of its own, reported; another block goes on beside it."""
    other = source_file(1 << 20, 4, "other")
    options: dict[str, Any] = {"background_rate": "0", "fault_around": "4K"}
    with (
        EvilSource(path) as evil,
        Service(runtime_dir, f"ram0={evil.endpoint}/ram0", f"ok={other}", **options) as service,
    ):
        clients = [service.client("ram0", mode) for mode in ("private", "shared")]
        bystander = service.client("ok")
        bystander.begin(f"check(b, {str(other)!r}, 'random', 4096)")
        for page, (name, script) in enumerate([*NONSENSE.items(), *HARMLESS.items()]):
            evil.before = script
            for client in clients:
                client.begin(f"words(b, [{page}])")
            answers = [client.answer() for client in clients]
            assert answers == [[word(page * PAGE)]] * 2, name
        evil.before = lambda *_: ()
        for page, (name, script) in enumerate(LATE.items(), 100):
            evil.after = script
            assert clients[0].do(f"words(b, [{page}])") == [word(page * PAGE)], name
            evil.after = lambda *_: ()
            assert clients[0].do(f"words(b, [{page + 50}])") == [word((page + 50) * PAGE)]
            assert clients[1].do(f"words(b, [{page}])") == [word(page * PAGE)], name
        assert bystander.answer() == -1
        assert [client.do(f"check(b, {str(path)!r}, 'random', 4096)") for client in clients] == [-1, -1]
        assert service.events("source-nonsense") and not service.events("lost")
        assert service.block()["lost"] == 0 and kinds(service, "pause") == []


@pytest.mark.parametrize("name", NONSENSE)
def test_each_bad_message_is_reported(runtime_dir: Path, path: Path, name: str) -> None:
    """The request that it came for stays open until it is answered."""
    with EvilSource(path) as evil, Service(runtime_dir, f"ram0={evil.endpoint}/ram0", background_rate="0") as service:
        client = service.client()
        evil.before, evil.right = NONSENSE[name], False
        client.begin("words(b, [3])")
        until(lambda: service.events("source-nonsense"), f"{name} is reported")
        assert not client.answered(0.2) and service.block()["received"] == 0
        request = next(message for message in evil.heard if isinstance(message, RequestRanges))
        evil.push(evil.pages(request))
        assert client.answer() == [word(3 * PAGE)]


def test_a_flood_of_unasked_pages(runtime_dir: Path, path: Path, source_file: SourceFile) -> None:
    """Far beyond the window: what fits the block is used, nothing else happens, and others are served meanwhile."""
    other = source_file(4 << 20, 4, "other")
    evil = EvilSource(path)
    with evil, Service(runtime_dir, f"ram0={evil.endpoint}/ram0", f"ok={other}", background_rate="0") as service:
        until(evil.listened, "it listens")
        bystander = service.client("ok")
        piece = [evil.data[at : at + 65536] for at in range(0, LAST, 65536)]
        heads = [encode(Pages(evil.stream, 0, pack_ranges([(at, 65536)]), b"\0", "")) for at in range(0, LAST, 65536)]
        evil.push(*([head, data] for _ in range(100) for head, data in zip(heads, piece, strict=True)))
        begun = time.monotonic()
        assert bystander.do(f"check(b, {str(other)!r}, 'random', 4096)") == -1
        assert time.monotonic() - begun < 10
        until(lambda: service.block()["received"] == PAGES, "all of the block is there")
        evil.push([encode(Pages(evil.stream, 0, pack_ranges([(0, PAGE)]), b"\0", "")), WRONG])
        assert service.client().do(f"check(b, {str(path)!r})") == -1


def test_a_source_that_sends_only_bad_messages(runtime_dir: Path, path: Path) -> None:
    """It counts as silent, its noise does not push out what matters, and it may recover."""
    with EvilSource(path) as evil, Service(runtime_dir, f"ram0={evil.endpoint}/ram0", source_timeout="1") as service:
        until(lambda: service.block()["complete"], "it is whole")
        noise = random.Random(7)
        for _ in range(20):
            evil.push(*([noise.randbytes(64)] for _ in range(200)))
        until(lambda: len(service.events("source-nonsense")) > 3, "it is reported")
        until(lambda: not evil._push, "all is said")
        service.status()
        assert kinds(service, "source", "complete") == ["source", "complete"]
        assert len(service.events("source-nonsense")) < 50 and len(service.log()) < 100_000


def test_a_source_that_refuses_every_request(runtime_dir: Path, path: Path) -> None:
    """Every request is refused as out of phase: asked again about once a second, and no loop spins."""
    with EvilSource(path) as evil, Service(runtime_dir, f"ram0={evil.endpoint}/ram0", background_rate="0") as service:
        client = service.client()
        evil.right = False
        evil.before = lambda *_: [[encode(SourceRefused("out-of-phase", "ram0", "who are you?"))]]
        begun = time.monotonic()
        client.begin("words(b, [3])")
        until(lambda: kinds(service, "pause").count("pause") >= 2, "it is paused, and tried again")
        asked = sum(isinstance(message, RequestRanges) for message in evil.heard)
        assert asked <= 3 + (time.monotonic() - begun) and not client.answered()
        evil.right, evil.before = True, lambda *_: ()
        assert client.answer() == [word(3 * PAGE)]


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ([b"garbage"], "not one"),
        ([encode(Pong(1))], "not one"),
        ([msgpack.packb([99, 121, "ram0", 1, PAGE, "x", []])], "version"),
        ([encode(SourceRefused("denied", "ram0", "not for you"))], "not for you"),
        ([encode(Advised("ram9", 1, PAGE, "x", ()))], "ram9"),
        ([encode(Advised("ram0", 1, 0, "x", ()))], "0"),
        ([encode(Advised("ram0", 1, (1 << 64) - 1, "x", ()))], "too large"),
    ],
    ids=["garbage", "pong", "version", "denied", "another block", "nothing", "everything"],
)
def test_bad_answers_to_the_first_advise(runtime_dir: Path, path: Path, answer: Frames, wanted: str) -> None:
    """One line and the end, not a block of an impossible size."""
    with EvilSource(path) as evil:
        evil.advised = lambda _: answer
        status, said = refused(runtime_dir, f"ram0={evil.endpoint}/ram0")
        assert status in (1, 2) and said.count("\n") == 0 and wanted in said and "Traceback" not in said
        assert not (runtime_dir / "door").exists()


def test_another_peer_at_the_router_cannot_be_the_source(runtime_dir: Path, path: Path) -> None:
    """Pages come only from where we connected to, whatever name a peer of our own router takes."""
    with EvilSource(path) as evil, Service(runtime_dir, f"ram0={evil.endpoint}/ram0", background_rate="0") as service:
        until(evil.listened, "it listens")
        with service.dealer(b"s1") as liar:
            head = encode(Pages(evil.stream, 0, pack_ranges([(0, PAGE)]), b"\0", ""))
            for _ in range(3):
                liar.send_multipart([head, WRONG])
            assert service.client().do("words(b, [0, 1])") == [word(0), word(PAGE)]
