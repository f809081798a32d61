"""Back-ends that break one rule each: told by name, and the supervisor and its other clients never notice."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from postcopy.errors import BackEndGone, BackEndTimeout, PostcopyError, VhostUserError
from postcopy.vhost_user import BackEnd, GuestMemory
from postcopy.vhost_user.probe.run import Settings, probe
from tests.conftest import SourceFile
from tests.system.back_ends import Program, running
from tests.system.service import Service, until

pytestmark = pytest.mark.usefixtures("require_userfaultfd")

FAKE = Path(__file__).with_name("fake_back_end.py")
SIZE = 1 << 18

LIES: dict[str, type[Exception] | str] = {
    "version-at-1": "framing",
    "huge-at-1": "framing",
    "many-gifts-at-1": "framing",
    "gift-at-1": "descriptors",
    "short-at-1": "size",
    "no-reply-flag-at-1": "order",
    "other-request-at-15": "order",
    "twice-at-1": "order",
    "hang-up-at-1": BackEndGone,
    "deaf-at-15": BackEndTimeout,
    "refuse-3": "acknowledge",
    "refuse-29": "acknowledge",
    "hang-up-at-28": BackEndGone,
    "no-descriptor": "descriptors",
    "gift-at-28": "descriptors",
    "no-userfaultfd": "userfaultfd",
    "unshaken": PostcopyError,
    "rust-vmm": "rust-vmm-order",
    "deaf-at-5": BackEndTimeout,
    "late-table": BackEndTimeout,
    "hang-up-at-5": BackEndGone,
    "short-at-5": "size",
    "gift-at-5": "descriptors",
    "wrong-address": "addresses",
    "maps-nothing": "addresses",
    "registers-nothing": "registered",
    "registers-half": "registered",
    "dies-registered": BackEndGone,
}


ASKED = {1: 8, 15: 8, 3: 8, 17: 8, 2: 8, 28: 0, 29: 8, 5: 40}
"""Every question of the handshake that is answered, in order, and how long its answer is."""

SPOILT: dict[str, type[Exception] | str] = {
    "version": "framing",
    "huge": "framing",
    "many-gifts": "framing",
    "gift": "descriptors",
    "short": "size",
    "long": "size",
    "no-reply-flag": "order",
    "other-request": "order",
    "early": "order",
    "twice": "order",
    "half": BackEndTimeout,
    "deaf": BackEndTimeout,
    "hang-up": BackEndGone,
}
"""What can be wrong with an answer, and how it is told."""


@contextlib.contextmanager
def fake(tmp_path: Path, *lies: str) -> Iterator[Program]:
    path = tmp_path / f"{lies[0]}.sock"
    with running([sys.executable, str(FAKE), str(path), *lies], path, path) as program:
        yield program


@pytest.fixture
def service(runtime_dir: Path, source_file: SourceFile, request: pytest.FixtureRequest) -> Iterator[Service]:
    polluting = getattr(request, "param", False)
    with Service(runtime_dir, f"guest={source_file(SIZE)}", fault_around="4K", polluting=polluting) as service:
        yield service


def nobody_left(service: Service) -> None:
    until(
        lambda: [each["kind"] for each in service.status()["clients"]] == ["native"], "only the honest client is left"
    )


def test_every_lie_has_its_name(service: Service, tmp_path: Path) -> None:
    honest = service.client("guest", "shared")
    for lie, expected in LIES.items():
        with fake(tmp_path, lie) as program:
            kind = VhostUserError if isinstance(expected, str) else expected
            timeout = 1.0 if lie.startswith(("deaf", "late", "rust")) else 20.0
            with pytest.raises(kind) as caught:
                BackEnd(program.socket, ["guest"], service.directory, timeout=timeout).close()
            if isinstance(caught.value, VhostUserError):
                assert caught.value.rule == expected, (lie, caught.value)
            assert "\n" not in str(caught.value)
        nobody_left(service)
    assert service.block("guest")["received"] == 0, "nobody touched anything"
    assert honest.do("b.buf[8]") == 1


@pytest.mark.parametrize("spoilt", SPOILT)
def test_every_answer_spoilt(service: Service, tmp_path: Path, spoilt: str) -> None:
    """Each answer of the handshake in turn, whatever has been agreed on before it."""
    honest, expected = service.client("guest", "shared"), SPOILT[spoilt]
    asked = [request for request, size in ASKED.items() if size or spoilt != "short"]
    with fake(tmp_path, *(f"{spoilt}-at-{request}" for request in asked), "none") as program:
        for request in asked:
            timeout = 1.0 if expected is BackEndTimeout else 20.0
            with pytest.raises(VhostUserError if isinstance(expected, str) else expected) as caught:
                BackEnd(program.socket, ["guest"], service.directory, timeout=timeout).close()
            if isinstance(caught.value, VhostUserError):
                assert caught.value.rule == expected, (request, caught.value)
            nobody_left(service)
        BackEnd(program.socket, ["guest"], service.directory).close()
    assert service.block("guest")["received"] == 0, "nobody touched anything"
    assert honest.do("b.buf[8]") == 1


def test_good_ones(service: Service, tmp_path: Path) -> None:
    """True addresses or echoed, slow or not, twice in a row, in two overlapping regions."""
    service.client("guest", "shared")
    memory = [GuestMemory("guest", 0, SIZE // 2), GuestMemory("guest", SIZE // 4)]
    for lie, quirks in (("none", []), ("echo", ["addresses-echoed"]), ("slow-at-5", [])):
        with fake(tmp_path, lie) as program:
            for _ in range(2):
                with BackEnd(program.socket, memory, service.directory) as back_end:
                    assert [quirk for quirk in back_end.quirks if quirk.startswith("addresses")] == quirks
                    assert [at.length for at in back_end.placed] == [SIZE * 3 // 4, SIZE // 2]
                nobody_left(service)


def test_the_order_of_rust_vmm(service: Service, tmp_path: Path) -> None:
    """Said so, it works: the table, then LISTEN. It is told by name when it was not said."""
    honest = service.client("guest", "shared")
    with fake(tmp_path, "rust-vmm") as program:
        with BackEnd(program.socket, ["guest"], service.directory, order="rust-vmm") as back_end:
            assert back_end.quirks == ["open-before-registered"]
            assert [at.length for at in back_end.placed] == [SIZE]
            honest.do("b.ensure()")
            until(lambda: back_end.complete, "the block is released")
            back_end.end()
        nobody_left(service)
        assert probe(Settings(str(program.socket), "none", order="rust-vmm")).passed
    with fake(tmp_path, "none") as program, pytest.raises(VhostUserError) as caught:
        BackEnd(program.socket, ["guest"], service.directory, order="rust-vmm")
    assert caught.value.rule == "size"


def test_one_that_lets_go_late(service: Service, tmp_path: Path) -> None:
    """It is served until it has: a device that winds up may still touch its memory."""
    service.client("guest", "shared")
    with fake(tmp_path, "lets-go-late") as program:
        back_end = BackEnd(program.socket, ["guest"], service.directory)
        back_end.channel.close()
        assert not back_end.wait_until_unmapped(within=0.2)
        assert len(service.status()["clients"]) == 2, "nobody has taken leave for it"
        assert back_end.wait_until_unmapped()
        back_end.close()
    nobody_left(service)


def test_one_that_refuses_the_end(service: Service, tmp_path: Path) -> None:
    honest = service.client("guest", "shared")
    with fake(tmp_path, "refuse-30") as program, BackEnd(program.socket, ["guest"], service.directory) as back_end:
        with pytest.raises(PostcopyError, match="pages are missing"):
            back_end.end()
        honest.do("b.ensure()")
        until(lambda: back_end.complete, "the block is released")
        with pytest.raises(VhostUserError, match="refuses POSTCOPY_END"):
            back_end.end()
    nobody_left(service)


@pytest.mark.parametrize("service", [True], indirect=True)
def test_one_that_populates_its_memory(service: Service, tmp_path: Path) -> None:
    """Zeros are in the block before anybody could help it: told at once, and by the audit."""
    service.client("guest", "shared")
    with (
        fake(tmp_path, "populates") as program,
        pytest.raises(VhostUserError, match=r"3 pages of block guest .* did not place"),
    ):
        BackEnd(program.socket, ["guest"], service.directory)
    nobody_left(service)
    assert service.status(audit=True)["totals"]["polluted"] == 3


@pytest.mark.parametrize(
    ("lie", "rule"),
    [
        ("populates", "populated"),
        ("registers-half", "registered"),
        ("refuse-30", "answers"),
        ("rust-vmm", "table-reply"),
    ],
)
def test_a_probe_tells_which_rule_is_broken(tmp_path: Path, lie: str, rule: str) -> None:
    with fake(tmp_path, lie) as program:
        report = probe(Settings(str(program.socket), "none", timeout=2.0 if lie == "rust-vmm" else 20.0))
    assert not report.passed
    assert [name for name, state in report.states.items() if state == "broken"] == [rule]


def test_a_probe_of_a_good_one(tmp_path: Path) -> None:
    with fake(tmp_path, "none") as program:
        report = probe(Settings(str(program.socket), "none"))
    assert report.passed, report.lines()
    assert report.states["comes-back"] == "held"
