"""Metrics for Prometheus: ``serve --metrics HOST:PORT``.

A thread of its own answers scrapes. It reads shared memory and a few numbers of the main thread, and asks no process.
Nothing is counted only for it, so metrics cost nothing until they are scraped. Names and units follow Prometheus'
conventions: seconds, bytes, ``_total`` for what only grows."""

from __future__ import annotations

import ipaddress
import logging
import socket
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from postcopy_protocol import counters, stages
from postcopy_protocol.errors import BadInput, PostcopyError

from ..blocks import RamBlock
from ..clients.client import Client
from ..parts import Parts
from .scrapes import Answer, ScrapeServer

log = logging.getLogger(__name__)

COUNTERS: tuple[tuple[str, str, int | Callable[[Sequence[int]], int]], ...] = (
    ("faults", "Page faults of clients that were answered.", counters.faults),
    ("placed_pages", "Pages that workers placed, fault-around included.", counters.placed),
    ("around_pages", "Pages placed by fault-around, beyond the faulting one.", counters.AROUND),
    ("around_used_pages", "Of those, pages in windows that a stream of faults went through.", counters.AROUND_USED),
    ("requested_pages", "Pages that workers asked the supervisor for.", counters.REQUESTS),
    ("deduplicated_faults", "Faults at pages that were there or on their way.", counters.DEDUPLICATED),
    ("wakes", "Wake calls.", counters.WAKES),
    ("lost_pages", "Faults at pages that their source could not supply.", counters.LOST),
)  # per client: name, help, and a counter or a function of the counters
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
        family, kind, _, _, place = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        if not public and not ipaddress.ip_address(str(place[0]).partition("%")[0]).is_loopback:
            raise BadInput(
                f"--metrics {host}:{port}: other machines reach this address, and metrics name blocks, clients and "
                "sources to anyone who asks: use 127.0.0.1, or add --metrics-public"
            )
        listener = socket.socket(family, kind)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(place)
            listener.listen(64)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise BadInput(f"--metrics {host}:{port}: {error.strerror or error}") from error
    return listener


class Collector:
    """Collects the metrics of one scrape, in the answering thread."""

    def __init__(self, parts: Parts) -> None:
        self._parts = parts

    def collect(self) -> Iterator[Any]:
        """Families of samples, as prometheus_client wants them."""
        parts = self._parts
        # Copies: the main thread goes on meanwhile, and a dict that changes must not be iterated.
        clients, blocks = list(parts.clients.by_number.values()), list(parts.blocks.values())
        pages = [(client, client.counters.tolist()) for client in clients if client.counters is not None]
        yield from _supervisor_metrics(parts)
        yield from _block_metrics(blocks)
        loops = [counters.fault_loop_name(page[counters.FAULT_LOOP]) for _, page in pages]
        yield _gauge("postcopy_fault_loops", "Clients whose worker runs this fault loop.", "loop",
                     [(name, loops.count(name)) for name in counters.FAULT_LOOPS if name])  # fmt: skip
        yield from _client_metrics(pages, parts.pool.restarts_of)
        total = counters.merge([parts.clients.past, parts.zero.counters.tolist(), *(page for _, page in pages)])
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


def _supervisor_metrics(parts: Parts) -> Iterator[Any]:
    state, engine = parts.shown_state, parts.paging.engine
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
    yield _counter("postcopy_events", "Events by kind.", "kind", list(parts.event_log.counts.items()))


def block_stages(block: RamBlock, parts: Parts) -> memoryview:
    """All faults in a block, of clients that are here or have left, and what the supervisor did for them."""
    link, clients = parts.paging.links.get(block.number), list(parts.clients.by_number.values())
    found = [client.stages(block.number) for client in clients if block.number in client.touches]
    ours = [link.stages[block.number]] if link is not None else []
    past = parts.clients.past_stages[block.number]
    return stages.merged([past, *ours, *(page for page in found if page is not None)])


def _block_metrics(blocks: Sequence[RamBlock]) -> Iterator[Any]:
    counted = [(block.name, block.pages, block.page_size, *block.counts()) for block in blocks]
    yield _gauge("postcopy_block_bytes", "Size of the block.", "block", [(row[0], row[1] * row[2]) for row in counted])
    yield _gauge("postcopy_block_received_bytes", "Of it, what has been received.", "block",
                 [(row[0], row[3] * row[2]) for row in counted])  # fmt: skip
    yield _gauge("postcopy_block_lost_bytes", "Of it, what its source has lost.", "block",
                 [(row[0], row[4] * row[2]) for row in counted])  # fmt: skip


def _client_metrics(pages: Sequence[tuple[Client, list[int]]], restarts: Callable[[int], int]) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily

    labels = ("client", "name", "pid")
    for name, text, counter in COUNTERS:
        family = CounterMetricFamily(f"postcopy_client_{name}", text, labels=labels)
        for client, page in pages:
            family.add_metric(_labels(client), page[counter] if isinstance(counter, int) else counter(page))
        yield family
    blocked = CounterMetricFamily(
        "postcopy_client_blocked_seconds", "Time spent waiting for missing pages.", labels=labels
    )
    restarted = CounterMetricFamily("postcopy_client_restarts", "Restarts of this client's worker.", labels=labels)
    for client, page in pages:
        blocked.add_metric(_labels(client), counters.sum_ns(page) / 1e9)
        restarted.add_metric(_labels(client), restarts(client.number))
    yield from (blocked, restarted)


def _labels(client: Client) -> tuple[str, str, str]:
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
