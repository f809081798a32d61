"""The status is worked out in steps: askers, faults, clients and the end of the service come between them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import zmq

from postcopy_protocol.codec import decode, encode
from postcopy_protocol.messages import AskEvents, AskStatus, AskStop, EventsAnswer, StatusAnswer, StopAnswer
from tests.conftest import SourceFile
from tests.system.remote import Source
from tests.system.service import PAGE, Service, until

MANY, VERY_MANY = 30, 900
WITHIN_MS = 20_000
ANSWERS = (StatusAnswer, EventsAnswer, StopAnswer)


def heard(dealer: zmq.Socket[bytes]) -> Any:
    assert dealer.poll(WITHIN_MS), "no answer"
    return decode(dealer.recv(), expect=ANSWERS)


def test_many_askers_at_once_and_some_that_go_away(runtime_dir: Path) -> None:
    with Service(runtime_dir, "z=zero:64K") as service:
        service.client("z").do("b.buf[0]")
        with service.dealer() as one, service.dealer() as two:
            for _ in range(MANY):
                one.send(encode(AskStatus(False)))
                two.send(encode(AskEvents(0)))
                two.send(encode(AskStatus(True)))
            for _ in range(MANY):
                with service.dealer() as gone:
                    gone.send(encode(AskStatus(False)))
            for _ in range(MANY):
                assert json.loads(heard(one).document)["totals"]["faults"] >= 1
            kinds = [type(heard(two)) for _ in range(2 * MANY)]
            assert sorted(kind.__name__ for kind in kinds) == ["EventsAnswer"] * MANY + ["StatusAnswer"] * MANY
        assert not [event for event in service.status()["events"] if event["kind"] == "bug"]


def test_who_has_asked_is_answered_when_the_house_ends(runtime_dir: Path) -> None:
    with Service(runtime_dir, "z=zero:64K") as service, service.dealer() as dealer:
        service.client("z").do("b.buf[0]")
        for number in range(VERY_MANY):
            dealer.send(encode(AskEvents(number)))  # each a question of its own
        dealer.send(encode(AskStatus(False)))
        dealer.send(encode(AskStop(False)))
        kinds = [type(heard(dealer)).__name__ for _ in range(VERY_MANY + 2)]
        assert sorted(kinds) == ["EventsAnswer"] * VERY_MANY + ["StatusAnswer", "StopAnswer"]
        assert service.wait() == 0


@pytest.fixture
def asking() -> Iterator[threading.Event]:
    """Set at the end of the test."""
    end = threading.Event()
    yield end
    end.set()


def test_faults_clients_and_totals_while_the_status_is_asked_without_a_pause(
    runtime_dir: Path, source_file: SourceFile, asking: threading.Event
) -> None:
    """Every fault is served, clients come and go, and no total ever goes back."""
    path = source_file(256 * PAGE)
    with (
        Source(f"far={path}") as source,
        Service(runtime_dir, f"near={path}", source.block("far"), background_rate=0, fault_around="4K") as service,
    ):
        totals: list[dict[str, Any]] = []

        def ask() -> None:
            with service.dealer() as dealer:
                while not asking.is_set():
                    dealer.send(encode(AskStatus(False)))
                    dealer.send(encode(AskStatus(False)))
                    totals.extend(json.loads(heard(dealer).document)["totals"] for _ in range(2))

        thread = threading.Thread(target=ask)
        thread.start()
        reader = service.client("far", "shared")
        for _ in range(4):
            passing = service.client("near")
            assert passing.do(f"check(b, {str(path)!r}, 'random', 4096)") == -1
            passing.close()
        assert reader.do(f"check(b, {str(path)!r}, 'random', 4096)") == -1
        until(lambda: len(service.status()["clients"]) == 1, "the others have left")
        asking.set()
        thread.join(20)
        last = service.status()["totals"]
        assert last["faults"] >= 256 + 4 * 1 and last["requests"] == 256
        for name in ("faults", "placed", "wakes", "requests", "blocked_s"):
            figures = [total[name] for total in totals] + [last[name]]
            assert figures == sorted(figures), name
