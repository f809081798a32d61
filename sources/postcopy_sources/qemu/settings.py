"""The options of ``postcopy source qemu``."""

from __future__ import annotations

import os
from argparse import SUPPRESS
from dataclasses import dataclass

from postcopy_kernel.log_queue import FORMATS
from postcopy_protocol import arguments as args
from postcopy_wire.transport import TRANSPORTS, chosen_transport

from ..settings import Access, access_of, add_access

MODES = ("live", "pause")


@dataclass(frozen=True, slots=True)
class QemuSettings:
    listen: str
    migration: str
    qmp: str
    mode: str
    rate: int
    identity: str
    access: Access
    log_level: str
    log_format: str
    transport: str
    die_with_parent: int


def parse(arguments: list[str]) -> QemuSettings:
    """As ``postcopy_sources.settings.parse``."""
    typed = _parser().parse_args(arguments)
    return QemuSettings(
        listen=typed.listen,
        migration=typed.migration,
        qmp=typed.qmp,
        mode=typed.mode,
        rate=typed.rate,
        identity=typed.identity,
        access=access_of(typed),
        log_level=typed.log_level,
        log_format=typed.log_format,
        transport=chosen_transport(typed.transport, os.environ),
        die_with_parent=typed.die_with_parent,
    )


def _parser() -> args.Parser:
    parser = args.Parser(
        prog="postcopy source qemu",
        description="Offer the memory of a running QEMU: each of its RAM blocks is a remote block of its name.",
        epilog="Ctrl-C at any time leaves the VM running. See docs/qemu.md.",
    )
    add = parser.add_argument
    add("--listen", required=True, metavar="ENDPOINT", help="ipc:///PATH or tcp://HOST:PORT, for supervisors")
    help = "unix:PATH or tcp:HOST:PORT, where QEMU connects to"
    add("--migration", required=True, metavar="URI", help=help)
    help = "the VM's monitor socket: the migration is then started, and ended, from here"
    add("--qmp", default="", metavar="PATH", help=help)
    help = "live: an image of one moment, the VM runs on; pause: on demand, the VM stands still until all of it is here"
    parser.choice("--mode", MODES, "live", help)
    help = "with --mode pause: bytes a second of QEMU's own scan, which requested pages overtake (0: no limit)"
    parser.option("--rate", args.size_or_zero, 0, "SIZE", help)
    help = "identifies this content (default: one that no other image has)"
    add("--identity", default="", metavar="TEXT", help=help)
    add_access(parser)
    help = "ZeroMQ by native sockets or libzmq (default: $POSTCOPY_TRANSPORT, else native, which is faster)"
    add("--transport", choices=TRANSPORTS, help=help)
    parser.choice("--log-level", args.LOG_LEVELS, "info", "the least important messages that are logged")
    help = "lines for people, one JSON object a line, or lines with priorities for journald, which knows the time"
    parser.choice("--log-format", FORMATS, "text", help)
    parser.option("--die-with-parent", args.count(0, 1 << 31), 0, "PID", SUPPRESS)
    return parser
