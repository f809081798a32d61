"""What ``postcopy serve`` is told, checked."""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass, field
from typing import NoReturn

from postcopy_protocol.errors import BadInput
from postcopy_protocol.geometry import PAGE_2M, PAGE_4K
from postcopy_protocol.runtime_paths import runtime_directory
from postcopy_protocol.sizes import parse_size
from postcopy_protocol.sources import RemoteSource, Source, parse_named
from postcopy_wire.transport import NATIVE, TRANSPORTS, chosen_transport

from .pool.lifecycle import LONGEST_BACKOFF, RestartPolicy

LARGEST_WINDOW = 1 << 20
"""Bytes of the largest window of ``--fault-around auto``: beyond it a COPY blocks its loop for long and gains
nothing."""


POINTS = ("loop", "quit", "core", "foreign", "request", "place", "wake")
"""Trace points of ``--trace`` (see ``tracing``)."""
AUTO_RATE = -1
"""Remote blocks as fast as their source gives them, local ones not at all."""


@dataclass(frozen=True, slots=True)
class Settings:
    """Sizes in bytes, times in seconds, rates in bytes a second."""

    directory: str
    sources: dict[str, Source]
    page_size: int = PAGE_4K
    fault_around: int = LARGEST_WINDOW
    adaptive: bool = True
    background_rate: int = AUTO_RATE
    max_memory: int = 0
    allow_uids: frozenset[int] = frozenset()
    allow_gids: frozenset[int] = frozenset()
    handler_timeout: float = 30.0
    die_with_parent: int = 0
    log_level: str = "info"
    curve_secret: str = ""
    source_key: str = ""
    plain_tcp: bool = False
    poison_on_loss: bool = False
    source_timeout: float = 5.0
    metrics: tuple[str, int] | None = None
    trace: frozenset[str] = frozenset()
    record: str = ""
    restart: RestartPolicy = field(default_factory=RestartPolicy)
    walls: str = "auto"
    worker_cgroups: tuple[str, ...] = ()
    recover: bool = False
    abandon: bool = False
    orphan_timeout: float = 60.0
    poison_orphans: bool = False
    transport: str = NATIVE


def parse(arguments: list[str]) -> Settings:
    """Settings of a command line; exits 2 with one line on wrong usage. Raises BadInput for values that are no
    values."""
    told = _parser().parse_args(arguments)
    sources: dict[str, Source] = {}
    for text in told.blocks:
        name, source = parse_named(text)
        if name in sources:
            raise BadInput(f"the name {name} is used twice: every block needs a name of its own")
        if isinstance(source, RemoteSource) and source in sources.values():
            raise BadInput(f"{source} is named twice: one block of it is enough, any number of clients may attach it")
        sources[name] = source
    auto = told.fault_around == "auto"
    return Settings(
        directory=os.path.abspath(runtime_directory(told.runtime_dir, os.environ)),
        sources=sources,
        page_size={"4K": PAGE_4K, "2M": PAGE_2M}[told.page_size.upper()],
        fault_around=LARGEST_WINDOW if auto else _window(told.fault_around),
        adaptive=auto,
        background_rate=AUTO_RATE
        if told.background_rate == "auto"
        else _size("--background-rate", told.background_rate, zero=True),
        max_memory=_size("--max-memory", told.max_memory, zero=True),
        allow_uids=frozenset(told.allow_uid),
        allow_gids=frozenset(told.allow_gid),
        handler_timeout=told.handler_timeout,
        die_with_parent=told.die_with_parent,
        log_level=told.log_level,
        curve_secret=told.curve_secret,
        source_key=told.source_key,
        plain_tcp=told.plain_tcp,
        poison_on_loss=told.on_source_loss == "poison",
        source_timeout=told.source_timeout,
        metrics=_address(told.metrics) if told.metrics else None,
        trace=_points(told.trace),
        record=told.record,
        restart=RestartPolicy(
            limit=told.restart_limit,
            interval=told.restart_interval,
            backoff=told.restart_backoff,
            stable=told.restart_stable,
            start_deadline=told.start_timeout,
            poison=told.quarantine == "poison",
        ),
        walls=told.walls,
        worker_cgroups=tuple(told.worker_cgroup),
        recover=told.recover,
        abandon=told.abandon,
        orphan_timeout=told.orphan_timeout,
        poison_orphans=told.on_orphan == "poison",
        transport=chosen_transport(told.transport, os.environ),
    )


class _Parser(argparse.ArgumentParser):
    """An error is one line, here as everywhere."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _size(option: str, text: str, *, zero: bool = False) -> int:
    try:
        return parse_size(text, zero=zero)
    except BadInput as error:
        raise BadInput(f"{option}: {error}") from None


def _address(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isascii() or not port.isdigit() or int(port) > 65535:
        raise BadInput(f"--metrics {text!r}: write HOST:PORT, as in 127.0.0.1:9464")
    return host.strip("[]"), int(port)


def _points(text: str) -> frozenset[str]:
    asked = frozenset(text.split(",")) if text else frozenset()
    if unknown := asked - frozenset(POINTS) - {"all"}:
        raise BadInput(f"--trace {min(unknown)!r} is none of {', '.join(POINTS)}, all")
    return frozenset(POINTS) if "all" in asked else asked


def _window(text: str) -> int:
    window = _size("--fault-around", text)
    if window % PAGE_4K:
        raise BadInput(f"--fault-around {text} is no whole number of pages: write auto, 0, or a multiple of 4K")
    if window > 64 << 20:
        raise BadInput(f"--fault-around {text} is too large: at most 64M, a larger COPY would block all other faults")
    return window


def _seconds(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.1 <= value <= 86400:
        raise argparse.ArgumentTypeError(f"{text!r}: write 0.1 to 86400 seconds")
    return value


def _backoff(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0.001 <= value <= LONGEST_BACKOFF:
        raise argparse.ArgumentTypeError(f"{text!r}: write 0.001 to {LONGEST_BACKOFF:g} seconds")
    return value


def _limit(text: str) -> int:
    if not text.isascii() or not text.isdigit() or len(text) > 6:
        raise argparse.ArgumentTypeError(f"{text!r}: a number of crashes is 0 to 999999")
    return int(text)


def _uid(text: str) -> int:
    if not text.isascii() or not text.isdigit() or int(text) >= 1 << 32:
        raise argparse.ArgumentTypeError(f"{text!r}: a user or group id is a number from 0 to 4294967295")
    return int(text)


def _parser() -> _Parser:
    parser = _Parser(
        prog="postcopy serve",
        description="Serve RAM blocks populated lazily: clients attach at once, pages come when they are touched.",
        epilog="SOURCE is a file, handler:MODULE:FUNCTION?size=SIZE, zero:SIZE, ipc://PATH/BLOCK or "
        "tcp://HOST:PORT/BLOCK. Sizes take K, M, G. SIGTERM ends in order.",
    )
    add = parser.add_argument
    add("blocks", nargs="+", metavar="NAME=SOURCE", help="a RAM block and where its bytes come from")
    add("--runtime-dir", help="directory of the sockets (default: see the README)")
    add("--page-size", default="4K", type=str.upper, choices=("4K", "2M"), help="2M needs reserved huge pages")
    add(
        "--fault-around",
        default="auto",
        metavar="auto|SIZE",
        help="pages placed around a fault (auto: grows on sequences)",
    )
    add(
        "--background-rate",
        default="auto",
        metavar="auto|RATE",
        help="bytes a second placed before anybody asks (0: none; auto: remote blocks at full rate, local ones not)",
    )
    add("--max-memory", default="0", metavar="SIZE", help="stop fault-around and background beyond it (0: no limit)")
    add(
        "--allow-uid",
        action="append",
        default=[],
        type=_uid,
        metavar="UID",
        help="another user who may attach (repeat)",
    )
    add(
        "--allow-gid",
        action="append",
        default=[],
        type=_uid,
        metavar="GID",
        help="a group whose members may attach (repeat)",
    )
    add(
        "--handler-timeout",
        default=30.0,
        type=_seconds,
        metavar="SECONDS",
        help="a handler that takes longer is killed",
    )
    add("--curve-secret", default="", metavar="FILE", help="our CURVE key pair, for tcp sources (postcopy keygen)")
    add("--source-key", default="", metavar="FILE", help="public CURVE key of the tcp sources")
    add("--plain-tcp", action="store_true", help="let tcp sources be plain: everybody on the way can read and change")
    add(
        "--on-source-loss",
        default="wait",
        choices=("wait", "poison"),
        help="what missing pages do while a source is away",
    )
    add("--source-timeout", default=5.0, type=_seconds, metavar="SECONDS", help="silence after which a source is lost")
    _add_restart(parser)
    add(
        "--walls",
        default="auto",
        choices=("auto", "all", "off"),
        help="Landlock and seccomp for workers that run no handler of yours (all: for those too; off: for none)",
    )
    add(
        "--worker-cgroup",
        action="append",
        default=[],
        metavar="DIR",
        help="a cgroup that workers enter (repeat for several hierarchies)",
    )
    add("--metrics", default="", metavar="HOST:PORT", help="answer Prometheus there, as in 127.0.0.1:9464")
    add("--record", default="", metavar="FILE", help="write every fault there (read it with: postcopy trace)")
    add("--trace", default="", metavar="POINT,...", help=f"log these, one line each: {', '.join(POINTS)}, all")
    _add_recovery(parser)
    add("--transport", choices=TRANSPORTS, help="ZeroMQ by native sockets or libzmq (default: native, which is faster)")
    add("--log-level", default="info", choices=("debug", "info", "warning", "error"))
    add("--die-with-parent", type=int, default=0, metavar="PID", help="end when the process PID, our parent, ends")
    return parser


def _add_restart(parser: _Parser) -> None:
    """How workers that end unasked are replaced, and when no more."""
    law, add = RestartPolicy(), parser.add_argument
    add("--restart-limit", default=law.limit, type=_limit, metavar="N", help="crashes of a worker that are forgiven")
    add(
        "--restart-interval",
        default=law.interval,
        type=_seconds,
        metavar="SECONDS",
        help="in which more than N crashes put a client into quarantine",
    )
    add(
        "--restart-backoff",
        default=law.backoff,
        type=_backoff,
        metavar="SECONDS",
        help="wait before the second restart, doubled from crash to crash (the first waits for nothing)",
    )
    add(
        "--restart-stable",
        default=law.stable,
        type=_seconds,
        metavar="SECONDS",
        help="a worker that lived so long has its earlier crashes forgiven",
    )
    add("--start-timeout", default=law.start_deadline, type=_seconds, metavar="SECONDS", help="for a worker to start")
    add(
        "--quarantine",
        default="poison",
        choices=("poison", "wait"),
        help="missing pages of a quarantined client: SIGBUS, or wait until postcopy resume CLIENT",
    )


def _add_recovery(parser: _Parser) -> None:
    """A supervisor that is gone, and the next one."""
    last = parser.add_mutually_exclusive_group()
    last.add_argument("--recover", action="store_true", help="take over what a supervisor that is gone left, if any")
    last.add_argument("--abandon", action="store_true", help="leave the clients of one that is gone to their workers")
    parser.add_argument(
        "--orphan-timeout",
        default=60.0,
        type=_seconds,
        metavar="SECONDS",
        help="how long clients go on without a supervisor before --on-orphan",
    )
    parser.add_argument(
        "--on-orphan",
        default="wait",
        choices=("wait", "poison"),
        help="what missing pages of remote blocks do then",
    )
