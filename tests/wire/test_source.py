"""The page source program and a scripted supervisor: files that change, wrong words, wrong keys, sources that fail."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import zmq

from postcopy_protocol.codec import encode
from postcopy_protocol.curve_keys import KeyPair, write_keys
from postcopy_protocol.messages import VERSION, Goodbye
from postcopy_protocol.return_path import (
    MAX_OPEN_BYTES,
    MAX_OPEN_REQUESTS,
    MAX_RANGE_BYTES,
    Advise,
    Advised,
    Complete,
    Listen,
    Ping,
    Pong,
    RequestRanges,
    SourceRefused,
    pack_range,
)
from postcopy_protocol.templates import FIRST_REQUEST
from postcopy_sources import PushStream, StreamEnded
from postcopy_sources.loop import SILENT_SECONDS
from tests.conftest import SourceFile
from tests.fuzz.return_path import SUPERVISOR, SourceEnd
from tests.wire.own_sources import SIZE, page_of
from tests.wire.relay import Relay
from tests.wire.scripted import PAGE, ScriptedSupervisor, SourceProgram, environment

OWN = str(Path(__file__).with_name("own_sources.py"))
PAGES = 300
LENGTH = PAGES * PAGE - 77


@pytest.fixture
def path(source_file: SourceFile) -> Path:
    return source_file(LENGTH)


@pytest.fixture
def endpoint(runtime_dir: Path) -> str:
    return f"ipc://{runtime_dir}/source"


@pytest.fixture
def program(path: Path, endpoint: str) -> Iterator[SourceProgram]:
    with SourceProgram(f"ram0={path}", "--listen", endpoint) as program:
        yield program


@pytest.fixture
def supervisor(program: SourceProgram, endpoint: str) -> Iterator[ScriptedSupervisor]:
    with ScriptedSupervisor(endpoint) as supervisor:
        yield supervisor


@pytest.fixture
def own(endpoint: str) -> Iterator[ScriptedSupervisor]:
    with SourceProgram(endpoint, "-", program=(OWN,)), ScriptedSupervisor(endpoint) as supervisor:
        yield supervisor


def page(data: bytes, offset: int) -> bytes:
    return data[offset : offset + PAGE].ljust(PAGE, b"\0")


def as_pages(data: bytes) -> dict[int, bytes]:
    return {offset: page(data, offset) for offset in range(0, len(data), PAGE)}


def refuse_to_start(*words: str) -> tuple[int, str]:
    """Exit status and the one line that says why."""
    command = [sys.executable, "-m", "postcopy_sources", *words]
    done = subprocess.run(command, capture_output=True, text=True, timeout=30, env=environment())
    assert done.stderr.startswith("postcopy source: ") and done.stderr.count("\n") == 1, done.stderr
    return done.returncode, done.stderr


# --- files ------------------------------------------------------------------------------------------------------------


def test_every_byte_of_a_file(supervisor: ScriptedSupervisor, path: Path) -> None:
    data = path.read_bytes()
    advised = supervisor.listen("ram0")
    assert (advised.name, advised.size, advised.features) == ("ram0", LENGTH, ("zero", "push"))
    whole = (0, PAGES * PAGE)
    assert supervisor.fetch(advised, whole, urgent=False) == as_pages(data)
    assert supervisor.fetch(advised, whole) == as_pages(data)
    for number in random.Random(1).sample(range(PAGES), 50):
        found = supervisor.fetch(advised, (number * PAGE, PAGE))
        assert found == {number * PAGE: page(data, number * PAGE)}
    many = [(number * PAGE, PAGE) for number in range(255, -1, -1)]
    assert supervisor.fetch(advised, *many) == as_pages(data[: 256 * PAGE])
    supervisor.say(Complete(advised.stream))
    supervisor.say(Ping(7))
    assert supervisor.expect(Pong) == Pong(7)


def test_a_known_request_is_judged_like_any_other(supervisor: ScriptedSupervisor, path: Path) -> None:
    """Once one has been taken, others differ in number and range only; what is wrong with those is still seen."""
    data = path.read_bytes()
    advised = supervisor.listen("ram0")
    supervisor.requests = FIRST_REQUEST
    last = (PAGES - 1) * PAGE
    for offset in (0, PAGE, last, 2 * PAGE):
        assert supervisor.fetch(advised, (offset, PAGE)) == {offset: page(data, offset)}
    for wrong in (
        (1, PAGE),
        (0, PAGE + 1),
        (PAGES * PAGE, PAGE),
        (0, 0),
        ((1 << 64) - PAGE, PAGE),
        (0, MAX_RANGE_BYTES + PAGE),
    ):
        supervisor.ask(advised, wrong)
        assert supervisor.expect(SourceRefused).code == "bad-range"
    nameless = bytearray(encode(RequestRanges(FIRST_REQUEST, advised.stream, True, pack_range(0, PAGE))))
    nameless[4:8] = bytes(4)
    supervisor.send(bytes(nameless))
    assert supervisor.expect(SourceRefused).code == "bad-message"
    supervisor.say(Complete(advised.stream))
    supervisor.ask(advised, (0, PAGE))
    assert supervisor.expect(SourceRefused).code == "out-of-phase"


def test_an_urgent_request_is_one_message(supervisor: ScriptedSupervisor) -> None:
    advised = supervisor.listen("ram0")
    number = supervisor.ask(advised, (0, PAGE), (5 * PAGE, 2 * PAGE), ((PAGES - 1) * PAGE, PAGE))
    message, found = supervisor.pages(advised)
    assert message.request == number and len(found) == 4 and not message.reason


def test_holes_and_zeros_travel_without_bytes(tmp_path: Path, endpoint: str) -> None:
    path = tmp_path / "sparse"
    with path.open("wb") as file:
        file.truncate(8 << 20)
        os.pwrite(file.fileno(), b"\0" * PAGE + b"x", 4 << 20)
    with SourceProgram(f"ram0={path}", "--listen", endpoint), ScriptedSupervisor(endpoint) as supervisor:
        advised = supervisor.listen("ram0")
        for offset, kind in ((0, 1), (4 << 20, 1), ((4 << 20) + PAGE, 0)):
            for urgent in (True, False):
                supervisor.ask(advised, (offset, PAGE), urgent=urgent)
                assert supervisor.pages(advised)[0].kinds == bytes([kind])
        plain = supervisor.advise("ram0", features=())
        supervisor.say(Listen(plain.stream, 0))
        supervisor.ask(plain, (0, PAGE), ((4 << 20) + PAGE, PAGE))
        message, found = supervisor.pages(plain)
        assert message.kinds == b"\0\0" and found[0] == bytes(PAGE), "one that takes no zeros gets bytes"


@pytest.mark.parametrize("change", ["cut", "cut in a page", "grown", "written"])
def test_a_file_that_changes_is_lost(supervisor: ScriptedSupervisor, path: Path, change: str) -> None:
    advised = supervisor.listen("ram0")
    good = supervisor.fetch(advised, (PAGE, PAGE))
    with path.open("r+b") as file:
        match change:
            case "cut":
                file.truncate(10 * PAGE)
            case "cut in a page":
                file.truncate(10 * PAGE + 5)
            case "grown":
                file.truncate(LENGTH + 1)
            case "written":
                file.write(file.read(1)[::-1])
    for urgent in (True, False):
        found = supervisor.fetch(advised, (0, 2 * PAGE), (11 * PAGE, PAGE), urgent=urgent)
        assert all("cut or written" in str(reason) and str(path) in str(reason) for reason in found.values()), found
    assert isinstance(good[PAGE], bytes)
    supervisor.say(Ping(1))
    assert supervisor.expect(Pong) == Pong(1)


def test_a_file_that_is_replaced_stays_what_it_was(
    supervisor: ScriptedSupervisor, path: Path, source_file: SourceFile
) -> None:
    data = path.read_bytes()
    advised = supervisor.listen("ram0")
    source_file(LENGTH, seed=9, name="other").rename(path)
    assert supervisor.fetch(advised, (0, PAGE)) == {0: page(data, 0)}


def test_identity_follows_the_content(source_file: SourceFile, tmp_path: Path, runtime_dir: Path) -> None:
    first = source_file(LENGTH)
    (tmp_path / "copy").write_bytes(first.read_bytes())
    other, longer = source_file(LENGTH, 1, "other"), tmp_path / "longer"
    longer.write_bytes(first.read_bytes() + b"\0")
    files = {"first": first, "copy": tmp_path / "copy", "other": other, "longer": longer}
    endpoint = f"ipc://{runtime_dir}/source"
    words = [f"{name}={file}" for name, file in files.items()]
    with SourceProgram(*words, "--listen", endpoint), ScriptedSupervisor(endpoint) as supervisor:
        found = {name: supervisor.advise(name).identity for name in files}
    assert found["first"] == found["copy"] and len(set(found.values())) == 3
    with (
        SourceProgram(*words, "--listen", endpoint, "--identity", "v7"),
        ScriptedSupervisor(endpoint) as supervisor,
    ):
        assert supervisor.advise("first").identity == "v7"


# --- wrong words ------------------------------------------------------------------------------------------------------


def test_out_of_phase(supervisor: ScriptedSupervisor) -> None:
    supervisor.send(encode(Ping(1)))  # before anything else
    assert supervisor.expect(Pong) == Pong(1)
    for message in (Listen(5, 0), Complete(5), RequestRanges(1, 5, True, pack_range(0, PAGE))):
        assert supervisor.refusal(message).code == "out-of-phase"
    advised = supervisor.advise("ram0")
    ask = RequestRanges(1, advised.stream, True, pack_range(0, PAGE))
    refusal = supervisor.refusal(ask)
    assert (refusal.code, refusal.name) == ("out-of-phase", "ram0")
    again = supervisor.listen("ram0")
    assert again.stream != advised.stream
    assert supervisor.refusal(ask).code == "out-of-phase", "the stream before that"
    assert len(supervisor.fetch(again, (0, PAGE))) == 1
    supervisor.say(Complete(again.stream))
    assert supervisor.refusal(RequestRanges(2, again.stream, True, pack_range(0, PAGE))).code == "out-of-phase"


@pytest.mark.parametrize(
    "ranges",
    [
        b"",
        b"\0" * 17,
        pack_range(1, PAGE),
        pack_range(0, 0),
        pack_range(0, 1),
        pack_range(PAGES * PAGE, PAGE),
        pack_range(2**64 - PAGE, PAGE),
        pack_range(0, MAX_RANGE_BYTES + PAGE),
        pack_range(0, PAGE) * 2,
        pack_range(0, PAGE) * 257,
    ],
)
def test_bad_ranges(supervisor: ScriptedSupervisor, ranges: bytes) -> None:
    advised = supervisor.listen("ram0")
    refusal = supervisor.refusal(RequestRanges(9, advised.stream, True, ranges))
    assert (refusal.code, refusal.name) == ("bad-range", "ram0") and "request 9" in refusal.reason
    assert len(supervisor.fetch(advised, (0, PAGE))) == 1


def test_advice_that_does_not_fit(supervisor: ScriptedSupervisor) -> None:
    refusal = supervisor.refusal(Advise("ram1", PAGE, ()))
    assert refusal.code == "no-such-block" and "ram0" in refusal.reason
    refusal = supervisor.refusal(Advise("ram0", 8192, ()))
    assert refusal.code == "bad-page-size" and "8192" in refusal.reason and "4096" in refusal.reason
    assert supervisor.advise("ram0", page_size=2 << 20).size == LENGTH


@pytest.mark.parametrize(
    ("frames", "code"),
    [
        ([b""], "bad-message"),
        ([b"\xc1" * 100], "bad-message"),
        ([encode(Goodbye())], "bad-message"),
        ([encode(Pong(1))], "bad-message"),
        ([encode(Ping(1)), b"more"], "bad-message"),
        ([b"\x93\x02\x72\x01"], "bad-version"),
        ([os.urandom(60000)], "bad-message"),
        ([b"x"] * 500, "bad-message"),
    ],
)
def test_garbage(supervisor: ScriptedSupervisor, frames: list[bytes], code: str) -> None:
    advised = supervisor.listen("ram0")
    supervisor.send(*frames)
    refusal = supervisor.refusal()
    assert refusal.code in (code, "bad-version"), refusal
    if code == "bad-version":
        assert "version 2" in refusal.reason and f"version {VERSION}" in refusal.reason
    assert len(supervisor.fetch(advised, (0, PAGE))) == 1


def test_a_frame_without_end_costs_the_connection_only(supervisor: ScriptedSupervisor, endpoint: str) -> None:
    with ScriptedSupervisor(endpoint) as other:
        advised = other.listen("ram0")
        supervisor.send(bytes(1 << 17))
        assert len(other.fetch(advised, (0, PAGE))) == 1
    supervisor.advise("ram0")  # on a new connection


def test_bytes_that_are_no_zeromq(program: SourceProgram, supervisor: ScriptedSupervisor, endpoint: str) -> None:
    advised = supervisor.listen("ram0")
    for data in (b"GET / HTTP/1.0\r\n\r\n", os.urandom(4096), b"\xff" + bytes(9)):
        with socket.socket(socket.AF_UNIX) as raw:
            raw.connect(endpoint.removeprefix("ipc://"))
            raw.sendall(data)
            assert len(supervisor.fetch(advised, (0, PAGE))) == 1


def test_mangled_words_in_a_storm(supervisor: ScriptedSupervisor) -> None:
    """Every one is answered or ignored, and afterwards everything is as before."""
    dice = random.Random(5)
    advised = supervisor.listen("ram0")
    said = [
        encode(RequestRanges(1, advised.stream, True, pack_range(0, PAGE))),
        encode(Advise("ram0", PAGE, ("zero",))),
    ]
    for _ in range(2000):
        raw = bytearray(dice.choice(said))
        raw[dice.randrange(len(raw))] = dice.randrange(256)
        supervisor.send(bytes(raw))
        while supervisor.socket.poll(0):
            supervisor.socket.recv_multipart()
    supervisor.say(Ping(99))
    while (heard := supervisor.hear()) is not None and heard[0] != Pong(99):
        pass
    assert heard is not None
    assert len(supervisor.fetch(supervisor.listen("ram0"), (0, PAGE))) == 1


# --- several, many, much ----------------------------------------------------------------------------------------------


def test_two_supervisors_at_once(supervisor: ScriptedSupervisor, endpoint: str, path: Path) -> None:
    data = path.read_bytes()
    with ScriptedSupervisor(endpoint) as other:
        ours, theirs = supervisor.listen("ram0"), other.listen("ram0")
        assert ours.stream != theirs.stream
        supervisor.ask(ours, (0, PAGES * PAGE), urgent=False)
        assert other.fetch(theirs, (PAGE, PAGE)) == {PAGE: page(data, PAGE)}
        assert other.refusal(RequestRanges(1, ours.stream, True, pack_range(0, PAGE))).code == "out-of-phase"
        other.say(Complete(theirs.stream))
        found: dict[int, bytes | str] = {}
        while len(found) < PAGES:
            found |= supervisor.pages(ours)[1]
        assert found == as_pages(data)


def test_a_supervisor_that_goes_is_forgotten(program: SourceProgram, endpoint: str) -> None:
    with ScriptedSupervisor(endpoint, name=b"postcopy-same") as supervisor:
        advised = supervisor.listen("ram0")
    for _ in range(3):
        with ScriptedSupervisor(endpoint, name=b"postcopy-same") as supervisor:
            # Whether the source has noticed or not: what it says is right for both.
            supervisor.ask(advised, (0, PAGE))
            heard = supervisor.hear()
            assert heard is not None
            if isinstance(heard[0], SourceRefused):
                assert heard[0].code == "out-of-phase"
            advised = supervisor.listen("ram0")
            assert len(supervisor.fetch(advised, (0, PAGE))) == 1


def test_a_silent_supervisor_is_forgotten_and_not_pushed_to() -> None:
    """A connection that breaks while nothing is sent is not reported: a thread that pushes would wait forever."""
    end = SourceEnd(random.Random(2))
    try:
        end.loop.on_data(SUPERVISOR, encode(Advise("ram0", PAGE, ("push",))))
        (peer,) = end.loop.connections.values()
        peer.pushers[1] = stream = PushStream(SIZE, PAGE, lambda answer: None)
        end.loop.tick(peer.last_message_at + SILENT_SECONDS - 1)
        assert end.loop.connections
        end.loop.tick(peer.last_message_at + SILENT_SECONDS + 1)
        assert not end.loop.connections
        with pytest.raises(StreamEnded):
            stream.push(0, bytes(PAGE))
    finally:
        end.close()


def test_too_many_requests_are_refused_and_the_others_answered(endpoint: str, runtime_dir: Path) -> None:
    gate = runtime_dir / "gate"
    with SourceProgram(endpoint, str(gate), program=(OWN,)), ScriptedSupervisor(endpoint) as supervisor:
        advised = supervisor.listen("gated")
        before = supervisor.requests
        for _ in range(MAX_OPEN_REQUESTS + 20):
            supervisor.ask(advised, (0, PAGE))
        for number in range(20):
            refusal = supervisor.refusal()
            assert refusal.code == "limit" and f"request {before + MAX_OPEN_REQUESTS + 1 + number}:" in refusal.reason
        supervisor.say(Ping(3))
        assert supervisor.expect(Pong) == Pong(3), "the loop is awake while every reader waits"
        gate.touch()
        asked = {supervisor.pages(advised)[0].request for _ in range(MAX_OPEN_REQUESTS)}
        assert asked == set(range(before + 1, before + MAX_OPEN_REQUESTS + 1))
        assert len(supervisor.fetch(advised, (0, PAGE))) == 1
        gate.unlink()


def test_a_supervisor_that_does_not_read_delays_no_other(source_file: SourceFile, endpoint: str) -> None:
    path = source_file(16 << 20)
    size = 16 << 20
    with (
        SourceProgram(f"ram0={path}", "--listen", endpoint) as program,
        ScriptedSupervisor(endpoint, high_water=1) as lazy,
        ScriptedSupervisor(endpoint) as other,
    ):
        theirs = other.listen("ram0")
        before = program.memory()
        advised = lazy.listen("ram0")
        for number in range(80):
            lazy.ask(advised, (number * MAX_RANGE_BYTES % size, MAX_RANGE_BYTES))
        for offset in range(0, 400 * PAGE, PAGE):
            assert len(other.fetch(theirs, (offset, PAGE))) == 1
        assert program.memory() - before < 2 * MAX_OPEN_BYTES + (48 << 20)
        came: dict[int, int] = {}
        while sum(came.values()) < MAX_OPEN_BYTES:
            heard = lazy.hear()
            if heard is None:
                break  # it was ended: of all supervisors it held most
            message, frames = heard
            if not isinstance(message, SourceRefused):
                came[message.request] = came.get(message.request, 0) + sum(map(len, frames))  # type: ignore[attr-defined]
        assert came and all(length <= MAX_RANGE_BYTES for length in came.values())


# --- sources of one's own ---------------------------------------------------------------------------------------------


def text_of(found: dict[int, bytes | str]) -> str:
    (reason,) = set(found.values())
    assert isinstance(reason, str)
    assert "\n" not in reason
    return reason


def test_own_pages(own: ScriptedSupervisor) -> None:
    whole = page_of(0, SIZE)
    for name in ("good", "view"):
        advised = own.listen(name)
        assert (advised.size, advised.identity) == (SIZE, "own")
        assert own.fetch(advised, (0, 64 * PAGE), urgent=False) == as_pages(whole)
        assert own.fetch(advised, (63 * PAGE, PAGE), (0, 2 * PAGE))[63 * PAGE] == page(whole, 63 * PAGE)
    zeros = own.listen("zeros")
    own.ask(zeros, (0, 64 * PAGE))
    assert own.pages(zeros)[0].kinds == b"\1"


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("short", "gave 4095 bytes instead of 4096"),
        ("text", "gave str instead of bytes"),
        ("exits", "SystemExit: 7"),
    ],
)
def test_own_sources_that_give_nothing_of_use(own: ScriptedSupervisor, name: str, reason: str) -> None:
    advised = own.listen(name)
    for _ in range(6):  # more often than there are readers
        assert reason in text_of(own.fetch(advised, (0, PAGE)))
    assert len(own.fetch(own.listen("good"), (0, PAGE))) == 1


def test_only_the_pages_that_fail_are_lost(own: ScriptedSupervisor) -> None:
    found = own.fetch(own.listen("raises"), (0, 8 * PAGE))
    assert found.pop(3 * PAGE) == "the source raised OSError: page 3 is broken"
    assert found == {offset: page_of(offset, PAGE) for offset in range(0, 8 * PAGE, PAGE) if offset != 3 * PAGE}
    found = own.fetch(own.listen("loses"), (0, 3 * PAGE), urgent=False)
    assert found == {0: page_of(0, PAGE), PAGE: "the tape is torn", 2 * PAGE: page_of(2 * PAGE, PAGE)}


def test_a_read_that_hangs_is_lost_and_stops_no_other(own: ScriptedSupervisor) -> None:
    hangs, good = own.listen("hangs"), own.listen("good")
    for _ in range(3):
        own.ask(hangs, (0, PAGE))
    assert len(own.fetch(good, (0, PAGE))) == 1, "the fourth reader"
    for _ in range(3):
        assert "did not answer within 1 s" in text_of(own.pages(hangs)[1])
    for _ in range(6):  # there are as many readers as before
        assert own.fetch(hangs, (PAGE, PAGE)) == {PAGE: page_of(PAGE, PAGE)}


def test_reads_that_all_hang_leave_answers_and_an_end(endpoint: str) -> None:
    with SourceProgram(endpoint, "-", "1", program=(OWN,)), ScriptedSupervisor(endpoint) as own:
        hangs = own.listen("hangs")
        for _ in range(20):
            own.ask(hangs, (0, PAGE))
        own.say(Ping(1))
        assert own.expect(Pong) == Pong(1)
        for _ in range(2):
            assert "did not answer" in text_of(own.pages(hangs)[1])


def test_huge_pages_are_read_whole(own: ScriptedSupervisor) -> None:
    refusal = own.refusal(Advise("huge", PAGE, ()))
    assert refusal.code == "bad-page-size" and "2097152" in refusal.reason and "4096" in refusal.reason
    huge = 2 << 20
    advised = own.listen("huge", page_size=huge)
    own.ask(advised, (2 * huge, huge))
    assert own.pages(advised, huge)[1] == {2 * huge: b"h".ljust(huge, b"\0")}


def test_urgent_before_background(endpoint: str, runtime_dir: Path) -> None:
    gate = runtime_dir / "gate"
    with SourceProgram(endpoint, str(gate), "1", program=(OWN,)), ScriptedSupervisor(endpoint) as own:
        advised = own.listen("gated")
        held = own.ask(advised, (0, PAGE), urgent=False)
        own.say(Ping(1))
        own.expect(Pong)
        background = [own.ask(advised, (number * PAGE, PAGE), urgent=False) for number in range(1, 6)]
        urgent = [own.ask(advised, (number * PAGE, PAGE)) for number in range(6, 9)]
        own.say(Ping(2))
        own.expect(Pong)
        gate.touch()
        order = [own.pages(advised)[0].request for _ in range(9)]
        # The one reader may not have taken the first before the urgent ones were there.
        assert [one for one in order if one != held] == urgent + background
        gate.unlink()


def test_an_urgent_page_of_a_file_overtakes_the_background(source_file: SourceFile, endpoint: str) -> None:
    path = source_file(32 << 20)
    with SourceProgram(f"ram0={path}", "--listen", endpoint), ScriptedSupervisor(endpoint, high_water=1) as own:
        advised = own.listen("ram0")
        background = [
            own.ask(advised, (offset, MAX_RANGE_BYTES), urgent=False) for offset in range(0, 32 << 20, 4 << 20)
        ]
        urgent = own.ask(advised, (0, PAGE))
        came, before = 0, -1
        while came < len(background) * MAX_RANGE_BYTES + PAGE:
            message, found = own.pages(advised)
            came += len(found) * PAGE
            if message.request == urgent:
                before = came
        assert 0 < before < came - 2 * MAX_RANGE_BYTES, "it did not wait for the end of the background"


# --- pushed -----------------------------------------------------------------------------------------------------------


def test_pages_are_pushed_as_far_as_the_window_goes(own: ScriptedSupervisor) -> None:
    advised = own.listen("pushes", window=10 * PAGE + 1)
    got: dict[int, bytes | str] = {}
    while len(got) < 10:
        message, found = own.pages(advised)
        assert message.request == 0
        got |= found
    own.say(Ping(1))
    assert own.expect(Pong) == Pong(1), "no more than the window"
    assert own.fetch(advised, (40 * PAGE, PAGE)) == {40 * PAGE: page_of(40 * PAGE, PAGE)}, "asked for meanwhile"
    while len(got) < 64:
        own.say(Listen(advised.stream, 20 * PAGE))
        for _ in range(20):
            if len(got) < 64:
                got |= own.pages(advised)[1]
    assert got.pop(62 * PAGE) == "not this one"
    assert got.pop(60 * PAGE) == got.pop(61 * PAGE) == bytes(PAGE)
    assert got == {offset: page(page_of(0, SIZE), offset) for offset in got}


def test_nothing_is_pushed_to_who_does_not_want_it(own: ScriptedSupervisor) -> None:
    for features, window in ((("zero", "push"), 0), (("zero",), 1 << 20)):
        advised = own.advise("pushes", features=features)
        own.say(Listen(advised.stream, window))
        assert own.fetch(advised, (0, PAGE)) == {0: page_of(0, PAGE)}
    advised = own.listen("pushes", window=2 * PAGE)
    own.pages(advised)
    own.pages(advised)
    own.say(Complete(advised.stream))
    own.say(Ping(1))
    assert own.expect(Pong) == Pong(1), "and no more once it has ended"
    again = own.listen("pushes", window=PAGE)
    assert own.pages(again)[1] == {0: page_of(0, PAGE)}, "a new stream starts again"


def test_a_push_that_fails_costs_nothing_but_the_push(endpoint: str) -> None:
    with SourceProgram(endpoint, "-", program=(OWN,), ready=True) as program:
        with ScriptedSupervisor(endpoint) as own:
            advised = own.listen("fails", window=1 << 20)
            assert own.fetch(advised, (0, PAGE)) == {0: page_of(0, PAGE)}
            program.wait_for_log("listening of a source failed")
        assert program.end() == 0


# --- tcp and keys -----------------------------------------------------------------------------------------------------


@pytest.fixture
def keys(tmp_path: Path) -> Callable[[str], KeyPair]:
    """``keys("a")`` is a pair, in ``tmp_path/a.key`` and ``a.key_secret``."""

    def make(name: str) -> KeyPair:
        pair = KeyPair(*zmq.curve_keypair())
        (tmp_path / f"{name}.key").write_text(write_keys(KeyPair(pair.public)))
        secret = tmp_path / f"{name}.key_secret"
        secret.write_text(write_keys(pair))
        secret.chmod(0o600)
        return pair

    return make


def test_tcp_with_keys(path: Path, tmp_path: Path, keys: Callable[[str], KeyPair]) -> None:
    source, ours, strange = keys("source"), keys("ours"), keys("strange")
    words = [f"ram0={path}", "--listen", "tcp://127.0.0.1:*", "--curve-secret", str(tmp_path / "source.key_secret")]
    with (
        SourceProgram(*words, "--allow-key", str(tmp_path / "ours.key")) as program,
        ScriptedSupervisor(program.endpoint, keys=ours, source_key=source.public) as supervisor,
    ):
        assert supervisor.handshake()
        advised = supervisor.listen("ram0")
        assert supervisor.fetch(advised, (0, PAGES * PAGE)) == as_pages(path.read_bytes())
        with ScriptedSupervisor(program.endpoint, keys=strange, source_key=source.public) as other:
            assert not other.handshake()
            program.wait_for_log("is refused: its key")
        with ScriptedSupervisor(program.endpoint, keys=ours, source_key=strange.public) as other:
            other.say(Advise("ram0", PAGE, ()))
            assert other.hear(0.5) is None, "it does not speak with this source"
        with ScriptedSupervisor(program.endpoint) as other:
            other.say(Advise("ram0", PAGE, ()))
            assert other.hear(0.5) is None, "without keys nothing is said"
        assert len(supervisor.fetch(advised, (0, PAGE))) == 1


def test_a_directory_of_keys(path: Path, tmp_path: Path, keys: Callable[[str], KeyPair], runtime_dir: Path) -> None:
    source, first, second = keys("source"), keys("first"), keys("second")
    endpoint = f"ipc://{runtime_dir}/source"
    words = [f"ram0={path}", "--listen", endpoint, "--curve-secret", str(tmp_path / "source.key_secret")]
    with SourceProgram(*words, "--allow-key", str(tmp_path)):
        for pair in (first, second):
            with ScriptedSupervisor(endpoint, keys=pair, source_key=source.public) as supervisor:
                assert supervisor.advise("ram0").size == LENGTH


def test_plain_tcp_only_when_it_is_asked_for_by_name(path: Path) -> None:
    words = (f"ram0={path}", "--listen", "tcp://127.0.0.1:*")
    status, line = refuse_to_start(*words)
    assert status == 2 and "--plain-tcp" in line and "keygen" in line
    with SourceProgram(*words, "--plain-tcp") as program, ScriptedSupervisor(program.endpoint) as supervisor:
        assert len(supervisor.fetch(supervisor.listen("ram0"), (0, PAGE))) == 1


def test_keys_that_are_none(path: Path, tmp_path: Path, keys: Callable[[str], KeyPair]) -> None:
    keys("a")
    words = [f"ram0={path}", "--listen", "tcp://127.0.0.1:*"]
    public, secret = str(tmp_path / "a.key"), str(tmp_path / "a.key_secret")
    assert "belong together" in refuse_to_start(*words, "--curve-secret", secret)[1]
    assert "no secret key" in refuse_to_start(*words, "--curve-secret", chmod(public), "--allow-key", public)[1]
    assert "no CURVE key" in refuse_to_start(*words, "--curve-secret", secret, "--allow-key", str(path))[1]
    assert "exclude" in refuse_to_start(*words, "--curve-secret", secret, "--allow-key", public, "--plain-tcp")[1]
    assert refuse_to_start(*words, "--curve-secret", "/no/such", "--allow-key", public)[0] == 2
    Path(secret).chmod(0o644)
    assert "read by others" in refuse_to_start(*words, "--curve-secret", secret, "--allow-key", public)[1]


def chmod(path: str) -> str:
    Path(path).chmod(0o600)
    return path


# --- the relay, and the end -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["unix", "tcp"])
def test_a_line_that_is_slow_stalls_and_breaks(path: Path, runtime_dir: Path, kind: str) -> None:
    data = path.read_bytes()
    words = {"unix": [f"ipc://{runtime_dir}/source"], "tcp": ["tcp://127.0.0.1:*", "--plain-tcp"]}[kind]
    with SourceProgram(f"ram0={path}", "--listen", *words) as program:
        target = program.endpoint.replace("ipc://", "unix:").replace("tcp://", "tcp:")
        listen = f"unix:{runtime_dir}/relay" if kind == "unix" else "tcp:127.0.0.1:0"
        with Relay(listen, target) as relay, ScriptedSupervisor(relay.endpoint) as supervisor:
            advised = supervisor.listen("ram0")
            assert supervisor.fetch(advised, (0, PAGES * PAGE)) == as_pages(data)
            relay.delay(0.05)
            begun = time.monotonic()
            assert len(supervisor.fetch(advised, (0, PAGE))) == 1
            assert time.monotonic() - begun >= 0.1, "both ways"
            relay.delay(0)
            relay.stall()
            supervisor.ask(advised, (PAGE, PAGE))
            assert supervisor.hear(0.2) is None
            relay.go()
            assert supervisor.pages(advised)[1] == {PAGE: page(data, PAGE)}
            relay.cut()
            recover(supervisor)
            relay.refuse()
            assert program.process.poll() is None
            relay.accept()
            recover(supervisor)


def recover(supervisor: ScriptedSupervisor) -> None:
    """Advise until it is answered: what was said while the line was down is gone."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        try:
            supervisor.say(Advise("ram0", PAGE, ("zero",)))
        except zmq.ZMQError:  # EHOSTUNREACH: not connected again
            time.sleep(0.01)
            continue
        heard = supervisor.hear(0.2)
        if heard is not None and isinstance(heard[0], Advised):
            advised = heard[0]
            while (late := supervisor.hear(0.05)) is not None:  # answers to what was said twice
                assert isinstance(late[0], Advised)
                advised = late[0]
            supervisor.say(Listen(advised.stream, 0))
            assert len(supervisor.fetch(advised, (0, PAGE))) == 1
            return
    raise AssertionError("no way back to the source")


def test_killed_and_started_again(path: Path, endpoint: str) -> None:
    first = SourceProgram(f"ram0={path}", "--listen", endpoint)
    with ScriptedSupervisor(endpoint) as supervisor:
        before = supervisor.listen("ram0")
        first.kill()
        with SourceProgram(f"ram0={path}", "--listen", endpoint):
            recover(supervisor)
            refusal = supervisor.refusal(RequestRanges(1, before.stream, True, pack_range(0, PAGE)))
            assert refusal.code == "out-of-phase", "a stream of the first life"
            assert supervisor.advise("ram0").identity == before.identity


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_in_order(path: Path, runtime_dir: Path, number: int) -> None:
    endpoint = f"ipc://{runtime_dir}/source"
    with SourceProgram(f"ram0={path}", "--listen", endpoint) as program, ScriptedSupervisor(endpoint) as supervisor:
        advised = supervisor.listen("ram0")
        supervisor.ask(advised, (0, PAGES * PAGE), urgent=False)
        assert program.end(number) == 0
        assert program.log().rstrip().endswith("INFO ended")
    assert not (runtime_dir / "source").exists()


def test_it_ends_while_reads_hang_and_pages_are_pushed(endpoint: str) -> None:
    with SourceProgram(endpoint, "-", program=(OWN,)) as program, ScriptedSupervisor(endpoint) as own:
        own.pages(own.listen("pushes", window=PAGE))
        own.ask(own.listen("hangs"), (0, PAGE))
        begun = time.monotonic()
        assert program.end() == 0
        assert time.monotonic() - begun < 5


def test_it_ends_with_its_parent(path: Path, endpoint: str) -> None:
    words = ["-m", "postcopy_sources", f"ram0={path}", "--listen", endpoint, "--die-with-parent"]
    parent = f"""
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, *{words!r}, str(os.getpid())], stderr=subprocess.PIPE)
while b"ready" not in child.stderr.readline(): pass
print(child.pid, flush=True)
os.kill(os.getpid(), 9)
"""
    done = subprocess.run([sys.executable, "-c", parent], capture_output=True, timeout=30, env=environment())
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while Path(f"/proc/{pid}/status").exists() and "Z (" not in Path(f"/proc/{pid}/status").read_text():
        assert time.monotonic() < deadline, "it outlives its parent"
        time.sleep(0.01)


def test_one_endpoint_has_one_source(program: SourceProgram, supervisor: ScriptedSupervisor, path: Path) -> None:
    endpoint = program.endpoint
    status, line = refuse_to_start(f"ram0={path}", "--listen", endpoint)
    assert status == 1 and "another program listens" in line
    assert len(supervisor.fetch(supervisor.listen("ram0"), (0, PAGE))) == 1
    with SourceProgram(f"ram0={path}", "--listen", "tcp://127.0.0.1:*", "--plain-tcp") as other:
        status, line = refuse_to_start(f"ram0={path}", "--listen", other.endpoint, "--plain-tcp")
        assert status == 1 and "cannot listen" in line


@pytest.mark.parametrize(
    ("words", "status"),
    [
        ([], 2),
        (["ram0=/no/such/file", "--listen", "ipc:///tmp/x"], 1),
        (["ram0=/tmp", "--listen", "ipc:///tmp/x"], 2),
        (["ram0=/dev/null", "--listen", "ipc:///tmp/x"], 2),
        (["ram0=/etc/hostname"], 2),
        (["ram0=zero:4K", "--listen", "ipc:///tmp/x"], 2),
        (["no name=/etc/hostname", "--listen", "ipc:///tmp/x"], 2),
        (["a=/etc/hostname", "a=/etc/hostname", "--listen", "ipc:///tmp/x"], 2),
        (["ram0=/etc/hostname", "--listen", "ipc://relative"], 2),
        (["ram0=/etc/hostname", "--listen", "ipc:///" + "x" * 120], 2),
        (["ram0=/etc/hostname", "--listen", "udp://1.2.3.4:5"], 2),
        (["ram0=/etc/hostname", "--listen", "ipc:///no/such/directory/x"], 1),
        (["ram0=/etc/hostname", "--listen", "tcp://no.such.host.invalid:1", "--plain-tcp"], 1),
        (["ram0=/etc/hostname", "--listen", "ipc:///tmp/x", "--read-timeout", "0"], 2),
        (["ram0=/etc/hostname", "--listen", "ipc:///tmp/x", "--readers", "x"], 2),
    ],
)
def test_wrong_usage_is_one_line(words: list[str], status: int) -> None:
    assert refuse_to_start(*words)[0] == status
