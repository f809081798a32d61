"""``links``: urgent faults and the background on slow links.

Source and supervisor are in network namespaces of their own. What leaves the source's passes through tbf, the kernel's
token bucket filter; delay is a relay's (tests/wire/relay.py). The link is the same for the background alone, for faults
alone, and for both.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from statistics import median

import postcopy
from postcopy.queries import Control
from tests.wire.networks import HERE, Networks, inside, limit, two_networks
from tests.wire.relay import Relay

from .bench import PAGE, Bench, BenchmarkFailed, ClientProcess
from .figures import Pair, Row, percentile, ratio_row

LINKS = ((50e6, 0.0), (50e6, 0.02), (10e6, 0.0), (10e6, 0.02))
"""Bytes a second, and seconds of delay each way."""
URGENT_GOAL = 1.5
SHARE_GOAL = 0.8
STREAM_SECONDS = 4.0
SETTLED_WITHIN = 2.0
"""Seconds until the stream has learned its link."""
RANDOM_LENGTH = 1 << 30  # of which 1 % is touched
PORT = 7001


def run(bench: Bench) -> list[Row]:
    """Of each link: urgent p50 with background against without, and the share that the background keeps alone; then
    1 % of the pages at random."""
    rows: list[Row] = []
    pages = bench.scale.of(RANDOM_LENGTH, 32 << 20) // 100 // PAGE
    for rate, delay in LINKS[: bench.scale.of(len(LINKS), 1)]:
        urgent: list[Pair] = []
        shares: list[float] = []
        crowds: list[Pair] = []
        length = int(rate * bench.scale.of(16, 8)) // PAGE * PAGE
        file = bench.warm_file("slow", length)
        for number in range(bench.scale.pairs):
            name = f"{rate / 1e6:.0f} MB/s" + (f", {delay * 1000:.0f} ms" if delay else "")
            bench.say(f"links, {name}: round {number + 1} of {bench.scale.pairs}")
            with two_networks() as networks:
                limit(networks.source, rate)
                alone, _ = _urgent(bench, networks, file, length, delay, "0")
                beside, share = _urgent(bench, networks, file, length, delay, "auto")
                urgent.append((percentile(beside, 50) / 1000, percentile(alone, 50) / 1000))
                shares.append(share / rate)
                if not delay and rate == LINKS[0][0]:
                    crowds.append(_at_random(bench, networks, pages))
        os.unlink(file)
        rows.append(ratio_row(f"urgent p50 beside the background, {name}", urgent, URGENT_GOAL, labels=_BESIDE))
        values = (median(shares), min(shares), max(shares))
        rows.append(Row(f"background alone, of {name}", *values, "x", SHARE_GOAL, least=True, samples=shares))
        if crowds:
            row = f"{pages} random pages of {RANDOM_LENGTH >> 20} MiB, {name}"
            rows.append(ratio_row(row, crowds, labels=_BESIDE, unit="ms"))
    return rows


_BESIDE = ("with background", "without")


@contextmanager
def _served(bench: Bench, networks: Networks, file: str, delay: float, rate: str) -> Iterator[postcopy.Supervisor]:
    """A supervisor on the near side of the link, whose one source is on the far side."""
    command = [sys.executable, "-m", "postcopy_sources", f"ram={file}", "--listen", f"tcp://{HERE}:{PORT}"]
    command += ["--plain-tcp", "--die-with-parent", str(os.getpid()), "--log-level", "warning"]
    with ExitStack() as stack:
        with inside(networks.source):
            source = subprocess.Popen(command, stdin=subprocess.DEVNULL)
            stack.callback(source.wait, 10)
            stack.callback(source.send_signal, signal.SIGTERM)
            endpoint = f"tcp://{HERE}:{PORT}"
        with inside(networks.clients):
            if delay:
                relay = stack.enter_context(Relay("tcp:127.0.0.1:0", f"tcp:{HERE}:{PORT}"))
                relay.delay(delay)
                endpoint = relay.endpoint
            block = {"ram": f"{endpoint}/ram"}
            supervisor = bench.supervisor(block, background_rate=rate, plain_tcp=True, fault_around="4K")
            yield stack.enter_context(supervisor)


def _urgent(
    bench: Bench, networks: Networks, file: str, length: int, delay: float, rate: str
) -> tuple[list[float], float]:
    """Nanoseconds of urgent faults, and bytes a second of the background before the first of them."""
    with (
        _served(bench, networks, file, delay, rate) as supervisor,
        bench.client(runtime_dir=supervisor.runtime_dir, file=file, length=length) as client,
    ):
        client.ask(do="join", block="ram", mode="shared")
        share = 0.0
        if rate != "0":
            time.sleep(SETTLED_WITHIN)
            share = _rate(supervisor, bench.scale.of(int(STREAM_SECONDS), 1))
        count = bench.scale.of(40 if delay else 400, 10)
        # An open loop: each fault is due at its time, so they must be rarer than they take.
        answer = client.ask(do="touch_missing", seed=1, count=count, rate=12 if delay else 200)
        if len(answer["ns"]) < count:
            raise BenchmarkFailed("the stream was over before the client had touched its pages")
        return answer["ns"], share


def _rate(supervisor: postcopy.Supervisor, seconds: float) -> float:
    with Control(supervisor.runtime_dir) as control:
        begun, before = time.monotonic(), control.status()["blocks"][0]["received"]
        time.sleep(seconds)
        after = control.status()["blocks"][0]["received"]
        return float((after - before) * PAGE / (time.monotonic() - begun))


def _at_random(bench: Bench, networks: Networks, pages: int) -> Pair:
    """Milliseconds for so many pages of a large block, one after the other, with background and without."""
    length = bench.scale.of(RANDOM_LENGTH, 32 << 20)
    file = bench.warm_file("random", length)
    took: list[float] = []
    for rate in ("auto", "0"):
        with (
            _served(bench, networks, file, 0.0, rate) as supervisor,
            bench.client(runtime_dir=supervisor.runtime_dir, file=file, length=length) as client,
        ):
            client.ask(do="join", block="ram", mode="shared")
            span = _touched(client, pages)
            took.append((span[1] - span[0]) / 1e6)
    os.unlink(file)
    return took[0], took[1]


def _touched(client: ClientProcess, pages: int) -> list[int]:
    span: list[int] = client.ask(do="touch", seed=1, count=pages)["span"]
    return span
