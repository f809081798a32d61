"""``postcopy source qemu``: from the command line to a VM that runs on."""

from __future__ import annotations

import json
import logging
import secrets
import signal
from contextlib import ExitStack

from ..endpoint import check_endpoint, refuse_second
from .channel import Listener
from .live import LiveFeed
from .memory import VmMemory
from .pause import PauseFeed
from .qmp import Monitor
from .settings import QemuSettings

log = logging.getLogger(__name__)

COMMANDS = {
    "live": (
        ("migrate-set-capabilities", {"capabilities": [{"capability": "background-snapshot", "state": True}]}),
        ("migrate", {}),
    ),
    "pause": (
        ("migrate-set-capabilities", {"capabilities": [{"capability": "postcopy-ram", "state": True}]}),
        ("migrate-set-parameters", {"max-bandwidth": 8 << 20, "max-postcopy-bandwidth": 0}),
        ("migrate", {}),
        ("migrate-start-postcopy", None),
    ),
}
"""What to type into a monitor that we do not have; the place of the migration is added."""


def run(settings: QemuSettings) -> None:
    """Serve the VM's memory until a signal comes, then give the VM back. Raises PostcopyError, KeyboardInterrupt."""
    access = settings.access
    check_endpoint(settings.listen, access.curve, access.allow, access.plain_tcp)
    if settings.listen.startswith("ipc://"):
        refuse_second(settings.listen.removeprefix("ipc://"))
    for number in (signal.SIGTERM, signal.SIGINT):  # SIGINT is ignored where a shell has started us behind it
        signal.signal(number, signal.default_int_handler)
    with ExitStack() as stack:
        listener = Listener(settings.migration)
        stack.callback(listener.close)
        monitor = stack.enter_context(Monitor(settings.qmp)) if settings.qmp else None
        identity = settings.identity or f"qemu-{settings.mode}-{secrets.token_hex(8)}"
        memory = VmMemory(identity, usable=settings.mode == "live")
        feed = (LiveFeed if settings.mode == "live" else PauseFeed)(listener, memory, monitor)
        stack.callback(feed.finish)
        stack.callback(_ignore_signals)
        if monitor is not None:
            feed.begin(settings.migration, settings.rate)
        else:
            for command in typed_commands(settings.mode, settings.migration):
                log.info("type into the VM's monitor: %s", command)
        from ..serving import serve  # while QEMU prepares

        feed.await_blocks()
        serve(
            [block for block in memory.blocks if block.offered],
            settings.listen,
            curve=access.curve,
            allow=access.allow,
            plain_tcp=access.plain_tcp,
            transport=settings.transport,
            feed=feed,
        )


def _ignore_signals() -> None:
    """The VM is being given back."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def typed_commands(mode: str, uri: str) -> list[str]:
    """The QMP commands that begin a migration."""
    lines = []
    for name, arguments in COMMANDS[mode]:
        given = {"uri": uri} if name == "migrate" else arguments
        lines.append(json.dumps({"execute": name} | ({"arguments": given} if given else {})))
    return lines
