"""``postcopy attach vhost-user``: give a back-end memory made of blocks, until it hangs up or until Ctrl-C."""

from __future__ import annotations

import re
import select
import time
from typing import TYPE_CHECKING, Annotated

import typer

from postcopy_protocol.arguments import address
from postcopy_protocol.sizes import format_size
from postcopy_protocol.sources import parse_block_name

from ..errors import BackEndGone, BadInput, NoSupervisor, PostcopyError
from .attach_firecracker import attach_firecracker
from .options import RuntimeDir, Timeout, TrustUid

if TYPE_CHECKING:
    from ..vhost_user import BackEnd, GuestMemory

_REGION = re.compile(r"(?P<block>[^:@]+)(:(?P<offset>[^+@]+)\+(?P<size>[^@]+))?(@(?P<guest>.+))?")
_CHECK_EVERY = 0.2
_RETRY_EVERY = 0.1

Blocks = Annotated[
    list[str],
    typer.Option("--block", metavar="NAME[:OFFSET+SIZE][@GUEST]", help="A region of guest memory; 1 to 8 of them."),
]
Order = Annotated[
    str,
    typer.Option(
        "--order",
        metavar="standard|rust-vmm",
        help="Order of the messages; rust-vmm back-ends need the memory table first.",
    ),
]
Process = Annotated[
    int | None, typer.Option("--pid", help="The back-end's process, if another process made the socket.")
]


def add_to(app: typer.Typer) -> None:
    group = typer.Typer(help="Make another program a client.", no_args_is_help=False)
    group.callback()(_attach)
    group.command("vhost-user")(attach_vhost_user)
    group.command("firecracker")(attach_firecracker)
    app.add_typer(group, name="attach")


def _attach() -> None:
    """Make another program a client: its memory is blocks of the supervisor."""


def attach_vhost_user(
    socket: Annotated[str, typer.Argument(metavar="SOCKET", help="Where the back-end listens.")],
    blocks: Blocks,
    name: Annotated[str, typer.Option("--name", help="Name in the status [default: the socket's].")] = "",
    pid: Process = None,
    order: Order = "standard",
    reconnect: Annotated[
        bool, typer.Option("--reconnect", help="When the back-end ends, wait for the next one.")
    ] = False,
    timeout: Timeout = 30.0,
    trust_uid: TrustUid = None,
    runtime_dir: RuntimeDir = None,
) -> None:
    """Give a vhost-user back-end guest memory made of blocks; pages arrive when it touches them.

    Ends post-copy when every page has arrived. Runs until the back-end hangs up (status 1) or Ctrl-C."""
    from ..vhost_user import BackEnd

    memory = [parse_region(text) for text in blocks]
    if len(memory) > 8:
        raise BadInput(f"{len(memory)} regions: a back-end takes at most 8")
    while True:
        try:
            with BackEnd(socket, memory, runtime_dir, pid=pid, name=name, timeout=timeout, order=order) as back_end:
                _describe(back_end)
                _serve(back_end)
        except ValueError as error:
            raise BadInput(str(error)) from None
        except BackEndGone as error:
            if not reconnect:
                raise
            print(f"{error}; waiting for it", flush=True)
            pid = None  # the next back-end is another process
            _wait_for(socket)


def parse_region(text: str) -> GuestMemory:
    """``NAME[:OFFSET+SIZE][@GUEST]``; sizes as everywhere, addresses may be hexadecimal. Raises BadInput."""
    from ..vhost_user import GuestMemory

    match = _REGION.fullmatch(text)
    if match is None:
        raise BadInput(f"--block {text!r}: write NAME, NAME@GUEST, or NAME:OFFSET+SIZE@GUEST")
    size = match["size"]
    return GuestMemory(
        parse_block_name(match["block"]),
        address(match["offset"] or "0"),
        address(size) if size else None,
        address(match["guest"]) if match["guest"] else None,
    )


def _describe(back_end: BackEnd) -> None:
    print(f"attached {back_end.path} (pid {back_end.pid})")
    names = {block.number: block.name for block in back_end.blocks.values()}
    for number, region in back_end.regions:
        print(f"  {format_size(region.size)} of {names[number]} from {region.offset} at {region.guest:#x}")
    for quirk in back_end.quirks:
        print(f"  quirk: {QUIRKS[quirk]}")
    print(end="", flush=True)


GONE = "the supervisor has died; its workers continue to serve"
QUIRKS = {
    "addresses-echoed": "it returned our own addresses (libvhost-user); the true ones were read from its maps",
    "open-before-registered": "its memory is accessible before it is registered (DPDK): a touch then would be zeros",
    "registration-unproven": "no permission to read its smaps, so it is not proven that its memory is registered",
}


def _serve(back_end: BackEnd) -> None:
    """Follow the back-end until it ends. Raises BackEndGone, NoSupervisor."""
    poll = select.poll()
    poll.register(back_end.pidfd, select.POLLIN)
    poll.register(back_end.channel, select.POLLIN)
    ended = alone = False
    while True:
        events = poll.poll(_CHECK_EVERY * 1000)
        if back_end.gone:
            raise BackEndGone(f"the back-end at {back_end.path} (pid {back_end.pid}) has ended")
        if events:
            raise PostcopyError(f"the back-end at {back_end.path} sent a message without a request")
        reason = back_end.side.ending
        if reason is not None and not ended:
            raise NoSupervisor(f"the supervisor has ended ({reason}): missing pages are SIGBUS in the back-end")
        if not ended and back_end.complete:
            back_end.end()
            ended = True
            print("all pages have arrived: post-copy has ended", flush=True)
        if alone == back_end.side.connection.usable and not ended:
            alone = not alone
            print(GONE if alone else "another supervisor has taken over", flush=True)


def _wait_for(socket: str) -> None:
    """Wait until a process listens again."""
    from ..vhost_user.channel import is_listening

    while not is_listening(socket):
        time.sleep(_RETRY_EVERY)
