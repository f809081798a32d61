"""A worker asks on one channel and is answered on another, which may not be up yet: then the answer is lost, and the
wake of nothing that follows its hello makes its clients ask again. Forced here, by a supervisor that loses it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import SourceFile
from tests.house.house import House, word
from tests.house.remote import Source

PAGE = 4096
DEAF = """
import sys
from postcopy_supervisor.__main__ import main
from postcopy_supervisor.house import House

tell, hello = House._tell_worker, House._hello
held, lost, met = {}, set(), set()

def meet(house, worker):
    if worker in held and worker in lost:
        met.add(worker)
        print("an answer was lost before the hello", file=sys.stderr, flush=True)
        hello(house, held.pop(worker))

def late_hello(house, message):
    if message.incarnation == 1:
        return hello(house, message)
    held[message.worker] = message
    meet(house, message.worker)

def no_way_yet(house, worker, data):
    slot = house.workforce.fleet.slots.get(worker)
    if worker in met or slot is None or slot.incarnation == 1:
        return tell(house, worker, data)
    lost.add(worker)
    meet(house, worker)

House._hello, House._tell_worker = late_hello, no_way_yet
sys.exit(main())
"""


class DeafHouse(House):
    """Its workers' second lives are not reached before their hello, which it hears late."""

    def start(self, *, program: tuple[str, ...] = (), **more: Any) -> None:
        super().start(program=("-c", DEAF), **more)


@pytest.mark.parametrize("mode", ["private", "shared"])
def test_an_answer_lost_before_the_channel_is_up(runtime_dir: Path, source_file: SourceFile, mode: str) -> None:
    path = source_file(1 << 20)
    options: dict[str, Any] = {"fault_around": "4K", "background_rate": "0"}
    with Source(f"ram0={path}") as source, DeafHouse(runtime_dir, source.block(), **options) as house:
        client = house.client("ram0", mode)
        assert client.do("words(b, [3])") == [word(3 * PAGE)]
        house.kill_worker(client)
        assert client.do("words(b, [9])") == [word(9 * PAGE)]
        assert "an answer was lost before the hello" in house.log()
        assert client.do(f"check(b, {str(path)!r}, 'random', 4096)") == -1
        assert house.status()["totals"]["restarts"] == 1
