"""``store``: snapshots in a directory. A fault out of a warm chunk cache beside one of a plain page source, a store
with 20 ms delay with and without replay, and pack beside ``zstd -T2``.

The store with a delay is an HTTP server of this process, so a figure never depends on a network."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from postcopy.queries import Control

from .bench import PAGE, Bench, BenchmarkFailed, Measure
from .figures import Pair, Row, percentile, ratio_row, value_row

DELAY = 0.02
WARM_GOAL, PACK_GOAL, SECOND_GOAL, REPLAY_GOAL, READY_GOAL = 1.3, 1 / 0.8, 8.0, 3.0, 0.5
CHANGED = 0.05


def run(bench: Bench) -> list[Row]:
    """Faults, replay, pack."""
    os.environ["POSTCOPY_CHUNK_CACHE"] = os.path.join(bench.directory, "chunks")
    store = os.path.join(bench.directory, "store")
    _postcopy("pack", bench.file, f"{store}/ram")
    parts: dict[str, Measure] = {
        "warm fault": partial(_warm, store=store),
        "replay": partial(_replay, store=store),
        "pack": _pack,
    }
    return [row for name, measure in parts.items() for row in bench.part(f"store: {name}", measure)]


def _postcopy(*words: str) -> None:
    done = subprocess.run([sys.executable, "-m", "postcopy", *words], capture_output=True, text=True)
    if done.returncode:
        raise BenchmarkFailed(f"postcopy {words[0]}: {done.stderr.strip()}")


def _warm(bench: Bench, store: str) -> list[Row]:
    pairs: list[Pair] = []
    _touches(bench, f"store:{store}/ram", 0, bench.pages)  # fills the cache
    for number in range(bench.scale.pairs):
        bench.say(f"store, warm: pair {number + 1} of {bench.scale.pairs}")
        sides = {}
        for side in ("store", "file") if number % 2 else ("file", "store"):
            if side == "store":
                sides[side] = _touches(bench, f"store:{store}/ram", number)
            else:
                with bench.source(["ram"]) as blocks:
                    sides[side] = _touches(bench, blocks["ram"], number)
        pairs.append((percentile(sides["store"], 50), percentile(sides["file"], 50)))
    return [ratio_row("fault p50, warm chunk cache", pairs, WARM_GOAL, labels=("store", "page source"))]


def _touches(bench: Bench, source: str, seed: int, count: int = 0) -> list[float]:
    """Microseconds of each touch of ``count`` missing pages at random."""
    with (
        bench.supervisor({"ram": source}, background_rate=0) as supervisor,
        bench.product_client(supervisor, "ram", "shared") as client,
    ):
        answer = client.ask(do="touch", seed=seed, count=count or bench.touches)
        return [nanoseconds / 1000 for nanoseconds in answer["ns"]]


def _replay(bench: Bench, store: str) -> list[Row]:
    """One run that needs a few pages, again and again."""
    pages = bench.scale.of(600, 60)
    ready: list[Pair] = []
    shares: list[float] = []
    with _slow(store) as url:
        _needed(bench, f"store:{store}/ram", pages, record_working_set=True)
        for number in range(bench.scale.of(3, 1)):
            bench.say(f"store, replay: pair {number + 1}")
            plain, faults = _needed(bench, f"store:{url}/ram", pages, chunk_cache_size=0)
            replayed, left = _needed(bench, f"store:{url}/ram", pages, chunk_cache_size=0, replay=True)
            ready.append((replayed * 1000, plain * 1000))
            shares.append(100 * left / max(1, faults))
    detail = f"{pages} pages of {bench.pages} at random"
    return [
        ratio_row("time to ready with replay, 20 ms store", ready, READY_GOAL, unit="ms", labels=("replay", "without")),
        value_row("requests of clients with replay, of those without", shares, "%", REPLAY_GOAL, detail=detail),
    ]


def _needed(bench: Bench, source: str, pages: int, **options: Any) -> tuple[float, int]:
    """Seconds that a client takes for these pages from the start of the service on, and the requests for its faults."""
    with (
        bench.supervisor({"ram": source}, background_rate=0, fault_around=PAGE, **options) as supervisor,
        bench.product_client(supervisor, "ram", "private") as client,
    ):
        began = time.monotonic()
        client.ask(do="touch", seed=1, count=pages)
        seconds = time.monotonic() - began
        with Control(supervisor.runtime_dir) as control:
            return seconds, control.status()["sources"][0]["requests"]


@contextmanager
def _slow(directory: str) -> Iterator[str]:
    """The directory over HTTP; each answer comes after DELAY."""

    class Handler(SimpleHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            time.sleep(DELAY)
            with suppress(OSError):
                super().do_GET()

        def log_message(self, format: str, *arguments: Any) -> None:
            """Nothing is logged."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=directory))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def _pack(bench: Bench) -> list[Row]:
    if shutil.which("zstd") is None:
        raise BenchmarkFailed("zstd is missing: install Debian's package zstd")
    image = os.path.join(bench.directory, "image")
    pages = bench.scale.of(65536, 2048)
    _write_image(image, pages)
    pairs: list[Pair] = []
    for number in range(bench.scale.of(5, 1)):
        bench.say(f"store, pack: pair {number + 1}")
        place = os.path.join(bench.directory, f"packed-{number}")
        seconds = {}
        for side in ("pack", "zstd") if number % 2 else ("zstd", "pack"):
            began = time.monotonic()
            if side == "pack":
                _postcopy("pack", image, f"{place}/one")
            else:
                subprocess.run(["zstd", "-q", "-f", "-3", "-T2", image, "-o", f"{image}.zst"], check=True)
            seconds[side] = time.monotonic() - began
        pairs.append((seconds["pack"] * 1000, seconds["zstd"] * 1000))
    before = _bytes_in(place)
    _change(image, pages)
    _postcopy("pack", image, f"{place}/two")
    grown = 100 * (_bytes_in(place) - before) / before
    return [
        ratio_row(f"pack of {pages * PAGE >> 20} MiB", pairs, PACK_GOAL, unit="ms", labels=("pack", "zstd -3 -T2")),
        value_row("second snapshot, 5 % of the pages changed: uploaded", [grown], "%", SECOND_GOAL),
    ]


def _write_image(path: str, pages: int) -> None:
    """A third zeros, half compressible, the rest not: as in the memory of a process."""
    chance = random.Random(1)
    words = [chance.randbytes(chance.choice((3, 5, 8, 12))) for _ in range(3000)]
    with open(path, "wb") as file:
        for _ in range(pages):
            kind = chance.random()
            text = b"".join(chance.choices(words, k=600))[:PAGE].ljust(PAGE, b"\0") if kind >= 0.42 else b""
            file.write(bytes(PAGE) if kind < 0.32 else text or chance.randbytes(PAGE))


def _change(path: str, pages: int) -> None:
    """Change pages that lie near one another, as a running machine does."""
    with open(path, "r+b") as file:
        for start in range(0, pages, 1024):
            for page in range(start, start + int(1024 * CHANGED)):
                file.seek(page * PAGE)
                file.write(random.Random(page).randbytes(64))


def _bytes_in(directory: str) -> int:
    return sum(os.stat(os.path.join(folder, file)).st_size for folder, _, files in os.walk(directory) for file in files)
