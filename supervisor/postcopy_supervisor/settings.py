"""The options of ``postcopy serve``, validated."""

from __future__ import annotations

import os
from argparse import SUPPRESS, Namespace
from dataclasses import dataclass, field

from postcopy_kernel.log_queue import FORMATS
from postcopy_kernel.process import unmapped_ids
from postcopy_protocol import arguments as args
from postcopy_protocol.errors import BadInput
from postcopy_protocol.geometry import PAGE_2M, PAGE_4K
from postcopy_protocol.runtime_paths import runtime_directory
from postcopy_protocol.sources import HandlerSource, QemuRamSource, RemoteSource, Source, parse_named
from postcopy_wire.transport import NATIVE, TRANSPORTS, chosen_transport

from . import qemu_ram
from .admission import AllowList
from .pool.lifecycle import LONGEST_BACKOFF, RestartPolicy

LARGEST_WINDOW = 1 << 20
"""Bytes of the largest window of ``--fault-around auto``. A larger COPY blocks its loop for long and gains nothing."""
MOST_FAULT_AROUND = 64 << 20

POINTS = ("loop", "quit", "core", "foreign", "request", "place", "wake")
"""Trace points of ``--trace`` (see ``trace_points``)."""
AUTO_RATE = -1  # remote blocks at the full rate of their source, local blocks not at all


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
    shared_uids: frozenset[tuple[str, int]] = frozenset()
    shared_gids: frozenset[tuple[str, int]] = frozenset()
    allow_unmapped: bool = False
    handler_timeout: float = 30.0
    die_with_parent: int = 0
    log_level: str = "info"
    log_format: str = "text"
    curve_secret: str = ""
    source_key: str = ""
    plain_tcp: bool = False
    poison_on_loss: bool = False
    source_timeout: float = 5.0
    metrics: tuple[str, int] | None = None
    metrics_public: bool = False
    trace: frozenset[str] = frozenset()
    record: str = ""
    record_overwrite: bool = False
    restart: RestartPolicy = field(default_factory=RestartPolicy)
    walls: str = "auto"
    worker_cgroups: tuple[str, ...] = ()
    recover: bool = False
    abandon: bool = False
    orphan_timeout: float = 60.0
    poison_orphans: bool = False
    transport: str = NATIVE
    copy_on_serve: bool = False
    chunk_cache: str = ""
    chunk_cache_size: int = 0
    record_working_set: bool = False
    replay: bool = False
    handler_path: str = ""
    """The directory in which serve was started, where there are handler blocks: their modules may be in it. Looked up
    once, because every worker gets it and the directory may be removed meanwhile."""

    @property
    def foreign_clients(self) -> bool:
        """May users other than the supervisor's own attach?"""
        uids = self.allow_uids | {uid for _, uid in self.shared_uids}
        return bool(uids - {os.geteuid()} or self.allow_gids or self.shared_gids or self.allow_unmapped)

    def allow_list(self) -> AllowList:
        """Who may attach."""
        unmapped = (-1, -1) if self.allow_unmapped else unmapped_ids()
        users, groups = (self.allow_uids, self.allow_gids), (self.shared_uids, self.shared_gids)
        return AllowList(os.geteuid(), *users, *groups, unmapped)


def parse(arguments: list[str]) -> Settings:
    """Settings of a command line. Exits with status 2 and one line on wrong usage. Raises BadInput for blocks that
    contradict one another."""
    typed = _parser().parse_args(arguments)
    sources = _sources(typed.blocks)
    _check(typed, sources)
    if typed.record_working_set:  # every page that a client needs is asked for, and no other
        typed.background_rate, typed.fault_around = 0, PAGE_4K
    return Settings(
        directory=os.path.abspath(runtime_directory(typed.runtime_dir, os.environ)),
        sources=sources,
        page_size={"4K": PAGE_4K, "2M": PAGE_2M}[typed.page_size],
        fault_around=LARGEST_WINDOW if typed.fault_around is None else typed.fault_around,
        adaptive=typed.fault_around is None,
        background_rate=typed.background_rate,
        max_memory=typed.max_memory,
        allow_uids=frozenset(typed.allow_uid),
        allow_gids=frozenset(typed.allow_gid),
        shared_uids=frozenset(typed.shared_uid),
        shared_gids=frozenset(typed.shared_gid),
        allow_unmapped=typed.allow_unmapped,
        handler_timeout=typed.handler_timeout,
        die_with_parent=typed.die_with_parent,
        log_level=typed.log_level,
        log_format=typed.log_format,
        curve_secret=typed.curve_secret,
        source_key=typed.source_key,
        plain_tcp=typed.plain_tcp,
        poison_on_loss=typed.on_source_loss == "poison",
        source_timeout=typed.source_timeout,
        metrics=typed.metrics,
        metrics_public=typed.metrics_public,
        trace=typed.trace,
        record=typed.record,
        record_overwrite=typed.record_overwrite,
        restart=RestartPolicy(
            limit=typed.restart_limit,
            interval=typed.restart_interval,
            backoff=typed.restart_backoff,
            stable=typed.restart_stable,
            start_deadline=typed.start_timeout,
            poison=typed.quarantine == "poison",
        ),
        walls=typed.walls,
        worker_cgroups=tuple(typed.worker_cgroup),
        recover=typed.recover,
        abandon=typed.abandon,
        orphan_timeout=typed.orphan_timeout,
        poison_orphans=typed.on_orphan == "poison",
        transport=chosen_transport(typed.transport, os.environ),
        copy_on_serve=typed.copy_on_serve,
        chunk_cache=typed.chunk_cache,
        chunk_cache_size=typed.chunk_cache_size,
        record_working_set=typed.record_working_set,
        replay=typed.replay,
        handler_path=_handler_path(sources),
    )


def _check(typed: Namespace, sources: dict[str, Source]) -> None:
    """Raises BadInput for options that contradict one another."""
    for block, _ in (*typed.shared_uid, *typed.shared_gid):
        if block and block not in sources:
            raise BadInput(f"--shared-uid and --shared-gid: there is no block {block}")
    if typed.record_working_set and typed.replay:
        raise BadInput("--record-working-set and --replay exclude each other: what is replayed is not asked for")


def _handler_path(sources: dict[str, Source]) -> str:
    if not any(isinstance(source, HandlerSource) for source in sources.values()):
        return ""
    try:
        return os.getcwd()
    except OSError:
        raise BadInput(
            "the current directory does not exist any more, and handler modules are looked for there"
        ) from None


def _sources(blocks: list[str]) -> dict[str, Source]:
    sources: dict[str, Source] = {}
    for text in blocks:
        name, source = parse_named(text)
        if isinstance(source, QemuRamSource) and not source.block:
            sources.update(qemu_ram.sources_of(name, source, sources))
            continue
        if name in sources:
            raise BadInput(f"the name {name} is used twice: every block needs a name of its own")
        if isinstance(source, RemoteSource) and source in sources.values():
            raise BadInput(f"{source} is named twice: one block of it is enough, any number of clients may attach it")
        sources[name] = source
    return sources


def _block_right(text: str) -> tuple[str, int]:
    """Block (empty: every block) and user or group."""
    block, _, number = text.rpartition("=")
    return block, args.user_id(number)


def _points(text: str) -> frozenset[str]:
    asked = frozenset(text.split(",")) if text else frozenset()
    if unknown := asked - frozenset(POINTS) - {"all"}:
        raise BadInput(f"{min(unknown)!r} is none of {', '.join(POINTS)}, all")
    return frozenset(POINTS) if "all" in asked else asked


def _window(text: str) -> int | None:
    """Bytes of the fault-around window; None: adaptive."""
    if text == "auto":
        return None
    window = args.size(text)
    if window % PAGE_4K:
        raise BadInput(f"{text} is no whole number of pages: write auto or a multiple of 4K (4K: the faulting page)")
    if window > MOST_FAULT_AROUND:
        raise BadInput(f"{text} is too large: at most 64M, a larger COPY would block all other faults")
    return window


def _rate(text: str) -> int:
    return AUTO_RATE if text == "auto" else args.size_or_zero(text)


def _parser() -> args.Parser:
    parser = args.Parser(
        prog="postcopy serve",
        description="Serve RAM blocks that are populated lazily. Clients may attach at once; pages come when touched.",
        epilog="SOURCE is a file, handler:MODULE:FUNCTION?size=SIZE, zero:SIZE, qemu-ram:FILE, ipc://PATH/BLOCK, "
        "tcp://HOST:PORT/BLOCK, store:STORE/NAME (see postcopy pack) or peers:URL,...,store:STORE/NAME. "
        "Sizes take K, M, G. "
        "SIGTERM and SIGINT end the supervisor in order.",
    )
    parser.add_argument("blocks", nargs="+", metavar="NAME=SOURCE", help="a RAM block and where its bytes come from")
    parser.add_argument("--runtime-dir", metavar="DIR", help=args.RUNTIME_DIR_HELP)
    _add_paging(parser)
    _add_access(parser)
    _add_sources(parser)
    _add_workers(parser)
    _add_observation(parser)
    _add_recovery(parser)
    _add_hidden(parser)
    return parser


def _add_paging(parser: args.Parser) -> None:
    help = "page size of all blocks; 2M needs reserved huge pages"
    parser.add_argument("--page-size", default="4K", type=str.upper, choices=("4K", "2M"), help=help)
    help = "bytes placed around a fault; auto: the window grows while a client reads in sequence"
    parser.option("--fault-around", _window, "auto", "auto|SIZE", help)
    help = "bytes a second streamed ahead of faults; 0: none; auto: remote blocks at full rate, local blocks not at all"
    parser.option("--background-rate", _rate, "auto", "auto|RATE", help)
    parser.flag("--copy-on-serve", args.COPY_HELP)
    help = "no fault-around and no background stream beyond this much memory; 0: no limit"
    parser.option("--max-memory", args.size_or_zero, "0", "SIZE", help)


def _add_access(parser: args.Parser) -> None:
    parser.option("--allow-uid", args.user_id, [], "UID", "another user who may attach (repeat)", repeat=True)
    help = "a group whose members may attach (repeat)"
    parser.option("--allow-gid", args.user_id, [], "GID", help, repeat=True)
    help = "another user who may attach, also shared: it may write all blocks, or this one (repeat)"
    parser.option("--shared-uid", _block_right, [], "[BLOCK=]UID", help, repeat=True)
    help = "a group whose members may attach, also shared (repeat)"
    parser.option("--shared-gid", _block_right, [], "[BLOCK=]GID", help, repeat=True)
    help = "in a user namespace: allow all users who have no number in it"
    parser.flag("--allow-unmapped", help)


def _add_sources(parser: args.Parser) -> None:
    add = parser.add_argument
    help = "kill the worker of a handler that takes longer"
    parser.option("--handler-timeout", args.seconds(), 30.0, "SECONDS", help)
    add("--curve-secret", default="", metavar="FILE", help="own CURVE key pair, for tcp sources (see postcopy keygen)")
    add("--source-key", default="", metavar="FILE", help="public CURVE key of the tcp sources")
    parser.flag("--plain-tcp", "allow tcp sources without keys: anyone on the network path can read and change pages")
    help = "what missing pages do while their source is away: wait, or SIGBUS in the client"
    parser.choice("--on-source-loss", ("wait", "poison"), "wait", help)
    help = "ZeroMQ by native sockets or libzmq (default: $POSTCOPY_TRANSPORT, else native, which is faster)"
    parser.add_argument("--transport", choices=TRANSPORTS, help=help)
    parser.add_argument("--chunk-cache", default="", metavar="DIR", help=args.CHUNK_CACHE_HELP)
    parser.option("--chunk-cache-size", args.size_or_zero, "10G", "SIZE", args.CHUNK_CACHE_SIZE_HELP)
    help = f"{args.RECORD_WORKING_SET_HELP}: no page comes unasked then"
    parser.flag("--record-working-set", help)
    parser.flag("--replay", args.REPLAY_HELP)
    parser.option("--source-timeout", args.seconds(), 5.0, "SECONDS", "a source that is silent longer is lost")


def _add_workers(parser: args.Parser) -> None:
    """How workers are confined, and how those that crash are replaced."""
    policy = RestartPolicy()
    help = "crashes of a worker within --restart-interval before its client is quarantined"
    parser.option("--restart-limit", args.count(0, 999999), policy.limit, "N", help)
    help = "the time in which crashes are counted"
    parser.option("--restart-interval", args.seconds(), policy.interval, "SECONDS", help)
    help = "missing pages of a quarantined client: SIGBUS, or wait until postcopy resume CLIENT"
    parser.choice("--quarantine", ("poison", "wait"), "poison", help)
    help = "Landlock and seccomp for workers without a handler of yours; all: for all workers; off: for none"
    parser.choice("--walls", ("auto", "all", "off"), "auto", help)
    help = "a cgroup that workers enter (repeat for several hierarchies)"
    parser.add_argument("--worker-cgroup", action="append", default=[], metavar="DIR", help=help)


def _add_observation(parser: args.Parser) -> None:
    parser.option("--metrics", args.host_and_port, None, "HOST:PORT", "answer Prometheus there, as in 127.0.0.1:9464")
    parser.flag("--metrics-public", "--metrics may be an address that other machines reach")
    parser.add_argument(
        "--record", default="", metavar="FILE", help="write every fault to FILE (read it with postcopy trace)"
    )
    parser.flag("--record-overwrite", "--record may overwrite an older trace, as after a restart")
    parser.option("--trace", _points, "", "POINT,...", f"log these, one line each: {', '.join(POINTS)}, all")
    parser.choice("--log-level", args.LOG_LEVELS, "info", "the least important messages that are logged")
    help = "lines for people, one JSON object a line, or lines with priorities for journald, which knows the time"
    parser.choice("--log-format", FORMATS, "text", help)


def _add_recovery(parser: args.Parser) -> None:
    """What happens to the clients of a supervisor that died."""
    takeover = parser.add_mutually_exclusive_group()
    help = "take over clients and workers of a dead supervisor, if there are any; rescue clients if all processes died"
    takeover.add_argument("--recover", action="store_true", help=help)
    help = "do not take over clients of a dead supervisor; their workers keep serving local blocks"
    takeover.add_argument("--abandon", action="store_true", help=help)
    help = "how long clients go on without a supervisor before --on-orphan applies"
    parser.option("--orphan-timeout", args.seconds(), 60.0, "SECONDS", help)
    parser.choice(
        "--on-orphan",
        ("wait", "poison"),
        "wait",
        "what missing pages of remote blocks do then, and all missing pages if every process died",
    )


def _add_hidden(parser: args.Parser) -> None:
    """Options for tests and for embedding: no operator needs to set them."""
    policy = RestartPolicy()
    # The wait before the second restart. It doubles with every crash; the first restart is immediate.
    parser.option("--restart-backoff", args.seconds(0.001, LONGEST_BACKOFF), policy.backoff, "SECONDS", SUPPRESS)
    # A worker that lived this long has its earlier crashes forgiven.
    parser.option("--restart-stable", args.seconds(), policy.stable, "SECONDS", SUPPRESS)
    parser.option("--start-timeout", args.seconds(), policy.start_deadline, "SECONDS", SUPPRESS)
    # The process id of our parent: the supervisor ends when it ends.
    parser.option("--die-with-parent", args.count(0, 1 << 31), 0, "PID", SUPPRESS)
