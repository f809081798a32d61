"""The commands on snapshots: their options, their progress, and what they print."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from postcopy_protocol import arguments as args
from postcopy_protocol.caibx import DIGESTS, LARGEST_CHUNK, SHA256
from postcopy_protocol.errors import BadInput
from postcopy_protocol.geometry import PAGE_4K
from postcopy_protocol.runtime_paths import runtime_directory, trusted_users
from postcopy_protocol.sizes import format_size
from postcopy_protocol.sources import check_store, parse_block_name, parse_location

from ..source import PageSource
from .collecting import collect
from .comparing import described, difference
from .compression import DEFAULT_LEVEL, LEVELS
from .opening import open_store
from .packing import CHUNK_BYTES, pack
from .snapshots import load
from .unpacking import check, unpack

Progress = Callable[[int], object]

_STORE_HELP = (
    "STORE is a directory, s3://BUCKET/PREFIX, gs://BUCKET/PREFIX, az://CONTAINER/PREFIX, or http(s):// to read."
)


def run(arguments: list[str]) -> int:
    """Run a command; returns its exit status. Raises PostcopyError, OSError; exits 2 on wrong usage."""
    commands = {"pack": _pack, "unpack": _unpack, "inspect": _inspect, "diff": _diff, "gc": _gc}
    if not arguments or arguments[0] not in commands:
        raise BadInput(f"name one of {', '.join(commands)}")
    return commands[arguments[0]](arguments[1:])


def _parser(command: str, description: str) -> args.Parser:
    parser = args.Parser(prog=f"postcopy {command}", description=description, epilog=_STORE_HELP)
    parser.flag("--json", "print one JSON document on stdout and nothing else")
    return parser


def _pack(arguments: list[str]) -> int:
    parser = _parser("pack", "Write the memory image SOURCE into a store, as chunks that casync and desync read too.")
    parser.add_argument("source", metavar="SOURCE", help="a file, or with --from the name of a block")
    parser.add_argument("place", metavar="STORE/NAME", help="where the snapshot goes, and its name")
    parser.add_argument(
        "--from", dest="runtime_dir", metavar="RUNTIME_DIR", help="pack a block of the supervisor there"
    )
    help = "with --from: a user whose supervisor is trusted, beside this one and root (repeat)"
    parser.option("--trust-uid", args.user_id, [], "UID", help, repeat=True)
    parser.option("--chunk-size", _chunk_size, format_size(CHUNK_BYTES), "SIZE", "bytes of a chunk, a multiple of 4K")
    help = "how chunks are named; desync expects sha512-256 unless it is given --digest sha256"
    parser.choice("--digest", DIGESTS, SHA256, help)
    parser.option("--level", args.count(*LEVELS), DEFAULT_LEVEL, "N", "of zstd: 1 is fast, 19 is small")
    parser.option("--threads", args.count(1, 256), 0, "N", "threads that hash, compress and upload (default: by CPUs)")
    typed = parser.parse_args(arguments)
    place = parse_location(typed.place)
    store, source = open_store(place.store), _source(typed)
    with _progress("pack", source.size, typed) as progress:
        snapshot, counted = pack(
            source,
            store,
            place.name,
            chunk_bytes=typed.chunk_size,
            digest=typed.digest,
            level=typed.level,
            threads=typed.threads,
            progress=progress,
        )
    document = {"name": place.name, "store": place.store, "identity": snapshot.identity} | asdict(counted)
    document |= {"digest": typed.digest, "chunk_size": typed.chunk_size}
    return _report(
        typed,
        document,
        f"{place.name}: {format_size(counted.size)} packed into {place.store}: {counted.chunks} chunks, "
        f"{counted.new} of them new ({_bytes(counted.uploaded)} uploaded), "
        f"{_share(counted.zero_pages * PAGE_4K, counted.size)} zeros, {typed.digest}",
    )


def _chunk_size(text: str) -> int:
    size = args.size(text)
    if size % PAGE_4K or size > LARGEST_CHUNK:
        raise BadInput(f"{text}: a chunk is a multiple of 4K, at most {format_size(LARGEST_CHUNK)}")
    return size


def _source(typed: argparse.Namespace) -> PageSource:
    if typed.runtime_dir is None:
        from ..file_source import FileSource

        return FileSource("image", typed.source)
    from ..supervisor_source import SupervisorSource

    directory = runtime_directory(typed.runtime_dir, os.environ)
    trust = frozenset(typed.trust_uid) | trusted_users(os.environ)
    return SupervisorSource(directory, parse_block_name(typed.source), trust)


def _unpack(arguments: list[str]) -> int:
    parser = _parser("unpack", "Write a snapshot to a file, every chunk checked. An interrupted unpack is continued.")
    parser.add_argument("place", metavar="STORE/NAME", help="the snapshot")
    parser.add_argument("file", metavar="FILE", help="the file that is written")
    typed = parser.parse_args(arguments)
    place = parse_location(typed.place)
    store = open_store(place.store)
    snapshot = load(store, place.name)
    with _progress("unpack", snapshot.index.size, typed) as progress:
        done = unpack(store, snapshot, typed.file, progress)
    resumed = f", {format_size(done.resumed)} of it were there already" if done.resumed else ""
    text = f"{place.name}: {format_size(done.size)} written to {typed.file} ({_bytes(done.fetched)} fetched{resumed})"
    return _report(typed, {"name": place.name, "store": place.store, "file": typed.file} | asdict(done), text)


def _inspect(arguments: list[str]) -> int:
    parser = _parser("inspect", "Show what a snapshot is.")
    parser.add_argument("place", metavar="STORE/NAME", help="the snapshot")
    parser.flag("--pages", "with --json: the pages of the working set, in the order of their first use")
    parser.flag("--check", "fetch every chunk and check it; exit 1 when one is missing or damaged")
    typed = parser.parse_args(arguments)
    place = parse_location(typed.place)
    store = open_store(place.store)
    snapshot = load(store, place.name)
    document = described(snapshot, pages=typed.pages) | {"store": place.store}
    lines = [
        f"{place.name}: {format_size(document['size'])}, {document['identity']}",
        f"  {document['chunks']} chunks of up to {format_size(document['chunk_size'])} ({document['digest']}), "
        f"{document['unique_chunks']} different",
    ]
    if snapshot.sidecar is None:
        lines.append("  no sidecar: pages of zeros are fetched with their chunks, and nothing can be replayed")
    else:
        lines.append(f"  {_share(document['zero_pages'], document['pages'])} of its pages are zeros")
        found = document["working_set"]
        lines.append(
            f"  working set of {found['runs']} runs: {found['pages']} pages, {format_size(found['bytes'])}"
            if found
            else "  no working set is recorded"
        )
    if not typed.check:
        return _report(typed, document, "\n".join(lines))
    with _progress("check", document["unique_bytes"], typed) as progress:
        missing, damaged = check(store, snapshot, progress)
    document |= {"missing": missing, "damaged": damaged}
    lines += [f"  missing: chunk {chunk}" for chunk in missing] + [f"  damaged: chunk {chunk}" for chunk in damaged]
    if not missing and not damaged:
        lines.append("  every chunk is there and has the right digest")
    _report(typed, document, "\n".join(lines))
    return 1 if missing or damaged else 0


def _diff(arguments: list[str]) -> int:
    parser = _parser("diff", "Compare two snapshots by their indexes. Exit 1 when they differ.")
    for name in ("first", "second"):
        parser.add_argument(name, metavar="STORE/NAME", help=f"the {name} snapshot")
    typed = parser.parse_args(arguments)
    first, second = (parse_location(text) for text in (typed.first, typed.second))
    one, other = (load(open_store(place.store), place.name) for place in (first, second))
    if one.index.digest != other.index.digest:
        raise BadInput(f"{first.name} names its chunks by {one.index.digest}, {second.name} by {other.index.digest}")
    found = difference(one, other)
    text = (
        f"{second.name}: {format_size(found['sizes'][1])}, {found['changed_chunks']} of {found['chunks'][1]} chunks "
        f"are not as in {first.name} ({_share(found['changed_bytes'], found['sizes'][1])}); "
        f"{found['new_chunks']} are new ({_bytes(found['new_bytes'])})"
    )
    _report(typed, found, f"{first.name} and {second.name} are the same" if found["same"] else text)
    return 0 if found["same"] else 1


def _gc(arguments: list[str]) -> int:
    parser = _parser("gc", "Remove the chunks of a store that no snapshot (.caibx) in it names.")
    parser.add_argument("store", metavar="STORE", help="the store; other tools' indexes must be in it too")
    parser.flag("--dry-run", "remove nothing, only say what would be removed")
    typed = parser.parse_args(arguments)
    found = collect(open_store(check_store(typed.store)), dry_run=typed.dry_run)
    would = "would be removed" if typed.dry_run else "removed"
    text = (
        f"{typed.store}: {found.snapshots} snapshots with {found.kept_chunks} chunks; {found.removed_chunks} chunks "
        f"({_bytes(found.removed_bytes)}) and {found.removed_others} other files {would}"
    )
    return _report(typed, {"store": typed.store, "dry_run": typed.dry_run} | asdict(found), text)


def _report(typed: argparse.Namespace, document: dict[str, Any], text: str) -> int:
    print(json.dumps(document) if typed.json else text)
    return 0


def _share(part: int, whole: int) -> str:
    return f"{part / whole:.0%}" if whole else "0%"


def _bytes(count: int) -> str:
    """Rounded, for people."""
    value, units = float(count), iter(("B", "KiB", "MiB", "GiB"))
    unit = next(units)
    for larger in units:
        if value < 1024:
            break
        value, unit = value / 1024, larger
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


@contextmanager
def _progress(what: str, total: int, typed: argparse.Namespace) -> Iterator[Progress]:
    """A bar on a terminal."""
    if typed.json or not sys.stderr.isatty():
        yield lambda done: None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    columns = (BarColumn(), DownloadColumn(binary_units=True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bars:
        bar = bars.add_task(what, total=total)
        yield lambda done: bars.update(bar, advance=done)
