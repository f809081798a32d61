"""Metrics for Prometheus: ``serve --metrics HOST:PORT``.

A thread of its own answers scrapes. It reads shared memory and a few numbers of the main thread, and asks no process.
Nothing is counted only for it, so metrics cost nothing until they are scraped. Names and units follow Prometheus'
conventions: seconds, bytes, ``_total`` for what only grows."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Generator, Iterable, Iterator, Sequence
from typing import Any

from postcopy_kernel.tcp import TcpAddress
from postcopy_protocol import counters, stages
from postcopy_protocol.errors import BadInput, PostcopyError
from postcopy_protocol.messages import REFUSALS, VERSION
from postcopy_protocol.version import PACKAGE

from ..blocks import RamBlock
from ..clients.client import Client
from ..parts import Parts
from . import figures
from .scrapes import Answer, ScrapeServer

log = logging.getLogger(__name__)

MOST_CLIENTS = 100
"""Clients with series of their own at a time."""
OTHERS = ("others", "", "")
"""Labels of all clients that never had series of their own."""
MOST_KINDS = 64  # of events: workers invent some, and what invents without end shares one series
COUNTERS: tuple[tuple[str, str, str], ...] = (
    ("faults", "Page faults of clients that were answered.", "faults"),
    ("placed_pages", "Pages that workers placed, fault-around included.", "placed"),
    ("around_pages", "Pages placed by fault-around, beyond the faulting one.", "placed_around"),
    ("around_used_pages", "Of those, pages in windows that a stream of faults went through.", "around_used"),
    ("requested_pages", "Pages that workers asked the supervisor for.", "requests"),
    ("deduplicated_faults", "Faults at pages that were there or on their way.", "deduplicated"),
    ("wakes", "Wake calls.", "wakes"),
    ("lost_pages", "Faults at pages that their source could not supply.", "lost"),
    ("handler_failures", "Pages that a handler function could not make.", "failures"),
    ("blocked_seconds", "Time spent waiting for missing pages.", "blocked_s"),
    ("restarts", "Workers that ended unexpectedly.", "restarts"),
)
"""Name, help and figure, per client and for all: ``postcopy_client_faults_total`` and ``postcopy_faults_total``."""
OF_BLOCKS = (
    ("bytes", "Size of the block."),
    ("received_bytes", "Of it, what has been received."),
    ("lost_bytes", "Of it, what its source has lost."),
    ("polluted_bytes", "Of it, what postcopy did not place."),
    ("waiting_faults", "Faults that wait for a page of it now."),
    ("oldest_wait_seconds", "Age of the oldest of them."),
)
STATES = ("starting", "running", "paused", "ending")


def start(parts: Parts, address: tuple[str, int], *, public: bool = False) -> None:
    """Answer scrapes until the process ends. ``public``: other machines may reach the address. Raises PostcopyError,
    BadInput."""
    try:
        from prometheus_client import CollectorRegistry
        from prometheus_client.exposition import choose_encoder
    except ImportError:
        raise PostcopyError("--metrics needs prometheus_client: pip install 'postcopy[supervisor]'") from None
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector(parts))

    def scrape(accept: str) -> Answer:
        encode, kind = choose_encoder(accept)
        return kind, encode(registry)

    listener = _listen(*address, public=public)
    ScrapeServer(listener, scrape).start()
    host, port = listener.getsockname()[:2]
    log.info("metrics on http://%s:%d/metrics", f"[{host}]" if ":" in host else host, port)


def _listen(host: str, port: int, *, public: bool) -> socket.socket:
    try:
        address = TcpAddress.of(host, port)
        if not public and not address.loopback:
            raise BadInput(
                f"--metrics {host}:{port}: other machines reach this address, and metrics name blocks, clients and "
                "sources to anyone who asks: use 127.0.0.1, or add --metrics-public"
            )
        return address.listen()
    except OSError as error:
        raise BadInput(f"--metrics {host}:{port}: {error.strerror or error}") from error


class Collector:
    """Collects the metrics of one scrape, in the answering thread."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._series = ClientSeries(parts)

    def collect(self) -> Iterator[Any]:
        """Families of samples, as prometheus_client wants them."""
        parts = self._parts
        blocks, now = list(parts.blocks.values()), time.monotonic()
        yield from _supervisor_metrics(parts)
        yield from _block_metrics(blocks, parts, now)
        total = yield from self._series.collect(now)
        counters.join(total, parts.zero.counters.tolist())
        yield histogram("postcopy_fault_latency_seconds", "From a fault's message to its release.", [((), (), total)])
        stages_of = [(block.name, block_stages(block, parts)) for block in blocks]
        yield histogram("postcopy_stage_latency_seconds", "Stages of faults: asked, arrived, placed, woken.",
                        [(("block", "stage"), (name, stage), stages.histogram(page, stage))
                         for name, page in stages_of for stage in stages.NAMES])  # fmt: skip
        links = list(dict.fromkeys(parts.paging.links.values()))
        found = [(("endpoint",), (link.endpoint,), link.counters) for link in links]
        if links:
            yield histogram("postcopy_source_latency_seconds", "From a request to a source to its answer.", found)
            yield _gauge("postcopy_source_up", "1: the source answers.", "endpoint",
                         [(link.endpoint, link.shown == "up") for link in links])  # fmt: skip
            yield _counter("postcopy_source_received_bytes", "Bytes of pages that came from the source.", "endpoint",
                           [(link.endpoint, link.bytes) for link in links])  # fmt: skip
            yield _counter("postcopy_source_requests", "Requests sent to the source.", "endpoint",
                           [(link.endpoint, link.requests) for link in links])  # fmt: skip
        if filling := [(link.endpoint, link.progress) for link in links if link.progress is not None]:
            yield _gauge("postcopy_source_left_bytes", "Bytes that are still to come to the source.", "endpoint",
                         [(name, found.size - found.received) for name, found in filling])  # fmt: skip


class ClientSeries:
    """Series of clients, MOST_CLIENTS at a time: the first to come have some, until they leave. All others are one.

    No counter goes down. A client is new only once, so it never moves from the others to a series of its own, and what
    it had in its own is not added to the others when it leaves. Sums over all clients have series without labels."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        self._named: dict[int, Client] = {}
        self._newest = 0  # number of the newest client that a scrape has seen
        self._gone = (list(counters.merge(())), 0)  # what clients had in series of their own: counters, restarts

    def collect(self, now: float) -> Generator[Any, None, list[int]]:
        """The families; returns the counters of all clients."""
        from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

        clients, rows, everything, restarts = self._read()
        all_figures = figures.of_clients(everything, restarts)
        for name, text, key in COUNTERS:
            yield _counter(f"postcopy_{name}", text, "", [("", all_figures[key])])
            family = CounterMetricFamily(f"postcopy_client_{name}", text, labels=LABELS)
            for labels, found in rows:
                family.add_metric(labels, found[key])
            yield family
        waiting = GaugeMetricFamily("postcopy_client_waiting_faults", "Faults that wait for a page now.", labels=LABELS)
        oldest = GaugeMetricFamily("postcopy_client_oldest_wait_seconds", "Age of the oldest of them.", labels=LABELS)
        for labels, (count, age) in self._waits(clients, now):
            waiting.add_metric(labels, count)
            oldest.add_metric(labels, age)
        yield from (waiting, oldest)
        quarantined = [slot for slot in list(self._parts.pool.slots.values()) if slot.quarantined]
        text = "Clients whose workers crashed too often."
        yield _gauge("postcopy_quarantined_clients", text, "", [("", len(quarantined))])
        return everything

    def _read(self) -> tuple[list[Client], list[tuple[Labels, dict[str, int | float]]], list[int], int]:
        """The clients; the rows of series; counters and restarts of all, also of those that have left."""
        known, pool = self._parts.clients, self._parts.pool
        with known.figures_turn:
            clients = [client for client in known.by_number.values() if client.counters is not None]
            everything, restarts = list(known.past), known.past_restarts
        self._name(clients)
        others, others_restarts = list(everything), restarts - self._gone[1]
        counters.subtract(others, self._gone[0])
        rows = []
        for client in clients:
            assert client.counters is not None
            page, crashes = client.counters.tolist(), max(client.restarts, pool.restarts_of(client.number))
            counters.join(everything, page)
            restarts += crashes
            if client.number in self._named:
                rows.append((_labels(client), figures.of_clients(page, crashes)))
            else:
                counters.join(others, page)
                others_restarts += crashes
        rows.append((OTHERS, figures.of_clients(others, others_restarts)))
        return clients, rows, everything, restarts

    def _name(self, clients: Sequence[Client]) -> None:
        """Give new clients series of their own, while there are any left."""
        present = {client.number for client in clients}
        for number in self._named.keys() - present:
            gone = self._named.pop(number)
            assert gone.counters is not None
            counters.join(self._gone[0], gone.counters.tolist())
            self._gone = self._gone[0], self._gone[1] + gone.restarts
        for client in sorted(clients, key=lambda client: client.number):
            if client.number > self._newest and len(self._named) < MOST_CLIENTS:
                self._named[client.number] = client
        self._newest = max(self._newest, *present, 0)

    def _waits(self, clients: Sequence[Client], now: float) -> Iterator[tuple[Labels, tuple[int, float]]]:
        others = (0, 0.0)
        for client in clients:
            found = self._parts.waits.of_client(client.number, now)
            if client.number in self._named:
                yield _labels(client), found
            else:
                others = others[0] + found[0], max(others[1], found[1])
        yield OTHERS, others


def _supervisor_metrics(parts: Parts) -> Iterator[Any]:
    from prometheus_client.core import InfoMetricFamily

    state, engine = parts.shown_state, parts.paging.engine
    build = {"version": PACKAGE, "protocol": str(VERSION), "transport": parts.transport}
    yield InfoMetricFamily("postcopy_build", "What runs here.", value=build)
    yield _gauge("postcopy_state", "1 for the state that the supervisor is in.", "state",
                 [(name, name == state) for name in STATES])  # fmt: skip
    for name, text, value in (
        ("worker_restarts", "Workers that ended unexpectedly.", parts.pool.restarts),
        ("supervisor_requests", "Pages and ranges asked for, each once.", engine.requests),
        ("supervisor_deduplicated", "Faults at pages that were asked for already.", engine.deduplicated),
        ("supervisor_placed_pages", "Pages that the supervisor placed itself.", parts.paging.placed),
    ):
        yield _counter(f"postcopy_{name}", text, "", [("", value)])
    yield _gauge("postcopy_clients", "Clients that are attached.", "", [("", len(parts.clients.by_number))])
    waiting, oldest = parts.waits.total(time.monotonic())
    yield _gauge("postcopy_waiting_faults", "Faults of all clients that wait for a page now.", "", [("", waiting)])
    yield _gauge("postcopy_oldest_wait_seconds", "Age of the oldest of them.", "", [("", oldest)])
    yield _counter("postcopy_refusals", "Refusals at the attach socket, by reason.", "reason",
                   [(code, parts.refused.get(code, 0)) for code in REFUSALS])  # fmt: skip
    kinds = list(parts.event_log.counts.items())
    rest = sum(count for _, count in kinds[MOST_KINDS:])
    kinds[MOST_KINDS:] = [("others", rest)] if rest else []
    pages = [client.counters for client in list(parts.clients.by_number.values()) if client.counters is not None]
    loops = [counters.fault_loop_name(page[counters.FAULT_LOOP]) for page in pages]
    yield _gauge("postcopy_fault_loops", "Clients whose worker runs this fault loop.", "loop",
                 [(name, loops.count(name)) for name in counters.FAULT_LOOPS if name])  # fmt: skip
    yield _counter("postcopy_events", "Events by kind.", "kind", kinds)


def block_stages(block: RamBlock, parts: Parts) -> memoryview:
    """All faults in a block, of clients that are here or have left, and what the supervisor did for them."""
    link, clients = parts.paging.links.get(block.number), list(parts.clients.by_number.values())
    found = [client.stages(block.number) for client in clients if block.number in client.touches]
    ours = [link.stages[block.number]] if link is not None else []
    past = parts.clients.past_stages[block.number]
    return stages.merged([past, *ours, *(page for page in found if page is not None)])


def _block_metrics(blocks: Sequence[RamBlock], parts: Parts, now: float) -> Iterator[Any]:
    rows: list[tuple[str, tuple[float, ...]]] = []
    for block in blocks:
        received, lost = block.counts()
        polluted = sum(last - first for first, last in block.polluted)
        sizes = (pages * block.page_size for pages in (block.pages, received, lost, polluted))
        rows.append((block.name, (*sizes, *parts.waits.of_block(block.number, now))))
    for at, (name, text) in enumerate(OF_BLOCKS):
        yield _gauge(f"postcopy_block_{name}", text, "block", [(block, found[at]) for block, found in rows])


LABELS = ("client", "name", "pid")
Labels = tuple[str, str, str]


def _labels(client: Client) -> Labels:
    return str(client.number), client.name, str(client.pid)


def histogram(name: str, text: str, found: Iterable[tuple[Sequence[str], Sequence[str], Sequence[int]]]) -> Any:
    """Family of histograms of (labels, values, counters), with one bucket for each power of two of nanoseconds."""
    from prometheus_client.core import HistogramMetricFamily

    family = None
    for labels, values, page in found:
        family = family or HistogramMetricFamily(name, text, labels=labels)
        steps = counters.cumulative(page)
        buckets = [(f"{bound / 1e9:.9g}", float(count)) for bound, count in steps[:-1]]
        buckets.append(("+Inf", float(steps[-1][1])))
        family.add_metric(values, buckets, sum_value=counters.sum_ns(page) / 1e9)
    return family


def _gauge(name: str, text: str, label: str, rows: Iterable[tuple[str, float]]) -> Any:
    from prometheus_client.core import GaugeMetricFamily

    return _filled(GaugeMetricFamily(name, text, labels=[label] if label else []), label, rows)


def _counter(name: str, text: str, label: str, rows: Iterable[tuple[str, float]]) -> Any:
    from prometheus_client.core import CounterMetricFamily

    return _filled(CounterMetricFamily(name, text, labels=[label] if label else []), label, rows)


def _filled(family: Any, label: str, rows: Iterable[tuple[str, float]]) -> Any:
    for value, figure in rows:
        family.add_metric([value] if label else [], float(figure))
    return family
