"""Figures for Prometheus: ``serve --metrics HOST:PORT``.

A thread of its own answers; it reads what lies in shared memory and a few numbers of the main thread, and asks nobody.
Nothing is counted here, so what nobody scrapes costs nothing. Names and units follow Prometheus' conventions: seconds,
bytes, ``_total`` for what only grows.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from postcopy_protocol import counters, stages
from postcopy_protocol.errors import BadInput, PostcopyError

from ..blocks import RamBlock
from ..clients.attach_server import AttachServer, Client
from ..paging.paging import RemotePaging

if TYPE_CHECKING:
    from ..main_loop import MainLoop

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
)
"""Per client: name, help, word of the statistics page or what tells it from them."""
STATES = ("starting", "running", "paused", "ending")


def start(house: MainLoop, address: tuple[str, int]) -> None:
    """Answer scrapes from now on, until the process ends. Raises PostcopyError, BadInput."""
    try:
        from prometheus_client import CollectorRegistry, start_http_server
    except ImportError:
        raise PostcopyError("--metrics needs prometheus_client: pip install 'postcopy[supervisor]'") from None
    registry = CollectorRegistry(auto_describe=False)
    registry.register(Collector(house))
    host, port = address
    try:
        server, _ = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise BadInput(f"--metrics {host}:{port}: {error.strerror or error}") from error
    log.info("metrics on http://%s:%d/metrics", host, server.server_port)


class Collector:
    """What one scrape finds. Called by the answering thread."""

    def __init__(self, house: MainLoop) -> None:
        self._house = house

    def collect(self) -> Iterator[Any]:
        """Families of samples, as prometheus_client wants them."""
        house = self._house
        # Copies: the main thread goes on meanwhile, and a dict that changes must not be iterated.
        clients, blocks = list(house.reception.clients.values()), list(house.blocks.values())
        pages = [(client, client.words.tolist()) for client in clients if client.words is not None]
        yield from self._house_figures()
        yield from _block_figures(blocks)
        yield from _client_figures(pages, house.workforce.restarts_of)
        total = counters.merge([house.reception.past, house.zero.words.tolist(), *(words for _, words in pages)])
        yield histogram("postcopy_fault_latency_seconds", "From a fault's message to its release.", [((), (), total)])
        stages_of = [(block.name, block_stages(block, house.reception, house.paging)) for block in blocks]
        yield histogram("postcopy_stage_latency_seconds", "Stages of faults: asked, arrived, placed, woken.",
                        [(("block", "stage"), (name, stage), stages.histogram(words, stage))
                         for name, words in stages_of for stage in stages.NAMES])  # fmt: skip
        links = list(dict.fromkeys(house.paging.links.values()))
        found = [(("endpoint",), (link.endpoint,), link.counters) for link in links]
        if links:
            yield histogram("postcopy_source_latency_seconds", "From a request to a source to its answer.", found)
            yield _gauge("postcopy_source_up", "1: the source answers.", "endpoint",
                         [(link.endpoint, link.shown == "up") for link in links])  # fmt: skip
            yield _counter("postcopy_source_received_bytes", "Bytes of pages that came from the source.", "endpoint",
                           [(link.endpoint, link.bytes) for link in links])  # fmt: skip
            yield _counter("postcopy_source_requests", "Requests sent to the source.", "endpoint",
                           [(link.endpoint, link.requests) for link in links])  # fmt: skip

    def _house_figures(self) -> Iterator[Any]:
        house = self._house
        state = house.state_shown
        yield _gauge("postcopy_state", "1 for the state that the supervisor is in.", "state",
                     [(name, name == state) for name in STATES])  # fmt: skip
        yield _gauge("postcopy_clients", "Clients that are attached.", "", [("", len(house.reception.clients))])
        yield _counter("postcopy_worker_restarts", "Workers that ended unasked.", "", [("", house.workforce.restarts)])
        yield _counter("postcopy_supervisor_requests", "Pages and ranges asked for, each once.", "",
                       [("", house.paging.engine.requests)])  # fmt: skip
        yield _counter("postcopy_supervisor_deduplicated", "Faults at pages that were asked for already.", "",
                       [("", house.paging.engine.deduplicated)])  # fmt: skip
        yield _counter("postcopy_supervisor_placed_pages", "Pages that the supervisor placed itself.", "",
                       [("", house.paging.placed)])  # fmt: skip
        counts = list(house.history.counts.items())
        yield _counter("postcopy_events", "What a person should know, by kind.", "kind", counts)


def block_stages(block: RamBlock, reception: AttachServer, paging: RemotePaging) -> memoryview:
    """All faults in a block, of clients that are here or have left, and what the supervisor did for them."""
    link = paging.links.get(block.number)
    found = [client.stages(block.number) for client in reception.clients.values() if block.number in client.touches]
    ours = [link.stages[block.number]] if link is not None else []
    return stages.merged([reception.past_stages[block.number], *ours, *(words for words in found if words is not None)])


def _block_figures(blocks: Sequence[RamBlock]) -> Iterator[Any]:
    counted = [(block.name, block.pages, block.page_size, *block.counts()) for block in blocks]
    yield _gauge("postcopy_block_bytes", "Size of the block.", "block", [(row[0], row[1] * row[2]) for row in counted])
    yield _gauge("postcopy_block_received_bytes", "Of it, what has been placed.", "block",
                 [(row[0], row[3] * row[2]) for row in counted])  # fmt: skip
    yield _gauge("postcopy_block_lost_bytes", "Of it, what cannot be had.", "block",
                 [(row[0], row[4] * row[2]) for row in counted])  # fmt: skip


def _client_figures(pages: Sequence[tuple[Client, list[int]]], restarts: Callable[[int], int]) -> Iterator[Any]:
    from prometheus_client.core import CounterMetricFamily

    labels = ("client", "name", "pid")
    for name, text, word in COUNTERS:
        family = CounterMetricFamily(f"postcopy_client_{name}", text, labels=labels)
        for client, words in pages:
            family.add_metric(_who(client), words[word] if isinstance(word, int) else word(words))
        yield family
    blocked = CounterMetricFamily("postcopy_client_blocked_seconds", "Time stood at missing pages.", labels=labels)
    again = CounterMetricFamily("postcopy_client_restarts", "Successors of this client's worker.", labels=labels)
    for client, words in pages:
        blocked.add_metric(_who(client), counters.sum_ns(words) / 1e9)
        again.add_metric(_who(client), restarts(client.number))
    yield from (blocked, again)


def _who(client: Client) -> tuple[str, str, str]:
    return str(client.number), client.name, str(client.pid)


def histogram(name: str, text: str, found: Iterable[tuple[Sequence[str], Sequence[str], Sequence[int]]]) -> Any:
    """Family of histograms, (labels, values, words) each, with a bucket a power of two of nanoseconds."""
    from prometheus_client.core import HistogramMetricFamily

    family = None
    for labels, values, words in found:
        family = family or HistogramMetricFamily(name, text, labels=labels)
        steps = counters.cumulative(words)
        buckets = [(f"{bound / 1e9:.9g}", float(count)) for bound, count in steps[:-1]]
        buckets.append(("+Inf", float(steps[-1][1])))
        family.add_metric(values, buckets, sum_value=counters.sum_ns(words) / 1e9)
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
