"""Series of clients: few at a time, and no counter goes down when clients come and leave."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

from hypothesis import given, settings
from hypothesis import strategies as st

from postcopy_protocol import counters, stages
from postcopy_supervisor.clients.client import Client, Clients
from postcopy_supervisor.observe import metrics
from postcopy_supervisor.paging.engine import Engine
from postcopy_supervisor.waits import Waits

MOST = 3
Step = tuple[str, int]


class Bench:
    """Clients that come, fault, crash and leave, and what is scraped."""

    def __init__(self) -> None:
        self.clients = Clients((), cast(Any, SimpleNamespace(drop=lambda key: None)))
        self.restarts: dict[int, int] = {}
        pool = SimpleNamespace(slots={}, restarts_of=lambda number: self.restarts.get(number, 0))
        parts = SimpleNamespace(clients=self.clients, pool=pool, waits=Waits({}, self.clients, Engine()))
        self.series = metrics.ClientSeries(cast(Any, parts))
        self.faults = self.crashes = 0

    def do(self, step: Step) -> None:
        deed, place = step
        present = list(self.clients.by_number.values())
        if deed == "comes":
            number = self.clients.take_number()
            made: Any = Client(number, None, 0, number, -number, cast(Any, SimpleNamespace(name="n")), 0.0)
            made.figures = memoryview(bytearray(stages.END))
            made.counters = made.figures[: counters.PAGE_BYTES].cast("Q")
            self.clients.by_number[number] = made
            self.clients.by_user[0] += 1
        elif present:
            client = present[place % len(present)]
            if deed == "faults" and client.counters is not None:
                client.counters[counters.PLAIN] += 1
                self.faults += 1
            elif deed == "crashes":
                self.restarts[client.number] = self.restarts.get(client.number, 0) + 1
                self.crashes += 1
            elif deed == "leaves":
                self.clients.drop(client, self.restarts.get(client.number, 0))
                self.restarts.pop(client.number, None)

    def scrape(self) -> dict[tuple[str, str], float]:
        """Counters of faults and restarts, by name and client."""
        found = {}
        for family in self.series.collect(0.0):
            for sample in family.samples:
                if sample.name.endswith(("faults_total", "restarts_total")):
                    found[sample.name, sample.labels.get("client", "")] = sample.value
        return found


@settings(max_examples=60, deadline=None)
@given(
    st.lists(
        st.tuples(st.sampled_from(("comes", "faults", "faults", "crashes", "leaves", "scrape")), st.integers(0, 9))
    )
)
def test_no_counter_goes_down(steps: list[Step]) -> None:
    metrics.MOST_CLIENTS, most = MOST, metrics.MOST_CLIENTS
    try:
        bench, before = Bench(), dict[tuple[str, str], float]()
        for step in [*steps, ("scrape", 0)]:
            bench.do(step)
            if step[0] != "scrape":
                continue
            now = bench.scrape()
            assert all(now[key] >= before[key] for key in now.keys() & before.keys())
            assert now["postcopy_faults_total", ""] == bench.faults
            assert now["postcopy_restarts_total", ""] == bench.crashes
            named = {client for name, client in now if name == "postcopy_client_faults_total"}
            assert "others" in named and len(named) <= MOST + 1
            before = now
    finally:
        metrics.MOST_CLIENTS = most
