"""``store``: snapshots. A fault out of a warm chunk cache beside one of a plain page source; a whole image from
SeaweedFS beside what obstore alone reads; working sets of real programs on a store with 20 ms delay, with and without
replay; pack beside ``zstd -T2``.

The store with a delay is an HTTP server of this process, so a figure never depends on a network."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import obstore
import obstore.store

import postcopy
from postcopy.queries import Control
from postcopy_protocol.caibx import chunk_path
from postcopy_sources.storage.opening import open_store
from postcopy_sources.storage.snapshots import load
from postcopy_sources.storage.unpacking import unpack

from . import store_client
from .bench import PAGE, Bench, BenchmarkFailed, Measure
from .figures import Pair, Row, percentile, ratio_row, value_row

DELAY = 0.02
WARM_GOAL, PACK_GOAL, SECOND_GOAL, REPLAY_GOAL, READY_GOAL = 1.3, 1 / 0.8, 8.0, 3.0, 0.5
WHOLE_GOAL, FIRST_GOAL = 1 / 0.8, 50.0
READERS = 16
"""Threads of obstore alone."""
CHANGED = 0.05


def run(bench: Bench) -> list[Row]:
    """Faults, replay, pack."""
    os.environ["POSTCOPY_CHUNK_CACHE"] = os.path.join(bench.directory, "chunks")
    store = os.path.join(bench.directory, "store")
    _postcopy("pack", bench.file, f"{store}/ram")
    parts: dict[str, Measure] = {
        "warm fault": partial(_warm, store=store),
        "SeaweedFS": _seaweed,
        "numpy": partial(_program, kind="numpy", scale=bench.scale.of(24, 1)),
        "pack": _pack,
    }
    if not bench.scale.quick:  # the same ways again
        parts["replay"] = partial(_replay, store=store)
        parts["KVM guest"] = partial(_program, kind="kvm", scale=16)
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
    began = time.monotonic()
    with (
        bench.supervisor({"ram": source}, background_rate=0, fault_around=PAGE, **options) as supervisor,
        bench.product_client(supervisor, "ram", "private") as client,
    ):
        client.ask(do="touch", seed=1, count=pages)
        seconds = time.monotonic() - began
        with Control(supervisor.runtime_dir) as control:
            return seconds, control.status()["sources"][0]["requests"]


def _program(bench: Bench, kind: str, scale: int) -> list[Row]:
    """A real program, started again and again."""
    if kind == "kvm" and not os.access("/dev/kvm", os.R_OK | os.W_OK):
        raise BenchmarkFailed("/dev/kvm is missing")
    image, store = os.path.join(bench.directory, kind), os.path.join(bench.directory, f"{kind}-store")
    right = store_client.make(kind, image, scale)
    _postcopy("pack", image, f"{store}/image")
    ready, shares = list[Pair](), list[float]()
    with _slow(store) as url:
        _started(bench, f"store:{store}/image", kind, scale, right, record_working_set=True)
        for number in range(bench.scale.of(3, 1)):
            bench.say(f"store, {kind}: pair {number + 1}")
            plain, faults = _started(bench, f"store:{url}/image", kind, scale, right, chunk_cache_size=0)
            replayed, left = _started(bench, f"store:{url}/image", kind, scale, right, chunk_cache_size=0, replay=True)
            ready.append((replayed * 1000, plain * 1000))
            shares.append(100 * left / max(1, faults))
    detail = f"{faults} faults without, block of {os.path.getsize(image) >> 20} MiB"
    return [
        ratio_row(f"{kind}: time to ready with replay", ready, READY_GOAL, unit="ms", labels=("replay", "without")),
        value_row(f"{kind}: requests with replay, of those without", shares, "%", REPLAY_GOAL, detail=detail),
    ]


def _started(bench: Bench, source: str, kind: str, scale: int, right: float, **options: Any) -> tuple[float, int]:
    """Seconds from the start of the service until the program has done its task, and the requests for its faults."""
    began = time.monotonic()
    with bench.supervisor({"ram": source}, background_rate=0, fault_around=PAGE, **options) as supervisor:
        words = [sys.executable, "-m", "benchmarks.store_client", kind, str(supervisor.runtime_dir), "ram", str(scale)]
        done = subprocess.run(words, capture_output=True, text=True)
        seconds = time.monotonic() - began
        if done.returncode or float(done.stdout) != right:
            raise BenchmarkFailed(f"{kind}: {done.stdout.strip()}, not {right}: {done.stderr.strip()[-300:]}")
        with Control(supervisor.runtime_dir) as control:
            return seconds, control.status()["sources"][0]["requests"]


def _seaweed(bench: Bench) -> list[Row]:
    """An image in a real S3 server: read whole, and its first byte."""
    from tests.system.stores import SeaweedFS

    image, pages = os.path.join(bench.directory, "s3-image"), bench.scale.of(65536, 8192)
    _write_image(image, pages)
    server = SeaweedFS()
    before = dict(os.environ)
    try:
        os.environ.update(server.variables)
        server.await_ready()
        _postcopy("pack", image, "s3://bench/image")
        store = open_store("s3://bench")
        snapshot = load(store, "image")
        keys = [chunk_path(chunk) for chunk in snapshot.index.unique()]
        unpacked, served, first = list[Pair](), list[Pair](), list[float]()
        for number in range(bench.scale.of(5, 1)):
            bench.say(f"store, SeaweedFS: round {number + 1}")
            alone = _obstore_alone("s3://bench", keys)
            began = time.monotonic()
            unpack(store, snapshot, os.path.join(bench.directory, "s3-out"))
            unpacked.append(((time.monotonic() - began) * 1000, alone))
            served.append((_streamed(bench, "store:s3://bench/image"), _obstore_alone("s3://bench", keys)))
            first.append(_first_byte(bench, "store:s3://bench/image", number))
    finally:
        os.environ.clear()
        os.environ.update(before)
        server.close()
    name, labels = f"image of {pages * PAGE >> 20} MiB from SeaweedFS", ("ours", "obstore alone")
    return [
        ratio_row(f"{name}, unpack", unpacked, WHOLE_GOAL, unit="ms", labels=labels),
        ratio_row(f"{name}, serve", served, WHOLE_GOAL, unit="ms", labels=labels),
        value_row("first byte, cold, SeaweedFS", first, "ms", FIRST_GOAL),
    ]


def _obstore_alone(url: str, keys: Sequence[str]) -> float:
    """Milliseconds for all these objects, by READERS threads."""
    opened = obstore.store.from_url(url, client_options={"allow_http": True})
    began = time.monotonic()
    with ThreadPoolExecutor(READERS) as pool:
        for _ in pool.map(lambda key: len(obstore.get(opened, key).bytes()), keys):
            pass
    return (time.monotonic() - began) * 1000


def _streamed(bench: Bench, source: str) -> float:
    """Milliseconds that the whole block takes in the background, from what comes between two looks at it."""
    with (
        bench.supervisor({"ram": source}, chunk_cache_size=0) as supervisor,
        Control(supervisor.runtime_dir) as control,
    ):
        began, first = time.monotonic(), control.status()["blocks"][0]
        while (block := control.status()["blocks"][0])["received"] < block["pages"]:
            time.sleep(0.01)
        came = block["pages"] - first["received"]
        if not came:
            raise BenchmarkFailed("the whole block had come before it could be looked at")
        return float((time.monotonic() - began) * 1000 * block["pages"] / came)


def _first_byte(bench: Bench, source: str, seed: int) -> float:
    """Milliseconds of the first touch of a page."""
    with (
        bench.supervisor({"ram": source}, background_rate=0, chunk_cache_size=0) as supervisor,
        postcopy.attach("ram", supervisor.runtime_dir) as block,
    ):
        at = random.Random(seed).randrange(block.size)
        began = time.perf_counter()
        _ = block.buf[at]
        return (time.perf_counter() - began) * 1000


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
    pages = bench.scale.of(131072, 2048)
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
                _synced(f"{image}.zst")  # as the chunks are
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


def _synced(path: str) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


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
